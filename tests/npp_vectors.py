"""Reader of the reference vectors of LlamaGen and NPP, their rule of weights, and the tiny generator."""
import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from models import NPP
from models.base import Tokenizer
from models.npp import ffn_width

DATA = Path(__file__).parent / 'data' / 'npp'
SALT = 'npp-dev'
DROPOUTS = ('token_dropout_p', 'attn_dropout_p', 'resid_dropout_p', 'ffn_dropout_p', 'class_dropout_prob')
NO_DROPOUT = dict.fromkeys(DROPOUTS, 0.)


@functools.cache
def load_json(name):
    return json.loads((DATA / f'{name}.json').read_text())


@functools.cache
def load_tensors(name):
    """Integers are the project's int64."""
    return {key: t.long() if t.dtype == torch.int32 else t
            for key, t in load_file(DATA / f'{name}.safetensors').items()}


# ---------------------------------------------------------------------------------------------- rule
def raw(name, shape):
    """float64 numbers in [-1, 1) of a name, see README.md beside the vectors."""
    out, size = np.empty(math.prod(shape)), 1 << 16  # pieces that fit the cache: ten times as fast
    for begin in range(0, out.size, size):
        z = np.arange(begin + 1, min(begin + size, out.size) + 1, dtype=np.uint64)
        z += np.uint64(zlib.crc32(f'{SALT}:{name}'.encode()) << 32)
        z *= np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z ^= z >> np.uint64(shift)
            z *= np.uint64(factor)
        z ^= z >> np.uint64(31)
        out[begin:begin + size] = (z >> np.uint64(40)) * 2. ** -23 - 1
    return out.reshape(shape)


def weight(name, shape):
    """float32 array: fan-in scaled, 1-D ones around 1 (`weight`) or 0."""
    r = raw(name, shape)
    if len(shape) > 1:
        r *= np.sqrt(3 * shape[0] / r.size)
    else:
        r = 0.1 * r + name.endswith('weight')
    return r.astype(np.float32)


def filled(module, prefix=''):
    """`module` with the parameters of its own keys; buffers stay."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(weight(prefix + name, tuple(parameter.shape))))
    return module


# ---------------------------------------------------------------------------------------------- generator
class Codes(Tokenizer):
    """A tokenizer whose images are codes (B, N)."""
    stride, channels = 16, 8

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def encode(self, images):
        return images


def build(**overrides):
    """The tiny model of all vectors but `gpt_b_real`, in eval mode and without dropout."""
    config = load_json('gpt_forward')['config']
    sizes = {name: config[name] for name in ('dim', 'n_layer', 'n_head', 'num_classes')}
    sizes |= dict(ffn_dim=ffn_width(config['dim'], config['multiple_of']),
                  grid=math.isqrt(config['block_size']))
    return filled(NPP(Codes(config['vocab_size']), **sizes | NO_DROPOUT | overrides)).eval()
