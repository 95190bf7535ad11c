"""Neon: weights beyond a reference, in files and on the fly, and what is refused."""
import json
import math
import sys

import numpy as np
import pytest
import torch

import sample
import train
from models import VAR, VQVAE, FlexVAE, FlexVAR
from pipeline import load
from tests.runs import CLASSES, TINY_VQVAE, make_tokenizer, message, prepared, read, training
from tests.test_sample import by_index, read_table
from tests.vectors import assert_within, load_json, load_tensors
from utils import merge as merging
from utils import posthoc_ema
from utils.merge import MergeSettings, extrapolated, merge

FACTORS = load_json('post_training/neon')['w']


# ------------------------------------------------------------ the formula
@pytest.mark.parametrize('w', FACTORS)
def test_published_merge(w):
    t = load_tensors('post_training/neon')
    names = [name.removeprefix('tuned.') for name in t if name.startswith('tuned.')]
    parameters = [name for name in names if name not in ('attn_bias_for_masking', 'lvl_1L')]
    assert len(parameters) == 4
    for name in parameters:
        reference, tuned = t[f'reference.{name}'], t[f'tuned.{name}']
        found = extrapolated(reference, tuned, w)
        assert found.dtype == torch.float32
        expected = t[f'w{w:g}.{name}']
        ulp = torch.nextafter(expected.abs(), torch.tensor(math.inf)) - expected.abs()
        assert ((found - expected).abs() <= ulp).all(), name
        assert_within(found.double(), t[f'w{w:g}.float64.{name}'], 1e-6)
        if w in (0, -1):
            assert torch.equal(found, reference if w == 0 else tuned)


@pytest.mark.parametrize('sharpness', [0.5, 1., 2.])
def test_where_a_step_back_helps(sharpness):
    """One softmax over codes: p the model's, q ~ p^g the sampler's, d the data's.

    A step of rate h on q moves the logits by h (q - p). Going the other way, KL(d || theta_w) changes by
    h (p - d).(p - q) per unit of w at w = 0: it falls where the gradients on q and on d oppose each other,
    and stays where q is p.
    """
    generator = torch.Generator().manual_seed(3)
    logits_V, data_V = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    p = logits_V.softmax(0)
    q = (sharpness * logits_V).softmax(0)
    rate = 1e-2
    tuned_V = logits_V + rate * (q - p)

    def divergence(w, d):
        theta_V = logits_V + w * (logits_V - tuned_V)
        return (d * (d.log() - theta_V.log_softmax(0))).sum()
    # Data flatter than the model, which a sharp sampler leads away from; and any other data.
    for d in ((0.5 * logits_V).softmax(0), data_V.softmax(0)):
        slope = (divergence(1e-4, d) - divergence(-1e-4, d)) / 2e-4
        expected = rate * ((p - d) * (p - q)).sum()
        assert slope.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-12)
    flat = (0.5 * logits_V).softmax(0)
    slope = ((p - flat) * (p - q)).sum().item()
    assert np.sign(round(slope, 12)) == {0.5: 1, 1.: 0, 2.: -1}[sharpness]


# ------------------------------------------------------------ files
def make_var(vae, seed=0, depth=1):
    torch.manual_seed(seed)
    var = VAR(vae, num_classes=4, patch_nums=TINY_VQVAE['v_patch_nums'], attn_l2_norm=True,
              **VAR.published_sizes(depth))
    var.init_weights(init_head=2., init_adaln_gamma=0.5, init_std=0.1)
    return var


def save(path, model, classes=CLASSES, **trainer):
    """A checkpoint as train.py writes it."""
    state = dict(var_wo_ddp=model.state_dict(), vae_local=model.tokenizer.state_dict(),
                 config=model.config_state(1.), vae_config=model.tokenizer.config_state(1.))
    torch.save(dict(epoch=1, iter=0, trainer=state | trainer, args={}, classes=list(classes)), path)
    return str(path)


@pytest.fixture(scope='module')
def vae(tmp_path_factory):
    tokenizer = VQVAE(**TINY_VQVAE)
    path = make_tokenizer(tmp_path_factory.mktemp('neon') / 'vae.pth')
    tokenizer.load_state_dict(torch.load(path, weights_only=True))
    return tokenizer


@pytest.fixture(scope='module')
def pair(vae, tmp_path_factory):
    """(file of the reference, that of the tuned model, both models)."""
    folder = tmp_path_factory.mktemp('pair')
    reference, tuned = make_var(vae), make_var(vae, seed=1)
    return save(folder / 'r.pth', reference), save(folder / 's.pth', tuned), reference, tuned


@pytest.fixture(autouse=True)
def without_git(monkeypatch):
    """Asking git for the commit takes longer than a merge of these models."""
    for module in (merging, sample):
        monkeypatch.setattr(module, 'git_commit', lambda: 'abc')


def merged(tmp_path, reference, tuned, w, **settings):
    out = tmp_path / 'out.pth'
    merge(MergeSettings(reference=str(reference), tuned=str(tuned), out=str(out), w=w, **settings))
    return read(tmp_path, 'out.pth')


def test_merged_weights(pair, tmp_path):
    """Bit for bit the reference at w = 0, the tuned model at w = -1, and the reference where both are one."""
    r, s, reference, tuned = pair
    for files, w, expected in (((r, s), 0., reference), ((r, s), -1., tuned), ((r, r), 1.3, reference)):
        weights = merged(tmp_path, *files, w)['trainer']['var_wo_ddp']
        for name, value in expected.state_dict().items():
            assert torch.equal(weights[name], value) and weights[name].dtype == value.dtype, name
    weights = merged(tmp_path, r, s, 1.5)['trainer']['var_wo_ddp']
    far = dict(tuned.named_parameters())
    for name, value in reference.named_parameters():
        assert torch.equal(weights[name], value + 1.5 * (value - far[name]))
    for name, value in reference.named_buffers():
        assert name not in weights or torch.equal(weights[name], value)
    assert weights['lvl_1L'].dtype == torch.int64 and weights['attn_bias_for_masking'].isinf().any()


def test_what_a_merged_file_says(pair, tmp_path):
    r, s, *_ = pair
    content = merged(tmp_path, r, s, 0.7)
    about = content['neon']
    assert about['w'] == 0.7 and (about['reference'], about['tuned']) == ('r.pth', 's.pth')
    pipe = load(tmp_path / 'out.pth')
    assert pipe.family == 'var' and pipe.classes == CLASSES and pipe.weights == 'raw'
    assert pipe.training['neon'] == about
    assert about['reference_sha256'] == load(r).digests['ckpt'] != about['tuned_sha256']
    pipe.save_pretrained(tmp_path / 'folder')
    assert load(tmp_path / 'folder').training['neon'] == about
    again = tmp_path / 'again.pth'
    merge(MergeSettings(reference=r, tuned=str(tmp_path / 'folder'), out=str(again), w=1.))  # a folder serves


def test_which_weights_are_taken(vae, tmp_path):
    """Averaged ones of the reference, those of the last step of the tuned one; half precision in float32."""
    models = [make_var(vae, seed) for seed in range(4)]
    half = {name: t.half() if t.is_floating_point() else t for name, t in models[1].state_dict().items()}
    r = save(tmp_path / 'r.pth', models[0], var_ema=half)
    s = save(tmp_path / 's.pth', models[2], var_ema=models[3].state_dict())
    for kind, reference in (('ema', half), ('raw', models[0].state_dict())):
        content = merged(tmp_path, r, s, 2., weights=kind)
        assert content['neon']['reference_weights'] == kind
        for name, tuned in models[2].named_parameters():
            value = reference[name].float()
            assert torch.equal(content['trainer']['var_wo_ddp'][name], value + 2 * (value - tuned)), name


@pytest.mark.parametrize(('case', 'words'), [
    ('family', "of the family flexvar, .*r.pth' one of var"), ('depth', r'in depth=2 \(there 1\)'),
    ('classes', 'on other classes than'), ('tokenizer', 'codes of another tokenizer'),
    ('weight', 'in the weight blocks.0.ffn.fc2.bias'), ('extra', 'in the weight more.weight'),
    ('kind', 'holds a tokenizer: pass a checkpoint of the tuned'), ('missing', 'nowhere.pth')])
def test_models_that_do_not_belong_together(pair, vae, tmp_path, case, words):
    r, _, _, tuned = pair
    s = str(tmp_path / 's.pth')
    if case == 'family':
        flexvar = FlexVAR(FlexVAE(24, 8, z_channels=16, net='tiny'), num_classes=4, depth=1, embed_dim=64,
                          num_heads=1, attn_l2_norm=True, patch_nums=(1, 2, 4))
        save(s, flexvar)
    elif case == 'depth':
        save(s, make_var(vae, depth=2))
    elif case == 'classes':
        save(s, tuned, CLASSES[::-1])
    elif case == 'tokenizer':
        other = {name: t + 0.1 if name == 'encoder.conv_in.weight' else t
                 for name, t in vae.state_dict().items()}
        save(s, tuned, vae_local=other)
    elif case == 'kind':
        torch.save(vae.state_dict(), s)
    elif case == 'missing':
        s = str(tmp_path / 'nowhere.pth')
    else:
        state = tuned.state_dict()
        if case == 'weight':
            del state['blocks.0.ffn.fc2.bias']
        else:
            state['more.weight'] = torch.zeros(2)
        save(s, tuned, var_wo_ddp=state)
    with pytest.raises(ValueError, match=words) as refused:
        merged(tmp_path, r, s, 1.)
    assert '\n' not in str(refused.value) and not (tmp_path / 'out.pth').exists()


def test_requests_are_complete():
    with pytest.raises(ValueError, match='three files'):
        MergeSettings(reference='a', tuned='b')
    with pytest.raises(ValueError, match=r'--w must be in'):
        MergeSettings(reference='a', tuned='b', out='c', w=1e9)


@pytest.mark.parametrize('out', ['a', 'folder/../b', 'vae'])
def test_a_result_takes_the_place_of_no_input(out):
    with pytest.raises(ValueError, match='which would be overwritten: pass another name as OUT'):
        MergeSettings(reference='a', tuned='b', out=out, vae_ckpt='vae')


@pytest.mark.parametrize(('module', 'flag'), [(merging, '--w=1e9'), (posthoc_ema, '--width=7')])
def test_wrong_values_end_a_command_as_wrong_flags_do(module, flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['command', 'a', flag])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ------------------------------------------------------------ sampling
def draw_here(here, folder, *flags):
    here(sample, *flags, f'--output={folder}', '--num_images=6', '--format=npz', '--top_k=8')
    return by_index(f'{folder}.npz'), json.loads(folder.with_suffix('.json').read_text())


def test_images_on_the_fly_are_those_of_the_merged_file(here, pair, tmp_path, capsys):
    r, s, *_ = pair
    merged(tmp_path, r, s, 0.5)
    expected, _ = draw_here(here, tmp_path / 'a', f'--ckpt={tmp_path / "out.pth"}')
    neon = f'--ckpt={r}', f'--neon_from={s}'
    found, manifest = draw_here(here, tmp_path / 'b', *neon, '--neon_w=0.5')
    assert np.array_equal(found, expected)
    assert manifest['settings']['neon_w'] == 0.5 and manifest['neon_from'] == s
    assert manifest['weights_sha256']['neon_from'] == load(s).digests['ckpt']
    plain, manifest = draw_here(here, tmp_path / 'c', f'--ckpt={r}')
    assert not {name for name in manifest['settings'] if 'neon' in name or 'ssg' in name or 'cfg_' in name}
    assert not np.array_equal(plain, found)
    text = message(lambda: draw_here(here, tmp_path / 'b', *neon, '--neon_w=1'), capsys)
    assert 'begun with other settings or weights (neon_w' in text
    assert '--neon_from: pass both' in message(lambda: sample.parse_sampling(
        [f'--ckpt={r}', '--neon_w=2']), capsys)


@pytest.mark.slow
def test_sweeps_over_w_and_cfg(here, pair, tmp_path, monkeypatch):
    r, s, *_ = pair
    np.savez(tmp_path / 'ref.npz', arr_0=np.random.RandomState(0).randint(0, 256, (30, 16, 16, 3), np.uint8))
    loaded = []
    real = sample.extrapolate
    monkeypatch.setattr(sample, 'extrapolate', lambda *args: (loaded.append(args[3]), real(*args)))
    here(sample, f'--ckpt={r}', f'--neon_from={s}', '--sweep=cfg=0,2 neon_w=0,1', '--num_images=6',
         f'--output={tmp_path / "x"}', '--format=npz', f'--ref={tmp_path / "ref.npz"}',
         '--score=--features=digits --cache=')
    rows = read_table(tmp_path / 'x.csv')
    assert [(row['neon_w'], row['cfg']) for row in rows] == [
        ('0.0', '0.0'), ('0.0', '2.0'), ('1.0', '0.0'), ('1.0', '2.0')]
    assert len({row['fid'] for row in rows}) == 4
    assert loaded == [0., 1.]


# ------------------------------------------------------------ the whole recipe
@pytest.mark.slow
def test_a_short_training_on_own_images(here, data, tmp_path, capsys):
    """The recipe as a whole: draw, tune, extrapolate; and the two traps that are named."""
    reference = tmp_path / 'reference'
    flags = ['--ep=1', '--twd=0', '--save_every=']
    train.train(prepared(training(data, reference, '--ep=1', model='var')))
    ckpt = reference / 'ar-ckpt-last.pth'
    draw = [f'--ckpt={ckpt}', f'--output={tmp_path / "S"}', '--num_images=16', '--format=npz']
    here(sample, *draw, '--cfg=1.5')
    tune = [f'--val_path={data[0]}', f'--init_from={ckpt}', *flags, '--sche=lin0', '--wp=1', '--wp0=0']
    on_samples = training((tmp_path / 'S.npz', data[1]), tmp_path / 'tuned', *tune, model='var')
    train.train(prepared(on_samples))
    assert 'without guidance' not in capsys.readouterr().out
    content = read(tmp_path / 'tuned')
    assert content['data']['train']['count'] == 16 and content['data']['val']['count'] == 8
    assert content['classes'] == list(CLASSES)
    here(sample, f'--ckpt={ckpt}', f'--neon_from={tmp_path / "tuned" / "ar-ckpt-last.pth"}',
         f'--output={tmp_path / "neon"}', '--num_images=4', '--format=npz')

    # The trap of samples without guidance, and that of classes in another order.
    here(sample, *draw, '--cfg=0', '--overwrite')
    prepared(training((tmp_path / 'S.npz', data[1]), tmp_path / 'other', *tune, model='var'))
    assert 'S.npz was drawn without guidance, top-k, top-p and temperature' in capsys.readouterr().out
    changed = torch.load(ckpt, weights_only=True)
    torch.save(changed | dict(classes=list(CLASSES[::-1])), tmp_path / 'permuted.pth')
    tune[1] = f'--init_from={tmp_path / "permuted.pth"}'
    with pytest.raises(ValueError, match="class 0 is 'doe' there, 'ant' here: images that it has drawn"):
        prepared(training((tmp_path / 'S.npz', data[1]), tmp_path / 'third', *tune, model='var'))
