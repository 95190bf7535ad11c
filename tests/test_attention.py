"""One attention call over several kernels, the choice of the kernel, and the key/value cache."""
import sys
import types

import pytest
import torch

from models import attention
from models.attention import (
    KVCache,
    attend,
    choose_backend,
    explain_backend,
    kv_caching,
    optional_module,
)
from models.basic_var import SelfAttention
from models.scales import MASKED_TOKENS, ScaleLayout, block_causal
from tests.vectors import assert_within, load_tensors, tiny_var

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
LAYOUT = ScaleLayout((1, 2, 3))
L = LAYOUT.total


def qkv(B=2, Lq=L, Lk=L, H=4, d=8):
    return torch.randn(B, Lq, H, d), torch.randn(B, Lk, H, d), torch.randn(B, Lk, H, d)


def reference(q, k, v, bias=None, scale=None, causal=False):
    """The formula itself, in float64 with (B, L, H, d) tensors."""
    scores = torch.einsum('bqhd,bkhd->bhqk', q.double(), k.double()) * (scale or q.shape[-1] ** -0.5)
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum('bhqk,bkhd->bqhd', scores.softmax(-1), v.double()).to(q.dtype)


class FakeTriangle:
    pass


class FakePackages:
    """Stand-ins of flash_attn and xformers.ops: they note their calls and compute with the formula."""

    def __init__(self):
        self.calls = []
        self.deterministic = []
        self.modules = {
            'flash_attn': types.SimpleNamespace(flash_attn_func=self.flash_attn_func),
            'xformers.ops': types.SimpleNamespace(memory_efficient_attention=self.memory_efficient_attention,
                                                  LowerTriangularMask=FakeTriangle),
        }

    def flash_attn_func(self, q, k, v, dropout_p=0., softmax_scale=None, causal=False, deterministic=False):
        assert q.shape[2:] == k.shape[2:] == v.shape[2:] and q.shape[0] == k.shape[0], 'layout is BLHd'
        self.deterministic.append(deterministic)
        self.calls.append(dict(kernel='flash', dropout=dropout_p, scale=softmax_scale, causal=causal))
        return reference(q, k, v, scale=softmax_scale, causal=causal)

    def memory_efficient_attention(self, query, key, value, attn_bias=None, p=0., scale=None):
        causal = isinstance(attn_bias, FakeTriangle)
        if attn_bias is not None and not causal:
            B, Lq, H, _ = query.shape
            assert attn_bias.shape == (B, H, Lq, key.shape[1]), 'the bias is expanded to every head'
            assert attn_bias.dtype == query.dtype
        self.calls.append(dict(kernel='xformers', dropout=p, scale=scale, causal=causal))
        return reference(query, key, value, None if causal else attn_bias, scale, causal)


@pytest.fixture
def packages(monkeypatch):
    fake = FakePackages()
    monkeypatch.setattr(attention, 'optional_module', fake.modules.get)
    return fake


@pytest.fixture
def forced(packages, monkeypatch):
    """Lets `attend` run the requested kernel on CPU tensors."""
    monkeypatch.setattr(attention, 'choose_backend', lambda requested, *_: requested)
    return packages


# ------------------------------------------------------------ kernels
CASES = [dict(), dict(scale=1.), dict(scale=0.25), dict(causal=True), dict(causal=True, scale=0.3)]


@pytest.mark.parametrize('backend', ['sdpa', 'flash', 'xformers'])
@pytest.mark.parametrize('kwargs', CASES, ids=str)
def test_kernels_agree(forced, backend, kwargs):
    q, k, v = qkv()
    out = attend(q, k, v, backend=backend, **kwargs)
    assert_within(out, reference(q, k, v, **kwargs), 1e-5)
    if backend != 'sdpa':
        expected = dict(scale=None, causal=False) | kwargs
        assert forced.calls == [dict(expected, kernel=backend, dropout=0.)]


@pytest.mark.parametrize('backend', ['sdpa', 'xformers'])
@pytest.mark.parametrize('shape', [(L, L), (1, 1, L, L), (2, 1, L, L), (1, 4, L, L), (2, 4, L, L)])
def test_kernels_agree_with_bias(forced, backend, shape):
    q, k, v = qkv()
    bias = torch.randn(shape) + LAYOUT.causal_bias()
    assert_within(attend(q, k, v, bias=bias, scale=0.7, backend=backend), reference(q, k, v, bias, 0.7), 1e-5)


@pytest.mark.parametrize('backend', ['sdpa', 'flash', 'xformers'])
def test_fewer_queries_than_keys(forced, backend):
    q, k, v = qkv(Lq=3)
    assert_within(attend(q, k, v, backend=backend), reference(q, k, v), 1e-5)


@pytest.mark.parametrize('backend', ['flash', 'xformers'])
def test_dropout_reaches_the_kernel(forced, backend):
    attend(*qkv(), dropout_p=0.2, backend=backend)
    assert forced.calls[0]['dropout'] == 0.2


def test_a_seed_asks_flash_attention_for_a_fixed_order(forced, monkeypatch):
    """`--seed` switches `cudnn.deterministic` on."""
    for by_cudnn, by_torch in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.backends.cudnn, 'deterministic', by_cudnn)
        monkeypatch.setattr(torch, 'are_deterministic_algorithms_enabled', lambda by_torch=by_torch: by_torch)
        attend(*qkv(), backend='flash')
    assert forced.deterministic == [False, True, True]


def test_bias_takes_the_type_of_the_queries(forced):
    q, k, v = (t.to(BF16) for t in qkv())
    for backend in ('sdpa', 'xformers'):
        bias = LAYOUT.causal_bias()
        out = attend(q, k, v, bias=bias, backend=backend)
        assert out.dtype == BF16
        assert_within(out.float(), reference(q.float(), k.float(), v.float(), bias), 0.05)


def test_cpu_runs_torch(packages):
    q, k, v = qkv()
    assert_within(attend(q, k, v), reference(q, k, v), 1e-5)
    assert packages.calls == []


def test_model_passes_its_scale_and_layout(forced):
    """A whole VAR forward and sampling through fake packages equals the one through torch."""
    vectors = load_tensors('var/var_sep_nol2')
    var = tiny_var('sep_nol2')
    with torch.no_grad():
        for block in var.blocks:
            block.attn.backend = 'xformers'
        assert_within(var(vectors['labels'], vectors['var_input']), vectors['logits_eval'], 5e-4)
        assert len(forced.calls) == 2
        assert all(call['scale'] == pytest.approx(0.25 / 8 ** 0.5) for call in forced.calls)
        images = []
        for backend in ('sdpa', 'flash', 'xformers'):
            for block in var.blocks:
                block.attn.backend = backend
            images.append(var.autoregressive_infer_cfg(2, 1, g_seed=0, top_k=1))
    assert_within(images[1], images[0], 1e-4)
    assert_within(images[2], images[0], 1e-4)
    assert {call['kernel'] for call in forced.calls} == {'flash', 'xformers'}


# ------------------------------------------------------------ choice
@pytest.mark.parametrize(('device', 'dtype', 'has_bias', 'num_keys', 'expected'), [
    ('cuda', F16, False, 680, 'flash'), ('cuda', BF16, False, 681, 'flash'),
    ('cuda:1', F16, False, 5, 'flash'),
    ('cuda', F32, False, 680, 'xformers'), ('cuda', F32, False, 5, 'xformers'),
    ('cuda', F16, True, 680, 'xformers'), ('cuda', BF16, True, 2240, 'xformers'),
    ('cuda', F32, True, 680, 'xformers'),
    ('cuda', F16, True, 681, 'sdpa'), ('cuda', F32, True, 30, 'sdpa'), ('cuda', F64, False, 680, 'sdpa'),
    ('cpu', F16, False, 680, 'sdpa'), ('cpu', F32, True, 680, 'sdpa'), ('mps', F16, False, 680, 'sdpa'),
])
def test_choice_with_everything_installed(packages, device, dtype, has_bias, num_keys, expected):
    assert choose_backend('auto', device, dtype, has_bias, num_keys) == expected
    on_cuda = device.startswith('cuda')
    suitable = {'flash': on_cuda and dtype in (F16, BF16) and not has_bias,
                'xformers': on_cuda and dtype != F64 and (not has_bias or num_keys % 8 == 0),
                'sdpa': True}
    for name, can_run in suitable.items():
        if can_run:
            assert choose_backend(name, device, dtype, has_bias, num_keys) == name
        else:
            with pytest.raises(ValueError, match=f"'{name}' cannot run here") as error:
                choose_backend(name, device, dtype, has_bias, num_keys)
            assert '\n' not in str(error.value)


@pytest.mark.parametrize(('device', 'dtype', 'has_bias', 'num_keys', 'expected'), [
    ('cuda', F16, False, 5, 'flash'),
    ('cuda', F16, True, 680, 'xformers (no flash: bias)'),
    ('cuda', F32, True, 681, 'sdpa (no flash: dtype, bias; no xformers: bias)'),
    ('cuda', F64, False, 680, 'sdpa (no flash: dtype; no xformers: dtype)'),
    ('cpu', F32, True, 680, 'sdpa (no flash: device, dtype, bias; no xformers: device)'),
])
def test_choice_is_explained(packages, device, dtype, has_bias, num_keys, expected):
    assert explain_backend(device, dtype, has_bias, num_keys) == expected


@pytest.mark.parametrize(('installed', 'half', 'single'), [
    ((), 'sdpa', 'sdpa'), (('flash_attn',), 'flash', 'sdpa'), (('xformers.ops',), 'xformers', 'xformers'),
])
def test_choice_follows_what_is_installed(packages, monkeypatch, installed, half, single):
    found = {name: packages.modules[name] for name in installed}
    monkeypatch.setattr(attention, 'optional_module', found.get)
    assert choose_backend('auto', 'cuda', F16, False, 680) == half
    assert choose_backend('auto', 'cuda', F32, False, 680) == single
    assert ('no flash: not installed' in explain_backend('cuda', F16, False, 680)) == (half != 'flash')
    for name, module in (('flash', 'flash_attn'), ('xformers', 'xformers.ops')):
        if module not in installed:
            with pytest.raises(ValueError, match='install the package'):
                choose_backend(name, 'cuda', F16, False, 680)


def test_unknown_kernel():
    with pytest.raises(ValueError, match=r"auto or one of \['flash', 'xformers', 'sdpa'\], got 'triton'"):
        choose_backend('triton', 'cpu', F32, False)


@pytest.mark.parametrize(('name', 'content'), [
    ('flash_attn', {}), ('flash_attn', dict(flash_attn_func=3)),
    ('xformers.ops', {}), ('xformers.ops', dict(memory_efficient_attention=len)),
    ('flash_attn', None), ('xformers.ops', None)])
def test_a_package_without_its_function_is_not_installed(monkeypatch, name, content):
    """A namespace left by another package, a build for another machine, one that fails while it loads."""
    optional_module.cache_clear()
    for other in ('flash_attn', 'xformers', 'xformers.ops'):
        monkeypatch.setitem(sys.modules, other, None)  # not installed
    if content is None:
        def broken(module):
            raise RuntimeError('undefined symbol')
        monkeypatch.setattr(attention.importlib, 'import_module', broken)
    else:
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, 'xformers', types.ModuleType('xformers'))
        monkeypatch.setitem(sys.modules, name, module)
    assert choose_backend('auto', 'cuda', torch.float16, has_bias=False) == 'sdpa'
    for backend in ('flash', 'xformers'):
        with pytest.raises(ValueError, match='cannot run here'):
            choose_backend(backend, 'cuda', torch.float16, has_bias=False)
    optional_module.cache_clear()


def test_optional_module():
    assert optional_module('json').loads('1') == 1
    assert optional_module('no_such_package_here') is None


def test_flag_switches_packages_off():
    assert SelfAttention(8, 2, flash_if_available=False).backend == 'sdpa'
    assert SelfAttention(8, 2).backend == 'auto'


# ------------------------------------------------------------ cache
SEEN_LATER = LAYOUT.num_seen_later


@pytest.mark.parametrize('capacity', [None, SEEN_LATER, L, 2 * L])
def test_cache_equals_one_shot_attention(capacity):
    q, k, v = qkv()
    expected = reference(q, k, v, LAYOUT.causal_bias())
    cache = KVCache(capacity)
    for begin, end in LAYOUT.spans:
        keys, values = cache.append(k[:, begin:end], v[:, begin:end])
        assert torch.equal(keys, k[:, :end]) and torch.equal(values, v[:, :end])
        assert_within(attend(q[:, begin:end], keys, values), expected[:, begin:end], 1e-5)


def test_the_last_scale_is_not_stored():
    """Nothing asks for its keys and values again; a pyramid of one scale needs no storage at all."""
    _, k, v = qkv()
    cache = KVCache(SEEN_LATER)
    for begin, end in LAYOUT.spans:
        cache.append(k[:, begin:end], v[:, begin:end])
    assert cache.length == SEEN_LATER == LAYOUT.spans[-1][0]
    assert cache.storage.shape[2] == SEEN_LATER

    single = KVCache(0)
    keys, values = single.append(k, v)
    assert keys is k and values is v and single.storage is None


def test_storage_is_allocated_once():
    _, k, v = qkv()
    cache, pointers = KVCache(L), set()
    for begin, end in LAYOUT.spans:
        keys, values = cache.append(k[:, begin:end], v[:, begin:end])
        pointers.add((cache.storage.data_ptr(), keys.data_ptr(), values.data_ptr()))
    assert len(pointers) == 1 and cache.capacity == L


def test_growing_storage_doubles():
    cache, capacities = KVCache(), []
    for _ in range(9):
        cache.append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
        capacities.append(cache.capacity)
    assert capacities == [1, 2, 4, 4, 8, 8, 8, 8, 16]


@pytest.mark.parametrize('dtype', [F32, BF16])
def test_storage_has_the_type_of_the_keys(dtype):
    keys, values = KVCache(4).append(torch.ones(1, 2, 2, 4, dtype=dtype), torch.ones(1, 2, 2, 4, dtype=dtype))
    assert keys.dtype == values.dtype == dtype


@pytest.mark.parametrize('l2_norm', [False, True])
def test_layer_with_cache_equals_layer_with_mask(l2_norm):
    layer = SelfAttention(32, 4, attn_l2_norm=l2_norm)
    torch.nn.init.normal_(layer.q_bias)
    x = torch.randn(2, L, 32)
    with torch.no_grad():
        expected = layer(x, LAYOUT.causal_bias()[None, None])
        layer.kv_caching(True)
        parts = [layer(x[:, begin:end], None) for begin, end in LAYOUT.spans]
        assert_within(torch.cat(parts, dim=1), expected, 1e-5)
        layer.kv_caching(True)
        assert_within(layer(x[:, :1], None), expected[:, :1], 1e-5)  # switching on again forgets
        layer.kv_caching(False)
        assert_within(layer(x, LAYOUT.causal_bias()[None, None]), expected, 0.)


def test_context_always_takes_the_caches_away():
    blocks = [types.SimpleNamespace(attn=SelfAttention(8, 2)) for _ in range(3)]
    with pytest.raises(KeyError), kv_caching(blocks, capacity=7):
        caches = [block.attn.cache for block in blocks]
        assert [cache.capacity for cache in caches] == [7, 7, 7] and len({id(cache) for cache in caches}) == 3
        raise KeyError('stop')
    assert all(block.attn.cache is None for block in blocks)


@pytest.mark.parametrize('sides', [(1, 2, 3), (1, 16), (1, 2, 9, 13, 14), ((1, 1), (2, 3), (14, 20))])
def test_attention_by_scale_equals_a_mask_over_all_tokens(sides):
    """Values and gradients, whether the scales share a call or have their own."""
    layout = ScaleLayout(sides)
    q, k, v = (t.requires_grad_() for t in qkv(Lq=layout.total, Lk=layout.total, H=2))
    mask = block_causal(layout, q.device)
    assert mask.ends[-1] == layout.total and len(mask.bias_11ll[0, 0]) <= max(MASKED_TOKENS, 1)
    out = attend(q, k, v, bias=mask)
    expected = reference(q, k, v, layout.causal_bias())
    assert_within(out, expected, 1e-5)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for grad, by_formula in zip(grads, expected_grads, strict=True):
        assert_within(grad, by_formula, 1e-4)


def test_grouped_heads_serve_several_queries(forced):
    """As if keys and values were repeated, in every kernel."""
    q, _, _ = qkv()
    _, k, v = qkv(H=2)
    for backend in ('sdpa', 'xformers'):
        expected = reference(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))
        assert_within(attend(q, k, v, backend=backend), expected, 1e-5)
