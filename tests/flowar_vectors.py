"""Reader of the reference vectors of FlowAR, and the tiny models they were made with."""
import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from models import FlowAR
from models.noise import ImageNoise

DATA = Path(__file__).parent / 'data' / 'flowar'


@functools.cache
def load_json(name):
    return json.loads((DATA / f'{name}.json').read_text())


@functools.cache
def load_tensors(name):
    return load_file(DATA / f'{name}.safetensors')


def filled(shapes, seed, prefix=''):
    """Weights by name and shape, see README.md beside the vectors; `prefix` completes the names."""
    state = {}
    for local, shape in shapes.items():
        name = prefix + local
        rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2 ** 32)
        v = 2 * rng.random_sample(tuple(shape)) - 1
        if name.endswith('.bias'):
            v *= 0.2
        elif len(shape) == 1:
            v = 1 + 0.2 * v
        elif name != 'class_emb.weight' and not name.endswith('pos_embed_learned'):
            v *= 0.75 * np.sqrt(3 / np.prod(shape[1:]))
        state[local] = torch.from_numpy(v.astype(np.float32))
    return state


def fill(module, seed, prefix=''):
    """`module` with the weights of the recipe; buffers stay."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    missing, unexpected = module.load_state_dict(filled(shapes, seed, prefix), strict=False)
    assert not unexpected and set(missing) == {name for name, _ in module.named_buffers()}
    return module


class Latents:
    """A tokenizer whose images are latents."""
    stride, vocab_size = 16, None

    def __init__(self, channels=16):
        self.channels = channels

    def encode(self, images):
        return images


def build(name):
    """The model of `name`.json in eval mode; its images are latents."""
    info = load_json(name)
    return fill(FlowAR(Latents(), **info['config']), info['weight_seed']).eval()


class GivenNoise(ImageNoise):
    """`sample` takes these tensors for its noise, one after the other."""

    def __init__(self, tensors):
        super().__init__(0, [])
        self.tensors = iter(tensors)

    def normal_like(self, t):
        noise = next(self.tensors)
        assert noise.shape == t.shape
        return noise


def given_noise(name):
    return GivenNoise([load_tensors(name)[f'noise_s{side}'] for side in (1, 2, 4, 8, 16)])


def given_draws(label_u_B, t_KB, noise_BLZ):
    """`GlobalBatch.per_image` that returns these numbers in the published order: labels; time and noise per scale."""
    spans = [(0, 1), (1, 5), (5, 21), (21, 85), (85, 341)]
    tensors = [label_u_B]
    for (begin, end), t_B in zip(spans, t_KB, strict=True):
        tensors += [t_B, noise_BLZ[:, begin:end]]
    tensors = iter(tensors)

    def per_image(self, batch, device, fill, shape=()):
        numbers = next(tensors)
        assert numbers.shape == (batch, *shape)
        return numbers
    return per_image
