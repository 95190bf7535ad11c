"""Sampling and editing against the reference, and noise that belongs to the image."""
import math
import sys

import pytest
import torch
from torch.nn import functional as F

from models.editing import box_mask
from models.helpers import ImageNoise, guide, gumbel_softmax_with_rng, sample_with_top_k_top_p_
from models.sampling import limit_guidance
from models.scales import ScaleLayout
from models.var import VAR, AdaLNSelfAttn
from tests.vectors import (
    assert_stats,
    assert_within,
    load_json,
    load_tensors,
    needs_rng,
    split_scales,
    tiny_flexvar,
    tiny_var,
)

PATCH_NUMS = (1, 2, 3, 4)
SAMPLING = load_json('var/sampling')['cases']
EDIT = load_json('var/edit')
P256, P512 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@pytest.fixture(scope='module')
def models():
    return {name: tiny_var(name) for name in ('sep_l2', 'shared_nol2')}


def tolerance(case, plain):
    return 2e-2 if case['more_smooth'] else plain


# ------------------------------------------------------------ published sampling
@pytest.mark.parametrize('case', SAMPLING, ids=[case['key'] for case in SAMPLING])
def test_sampling_case(models, case):
    if not case['rng_independent']:
        needs_rng()
    var, t = models[case['model']], load_tensors('var/sampling')
    expected = {name: t[f'{case["key"]}.{name}'] for name in case['stored']}
    labels = torch.tensor(case['label_B']) if isinstance(case['label_B'], list) else case['label_B']
    options = {name: case[name] for name in ('cfg', 'top_k', 'top_p', 'more_smooth')}

    if case['g_seed'] is None:
        torch.manual_seed(case['global_manual_seed'])
    image = var.autoregressive_infer_cfg(case['B'], labels, case['g_seed'], **options)
    assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    if 'image' in expected:
        assert_within(image, expected['image'], tolerance(case, 5e-4))
    if not case['more_smooth']:
        assert_stats(image, case['image_stats'])

    if case['g_seed'] is None:
        torch.manual_seed(case['global_manual_seed'])
    rng = None if case['g_seed'] is None else torch.Generator().manual_seed(case['g_seed'])
    tokens, logits = [], []
    for step in var.sample_scales(var.as_labels(labels, case['B'], rng), rng=rng, **options):
        tokens.append(step.idx_Bl)
        logits.append(step.logits_BlV)
    assert torch.equal(torch.cat(tokens, dim=1), expected['tokens'])
    assert_within(step.f_hat, expected['fhat'], tolerance(case, 5e-4))
    if 'cfg_logits' in expected:
        assert_within(torch.cat(logits, dim=1), expected['cfg_logits'], tolerance(case, 5e-3))


# ------------------------------------------------------------ zero-shot editing, written as a notebook would
def get_edit_mask(patch_nums, y0, x0, y1, x1, device, inpainting=True):
    """(P, P) float, 1 where the input's code is kept."""
    side = patch_nums[-1]
    edit_mask = torch.zeros(side, side, device=device)
    edit_mask[round(y0 * side):round(y1 * side), round(x0 * side):round(x1 * side)] = 1
    return 1 - edit_mask if inpainting else edit_mask


def kept_positions(edit_mask, ph, pw):
    """(B or 1, 1, ph, pw) bool."""
    mask_B1hw = edit_mask[None, None] if edit_mask.dim() == 2 else edit_mask[:, None]
    if ph * pw <= 3:
        return torch.ones(len(mask_B1hw), 1, ph, pw, dtype=torch.bool)
    return F.interpolate(mask_B1hw, size=(ph, pw), mode='bilinear', align_corners=False) > 0.5


def replace_embedding(edit_mask, h_BChw, gt_BChw, ph, pw):
    return torch.where(kept_positions(edit_mask, ph, pw), gt_BChw, h_BChw)


@torch.no_grad()
def autoregressive_infer_cfg_with_mask(self, B, label_B, g_seed, cfg=1.5, top_k=0, top_p=0.,
                                       more_smooth=False, input_img_tokens=None, edit_mask=None, drawn=None):
    rng = None if g_seed is None else self.rng.manual_seed(g_seed)
    if label_B is None:
        label_B = torch.multinomial(self.uniform_prob, B, replacement=True, generator=rng).reshape(B)
    elif isinstance(label_B, int):
        label_B = torch.full((B,), self.num_classes if label_B < 0 else label_B, device=self.lvl_1L.device)
    cond_BD = self.class_emb(torch.cat([label_B, torch.full_like(label_B, self.num_classes)]))
    position_1LC = self.lvl_embed(self.lvl_1L) + self.pos_1LC
    x = cond_BD[:, None].expand(2 * B, self.first_l, -1) + self.pos_start + position_1LC[:, :self.first_l]
    modulation = self.shared_ada_lin(cond_BD)
    vae, quantize = self.vae_proxy[0], self.vae_quant_proxy[0]
    f_hat = x.new_zeros(B, self.Cvae, self.patch_nums[-1], self.patch_nums[-1])
    for block in self.blocks:
        block.attn.kv_caching(True)
    end = 0
    for si, pn in enumerate(self.patch_nums):
        ratio = si / self.num_stages_minus_1
        end += pn * pn
        for block in self.blocks:
            x = AdaLNSelfAttn.forward(block, x=x, cond_BD=modulation, attn_bias=None)
        logits = self.get_logits(x, cond_BD)
        logits = (1 + cfg * ratio) * logits[:B] - cfg * ratio * logits[B:]
        idx_Bl = sample_with_top_k_top_p_(logits, rng=rng, top_k=top_k, top_p=top_p, num_samples=1)[:, :, 0]
        if drawn is not None:
            drawn.append(idx_Bl)
        if more_smooth:
            tau = max(0.27 * (1 - ratio * 0.95), 0.005)
            weights = gumbel_softmax_with_rng(logits.mul(1 + ratio), tau=tau, hard=False, dim=-1, rng=rng)
            h = weights @ quantize.embedding.weight[None]
        else:
            h = quantize.embedding(idx_Bl)
        h = h.transpose(1, 2).reshape(B, self.Cvae, pn, pn)
        if edit_mask is not None:
            given = quantize.embedding(input_img_tokens[si]).transpose(1, 2).reshape(B, self.Cvae, pn, pn)
            h = replace_embedding(edit_mask, h, given, pn, pn)
        f_hat, x = quantize.get_next_autoregressive_input(si, len(self.patch_nums), f_hat, h)
        if si < self.num_stages_minus_1:
            x = x.view(B, self.Cvae, -1).transpose(1, 2)
            x = self.word_embed(x) + position_1LC[:, end:end + self.patch_nums[si + 1] ** 2]
            x = x.repeat(2, 1, 1)
    for block in self.blocks:
        block.attn.kv_caching(False)
    return vae.fhat_to_img(f_hat).add(1).mul(0.5), f_hat


@pytest.mark.parametrize('row', EDIT['masks'], ids=range(len(EDIT['masks'])))
def test_edit_masks(row):
    mask = get_edit_mask(PATCH_NUMS, row['y0'], row['x0'], row['y1'], row['x1'], 'cpu', row['inpainting'])
    assert mask.tolist() == row['mask']
    for pn, expected in zip(PATCH_NUMS, row['keep_per_scale'], strict=True):
        assert kept_positions(mask, pn, pn)[0, 0].int().tolist() == expected


@pytest.mark.parametrize('key', EDIT['kept_token_counts_box_0.1_0.1_0.8_0.8'])
def test_kept_counts_of_the_published_pyramids(key):
    patch_nums = P256 if key.startswith('256') else P512
    mask = get_edit_mask(patch_nums, 0.1, 0.1, 0.8, 0.8, 'cpu', inpainting=key.endswith('in'))
    counts = [int(kept_positions(mask, pn, pn).sum()) for pn in patch_nums]
    assert counts == EDIT['kept_token_counts_box_0.1_0.1_0.8_0.8'][key]


@pytest.mark.parametrize('case', EDIT['cases'], ids=[case['key'] for case in EDIT['cases']])
def test_editing_with_public_attributes(models, case):
    if case['top_k'] != 1:
        needs_rng()
    var, t, vqvae = models[case['model']], load_tensors('var/edit'), load_tensors('var/vqvae')
    box = [case[name] for name in ('y0', 'x0', 'y1', 'x1')]
    mask = get_edit_mask(PATCH_NUMS, *box, 'cpu', case['inpainting'])
    options = {name: case[name] for name in ('g_seed', 'cfg', 'top_k', 'top_p', 'more_smooth')}
    drawn = []
    image, f_hat = autoregressive_infer_cfg_with_mask(
        var, case['B'], case['label'], input_img_tokens=[vqvae[f'idx.{k}'] for k in range(4)], edit_mask=mask,
        drawn=drawn, **options)
    assert torch.equal(torch.cat(drawn, dim=1), t[f'{case["key"]}.tokens'])
    assert_within(f_hat, t[f'{case["key"]}.fhat'], tolerance(case, 5e-4))
    if f'{case["key"]}.image' in t:
        assert_within(image, t[f'{case["key"]}.image'], tolerance(case, 5e-4))
    if not case['more_smooth']:
        assert_stats(image, case['image_stats'])
    assert all(block.attn.cache is None for block in var.blocks)


@pytest.mark.parametrize('label', [None, -1, 2])
@pytest.mark.parametrize('more_smooth', [False, True])
def test_editing_without_mask_is_sampling(models, label, more_smooth):
    for var in models.values():
        options = dict(g_seed=3, cfg=3., top_k=20, top_p=0.95, more_smooth=more_smooth)
        image, _ = autoregressive_infer_cfg_with_mask(var, 2, label, **options)
        assert_within(var.autoregressive_infer_cfg(2, label, **options), image, 5e-4 if more_smooth else 1e-5)


def test_keeping_everything_reconstructs_the_input(models):
    vqvae = load_tensors('var/vqvae')
    mask = torch.ones(2, 4, 4)  # one mask per image
    _, f_hat = autoregressive_infer_cfg_with_mask(models['sep_l2'], 2, -1, 0, edit_mask=mask,
                                                  input_img_tokens=[vqvae[f'idx.{k}'] for k in range(4)])
    assert_within(f_hat, vqvae['fhat.3'], 1e-4)


# ------------------------------------------------------------ the same by the project's own `edit`
@pytest.mark.parametrize('row', EDIT['masks'], ids=range(len(EDIT['masks'])))
def test_keep_masks(models, row):
    """Equal to the published ones, whether the mask counts pixels or codes."""
    var, box = models['sep_l2'], [row[name] for name in ('y0', 'x0', 'y1', 'x1')]
    codes = box_mask((4, 4), *box)
    codes = ~codes if row['inpainting'] else codes
    assert codes.int().tolist() == row['mask']
    pixels = codes.repeat_interleave(16, 0).repeat_interleave(16, 1)
    for mask in (codes, pixels):
        masks = var.keep_masks(mask[None, None].float(), var.layout.sizes)
        for side, kept_Bl, expected in zip(PATCH_NUMS, masks, row['keep_per_scale'], strict=True):
            assert kept_Bl.view(side, side).int().tolist() == expected


@pytest.mark.parametrize('case', EDIT['cases'], ids=[case['key'] for case in EDIT['cases']])
def test_keep(models, case):
    if case['top_k'] != 1:
        needs_rng()
    var, t, vqvae = models[case['model']], load_tensors('var/edit'), load_tensors('var/vqvae')
    mask = box_mask((4, 4), *[case[name] for name in ('y0', 'x0', 'y1', 'x1')])
    mask = ~mask if case['inpainting'] else mask
    masks = var.keep_masks(mask[None, None].float(), var.layout.sizes)
    given = [vqvae[f'idx.{k}'] for k in range(4)]
    rng = torch.Generator().manual_seed(case['g_seed'])
    options = {name: case[name] for name in ('cfg', 'top_k', 'top_p', 'more_smooth')}
    steps = list(var.sample_scales(var.as_labels(case['label'], case['B'], rng), rng=rng,
                                   keep=list(zip(given, masks, strict=True)), **options))
    drawn = split_scales(t[f'{case["key"]}.tokens'], PATCH_NUMS)
    for step, drawn_Bl, given_Bl, kept_Bl in zip(steps, drawn, given, masks, strict=True):
        assert torch.equal(step.idx_Bl, torch.where(kept_Bl, given_Bl, drawn_Bl))
    assert_within(steps[-1].f_hat, t[f'{case["key"]}.fhat'], tolerance(case, 5e-4))


@pytest.mark.parametrize('more_smooth', [False, True])
def test_edit(models, more_smooth):
    """All kept is reconstruction, nothing kept is sampling, and pasted pixels are those of the image."""
    var = models['sep_l2']
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = dict(guidance=3., top_k=20, more_smooth=more_smooth)

    def edit(mask, **more):
        return var.edit(images, mask, [1, 2], rng=ImageNoise(0, [0, 1]), **options, **more)
    everything = edit(torch.ones(64, 64))
    assert_within(everything, var.tokenizer.decode(var.tokenizer.encode(images)).add(1).mul(0.5), 1e-5)
    plain = var.sample([1, 2], rng=ImageNoise(0, [0, 1]), **options)
    assert torch.equal(edit(torch.zeros(2, 64, 64)), plain)
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[1] = box_mask((64, 64), 0.5, 0., 1., 1.)
    edited = edit(mask, paste=True)
    assert torch.equal(edited[0], plain[0]) and not torch.equal(edited[1], plain[1])
    assert torch.equal(edited[1, :, 32:], images[1, :, 32:].add(1).mul(0.5))


@pytest.mark.parametrize(('shape', 'mask_shape', 'message'), [
    ((2, 3, 48, 64), (48, 64), 'end at 64x64 pixels, got images of 48x64: resize'),
    ((2, 3, 64, 64), (4, 4), r'mask of 64x64 pixels.*one for each of 2 images, got shape \(4, 4\)'),
    ((2, 3, 64, 64), (3, 64, 64), r'got shape \(3, 64, 64\): make it as large as the images'),
])
def test_edit_errors(models, shape, mask_shape, message):
    with pytest.raises(ValueError, match=message):
        models['sep_l2'].edit(torch.zeros(shape), torch.ones(mask_shape), 0, guidance=1.)


# ------------------------------------------------------------ noise keyed by the image
@pytest.mark.parametrize('batch', [[5], [5, 6], [0, 5], [9, 2, 5, 7, 1, 0, 3, 4]])
def test_image_noise_ignores_the_batch(batch):
    alone, together, place = ImageNoise(3, [5]), ImageNoise(3, batch), batch.index(5)
    for shape in ((4, 96), (9, 96), (4, 96)):
        expected = alone.exponential_like(torch.empty(1, *shape))[0]
        noise = together.exponential_like(torch.empty(len(batch), *shape))
        assert noise.shape == (len(batch), *shape) and noise.dtype == torch.float32
        assert torch.equal(noise[place], expected)


def test_image_noise_depends_on_seed_image_and_draw_only():
    shape = torch.empty(1, 3, 50)
    streams = {}
    for seed in (0, 1, 2 ** 40):
        for image in (0, 1, 50_000):
            rng = ImageNoise(seed, [image])
            for draw in range(3):
                streams[seed, image, draw] = tuple(rng.exponential_like(shape).flatten().tolist())
    assert len(set(streams.values())) == 27
    again = ImageNoise(1, [50_000])
    assert tuple(again.exponential_like(shape).flatten().tolist()) == streams[1, 50_000, 0]


def test_image_noise_of_a_half_precision_tensor_is_float32():
    half = ImageNoise(0, [1]).exponential_like(torch.empty(1, 40, dtype=torch.float16))
    assert torch.equal(half, ImageNoise(0, [1]).exponential_like(torch.empty(1, 40)))


@pytest.mark.parametrize('seed', range(4))
def test_image_noise_is_exponential(seed):
    """Kolmogorov-Smirnov distance below its 0.1 % quantile 1.95 / sqrt(n); mean and variance are 1."""
    noise = ImageNoise(seed, list(range(16))).exponential_like(torch.empty(16, 16_384)).double()
    for sample in (noise.flatten(), noise[0], noise[:, 0:8].flatten()):
        n = len(sample)
        cdf = 1 - (-sample.sort().values).exp()
        ranks = torch.arange(n + 1, dtype=torch.float64) / n
        distance = max((ranks[1:] - cdf).max(), (cdf - ranks[:-1]).max()).item()
        assert distance < 1.95 / n ** 0.5
        assert sample.mean().item() == pytest.approx(1, abs=4 / n ** 0.5)
    assert noise.var().item() == pytest.approx(1, abs=4 * 8 ** 0.5 / noise.numel() ** 0.5)


def test_image_noise_is_uncorrelated():
    """Between images, draws, seeds and neighbouring elements |r| stays below 4.5 / sqrt(n)."""
    n, streams = 16_384, []
    for seed in (0, 1):
        rng = ImageNoise(seed, [0, 1, 2, 3])
        streams += [row for _ in range(2) for row in rng.exponential_like(torch.empty(4, n)).double()]
    streams = torch.stack(streams)
    r = torch.corrcoef(streams) - torch.eye(len(streams), dtype=torch.float64)
    assert r.abs().max().item() < 4.5 / math.sqrt(n)
    for shift in (1, 2, 96):
        lagged = torch.corrcoef(torch.stack([streams[0, :-shift], streams[0, shift:]]))[0, 1]
        assert abs(lagged.item()) < 4 / math.sqrt(n)


@pytest.mark.parametrize(('image', 'element'), [(116, 19766), (233, 8028), (446, 48515), (571, 22054)])
def test_image_noise_is_never_zero_or_infinite(image, element):
    """Counters of seed 0 whose 24 high bits are all ones: rounding up to 1 would give noise 0."""
    noise = ImageNoise(0, [image]).exponential_like(torch.empty(1, 48_600))
    assert noise[0, element] == noise.min() > 0 and noise.isfinite().all()
    logits = torch.zeros(1, 1, 48_600)
    logits[0, 0, element] = -torch.inf
    drawn = sample_with_top_k_top_p_(logits.clone(), rng=ImageNoise(0, [image]))
    assert drawn.item() != element, 'a removed code must never be drawn'
    logits[0, 0, element] = 0.
    assert gumbel_softmax_with_rng(logits, tau=0.27, rng=ImageNoise(0, [image])).isfinite().all()


def test_image_noise_draws_codes_with_their_probability():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().expand(8, 4000, 4).clone()
    idx = sample_with_top_k_top_p_(logits, rng=ImageNoise(1, list(range(8))))
    counts = idx.flatten().bincount(minlength=4)
    sigma = (32_000 * probs * (1 - probs)).sqrt()
    assert ((counts - 32_000 * probs).abs() < 4 * sigma).all()


def test_image_noise_draws_one_code_per_token():
    with pytest.raises(ValueError, match='got num_samples=2'):
        sample_with_top_k_top_p_(torch.zeros(1, 1, 4), rng=ImageNoise(0, [0]), num_samples=2)


@pytest.mark.parametrize('more_smooth', [False, True])
def test_codes_do_not_depend_on_the_batch_size(models, more_smooth):
    labels, images = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1]), list(range(40, 48))
    options = dict(cfg=2., top_k=40, top_p=0.95, more_smooth=more_smooth)
    for var in models.values():
        together = torch.cat([step.idx_Bl for step in
                              var.sample_scales(labels, rng=ImageNoise(9, images), **options)], dim=1)
        for row in range(8):
            alone = torch.cat([step.idx_Bl for step in var.sample_scales(
                labels[row:row + 1], rng=ImageNoise(9, images[row:row + 1]), **options)], dim=1)
            assert torch.equal(alone[0], together[row])
        assert len({tuple(row.tolist()) for row in together}) == 8


def test_noise_of_images_in_sample(models):
    var = models['sep_l2']
    both = var.sample([1, 2], guidance=2., rng=ImageNoise(0, [7, 8]))
    assert_within(var.sample([2], guidance=2., rng=ImageNoise(0, [8])), both[1:], 1e-5)


# ------------------------------------------------------------ guidance at some scales, or at none
def steps_with_batches(model, **options):
    """The steps of a sampling of two images over four scales, and how many rows the head saw at each."""
    rows = []
    hook = model.head.register_forward_hook(lambda head, args, logits: rows.append(len(logits)))
    steps = list(model.sample_scales(torch.tensor([1, 3]), top_k=20, rng=ImageNoise(2, [0, 1]), **options))
    hook.remove()
    return steps, rows


@pytest.fixture(params=['var', 'flexvar'])
def pyramid(request, models):
    """A model of four scales."""
    if request.param == 'var':
        return models['sep_l2']
    return tiny_flexvar('sample_tiny', patch_nums=PATCH_NUMS)


def with_both_halves(model, monkeypatch):
    """Let the null class take part in every scale, as the published sampler has it."""
    def keep_both(scale_k, first, last):
        limited_k, _ = limit_guidance(scale_k, first, last)
        return limited_k, len(limited_k)
    monkeypatch.setattr(sys.modules[type(model).__module__], 'limit_guidance', keep_both)


@pytest.mark.parametrize(('options', 'rows'), [
    (dict(cfg=0.), [2, 2, 2, 2]),
    (dict(cfg=3.), [4, 4, 4, 4]),
    (dict(cfg=3., cfg_from=1, cfg_to=2), [4, 4, 4, 2]),
    (dict(cfg=3., cfg_from=3), [4, 4, 4, 4]),
    (dict(cfg=3., cfg_to=0), [2, 2, 2, 2]),  # the first of several scales is never guided
])
def test_the_null_class_takes_part_up_to_the_last_guided_scale(pyramid, monkeypatch, options, rows):
    """The codes are those of a sampling that computes it at every scale."""
    steps, seen = steps_with_batches(pyramid, **options)
    assert seen == rows
    with_both_halves(pyramid, monkeypatch)
    expected, seen = steps_with_batches(pyramid, **options)
    assert seen == [4, 4, 4, 4]
    for step, other in zip(steps, expected, strict=True):
        assert torch.equal(step.idx_Bl, other.idx_Bl)
        assert_within(step.logits_BlV, other.logits_BlV, 1e-4)


def test_guidance_between_two_scales(pyramid):
    steps, _ = steps_with_batches(pyramid, cfg=3., cfg_from=1, cfg_to=2)
    idx_kBl = [step.idx_Bl for step in steps]
    if isinstance(pyramid, VAR):
        teacher_BLZ = pyramid.tokenizer.quantize.idxBl_to_var_input(idx_kBl)
    else:
        teacher_BLZ = pyramid.teacher_input(idx_kBl, PATCH_NUMS)
    label_B = torch.tensor([1, 3])
    with torch.no_grad():
        cond_BLV = pyramid(label_B, teacher_BLZ)
        null_BLV = pyramid(torch.full_like(label_B, pyramid.num_classes), teacher_BLZ)
    for step, (begin, end), scale in zip(steps, ScaleLayout(PATCH_NUMS).spans, (1, 2, 3, 1), strict=True):
        expected = guide(cond_BLV[:, begin:end], null_BLV[:, begin:end], scale)
        assert_within(step.logits_BlV, expected, 1e-4)


@pytest.mark.parametrize(('first', 'last'), [(2, 1), (4, -1), (0, 4), (-1, 2)])
def test_guidance_needs_scales_in_order(pyramid, first, last):
    with pytest.raises(ValueError, match=rf'scales in 0..3, got cfg_from={first} and cfg_to={last}: pass'):
        pyramid.sample([1], guidance=2., cfg_from=first, cfg_to=last)


# ------------------------------------------------------------ layout
@pytest.mark.parametrize('patch_nums', [(1,), (1, 2, 3, 4), (2, 4), P256, P512])
def test_layout(patch_nums):
    layout = ScaleLayout(patch_nums)
    assert layout.total == sum(pn * pn for pn in patch_nums) == layout.spans[-1][1]
    level, bias = layout.level_L(), None
    for k, (begin, end) in enumerate(layout.spans):
        assert end - begin == patch_nums[k] ** 2 == layout.lengths[k]
        assert (level[begin:end] == k).all()
        assert layout.num_scales_of(end) == k + 1
    if layout.total < 1000:
        bias = layout.causal_bias()
        assert torch.equal(bias == 0, level[:, None] >= level[None]) and (bias[bias != 0] == -torch.inf).all()
    assert layout.ratio(0) == 0. and (layout.ratio(len(patch_nums) - 1) == 1. or len(patch_nums) == 1)


def test_known_totals():
    assert (ScaleLayout(P256).total, ScaleLayout(P512).total) == (680, 2240)
