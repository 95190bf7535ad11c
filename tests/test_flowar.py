"""FlowAR: the published outputs, and what trunk, flow head, solver and training must keep."""
import itertools
import types

import pytest
import torch
from torch import nn

from configs import PRESETS, FlowARConfig
from configs.flowar import FlowARSampleConfig
from models import AutoencoderKL, FlowAR, build_generator, flowar, load_weights
from models.attention import kv_caching
from models.flowar import FlowHead, TimeEmbedder, annealed_steps, grid_positions, time_grid
from models.layers import Rope2d, rotate, sinusoid
from models.noise import GlobalBatch, ImageNoise
from models.scales import ScaleLayout
from models.tokenizers.kl_vae import Posterior
from tests.vectors import (
    Latents,
    assert_norms,
    assert_within,
    fill,
    flowar_rule,
    given_draws,
    given_noise,
    load_json,
    load_tensors,
    named_grads,
    tiny_flowar,
)
from training.build import model_arguments
from utils.checkpoint import load_file, model_weights
from utils.ema import WeightEMA
from utils.lr_control import filter_params, lr_wd_annealing

SCALES = (1, 2, 4, 8, 16)
SMALL = dict(num_classes=5, encoder_embed_dim=32, encoder_depth=2, encoder_num_heads=2, decoder_embed_dim=32,
             decoder_depth=1, decoder_num_heads=4, diffloss_d=2, diffloss_w=64, scale=(1, 2, 4))
TABLES = load_json('flowar/tables')


def cases(name, slow=()):
    keys = [case.get('key') or case['case'] for case in load_json(f'flowar/{name}')['cases']]
    return [pytest.param(name, i, id=f'{name}-{key}', marks=[pytest.mark.slow] * (key in slow))
            for i, key in enumerate(keys)]


def assert_near(actual, expected, tolerance):
    """`torch.testing.assert_close` with a tolerance of the json files."""
    torch.testing.assert_close(actual.detach(), expected, **dict(atol=0.) | tolerance)


def small(tokenizer=None, **overrides):
    """A model over latents of 4 channels that is fast to train and to draw from; nothing in it is zero."""
    return fill(FlowAR(tokenizer or Latents(channels=4), **SMALL | overrides), flowar_rule(7)).eval()


@pytest.fixture(scope='module', params=[False, True], ids=['attn_mlp', 'attn_crossattn_mlp'])
def model(request):
    return small(cross=request.param)


def latents(batch=3, side=4):
    return torch.randn(batch, 4, side, side)


def draw(model, labels, images=None, seed=0, **options):
    """Latents of all scales of these images, each flat, one after the other: (B, L, Z)."""
    steps = model.sample_scales(torch.tensor(labels), rng=ImageNoise(seed, images or range(len(labels))),
                                **dict(num_steps=4) | options)
    return torch.cat([flowar.to_tokens(step.latent_BZnn) for step in steps], dim=1)


def spy(model, method, monkeypatch, replace=False):
    """Arguments of every call of a method of the model, which runs as before or returns its first one."""
    seen, original = [], getattr(model, method)

    def call(*args):
        seen.append(args)
        return (args[0], (0, 0)) if replace else original(*args)
    monkeypatch.setattr(model, method, call)
    return seen


# ------------------------------------------------------------ published: tables
@pytest.mark.parametrize('num_steps', [int(n) for n in TABLES['ode_time_grids']])
def test_time_grids(num_steps):
    expected = TABLES['ode_time_grids'][str(num_steps)]
    if num_steps < 2:
        assert expected['evaluations'] == 0, 'published: returns the noise'
        with pytest.raises(ValueError, match=f'at least 2 steps of the flow head, got {num_steps}'):
            time_grid(num_steps)
        return
    grid = time_grid(num_steps)
    assert grid.dtype == torch.float64 and grid.tolist() == pytest.approx(expected['t'], abs=1e-12)
    assert (grid[0], grid[-1]) == (1, 0)
    assert len(grid) - 1 == expected['evaluations']
    embedder, seen = TimeEmbedder(8), []
    embedder.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    embedder(grid[:-1].float())
    assert torch.equal(seen[0], sinusoid(torch.tensor(expected['time_index']), 256))


@pytest.mark.parametrize('row', TABLES['lr_schedule']['values'],
                         ids=lambda row: f'{row["schedule"]}-{row["epoch"]}')
def test_learning_rates(row):
    """The published large model, 100 steps per epoch."""
    table, per_epoch = TABLES['lr_schedule'], 100
    config = FlowARConfig(**PRESETS['flowar']['flowar_l'] | dict(
        schedule=row['schedule'], min_lr=row['min_lr']))
    assert (config.warmup_epochs, config.epochs) == (table['warmup_epochs'], table['epochs'])
    assert config.peak_lr(1) == pytest.approx(table['peak_lr'], rel=1e-12)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    lr_wd_annealing(config.lr_schedule, optimizer, config.peak_lr(1), config.weight_decay,
                    config.weight_decay_end or config.weight_decay, round(row['epoch'] * per_epoch),
                    config.warmup_epochs * per_epoch, config.epochs * per_epoch, wp0=config.warmup_start,
                    wpe=config.final_lr_ratio(1))
    group, = optimizer.param_groups
    assert group['lr'] == pytest.approx(row['lr'], rel=1e-12)
    assert group['weight_decay'] == pytest.approx(0.02, rel=1e-12)


@pytest.mark.parametrize('row', TABLES['disa_steps'], ids=lambda row: f'{row["upper"]}-{row["lower"]}')
def test_annealed_steps(row):
    assert annealed_steps(row['upper'], row['lower'], len(SCALES)) == row['steps']
    assert annealed_steps(row['upper'], row['lower'], 1) == [row['lower']]


@pytest.mark.parametrize('row', TABLES['cfg_per_scale'], ids=lambda row: f'{row["cfg"]}')
def test_guidance_per_scale(row, monkeypatch):
    model = small(scale=SCALES, encoder_depth=1)
    seen = spy(model, 'integrate', monkeypatch, replace=True)
    list(model.sample_scales(torch.tensor([0]), cfg=row['cfg'], num_steps=25, lower_steps=15))
    assert [scale for _, _, _, scale, *_ in seen] == pytest.approx(row['values'], rel=1e-12)
    assert [len(grid) - 1 for *_, grid in seen] == [24, 22, 20, 16, 14], 'annealed from 25 to 15'
    assert all(len(z) == 1 + (row['cfg'] > 1) for _, z, *_ in seen), 'no null class without guidance'


@pytest.mark.parametrize('row', TABLES['debias_weights']['values'], ids=lambda row: f'{row["t"]}')
def test_debias_weights(row):
    """The weight of the velocity is that of the noise times (1 - t)^2; six times that has mean 1."""
    t = torch.tensor(row['t'], dtype=torch.float64)
    weight = flowar.LOSS_WEIGHTS['debiased'](t).item()
    assert weight / 6 == pytest.approx(row['velocity_weight'], rel=1e-12)
    assert weight / 6 == pytest.approx(row['eps_weight'] * (1 - row['t']) ** 2, rel=1e-9)
    assert row['eps_weight'] == pytest.approx(row['snr'] ** -0.5, rel=1e-9)
    assert flowar.LOSS_WEIGHTS['uniform'](t) == 1


# ------------------------------------------------------------ published: parts
def test_scales():
    info, t = load_json('flowar/scales'), load_tensors('flowar/scales')
    model = tiny_flowar('attn_mlp_train')
    targets, teacher = model.pyramid(t['latent'])
    assert_near(targets, t['gt_tokens'], info['tolerance'])
    assert_near(teacher, t['teacher_inputs'], info['tolerance'])
    assert [begin for begin, _ in model.layout.spans] + [model.layout.total] == info['scale_offsets']
    assert list(model.mask.shape) == info['mask_shape']
    assert set(model.mask.unique().tolist()) == {0, -torch.inf}
    visible = (model.mask[0, 0] == 0).sum(1)
    expected = torch.tensor(info['mask_visible_keys_per_scale'])
    assert torch.equal(visible, expected.repeat_interleave(torch.tensor(model.layout.lengths)))
    assert (model.mask[0, 0, :, 0] == 0).all(), 'what is visible comes first'
    posterior = Posterior(*t['post_moments'].chunk(2, dim=1))
    for name in ('mean', 'std'):
        assert_near(getattr(posterior, name), t[f'post_{name}'], info['tolerance'])
    assert_near(posterior.kl(), t['post_kl'], info['tolerance'])


@pytest.mark.parametrize('case', load_json('flowar/rope')['cases'], ids=lambda case: case['key'])
def test_rotary_positions(case):
    info, t, key = load_json('flowar/rope'), load_tensors('flowar/rope'), case['key']
    rope, positions = Rope2d(case['head_dim']), grid_positions(case['grid'], 16)
    if f'{key}_token_index' in t:
        positions = positions[t[f'{key}_token_index']]
    assert_near(rope.freqs, t[f'{key}_freqs'], info['tolerance'])
    rotated = rotate(t[f'{key}_x'].transpose(1, 2), rope(positions)).transpose(1, 2)  # stored as BHLd
    assert_near(rotated, t[f'{key}_y'], info['tolerance'])


@pytest.mark.parametrize(('name', 'i'), cases('flow_head') + cases('flow_head_wide', slow=['c1']))
def test_flow_head(name, i):
    info, t = load_json(f'flowar/{name}'), load_tensors(f'flowar/{name}')
    case = info['cases'][i]
    head = FlowHead(case['in_channels'], case['model_channels'], case['z_channels'], case['num_res_blocks'],
                    case['cross'])
    fill(head, flowar_rule(case['weight_seed']), case['weight_key_prefix'])
    if case['keys']:
        assert {key: list(value.shape) for key, value in head.state_dict().items()} == case['keys']
    assert head.res_blocks[0].attn.num_heads == case['num_heads']
    x, z, v = (t[f'c{i}_{part}'] for part in 'xzv')
    with torch.no_grad():
        actual = head(x, torch.tensor(info['timesteps']), z, grid_positions(case['grid'], 16))
    assert_near(actual, v, info['tolerance'])


@pytest.mark.parametrize('name', ['flow_head', 'flow_head_wide'])
def test_embedded_times(name):
    info, t = load_json(f'flowar/{name}'), load_tensors(f'flowar/{name}')
    embedder = fill(TimeEmbedder(info['time_embed_width']), flowar_rule(info['time_embed_weight_seed']),
                    'flownet.time_embed.')
    seen = []
    embedder.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert_near(embedder(t['te_t']), t['te_out'], info['tolerance'])
    assert torch.equal(seen[0], sinusoid(t['te_index'], 256)), 'indices are exact'
    # an index of 1000 multiplies the last bit of a frequency, which differs between processors
    assert_within(seen[0], t['te_sinusoid'], 1000 * 2 ** -24)


# ------------------------------------------------------------ published: training
@pytest.mark.parametrize('name', ['attn_mlp_train', 'attn_crossattn_mlp_train'])
def test_training_loss(name, monkeypatch):
    info, t, model = load_json(f'flowar/{name}'), load_tensors(f'flowar/{name}'), tiny_flowar(name).train()
    tolerance, labels, seen = info['tolerance'], torch.tensor(info['effective_labels']), []
    for key, row in info['state_dict'].items():
        if key != 'mask':
            assert model.state_dict()[key].double().sum().item() == pytest.approx(row['sum'], abs=1e-4), key
    given = given_draws(t['label_drop_u'], t['t'], t['noise'])
    monkeypatch.setattr(GlobalBatch, 'per_image', given)
    model.register_forward_hook(lambda _, args, z: seen.append((args[0], z)))
    loss, aux = model.training_loss(t['latent'], t['labels'])
    (label_B, z), = seen
    assert torch.equal(label_B, labels)
    assert_near(z, t['z'], tolerance['z'])
    assert_near(aux['error_KB'], t['per_sample_scale_mse'], tolerance['per_sample_scale_mse'])
    assert torch.equal(aux['t_KB'], t['t'])
    assert loss.item() == pytest.approx(info['loss'], rel=tolerance['loss']['rtol'])
    shares = torch.tensor(info['loss_weights_per_scale'])
    assert (shares @ aux['error_KB'].mean(1)).item() == pytest.approx(info['loss'], rel=1e-5)
    model.loss_weighting = 'debiased'
    debiased, expected = model.total_loss(aux['error_KB'], aux['t_KB']), info['debias_derived']
    assert debiased.item() == pytest.approx(expected['loss_normalised_by_6'], rel=tolerance['loss']['rtol'])
    assert debiased.item() / 6 == pytest.approx(expected['loss'], rel=tolerance['loss']['rtol'])

    loss.backward()
    grads = named_grads(model)
    assert_norms(grads, info['grad_norms'], tolerance['grad_norm']['rtol'])
    norm = nn.utils.get_total_norm(grads.values()).item()
    assert norm == pytest.approx(info['grad_norm'], rel=tolerance['grad_norm']['rtol'])
    for stored, key in (('z_proj_weight', 'z_proj.weight'), ('decoder_norm', 'decoder_norm.weight'),
                        ('final_linear_weight', 'flownet.final_layer.linear.weight'),
                        ('flow_input_proj_weight', 'flownet.input_proj.weight')):
        assert_near(grads[key], t[f'grad_{stored}'], tolerance['grad'])
    assert_near(grads['class_emb.weight'][labels], t['grad_class_emb_rows'], tolerance['grad'])


@pytest.mark.parametrize('name', ['attn_mlp_train', 'attn_crossattn_mlp_train'])
def test_scale_by_scale_equals_the_masked_trunk(name):
    info, t, model = load_json(f'flowar/{name}'), load_tensors(f'flowar/{name}'), tiny_flowar(name)
    cond_BC = model.class_emb(torch.tensor(info['effective_labels']))
    x_BLC = torch.cat([cond_BC[:, None], model.z_proj(model.pyramid(t['latent'])[1])], dim=1)
    with kv_caching([*model.encoder_blocks, *model.decoder_blocks], capacity=341):
        z = [model.trunk(x_BLC[:, slice(*span)], cond_BC, model.positions(k), slice(*span))
             for k, span in enumerate(model.layout.spans)]
    assert_near(torch.cat(z, dim=1), t['z'], info['tolerance']['z'])


@pytest.fixture(scope='module')
def trajectory():
    """The stored training repeated: model, averaged weights, optimizer groups, and a record of every step."""
    info, t = load_json('flowar/train_steps'), load_tensors('flowar/train_steps')
    model = tiny_flowar('train_steps').train()
    config = info['optimizer']
    _, _, groups = filter_params(model, model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, betas=config['betas'], eps=config['eps'])
    ema = WeightEMA(model, config['ema_rate'], warmup=False)
    posterior = Posterior(*t['moments'].chunk(2, dim=1))
    peak, wd, per_epoch = config['lr_used_as_peak'], config['weight_decay'], config['steps_per_epoch']
    names = {p: name for name, p in model.named_parameters()}

    def norm(weights):
        return nn.utils.get_total_norm([weights[name] for name in names.values()]).item()
    records = []
    for i, step in enumerate(info['steps']):
        lr_wd_annealing(config['lr_schedule'], optimizer, peak, wd, wd, config['start_epoch'] * per_epoch + i,
                        config['warmup_epochs'] * per_epoch, config['epochs'] * per_epoch, wp0=0., wpe=0.)
        latent = 0.2325 * posterior.sample(t[f's{i}_posterior_noise'])
        given = given_draws(*(t[f's{i}_{part}'] for part in ('label_drop_u', 't', 'flow_noise')))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GlobalBatch, 'per_image', given)
            loss, _ = model.training_loss(latent, torch.tensor(step['labels']))
        optimizer.zero_grad()
        loss.backward()
        total = nn.utils.clip_grad_norm_(model.parameters(), config['grad_clip'])
        optimizer.step()
        ema.update()
        records.append(dict(lr=optimizer.param_groups[0]['lr'], loss=loss.item(), grad_norm=total.item(),
                            param_norm=norm(model.state_dict()), ema_norm=norm(ema.weights)))
    plain, = ({names[p] for p in group['params']} for group in groups if group['wd_sc'] == 0)
    return types.SimpleNamespace(info=info, plain=plain, num_parameters=len(names), records=records,
                                 ema=ema.weights, final=model.state_dict())


def test_parameters_without_weight_decay(trajectory):
    plain, info = trajectory.plain, trajectory.info
    assert plain == set(info['no_decay_keys'])
    assert [len(plain), trajectory.num_parameters - len(plain)] == info['n_no_decay_decay_params']


def test_losses_of_a_training(trajectory):
    rtol = {name: tolerance['rtol'] for name, tolerance in trajectory.info['tolerance'].items()
            if 'rtol' in tolerance}
    for record, step in zip(trajectory.records, trajectory.info['steps'], strict=True):
        assert record['lr'] == pytest.approx(step['lr'], rel=1e-12)
        assert record['loss'] == pytest.approx(step['loss'], rel=rtol['loss'])
        assert record['grad_norm'] == pytest.approx(step['grad_norm_before_clip'], rel=rtol['grad_norm'])
        assert record['param_norm'] == pytest.approx(step['param_norm'], rel=rtol['norms'])
        assert record['ema_norm'] == pytest.approx(step['ema_norm'], rel=rtol['norms'])


def test_norms_after_a_training(trajectory):
    rtol = trajectory.info['tolerance']['norms']['rtol']
    for key, expected in trajectory.info['final_param_norms'].items():
        assert trajectory.final[key].norm().item() == pytest.approx(expected, rel=rtol), key


@pytest.mark.parametrize('kind', ['final', 'ema'])
def test_weights_after_a_training(trajectory, kind):
    stored = {key.removeprefix(f'{kind}.'): t for key, t in load_tensors('flowar/train_steps').items()
              if key.startswith(f'{kind}.')}
    assert len(stored) == 4
    for key, expected in stored.items():
        assert_near(getattr(trajectory, kind)[key], expected, trajectory.info['tolerance']['final'])


# ------------------------------------------------------------ published: sampling
@pytest.mark.parametrize(('name', 'i'), cases('attn_mlp_sample', slow=['out1'])
                         + cases('attn_crossattn_mlp_sample', slow=['out3']))
def test_sampling(name, i):
    """With the settings of the command line; the null class needs no noise."""
    info, t, model = load_json(f'flowar/{name}'), load_tensors(f'flowar/{name}'), tiny_flowar(name)
    case = info['cases'][i]
    taken = ['flow_upper_steps', 'flow_lower_steps'] if case['disa'] else ['num_step']
    config = FlowARSampleConfig(ckpt='a file', **{key: case[key] for key in ('cfg', 'guidance', *taken)})
    options = config.sample_kwargs()
    options['cfg'] = options.pop('guidance')
    steps = list(model.sample_scales(torch.tensor(info['labels']), rng=given_noise(name), **options))
    assert_near(steps[-1].latent_BZnn, t[case['key']], info['tolerance'])
    assert steps[-1].latent_BZnn.shape == torch.Size(case['out_shape'])
    for step, side, expected in zip(steps, SCALES, case['per_scale'], strict=True):
        num_cond, num_null = step.evaluations
        assert num_cond == expected['euler_steps']
        assert (num_null > 0) == (expected['cfg'] > 1)
        if i == 0:
            assert_near(flowar.to_tokens(step.latent_BZnn), t[f'out0_scale{side}_tokens'], info['tolerance'])
    indices = case['time_indices_last_scale']
    num_guided = sum(index <= 1000 * case['guidance'] for index in indices) * (case['cfg'] > 1)
    assert steps[-1].evaluations == (len(indices), num_guided)


@pytest.mark.slow
def test_published_small_model():
    """About 1 GB."""
    name = 'flowar_small_full'
    info, t = load_json(f'flowar/{name}'), load_tensors(f'flowar/{name}')
    tolerance, label = info['tolerance'], torch.tensor([info['label']])
    config = FlowARConfig(**PRESETS['flowar']['flowar_s'])
    model = fill(FlowAR(Latents(), **model_arguments(config)), flowar_rule(info['weight_seed'])).eval()
    with torch.no_grad():
        targets, teacher = model.pyramid(t['latent'])
        z = model(label, teacher)
        error_KB = model.velocity_error(targets, z, t['t'], t['noise'])
    assert_near(z[:, t['z_token_index'], :64], t['z_rows'], tolerance['z'])
    assert (z.mean().item(), z.std().item()) == pytest.approx((info['z_mean'], info['z_std']), rel=1e-4)
    assert_near(error_KB, t['per_sample_scale_mse'], tolerance['per_sample_scale_mse'])
    loss = model.total_loss(error_KB, t['t']).item()
    assert loss == pytest.approx(info['loss'], rel=tolerance['loss']['rtol'])
    sampling = info['sampling']
    *_, last = model.sample_scales(label, cfg=sampling['cfg'], guidance_until=sampling['guidance'],
                                   num_steps=sampling['num_step'], rng=given_noise(name))
    assert_near(last.latent_BZnn, t['sample_out'], tolerance['sample'])


# ------------------------------------------------------------ published: weights
@pytest.mark.parametrize(('size', 'num_parameters', 'num_keys'), [
    ('small', 171_718_072, 204), ('large', 586_862_912, 484), ('huge', 1_913_316_880, 666)])
def test_published_sizes(size, num_parameters, num_keys):
    info = load_json('flowar/state_dict_keys')[f'flowar_{size}']
    kwargs = model_arguments(FlowARConfig(**PRESETS['flowar'][f'flowar_{size[0]}']))
    assert (kwargs['diffloss_d'], kwargs['diffloss_w']) == (info['diffloss_d'], info['diffloss_w'])
    with torch.device('meta'):
        model = FlowAR(Latents(), **kwargs)
    state = model.state_dict()
    assert {name: list(t.shape) for name, t in state.items()} == info['keys'] and len(state) == num_keys
    assert sum(p.numel() for p in model.parameters()) == info['parameters_total'] == num_parameters
    assert sum(p.numel() for p in model.flownet.parameters()) == info['parameters_flow_head']

    state['mask'] = ScaleLayout(SCALES).causal_bias()[None, None]  # the only values that tell something
    told = FlowAR.kwargs_from_state_dict(state)
    assert (told.pop('vocab_size'), told.pop('channels')) == (None, 16)
    assert (told.pop('num_classes'), told.pop('mlp_ratio')) == (1000, 4.)
    assert told == {name: kwargs[name] for name in told}


def test_foreign_weights():
    with pytest.raises(ValueError, match=r'a file is a FlowAR with diffloss_d=3 \(here 2\)'):
        load_weights(small(), small(diffloss_d=3).state_dict(), 'a file')
    with pytest.raises(ValueError, match=r'cross=True \(here False\)'):
        load_weights(small(), small(cross=True).state_dict(), 'a file')
    with pytest.raises(ValueError, match='a file holds no FlowAR weights'):
        load_weights(small(), dict(weight=torch.zeros(1)), 'a file')


@pytest.mark.parametrize('layout', ['flat', 'model', 'model_ema'])
def test_published_layouts(tmp_path, layout):
    """A released file is flat; a checkpoint has raw weights and averaged ones, which are preferred."""
    tokenizer = AutoencoderKL(embed_dim=4, net='tiny', test_mode=True)
    source = small(tokenizer)
    state, other = source.state_dict(), FlowAR(tokenizer, **SMALL).state_dict()
    content = dict(flat=state, model=dict(model=state, model_ema=other, epoch=1),
                   model_ema=dict(model=other, model_ema=state, epoch=1))[layout]
    torch.save(content, tmp_path / 'file.pth')
    weights = model_weights(load_file(tmp_path / 'file.pth'), 'raw' if layout == 'model' else 'ema')
    loaded = build_generator('flowar', weights, tokenizer.state_dict(), 'a file', 'cpu')
    assert not loaded.training
    options = dict(guidance=2., num_steps=2)
    images = loaded.sample([0, 1], rng=ImageNoise(0, [0, 1]), **options)
    assert images.shape == (2, 3, 32, 32) and 0 <= images.min() < images.max() <= 1
    assert torch.equal(images, source.sample([0, 1], rng=ImageNoise(0, [0, 1]), **options))


# ------------------------------------------------------------ sampling
@pytest.mark.parametrize('scale', [(1,), (1, 2), (1, 2, 4, 8), (1, 4)], ids=str)
def test_cached_sampling_equals_teacher_forcing(scale, monkeypatch):
    """Conditions of what was drawn, of the labels and of the null class, are those of one masked pass."""
    model = small(scale=scale)
    seen = spy(model, 'integrate', monkeypatch)
    steps = list(model.sample_scales(torch.tensor([1, 4]), cfg=3., num_steps=3, rng=ImageNoise(0, [0, 1])))
    cached = torch.cat([z for _, z, *_ in seen], dim=1)
    inputs = [model.next_input(step.latent_BZnn, step.k) for step in steps[:-1]]
    teacher = torch.cat([torch.empty(2, 0, 4), *inputs], dim=1).repeat(2, 1, 1)
    with torch.no_grad():
        assert_within(cached, model(torch.tensor([1, 4, 5, 5]), teacher), 2e-5)
    assert all(block.attn.cache is None for block in [*model.encoder_blocks, *model.decoder_blocks])


def test_finer_scales_do_not_change_coarser_ones():
    model = small(scale=(1, 2, 4, 8))
    teacher, label = model.pyramid(latents(side=8))[1], torch.tensor([0, 1, 2])
    with torch.no_grad():
        z, begin = model(label, teacher), model.layout.spans[2][0]
        teacher[:, begin - 1:] += 1  # of the third scale on: the first has no teacher input
        other = model(label, teacher)
    assert_within(other[:, :begin], z[:, :begin], 1e-6)
    assert (other - z)[:, begin:].abs().amax((0, 2)).min() > 1e-2, 'a scale sees all of itself'


def test_teacher_inputs_are_those_of_sampling():
    """With the targets for results, sampling resizes to what training saw, latents of any side alike."""
    model, x = small(scale=(1, 2, 4, 8)), latents(side=8)
    targets, teacher = model.pyramid(x)
    for k, side in enumerate((1, 2, 4)):
        begin, end = model.layout.spans[k + 1]
        target = targets[:, slice(*model.layout.spans[k])].transpose(1, 2).reshape(3, 4, side, side)
        assert_within(model.next_input(target, k), teacher[:, begin - 1:end - 1], 1e-6)
    assert torch.equal(targets[:, -64:], x.flatten(2).transpose(1, 2)), 'the last scale is the latent'


@pytest.mark.parametrize('num_steps', [2, 7, 25, 50])
def test_straight_paths_are_solved_exactly(num_steps, monkeypatch):
    """With the velocity noise - x of a known x, any number of steps ends at x."""
    model, x = small(), flowar.to_tokens(latents(side=4))
    noise = torch.randn_like(x)
    monkeypatch.setattr(model.flownet, 'velocity', lambda x_t, t, conditions, positions: noise - x)
    z = torch.zeros(*x.shape[:2], model.C)
    drawn, evaluations = model.integrate(noise, z, 2, 1., 0.9, time_grid(num_steps))
    assert_within(drawn, x, 1e-6)
    assert evaluations == (num_steps // 2 * 2, 0)


def test_guidance_draws_no_noise(model):
    """The null class has no state of its own: the noise is that of the images alone, guided or not."""
    states = []
    for cfg in (1., 3.):
        rng = torch.Generator().manual_seed(0)
        steps = list(model.sample_scales(torch.tensor([1, 2]), cfg=cfg, num_steps=4, rng=rng))
        states.append((rng.get_state(), steps[0].latent_BZnn, steps[-1].latent_BZnn))
    (plain_rng, plain_first, plain_last), (rng, first, last) = states
    assert torch.equal(rng, plain_rng)
    assert_within(first, plain_first, 1e-5)  # the first scale is never guided
    assert (last - plain_last).abs().max() > 1e-2


def test_no_guidance_is_plain_sampling(model):
    """At cfg 1 and below, and where no time is guided; the null class then takes no part."""
    plain = draw(model, [1, 4])
    assert torch.equal(draw(model, [1, 4], cfg=0.5), plain)
    assert_within(draw(model, [1, 4], cfg=3., guidance_until=0.), plain, 1e-5)
    assert (draw(model, [1, 4], cfg=3., guidance_until=0.25) - plain).abs().max() > 1e-2
    null = model.class_emb.weight[5].clone()
    try:
        with torch.no_grad():
            model.class_emb.weight[5] = torch.nan
        assert torch.equal(draw(model, [1, 4], cfg=0.5), plain)
        assert draw(model, [1, 4], cfg=3.).isnan().any()
    finally:
        with torch.no_grad():
            model.class_emb.weight[5] = null


def test_guided_null_class_is_the_null_class(model):
    assert_within(draw(model, [5, 5], cfg=3.), draw(model, [5, 5]), 1e-4)


def test_guidance_of_one_step(model):
    """x moves by null + s (cond - null) where the time is guided, by cond where it is not."""
    label, null = torch.tensor([1, 4]), torch.tensor([5, 5])
    noise, positions = flowar.to_tokens(latents(batch=2)), model.positions(2)
    with torch.no_grad():
        teacher = model.pyramid(latents(batch=4))[1]
        z = model(torch.cat([label, null]), teacher)[:, -16:]

        def velocity(x, t, z):
            return model.flownet(x, torch.full((2,), t), z, positions)
        drawn, evaluations = model.integrate(noise, z, 2, 2.5, 0.9, time_grid(2))
        x = noise - 0.75 * velocity(noise, 1., z[:2])
        cond, uncond = velocity(x, 0.25, z[:2]), velocity(x, 0.25, z[2:])
    assert_within(drawn, x - 0.25 * (uncond + 2.5 * (cond - uncond)), 1e-5)
    assert evaluations == (2, 1)


def test_sample_decodes_the_last_scale(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, 'decode', torch.tanh, raising=False)
    images = model.sample([1, 2], guidance=2., num_steps=4, rng=ImageNoise(0, [0, 1]))
    last = draw(model, [1, 2], cfg=2.)[:, -16:].transpose(1, 2).reshape(2, 4, 4, 4)
    assert_within(images, (last.tanh() + 1) / 2, 1e-6)


# ------------------------------------------------------------ normal noise keyed by the image
@pytest.mark.parametrize('seed', range(4))
def test_image_noise_is_normal(seed):
    """Kolmogorov-Smirnov distance below its 0.1 % quantile 1.95 / sqrt(n); mean 0 and variance 1."""
    noise = ImageNoise(seed, list(range(16))).normal_like(torch.empty(16, 16_384)).double()
    for sample in (noise.flatten(), noise[0], noise[:, 0:8].flatten()):
        n = len(sample)
        cdf = torch.special.ndtr(sample.sort().values)
        ranks = torch.arange(n + 1, dtype=torch.float64) / n
        assert max((ranks[1:] - cdf).max(), (cdf - ranks[:-1]).max()).item() < 1.95 / n ** 0.5
        assert sample.mean().item() == pytest.approx(0, abs=4 / n ** 0.5)
    assert noise.var().item() == pytest.approx(1, abs=4 * 2 ** 0.5 / noise.numel() ** 0.5)


@pytest.mark.parametrize('batch', [[5], [0, 5], [9, 2, 5, 7]])
def test_normal_noise_ignores_the_batch(batch):
    alone, together = ImageNoise(3, [5]), ImageNoise(3, batch)
    for shape in ((4, 16), (16, 16)):
        expected = alone.normal_like(torch.empty(1, *shape))[0]
        noise = together.normal_like(torch.empty(len(batch), *shape))
        assert torch.equal(noise[batch.index(5)], expected) and noise.dtype == torch.float32


def test_normal_noise_is_never_infinite(monkeypatch):
    """Its largest values, at the ends of the uniform grid, are those of the normal distribution there."""
    ends = torch.tensor([[2. ** -24, 1 - 2. ** -24]])
    monkeypatch.setattr(ImageNoise, 'uniform_like', lambda self, t: ends.clone())
    noise = ImageNoise(0, [0]).normal_like(torch.empty(1, 2))
    assert_within(torch.special.ndtri(ends.double()).float(), noise, 2e-3)
    assert noise[0].tolist() == pytest.approx([-5.29, 5.29], abs=0.01)


@pytest.mark.parametrize(('image', 'element'), [(116, 19766), (233, 8028), (446, 48515), (571, 22054)])
def test_normal_noise_at_the_ends_of_the_uniform_one(image, element):
    """Counters of seed 0 whose 24 high bits are all ones."""
    noise = ImageNoise(0, [image]).normal_like(torch.empty(1, 48_600))
    assert noise[0, element] == noise.max() and 5 < noise.max() < 6 and noise.isfinite().all()


# ------------------------------------------------------------ training
def test_labels_are_dropped_in_training_only():
    model, label, seen = small(label_drop_prob=0.3, scale=(1, 2)), torch.arange(1000) % 5, []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for mode in (False, True):
            model.train(mode).training_loss(latents(batch=1000, side=2), label)
    kept, dropped = seen
    assert torch.equal(kept, label)
    assert set(dropped[dropped != label].tolist()) == {5}
    assert (dropped == 5).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_gradient_checkpointing_changes_nothing():
    """Loss and gradients are equal, dropout included; the blocks of the trunk run twice."""
    x, label, results = latents(), torch.tensor([0, 1, 2]), []
    for use_checkpoint in (False, True):
        model, calls = small(use_checkpoint=use_checkpoint, attn_dropout=0.2, proj_dropout=0.2).train(), []
        for block in [*model.encoder_blocks, *model.decoder_blocks]:
            block.mlp.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        torch.manual_seed(0)
        loss, _ = model.training_loss(x, label)
        loss.backward()
        results.append((loss, named_grads(model), len(calls)))
    (loss, grads, num_calls), (other_loss, other_grads, other_calls) = results
    assert torch.equal(loss, other_loss) and (num_calls, other_calls) == (3, 6)
    for name, grad in grads.items():
        assert_within(other_grads[name], grad, 1e-7)


def test_dropout_is_of_the_trunk_in_training():
    model, label = small(attn_dropout=0.3, proj_dropout=0.3), torch.tensor([0, 1, 2])
    teacher = model.pyramid(latents())[1]
    with torch.no_grad():
        z = model(label, teacher)
        assert torch.equal(z, model(label, teacher)) and torch.equal(z, small()(label, teacher))
        assert not torch.equal(model.train()(label, teacher), model(label, teacher))
        args = torch.randn(3, 16, 4), torch.rand(3), z[:, -16:], model.positions(2)
        assert torch.equal(model.flownet(*args), model.flownet(*args))


def test_draws_of_an_image_follow_its_place_in_the_global_batch(model):
    x, label = latents(batch=4), torch.tensor([0, 1, 2, 3])
    model.train()
    with torch.no_grad():
        torch.manual_seed(5)
        whole = model.training_loss(x, label)[1]
        for start in (0, 2):
            rows = slice(start, start + 2)
            torch.manual_seed(5)
            with GlobalBatch(start, 4):
                part = model.training_loss(x[rows], label[rows])[1]
            assert torch.equal(part['t_KB'], whole['t_KB'][:, rows])
            assert_within(part['error_KB'], whole['error_KB'][:, rows], 1e-5)
    model.eval()


def test_metrics(model):
    """The loss counts every token alike, divided by the tokens of the last scale."""
    with torch.no_grad():
        loss, aux = model.training_loss(latents(), torch.tensor([0, 1, 2]))
    metrics = {name: value.item() for name, value in model.metrics(aux).items()}
    error_K = aux['error_KB'].mean(1).tolist()
    assert loss.item() == pytest.approx(metrics['L_mean'], rel=1e-5)
    assert metrics['L_mean'] == pytest.approx((error_K[0] + 4 * error_K[1] + 16 * error_K[2]) / 16, rel=1e-5)
    assert [metrics[name] for name in ('L_16', 'L_32', 'L_64')] == pytest.approx(error_K)
    assert metrics['L_tail'] == metrics['L_64'] and set(model.headline.values()) < set(metrics)


def test_velocity_error_of_the_true_velocity_is_zero(monkeypatch):
    """x_t = (1 - t) x + t noise moves by noise - x: from data at t = 0 to noise at t = 1."""
    model, label = small(), torch.tensor([0, 1])
    targets, teacher = model.pyramid(latents(batch=2))
    noise, seen = torch.randn_like(targets), []

    def true_velocity(x_t, t, z, positions):
        begin, end = model.layout.spans[len(seen)]
        seen.append(x_t)
        return (noise - targets)[:, begin:end]
    monkeypatch.setattr(model.flownet, 'forward', true_velocity)
    t_KB = torch.tensor([[0., 1.], [0.25, 0.5], [1., 0.]])
    error_KB = model.velocity_error(targets, model(label, teacher), t_KB, noise)
    assert torch.equal(error_KB, torch.zeros(3, 2))
    assert torch.equal(seen[2][0], noise[0, 5:]) and torch.equal(seen[2][1], targets[1, 5:])
    assert_within(seen[1][0], 0.75 * targets[0, 1:5] + 0.25 * noise[0, 1:5], 1e-6)


def test_initial_weights():
    """As published, the last layer of the head and the modulations do not begin at zero."""
    model = FlowAR(Latents(), **SMALL | dict(encoder_embed_dim=128, decoder_embed_dim=128))
    for name, p in model.named_parameters():
        if name.endswith('.bias'):
            assert not p.any(), name
        elif name == 'class_emb.weight' or name.endswith('pos_embed_learned'):
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            bound = (6 / sum(p.shape)) ** 0.5
            assert 0.9 * bound < p.abs().max() <= bound, name


# ------------------------------------------------------------ errors
@pytest.mark.parametrize(('call', 'message'), [
    (lambda m: draw(m, [1], num_steps=1), 'at least 2 steps of the flow head, got 1: pass 25'),
    (lambda m: draw(m, [1], lower_steps=1), 'at least 2 steps of the flow head, got 1: pass 25'),
    (lambda m: small(encoder_embed_dim=64), 'expected equal widths, got 64 and 32'),
    (lambda m: small(buffer_size=4), 'only buffer_size=0 and patch_size=1 are supported, got 4 and 1'),
    (lambda m: small(patch_size=2), 'only buffer_size=0 and patch_size=1 are supported, got 0 and 2'),
    (lambda m: small(loss_weighting='snr'), "must be one of uniform, debiased, got 'snr'"),
    (lambda m: small(encoder_num_heads=16), 'a head width that is a multiple of 4, got 2'),
    (lambda m: m.sample([6], rng=ImageNoise(0, [0])), r'expected labels in 0\.\.5 .*got 6'),
    (lambda m: m.pyramid(latents(side=8)), 'expected latents of 4x4, got 8x8'),
    (lambda m: FlowARSampleConfig(ckpt='a file', num_step=1), 'must be at least 2, got 1 to 1'),
    (lambda m: FlowARSampleConfig(ckpt='a file', flow_upper_steps=25, flow_lower_steps=1),
     'must be at least 2, got 25 to 1'),
    (lambda m: FlowARSampleConfig(ckpt='a file', guidance=4.3), r'a time in \[0, 1\], got 4.3'),
    (lambda m: FlowARSampleConfig(ckpt='a file', temperature=0.9), 'must be 1 and --cfg_schedule linear'),
    (lambda m: FlowARConfig(latent_patch=2), '--patch_size must be 1, got 2'),
    (lambda m: FlowARConfig(buffer_size=64), '--buffer_size must be 0, got 64'),
    (lambda m: FlowARConfig(loss_weighting='snr'), "--loss_weighting must be uniform or debiased, got 'snr'"),
    (lambda m: FlowARConfig(img_size=240), 'times 2, 4, 8, ..., got 240'),
], ids=itertools.count())
def test_errors(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(block.attn.cache is None for block in [*model.encoder_blocks, *model.decoder_blocks])
    assert not model.training
