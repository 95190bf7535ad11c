"""`evaluate.py tokenizer`: scores of every kind of file, ranks, skipped metrics, pictures, bad input."""
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dist
import evaluate
from evaluation import tokenizer as command
from evaluation.metrics import psnr, ssim, to_uint8
from evaluation.settings import COMMANDS
from models import LPIPS, VQVAE, AutoencoderKL, FlexVAE, VQModel
from tests.runs import TINY_VQVAE, launch
from utils.data import build_dataset

PIXELS = '--metrics=psnr,ssim,usage'


@pytest.fixture(scope='module')
def vqvae():
    torch.manual_seed(0)
    vqvae = VQVAE(**TINY_VQVAE)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight, std=0.3)
    return vqvae


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory, vqvae):
    """The same weights as a file of train.py (as average), inside a generator's, with a config, and bare."""
    root, state = tmp_path_factory.mktemp('checkpoints'), vqvae.state_dict()
    config = vqvae.config_state(1.)
    raw = {key: value + 0.05 * torch.randn_like(value) for key, value in state.items()}
    files = dict(trained=dict(trainer=dict(vae_wo_ddp=raw, vae_ema=state, config=config),
                              args=dict(model='vqvae')),
                 generator=dict(trainer=dict(vae_local=state, vae_config=config, var_wo_ddp={}),
                                args=dict(model='var')),
                 configured=dict(model=state, config=config), bare=state)
    for name, content in files.items():
        torch.save(content, root / f'{name}.pth')
    return root


@pytest.fixture
def rate(evaluate_here, monkeypatch, tmp_path):
    """Run the command in this process: (report, what it printed)."""
    monkeypatch.chdir(tmp_path)  # no LPIPS file lies here
    monkeypatch.setenv('INCEPTION_WEIGHTS', str(tmp_path / 'no_such_file.pth'))

    def run(ckpt, *flags, data='digits'):
        report = tmp_path / 'report.json'
        printed = evaluate_here('tokenizer', f'--ckpt={ckpt}', f'--data_path={data}', '--num_images=24',
                                '--workers=0', f'--json={report}', *flags)
        return json.loads(report.read_text()), printed
    return run


# ---------------------------------------------------------------------------------------------- scores
def test_scores_are_those_of_the_reconstructions(rate, checkpoints, vqvae):
    report, printed = rate(checkpoints / 'trained.pth', PIXELS, '--bs=7')
    images = build_dataset('digits', 16, crop='adm')[2]
    chosen = torch.stack([images[i][0] for i in np.linspace(0, 360, 24, endpoint=False, dtype=int)])
    with torch.no_grad():
        out = vqvae.eval().reconstruct(chosen)
    original, reconstruction = to_uint8(chosen), to_uint8(out.views[-1][1])
    scores = report['scores']
    assert scores['psnr'] == pytest.approx(psnr(original, reconstruction).mean().item(), abs=1e-4)
    assert scores['ssim_gauss11'] == pytest.approx(ssim(original, reconstruction).mean().item(), abs=1e-4)
    for name, idx_Bl in out.codes.items():
        assert scores[f'distinct_{name}'] == len(idx_Bl.unique())
        assert scores[f'usage_{name}'] == len(idx_Bl.unique()) / min(32, idx_Bl.numel())
    assert {name.rpartition('_')[2] for name in scores if name.startswith('usage_')} == {'1x1', '2x2', '4x4'}
    assert report['num_images'] == 24 and report['image_size'] == 16 and report['skipped'] == {}
    assert report['checkpoint']['weights'] == 'ema' and report['checkpoint']['model'] == 'VQVAE'
    assert len(report['checkpoint']['sha256']) == 64 and report['seconds'] > 0
    assert 'sigma 1.5' in report['definitions']['ssim_gauss11'] and report['settings']['batch_size'] == 7
    for name in ('psnr', 'ssim_gauss11', 'usage', '4x4'):
        assert re.search(rf'^ *{name} .*\d', printed, re.M)


def test_every_kind_of_file(rate, checkpoints):
    expected = rate(checkpoints / 'trained.pth', PIXELS)[0]['scores']
    for name, *flags in (('generator',), ('configured',), ('bare', '--pn=1_2_4'),
                         ('trained', '--model=vqvae')):
        assert rate(checkpoints / f'{name}.pth', PIXELS, *flags)[0]['scores'] == expected
    report, _ = rate(checkpoints / 'trained.pth', PIXELS, '--weights=raw')
    assert report['checkpoint']['weights'] == 'raw' and report['scores']['psnr'] != expected['psnr']


@pytest.mark.slow
def test_two_processes_equal_one(rate, checkpoints, tmp_path):
    flags = ['tokenizer', f'--ckpt={checkpoints / "trained.pth"}', '--data_path=digits', '--num_images=25',
             '--workers=0', '--bs=4', PIXELS]
    outputs = [f'--json={tmp_path / "two.json"}', f'--pictures={tmp_path / "two"}']
    launch('evaluate.py', [*flags, *outputs], nproc=2)
    two = json.loads((tmp_path / 'two.json').read_text())
    one, _ = rate(checkpoints / 'trained.pth', '--num_images=25', '--bs=4', PIXELS)
    assert (one['world_size'], two['world_size']) == (1, 2)
    assert list(one['scores']) == list(two['scores'])
    for name, value in one['scores'].items():
        # a pixel between two levels may be rounded to the other one in another batch
        assert two['scores'][name] == pytest.approx(value, rel=1e-5), name
    assert (tmp_path / 'two' / 'reconstructions.png').exists()


def test_one_map_of_codes_and_codes_of_any_size(rate, tmp_path):
    torch.manual_seed(0)
    small = dict(codebook_size=64, codebook_embed_dim=8, net='tiny')
    for name, model in (('vq', VQModel(**small)), ('flex', FlexVAE(**small))):
        torch.save(model.exported(model.state_dict()), tmp_path / f'{name}.pth')
    report, _ = rate(tmp_path / 'vq.pth', PIXELS, data='toy')
    assert report['checkpoint']['model'] == 'VQModel' and report['image_size'] == 32
    assert 'usage_4x4' in report['scores'] and 'psnr_2x2' not in report['scores']
    flex, printed = rate(tmp_path / 'flex.pth', PIXELS, '--model=flexvae', '--ssim=uniform7', data='toy')
    scores = flex['scores']
    assert {'psnr', 'psnr_1x1', 'psnr_2x2', 'ssim_uniform7', 'ssim_uniform7_1x1', 'usage_1x1', 'usage_4x4'} \
        <= set(scores)
    assert 'psnr_4x4' not in scores and '2x2' in printed
    larger, _ = rate(tmp_path / 'vq.pth', PIXELS, '--image_size=64', '--split=train', data='toy')
    assert larger['image_size'] == 64 and 'usage_8x8' in larger['scores']


def test_continuous_latents(rate, tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKL(embed_dim=4, net='tiny', scaling_factor=0.5)
    torch.save(model.exported(model.state_dict()), tmp_path / 'kl.pth')
    report, _ = rate(tmp_path / 'kl.pth', PIXELS, f'--pictures={tmp_path / "pictures"}', data='toy')
    scores = report['scores']
    assert scores['scaling_factor'] == 0.5
    variance = np.mean([scores[f'latent_std_{channel}'] ** 2 for channel in range(4)])
    assert 1 / scores['scaling_factor_here'] ** 2 >= variance - 1e-9  # plus how far the means are apart
    assert 'usage' not in scores and scores['psnr'] > 0
    assert {path.name for path in (tmp_path / 'pictures').iterdir()} == {'reconstructions.png'}


# ---------------------------------------------------------------------------------------------- networks
def test_missing_networks_are_skipped_in_one_line_each(rate, checkpoints):
    report, printed = rate(checkpoints / 'trained.pth')
    skipped = [line for line in printed.splitlines() if line.startswith('skipped: ')]
    assert len(skipped) == 2 and skipped[0].startswith('skipped: lpips: ') \
        and skipped[1].startswith('skipped: rfid: ') and 'no_such_file.pth' in skipped[1]
    assert set(report['skipped']) == {'lpips', 'rfid'} and 'psnr' in report['scores']


@pytest.mark.parametrize('flag', ['--metrics=psnr,lpips', '--metrics=rfid', '--inception_weights=nowhere.pth',
                                  '--lpips_path=nowhere.pth', '--reference=nowhere.npz'])
def test_metrics_that_were_asked_for_are_not_skipped(rate, checkpoints, flag):
    with pytest.raises(SystemExit, match=r'evaluate\.py: .*(LPIPS finds no file|no Inception weights at)'):
        rate(checkpoints / 'trained.pth', flag)


def stub_features(*_):
    """Two features, the means of two halves of the pixels."""
    return lambda u8: u8.double().flatten(1).unflatten(1, (2, -1)).mean(2)


def test_rfid_against_originals_and_a_reference(rate, checkpoints, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(command, 'InceptionFeatures', stub_features)
    monkeypatch.setattr(command, 'NUM_FEATURES', 2)
    np.savez(tmp_path / 'black.npz', mu=np.zeros(2), sigma=np.zeros((2, 2)))
    report, _ = rate(checkpoints / 'trained.pth', '--metrics=rfid', f'--reference={tmp_path / "black.npz"}')
    assert list(report['scores']) == ['rfid_val', 'rfid_black.npz']
    assert 'black.npz' in report['definitions']['rfid_black.npz']
    images = build_dataset('digits', 16, crop='adm')[2]
    chosen = torch.stack([images[i][0] for i in np.linspace(0, 360, 24, endpoint=False, dtype=int)])
    model = VQVAE(**TINY_VQVAE)
    model.load_state_dict(torch.load(checkpoints / 'bare.pth', weights_only=True))
    with torch.no_grad():
        reconstruction = to_uint8(model.eval().reconstruct(chosen).views[-1][1])
    a, b = (stub_features()(u8).numpy() for u8 in (to_uint8(chosen), reconstruction))
    # closed form: |mu|^2 + tr(sigma) against a point; the square root of a 2x2 product by its eigenvalues
    assert report['scores']['rfid_black.npz'] == pytest.approx(
        np.square(b.mean(0)).sum() + np.trace(np.cov(b.T)), rel=1e-3)
    root = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).astype(complex)).real.sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * root
    assert report['scores']['rfid_val'] == pytest.approx(expected, rel=1e-3)
    np.savez(tmp_path / 'black.npz', mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(SystemExit, match='of 2 features'):
        rate(checkpoints / 'trained.pth', f'--reference={tmp_path / "black.npz"}')


def test_what_one_rank_lacks_is_left_out_on_all(rate, checkpoints, monkeypatch):
    monkeypatch.setattr(command, 'InceptionFeatures', stub_features)
    monkeypatch.setattr(command, 'NUM_FEATURES', 2)
    gather = dist.allgather_object
    monkeypatch.setattr(dist, 'allgather_object', lambda value: [
        value, ('b', ValueError('there is none'))] if value == (dist.host_name(), None) else gather(value))
    report, _ = rate(checkpoints / 'trained.pth')
    assert report['skipped']['rfid'] == 'rank 1 on b: there is none' and 'rfid_val' not in report['scores']
    with pytest.raises(SystemExit, match='rank 1 on b: there is none'):
        rate(checkpoints / 'trained.pth', '--metrics=rfid')


def test_lpips(rate, checkpoints, monkeypatch):
    torch.manual_seed(0)
    heads = {f'lin{i}.model.1.weight': torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    trunk = LPIPS('vgg').features
    state = heads | {f'features.{key}': value for key, value in trunk.named_buffers()}
    monkeypatch.setattr(command, 'lpips_state', lambda *_: (state, 'a file'))
    report, _ = rate(checkpoints / 'trained.pth', '--metrics=lpips')
    assert list(report['scores']) == ['lpips_vgg'] and report['scores']['lpips_vgg'] > 0


# ---------------------------------------------------------------------------------------------- pictures
def test_pictures(rate, checkpoints, tmp_path):
    rate(checkpoints / 'trained.pth', PIXELS, f'--pictures={tmp_path / "pictures"}')
    rows = np.asarray(Image.open(tmp_path / 'pictures' / 'reconstructions.png'))
    assert rows.shape == (16 * (1 + 3 + 1), 16 * 8, 3)  # input, three scales, difference; eight images
    for row in rows.reshape(5, 16, 128, 3):
        assert np.ptp(row) > 50
    columns = rows[:16].reshape(16, 8, 16, 3).transpose(1, 0, 2, 3).reshape(8, -1)
    assert len(np.unique(columns, axis=0)) == 8
    usage = np.asarray(Image.open(tmp_path / 'pictures' / 'code_usage.png'))
    assert usage.shape == (3 * 24 + 2 * 2, 1024, 3) and len(np.unique(usage.reshape(-1, 3), axis=0)) > 4


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(('flags', 'message'), [
    (['--metrics=psnr,fid'], r'--metrics must be of psnr, ssim, lpips, rfid, usage, got fid'),
    (['--ssim=best'], r'--ssim must be one of gauss11, uniform7, llamagen'),
    (['--weights=mean'], r'--weights must be ema or raw'),
    (['--data_path='], r'expected images'),
    (['--pn=1_x'], r'positive integers'),
    (['--image_size=-8'], r'--image_size must be at least 1'),
    (['--bs=0'], r'--bs must be at least 1'),
    (['--images=3'], r'unknown argument'),
])
def test_flags_are_checked_before_anything_is_read(rate, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        rate('no_file.pth', *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith('evaluate.py tokenizer: ')
    assert re.search(message, error)


@pytest.mark.parametrize(('name', 'flags', 'message'), [
    ('nowhere', [], r'no file'),
    ('trained', ['--data_path=nowhere'], r'found no such folder'),
    ('trained', ['--pictures=/dev/null/pictures'], r'Not a directory'),
    ('trained', ['--image_size=32'], r'pyramid \(1, 2, 4\) at stride 4 is for images of 16 pixels'),
    ('trained', ['--model=kl16'], r'was trained with --model=vqvae'),
    ('bare', ['--model=vq16', '--pn=1_2_4'], r'--pn is for a vqvae'),
    ('bare', [], r'does not tell the sides of its 3 code maps: pass --pn'),
    ('other', [], r'no known tokenizer.*vqvae'),
    ('nan', [PIXELS], r'reconstruction holds nan'),
])
def test_errors_are_one_line(rate, checkpoints, tmp_path, vqvae, name, flags, message):
    torch.save(dict(model=dict(a=torch.zeros(2))), tmp_path / 'other.pth')
    damaged = {'post_quant_conv.bias': torch.full((8,), float('nan'))}
    torch.save(dict(model=vqvae.state_dict() | damaged, config=vqvae.config_state(1.)), tmp_path / 'nan.pth')
    folder = tmp_path if name in ('other', 'nan') else checkpoints
    with pytest.raises(SystemExit, match=message) as stop:
        rate(folder / f'{name}.pth', *flags)
    assert stop.value.code == 2
    assert str(stop.value).startswith('evaluate.py: ') and '\n' not in str(stop.value)


def test_commands_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['evaluate.py'])
    with pytest.raises(SystemExit, match='2'):
        evaluate.main()
    printed = capsys.readouterr().out
    assert '--pr_mode' in printed and all(f'evaluate.py {name} ' in printed or name in printed
                                          for name in COMMANDS)
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', 'tokeniser', '--ckpt=a.pth'])
    with pytest.raises(SystemExit, match='2'):
        evaluate.main()
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith('evaluate.py: ')
