"""VAR: parity with the reference, teacher forcing, sampling, progressive training, initialisation."""
import math
import types

import pytest
import torch
from torch.nn import functional as F

from models import VAR, VARHF, VQVAE, build_generator, build_vae_var, load_weights
from models.helpers import ImageNoise, TokenLosses, drop_labels, guide, token_losses
from models.var import ProgressiveSchedule
from tests.vectors import (
    VARIANTS,
    assert_norms,
    assert_stats,
    assert_within,
    frozen_vqvae,
    load_json,
    load_tensors,
    named_grads,
    needs_rng,
    pixels,
    split_scales,
    tiny_var,
    vqvae_state,
)

PATCH_NUMS = (1, 2, 3, 4)
SPANS = ((0, 1), (1, 5), (5, 14), (14, 30))
NULL = 5


@pytest.fixture(scope='module', params=VARIANTS)
def case(request):
    """(name, model in eval mode, description, tensors)"""
    name = request.param
    return name, tiny_var(name), load_json(f'var/var_{name}'), load_tensors(f'var/var_{name}')


@pytest.fixture(scope='module', params=['sep_l2', 'shared_nol2'])
def full_case(request):
    """As `case`, for the variants whose description has every tensor."""
    name = request.param
    return name, tiny_var(name), load_json(f'var/var_{name}'), load_tensors(f'var/var_{name}')


@pytest.fixture
def var():
    return tiny_var('sep_l2')


@pytest.fixture(scope='module')
def vectors():
    return load_tensors('var/var_sep_l2')


def codes(vectors):
    return split_scales(vectors['gt'], PATCH_NUMS)


# ------------------------------------------------------------ parity with the reference
def test_names_shapes_and_order(case):
    _, var, info, _ = case
    rules, state = info['state'], var.state_dict()
    assert list(state) == info['state_dict_order'] == list(rules)
    assert [name for name, _ in var.named_parameters()] == info['param_order']
    for key, rule in rules.items():
        assert list(state[key].shape) == rule['shape'], key
        assert str(state[key].dtype) == f'torch.{rule["dtype"]}', key


def test_public_attributes(var):
    config = load_json('var/var_sep_l2')['config']
    for name in ('num_classes', 'depth', 'num_heads', 'cond_drop_rate', 'drop_path_rate'):
        assert getattr(var, name) == config[name]
    assert (var.patch_nums, var.L, var.first_l, var.num_stages_minus_1) == (PATCH_NUMS, 30, 1, 3)
    assert (var.C, var.D, var.V, var.Cvae, var.prog_si) == (32, 32, 96, 16, -1)
    assert var.begin_ends == list(SPANS)
    assert var.vae_proxy == (var.tokenizer,) and var.vae_quant_proxy == (var.tokenizer.quantize,)
    assert torch.equal(var.uniform_prob, torch.full((1, 5), 0.2))
    assert isinstance(var.rng, torch.Generator) and var.rng is var.rng
    assert not any(key.startswith(('tokenizer', 'vae')) for key in var.state_dict())


def test_eval_logits(case):
    _, var, _, t = case
    with torch.no_grad():
        assert_within(var(t['labels'], t['var_input']), t['logits_eval'], 5e-4)


def test_eval_draws_nothing_and_drops_no_label(case):
    name, _, _, t = case
    var = tiny_var(name, cond_drop_rate=1., drop_path_rate=0.9)
    torch.manual_seed(3)
    with torch.no_grad():
        assert_within(var(t['labels'], t['var_input']), t['logits_eval'], 5e-4)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_train_logits_without_dropout(case):
    name, _, _, t = case
    with torch.no_grad():
        assert_within(tiny_var(name).train()(t['labels'], t['var_input']), t['logits_train'], 5e-4)


def test_unconditional_logits(full_case):
    _, var, _, t = full_case
    with torch.no_grad():
        assert_within(var(torch.full_like(t['labels'], NULL), t['var_input']), t['logits_uncond'], 5e-4)


def test_dropped_labels(full_case):
    needs_rng()
    _, var, info, t = full_case
    torch.manual_seed(12)
    labels = drop_labels(t['labels'], NULL, info['stochastic']['cond_drop_rate'])
    with torch.no_grad():
        assert_within(var(labels, t['var_input']), t['logits_eval_conddrop0.5_seed12'], 5e-4)


def test_train_logits_with_dropout(full_case):
    needs_rng()
    name, _, info, t = full_case
    var = tiny_var(name, **info['stochastic']).train()
    torch.manual_seed(11)
    with torch.no_grad():
        assert_within(var(t['labels'], t['var_input']), t['logits_stochastic_seed11'], 5e-4)


def test_block_outputs(case):
    _, var, info, t = case
    seen = {}
    handles = [block.register_forward_hook(lambda m, i, out, k=k: seen.update({f'blocks.{k}': out}))
               for k, block in enumerate(var.blocks)]
    with torch.no_grad():
        var(t['labels'], t['var_input'])
    for handle in handles:
        handle.remove()
    assert set(seen) == set(info['block_output_probes'])
    for name, out in seen.items():
        assert_stats(out, info['block_output_probes'][name])


def test_teacher_input_of_the_golden_codes(case):
    _, var, _, t = case
    assert_within(var.vae_quant_proxy[0].idxBl_to_var_input(codes(t)), t['var_input'], 1e-4)


def test_attention_scale_is_clamped():
    for name in ('sep_l2', 'shared_l2'):
        vectors, var = load_tensors(f'var/var_{name}'), tiny_var(name)
        scales = [block.attn.scale_mul_1H11 for block in var.blocks]
        assert max(scale.max() for scale in scales) > math.log(100)
        with torch.no_grad():
            before = var(vectors['labels'], vectors['var_input'])
            for scale in scales:
                scale.clamp_(max=math.log(100))
            assert torch.equal(var(vectors['labels'], vectors['var_input']), before)


@pytest.mark.parametrize('smooth', [0., 0.1])
def test_loss_and_gradients(case, smooth):
    name, _, info, t = case
    expected = info['losses'][f'ls{smooth}']
    var = tiny_var(name, label_smooth=smooth).train()
    images = pixels(load_tensors('var/vqvae')['images_u8'])
    loss, aux = var.training_loss(images, t['labels'])
    loss.backward()
    assert torch.equal(aux['target_BL'], t['gt'])
    assert loss.item() == pytest.approx(expected['loss'], rel=1e-5)
    assert_norms(named_grads(var), expected['grad_l2'])


# ------------------------------------------------------------ teacher forcing
def test_prefix_of_scales(case):
    _, var, info, t = case
    with torch.no_grad():
        full = var(t['labels'], t['var_input'])
        for stage, row in info['prog'].items():
            teacher = var.vae_quant_proxy[0].idxBl_to_var_input(codes(t)[:int(stage) + 1])
            logits = var(t['labels'], teacher)
            assert logits.shape[1] == row['L']
            assert_within(logits, full[:, :row['L']], 5e-5)
        assert_within(var(t['labels'], None), full[:, :1], 5e-5)


@pytest.mark.parametrize('num_tokens', [1, 5, 12, 30])
def test_sequence_must_end_with_a_scale(var, num_tokens):
    with pytest.raises(ValueError, match=rf'one of \[1, 5, 14, 30\] tokens, got {num_tokens + 1}'):
        var(torch.zeros(2, dtype=torch.int64), torch.zeros(2, num_tokens, 16))


@pytest.mark.parametrize('k', range(4))
def test_codes_of_a_scale_reach_later_scales_only(case, k):
    _, var, _, t = case
    changed = codes(t)
    changed[k] = (changed[k] + 17) % 96
    with torch.no_grad():
        before = var(t['labels'], t['var_input'])
        after = var(t['labels'], var.vae_quant_proxy[0].idxBl_to_var_input(changed))
    for later, (begin, end) in enumerate(SPANS):
        difference = (after - before)[:, begin:end].abs().amax(-1)
        if later > k:
            assert (difference > 1e-3).all(), f'scale {later} must see scale {k}'
        else:
            assert (difference <= 5e-5).all(), f'scale {later} must not see scale {k}'


def test_logits_are_float32_under_autocast(case):
    _, var, _, t = case
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        logits = var(t['labels'], t['var_input'])
    assert logits.dtype == torch.float32
    assert (logits - t['logits_eval']).norm() < 0.03 * t['logits_eval'].norm()


# ------------------------------------------------------------ sampling
@pytest.mark.parametrize('cfg', [0., 1.5, 4.])
def test_cached_sampling_equals_teacher_forcing(case, cfg):
    _, var, _, t = case
    steps = [(step.logits_BlV, step.idx_Bl) for step in
             var.sample_scales(t['labels'], cfg=cfg, top_k=20, rng=torch.Generator().manual_seed(1))]
    teacher = var.vae_quant_proxy[0].idxBl_to_var_input([idx for _, idx in steps])
    with torch.no_grad():
        cond, uncond = var(t['labels'], teacher), var(torch.full_like(t['labels'], NULL), teacher)
    for k, (begin, end) in enumerate(SPANS):
        expected = guide(cond[:, begin:end], uncond[:, begin:end], 1 + cfg * k / 3)
        assert_within(steps[k][0], expected, 1e-4)


def test_final_image_decodes_the_sampled_codes(var):
    labels, rng = torch.tensor([0, 3]), torch.Generator()
    idx_kBl = [step.idx_Bl for step in var.sample_scales(labels, cfg=2., top_p=0.9, rng=rng.manual_seed(4))]
    images = var.sample(labels, guidance=3., top_p=0.9, rng=rng.manual_seed(4))
    assert images.min() >= 0 and images.max() <= 1
    assert_within(images, var.tokenizer.decode(idx_kBl).add(1).div(2), 1e-5)


def test_guidance_is_the_published_cfg_plus_one(var):
    expected = var.autoregressive_infer_cfg(2, [0, 1], g_seed=6, cfg=2.5, top_k=9)
    actual = var.sample([0, 1], guidance=3.5, top_k=9, rng=torch.Generator().manual_seed(6))
    assert torch.equal(actual, expected)


def test_sampling_without_seed_uses_the_global_generator(var):
    images = []
    for _ in range(2):
        torch.manual_seed(5)
        images.append(var.autoregressive_infer_cfg(2, None))
    assert torch.equal(*images)
    assert not torch.equal(images[0], var.autoregressive_infer_cfg(2, None))


@pytest.mark.parametrize(('given', 'expected'), [
    (3, [3, 3]), (0, [0, 0]), (5, [5, 5]), (-1, [5, 5]), (-7, [5, 5]), ([4, 0], [4, 0]), ((1, 2), [1, 2]),
    (torch.tensor([2, 5]), [2, 5]), (torch.tensor([2, 1], dtype=torch.int32), [2, 1]),
])
def test_label_forms(var, given, expected):
    labels = var.as_labels(given, 2, None)
    assert labels.dtype == torch.int64 and labels.tolist() == expected
    assert torch.equal(var.autoregressive_infer_cfg(2, given, g_seed=1),
                       var.autoregressive_infer_cfg(2, torch.tensor(expected), g_seed=1))


def test_random_labels_come_from_all_classes_but_the_null_one(var):
    labels = var.as_labels(None, 500, torch.Generator().manual_seed(0))
    assert labels.shape == (500,) and sorted(labels.unique().tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(labels, var.as_labels(None, 500, torch.Generator().manual_seed(0)))
    assert var.as_labels(None, 1, None).shape == (1,)


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(label_B=6), r'expected labels in 0..5 \(5 is the null class\), got 6'),
    (dict(label_B=[0, 9]), r'in 0..5 .* got 9'),
    (dict(label_B=[0, -1]), r'in 0..5 .* got -1'),
    (dict(label_B=[1, 2, 3]), r'one label for each of 2 images, got \(3,\)'),
    (dict(label_B=torch.tensor([1])), r'one label for each of 2 images, got \(1,\)'),
    (dict(label_B=torch.tensor([[1], [2]])), r'one label for each of 2 images, got \(2, 1\)'),
    (dict(label_B=0, top_k=97), r'top_k must lie in 0..96, the size of the vocabulary, got 97'),
    (dict(label_B=0, top_k=-1), r'top_k must lie in 0..96'),
])
def test_bad_arguments(var, kwargs, message):
    var.train()
    with pytest.raises(ValueError, match=message) as error:
        var.autoregressive_infer_cfg(2, g_seed=0, **kwargs)
    assert '\n' not in str(error.value)
    assert var.training and all(block.attn.cache is None for block in var.blocks)


def test_random_labels_need_a_generator(var):
    with pytest.raises(ValueError, match='pass the labels'):
        var.as_labels(None, 2, ImageNoise(0, [0, 1]))


def test_smooth_sampling_is_in_eval_mode_whatever_the_mode():
    var = tiny_var('shared_nol2', drop_path_rate=0.5, cond_drop_rate=0.9, drop_rate=0.2,
                           attn_drop_rate=0.2)
    options = dict(g_seed=2, cfg=2., top_k=30, more_smooth=True)
    expected = var.eval().autoregressive_infer_cfg(3, 1, **options)
    assert torch.equal(var.train().autoregressive_infer_cfg(3, 1, **options), expected)
    assert var.training


def test_sampling_builds_no_graph(var):
    assert not var.autoregressive_infer_cfg(1, 0, g_seed=0).requires_grad
    assert all(not step.logits_BlV.requires_grad for step in var.sample_scales(torch.tensor([0])))


# ------------------------------------------------------------ training loss and metrics
def test_progressive_loss_weighs_the_newest_scale(vectors):
    images = pixels(load_tensors('var/vqvae')['images_u8'])
    settings = dict(total=100, warmup=10., until=0.8, first_stage=1, stage_warmup=20.)
    var = tiny_var('sep_l2', progressive=settings)
    schedule = ProgressiveSchedule(num_scales=4, **settings)
    ce_BL = F.cross_entropy(vectors['logits_eval'].transpose(1, 2), vectors['gt'], reduction='none')
    seen = set()
    for step in range(4, 100, 8):
        stage, weight = schedule.at(step / 100)
        seen.add((stage, weight == 1))
        with torch.no_grad():
            loss, aux = var.training_loss(images, vectors['labels'], progress=step / 100)
        begin, end = SPANS[stage]
        expected = (ce_BL[:, :begin].sum(1) + weight * ce_BL[:, begin:end].sum(1)).mean() / 30
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert aux['losses'].loss_BL.shape[1] == end
    assert seen == {(1, True), (2, False), (2, True), (3, True)}


def test_metrics(var, vectors):
    head = torch.nn.Linear(var.V, var.V, bias=False)
    torch.nn.init.eye_(head.weight)
    losses = token_losses(head, vectors['logits_eval'], vectors['gt'])
    aux = dict(losses=losses, target_BL=vectors['gt'], stage=3, newest_weight=1.)
    metrics = var.metrics(aux)
    log_p = vectors['logits_eval'].double().log_softmax(-1)
    loss_BL = -log_p.gather(2, vectors['gt'][:, :, None])[:, :, 0]
    hit_BL = (vectors['logits_eval'].argmax(-1) == vectors['gt']).double() * 100
    for k, (begin, end) in enumerate(SPANS):
        side = 16 * PATCH_NUMS[k]
        assert metrics[f'L_{side}'].item() == pytest.approx(loss_BL[:, begin:end].mean().item(), rel=1e-5)
        assert metrics[f'acc_{side}'].item() == pytest.approx(hit_BL[:, begin:end].mean().item(), abs=1e-4)
    assert metrics['L_mean'].item() == pytest.approx(loss_BL.mean().item(), rel=1e-5)
    assert metrics['acc_mean'].item() == pytest.approx(hit_BL.mean().item(), abs=1e-4)
    assert metrics['L_tail'] == metrics['L_64'] and metrics['acc_tail'] == metrics['acc_64']
    assert 'z_voc_usage' not in metrics
    assert var.selection in metrics and set(var.headline.values()) <= set(metrics)

    losses = TokenLosses(*(t_BL[:, :5] for t_BL in losses))
    aux.update(losses=losses, target_BL=aux['target_BL'][:, :5], stage=1)
    metrics = var.train().metrics(aux)
    assert metrics['L_tail'] == metrics['acc_tail'] == -1 and metrics['prog_a_reso'] == 32
    used = vectors['logits_eval'][:, :5].argmax(-1).unique()
    assert metrics['z_voc_usage'].item() == pytest.approx(100 * len(used) / 96, rel=1e-5)


# ------------------------------------------------------------ progressive schedule
def stateful_schedule(num_scales, total, warmup, until, first_stage, stage_warmup):
    """(stage, weight of its newest scale) of every step, counted as a training loop would."""
    last_stage, steps_in_stage, is_first = -1, 0, True
    for step in range(total):
        if step <= warmup:
            stage = first_stage
        elif step >= total * until:
            stage = num_scales - 1
        else:
            done = min(max((step - warmup) / (total * until - warmup), 0), 1)
            stage = first_stage + round(done * (num_scales - 1 - first_stage))
        if stage != last_stage:
            if last_stage != -1:
                is_first, steps_in_stage = False, 0
            last_stage = stage
        steps_in_stage += 1
        weight = min(max(steps_in_stage / stage_warmup, 0.01), 1) if stage_warmup else 1.
        if is_first or stage == num_scales - 1:
            weight = 1.
        yield stage, weight


def test_progressive_schedule_of_the_reference():
    run = load_json('var/trainer')['runs']['progressive']
    prog = run['prog']
    settings = dict(total=run['max_it'], warmup=run['wp_it'], until=prog['pg'], first_stage=prog['pg0'],
                    stage_warmup=prog['prog_wp_it'])
    var = tiny_var('sep_l2', progressive=settings)
    schedule = ProgressiveSchedule(num_scales=4, **settings)
    assert len({row['prog_si'] for row in run['rows']}) == 3
    for row in run['rows']:
        stage, weight = schedule.at(row['g_it'] / run['max_it'])
        assert stage == (3 if row['prog_si'] < 0 else row['prog_si'])
        grown = min(max(row['prog_it'] / prog['prog_wp_it'], 0.01), 1)
        assert weight == pytest.approx(1. if row['first_prog'] or stage == 3 else grown, rel=1e-12)
        following = run['rows'][min(row['g_it'] + 1, len(run['rows']) - 1)]
        if following['last_prog_si'] == row['last_prog_si']:  # else ours is already that of the next stage
            config = var.config_state((row['g_it'] + 1) / run['max_it'])
            assert all(config[name] == row[name] for name in ('prog_it', 'last_prog_si', 'first_prog'))


@pytest.mark.parametrize('num_scales', [4, 10])
@pytest.mark.parametrize('total', [1, 10, 97])
@pytest.mark.parametrize('warmup', [0, 2.5, 20])
@pytest.mark.parametrize('until', [0.05, 0.5, 0.8, 1.])
@pytest.mark.parametrize('stage_warmup', [0, 2.5, 40])
def test_progressive_schedule_equals_the_stateful_one(num_scales, total, warmup, until, stage_warmup):
    for first_stage in (0, 1, num_scales - 2, num_scales - 1):
        settings = dict(num_scales=num_scales, total=total, warmup=warmup, until=until,
                        first_stage=first_stage, stage_warmup=stage_warmup)
        schedule = ProgressiveSchedule(**settings)
        for step, (stage, weight) in enumerate(stateful_schedule(**settings)):
            assert schedule.at(step / total) == (stage, pytest.approx(weight, rel=1e-12)), (settings, step)
        assert schedule.at(1.) == schedule.at((total - 1) / total)


# ------------------------------------------------------------ sizes and initialisation
P256, P512 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@pytest.mark.parametrize(('depth', 'patch_nums', 'shared', 'parameters', 'entries', 'drop_path', 'std'), [
    (16, P256, False, 310_283_520, 220, 0.0667, 0.018042),
    (20, P256, False, 600_917_136, 272, 0.0833, 0.016137),
    (24, P256, False, 1_033_399_360, 324, 0.1, 0.014731),
    (30, P256, False, 2_010_020_356, 402, 0.125, 0.013176),
    (36, P256, False, 3_465_053_200, 480, 0.15, 0.012028),
    (36, P256, True, 2_350_299_664, 446, 0.15, 0.012028),
    (36, P512, True, 2_353_893_904, 446, 0.15, 0.012028),
    (16, P256, True, 215_917_824, 206, 0.0667, 0.018042),
])
def test_published_sizes(depth, patch_nums, shared, parameters, entries, drop_path, std):
    tokenizer = types.SimpleNamespace(channels=32, vocab_size=4096)
    with torch.device('meta'):
        var = VAR(tokenizer, patch_nums=patch_nums, shared_aln=shared, attn_l2_norm=True,
                  **VAR.published_sizes(depth))
    assert sum(p.numel() for p in var.parameters()) == parameters
    assert len(var.state_dict()) == entries
    assert var.drop_path_rate == pytest.approx(drop_path, abs=5e-5)
    assert math.sqrt(1 / var.C / 3) == pytest.approx(std, abs=5e-7)


@pytest.mark.parametrize('index', range(3))
def test_initialisation(index):
    info = load_json('var/init_stats')['configs'][index]
    config = dict(info['config'])
    init = {name: config.pop(name) for name in ('init_adaln', 'init_adaln_gamma', 'init_head', 'init_std')}
    tokenizer = types.SimpleNamespace(channels=config.pop('Cvae'), vocab_size=config.pop('V'))
    var = VAR(tokenizer, drop_path_rate=0.1 * config['depth'] / 24, **config)
    positions = var.pos_1LC.clone(), var.pos_start.clone()
    var.init_weights(**init)
    assert torch.equal(var.pos_1LC, positions[0]) and torch.equal(var.pos_start, positions[1])

    drop_path = [block.drop_path.drop_prob for block in var.blocks]
    assert drop_path == pytest.approx(info['drop_path_per_block'], rel=1e-6)
    params = dict(var.named_parameters())
    assert list(params) == list(info['params'])
    for name, expected in info['params'].items():
        p = params[name]
        assert list(p.shape) == expected['shape']
        if expected['std'] < 1e-7:
            assert (p == p.flatten()[0]).all(), name
            assert p.max().item() == pytest.approx(expected['max'], abs=1e-7), name
            continue
        tolerance = 0.05 if p.numel() >= 5000 else 0.15
        assert p.std().item() == pytest.approx(expected['std'], rel=tolerance), name
        assert abs(p.mean().item()) < 5 * expected['std'] / p.numel() ** 0.5, name


def test_gamma_rows_start_small():
    init = dict(init_adaln=0.5, init_adaln_gamma=1e-5)
    for name, weight in (('sep_l2', lambda block: block.ada_lin[-1].weight.view(6, -1)),
                         ('shared_l2', lambda block: block.ada_gss.view(6, -1))):
        var = tiny_var(name)
        before = [weight(block).detach().clone() for block in var.blocks]
        var.init_weights(init_std=0.02, **init)
        for block, old in zip(var.blocks, before, strict=True):
            rows = weight(block).detach().std(1)
            if name == 'shared_l2':
                torch.testing.assert_close(weight(block), old * torch.tensor([1e-5] * 2 + [0.5] * 4)[:, None])
            else:
                assert (rows[:2] < 1e-6).all() and ((rows[2:] / 0.01 - 1).abs() < 0.1).all()


@pytest.mark.parametrize('shared', [False, True])
def test_first_loss_is_that_of_a_uniform_guess(shared):
    vae, var = build_vae_var('cpu', patch_nums=PATCH_NUMS, V=4096, Cvae=16, ch=32, num_classes=10, depth=2,
                             shared_aln=shared)
    assert (var.num_heads, var.C) == (2, 128) and not vae.training and var.training
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    loss, _ = var.training_loss(images, torch.arange(4))
    assert loss.item() == pytest.approx(math.log(4096), rel=0.02)


# ------------------------------------------------------------ weights
def test_hub_round_trip(case, tmp_path):
    _, var, info, t = case
    hf = VARHF(vae_kwargs=load_json('var/vqvae')['config'], **info['config'])
    hf.load_state_dict(var.state_dict())
    hf.save_pretrained(tmp_path)
    loaded = VARHF.from_pretrained(tmp_path).eval()
    assert list(loaded.state_dict()) == list(var.state_dict())
    assert loaded.patch_nums == var.patch_nums and loaded.tokenizer.vocab_size == 96
    with torch.no_grad():
        assert torch.equal(loaded(t['labels'], t['var_input']), var(t['labels'], t['var_input']))


@pytest.mark.parametrize(('change', 'message'), [
    (dict(depth=3), r'depth=3 \(here 2\)'),
    (dict(patch_nums=(1, 2, 4)), r'patch_nums=\(1, 2, 4\) \(here \(1, 2, 3, 4\)\)'),
    (dict(num_classes=7), r'num_classes=7 \(here 5\)'),
    (dict(embed_dim=64), r'embed_dim=64 \(here 32\)'),
    (dict(shared_aln=True), r'shared_aln=True \(here False\)'),
    (dict(attn_l2_norm=False), r'attn_l2_norm=False \(here True\)'),
    (dict(vocab_size=64), r'vocab_size=64 \(here 96\)'),
    (dict(mlp_ratio=2.), r'mlp_ratio=2\.0 \(here 4\.0\)'),
])
def test_load_weights_names_the_difference(var, change, message):
    config = {**load_json('var/var_sep_l2')['config'], **change}
    tokenizer = types.SimpleNamespace(channels=16, vocab_size=config.pop('vocab_size', 96))
    before = {key: t.clone() for key, t in var.state_dict().items()}
    with pytest.raises(ValueError, match=rf'other\.pth is a VAR with .*{message}') as error:
        load_weights(var, VAR(tokenizer, **config).state_dict(), 'other.pth')
    assert '\n' not in str(error.value) and 'change the flags' in str(error.value)
    assert all(torch.equal(t, before[key]) for key, t in var.state_dict().items())


def test_load_weights_of_something_else(var):
    with pytest.raises(ValueError, match='ckpt holds no VAR weights'):
        load_weights(var, vqvae_state(), 'ckpt')
    incomplete = var.state_dict()
    del incomplete['head.weight']
    with pytest.raises(ValueError, match=r'ckpt does not fit VAR: .*head\.weight') as error:
        load_weights(var, incomplete, 'ckpt')
    assert '\n' not in str(error.value)


def test_load_weights_copies(var):
    source = tiny_var('sep_l2')
    source.init_weights()
    load_weights(var, source.state_dict(), 'ckpt')
    assert all(torch.equal(t, source.state_dict()[key]) for key, t in var.state_dict().items())


@pytest.mark.parametrize('config', [
    dict(num_classes=1000, shared_aln=False, attn_l2_norm=True, patch_nums=P256, mlp_ratio=4.,
         **VAR.published_sizes(2)),
    dict(num_classes=10, shared_aln=True, attn_l2_norm=False, patch_nums=(1, 2, 4), mlp_ratio=2.,
         **VAR.published_sizes(3)),
    dict(num_classes=3, shared_aln=True, attn_l2_norm=True, patch_nums=(2, 3), mlp_ratio=3., depth=12,
         embed_dim=96, num_heads=6),
])
def test_kwargs_from_state_dict(config):
    tokenizer = types.SimpleNamespace(channels=16, vocab_size=64)
    with torch.device('meta'):
        var = VAR(tokenizer, **config)
    state = dict(var.state_dict(), lvl_1L=var.layout.level_L())
    config = {name: value for name, value in config.items() if name != 'drop_path_rate'}
    assert VAR.kwargs_from_state_dict(state) == dict(config, channels=16, vocab_size=64)


def test_build_generator_refuses_other_weights():
    vae, var = build_vae_var('cpu', patch_nums=(1, 2, 4), V=24, Cvae=8, ch=32, num_classes=3, depth=2)
    with pytest.raises(ValueError, match='ckpt needs a tokenizer with vocab_size=24, got 32'):
        other = VQVAE(vocab_size=32, z_channels=8, ch=32, v_patch_nums=(1, 2, 4))
        build_generator('var', var.state_dict(), other.state_dict(), 'ckpt', 'cpu')
    with pytest.raises(ValueError, match='ckpt holds no VAR weights'):
        build_generator('var', vae.state_dict(), vae.state_dict(), 'ckpt', 'cpu')


def test_weights_of_a_narrow_model_without_unit_queries_tell_one_head():
    """Heads are then taken for 64 channels wide, as published; the width may be smaller than that."""
    vae = frozen_vqvae()
    var = VAR(vae, num_classes=3, depth=1, embed_dim=32, num_heads=1, attn_l2_norm=False,
              patch_nums=vae.quantize.v_patch_nums)
    assert VAR.kwargs_from_state_dict(var.state_dict())['num_heads'] == 1
