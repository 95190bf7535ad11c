"""What trains the codebook: upkeep of codes, start by k-means, scale dropout, options, several ranks."""
import copy
import io
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dist
from models import VAR, VQVAE, VectorQuantizer2
from models.noise import GlobalBatch
from models.tokenizers import codebook, quantizer_training
from models.tokenizers.codebook import (
    ALARM_AFTER,
    CHECK_EVERY,
    GAMMA,
    STOP_AT,
    CodebookUpkeep,
    balanced_candidates,
    kmeans,
)
from models.tokenizers.quantizer_training import QuantizerTraining
from tests.runs import on_two_ranks
from tests.vectors import assert_within
from utils.amp_sc import AmpOptimizer

PATCH_NUMS = (1, 2, 4)
NAMES = ['1x1', '2x2', '4x4']


def quantizer(vocab_size=24, channels=4, patch_nums=PATCH_NUMS, unshared=False, **measures):
    quantizer = VectorQuantizer2(vocab_size, channels, False, v_patch_nums=patch_nums, unshared=unshared)
    quantizer.measures = QuantizerTraining(quantizer, **measures)
    return quantizer


def tiny_vqvae(**kwargs):
    """For images of 32x32, whose features are 4x4."""
    kwargs = dict(vocab_size=24, z_channels=8, v_patch_nums=PATCH_NUMS, test_mode=False) | kwargs
    return VQVAE(net='tiny', **kwargs)


def images(batch=4):
    return torch.rand(batch, 3, 32, 32) * 2 - 1


def all_equal(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# ------------------------------------------------------------ moving averages
def test_codes_move_to_the_mean_of_their_queries():
    upkeep = CodebookUpkeep(nn.Embedding(6, 3), restart=False)
    weight = upkeep.embedding.weight
    assert not weight.requires_grad
    count, total = np.ones(6), weight.detach().double().numpy().copy()
    unused = weight[4:].clone()
    for _ in range(5):
        hits, sums = np.zeros(6), np.zeros((6, 3))
        for _ in range(2):  # micro-batches of one step
            codes = {name: torch.randint(4, (2, l)) for name, l in (('1x1', 1), ('2x2', 4))}
            queries = {name: torch.randn(idx.numel(), 3) for name, idx in codes.items()}
            upkeep.observe(codes, queries)
            for name, idx in codes.items():
                for code, query in zip(idx.flatten().tolist(), queries[name].double().numpy(), strict=True):
                    hits[code] += 1
                    sums[code] += query
        assert upkeep.update(progress=0.) == {}
        count = GAMMA * count + (1 - GAMMA) * hits
        total = GAMMA * total + (1 - GAMMA) * sums
        np.testing.assert_allclose(weight.numpy(), total / count[:, None], atol=1e-6)
        np.testing.assert_allclose(upkeep.count_V.numpy(), count, rtol=1e-6)
    assert GAMMA == 0.99 and upkeep.step == 5
    assert_within(weight[4:], unused, 1e-6)


def test_update_without_observation_changes_nothing():
    upkeep = CodebookUpkeep(nn.Embedding(6, 3))
    before = upkeep.embedding.weight.clone()
    assert upkeep.update(progress=0.) == {}
    assert upkeep.step == 0 and torch.equal(upkeep.embedding.weight, before)
    upkeep.observe({'1x1': torch.tensor([[2]])}, {'1x1': torch.ones(1, 3)})
    upkeep.update(progress=0.)
    after = upkeep.embedding.weight.clone()
    assert (after[2] != before[2]).all() and upkeep.age_V.tolist() == [1, 1, 0, 1, 1, 1]
    assert upkeep.update(progress=0.) == {}
    assert upkeep.step == 1 and torch.equal(upkeep.embedding.weight, after)


def test_codes_without_hits_keep_their_vector_for_ever():
    upkeep = CodebookUpkeep(nn.Embedding(2, 3), restart=False)
    before = upkeep.embedding.weight[1].clone()
    for _ in range(1800):  # its average count falls below the smallest one that is divided by
        upkeep.observe({'1x1': torch.tensor([[0]])}, {'1x1': torch.ones(1, 3)})
        upkeep.update(progress=0.)
    assert upkeep.count_V[1] < codebook.EPS
    torch.testing.assert_close(upkeep.embedding.weight[1], before, rtol=1e-4, atol=0.)
    assert_within(upkeep.embedding.weight[0], torch.ones(3), 1e-5)
    upkeep.observe({'1x1': torch.tensor([[1]])}, {'1x1': torch.full((1, 3), 7.)})
    upkeep.update(progress=0.)
    assert_within(upkeep.embedding.weight[1], torch.full((3,), 7.), 1e-3)


@pytest.mark.parametrize('upkeep', [dict(), dict(ema=False), None], ids=['ema', 'gradient', 'published'])
def test_who_moves_the_codes_of_a_vqvae(upkeep):
    vqvae, x = tiny_vqvae(measures=upkeep), images()
    weight, before = vqvae.quantize.embedding.weight, vqvae.quantize.embedding.weight.detach().clone()
    rec = vqvae.reconstruct(x)
    (rec.views[0][1].square().mean() + rec.latent_loss).backward()
    without_grad = {name for name, p in vqvae.named_parameters() if p.requires_grad and p.grad is None}
    assert without_grad == set() and weight.requires_grad == (upkeep != {})
    assert any(name in 'quantize.embedding.weight' for name in vqvae.no_weight_decay())
    hit = torch.cat(list(rec.codes.values()), dim=1).unique()
    if weight.requires_grad:
        assert torch.equal(weight.grad.abs().sum(1).nonzero().flatten(), hit)
    vqvae.after_step(progress=0.)
    changed = ~torch.isclose(weight, before, rtol=1e-4, atol=1e-6).all(1)
    assert torch.equal(changed.nonzero().flatten(), hit if upkeep == {} else hit[:0])
    expected = set() if upkeep is None else {'usage_1x1', 'restarts', 'alarm_collapse', 'usage_legacy_4x4'}
    assert expected <= set(vqvae.code_metrics()) and bool(expected) == bool(vqvae.code_metrics())


# ------------------------------------------------------------ restart
VOCAB, PLANTED = 256, 100
PER_LOOK = int(0.1 * VOCAB)
PATIENCE = max(30, math.ceil(56 * VOCAB / (3 * (VOCAB - PLANTED))))
FIRST_LOOK = math.ceil(PATIENCE / CHECK_EVERY) * CHECK_EVERY
NUM_LOOKS = math.ceil(PLANTED / (0.1 * VOCAB))


def planted(**kwargs):
    """A codebook whose first rows no query ever comes near."""
    upkeep = CodebookUpkeep(nn.Embedding(VOCAB, 8), **kwargs)
    upkeep.embedding.weight.data[:PLANTED] = 1e3
    return upkeep


def observe_alive(upkeep):
    """Queries of one batch that hits every code but the planted ones; those of scale k begin with k."""
    alive = torch.arange(PLANTED, VOCAB).repeat(3)
    parts = alive[torch.randperm(len(alive))].view(3, 4, -1)
    queries = torch.randn(3, parts[0].numel(), 8)
    queries[:, :, 0] = torch.arange(3)[:, None]
    upkeep.observe(dict(zip(NAMES, parts, strict=True)), dict(zip(NAMES, queries, strict=True)))
    return queries.flatten(0, 1)


@pytest.mark.parametrize('ema', [True, False])
def test_dead_codes_restart_as_queries_of_every_scale(ema):
    upkeep = planted(ema=ema)
    weight, dead = upkeep.embedding.weight, set(range(PLANTED))
    looks = range(FIRST_LOOK, FIRST_LOOK + CHECK_EVERY * NUM_LOOKS, CHECK_EVERY)
    for step in range(1, looks[-1] + 1):
        before, offered = weight.detach().clone(), observe_alive(upkeep)
        rows = upkeep.update(progress=0.5)
        if step not in looks:
            assert rows == {}
            continue
        assert list(rows) == [weight]
        replaced = rows[weight]
        assert len(replaced) == min(PER_LOOK, len(dead)) or step == looks[-1]
        never_seen = set(replaced.tolist()) & dead
        assert len(never_seen) == min(PER_LOOK, len(dead)), 'codes that were never replaced come first'
        dead -= never_seen
        new = weight[replaced].detach()
        assert (new[:, None] == offered).all(2).any(1).all(), 'a restarted code is a query of this step'
        shares = new[:, 0].long().bincount(minlength=3)
        assert shares.max() - shares.min() <= 1
        assert len(upkeep.count_V[replaced].unique()) == 1 and not upkeep.age_V[replaced].any()
        if not ema:
            changed = (weight != before).any(1).nonzero().flatten()
            assert torch.equal(changed, replaced.sort().values), 'no other code is touched'
    assert not dead and (weight.abs() < 100).all()
    assert upkeep.metrics()['restarts'] == upkeep.num_restarts >= PLANTED


def test_optimizer_forgets_what_it_knew_of_restarted_codes():
    upkeep = planted(ema=False)
    weight = upkeep.embedding.weight
    optimizer = AmpOptimizer(0, torch.optim.AdamW([weight]), ['codes'], [weight], 0.)
    for _ in range(FIRST_LOOK):
        optimizer.backward_clip_step(True, weight.square().mean())
        observe_alive(upkeep)
        rows = upkeep.update(progress=0.)
        for parameter, replaced in rows.items():
            optimizer.forget(parameter, replaced)
    expected = torch.zeros(VOCAB, dtype=torch.bool)
    expected[rows[weight]] = True
    assert expected.sum() == PER_LOOK
    for moment in ('exp_avg', 'exp_avg_sq'):
        value_VZ = optimizer.optimizer.state[weight][moment]
        assert torch.equal((value_VZ == 0).all(1), expected) and torch.equal((value_VZ == 0).any(1), expected)


def test_a_restarted_code_lives_on_as_an_average():
    upkeep = planted()
    for _ in range(FIRST_LOOK):
        observe_alive(upkeep)
        rows = upkeep.update(progress=0.)
    code = rows[upkeep.embedding.weight][0]
    before, count = upkeep.embedding.weight[code].clone(), upkeep.count_V[code].item()
    upkeep.observe({'1x1': code.view(1, 1)}, {'1x1': torch.ones(1, 8)})
    upkeep.update(progress=0.)
    expected = (GAMMA * count * before + (1 - GAMMA)) / (GAMMA * count + 1 - GAMMA)
    assert_within(upkeep.embedding.weight[code], expected, 1e-6)


@pytest.mark.parametrize(('progress', 'restarts'), [(0.799, PER_LOOK), (STOP_AT, 0), (1., 0)])
def test_no_restart_at_the_end_of_training(progress, restarts):
    upkeep = planted()
    for _ in range(FIRST_LOOK):
        observe_alive(upkeep)
        upkeep.update(progress)
    assert STOP_AT == 0.8 and upkeep.num_restarts == restarts


def test_restart_with_fewer_queries_than_its_share():
    upkeep = CodebookUpkeep(nn.Embedding(40, 4))  # 4 codes per look, but a scale offers 1 query
    for _ in range(40 * 28):
        codes = {name: torch.tensor([[39]]) for name in ('1x1', '2x2')}
        upkeep.observe(codes, {name: torch.randn(1, 4) for name in codes})
        upkeep.update(progress=0.)
    assert upkeep.num_restarts == 2
    assert upkeep.embedding.weight.isfinite().all()


def test_restart_of_a_part_of_the_codebook():
    upkeep = CodebookUpkeep(nn.Embedding(60, 4), ema=False, rows=slice(20, 40))
    weight, before = upkeep.embedding.weight, upkeep.embedding.weight.detach().clone()
    for _ in range(40):
        upkeep.observe({'1x1': torch.arange(10).repeat(4, 1)}, {'1x1': torch.randn(40, 4)})
        rows = upkeep.update(progress=0.)
    assert len(rows[weight]) == 2 and all(30 <= row < 40 for row in rows[weight])
    assert torch.equal((weight != before).any(1).nonzero().flatten(), rows[weight].sort().values)


# ------------------------------------------------------------ usage and its alarm
def feed(upkeep, num_steps, codes_in_use):
    """Steps on 8 images whose codes are drawn evenly from the first few of the codebook, by scale."""
    for _ in range(num_steps):
        codes = {name: torch.randint(codes_in_use[name], (8, l)) for name, l in (('1x1', 1), ('4x4', 16))}
        upkeep.observe(codes, {name: torch.zeros(idx.numel(), 1) for name, idx in codes.items()})
        upkeep.update(progress=0.)


EVEN = {'1x1': 50, '4x4': 50}
STREAMS = {  # (steps, codes in use of 100), and the scale that the alarm names
    'few but enough': ([(700, {'1x1': 7, '4x4': 12})], None),
    'below 5 % at 1x1': ([(700, {'1x1': 4, '4x4': 50})], '1x1'),
    'below 10 % elsewhere': ([(700, {'1x1': 50, '4x4': 8})], '4x4'),
    'above half of the best': ([(500, EVEN), (200, {'1x1': 50, '4x4': 28})], None),
    'below half of the best': ([(500, EVEN), (200, {'1x1': 50, '4x4': 22})], '4x4'),
    'below half of an early best': ([(100, EVEN), (600, {'1x1': 20, '4x4': 50})], '1x1'),
}


@pytest.mark.parametrize(('stream', 'collapsed'), STREAMS.values(), ids=STREAMS)
def test_alarm(stream, collapsed, caplog):
    upkeep = CodebookUpkeep(nn.Embedding(100, 1), restart=False)
    with caplog.at_level(logging.WARNING):
        for num_steps, codes_in_use in stream:
            feed(upkeep, num_steps, codes_in_use)
    assert upkeep.step == 700 and upkeep.metrics()['alarm_collapse'] == bool(collapsed)
    assert [f'scale {collapsed}:' in message for message in caplog.messages] == [True] * bool(collapsed)


def test_alarm_begins_late_and_ends_with_the_collapse(caplog):
    upkeep = CodebookUpkeep(nn.Embedding(100, 1), restart=False)
    feed(upkeep, 499, {'1x1': 1, '4x4': 1})
    assert upkeep.metrics()['alarm_collapse'] == 0 and not caplog.messages
    feed(upkeep, 1, {'1x1': 1, '4x4': 1})
    assert upkeep.metrics()['alarm_collapse'] == 1 and len(caplog.messages) == 2
    feed(upkeep, 100, {'1x1': 8, '4x4': 1})
    assert upkeep.metrics()['alarm_collapse'] == 1 and upkeep.collapsed == ['4x4']
    feed(upkeep, 100, {'1x1': 8, '4x4': 12})
    assert upkeep.metrics()['alarm_collapse'] == 0 and len(caplog.messages) == 2


def test_usage_is_that_of_the_last_full_window():
    upkeep = CodebookUpkeep(nn.Embedding(30, 2), restart=False)
    steps = [torch.randint(1 + step // 10, (2, 4)) for step in range(250)]
    for step, codes in enumerate(steps):
        upkeep.observe({'2x2': codes[:1]}, {'2x2': torch.zeros(4, 2)})  # micro-batches of one step
        upkeep.observe({'2x2': codes[1:]}, {'2x2': torch.zeros(4, 2)})
        upkeep.update(progress=0.)
        if step + 1 in (50, 250):
            window = torch.stack(steps[:50] if step < 100 else steps[100:200])
            count = window.flatten().bincount(minlength=30)
            share = count[count > 0].double().numpy() / window.numel()
            assert torch.equal(upkeep.counts()['2x2'], count)
            metrics, perplexity = upkeep.metrics(), np.exp(-(share * np.log(share)).sum())
            assert metrics['perplexity_2x2'] == pytest.approx(perplexity, rel=1e-9)
            assert metrics['distinct_2x2'] == len(window.unique()) == 30 - metrics['dead_2x2']
            assert metrics['usage_2x2'] == metrics['usage'] == len(window.unique()) / 30


# ------------------------------------------------------------ k-means
def test_kmeans_finds_separated_clusters(monkeypatch):
    corners = 10 * torch.eye(5)
    queries = corners.repeat(50, 1) + 0.1 * torch.randn(250, 5)
    monkeypatch.setattr(torch, 'randperm', torch.arange)  # one start in every cluster
    means = torch.stack([queries[i::5].mean(0) for i in range(5)])
    assert_within(kmeans(queries, 5), means, 1e-5)


@pytest.mark.parametrize('seed', range(5))
def test_kmeans_ends_at_means_of_the_nearest_queries(seed):
    torch.manual_seed(seed)
    queries = torch.randn(400, 3)
    centres = kmeans(queries, 6, iterations=100)
    nearest = torch.cdist(queries, centres).argmin(1)
    assert_within(centres, torch.stack([queries[nearest == i].mean(0) for i in range(6)]), 1e-5)
    two = torch.cat([queries[:200] - 9, queries[200:] + 9])  # two clusters are found from any start
    expected = torch.stack([two[:200].mean(0), two[200:].mean(0)])
    assert_within(kmeans(two, 2).sort(0).values, expected.sort(0).values, 1e-5)


def test_kmeans_of_few_and_of_many_queries():
    few = torch.randn(3, 4)
    centres = kmeans(few, 8)
    assert (centres[:, None] == few).all(2).any(1).all() and len(centres.unique(dim=0)) == 3
    many = torch.randn(1000, 4)
    torch.manual_seed(5)
    centre = kmeans(many, 1)
    torch.manual_seed(5)
    assert_within(centre[0], many[torch.randperm(1000)[:256]].mean(0), 1e-6)


def clustered_features(batch=96):
    """Features whose means, quarters and details differ in size."""
    return sum(std * F.interpolate(torch.randn(batch, 4, side, side), 4)
               for side, std in ((1, 1.), (2, 0.5), (4, 0.2))) + 2


def residuals(quantize, f):
    quantize.eval()
    with torch.no_grad():
        out = quantize.quantised(f)
    quantize.train()
    return [out.parts[f'residual_{name}'].item() for name in ('2x2', '4x4', 'end')]


@pytest.mark.parametrize('unshared', [False, True])
def test_every_scale_starts_with_codes_of_its_own(unshared):
    quantize, f = quantizer(vocab_size=26, unshared=unshared), clustered_features()
    before = residuals(quantize, f)
    torch.manual_seed(7)
    quantize.measures.place_codes(f)
    after = residuals(quantize, f)
    assert all(a < 0.8 * b for a, b in zip(after, before, strict=True)), f'{after}, before {before}'

    torch.manual_seed(7)
    weight, rest = quantize.embedding.weight, f
    blocks = weight.split([26] * 3 if unshared else [8, 8, 10])
    for k, (block, side) in enumerate(zip(blocks, PATCH_NUMS, strict=True)):
        query = F.adaptive_avg_pool2d(rest, side).permute(0, 2, 3, 1).reshape(-1, 4)
        assert_within(block, kmeans(query, len(block)), 1e-5)
        code = block[torch.cdist(query, block).argmin(1)].view(len(f), side, side, 4).permute(0, 3, 1, 2)
        with torch.no_grad():
            rest = rest - quantize.quant_resi(F.interpolate(code, size=(4, 4), mode='bicubic'), k, 3)
    for upkeep in quantize.measures.upkeeps:
        assert (upkeep.count_V == 1).all() and torch.equal(upkeep.sum_VZ, upkeep.weight_VZ)


def test_places_follow_from_the_seed():
    quantize, f, placed = quantizer(), clustered_features(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        quantize.measures.place_codes(f)
        placed.append(quantize.embedding.weight.clone())
    assert torch.equal(placed[0], placed[1]) and not torch.equal(placed[0], placed[2])


# ------------------------------------------------------------ deferred quantisation
def test_quantisation_is_deferred():
    quantize = quantizer(defer_steps=6)
    weight, before, gathered = quantize.embedding.weight, quantize.embedding.weight.clone(), []
    for step in range(6):
        assert quantize.measures.waiting and torch.equal(weight, before)
        for training in (True, False):
            f = torch.randn(2, 4, 4, 4).requires_grad_()
            out = quantize.train(training).quantised(f)
            if training:
                assert out.f_hat_BZhw is f and out.loss.item() == 0 and out.codes == {}
                assert out.parts.keys() == {'latent_mean', 'latent_std'}
            else:  # judged as it will be used: no early checkpoint becomes the best one by skipping codes
                tokens = quantize.f_to_idxBl_or_fhat(f.detach(), to_fhat=False)
                assert all(map(torch.equal, out.codes.values(), tokens))
        rows = quantize.measures.after_step(progress=0.)
        gathered.append(sum(map(len, quantize.measures.gathered)))
        assert list(rows) == ([weight] if step == 5 else [])
    assert gathered == [0, 0, 0, 2, 4, 0], 'the second half of the steps, and nothing afterwards'
    assert not quantize.measures.waiting and (weight != before).any(1).all()
    assert torch.equal(rows[weight], torch.arange(24)), 'the optimizer forgets all codes'
    assert not quantize.ema_vocab_hit_SV.any() and quantize.measures.upkeeps[0].step == 0
    out = quantize.train().quantised(f)
    assert list(out.codes) == NAMES and out.loss > 0
    quantize.measures.after_step(progress=0.)
    assert quantize.measures.upkeeps[0].step == 1


@pytest.mark.parametrize(('vocab_size', 'num_steps'), [(6, 2), (12, 4), (100, 5)])
def test_features_are_gathered_late(monkeypatch, vocab_size, num_steps):
    """As many images as k-means needs, 4 V / K or more, from the last steps, at most half of them."""
    monkeypatch.setattr(quantizer_training, 'KMEANS_IMAGES', 8)
    quantize, seen = quantizer(vocab_size, defer_steps=10), []
    monkeypatch.setattr(quantize.measures, 'place_codes', seen.append)
    steps = [torch.randn(4, 4, 4, 4) for _ in range(10)]
    for f in steps:
        quantize.quantised(f)
        quantize.measures.after_step(progress=0.)
    assert len(seen) == 1 and torch.equal(seen[0], torch.cat(steps[-num_steps:]))


def test_parameters_are_idle_until_quantisation_starts():
    vqvae = tiny_vqvae(measures=dict(defer_steps=1, ema=False))
    for idle in (True, False):
        assert vqvae.has_idle_parameters == idle
        rec = vqvae.reconstruct(images())
        (rec.views[0][1].square().mean() + rec.latent_loss).backward()
        without_grad = [name for name, p in vqvae.named_parameters() if p.requires_grad and p.grad is None]
        assert bool(without_grad) == idle and all(name.startswith('quantize.') for name in without_grad)
        vqvae.after_step(progress=0.)


# ------------------------------------------------------------ scale dropout
DEEP = (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize('scale_drop', [1., 0.5])
def test_dropped_images_keep_leading_scales(scale_drop):
    quantize = quantizer(patch_nums=DEEP, scale_drop=scale_drop)
    f = torch.randn(500, 4, 6, 6)
    with torch.no_grad():
        out = quantize.quantised(f)
    f_hats = torch.stack(quantize.f_to_idxBl_or_fhat(f, to_fhat=True), 1)
    error_BK = (out.f_hat_BZhw[:, None] - f_hats).abs().flatten(2).amax(2)
    num_kept = error_BK.argmin(1) + 1
    assert error_BK.amin(1).max() <= 1e-5
    assert num_kept.min() == round(0.3 * 6) == 2 and num_kept.max() == 6
    whole = 1 - scale_drop + scale_drop / 5  # 2..6 are equally likely
    assert (num_kept == 6).double().mean().item() == pytest.approx(whole, abs=0.07)

    # every scale counts the images that keep it
    mse_BK = (f_hats - f[:, None]).square().flatten(2).mean(2)
    kept_BK = torch.arange(6) < num_kept[:, None]
    expected = sum(mse_BK[kept_BK[:, k], k].mean() for k in range(6)) / 6
    assert out.parts['code_loss'].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(1.25 * expected.item(), rel=1e-5)
    assert all(len(idx) == 500 for idx in out.codes.values())

    with torch.no_grad():
        out = quantize.eval().quantised(f)
    assert_within(out.f_hat_BZhw, f_hats[:, -1], 1e-5)
    assert out.loss.item() == pytest.approx(1.25 * mse_BK.mean().item(), rel=1e-5)


@pytest.mark.parametrize(('num_scales', 'fewest'), [(1, 1), (2, 1), (4, 1), (6, 2), (10, 3)])
def test_fewest_scales_kept(num_scales, fewest):
    quantize = quantizer(vocab_size=4, channels=1, patch_nums=range(1, num_scales + 1), scale_drop=1.)
    f = torch.randn(200, 1, num_scales, num_scales)
    with torch.no_grad():
        f_hat = quantize.quantised(f).f_hat_BZhw
    f_hats = torch.stack(quantize.f_to_idxBl_or_fhat(f, to_fhat=True), 1)
    num_kept = (f_hat[:, None] - f_hats).abs().flatten(2).amax(2).argmin(1) + 1
    assert num_kept.unique().tolist() == list(range(fewest, num_scales + 1))


def test_scale_dropout_does_not_depend_on_the_split():
    quantize = quantizer(scale_drop=0.7).double()
    f, f_hats, losses = torch.randn(8, 4, 4, 4, dtype=torch.float64), [], []
    for first, last in ((0, 8), (0, 3), (3, 8)):
        torch.manual_seed(3)
        with torch.no_grad(), GlobalBatch(first, 8):
            out = quantize.quantised(f[first:last])
        f_hats.append(out.f_hat_BZhw)
        losses.append(out.loss.item() * (last - first) / 8)
    assert torch.equal(f_hats[0], torch.cat(f_hats[1:]))
    assert losses[0] == pytest.approx(losses[1] + losses[2], rel=1e-12)


# ------------------------------------------------------------ options
def test_cosine_lookup_compares_directions():
    quantize, query = VectorQuantizer2(24, 4, using_znorm=True, v_patch_nums=PATCH_NUMS), torch.randn(50, 4)
    expected = F.cosine_similarity(query[:, None], quantize.embedding.weight, dim=2).argmax(1)
    for size in (1e-3, 1., 1e3):
        assert torch.equal(quantize.nearest_code(size * query), expected)
    assert not torch.equal(quantizer().nearest_code(1e-3 * query), expected)
    idx = quantize.nearest_code(query).view(2, 25)
    assert torch.equal(quantize.lookup(idx, 0), quantize.embedding.weight[idx]), 'the code itself is used'


def test_unshared_codes_belong_to_one_scale():
    quantize, f = quantizer(unshared=True), torch.randn(6, 4, 4, 4)
    assert quantize.embedding.weight.shape == (3 * 24, 4)
    blocks = quantize.embedding.weight.detach().split(24)
    for scale in quantize.residual_scales(f):
        nearest = torch.cdist(scale.query_NZ, blocks[scale.k]).argmin(1)
        assert torch.equal(scale.idx_Bhw.flatten(), nearest)
        assert torch.equal(quantize.lookup(scale.idx_Bhw.flatten(1), scale.k).flatten(0, 1),
                           blocks[scale.k][nearest])
    out = quantize.quantised(f)
    before = quantize.embedding.weight.clone()
    quantize.measures.after_step(progress=0.)
    changed = ~torch.isclose(quantize.embedding.weight, before, rtol=1e-4, atol=1e-6).all(1)
    for k, (name, upkeep) in enumerate(zip(NAMES, quantize.measures.upkeeps, strict=True)):
        assert list(upkeep.counts()) == [name]
        assert torch.equal(upkeep.counts()[name].nonzero(), changed[quantize.rows(k)].nonzero())
        assert upkeep.counts()[name].sum() == out.codes[name].numel()


def test_restarts_of_unshared_codes_reach_the_optimizer_as_one():
    quantize = quantizer(unshared=True, ema=False)
    for k in range(3):  # codes 12..23 of every scale are out of reach
        quantize.embedding.weight.data[quantize.rows(k)][12:] = 1e3
    rows = []
    for _ in range(120):
        quantize.quantised(torch.randn(16, 4, 4, 4))
        rows.append(quantize.measures.after_step(progress=0.))
    weight = quantize.embedding.weight
    replaced = torch.cat([step[weight] for step in rows if step])
    assert set(replaced.tolist()) <= {k * 24 + i for k in range(3) for i in range(24)}
    assert {row // 24 for row in replaced.tolist()} == {0, 1, 2}
    assert len(replaced) == sum(upkeep.num_restarts for upkeep in quantize.measures.upkeeps)
    assert any(len(step[weight]) == 6 for step in rows if step), '2 of 24 codes per scale and look'


def test_unshared_vqvae_serves_a_generator():
    vqvae, x = tiny_vqvae(unshared=True, test_mode=True), images()
    idx_kBl = vqvae.encode(x)
    assert all(idx.max() < 24 for idx in idx_kBl)
    assert_within(vqvae.decode(idx_kBl), vqvae.img_to_reconstructed_img(x, last_one=True), 1e-5)
    kwargs = VQVAE.kwargs_from_state_dict(vqvae.state_dict())
    assert kwargs['unshared'] and kwargs['vocab_size'] == 24
    assert not VQVAE.kwargs_from_state_dict(tiny_vqvae().state_dict())['unshared']

    var = VAR(vqvae, num_classes=3, depth=1, embed_dim=32, num_heads=2, patch_nums=PATCH_NUMS)
    var.init_weights()
    assert var.head.out_features == 24
    loss, _ = var.training_loss(x, torch.arange(4) % 3)
    assert loss.item() == pytest.approx(math.log(24), rel=0.1)
    for more_smooth in (False, True):
        sampled = var.autoregressive_infer_cfg(2, 1, g_seed=0, more_smooth=more_smooth)
        assert sampled.shape == (2, 3, 32, 32) and sampled.isfinite().all()
    *_, step = var.sample_scales(torch.tensor([0, 1]), rng=torch.Generator().manual_seed(0))
    steps = list(var.sample_scales(torch.tensor([0, 1]), rng=torch.Generator().manual_seed(0)))
    assert_within(vqvae.decode([s.idx_Bl for s in steps]), vqvae.fhat_to_img(step.f_hat), 1e-5)


def test_metrics_of_unshared_codes_are_joined():
    vqvae = tiny_vqvae(unshared=True, measures=dict())
    vqvae.reconstruct(images())
    vqvae.after_step(progress=0.)
    for upkeep, restarts in zip(vqvae.quantize.measures.upkeeps, (3, 0, 4), strict=True):
        upkeep.num_restarts = restarts
    vqvae.quantize.measures.upkeeps[1].collapsed = ['2x2']
    metrics = vqvae.code_metrics()
    assert metrics['restarts'] == 7 and metrics['alarm_collapse'] == 1
    assert {f'{key}_{name}' for key in ('usage', 'perplexity', 'top10', 'usage_legacy') for name in NAMES} \
        <= set(metrics)
    assert {name: count.sum().item() for name, count in vqvae.code_counts().items()} \
        == {'1x1': 4, '2x2': 16, '4x4': 64}


CORNERS = 5 * torch.eye(8)


@pytest.mark.parametrize(('queries_8Z', 'expected'), [(CORNERS, -math.log(8)), (CORNERS[:1].expand(8, 8), 0.),
                                                      (torch.ones(8, 8), 0.)],
                         ids=['sure and spread', 'sure of one code', 'unsure'])
def test_entropy_loss_wants_sure_and_spread_queries(queries_8Z, expected):
    quantize = quantizer(vocab_size=8, channels=8, patch_nums=(4,), ema=False, entropy=1.)
    quantize.embedding.weight.data = CORNERS.clone()
    f = queries_8Z.repeat(2, 1).view(1, 4, 4, 8).permute(0, 3, 1, 2)
    assert quantize.quantised(f).parts['entropy_loss'].item() == pytest.approx(expected, abs=1e-5)
    assert 'entropy_loss' not in quantize.eval().quantised(f).parts


def test_entropy_loss_moves_features_and_codes():
    quantize = quantizer(ema=False, entropy=0.3)
    f = (0.5 * torch.randn(3, 4, 4, 4)).requires_grad_()
    parameters = [f, quantize.embedding.weight]
    with_entropy = quantize.quantised(f)
    quantize.measures.entropy = 0.
    actual = torch.autograd.grad(with_entropy.loss - quantize.quantised(f).loss, parameters)

    expected, f_hat = 0., torch.zeros_like(f)
    for side, step in zip(PATCH_NUMS, quantize.f_to_idxBl_or_fhat(f.detach(), to_fhat=True), strict=True):
        query = F.adaptive_avg_pool2d(f - f_hat, side).permute(0, 2, 3, 1).reshape(-1, 4)
        p = (-(query[:, None] - quantize.embedding.weight).square().sum(2) / 0.1).softmax(1)
        entropies = [-(q * (q + 1e-12).log()).sum(1).mean() for q in (p, p.mean(0, keepdim=True))]
        expected, f_hat = expected + (entropies[0] - entropies[1]) / 3, step
    assert with_entropy.parts['entropy_loss'].item() == pytest.approx(expected.item(), rel=1e-4)
    for gradient, wanted in zip(actual, torch.autograd.grad(0.3 * expected, parameters), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)


def test_rotated_gradient():
    """It is that of the fixed matrix |q| / |f| (1 - 2 w w') (1 - 2 u u'), which takes f to q."""
    quantize = quantizer(patch_nums=(1,), rotation=True)
    f, probe = torch.randn(1, 4, 1, 1).requires_grad_(), torch.randn(4)
    out = quantize.quantised(f)
    expected = quantize.f_to_idxBl_or_fhat(f.detach(), to_fhat=True)[-1]
    assert_within(out.f_hat_BZhw, expected, 1e-5)
    out.f_hat_BZhw.flatten().backward(probe)

    vector, q = f.detach().flatten().clone().requires_grad_(), expected.flatten()
    u, v = F.normalize(vector.detach(), dim=0), F.normalize(q, dim=0)
    w = F.normalize(u + v, dim=0)
    reflections = (torch.eye(4) - 2 * w.outer(w)) @ (torch.eye(4) - 2 * u.outer(u))
    mapped = q.norm() / vector.detach().norm() * reflections @ vector
    assert_within(mapped, q, 1e-5)
    mapped.backward(probe)
    assert_within(f.grad.flatten(), vector.grad, 1e-5)
    assert not torch.allclose(f.grad.flatten(), probe, rtol=0.1)


def test_rotated_gradient_is_rescaled_at_every_position():
    quantize = quantizer(rotation=True)
    f = torch.randn(3, 4, 4, 4).requires_grad_()
    out, probe = quantize.quantised(f), torch.randn(3, 4, 4, 4)
    f_hat = quantize.f_to_idxBl_or_fhat(f.detach(), to_fhat=True)[-1]
    assert_within(out.f_hat_BZhw, f_hat, 1e-5)
    out.f_hat_BZhw.backward(probe, retain_graph=True)
    ratio = f_hat.norm(dim=1) / f.detach().norm(dim=1)
    torch.testing.assert_close(f.grad.norm(dim=1), ratio * probe.norm(dim=1), rtol=1e-4, atol=0.)
    assert all(p.grad is None for p in quantize.parameters()), 'neither codes nor phi'


# ------------------------------------------------------------ state
def features(step):
    """A batch that depends on the step alone; twice it moves off, and codes die."""
    rng = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, 4, 4, generator=rng, dtype=torch.float64) + 4 * (step > 8) + 4 * (step > 25)


def train(quantize, steps, micro=1, rank=0, world_size=1):
    """Losses of the whole batch, and the rows restarted, of some optimizer steps of this rank."""
    losses, rows = [], []
    for step in steps:
        share = 8 // world_size
        f, loss = features(step)[rank * share:(rank + 1) * share], 0.
        for j, part in enumerate(f.chunk(micro)):
            torch.manual_seed(step)
            with torch.no_grad(), GlobalBatch(rank * share + j * len(part), 8):
                loss = loss + quantize.quantised(part).loss / micro / world_size
        for replaced in quantize.measures.after_step(step / 100).values():
            rows += replaced.tolist()
        dist.allreduce(loss)
        losses.append(loss)
    upkeep, = quantize.measures.upkeeps
    return dict(loss=torch.stack(losses), rows=torch.tensor(rows), weight=quantize.embedding.weight.detach(),
                age=upkeep.age_V, count=upkeep.count_V, sum=upkeep.sum_VZ, **upkeep.counts())


def quantizer_to_train(**measures):
    torch.manual_seed(0)
    return quantizer(40, **dict(defer_steps=4, scale_drop=0.5) | measures).double()


@pytest.mark.parametrize('ema', [True, False])
@pytest.mark.parametrize('stop_at', [3, 30, 50])
def test_state_continues_exactly(stop_at, ema):
    """Stopped in the deferral, before and after the first restart."""
    whole, first, second = (quantizer_to_train(ema=ema) for _ in range(3))
    expected = train(whole, range(70))
    train(first, range(stop_at))
    buffer = io.BytesIO()
    torch.save((first.state_dict(), first.record_hit, first.measures.state_dict()), buffer)
    buffer.seek(0)
    weights, second.record_hit, state = torch.load(buffer)  # plain content only
    second.load_state_dict(weights)
    second.measures.load_state_dict(state)
    actual = train(second, range(stop_at, 70))
    assert whole.measures.upkeeps[0].num_restarts == second.measures.upkeeps[0].num_restarts > 0
    assert len(actual['rows']) > 0 and torch.equal(actual['rows'], expected['rows'][-len(actual['rows']):])
    assert torch.equal(actual.pop('loss'), expected['loss'][stop_at:])
    assert all(torch.equal(actual[name], expected[name]) for name in actual if name != 'rows')
    assert second.record_hit == whole.record_hit == 70 - 4
    assert torch.equal(second.ema_vocab_hit_SV, whole.ema_vocab_hit_SV)
    assert second.measures.upkeeps[0].metrics() == whole.measures.upkeeps[0].metrics()


def test_alarm_survives_a_restart_of_the_program():
    first, *others = (CodebookUpkeep(nn.Embedding(100, 1), restart=False) for _ in range(3))
    feed(first, ALARM_AFTER - 50, {'1x1': 50, '4x4': 50})
    saved = copy.deepcopy(first.state_dict())
    for upkeep in others:  # loading leaves the state as it is
        upkeep.load_state_dict(saved)
    for upkeep in (first, *others):
        torch.manual_seed(1)
        feed(upkeep, 150, {'1x1': 20, '4x4': 50})
        assert upkeep.metrics() == first.metrics() and upkeep.metrics()['alarm_collapse'] == 1
        assert upkeep.best_share == first.best_share and upkeep.collapsed == ['1x1']
        assert torch.equal(upkeep.count_V, first.count_V) and torch.equal(upkeep.sum_VZ, first.sum_VZ)


def test_saving_before_the_first_step_does_not_begin_the_averages():
    upkeep = CodebookUpkeep(nn.Embedding(4, 2))
    upkeep.load_state_dict(upkeep.state_dict())
    upkeep.embedding.weight.data.fill_(3.)  # weights loaded later are those that count
    upkeep.observe({'1x1': torch.tensor([[0]])}, {'1x1': torch.full((1, 2), 3.)})
    upkeep.update(progress=0.)
    assert_within(upkeep.embedding.weight, torch.full((4, 2), 3.), 1e-6)


# ------------------------------------------------------------ micro-batches and ranks
def assert_same_run(actual, expected):
    """Equal choices; sums in another order, so that float64 rounding may differ."""
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-11,
                                   msg=lambda text, name=name: f'{name}: {text}')


def test_micro_batches_equal_one_batch():
    one, two = quantizer_to_train(), quantizer_to_train()
    assert torch.equal(train(one, range(4))['weight'], train(two, range(4), micro=2)['weight'])
    assert not one.measures.waiting
    expected = train(one, range(4, 60))
    assert_same_run(train(two, range(4, 60), micro=2), expected)
    assert len(expected['rows']) == one.measures.upkeeps[0].num_restarts > 0


def candidates(rank=0, world_size=1):
    """Rows drawn from three scales that are shared out to the ranks, 8 are wanted; and all rows."""
    rng = torch.Generator().manual_seed(1)
    queries = [torch.randn(n, 3, generator=rng) for n in (2, 8, 32)]
    torch.manual_seed(2)
    return balanced_candidates([query.chunk(world_size)[rank] for query in queries], 8), torch.cat(queries)


def test_candidates_are_drawn_equally_from_every_scale():
    chosen, offered = candidates()
    position = (chosen[:, None] == offered).all(2).nonzero()[:, 1]
    assert len(chosen) == len(position.unique()) == 2 + 3 + 2, 'the first scale has no third one'
    assert torch.bucketize(position, torch.tensor([2, 10]), right=True).tolist() == [0, 0, 1, 1, 1, 2, 2]


def rank_main(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank,
                                         world_size=2)
    results = [train(quantizer_to_train(), range(60), micro, rank, 2) for micro in (1, 2)]
    torch.save((*results, candidates(rank, 2)[0]), f'{folder}/{rank}.pt')
    codebook.CHECKSUM_EVERY = 1
    upkeep = CodebookUpkeep(nn.Embedding.from_pretrained(torch.ones(2, 3) + rank), ema=False)
    upkeep.observe({'1x1': torch.tensor([[0]])}, {'1x1': torch.ones(1, 3)})
    with pytest.raises(ValueError, match='the codebooks of the ranks differ'):
        upkeep.update(progress=0.)
    dist.finalize()


def test_two_ranks_equal_one(tmp_path):
    on_two_ranks(rank_main, str(tmp_path))
    expected = train(quantizer_to_train(), range(60))
    assert len(expected['rows']) > 40, 'all are placed, and some restart'
    for rank in (0, 1):
        *results, chosen = torch.load(tmp_path / f'{rank}.pt')
        for actual in results:
            assert_same_run(actual, expected)
        assert torch.equal(chosen, candidates()[0])
