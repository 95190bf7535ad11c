"""FlexVAR: the published outputs, and what any pyramid, size and mask must keep."""
import itertools
import random
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import FlexVAE, FlexVAR, build_flexvar, build_generator, load_weights
from models.editing import box_mask, mostly_kept
from models.flexvar import ScheduleSampler, sinusoid_grid
from models.helpers import drop_labels, filter_top_k_top_p, sample_with_top_k_top_p_
from models.noise import GlobalBatch, ImageNoise
from models.scales import (
    ScaleLayout,
    as_sizes,
    block_causal,
    check_sizes,
    rect_schedule,
    scale_metrics,
)
from tests.vectors import (
    assert_norms,
    assert_within,
    load_json,
    load_tensors,
    named_grads,
    needs_rng,
    tiny_flexvar,
    uniform_images,
)
from utils.lr_control import filter_params, lr_wd_annealing

P256, P512 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
RECT = ((1, 1), (1, 2), (2, 3), (3, 5), (4, 6))


def cases(name):
    count = len(load_json(f'flexvar/{name}')['config']['cases'])
    return [pytest.param(name, i, id=f'{name}-{i}') for i in range(count)]


@pytest.fixture(scope='module')
def model():
    return tiny_flexvar('sample_tiny')


def small(**overrides):
    """A model that is fast to train and edit with: stride 8, 24 codes."""
    tokenizer = FlexVAE(24, 8, z_channels=16, net='tiny', test_mode=True)
    model = FlexVAR(tokenizer, **dict(num_classes=3, depth=2, embed_dim=32, num_heads=2, attn_l2_norm=True,
                                      patch_nums=(1, 2, 3, 4)) | overrides)
    model.init_weights(init_head=1., init_std=-1, init_adaln_gamma=0.5)
    return model.eval()


def codes(steps):
    return torch.cat([step.idx_Bl for step in steps], dim=1)


# ------------------------------------------------------------ published: positions, teacher forcing, sampling
@pytest.mark.parametrize('width', load_json('flexvar/pos_embed')['config']['Cs'])
def test_positions(width):
    info, t = load_json('flexvar/pos_embed'), load_tensors('flexvar/pos_embed')
    model = tiny_flexvar('sample_tiny') if width == 64 else None
    grid = sinusoid_grid(width)
    assert_within(grid[:, ::info['config']['cstep'], ::5, ::7].contiguous(), t[f'C{width}.pos_thin'], 2e-6)
    for side in info['config']['hws']:
        expected = info[f'C{width}.hw{side}']
        if model:
            actual = model.positions((side, side))
        else:
            actual = F.interpolate(grid, size=(side, side), mode='area').flatten(2).transpose(1, 2)
        thin = actual[:, ::expected['token_step'], ::info['config']['cstep']]
        assert_within(thin, t[f'C{width}.hw{side}'], 2e-6)
        assert actual.double().sum().item() == pytest.approx(expected['sum'], abs=1e-2)
        assert actual.double().square().sum().item() == pytest.approx(expected['sumsq'], rel=1e-6)


@pytest.mark.parametrize(('name', 'i'), cases('teacher_forced_l2norm') + cases('teacher_forced_shared_aln'))
def test_teacher_forcing(name, i):
    model, info, t = tiny_flexvar(name), load_json(f'flexvar/{name}'), load_tensors(f'flexvar/{name}')
    case, expected = info['config']['cases'][i], info[f'case{i}']
    idx_kBl = model.tokenizer.encode(uniform_images(case['xseed'], case['xshape']), case['patch_nums'])
    target_BL = torch.cat(idx_kBl, dim=1)
    assert torch.equal(target_BL, t[f'{i}.gt_idx'])
    teacher_BLZ = model.teacher_input(idx_kBl, case['patch_nums'])
    assert_within(teacher_BLZ, t[f'{i}.tf_input'], 2e-6)
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs['x']),
                                                     with_kwargs=True)
    with torch.no_grad():
        logits = model(torch.tensor(expected['labels_after_drop']), teacher_BLZ, case['patch_nums'])
    hook.remove()
    assert_within(seen[0][:1], t[f'{i}.block0_in'], 2e-5)
    assert_within(logits[:, ::case['lstep']].contiguous(), t[f'{i}.logits'], 5e-5)
    assert logits.double().abs().mean().item() == pytest.approx(expected['logits_abs_mean'], rel=1e-4)
    loss_BL = F.cross_entropy(logits.transpose(1, 2), target_BL, reduction='none')
    layout = ScaleLayout(tuple(case['patch_nums']))
    metrics = scale_metrics(loss_BL, logits.argmax(-1), target_BL, layout, model.tokenizer.stride)
    assert metrics['L_mean'].item() == pytest.approx(expected['loss'], abs=2e-5)
    per_scale = [metrics[f'L_{model.tokenizer.stride * side}'].item() for side in case['patch_nums']]
    assert per_scale == pytest.approx(expected['per_scale_loss'], abs=2e-5)
    assert metrics['L_tail'].item() == per_scale[-1]


def test_published_label_drop():
    """One uniform number per image from the global generator, in training mode only."""
    needs_rng()
    name = 'teacher_forced_l2norm'
    model, info = tiny_flexvar(name), load_json(f'flexvar/{name}')
    for i, case in enumerate(info['config']['cases']):
        expected, labels = info[f'case{i}'], torch.tensor(case['labels'])
        for rate in (0.1, 0.55, 0.6):  # the published rate drops none of these few
            torch.manual_seed(case['seed'])
            dropped = [u < rate for u in expected['cond_drop_uniforms']]
            assert (drop_labels(labels, 10, rate) == 10).tolist() == dropped
        torch.manual_seed(case['seed'])
        assert drop_labels(labels, 10, 0.1).tolist() == expected['labels_after_drop']
    label, teacher = torch.tensor([0, 1]), torch.zeros(2, 4, 32)
    null = torch.full_like(label, model.num_classes)
    always = tiny_flexvar(name, token_dropout_p=0.1)
    always.cond_drop_rate = 1.
    with torch.no_grad():
        assert torch.equal(always.train()(label, teacher, (1, 2)), model(null, teacher, (1, 2)))
        assert torch.equal(always.eval()(label, teacher, (1, 2)), model(label, teacher, (1, 2)))


@pytest.mark.parametrize(('name', 'i'), cases('sample_tiny') + cases('sample_shared_aln'))
def test_sampling(name, i):
    needs_rng()
    model, info, t = tiny_flexvar(name), load_json(f'flexvar/{name}'), load_tensors(f'flexvar/{name}')
    case, expected = info['config']['cases'][i], info[f'case{i}']
    taken = ('cfg', 'top_k', 'top_p', 'max_pn', 'used_llamagen_cfg', 'invalid_ids')
    options = {key: case[key] for key in taken if key in case}
    images = model.autoregressive_infer_cfg(model.tokenizer, case['B'], case['labels'], case['patch_nums'],
                                            case['g_seed'], **options)
    assert list(images.shape) == expected['img_shape']
    stored, stride = t[f'{i}.img'], case.get('stride', 4)
    assert_within(images[:len(stored), :, ::stride, ::stride].contiguous(), stored, 1e-4)

    rng = torch.Generator().manual_seed(case['g_seed'])
    label_B = model.as_labels(case['labels'], case['B'], rng)
    assert label_B.tolist() == expected.get('labels_drawn', case['labels'])
    steps = list(model.sample_scales(label_B, infer_patch_nums=case['patch_nums'], rng=rng, **options))
    assert torch.equal(codes(steps), t[f'{i}.idx'])
    for key, k in (('s0', 0), ('mid', len(steps) // 2), ('last', -1)):
        logits, stored = steps[k].logits_BlV, t[f'{i}.logits_{key}']
        torch.testing.assert_close(logits[:, :stored.shape[1]], stored, atol=5e-5, rtol=1e-4)
    for step, top_k, kept_mean in zip(steps, expected['top_k_used'], expected['kept_mean'], strict=True):
        kept = filter_top_k_top_p(step.logits_BlV, top_k, case['top_p']).isfinite().sum(-1).float().mean()
        assert kept.item() == pytest.approx(kept_mean, abs=0.2)


def test_sampler_vectors():
    needs_rng()
    info, t = load_json('flexvar/schedules_lr_sampler'), load_tensors('flexvar/schedules_lr_sampler')
    for i, case in enumerate(info['config']['samp']):
        noise = np.random.RandomState(case['s']).standard_normal(case['shape'])
        logits = 3 * torch.from_numpy(noise.astype(np.float32))
        kept = filter_top_k_top_p(logits, case['top_k'], case['top_p']).isfinite()
        assert torch.equal(kept.to(t[f'samp{i}.kept'].dtype), t[f'samp{i}.kept'])
        idx = sample_with_top_k_top_p_(logits, case['top_k'], case['top_p'],
                                       torch.Generator().manual_seed(case['seed']))
        assert torch.equal(idx.view_as(t[f'samp{i}.idx']), t[f'samp{i}.idx'])


# ------------------------------------------------------------ published: schedules, training
@pytest.mark.parametrize('seed', ['0', '1', '2'])
def test_drawn_pyramids(seed):
    rng, sampler = random.Random(int(seed)), ScheduleSampler()
    lists = load_json('flexvar/schedules_lr_sampler')['schedules'][seed]
    assert [list(sampler.draw(rng)) for _ in lists] == lists


def test_distribution_of_drawn_pyramids():
    """Shares within 5 standard deviations of those over 200,000 published draws."""
    stats, count = load_json('flexvar/schedules_lr_sampler')['stats'], 20_000
    rng, sampler = random.Random(7), ScheduleSampler()
    drawn = [sampler.draw(rng) for _ in range(count)]
    shares = dict(length=[len(sides) for sides in drawn], last=[sides[-1] for sides in drawn])
    for name, values in shares.items():
        for value, share in stats[name].items():
            sigma = (share * (1 - share) / count) ** 0.5
            assert abs(values.count(int(value)) / count - share) < 5 * sigma + 1e-4, (name, value)


@pytest.mark.parametrize('patch_nums', [P256, P512, (1, 2), (1, 2, 3), (1, 2, 3, 4, 6), (1, 2, 3, 4, 6, 8),
                                        (1, 3, 7), (1, 16), (1, 4, 16)], ids=str)
@pytest.mark.parametrize('keep_last', [False, True])
def test_drawn_pyramids_of_any_list(patch_nums, keep_last):
    rng, sampler = random.Random(0), ScheduleSampler(patch_nums, keep_last)
    drawn = [sampler.draw(rng) for _ in range(2000)]
    for sides in drawn:
        assert sides[0] == 1 and list(sides) == sorted(set(sides)) and sides[-1] <= patch_nums[-1]
        assert ScaleLayout(sides).total <= ScaleLayout(patch_nums).total
        assert sides[-1] == patch_nums[-1] or not keep_last
    assert patch_nums in drawn
    assert sum(sides[-1] == patch_nums[-1] for sides in drawn) > 0.3 * len(drawn)
    if len(patch_nums) > 4:
        assert len(set(drawn)) > 5


@pytest.mark.parametrize('row', range(0, 33, 4))
def test_learning_rates(row):
    case = load_json('flexvar/schedules_lr_sampler')['lr'][row]
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    lr_wd_annealing(case['sche'], optimizer, case['peak'], case['wd'], case['wd_end'], case['it'],
                    case['wp_it'], case['max_it'], wp0=case['wp0'], wpe=case['wpe'])
    group, = optimizer.param_groups
    assert (group['lr'], group['weight_decay']) == pytest.approx((case['lr'], case['wd_value']), rel=1e-12)


@pytest.fixture(scope='module')
def trajectory():
    """The stored training repeated: the model, its parameters without decay, and a record of every step."""
    needs_rng()
    info = load_json('flexvar/train_tiny')
    config = info['config']
    tiny_flexvar.cache_clear()
    model = tiny_flexvar('train_tiny').train()
    tiny_flexvar.cache_clear()  # nobody else gets these weights, which are going to move
    _, _, groups = filter_params(model, model.no_weight_decay())
    names = {p: name for name, p in model.named_parameters()}
    plain = {names[p] for group in groups if not group['wd_sc'] for p in group['params']}
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    schedules = iter(config['schedules'])
    object.__setattr__(model, 'schedule', types.SimpleNamespace(draw=lambda: tuple(next(schedules))))
    records = []
    for it, step in enumerate(info['steps']):
        images = uniform_images(config['xseed'] + it, config['xshape'])
        torch.manual_seed(config['seed'] + it)
        lr_wd_annealing(config['sche'], optimizer, config['peak_lr'], config['wd'], config['wd'], it,
                        config['wp_it'], config['max_it'], wp0=config['wp0'], wpe=config['wpe'])
        loss, aux = model.training_loss(images, torch.tensor(step['labels']))
        optimizer.zero_grad()
        loss.backward()
        grad_norms = {name: grad.norm() for name, grad in named_grads(model).items()}
        total_norm = nn.utils.clip_grad_norm_(model.parameters(), config['clip'])
        optimizer.step()
        metrics = {name: float(value) for name, value in model.metrics(aux).items()}
        records.append(dict(loss=loss.item(), grad_norms=grad_norms, total_norm=total_norm.item(), aux=aux,
                            metrics=metrics))
    return types.SimpleNamespace(info=info, model=model, plain=plain, groups=groups, records=records)


def test_parameters_without_weight_decay(trajectory):
    assert trajectory.plain == set(trajectory.info['no_weight_decay'])
    num_grouped = sum(len(group['params']) for group in trajectory.groups)
    assert num_grouped == len(list(trajectory.model.parameters()))


def test_gradients_of_the_first_training_step(trajectory):
    assert_norms(trajectory.records[0]['grad_norms'], trajectory.info['per_param_grad_norm'])


def test_losses_of_a_training(trajectory):
    for record, step in zip(trajectory.records, trajectory.info['steps'], strict=True):
        assert record['loss'] == pytest.approx(step['loss'], rel=2e-4, abs=2e-5)
        assert record['total_norm'] == pytest.approx(step['grad_norm'], rel=1e-3)


def test_metrics_of_a_training(trajectory):
    """Published are those of the last scale in the configuration, which our steps end with only at times."""
    tail = trajectory.info['config']['trainer_patch_nums'][-1] ** 2
    near = dict(rel=2e-4, abs=2e-5)
    for record, step in zip(trajectory.records, trajectory.info['steps'], strict=True):
        metrics, aux = record['metrics'], record['aux']
        assert (metrics['L_mean'], metrics['acc_mean']) == pytest.approx((step['Lm'], step['Accm']), **near)
        losses = aux['losses']
        published = scale_metrics(losses.plain_BL[:, -tail:], losses.predicted_BL[:, -tail:],
                                  aux['target_BL'][:, -tail:], ScaleLayout(((1, tail),)),
                                  trajectory.model.tokenizer.stride)
        assert published['L_tail'].item() == pytest.approx(step['Lt'], **near)
        if step['patch_nums'][-1] ** 2 == tail:
            assert metrics['L_tail'] == pytest.approx(step['Lt'], **near)
            assert metrics['acc_tail'] == pytest.approx(step['Acct'], **near)


def test_weights_after_a_training(trajectory):
    state = trajectory.model.state_dict()
    for name, expected in trajectory.info['final_param_stats'].items():
        actual = state[name].double()
        assert actual.norm().item() == pytest.approx(expected['norm'], rel=1e-4), name
        assert actual.sum().item() == pytest.approx(expected['sum'], rel=1e-4, abs=1e-3), name
    for name, expected in load_tensors('flexvar/train_tiny').items():
        if name == 'final.pos_1LC_corner':
            actual = state['pos_1LC'][:, :, ::8, ::8]
        else:
            actual = state[name.removeprefix('final.')]
        assert_within(actual.contiguous(), expected, 2e-5)


# ------------------------------------------------------------ published: weights
@pytest.mark.parametrize(('depth', 'num_parameters'),
                         [(16, 315_561_936), (20, 607_513_952), (24, 1_041_314_576)])
def test_published_sizes(depth, num_parameters):
    keys = dict(load_json('flexvar/state_dict_keys')[f'FlexVAR-d{depth}'])
    with torch.device('meta'):
        model = FlexVAR(FlexVAE(test_mode=True), attn_l2_norm=True, **FlexVAR.published_sizes(depth))
    mask = keys.pop('attn_bias_for_masking')
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == keys
    assert len(keys) + 1 == 10 + 13 * depth
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    published = {name: torch.empty(shape, device='meta') for name, shape in keys.items()}
    published['attn_bias_for_masking'] = torch.empty(*mask[:2], 311, 311, device='meta')  # of another pyramid
    load_weights(model, published, 'a released file')
    assert 'attn_bias_for_masking' in published


def test_published_weights_do_not_tell_the_pyramid():
    model = small(embed_dim=128)
    state = model.state_dict()
    tokenizer_state = model.tokenizer.state_dict()
    published = build_generator('flexvar', state, tokenizer_state, 'a file', 'cpu',
                                model.tokenizer.config_state(1.))
    assert published.patch_nums == P256
    with pytest.raises(ValueError, match='holds no VAR weights'):
        build_generator('var', state, tokenizer_state, 'a file', 'cpu')


def test_build_flexvar():
    vae, model = build_flexvar('cpu', patch_nums=(1, 2), V=24, Cvae=8, ch=32, num_classes=3, depth=2)
    assert model.tokenizer is vae and not vae.training and model.training
    assert not any(p.requires_grad for p in vae.parameters()) and (model.V, model.C) == (24, 128)
    assert torch.equal(model.pos_1LC, sinusoid_grid(128)), 'init_weights leaves the positions'
    assert model.head.weight.std().item() == pytest.approx(0.02 * (1 / 3 / 128) ** 0.5, rel=0.05)


# ------------------------------------------------------------ any pyramid
@pytest.mark.parametrize('sizes', [(1,), (1, 2, 4), (1, 3, 4, 9), (1, 5, 5, 2), RECT,
                                   ((1, 1), (3, 1), (7, 2))], ids=str)
@pytest.mark.parametrize('name', ['sample_tiny', 'sample_shared_aln'])
def test_cached_sampling_equals_teacher_forcing(name, sizes):
    model, label_B = tiny_flexvar(name), torch.tensor([1, 4])
    steps = list(model.sample_scales(label_B, infer_patch_nums=sizes, cfg=0., top_k=5,
                                     rng=ImageNoise(0, [0, 1])))
    teacher = model.teacher_input([step.idx_Bl for step in steps], sizes)
    with torch.no_grad():
        logits = model(label_B, teacher, sizes)
    assert_within(torch.cat([step.logits_BlV for step in steps], dim=1), logits, 3e-5)
    assert all(block.attn.cache is None for block in model.blocks)


@pytest.mark.parametrize('seed', range(3))
def test_cached_sampling_of_drawn_pyramids(seed):
    model, rng = small(), random.Random(seed)
    sizes = ScheduleSampler((1, 2, 3, 4, 6, 8)).draw(rng)
    sizes = rect_schedule(sizes, rng.randint(1, 9), rng.randint(1, 9)) if seed else sizes
    label_B = torch.tensor([0, 2])
    steps = list(model.sample_scales(label_B, infer_patch_nums=sizes, cfg=0., rng=ImageNoise(seed, [0, 1])))
    with torch.no_grad():
        logits = model(label_B, model.teacher_input([step.idx_Bl for step in steps], sizes), sizes)
    assert_within(torch.cat([step.logits_BlV for step in steps], dim=1), logits, 3e-5)


def test_finer_scales_do_not_change_coarser_ones(model):
    """Logits of the leading scales are those of the shorter pyramid; a finer code changes its own scale."""
    idx_kBl = [torch.randint(0, 96, (1, h * w)) for h, w in RECT]
    with torch.no_grad():
        full = model(torch.tensor([3]), model.teacher_input(idx_kBl, RECT), RECT)
        for k in range(1, len(RECT)):
            part = model(torch.tensor([3]), model.teacher_input(idx_kBl[:k], RECT[:k]), RECT[:k])
            assert_within(part, full[:, :part.shape[1]].contiguous(), 2e-5)
        idx_kBl[-2] = (idx_kBl[-2] + 1) % 96
        other = model(torch.tensor([3]), model.teacher_input(idx_kBl, RECT), RECT)
    begin = ScaleLayout(RECT).spans[-1][0]
    assert_within(other[:, :begin], full[:, :begin], 1e-6)
    assert (other[:, begin:] - full[:, begin:]).abs().max() > 1e-2


@pytest.mark.parametrize('pos_mode', ['stretch', 'crop'])
def test_square_sizes_are_sides(model, pos_mode):
    def draw(sizes):
        return codes(model.sample_scales(torch.tensor([2]), infer_patch_nums=sizes, top_k=9,
                                         pos_mode=pos_mode, rng=ImageNoise(3, [0])))
    assert torch.equal(draw((1, 2, 4)), draw(((1, 1), (2, 2), (4, 4))))


def test_positions_of_oblong_maps(model):
    with torch.no_grad():
        square = model.positions((8, 8)).view(8, 8, -1)
        assert torch.equal(model.positions((2, 8), 'crop').view(2, 8, -1), square[:2])
        stretched = model.positions((2, 8)).view(2, 8, -1)
        assert_within(stretched[0], square[:4].mean(0), 1e-6)
        large = model.positions((64, 64)).view(32, 2, 32, 2, -1)
    assert torch.equal(large[:, 0, :, 0], large[:, 1, :, 1]), 'cells repeat beyond the grid'


@pytest.mark.parametrize(('base', 'size', 'expected'), [
    (P256, (16, 16), as_sizes(P256)),
    ((1, 2, 3, 4), (2, 4), ((1, 1), (1, 2), (2, 3), (2, 4))),
    ((1, 2, 4), (1, 4), ((1, 1), (1, 2), (1, 4))),
    ((1, 2, 4), (4, 12), ((1, 1), (2, 6), (4, 12))),  # the first, stretched to 1x3, becomes 1x1
    (P256, (24, 24), ((1, 1), (3, 3), (4, 4), (6, 6), (8, 8), (9, 9), (12, 12), (15, 15), (20, 20),
                       (24, 24))),
    ((1, 2, 3, 4), (1, 1), ((1, 1),)),
    ((4,), (3, 5), ((1, 1), (3, 5))),
    (((1, 1), (2, 4)), (4, 8), ((1, 1), (4, 8))),
    (range(1, 4), (3, 3), ((1, 1), (2, 2), (3, 3))),
    (np.array([1, 2]), (2, 2), ((1, 1), (2, 2))),
])
def test_rect_schedule(base, size, expected):
    assert rect_schedule(base, *size) == expected


def test_a_pyramid_may_have_many_steps():
    model = small()
    for sizes in [(1, 4), tuple(range(1, 14)), (1, *[4] * 12)]:
        image = model.sample([1], infer_patch_nums=sizes, rng=ImageNoise(0, [0]))
        assert image.shape == (1, 3, sizes[-1] * 8, sizes[-1] * 8) and 0 <= image.min() <= image.max() <= 1
    assert model.sample([1], image_size=(16, 40), rng=ImageNoise(0, [0])).shape == (1, 3, 16, 40)


def test_guidance(model):
    """Published: linear up to the tenth scale and beyond it; constant past max_pn, or as in LlamaGen."""
    def first_logits(cfg, sizes=(1,), label=1, **options):
        steps = model.sample_scales(torch.tensor([label]), infer_patch_nums=sizes, cfg=cfg, **options)
        return next(steps).logits_BlV
    cond, null = first_logits(0.), first_logits(0., label=model.num_classes)
    assert_within(first_logits(2.), 3 * cond - 2 * null, 1e-5)  # a single scale has full guidance
    assert torch.equal(first_logits(2., (1, 2)), first_logits(5., (1, 2)))  # the first of several has none
    assert_within(first_logits(2., (1, 2), used_llamagen_cfg=True), 2 * cond - null, 1e-5)
    assert_within(first_logits(2., (1, 2), max_pn=0), 3 * cond - 2 * null, 1e-5)


def test_greedy_steps(model):
    """Sides that were never drawn in publication, and those past max_pn, take the most likely codes."""
    def steps(**options):
        return list(model.sample_scales(torch.tensor([2]), infer_patch_nums=(1, 4, (2, 7), 7, 8), cfg=0.,
                                        rng=ImageNoise(0, [0]), **options))

    def is_greedy(step):
        return torch.equal(step.idx_Bl, step.logits_BlV.argmax(-1))
    assert [is_greedy(step) for step in steps()][1:] == [False, True, True, False]
    assert [is_greedy(step) for step in steps(max_pn=7)][1:] == [False, True, True, True]
    assert not any(is_greedy(step) for step in steps(greedy_unseen=False)[1:])


def test_nan_logits_make_nan_pixels():
    model = small()
    with torch.no_grad():
        model.class_emb.weight[1] = torch.nan
    images = model.sample([0, 1], rng=ImageNoise(0, [0, 1]))
    assert images[0].isfinite().all() and images[1].isnan().all()


# ------------------------------------------------------------ training
def test_validation_has_the_configured_pyramid():
    model, images = small(), torch.rand(2, 3, 64, 64) * 2 - 1
    random.seed(0)
    drawn = {model.train().training_loss(images, torch.tensor([0, 1]))[1]['patch_nums'] for _ in range(60)}
    assert len(drawn) > 1
    state = random.getstate()
    model.eval()
    loss, aux = model.training_loss(images, torch.tensor([0, 1]))
    assert aux['patch_nums'] == (1, 2, 3, 4) and random.getstate() == state
    assert loss.item() == pytest.approx(model.metrics(aux)['L_mean'].item(), abs=1e-6)
    assert loss == model.training_loss(images, torch.tensor([0, 1]))[0]


def test_larger_images_give_the_same_sides():
    """Codes of 64 px images at sides 1..4 are those of their averaged latent."""
    model, images = small(), torch.rand(2, 3, 64, 64) * 2 - 1
    idx_kBl = model.tokenizer.encode(images, (1, 2, 3, 4))
    f_BZhw = model.tokenizer.features(images)
    for side, idx_Bl in zip((1, 2, 3, 4), idx_kBl, strict=True):
        mean = F.adaptive_avg_pool2d(f_BZhw, side)
        assert torch.equal(idx_Bl, model.tokenizer.quantize.codes(mean))


def test_mask_is_kept_per_pyramid():
    device = torch.device('cpu')
    with torch.inference_mode():
        mask = block_causal(ScaleLayout(((1, 1), (2, 3))), device)
    assert block_causal(ScaleLayout(((1, 1), (2, 3))), device) is mask
    assert not mask.bias_11ll.is_inference()
    assert torch.equal(mask.bias_11ll[0, 0], ScaleLayout(((1, 1), (2, 3))).causal_bias())


@pytest.mark.slow
def test_compiled_training_equals_eager():
    """One compilation serves pyramids of any length, and gives the same losses."""
    # Inductor treats layers of up to 4096 numbers apart, so that a few images would have graphs of their own.
    images, label_B, losses = torch.rand(16, 3, 64, 64) * 2 - 1, torch.tensor([0, 2]).repeat(8), {}
    for drop_path in (0., 0.2):  # its draws differ in compiled code, so that losses are not compared
        for compiled in (False, True):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = small(patch_nums=(1, 2, 3, 4, 6, 8), cond_drop_rate=0., drop_path_rate=drop_path).train()
            if compiled:
                model.compile()
                torch._dynamo.utils.counters.clear()
            random.seed(1)
            results = []
            for step in range(12):
                with GlobalBatch(16 * step, 192):  # as many micro-steps
                    results.append(model.training_loss(images, label_B))
            losses[compiled] = [loss.item() for loss, _ in results]
        assert len({aux['patch_nums'] for _, aux in results}) > 6
        assert drop_path or losses[True] == pytest.approx(losses[False], rel=1e-5)
        # Two parts of a block; the first block never drops its path, and has a graph of its own for that.
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == (3 if drop_path else 2)


# ------------------------------------------------------------ image to image
def kept_codes(model, images, keep, sizes, labels, **options):
    """Codes that `edit` ends with, per scale, those of the images, and what was kept."""
    drawn = {}
    sample_scales = model.sample_scales

    def spy(label_B, **kwargs):
        for step in sample_scales(label_B, **kwargs):
            drawn[step.k] = step.idx_Bl
            yield step
    model.sample_scales = spy
    try:
        result = model.edit(images, keep, labels, infer_patch_nums=sizes, **options)
    finally:
        del model.sample_scales
    return result, [drawn[k] for k in range(len(sizes))], model.tokenizer.encode(images, sizes)


@pytest.fixture(scope='module')
def pictures():
    return uniform_images(5, (2, 3, 64, 96))


@pytest.mark.parametrize('seed', range(3))
def test_edit_keeps_what_the_mask_keeps(model, pictures, seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 1, 4, 6, generator=generator)
    keep = F.interpolate(coarse, size=(64, 96), mode='bilinear')[:, 0] > 0.5
    noise = ImageNoise(seed, [0, 1])
    result, used, given = kept_codes(model, pictures, keep, RECT, [1, 2], guidance=2., top_k=30, rng=noise)
    plain = list(model.sample_scales(torch.tensor([1, 2]), infer_patch_nums=RECT, cfg=1., top_k=30,
                                     rng=ImageNoise(seed, [0, 1])))
    for k, size in enumerate(RECT):
        kept = F.adaptive_avg_pool2d(keep[:, None].float(), size).flatten(1) >= 0.5
        assert torch.equal(used[k][kept], given[k][kept])
    assert result.shape == pictures.shape and not torch.equal(used[-1], given[-1])
    assert not torch.equal(used[-1], plain[-1].idx_Bl)


def test_keeping_everything_is_reconstruction(model, pictures):
    keep = torch.ones(64, 96, dtype=torch.bool)
    result, used, given = kept_codes(model, pictures, keep, RECT, -1, guidance=1.)
    assert all(map(torch.equal, used, given))
    assert_within(result, model.tokenizer.decode(given, RECT[-1]).add(1).mul(0.5), 1e-6)


def test_keeping_nothing_is_sampling(model, pictures):
    keep = torch.zeros(2, 64, 96)
    options = dict(guidance=3., top_k=40, top_p=0.9, infer_patch_nums=RECT)
    edited = model.edit(pictures, keep, [1, 2], rng=ImageNoise(0, [0, 1]), **options)
    assert torch.equal(edited, model.sample([1, 2], rng=ImageNoise(0, [0, 1]), **options))


def test_paste_puts_the_pixels_back(model, pictures):
    keep = box_mask((64, 96), 0.25, 0.5, 1., 1.)
    edited = model.edit(pictures, keep, 3, guidance=2., paste=True, rng=ImageNoise(0, [0, 1]))
    assert torch.equal(edited[..., keep], pictures.add(1).mul(0.5)[..., keep])
    plain = model.edit(pictures, keep, 3, guidance=2., rng=ImageNoise(0, [0, 1]))
    assert torch.equal(edited[..., ~keep], plain[..., ~keep]) and not torch.equal(edited, plain)


def test_expand(model, pictures):
    """The canvas holds the image; codes around it are drawn, those of the image are kept."""
    seen, edit = {}, model.edit
    model.edit = lambda canvas, keep, labels, **options: seen.update(canvas=canvas, keep=keep) or edit(
        canvas, keep, labels, **options)
    try:
        expanded = model.expand(pictures[:, :, :32, :32], (48, 80), (16, 32), [1, 2], guidance=2., paste=True)
    finally:
        del model.edit
    assert expanded.shape == (2, 3, 48, 80)
    assert_within(expanded[:, :, 16:, 32:64], pictures[:, :, :32, :32].add(1).mul(0.5), 0.)
    assert torch.equal(seen['canvas'][:, :, :16, 40], pictures[:, :, :1, 8].expand(2, 3, 16)), 'repeated edge'
    assert seen['keep'].sum() == 32 * 32
    codes_kept = mostly_kept(seen['keep'][None, None].float(), (3, 5)).view(3, 5)
    assert codes_kept.nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]


def test_expansion_keeps_no_code_of_the_unknown(model, pictures):
    """Cells that are half known have codes of repeated edges in them, which must be drawn again."""
    sizes = ((1, 1), (2, 2), (3, 3), (5, 5), (6, 6))
    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(model, 'keep_masks',
                      lambda *args: kept.extend(FlexVAR.keep_masks(model, *args)) or kept)
        model.expand(pictures[:, :, :, :64], (96, 96), (16, 16), 1, guidance=1., infer_patch_nums=sizes)
    inside = torch.zeros(96, 96)
    inside[16:80, 16:80] = 1
    for kept_Bl, size in zip(kept, sizes, strict=True):
        assert torch.equal(kept_Bl[0].view(size), F.adaptive_avg_pool2d(inside[None], size)[0] > 0.9999)
    assert [int(kept_Bl.sum()) for kept_Bl in kept] == [0, 0, 1, 9, 16]


@pytest.mark.parametrize('image_size', [None, (96, 144)])
def test_refine(model, pictures, image_size):
    drawn, sample = {}, model.sample
    model.sample = lambda labels, **options: drawn.update(options) or sample(labels, **options)
    try:
        refined = model.refine(pictures, [1, 2], start=3, guidance=2., image_size=image_size,
                               infer_patch_nums=(1, 2, 3, 4, 6), rng=ImageNoise(0, [0, 1]))
    finally:
        del model.sample
    assert refined.shape == (2, 3, *(image_size or (64, 96)))
    assert all(mask.all() for _, mask in drawn['keep'])
    coarse = [size for size in drawn['infer_patch_nums'] if max(size) <= 3]
    assert len(drawn['keep']) == len(coarse) < len(drawn['infer_patch_nums'])
    assert all(map(torch.equal, [idx for idx, _ in drawn['keep']], model.tokenizer.encode(pictures, coarse)))


# ------------------------------------------------------------ errors
@pytest.mark.parametrize(('call', 'message'), [
    (lambda m, x: m.edit(x, torch.ones(64, 96), 0, guidance=1., infer_patch_nums=(1, 2, 4)),
     'sides of the code maps must end at the image size: they end at 64x64 pixels, got images of 64x96'),
    (lambda m, x: m.edit(x, torch.ones(96, 64), 0, guidance=1.), r'mask of 64x96 .*got shape \(96, 64\)'),
    (lambda m, x: m.edit(x, torch.ones(3, 64, 96), 0, guidance=1.), r'2 images, got shape \(3, 64, 96\)'),
    (lambda m, x: m.edit(x[..., :90], torch.ones(64, 90), 0, guidance=1.), 'of the stride 16, got 64x90'),
    (lambda m, x: m.edit(x, torch.ones(64, 96), 0, guidance=1., infer_patch_nums=()), 'got none'),
    (lambda m, x: m.sample([0], infer_patch_nums=()), 'expected sides of code maps.*got none'),
    (lambda m, x: m.sample([0], infer_patch_nums=(2, 4)), 'from 1 on, such as 1, 2, 4, got 2x2, 4x4'),
    (lambda m, x: m.sample([0], infer_patch_nums=(1, 0)), 'got 1x1, 0x0'),
    (lambda m, x: m.sample([0], infer_patch_nums=(), image_size=(64, 64)), 'expected sides of code maps'),
    (lambda m, x: m.sample([0], image_size=(64, 40)), 'multiples of the stride 16, got 64x40'),
    (lambda m, x: m.sample([0], pos_mode='tile'), "'stretch' or 'crop', got 'tile'"),
    (lambda m, x: m.sample([11]), r'labels in 0\.\.10'),
    (lambda m, x: m.refine(x, 0, start=0, guidance=1.), r'start in 1\.\.5, .*got 0'),
    (lambda m, x: m.refine(x, 0, start=9, guidance=1., infer_patch_nums=(1, 2, 4)), r'got 9'),
    (lambda m, x: m.edit(x * 127, torch.ones(64, 96), 0, guidance=1.), r'images in \[-1, 1\], got -126'),
    (lambda m, x: m.edit(x / 0, torch.ones(64, 96), 0, guidance=1.), r'images in \[-1, 1\]'),
    (lambda m, x: build_generator('vqvae', {}, {}, 'x', 'cpu'), "one of var, .*, got 'vqvae'"),
    (lambda m, x: m.expand(x, (64, 80), (0, 0), 0, guidance=1.), '64x96 .* at row 0, column 0 does not fit'),
    (lambda m, x: m(torch.tensor([0]), torch.zeros(1, 3, 32), (1, 2)), 'expected 4 tokens .*got 3'),
    (lambda m, x: m.autoregressive_infer_cfg(None, 1, 0, (1, 2), more_smooth=True), 'no more_smooth'),
    (lambda m, x: m.autoregressive_infer_cfg(FlexVAE(24, 8, net='tiny'), 1, 0, (1, 2)), 'got another one'),
    (lambda m, x: FlexVAR(m.tokenizer, patch_nums=()), r'rise from 1, got \(\)'),
    (lambda m, x: FlexVAR(m.tokenizer, patch_nums=(1, 4, 2)), r'rise from 1, got \(1, 4, 2\)'),
    (lambda m, x: FlexVAR(m.tokenizer, patch_nums=((1, 1), (2, 3))), 'oblong ones are for sampling'),
    (lambda m, x: m.sample([0], infer_patch_nums=(1, 2.5)), r'in whole numbers, got \(1, 2.5\)'),
    (lambda m, x: m.sample([0], infer_patch_nums='12'), "in whole numbers, got '12'"),
    (lambda m, x: m.edit(x, torch.full((64, 96), 255), 0, guidance=1.), r'numbers in \[0, 1\], got 255'),
    (lambda m, x: m.edit(x, torch.ones(64, 96), 0, guidance=1., image_size=(64, 96)), 'images keep'),
    (lambda m, x: m.sample([0, 1], infer_patch_nums=(1, 2), keep=[(torch.zeros(1, 1), torch.ones(1, 1))]),
     r'codes to keep, and their mask, of shape \(2, 1\) at scale 0, got \(1, 1\)'),
    (lambda m, x: box_mask((64, 96), 10, 20, 30, 40), 'divide pixels by the size'),
    (lambda m, x: box_mask((64, 96), 0.5, 0., 0.2, 1.), 'top < bottom'),
    (lambda m, x: FlexVAR(m.tokenizer, embed_dim=63, num_heads=3), 'even width'),
    (lambda m, x: check_sizes(((1, 2),)), 'got 1x2'),
], ids=itertools.count())
def test_errors(model, pictures, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, pictures)
    assert all(block.attn.cache is None for block in model.blocks)


def test_an_int_label_is_for_all(model):
    def draw(labels):
        return model.autoregressive_infer_cfg(None, 2, labels, (1, 2, 3), 0, cfg=3.)
    assert torch.equal(draw(4), draw(torch.tensor([4, 4])))
    assert torch.equal(draw(-1), draw([model.num_classes] * 2))
