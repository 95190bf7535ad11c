"""SSG: the formula, the priors, and what it must leave alone in sampling."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from configs import parse_sampling
from models.noise import ImageNoise
from models.scales import ScaleLayout
from models.ssg import PRIORS, SCHEDULES, SSG, enlargement
from pipeline import Pipeline
from tests.test_flexvar import small
from tests.vectors import assert_within, load_json, load_tensors, tiny_var

CASES = load_json('post_training/ssg')['cases']
OBLONG = ((1, 1), (1, 2), (3, 2), (4, 5))


@pytest.fixture(scope='module')
def var():
    return tiny_var('sep_l2')


@pytest.fixture(scope='module')
def flexvar():
    return small(num_classes=5)


def maps(size, count=2, vocab_size=7, seed=0):
    """Logits (B, l, V) of a code map, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size[0] * size[1], vocab_size, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------ the formula
@pytest.mark.parametrize('prior', ['zero_pad', 'fused'])
@pytest.mark.parametrize('i', range(len(CASES)))
def test_stored_vectors(i, prior):
    case = CASES[i]
    t = {name: t for name, t in load_tensors('post_training/ssg').items() if name.startswith(f'{i}.')}
    sizes = tuple(case['previous']), tuple(case['current'])
    previous_BlV = t[f'{i}.previous_BlV']
    current_BlV = t[f'{i}.current_BlV']
    assert_within(enlargement(*sizes, prior) @ previous_BlV.double(), t[f'{i}.prior_{prior}'].double(), 1e-10)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        ssg = SSG(ScaleLayout(sizes), case['beta'], prior)
        assert ssg(0, previous_BlV.to(dtype)) is not None
        assert_within(ssg(1, current_BlV.to(dtype)), t[f'{i}.out_{prior}'].to(dtype), tolerance)


def test_by_hand():
    """1x1 -> 2x2: the prior is the one map everywhere, and logits of 2 over a prior of 1 become 2 + b."""
    ssg = SSG(ScaleLayout((1, 2)), 0.5)
    ssg(0, torch.ones(1, 1, 3))
    assert_within(ssg(1, torch.full((1, 4, 3), 2.)), torch.full((1, 4, 3), 2.5), 1e-6)


@pytest.mark.parametrize('prior', PRIORS)
@pytest.mark.parametrize(('size', 'larger'), [((1, 1), (4, 4)), ((2, 3), (5, 4)), ((4, 2), (4, 2)),
                                              ((3, 3), (2, 5)), ((10, 10), (13, 13))])
def test_priors(size, larger, prior):
    """Constant maps keep their value, equal sizes change nothing, the product is linear in the map."""
    enlarge = enlargement(size, larger, prior)
    constant = torch.full((size[0] * size[1], 1), 3.5, dtype=torch.float64)
    assert_within(enlarge @ constant, torch.full((larger[0] * larger[1], 1), 3.5, dtype=torch.float64), 1e-12)
    if size == larger:
        assert_within(enlarge, torch.eye(len(enlarge), dtype=torch.float64), 1e-12)


def test_bilinear_prior_is_that_of_torch():
    x_BlV = maps((3, 5))
    image_BVhw = x_BlV.transpose(1, 2).unflatten(2, (3, 5))
    expected = F.interpolate(image_BVhw, size=(7, 8), mode='bilinear').flatten(2).transpose(1, 2)
    assert_within(enlargement((3, 5), (7, 8), 'bilinear') @ x_BlV, expected, 1e-12)


@pytest.mark.parametrize('prior', PRIORS)
def test_low_frequencies_are_those_of_the_map(prior):
    """By scipy: the prior's spectrum has that of the map as its corner, and zeros or interpolation around."""
    fft = pytest.importorskip('scipy.fft')
    x_l1 = maps((3, 4), count=1, vocab_size=1)[0]
    enlarged = (enlargement((3, 4), (6, 7), prior) @ x_l1).view(6, 7).numpy()
    spectrum = fft.dctn(enlarged, norm='ortho')
    corner = fft.dctn(x_l1.view(3, 4).numpy(), norm='ortho') * (6 * 7 / 12) ** 0.5
    around = spectrum.copy()
    around[:3, :4] = 0
    assert np.allclose(spectrum[:3, :4], corner, atol=1e-12) == (prior != 'bilinear')
    assert np.allclose(around, 0, atol=1e-12) == (prior == 'zero_pad')


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_schedules_and_what_is_compared(schedule):
    """The prior is of the logits as they came, not of those that SSG has changed; b is 0 at the first."""
    layout = ScaleLayout((1, 2, 3))
    logits = [maps(size, seed=k) for k, size in enumerate(layout.sizes)]
    ssg = SSG(layout, 0.4, 'fused', schedule)
    found = [ssg(k, logits_BlV) for k, logits_BlV in enumerate(logits)]
    assert found[0] is logits[0]
    for k, factor in ((1, 0.4 if schedule == 'constant' else 0.2), (2, 0.4)):
        prior_BlV = enlargement(layout.sizes[k - 1], layout.sizes[k], 'fused') @ logits[k - 1]
        assert_within(found[k], logits[k] + factor * (logits[k] - prior_BlV), 1e-12)


def test_a_number_added_to_the_logits_of_a_token_changes_no_probability():
    layout = ScaleLayout((2, 3))
    offsets = [maps(size, vocab_size=1, seed=9) for size in layout.sizes]

    def probabilities(factor):
        ssg = SSG(layout, 0.7)
        ssg(0, maps((2, 2)) + factor * offsets[0])
        return ssg(1, maps((3, 3), seed=1) + factor * offsets[1]).softmax(-1)
    assert_within(probabilities(5.), probabilities(0.), 1e-12)


def test_tf32_of_the_caller_does_not_reach_the_product():
    """Logits are large and their differences small, so that the 10 bits of TF32 would be seen in them."""
    seen = []

    class Products(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if 'matmul' in function.__name__ and args[0].dtype == torch.float32:
                seen.append(torch.get_float32_matmul_precision())
            return function(*args, **kwargs or {})

    ssg = SSG(ScaleLayout((1, 2)), 0.5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    try:
        ssg(0, torch.ones(1, 1, 3))
        with Products():
            ssg(1, torch.ones(1, 4, 3))
        assert seen == ['highest'] and torch.get_float32_matmul_precision() == 'high'
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------ sampling
def steps_of(model, **options):
    labels = torch.tensor([1, 3])
    return list(model.sample_scales(labels, cfg=2., top_k=20, rng=ImageNoise(4, [5, 6]), **options))


@pytest.mark.parametrize(('name', 'sizes'), [('var', None), ('flexvar', (1, 2, 3, 4)), ('flexvar', OBLONG)])
def test_sampling(request, name, sizes):
    """The logits of each scale follow from those that the model gives for the codes drawn before."""
    model = request.getfixturevalue(name)
    options = {} if sizes is None else dict(infer_patch_nums=sizes)
    layout = ScaleLayout(sizes or model.patch_nums)
    steps = steps_of(model, ssg=0.8, ssg_prior='zero_pad', **options)
    kept = [(step.idx_Bl, torch.ones_like(step.idx_Bl, dtype=torch.bool)) for step in steps]
    plain = steps_of(model, keep=kept, **options)
    ssg = SSG(layout, 0.8, 'zero_pad')
    for step, other in zip(steps, plain, strict=True):
        assert_within(step.logits_BlV, ssg(step.k, other.logits_BlV), 1e-4)
    assert not torch.equal(steps[-1].logits_BlV, plain[-1].logits_BlV)


@pytest.mark.parametrize('name', ['var', 'flexvar'])
def test_off_changes_no_bit_and_on_takes_the_same_noise(request, name):
    model = request.getfixturevalue(name)
    options = dict(guidance=3., top_k=20)
    plain = model.sample([1, 3], rng=ImageNoise(0, [7, 8]), **options)
    for prior in PRIORS:
        off = model.sample([1, 3], rng=ImageNoise(0, [7, 8]), ssg=0., ssg_prior=prior, **options)
        assert torch.equal(off, plain)
    both = model.sample([1, 3], rng=ImageNoise(0, [7, 8]), ssg=0.5, **options)
    assert not torch.equal(both, plain)
    alone = model.sample([3], rng=ImageNoise(0, [8]), ssg=0.5, **options)
    assert_within(alone, both[1:], 1e-5)
    rng, rng_with = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    model.sample([1], rng=rng, **options)
    model.sample([1], rng=rng_with, ssg=0.5, **options)
    assert torch.equal(rng.get_state(), rng_with.get_state())


def test_it_is_an_option_of_a_call(var):
    pipe = Pipeline(var)
    options = dict(num_images=2, output='pt', top_k=20)
    assert not torch.equal(pipe([1], ssg=0.5, **options), pipe([1], **options))
    for bad, words in ((dict(ssg=-1.), '--ssg must be in'),
                       (dict(ssg_prior='cubic'), 'ssg_prior must be one of fused, zero_pad, bilinear'),
                       (dict(ssg_schedule='cosine'), 'ssg_schedule must be one of constant, linear')):
        with pytest.raises(ValueError, match=words):
            pipe([1], **bad)


@pytest.mark.parametrize(('model', 'flag', 'words'), [
    ('npp', '--ssg=0.3', 'NPP has no scales'), ('npp', '--ssg-prior=fused', 'NPP has no scales'),
    ('flowar', '--ssg=0.3', 'logits of codes, and FlowAR has none'), ('npp', '--cfg_to=3', '--cfg_interval'),
    ('flowar', '--cfg_from=2', 'pass --guidance'), ('var', '--ssg_prior=cubic', 'fused, zero_pad, bilinear')])
def test_other_families_and_values_are_refused_in_one_line(capsys, model, flag, words):
    with pytest.raises(SystemExit):
        parse_sampling([f'--model={model}', '--ckpt=x', flag])
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1
