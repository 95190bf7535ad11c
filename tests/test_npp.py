"""NPP: the published outputs, and what patches, training and sampling must keep."""
import itertools
import math
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import NPP, VQModel, build_generator, helpers, load_weights, npp
from models.helpers import guide
from models.layers import RMSNorm, Rope2d, rotate
from models.noise import GlobalBatch, ImageNoise
from models.npp import patch_cross_entropy, patches
from tests.vectors import (
    DROPOUTS,
    NO_DROPOUT,
    Codes,
    assert_norms,
    assert_within,
    build_filled,
    fill,
    load_json,
    load_tensors,
    named_grads,
    needs_rng,
    npp_numbers,
    npp_rule,
    tiny_npp,
)
from utils.amp_sc import AmpOptimizer
from utils.ema import WeightEMA
from utils.lr_control import filter_params, lr_wd_annealing

PHASES = ((0.25, 4), (0.5, 2), (1., 1))
SMALL = dict(num_classes=5, dim=32, n_layer=2, n_head=4, ffn_dim=48, grid=4, phases=PHASES)
FORWARD = load_json('npp/gpt_forward')
COMBOS = load_json('npp/generate')['combos']
# layers, heads, width, hidden width; parameters, keys
SIZES = {
    'B': (12, 12, 768, 2048, 110_888_448, 88),
    'L': (24, 16, 1024, 2816, 342_910_976, 172),
    'XL': (36, 20, 1280, 3584, 774_699_520, 256),
    'XXL': (48, 24, 1536, 4096, 1_410_972_672, 340),
    'XXXL': (48, 40, 2560, 6912, 3_893_027_840, 340),
    '1B': (22, 32, 2048, 5632, 1_199_616_000, 158),
    '3B': (24, 32, 3200, 8704, 3_096_659_200, 172),
    '7B': (32, 32, 4096, 11008, 6_614_589_440, 228),
}


def small(tokenizer=None, **overrides):
    """A model over 31 codes that is fast to train and to draw from; nothing in it is zero."""
    model = NPP(tokenizer or Codes(31), **SMALL | NO_DROPOUT | overrides)
    return fill(model, npp_rule).eval()


@pytest.fixture(scope='module')
def model():
    return small()


def codes(batch=3, grid=4):
    return torch.randint(31, (batch, grid ** 2))


def draw(model, labels, images=None, seed=0, **options):
    """Codes of these images of the job `seed`."""
    noise = ImageNoise(seed, images or range(len(labels)))
    return model.sample_tokens(torch.tensor(labels), rng=noise, **options)


def spy(owner, name, monkeypatch):
    """Copies of the first argument of every call, which runs as before."""
    seen, original = [], getattr(owner, name)

    def call(t, *args):
        seen.append(t.clone())
        return original(t, *args)
    monkeypatch.setattr(owner, name, call)
    return seen


def spy_filters(monkeypatch):
    """Logits (B, 1, V) after the filters of every draw that has any."""
    seen, filter_and_draw = [], helpers.sample_with_top_k_top_p_

    def call(logits, *args):
        drawn = filter_and_draw(logits, *args)  # which filters in place
        seen.append(logits)
        return drawn
    monkeypatch.setattr(helpers, 'sample_with_top_k_top_p_', call)
    return seen


def train_pass(model, label_B, idx_BN, p):
    """(logits, loss) of one training pass, whose gradients the model then has."""
    model.zero_grad()
    logits_BPV = model(label_B, idx_BN, p)
    loss = patch_cross_entropy(logits_BPV, patches(idx_BN, p)).mean()
    loss.backward()
    return logits_BPV, loss


# ------------------------------------------------------------ published: parts
def test_fill_rule():
    for name, stored in load_tensors('npp/fill_check').items():
        rule = npp_numbers if name.startswith('input') else npp_rule
        assert torch.equal(torch.from_numpy(rule(name, stored.shape)).float(), stored), name


@pytest.mark.parametrize('row', load_json('npp/rope2d')['tables'], ids=lambda row: row['key'])
def test_rotary_tables(row):
    """Those of a class token are zero."""
    width, skipped = row['head_dim'], 1 - row['cls_token_num']
    model = small(dim=width, n_head=1, rope_base=row['base'])
    table = model.rope_table(row['grid'])
    expected = load_tensors('npp/rope2d')[row['key']].movedim(-1, 0)
    assert_within(table[:, skipped:], expected, 1e-6)
    assert not table[:, 0].any()


def test_rotary_table_of_a_large_grid():
    row, t = load_json('npp/rope2d')['strided_rows'], load_tensors('npp/rope2d')
    table = small(dim=row['head_dim'], n_head=1).rope_table(row['grid'])
    assert_within(table[:, ::row['row_stride']], t['strided_rows'].movedim(-1, 0), 1e-6)


def test_rotation():
    info, t = load_json('npp/rope2d')['apply'], load_tensors('npp/rope2d')
    assert_within(rotate(t['apply_x'], t[info['table']].movedim(-1, 0)), t['apply_y'], 2e-6)
    ticks = torch.arange(3)
    table = Rope2d(16)(torch.cartesian_prod(ticks, ticks))
    assert_within(rotate(t['apply_x'], table), t['apply_y'], 2e-6)


@pytest.mark.parametrize('p', load_json('npp/patchify')['levels'])
def test_patches(p):
    t = load_tensors('npp/patchify')
    assert_within(patches(t['emb'], p).mean(2), t[f'emb_p{p}'], 1e-6)
    assert torch.equal(patches(t['idx'], p), t[f'idx_p{p}'])
    assert torch.equal(patches(t['idx'], 1)[:, :, 0], t['idx'])


def test_modules():
    t, model = load_tensors('npp/gpt_forward'), tiny_npp()
    first, second, _ = model.layers
    table = model.rope_table(8)[:, :5]
    with torch.no_grad():
        assert_within(model.norm(t['mod_x']), t['rmsnorm_y'], 2e-5)
        assert_within(first.feed_forward(t['mod_x']), t['ffn_y'], 2e-5)
        assert_within(first.attention(t['mod_x'], table), t['attn_y'], 2e-5)
        assert_within(second(t['mod_x'], table), t['block_y'], 2e-5)
        null = model.num_classes
        assert_within(model.cls_embedding(torch.tensor([null, 1, null])), t['label_force_drop'], 0)


# ------------------------------------------------------------ published: training
def test_weights_have_the_published_names():
    state = tiny_npp().state_dict()
    assert [(name, list(value.shape)) for name, value in state.items()] == list(FORWARD['keys'].items())
    assert sum(value.numel() for value in state.values()) == FORWARD['n_params']


@pytest.mark.parametrize('p', [int(p) for p in FORWARD['levels']])
def test_forward_and_gradients(p):
    info, t, model = FORWARD['levels'][str(p)], load_tensors('npp/gpt_forward'), tiny_npp().train()
    hidden = []
    for block in model.layers:
        block.register_forward_hook(lambda _, args, out: hidden.append(out[:, :17]))
    logits, loss = train_pass(model, t['cond'], t['idx'], p)
    assert list(logits.shape) == info['logits_shape']
    assert_within(logits, t[f'logits_p{p}'], 1e-4)
    assert loss.item() == pytest.approx(info['loss'], abs=1e-5)
    for i, out in enumerate(hidden):
        if p < 4:
            assert_within(out, t[f'hidden_p{p}_layer{i}'], 1e-4)
    grads = named_grads(model)
    assert_norms(grads, info['grad_norms'], 1e-4)
    assert nn.utils.get_total_norm(grads.values()).item() == pytest.approx(info['grad_norm'], rel=1e-4)
    for name in ('output', 'tok_embeddings'):
        assert_within(grads[f'{name}.weight'][:12], t[f'grad_{name}_p{p}'], 1e-5)


def test_logits_of_a_whole_sequence():
    t, model = load_tensors('npp/gpt_forward'), tiny_npp()
    x_BLC = torch.cat([model.cls_embedding(t['cond']), model.tok_embeddings(t['idx'])], dim=1)
    with torch.no_grad():
        logits = model.output(model.transform(x_BLC, model.rope_table(8))).float()
    assert_within(logits[:, -4:], t['eval_logits_last4'], 1e-4)


@pytest.mark.parametrize('case', FORWARD['seeded_dropout'], ids=lambda case: f'{case["seed"]}-p{case["p"]}')
def test_seeded_dropout(case, monkeypatch):
    """The order of the draws is the published one; no label is drawn there where none can be dropped."""
    needs_rng()
    rates = {name: rate for name, rate in case.items() if name not in ('seed', 'p', 'loss')}
    if 'class_dropout_prob' not in rates:
        monkeypatch.setattr(npp, 'drop_labels', lambda label_B, *_: label_B)
    if 'drop_path_rate' in rates:  # takes the place of these
        rates |= dict(resid_dropout_p=0.5, ffn_dropout_p=0.5)
    model = tiny_npp(phases=((0.5, 2), (1., 1)), **rates).train()
    idx_BN = torch.from_numpy((npp_numbers('input.drop_idx', (4, 64)) + 1) / 2 * 97).long()
    torch.manual_seed(case['seed'])
    loss, _ = model.training_loss(idx_BN, torch.tensor(FORWARD['seeded_dropout_labels']), 1 / case['p'] - 0.1)
    assert loss.item() == pytest.approx(case['loss'], abs=1e-5)


@pytest.fixture(scope='module', params=['runA', 'runB'])
def trajectory(request):
    """A stored training repeated: its weights, raw and averaged, those without decay, and every step."""
    name = request.param
    run, t = load_json('npp/trajectory')['runs'][name], load_tensors('npp/trajectory')
    config, steps = run['config'], run['steps']
    phases = ((config['epoch_rate'], 2), (1., 1)) if config['patch_level'] == 2 else ((1., 1),)
    model = tiny_npp(phases=phases).train()
    names, params, groups = filter_params(model, model.no_weight_decay())
    name_of = dict(zip(params, names, strict=True))
    plain, = ([name_of[p] for p in group['params']] for group in groups if group['wd_sc'] == 0)
    optimizer = torch.optim.AdamW(groups, betas=config['betas'], eps=config['adam_eps'])
    amp = AmpOptimizer(0, optimizer, names, params, config['max_grad_norm'])
    ema = WeightEMA(model, config['ema_decay'], warmup=False)
    wd = config['weight_decay']
    records = []
    for i, step in enumerate(steps):
        lr_wd_annealing('constant', optimizer, step['lr'], wd, wd, i, 0, len(steps))
        loss, aux = model.training_loss(t[f'{name}.x'][i], t[f'{name}.y'][i], i / len(steps))
        norm, _ = amp.backward_clip_step(True, loss)
        ema.update()
        records.append(dict(loss=loss.item(), grad_norm=norm.item(), patch_size=aux['p'] ** 2))
    return types.SimpleNamespace(name=name, run=run, plain=plain, records=records, ema=ema.weights,
                                 final=model.state_dict())


def test_parameters_without_weight_decay(trajectory):
    assert trajectory.plain == trajectory.run['groups']['no_decay']


def test_losses_of_a_training(trajectory):
    for record, step in zip(trajectory.records, trajectory.run['steps'], strict=True):
        assert record['patch_size'] == step['patch_size']
        assert record['loss'] == pytest.approx(step['loss'], abs=1e-4)
        assert record['grad_norm'] == pytest.approx(step['grad_norm'], rel=1e-3)


def test_norms_after_a_training(trajectory):
    for key, expected in trajectory.run['final_l2'].items():
        assert trajectory.final[key].norm().item() == pytest.approx(expected, rel=1e-5), key


@pytest.mark.parametrize('kind', ['final', 'ema'])
def test_weights_after_a_training(trajectory, kind):
    prefix = f'{trajectory.name}.{kind}.'
    stored = {key.removeprefix(prefix): rows for key, rows in load_tensors('npp/trajectory').items()
              if key.startswith(prefix)}
    assert len(stored) == 4
    for key, rows in stored.items():
        assert_within(getattr(trajectory, kind)[key][:len(rows)], rows, 2e-4)


@pytest.mark.parametrize('row', load_json('npp/schedules')['patch_schedule'],
                         ids=lambda row: f'{row["epochs"]}-{row["epoch_rate"]}-{row["patch_level"]}')
def test_patches_of_every_epoch(row):
    """The published schedules that reach single codes; of the others the constructor says so."""
    epochs, ends = row['epochs'], itertools.accumulate(length for _, length in row['run_lengths'])
    phases = [(end / epochs, p) for end, p in zip(ends, row['p'], strict=True)]
    if row['p'][-1] != 1:
        with pytest.raises(ValueError, match=r'the last is \(1, 1\)'):
            small(grid=8, phases=phases)
        return
    model = small(grid=8, phases=phases)
    sides = [model.patch_side(epoch / epochs) for epoch in range(epochs)]
    assert [[p * p, len(list(run))] for p, run in itertools.groupby(sides)] == row['run_lengths']


@pytest.fixture(scope='module')
def gpt_b():
    """The published GPT-B, which takes its weights without being initialised first."""
    model = build_filled(lambda: NPP(Codes(16384), **NO_DROPOUT), npp_rule)
    model.rope = Rope2d(64, persistent=False)
    return model


@pytest.mark.parametrize('p', [8, 4, 2, 1])
def test_published_size(gpt_b, p):
    info, t = load_json('npp/gpt_b_real')['levels'][str(p)], load_tensors('npp/gpt_b_real')
    with torch.no_grad():
        logits = gpt_b(t['cond'], t['idx'], p)
    assert list(logits.shape) == info['logits_shape']
    assert_within(logits[:, ::info['row_stride'], ::info['vocab_stride']], t[f'logits_p{p}'], 5e-4)
    loss = patch_cross_entropy(logits, patches(t['idx'], p)).mean()
    assert loss.item() == pytest.approx(info['loss'], abs=2e-5)


# ------------------------------------------------------------ published: sampling
@pytest.fixture
def sharp():
    model = tiny_npp()
    with torch.no_grad():
        model.output.weight *= 4
    return model


@pytest.mark.parametrize('combo', COMBOS, ids=lambda combo: str(combo['i']))
def test_sampling(sharp, combo, monkeypatch):
    if combo['sample_logits']:
        needs_rng()
    i, t = combo['i'], load_tensors('npp/generate')
    guided, filtered = spy(sharp, 'draw', monkeypatch), spy_filters(monkeypatch)
    torch.manual_seed(combo['seed'] or 0)
    settings = {name: combo[name] for name in ('cfg_interval', 'temperature', 'top_k', 'top_p')}
    tokens = sharp.sample_tokens(t['labels'], guidance=combo['cfg_scale'], greedy=not combo['sample_logits'],
                                 **settings)
    assert torch.equal(tokens, t[f'tokens_{i}'])
    if f'guided_logits_{i}' in t:
        assert_within(torch.cat(guided, dim=1), t[f'guided_logits_{i}'], 2e-4)
    if combo['sample_logits']:
        probs = torch.cat(filtered, dim=1).softmax(2)
        num_kept = (probs > 0).sum(2)
        assert (num_kept.min(), num_kept.max()) == (combo['min_kept'], combo['max_kept'])
        if f'probs_{i}' in t:
            assert_within(probs, t[f'probs_{i}'], 1e-5)


def test_teacher_forced_logits(monkeypatch):
    """Of one pass, and of sampling that draws just these codes."""
    info, t = load_json('npp/generate')['teacher_forced'], load_tensors('npp/generate')
    model, label_B = tiny_npp(), t['labels'][:2]
    x_BLC = torch.cat([model.cls_embedding(label_B), model.tok_embeddings(t['tf_tokens'])], dim=1)
    with torch.no_grad():
        logits = model.output(model.transform(x_BLC, model.rope_table(8))).float()
    assert list(logits.shape) == info['shape']
    assert_within(logits[:, ::info['stride']], t['tf_logits'], 2e-4)
    given, seen = iter(t['tf_tokens'].split(1, dim=1)), []

    def given_codes(logits_B1V, *_):
        seen.append(logits_B1V)
        return next(given)
    monkeypatch.setattr(model, 'draw', given_codes)
    model.sample_tokens(label_B)
    assert_within(torch.cat(seen, dim=1)[:, ::info['stride']], t['tf_logits'][:, :-1], 2e-4)


@pytest.mark.parametrize(('j', 'top_k', 'top_p'), [
    (j, *pair) for j, pair in enumerate(load_json('npp/generate')['filter'])])
def test_filters(j, top_k, top_p, monkeypatch):
    """What `draw` leaves of the logits."""
    t, model, filtered = load_tensors('npp/generate'), small(Codes(20)), spy_filters(monkeypatch)
    drawn = model.draw(t['filter_in'][:, None], 1., top_k, top_p, False, None)
    keep_BV = filtered[0][:, 0].isfinite() if filtered else F.one_hot(drawn[:, 0], 20).bool()
    assert torch.equal(keep_BV, t[f'filter_{j}_keep'].bool())


# ------------------------------------------------------------ published: weights
@pytest.mark.parametrize('size', SIZES)
def test_published_sizes(size):
    """Names, shapes, numbers; the norms alone have no weight decay; weights tell all that they can."""
    n_layer, n_head, dim, hidden, num_parameters, num_keys = SIZES[size]
    with torch.device('meta'):
        model = NPP(Codes(16384), dim=dim, n_layer=n_layer, n_head=n_head)
    block = {'attention.wqkv': (3 * dim, dim), 'attention.wo': (dim, dim), 'feed_forward.w1': (hidden, dim),
             'feed_forward.w3': (hidden, dim), 'feed_forward.w2': (dim, hidden), 'attention_norm': (dim,),
             'ffn_norm': (dim,)}
    parts = {'cls_embedding.embedding_table': (1001, dim), 'tok_embeddings': (16384, dim), 'norm': (dim,),
             'output': (16384, dim)}
    parts |= {f'layers.{i}.{name}': shape for i in range(n_layer) for name, shape in block.items()}
    state = model.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} \
        == {f'{name}.weight': shape for name, shape in parts.items()}
    assert (sum(t.numel() for t in state.values()), len(state)) == (num_parameters, num_keys)
    plain, = (group['params'] for group in filter_params(model)[2] if group['wd_sc'] == 0)
    assert sum(p.numel() for p in plain) == (2 * n_layer + 1) * dim
    assert NPP.kwargs_from_state_dict(state) == dict(
        num_classes=1000, dim=dim, n_layer=n_layer, n_head=n_head, n_kv_head=n_head, ffn_dim=hidden,
        vocab_size=16384)


@pytest.mark.parametrize(('dim', 'n_kv_head'), [(128, 2), (192, 1)])
def test_weights_tell_heads_of_64_channels(dim, n_kv_head):
    state = small(dim=dim, n_head=dim // 64, n_kv_head=n_kv_head).state_dict()
    told = NPP.kwargs_from_state_dict(state) | NPP.kwargs_from_config({})
    assert (told['n_head'], told['n_kv_head']) == (dim // 64, n_kv_head) and 'grid' not in told


def test_foreign_weights():
    with pytest.raises(ValueError, match=r'a file is a NPP with n_layer=3 \(here 2\)'):
        load_weights(small(), small(n_layer=3).state_dict(), 'a file')
    with pytest.raises(ValueError, match=r'vocab_size=20 \(here 31\)'):
        load_weights(small(), small(Codes(20)).state_dict(), 'a file')
    with pytest.raises(ValueError, match='a file holds no NPP weights'):
        load_weights(small(), dict(weight=torch.zeros(1)), 'a file')
    tokenizer = VQModel(20, 8, z_channels=16, net='tiny')
    with pytest.raises(ValueError, match='a file needs a tokenizer with vocab_size=31, got 20'):
        build_generator('npp', small().state_dict(), tokenizer.state_dict(), 'a file', 'cpu')


def test_initial_weights():
    """Spreads of the published model; the first loss is ln V whatever the patches are."""
    model = NPP(Codes(1024), n_layer=1, phases=PHASES)
    state = model.state_dict()
    for name, expected in load_json('npp/gpt_b_real')['initial_std'].items():
        assert state[name].std().item() == pytest.approx(expected, rel=0.01), name
        assert state[name].ndim > 1 or (state[name] == 1).all(), name
    for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
        assert norm(torch.full((768,), 1e-3)).mean().item() == pytest.approx(1e-3 / 1.1e-5 ** 0.5)  # eps 1e-5
    for progress in (0., 0.3, 0.9):
        loss, _ = model.training_loss(torch.randint(1024, (2, 256)), torch.tensor([0, 999]), progress)
        assert loss.item() == pytest.approx(math.log(1024), abs=1e-5)


# ------------------------------------------------------------ patches
@pytest.mark.parametrize('p', [1, 2, 4])
def test_patches_do_not_see_later_ones(p):
    """Another code in a patch changes the logits of every later patch, and of no other."""
    model, idx_BN, label_B = small(grid=8), codes(grid=8), torch.tensor([0, 3, 5])
    order = patches(torch.arange(64)[None], p)[0]
    with torch.no_grad():
        logits = model(label_B, idx_BN, p)
        for j in range(0, len(order), max(1, len(order) // 4)):
            other = idx_BN.clone()
            other[:, order[j, -1]] = (other[:, order[j, -1]] + 1) % 31
            change = (model(label_B, other, p) - logits).abs()
            assert change[:, :j + 1].max() <= 1e-6
            assert j + 1 == len(order) or change[:, j + 1:].amax(2).min() > 1e-4
        change = (model((label_B + 1) % 6, idx_BN, p) - logits).abs()
        assert change.amax(2).min() > 1e-4, 'everything sees the class'


@pytest.mark.parametrize('p', [2, 4])
def test_codes_of_a_patch_have_no_order(model, p):
    idx_BN, label_B = codes(), torch.tensor([0, 3, 5])
    place = patches(torch.arange(16)[None], p)[0]
    shuffled = idx_BN.clone()
    shuffled[:, place] = idx_BN[:, place.flip(1)]
    with torch.no_grad():
        logits, other = model(label_B, idx_BN, p), model(label_B, shuffled, p)
        assert_within(other, logits, 1e-5)
        loss = patch_cross_entropy(logits, patches(idx_BN, p)).mean()
        assert_within(patch_cross_entropy(other, patches(shuffled, p)).mean(), loss, 1e-6)
        assert not torch.equal(model(label_B, idx_BN), model(label_B, shuffled))


def replicated_loss(logits_BPV, idx_BPM):
    """Plain cross-entropy of logits repeated for every code of a patch."""
    repeated = logits_BPV.repeat_interleave(idx_BPM.shape[2], dim=1)
    return F.cross_entropy(repeated.flatten(0, 1), idx_BPM.flatten())


@pytest.mark.parametrize('p', [1, 2, 4])
def test_patch_loss_is_the_cross_entropy_of_every_code(p):
    idx_BPM, results = patches(codes(grid=8), p), []
    logits_BPV = 3 * torch.randn(3, 64 // p ** 2, 31)
    for loss_of in (patch_cross_entropy, replicated_loss):
        leaf = logits_BPV.clone().requires_grad_()
        loss = loss_of(leaf, idx_BPM).mean()
        loss.backward()
        results.append((loss, leaf.grad))
    (loss, grad), (expected, expected_grad) = results
    assert_within(loss, expected.detach(), 1e-6)
    assert_within(grad, expected_grad, 1e-7)


class AllocatedBytes(TorchDispatchMode):
    """Bytes of all that is computed inside, were nothing ever freed."""

    def __init__(self):
        super().__init__()
        self.kept = []  # so that no address comes twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.kept += [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out

    @property
    def total(self):
        storages = [t.untyped_storage() for t in self.kept]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_patch_loss_never_repeats_the_logits():
    """16,384 codes, patches of 16: forward and backward take less than the repeated logits alone."""
    idx_BPM = patches(torch.randint(16384, (4, 256)), 4)
    logits_BPV = torch.randn(4, 16, 16384, requires_grad=True)
    with AllocatedBytes() as allocated:
        patch_cross_entropy(logits_BPV, idx_BPM).mean().backward()
    assert allocated.total < 8 * logits_BPV.nbytes < idx_BPM.shape[2] * logits_BPV.nbytes
    with AllocatedBytes() as repeated:
        replicated_loss(logits_BPV, idx_BPM).backward()
    assert allocated.total < repeated.total / 8


def test_patch_sides_of_the_phases(model):
    sides = [model.patch_side(progress) for progress in (0., 0.2499, 0.25, 0.4999, 0.5, 0.99, 1.)]
    assert sides == [4, 4, 2, 2, 1, 1, 1]
    assert small(phases=((1., 1),)).patch_side(0.) == 1


# ------------------------------------------------------------ training
@pytest.mark.parametrize(('progress', 'p'), [(0., 4), (0.3, 2), (0.5, 1), (1., 1)])
def test_metrics(model, progress, p):
    idx_BN, label_B = codes(), torch.tensor([0, 3, 5])
    with torch.no_grad():
        loss, aux = model.training_loss(idx_BN, label_B, progress)
        logits = model(label_B, idx_BN, p)
        expected = replicated_loss(logits, patches(idx_BN, p))
    metrics = {name: value.item() for name, value in model.metrics(aux).items()}
    assert metrics['L_mean'] == loss.item() == pytest.approx(expected.item())
    likeliest = logits.argmax(2).repeat_interleave(p * p, dim=1)
    hits = likeliest == patches(idx_BN, p).flatten(1)
    assert metrics['acc_mean'] == pytest.approx(100 * hits.double().mean().item())
    assert metrics['prog_patch'] == p
    assert {*model.headline.values(), model.selection} < set(metrics)


def test_a_single_patch_trains_the_embeddings_with_zero(model):
    """Gradients that are missing would stop a distributed training."""
    model.zero_grad()
    logits_BPV, _ = train_pass(model, torch.tensor([0, 3, 5]), codes(), p=4)
    grads = named_grads(model)
    assert logits_BPV.shape == (3, 1, 31) and set(grads) == {name for name, _ in model.named_parameters()}
    assert {name for name, grad in grads.items() if not grad.any()} == {'tok_embeddings.weight'}


def test_labels_are_dropped_in_training_only():
    model = small(class_dropout_prob=0.3, grid=1, phases=((1., 1),))
    label_B, seen = torch.arange(1000) % 5, []
    model.cls_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for mode in (False, True):
            model.train(mode).training_loss(codes(1000, grid=1), label_B)
    kept, dropped = seen
    assert torch.equal(kept, label_B)
    assert set(dropped[dropped != label_B].tolist()) == {5}
    assert (dropped == 5).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_draws_follow_the_place_in_the_global_batch():
    """Labels of an image are dropped alike in any split; dropout differs between the parts."""
    model, idx_BN, label_B, seen = small(class_dropout_prob=0.5), codes(8), torch.arange(8) % 5, []
    model.cls_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def loss(model, start, rows):
        torch.manual_seed(3)
        with torch.no_grad(), GlobalBatch(start, 8):
            return model.train().training_loss(idx_BN[rows], label_B[rows])[0]
    first = slice(0, 4)
    for start, rows in ((0, slice(0, 8)), (0, first), (4, slice(4, 8))):
        loss(model, start, rows)
    whole, *parts = seen
    assert torch.equal(torch.cat(parts), whole) and not torch.equal(whole, label_B)
    model = small(token_dropout_p=0.5)
    assert torch.equal(loss(model, 0, first), loss(model, 0, first))
    assert not torch.equal(loss(model, 0, first), loss(model, 4, first))


@pytest.mark.parametrize('name', DROPOUTS[:4])
def test_dropout_is_of_training(name):
    model, label_B, idx_BN = small(**{name: 0.3}), torch.tensor([0, 3, 5]), codes()
    with torch.no_grad():
        logits = model(label_B, idx_BN)
        assert torch.equal(logits, small()(label_B, idx_BN))
        assert not torch.equal(model.train()(label_B, idx_BN), logits)


@pytest.mark.parametrize('groups', [1, 2])
def test_grouped_heads_share_keys_and_values(groups):
    """As if the projection to keys and values stood there once per head."""
    grouped, model = small(n_kv_head=groups), small()
    state = grouped.state_dict()
    for i in range(2):
        name = f'layers.{i}.attention.wqkv.weight'
        q, k, v = state[name].split([32, 8 * groups, 8 * groups])
        k, v = (t.view(groups, 8, 32).repeat_interleave(4 // groups, dim=0).flatten(0, 1) for t in (k, v))
        state[name] = torch.cat([q, k, v])
    model.load_state_dict(state)
    label_B, idx_BN = torch.tensor([0, 3, 5]), codes()
    with torch.no_grad():
        assert_within(grouped(label_B, idx_BN), model(label_B, idx_BN), 1e-6)


@pytest.mark.parametrize('p', [1, 2])
def test_logits_are_float32_in_half_precision(model, p):
    label_B, idx_BN = torch.tensor([0, 3, 5]), codes()
    with torch.no_grad():
        logits = model(label_B, idx_BN, p)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert_within(model(label_B, idx_BN, p), logits, 0.1)
        assert_within(small().bfloat16()(label_B, idx_BN, p), logits, 0.1)


# ------------------------------------------------------------ sampling
@pytest.mark.parametrize('overrides', [dict(), dict(n_kv_head=2), dict(n_kv_head=1)], ids=str)
@pytest.mark.parametrize('grid', [4, 6, 1])
def test_cached_sampling_equals_teacher_forcing(overrides, grid, monkeypatch):
    """Logits of what was drawn are those of one causal pass, on any grid."""
    model, label_B = small(**overrides), torch.tensor([1, 4])
    seen = spy(model, 'draw', monkeypatch)
    idx_BN = draw(model, [1, 4], guidance=3., grid=grid)
    assert idx_BN.shape == (2, grid ** 2) and idx_BN.dtype == torch.int64
    with torch.no_grad():
        cond, null = model(label_B, idx_BN), model(torch.full_like(label_B, 5), idx_BN)
    assert_within(torch.cat(seen, dim=1), guide(cond, null, 3.), 1e-4)


def draw_naively(model, label_B, guidance, cfg_interval, rng):
    """(codes, logits) of a sampler without caches that keeps the null class to the end."""
    idx_BN, seen = torch.zeros(len(label_B), model.grid ** 2, dtype=torch.int64), []
    labels = label_B, torch.full_like(label_B, model.num_classes)
    for i in range(model.grid ** 2):
        with torch.no_grad():
            cond, null = (model(label, idx_BN)[:, i:i + 1] for label in labels)
        is_guided = guidance > 1 and (cfg_interval == -1 or i - 1 <= cfg_interval)
        seen.append(null + guidance * (cond - null) if is_guided else cond)
        idx_BN[:, i:i + 1] = model.draw(seen[-1], 1., 0, 1., False, rng)
    return idx_BN, torch.cat(seen, dim=1)


@pytest.mark.parametrize(('guidance', 'cfg_interval', 'num_guided'), [
    (3., -1, 16), (3., 0, 2), (3., 1, 3), (3., 7, 9), (3., 13, 15), (3., 14, 16), (3., 15, 16), (3., 99, 16),
    (1., -1, 0), (1., 3, 0), (0.5, 3, 0)])
def test_the_null_class_goes_when_it_is_not_needed(guidance, cfg_interval, num_guided, monkeypatch):
    """Codes and logits are those of a sampler that keeps it; guidance of 1 and less never has it."""
    model, label_B = small(n_kv_head=2), torch.tensor([1, 4, 0])
    expected_idx, expected = draw_naively(model, label_B, guidance, cfg_interval, ImageNoise(0, range(3)))
    seen, inputs = spy(model, 'draw', monkeypatch), spy(model, 'transform', monkeypatch)
    if num_guided == 0:
        with torch.no_grad():
            model.cls_embedding.embedding_table.weight[5] = torch.nan
    idx_BN = draw(model, label_B.tolist(), guidance=guidance, cfg_interval=cfg_interval)
    assert torch.equal(idx_BN, expected_idx)
    assert_within(torch.cat(seen, dim=1), expected, 1e-4)
    assert [len(x) for x in inputs] == [6] * num_guided + [3] * (16 - num_guided)


def test_guided_null_class_is_the_null_class(model):
    assert torch.equal(draw(model, [5, 5], guidance=3.), draw(model, [5, 5]))


@pytest.mark.parametrize('options', [
    dict(greedy=True), dict(top_k=1), dict(top_p=0.), dict(temperature=0.)], ids=str)
def test_the_likeliest_codes(model, options):
    """Any of these takes them; each is the likeliest given those before."""
    idx_BN = draw(model, [1, 4], **options)
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([1, 4]), idx_BN).argmax(2), idx_BN)


def test_sample_decodes_the_codes(model, monkeypatch):
    """Pixels are resized before they are clamped, and only if asked to."""
    def decode_code(idx_BN, shape):
        assert shape == (2, 8, *[math.isqrt(idx_BN.shape[1])] * 2)
        return idx_BN.view(2, 1, *shape[2:]).expand(-1, 3, -1, -1) / 10 - 1.5
    monkeypatch.setattr(model.tokenizer, 'decode_code', decode_code, raising=False)

    def sample(**sizes):
        return model.sample([1, 4], guidance=2., rng=ImageNoise(0, [0, 1]), top_k=30, **sizes)
    for grid, sizes in ((4, dict()), (4, dict(image_size_eval=4)), (6, dict(image_size=96))):
        pixels = decode_code(draw(model, [1, 4], guidance=2., top_k=30, grid=grid), (2, 8, grid, grid))
        assert pixels.min() < -1 and pixels.max() > 1
        assert_within(sample(**sizes), (pixels.clamp(-1, 1) + 1) / 2, 1e-6)
    pixels = decode_code(draw(model, [1, 4], guidance=2., top_k=30, grid=6), (2, 8, 6, 6))
    resized = F.interpolate(pixels, (5, 5), mode='bicubic')
    assert_within(sample(image_size=96, image_size_eval=5), (resized.clamp(-1, 1) + 1) / 2, 1e-6)


# ------------------------------------------------------------ errors
@pytest.mark.parametrize(('call', 'message'), [
    (lambda m: m(torch.tensor([0]), codes(1), 3), 'multiple of the patch, got 16 codes and patches of 3x3'),
    (lambda m: m(torch.tensor([0]), codes(1, grid=6), 4), 'got 36 codes and patches of 4x4'),
    (lambda m: m.training_loss(codes(1)[:, :12], torch.tensor([0])), 'a square map .*got 12 codes'),
    (lambda m: small(n_head=5), 'heads that divide the width .*got width 32, 5 heads, 5 groups'),
    (lambda m: small(n_kv_head=3), 'groups that divide the heads, got width 32, 4 heads, 3 groups'),
    (lambda m: small(dim=24), 'a head width that is a multiple of 4, got 6'),
    (lambda m: small(phases=((0.5, 2), (0.9, 1))), r'the last is \(1, 1\), got \(\(0.5, 2\), \(0.9, 1\)\)'),
    (lambda m: small(phases=((0.5, 1), (1., 2))), r'the last is \(1, 1\)'),
    (lambda m: small(phases=((0.5, 4), (0.5, 2), (1., 1))), r'the last is \(1, 1\)'),
    (lambda m: small(phases=((0.5, 4), (0.25, 2), (1., 1))), r'the last is \(1, 1\)'),
    (lambda m: small(phases=((0., 2), (1., 1))), r'the last is \(1, 1\)'),
    (lambda m: small(phases=((0.5, 3), (1., 1))), 'side of a patch that divides 4'),
    (lambda m: m.sample([6]), r'expected labels in 0\.\.5 .*got 6'),
    (lambda m: m.sample([0], image_size=72), 'multiples of the stride 16, got 72x72'),
    (lambda m: draw(m, [0], top_k=-1), r'top_k must lie in 0\.\.31'),
], ids=itertools.count())
def test_errors(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(block.attn.cache is None for block in model.layers) and not model.training
