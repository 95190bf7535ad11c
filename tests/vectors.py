"""Reader of the reference vectors in tests/data, the tiny models they were made with, and how to compare.

Every pair of a json and a safetensors file is named by its path below tests/data, such as 'npp/rope2d'.
The README.md of each folder says how its vectors were made, and by which rule its weights follow from their
names.
"""
import functools
import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import NPP, VAR, VQVAE, FlexVAE, FlexVAR, FlowAR
from models.base import Tokenizer
from models.noise import ImageNoise
from models.npp import ffn_width

DATA = Path(__file__).parent / 'data'


# ---------------------------------------------------------------------------------------------- files
@functools.cache
def load_json(name):
    return json.loads((DATA / f'{name}.json').read_text())


@functools.cache
def load_tensors(name):
    """The tensors of a file by name; codes are int64, as in the models."""
    tensors = load_file(DATA / f'{name}.safetensors')
    return {key: t.long() if t.dtype == torch.int32 else t for key, t in tensors.items()}


def pixels(images_u8):
    """Pixels in [-1, 1] of stored uint8 images, in the arithmetic of the data loader."""
    x = images_u8.float() / 255
    return x + x - 1


def uniform_images(seed, shape):
    """Images of uniform noise in [-1, 1], which the FlexVAR vectors store as a seed."""
    return torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32))


def split_scales(idx_BL, patch_nums):
    """A flat token array as one tensor per scale."""
    return list(idx_BL.split([pn * pn for pn in patch_nums], dim=1))


# ---------------------------------------------------------------------------------------------- weights
def filled(shapes, rule, prefix=''):
    """A state dict of these shapes, by a rule (name, shape) -> array; `prefix` completes the names."""
    return {name: torch.from_numpy(np.asarray(rule(prefix + name, tuple(shape)), np.float32))
            for name, shape in shapes.items()}


def fill(module, rule, prefix='', kept=()):
    """`module` with parameters that follow a rule; buffers and the parameters in `kept` stay."""
    shapes = {name: p.shape for name, p in module.named_parameters() if name not in kept}
    _, unexpected = module.load_state_dict(filled(shapes, rule, prefix), strict=False)
    assert not unexpected
    return module


def build_filled(make, rule):
    """A model of published size takes filled weights without being initialised first; buffers are zero."""
    with torch.device('meta'):
        model = make()
    buffers = {name: torch.zeros(t.shape) for name, t in model.named_buffers() if name in model.state_dict()}
    weights = filled({name: p.shape for name, p in model.named_parameters()}, rule)
    model.load_state_dict(buffers | weights, assign=True)
    return model


def stored_state(rules, model):
    """State dict after the rules of a json file of VAR; what the constructor makes is the model's own."""
    own = model.state_dict()
    state = {}
    for name, rule in rules.items():
        if rule['rule'] == 'constructor':
            state[name] = own[name]
            continue
        u = np.random.RandomState(rule['seed']).random_sample(size=rule['shape'])
        w = (rule['center'] + rule['amp'] * (2 * u - 1)).astype('<f4')
        assert hashlib.sha256(w.tobytes()).hexdigest()[:16] == rule['sha256'], f'{name} differs'
        state[name] = torch.from_numpy(w)
    return state


def rng_of_name(name, seed):
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2 ** 32)


def flexvar_rule(seed):
    def weight(name, shape):
        a = rng_of_name(name, seed).standard_normal(shape).astype(np.float32)
        leaf = name.split('.')[-1]
        if leaf == 'scale_mul_1H11':
            return math.log(4) + 0.1 * a
        if leaf in ('bias', 'q_bias', 'v_bias'):
            return 0.05 * a
        if leaf in ('pos_start', 'ada_gss') or name == 'class_emb.weight':
            return 0.3 * a
        if name == 'quantize.embedding.weight':
            return a
        if len(shape) == 1:
            return 1 + 0.1 * a
        gain = 2 if name == 'head.weight' else 1
        return a * np.float32(gain * np.prod(shape[1:], dtype=int) ** -0.5)
    return weight


def flowar_rule(seed):
    def weight(name, shape):
        v = 2 * rng_of_name(name, seed).random_sample(shape) - 1
        if name.endswith('.bias'):
            return 0.2 * v
        if len(shape) == 1:
            return 1 + 0.2 * v
        if name == 'class_emb.weight' or name.endswith('pos_embed_learned'):
            return v
        return v * (0.75 * np.sqrt(3 / np.prod(shape[1:])))
    return weight


def npp_numbers(name, shape):
    """float64 numbers in [-1, 1) of a name: a SplitMix64 stream whose state begins with the name."""
    out = np.empty(math.prod(shape))
    size = 1 << 16  # pieces that fit the processor's cache are ten times as fast
    for begin in range(0, out.size, size):
        z = np.arange(begin + 1, min(begin + size, out.size) + 1, dtype=np.uint64)
        z += np.uint64(zlib.crc32(f'npp-dev:{name}'.encode()) << 32)
        z *= np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z ^= z >> np.uint64(shift)
            z *= np.uint64(factor)
        z ^= z >> np.uint64(31)
        out[begin:begin + size] = (z >> np.uint64(40)) * 2. ** -23 - 1
    return out.reshape(shape)


def npp_rule(name, shape):
    """Fan-in scaled weights; 1-D ones lie around 1 (`weight`) or 0."""
    r = npp_numbers(name, shape)
    if len(shape) > 1:
        r *= np.sqrt(3 * shape[0] / r.size)
    else:
        r = 0.1 * r + name.endswith('weight')
    return r.astype(np.float32)


# ---------------------------------------------------------------------------------------------- VAR
VARIANTS = ('sep_l2', 'sep_nol2', 'shared_l2', 'shared_nol2')


@functools.cache
def vqvae_state():
    info = load_json('var/vqvae')
    return stored_state(info['state'], VQVAE(**info['config']))


def tiny_vqvae(**overrides):
    vqvae = VQVAE(**load_json('var/vqvae')['config'] | overrides)
    vqvae.load_state_dict(vqvae_state())
    return vqvae


@functools.cache
def frozen_vqvae():
    """The tokenizer that all tiny VARs share."""
    return tiny_vqvae()


@functools.cache
def var_state(variant):
    info = load_json(f'var/var_{variant}')
    return stored_state(info['state'], VAR(frozen_vqvae(), **info['config']))


def tiny_var(variant, **overrides):
    """The tiny VAR of `var_<variant>.json` in eval mode, over the tiny VQVAE."""
    var = VAR(frozen_vqvae(), **load_json(f'var/var_{variant}')['config'] | overrides)
    var.load_state_dict(var_state(variant))
    return var.eval()


# ---------------------------------------------------------------------------------------------- FlexVAR
@functools.cache
def tiny_flexvar(name, **overrides):
    """The model of a json file of FlexVAR in eval mode, over its tokenizer."""
    config = load_json(f'flexvar/{name}')['config']
    vae, var = config['vae'], config['var']
    rule = flexvar_rule(config['wseed'])
    tokenizer = FlexVAE(vae['V'], vae['dim'], ch=vae['ch'], encoder_ch_mult=vae['ch_mult'],
                        decoder_ch_mult=vae['ch_mult'], z_channels=vae['z'], test_mode=True)
    model = FlexVAR(fill(tokenizer, rule), num_classes=var['num_classes'], depth=var['depth'],
                    embed_dim=var['C'], num_heads=var['heads'], mlp_ratio=var.get('mlp_ratio', 4.),
                    attn_l2_norm=var['anorm'], shared_aln=var['saln'], cond_drop_rate=var['cond_drop'],
                    **overrides)
    return fill(model, rule, kept=('pos_1LC',)).eval()  # its constructor makes the positions


# ---------------------------------------------------------------------------------------------- FlowAR
class Latents:
    """A tokenizer whose images are latents."""
    stride, vocab_size = 16, None

    def __init__(self, channels=16):
        self.channels = channels

    def encode(self, images):
        return images


def tiny_flowar(name):
    """The model of a json file of FlowAR in eval mode; its images are latents."""
    info = load_json(f'flowar/{name}')
    return fill(FlowAR(Latents(), **info['config']), flowar_rule(info['weight_seed'])).eval()


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
    tensors = load_tensors(f'flowar/{name}')
    return GivenNoise([tensors[f'noise_s{side}'] for side in (1, 2, 4, 8, 16)])


def given_draws(label_u_B, t_KB, noise_BLZ):
    """`GlobalBatch.per_image` that gives these numbers in the published order: labels, times, noise."""
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


# ---------------------------------------------------------------------------------------------- NPP
DROPOUTS = ('token_dropout_p', 'attn_dropout_p', 'resid_dropout_p', 'ffn_dropout_p', 'class_dropout_prob')
NO_DROPOUT = dict.fromkeys(DROPOUTS, 0.)


class Codes(Tokenizer):
    """A tokenizer whose images are codes (B, N)."""
    stride, channels = 16, 8

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def encode(self, images):
        return images


def tiny_npp(**overrides):
    """The tiny model of all vectors but `gpt_b_real`, in eval mode and without dropout."""
    config = load_json('npp/gpt_forward')['config']
    sizes = {name: config[name] for name in ('dim', 'n_layer', 'n_head', 'num_classes')}
    sizes |= dict(ffn_dim=ffn_width(config['dim'], config['multiple_of']),
                  grid=math.isqrt(config['block_size']))
    return fill(NPP(Codes(config['vocab_size']), **sizes | NO_DROPOUT | overrides), npp_rule).eval()


# ---------------------------------------------------------------------------------------------- comparisons
def assert_within(actual, expected, atol):
    """Largest absolute difference at most `atol`; shapes and dtypes equal."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual.detach() - expected).abs().max().item()
    assert error <= atol, f'largest error {error:.3g} > {atol:g}'


def assert_stats(t, expected):
    """The statistics that the json files keep of large tensors."""
    assert list(t.shape) == expected['shape']
    t = t.detach().double()
    actual = dict(sum=t.sum(), mean=t.mean(), std=t.std(correction=0), min=t.min(), max=t.max(), l2=t.norm())
    for name, value in actual.items():
        atol = 0.05 if name == 'sum' else 2e-6
        assert value.item() == pytest.approx(expected[name], rel=1e-4, abs=atol), name


def named_grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_norms(grads, expected, rtol=1e-3):
    """l2 norm of every gradient; `grads` maps the same names to tensors."""
    assert set(grads) == set(expected)
    largest = max(expected.values())
    for name, grad in grads.items():
        assert grad.norm().item() == pytest.approx(expected[name], rel=rtol, abs=1e-6 * largest), name


# -------------------------------------------------------------------------------------------- random numbers
@functools.cache
def rng_matches():
    """Whether this torch build draws the stored numbers."""
    probe = load_json('var/rng_probe')

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    def same(actual, expected):
        return np.allclose(np.asarray(actual), np.asarray(expected), rtol=1e-6, atol=1e-7)

    noise = torch.empty(4, 96).exponential_(generator=seeded(5)).flatten()
    return (same(torch.rand(8, generator=seeded(0)), probe['rand_seed0_8'])
            and same(torch.empty(8).exponential_(generator=seeded(0)), probe['exponential_seed0_8'])
            and same(noise[:4], probe['exponential_seed5_4x96']['first4'])
            and same(noise[-4:], probe['exponential_seed5_4x96']['last4'])
            and same(torch.empty(16).bernoulli_(0.7, generator=seeded(0)), probe['bernoulli0.7_seed0_16'])
            and same(torch.randperm(23, generator=seeded(0)), probe['randperm_seed0_23']))


def needs_rng():
    """Skip the calling test where the stored draws cannot repeat."""
    if not rng_matches():
        pytest.skip('this torch build draws other random numbers than the one that made the vectors')
