"""Sampling filters, guidance, label dropout, drop path and their draws per image."""
import itertools
import random
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.reference import filter_by_sorting
from evaluation.precision_recall import precision_recall
from models import VQVAE, helpers
from models.helpers import (
    DropPath,
    draw_codes,
    drop_labels,
    exponential_like,
    filter_top_k_top_p,
    filter_top_k_top_p_,
    guide,
    gumbel_softmax_with_rng,
    sample_with_top_k_top_p_,
)
from models.noise import GlobalBatch, ImageNoise
from models.precision import float32_matmul
from tests.runs import TINY_VQVAE
from tests.vectors import assert_within, load_json, load_tensors, needs_rng
from utils.misc import allow_tf32, full_precision

FILTERS = load_json('var/topk_topp')['cases']


@pytest.fixture(scope='module')
def vectors():
    return load_tensors('var/topk_topp')


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------ filters
@pytest.mark.parametrize('case', FILTERS, ids=[case['key'] for case in FILTERS])
def test_filter(vectors, case):
    logits = vectors[case['input']].clone()
    copied = filter_top_k_top_p(logits, case['top_k'], case['top_p'])
    assert torch.equal(logits, vectors[case['input']]), 'the twin without underscore keeps its argument'
    returned = filter_top_k_top_p_(logits, case['top_k'], case['top_p'])
    assert returned is logits and torch.equal(copied, logits)
    kept = logits.isfinite()
    assert kept.sum(-1).tolist() == case['kept_counts']
    assert torch.equal(logits[kept], vectors[case['input']][kept])
    if not case['order_dependent_ties']:
        assert torch.equal(kept, vectors[f'{case["key"]}.keep'])


@pytest.mark.parametrize('case', FILTERS, ids=[case['key'] for case in FILTERS])
def test_draw(vectors, case):
    needs_rng()
    logits = vectors[case['input']].clone()
    idx = sample_with_top_k_top_p_(logits, case['top_k'], case['top_p'], rng=seeded(13))
    assert idx.dtype == torch.int64 and idx.shape == (*logits.shape[:2], 1)
    assert logits.gather(2, idx).isfinite().all(), 'logits are filtered in place and the draw is a kept one'
    if not case['order_dependent_ties']:
        assert torch.equal(idx, vectors[f'{case["key"]}.idx_seed13'])


@pytest.mark.parametrize('n', [4, -3])
def test_several_draws(vectors, n):
    needs_rng()
    idx = sample_with_top_k_top_p_(vectors['base.in'].clone(), 8, 0.9, rng=seeded(21), num_samples=n)
    assert torch.equal(idx, vectors[f'multi.n{n}'])
    if n < 0:
        assert all(len(set(row.tolist())) == -n for row in idx.flatten(0, 1)), 'without replacement'


@pytest.mark.parametrize(('top_k', 'top_p', 'kept'), [
    (0, 0., [0, 1, 2, 3]), (1, 0., [3]), (2, 0., [2, 3]), (4, 0., [0, 1, 2, 3]),
    (0, 0.39, [3]), (0, 0.41, [2, 3]), (0, 0.71, [1, 2, 3]), (0, 0.91, [0, 1, 2, 3]), (0, 1e-6, [3]),
    (0, 1., [0, 1, 2, 3]), (0, 1.5, [0, 1, 2, 3]), (0, -1., [0, 1, 2, 3]),
    (2, 0.55, [3]), (2, 0.6, [2, 3]), (3, 0.75, [2, 3]),  # top-p counts what top-k left
])
def test_filter_of_known_probabilities(top_k, top_p, kept):
    logits = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]).log()
    finite = filter_top_k_top_p(logits, top_k, top_p).isfinite()
    assert finite[0, 0].nonzero().flatten().tolist() == kept


def test_ties_with_the_last_kept_stay():
    logits = torch.tensor([[[1., 3., 2., 2., 0.]]])
    assert filter_top_k_top_p(logits, top_k=2)[0, 0].isfinite().tolist() == [False, True, True, True, False]


def test_top_1_is_argmax():
    logits = torch.randn(3, 7, 50)
    for top_k, top_p in ((1, 0.), (0, 1e-9)):
        idx = sample_with_top_k_top_p_(logits.clone(), top_k, top_p, rng=seeded(0))
        assert torch.equal(idx[..., 0], logits.argmax(-1))


@pytest.mark.parametrize('top_k', [25, 1000, -1])
def test_top_k_out_of_range(top_k):
    logits = torch.zeros(1, 2, 24)
    with pytest.raises(ValueError, match=rf'top_k must lie in 0\.\.24, .* got {top_k}: .* 0 to') as error:
        sample_with_top_k_top_p_(logits, top_k)
    assert '\n' not in str(error.value) and not logits.any(), 'the argument is untouched'


# ------------------------------------------------------------ gumbel softmax
@pytest.mark.parametrize('tau', [1.0, 0.27, 0.01])
@pytest.mark.parametrize('hard', [0, 1])
def test_gumbel_softmax(vectors, tau, hard):
    needs_rng()
    actual = gumbel_softmax_with_rng(vectors['base.in'], tau=tau, hard=bool(hard), rng=seeded(31))
    assert_within(actual, vectors[f'gumbel.tau{tau}.hard{hard}'], 1e-3 if tau == 0.01 else 1e-5)


def test_gumbel_softmax_of_filtered_logits(vectors):
    needs_rng()
    stored = vectors['gumbel.masked_in']
    logits = stored.masked_fill(stored < -1e29, -torch.inf)
    actual = gumbel_softmax_with_rng(logits, tau=0.1, rng=seeded(32))
    assert_within(actual, vectors['gumbel.masked.tau0.1'], 1e-5)
    assert (actual[logits.isinf()] == 0).all() and logits.isinf().any()


def test_gumbel_softmax_with_the_global_generator(vectors):
    needs_rng()
    torch.manual_seed(33)
    actual = gumbel_softmax_with_rng(vectors['base.in'], tau=0.5)
    assert_within(actual, vectors['gumbel.global33.tau0.5'], 1e-5)


def test_hard_gumbel_softmax_is_straight_through():
    logits = torch.randn(2, 3, 8, requires_grad=True)
    probe = torch.randn(2, 3, 8)
    hard = gumbel_softmax_with_rng(logits, tau=0.7, hard=True, rng=seeded(1))
    assert torch.equal(hard.detach().round(), hard.detach()) or (hard - hard.round()).abs().max() < 1e-6
    assert torch.equal(hard.round().sum(-1), torch.ones(2, 3))
    (hard_grad,) = torch.autograd.grad((hard * probe).sum(), logits)
    soft = gumbel_softmax_with_rng(logits, tau=0.7, rng=seeded(1))
    (soft_grad,) = torch.autograd.grad((soft * probe).sum(), logits)
    assert_within(hard_grad, soft_grad, 1e-6)


def test_gumbel_softmax_along_another_axis():
    logits = torch.randn(2, 3, 8)
    assert_within(gumbel_softmax_with_rng(logits, dim=1, rng=seeded(1)).sum(1), torch.ones(2, 8), 1e-6)


def test_exponential_noise_is_that_of_the_generator():
    t = torch.empty(2, 3, 4)
    assert torch.equal(exponential_like(t, seeded(4)), torch.empty(2, 3, 4).exponential_(generator=seeded(4)))
    assert torch.equal(exponential_like(t.transpose(0, 2), seeded(4)).flatten(),
                       exponential_like(t, seeded(4)).flatten()), 'memory layout does not matter'


# ------------------------------------------------------------ guidance
def test_guidance():
    cond, uncond = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.equal(guide(cond, uncond, 1.), cond)
    assert torch.equal(guide(cond, uncond, 0.), uncond)
    assert_within(guide(cond, uncond, 2.5), uncond + 2.5 * (cond - uncond), 1e-5)
    assert_within(guide(cond, cond, 7.), cond, 1e-5)


# ------------------------------------------------------------ label dropout and drop path
@pytest.mark.parametrize('p', [0., 0.1, 0.5, 1.])
def test_drop_labels(p):
    labels = torch.randint(0, 10, (20_000,))
    given = labels.clone()
    dropped = drop_labels(labels, 10, p)
    assert torch.equal(labels, given) and dropped.dtype == labels.dtype
    assert ((dropped == labels) | (dropped == 10)).all()
    share = (dropped == 10).float().mean().item()
    assert share == p if p in (0., 1.) else abs(share - p) < 4 * (p * (1 - p) / 20_000) ** 0.5


@pytest.mark.parametrize('p', [0., 0.3])
def test_drop_labels_draws_one_number_per_label(p):
    torch.manual_seed(8)
    dropped = drop_labels(torch.zeros(6, dtype=torch.int64), 9, p)
    after = torch.rand(1)
    torch.manual_seed(8)
    assert torch.equal(dropped == 9, torch.rand(6) < p)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize('drop_prob', [0.1, 0.5, 0.9])
def test_drop_path(drop_prob):
    layer, x = DropPath(drop_prob).train(), torch.ones(20_000, 2, 3)
    out = layer(x)
    rows = out.flatten(1)
    assert (rows == rows[:, :1]).all(), 'an image is dropped as a whole'
    assert rows[:, 0].unique().tolist() == [0., pytest.approx(1 / (1 - drop_prob))]
    kept = (rows[:, 0] > 0).float().mean().item()
    assert abs(kept - (1 - drop_prob)) < 4 * (drop_prob * (1 - drop_prob) / 20_000) ** 0.5
    assert torch.equal(layer.eval()(x), x)


def test_drop_path_of_zero_is_the_identity_and_draws_nothing():
    x = torch.randn(4, 2, 3)
    torch.manual_seed(5)
    assert DropPath(0.).train()(x) is x
    assert DropPath(0.5).eval()(x) is x
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


def test_drop_path_keeps_the_type():
    assert DropPath(0.5).train()(torch.ones(4, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize('parts', [(4, 4), (1, 3, 4), (2, 2, 2, 2)])
def test_draws_of_several_ranks_are_those_of_one(parts):
    """Equal seeds on every rank: the parts of the global batch equal the batch of one process."""
    labels, x = torch.arange(8), torch.randn(8, 3, 2)
    layer = DropPath(0.4).train()

    def draws(begin, end):
        torch.manual_seed(17)
        with GlobalBatch(begin, 8):
            return drop_labels(labels[begin:end], 99, 0.5), layer(x[begin:end]), layer(x[begin:end])

    torch.manual_seed(17)
    single = drop_labels(labels, 99, 0.5), layer(x), layer(x)
    ranks, begin = [], 0
    for part in parts:
        ranks.append(draws(begin, begin + part))
        begin += part
    for whole, pieces in zip(single, zip(*ranks, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), whole)


def test_dropout_differs_between_ranks_and_repeats():
    """Equal seeds on every rank: shared draws, then draws of their own, the same at a second time."""
    def draws(begin):
        torch.manual_seed(6)
        with GlobalBatch(begin, 8):
            shared = GlobalBatch.current.per_image(2, 'cpu', lambda t: t.uniform_())
            GlobalBatch.current.reseed_per_rank()
            return shared, torch.rand(3)
    parts = [draws(begin) for begin in (0, 2, 4, 6)]
    assert len(torch.cat([shared for shared, _ in parts]).unique()) == 8
    assert len(torch.cat([own for _, own in parts]).unique()) == 12
    assert torch.equal(draws(4)[1], parts[2][1])


def test_outside_of_a_global_batch_nobody_parts():
    torch.manual_seed(6)
    GlobalBatch.current.reseed_per_rank()
    after = torch.rand(1)
    torch.manual_seed(6)
    assert torch.equal(after, torch.rand(1))


def test_a_global_batch_ends_with_their_context():
    def draw():
        torch.manual_seed(2)
        return drop_labels(torch.zeros(4, dtype=torch.int64), 1, 0.5)
    outside = draw()
    with GlobalBatch(4, 8):
        shifted = draw()
        with GlobalBatch(0, 4):
            assert torch.equal(draw(), outside)
        assert torch.equal(draw(), shifted)
    with pytest.raises(RuntimeError, match='stop'), GlobalBatch(4, 8):
        raise RuntimeError('stop')
    assert torch.equal(draw(), outside)
    torch.manual_seed(2)
    assert torch.equal(shifted, (torch.rand(8)[4:] < 0.5).long())


# ------------------------------------------------------------ float32 precision
BACKENDS, MATMUL, CUDNN = torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn
HAS_NEWER = hasattr(MATMUL, 'fp32_precision')  # since torch 2.9
NEWER = [BACKENDS, CUDNN, MATMUL, CUDNN.conv, CUDNN.rnn, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv,
         BACKENDS.mkldnn.rnn] if HAS_NEWER else []
needs_newer = pytest.mark.skipif(not HAS_NEWER, reason='torch before 2.9 has the older settings alone')


def read(getter):
    try:
        return getter()
    except RuntimeError:  # the newer settings contradict it
        return 'contradiction'


def precisions():
    return ([setting.fp32_precision for setting in NEWER], read(torch.get_float32_matmul_precision),
            read(lambda: CUDNN.allow_tf32), read(lambda: MATMUL.allow_tf32),
            MATMUL.allow_fp16_reduced_precision_reduction)


@pytest.fixture
def precision():
    """Silence and the defaults of torch, before and after."""
    def reset():
        torch.set_float32_matmul_precision('highest')
        CUDNN.allow_tf32 = True
        for setting in NEWER:
            setting.fp32_precision = 'none'
        if NEWER:
            CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = 'tf32'
        MATMUL.allow_fp16_reduced_precision_reduction = True
    reset()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield
    reset()


@pytest.fixture(scope='module')
def vqvae():
    return VQVAE(**TINY_VQVAE).eval()


def encode_and_score(vqvae):
    images_B3HW = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    rows = torch.arange(12.).view(6, 2)
    return [*vqvae.encode(images_B3HW), torch.tensor(precision_recall(rows, rows + 0.5))]


@needs_newer
@pytest.mark.parametrize('value', ['tf32', 'ieee', 'none'])
@pytest.mark.parametrize('number', range(len(NEWER)))
def test_any_newer_setting_of_the_caller_is_kept(precision, vqvae, number, value):
    """Such as torch.backends.cuda.matmul.fp32_precision: nothing raises, warns, or is changed."""
    expected = encode_and_score(vqvae)
    NEWER[number].fp32_precision = value
    before = precisions()
    for ours, theirs in zip(encode_and_score(vqvae), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert precisions() == before


@needs_newer
@pytest.mark.parametrize('seed', range(8))
def test_contradicting_settings_are_restored_exactly(precision, seed):
    """What a setting shows may be that of a more general one; both are the same afterwards."""
    rng = random.Random(seed)
    for _ in range(10):
        for setting in rng.sample(NEWER, 3):
            setting.fp32_precision = rng.choice(['none', 'ieee', 'tf32'])
        if rng.random() < 0.4:
            torch.set_float32_matmul_precision(rng.choice(['high', 'highest', 'medium']))
        if rng.random() < 0.4:
            CUDNN.allow_tf32 = rng.random() < 0.5
        MATMUL.allow_fp16_reduced_precision_reduction = rng.random() < 0.5
        before = precisions()
        with full_precision():
            assert {setting.fp32_precision for setting in NEWER} <= {'none', 'ieee'}
            assert precisions()[1:] == ('highest', False, False, False)
        with float32_matmul():
            assert MATMUL.fp32_precision in ('none', 'ieee') and not MATMUL.allow_tf32
            assert torch.get_float32_matmul_precision() == 'highest'
        assert precisions() == before
        shown = before[0][:2]
        for setting in NEWER[:2]:  # what the special ones hold themselves is the same, too
            setting.fp32_precision = 'none'
        own = precisions()[0]
        for setting, value in zip(NEWER[:2], shown, strict=True):
            setting.fp32_precision = value
        with pytest.raises(KeyError), full_precision(), float32_matmul():
            raise KeyError
        for setting in NEWER[:2]:
            setting.fp32_precision = 'none'
        assert precisions()[0] == own


@pytest.mark.parametrize('seed', range(4))
def test_tf32_of_a_command_wins(precision, seed):
    """The settings agree afterwards, so the older ones can be read as libraries do."""
    rng = random.Random(seed)
    for setting in rng.sample(NEWER, 3) if NEWER else ():
        setting.fp32_precision = rng.choice(['ieee', 'tf32'])
    for allowed in (True, False):
        allow_tf32(allowed)
        assert CUDNN.allow_tf32 is allowed
        on_cuda = allowed and torch.cuda.is_available()
        assert torch.get_float32_matmul_precision() == ('high' if on_cuda else 'highest')
        assert MATMUL.allow_tf32 is on_cuda
        if NEWER:
            assert CUDNN.conv.fp32_precision == CUDNN.rnn.fp32_precision == ('tf32' if allowed else 'ieee')


def test_older_settings_of_the_caller_are_kept(precision, vqvae):
    for older, flag in itertools.product(('high', 'medium', 'highest'), (True, False)):
        torch.set_float32_matmul_precision(older)
        CUDNN.allow_tf32 = flag
        before = precisions()
        encode_and_score(vqvae)
        assert precisions() == before and before[1:3] == (older, flag)


# ------------------------------------------------------------ draws among the top k
@pytest.mark.parametrize(('vocab_size', 'top_k', 'top_p'), [
    (4096, 900, 0.96), (4096, 600, 0.), (8912, 900, 0.95), (1000, 1, 0.5), (64, 64, 0.9), (50, 7, 0.3)])
def test_draws_among_the_top_k_equal_those_from_a_full_sort(vocab_size, top_k, top_p):
    logits = 3 * torch.randn(2, 60, vocab_size)
    before = logits.clone()
    filtered = filter_by_sorting(logits.clone(), top_k, top_p)
    assert torch.equal(filter_top_k_top_p(logits, top_k, top_p), filtered)
    expected = filtered.softmax(-1).div(ImageNoise(5, [3, 8]).exponential_like(logits)).argmax(-1)
    assert torch.equal(draw_codes(logits, top_k, top_p, ImageNoise(5, [3, 8])), expected)
    assert torch.equal(logits, before)


def test_codes_tied_with_the_last_of_the_top_k_all_count():
    logits = torch.tensor([3., 1., 1., 1., 0.]).log().expand(1, 2000, 5)
    drawn = draw_codes(logits, top_k=2, rng=ImageNoise(0, [0]))
    assert drawn.unique().tolist() == [0, 1, 2, 3]


def test_noise_of_single_elements_is_that_of_the_whole_draw():
    logits = torch.empty(3, 5, 7)
    whole = ImageNoise(2, [4, 0, 9]).exponential_like(logits)
    index = torch.randint(35, (3, 11))
    assert torch.equal(ImageNoise(2, [4, 0, 9]).exponential_at(index), whole.view(3, 35).gather(1, index))


# ------------------------------------------------------------ losses of many tokens
@pytest.mark.parametrize('smoothing', [0., 0.1])
@pytest.mark.parametrize('at_once', [1, 5 * 31, 2 ** 26])
def test_token_losses_are_cross_entropies_in_chunks_of_any_size(monkeypatch, smoothing, at_once):
    """Values and gradients; what is logged knows no smoothing."""
    monkeypatch.setattr(helpers, 'LOGITS_AT_ONCE', at_once)
    head = torch.nn.Linear(8, 31)
    h_BLC = torch.randn(2, 7, 8, requires_grad=True)
    target_BL = torch.randint(31, (2, 7))
    logits_BLV = head(h_BLC)
    expected_BL = F.cross_entropy(logits_BLV.transpose(1, 2), target_BL, label_smoothing=smoothing,
                                  reduction='none')
    inputs = (h_BLC, head.weight, head.bias)
    expected_grads = torch.autograd.grad(expected_BL.square().sum(), inputs)

    losses = helpers.token_losses(head, h_BLC, target_BL, smoothing)
    assert_within(losses.loss_BL, expected_BL, 1e-6)
    plain_BL = F.cross_entropy(logits_BLV.transpose(1, 2), target_BL, reduction='none')
    assert_within(losses.plain_BL, plain_BL, 1e-6)
    assert not losses.plain_BL.requires_grad
    assert torch.equal(losses.predicted_BL, logits_BLV.argmax(-1))
    for grad, expected in zip(torch.autograd.grad(losses.loss_BL.square().sum(), inputs), expected_grads,
                              strict=True):
        assert_within(grad, expected, 1e-5)


def test_logits_of_a_large_batch_never_exist_whole(monkeypatch):
    """Forward and backward; the logits of 512 tokens are never held at once."""
    monkeypatch.setattr(helpers, 'LOGITS_AT_ONCE', 64 * 1000)
    head = torch.nn.Linear(8, 1000)
    h_BLC = torch.randn(2, 256, 8, requires_grad=True)
    with LargestTensor() as largest:
        helpers.token_losses(head, h_BLC, torch.randint(1000, (2, 256))).loss_BL.sum().backward()
    assert largest.numel == 64 * 1000


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that is computed inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out
