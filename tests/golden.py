"""Reader of the reference vectors in tests/data, and the tiny models they were made with."""
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import VAR, VQVAE

DATA = Path(__file__).parent / 'data' / 'var'
VARIANTS = ('sep_l2', 'sep_nol2', 'shared_l2', 'shared_nol2')


@functools.cache
def load_json(name):
    return json.loads((DATA / f'{name}.json').read_text())


def load_tensors(name):
    return load_file(DATA / f'{name}.safetensors')


def images(u8):
    """Pixels in [-1, 1] of stored uint8 images, in the arithmetic of the data loader."""
    x = u8.float() / 255
    return x + x - 1


def split_scales(idx_BL, patch_nums):
    """A flat token array as one tensor per scale."""
    return list(idx_BL.split([pn * pn for pn in patch_nums], dim=1))


def build_state(rules, model):
    """State dict after the rules of a json file; entries that a constructor makes are the model's own."""
    own, state = model.state_dict(), {}
    for name, rule in rules.items():
        if rule['rule'] == 'constructor':
            state[name] = own[name]
            continue
        u = np.random.RandomState(rule['seed']).random_sample(size=rule['shape'])
        w = (rule['center'] + rule['amp'] * (2 * u - 1)).astype('<f4')
        assert hashlib.sha256(w.tobytes()).hexdigest()[:16] == rule['sha256'], f'{name} differs'
        state[name] = torch.from_numpy(w)
    return state


@functools.cache
def vqvae_state():
    info = load_json('vqvae')
    return build_state(info['state'], VQVAE(**info['config']))


def build_vqvae(**overrides):
    vqvae = VQVAE(**{**load_json('vqvae')['config'], **overrides})
    vqvae.load_state_dict(vqvae_state())
    return vqvae


@functools.cache
def frozen_vqvae():
    """The tokenizer that all tiny VARs share."""
    return build_vqvae()


@functools.cache
def var_state(variant):
    info = load_json(f'var_{variant}')
    return build_state(info['state'], VAR(frozen_vqvae(), **info['config']))


def build_var(variant, **overrides):
    """The tiny VAR of `var_<variant>.json` in eval mode, over the tiny VQVAE."""
    var = VAR(frozen_vqvae(), **{**load_json(f'var_{variant}')['config'], **overrides})
    var.load_state_dict(var_state(variant))
    return var.eval()


def stats(t):
    """The statistics the json files keep of large tensors."""
    t = t.detach().double()
    values = dict(sum=t.sum(), mean=t.mean(), std=t.std(correction=0), min=t.min(), max=t.max(), l2=t.norm())
    return dict(shape=list(t.shape), **{name: value.item() for name, value in values.items()})


def assert_stats(t, expected):
    actual = stats(t)
    assert actual.pop('shape') == expected['shape']
    for name, value in actual.items():
        atol = 0.05 if name == 'sum' else 2e-6
        assert value == pytest.approx(expected[name], rel=1e-4, abs=atol), name


@functools.cache
def rng_matches():
    """True if this torch build draws the stored numbers."""
    probe, torch_rng = load_json('rng_probe'), lambda seed: torch.Generator().manual_seed(seed)

    def same(actual, expected):
        return np.allclose(np.asarray(actual), np.asarray(expected), rtol=1e-6, atol=1e-7)

    noise = torch.empty(4, 96).exponential_(generator=torch_rng(5)).flatten()
    return (same(torch.rand(8, generator=torch_rng(0)), probe['rand_seed0_8'])
            and same(torch.empty(8).exponential_(generator=torch_rng(0)), probe['exponential_seed0_8'])
            and same(noise[:4], probe['exponential_seed5_4x96']['first4'])
            and same(noise[-4:], probe['exponential_seed5_4x96']['last4'])
            and same(torch.empty(16).bernoulli_(0.7, generator=torch_rng(0)), probe['bernoulli0.7_seed0_16'])
            and same(torch.randperm(23, generator=torch_rng(0)), probe['randperm_seed0_23']))


def needs_rng():
    """Skip the calling test where the stored draws cannot repeat."""
    if not rng_matches():
        pytest.skip('this torch build draws other random numbers than the one that made the vectors')


def assert_within(actual, expected, atol):
    """Largest absolute difference at most `atol`; shapes and dtypes equal."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual.detach() - expected).abs().max().item()
    assert error <= atol, f'largest error {error:.3g} > {atol:g}'


def assert_norms(grads, expected, rtol=1e-3):
    """l2 norm of every gradient; `grads` maps the same names to tensors."""
    assert set(grads) == set(expected)
    largest = max(expected.values())
    for name, grad in grads.items():
        assert grad.norm().item() == pytest.approx(expected[name], rel=rtol, abs=1e-6 * largest), name


def named_grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
