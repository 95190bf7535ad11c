"""What a training leaves to read: log.txt, stdout.txt, TensorBoard, the checkpoint, and the first loss."""
import dataclasses
import importlib.util
import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bench import reference_curves
from configs import parse_training
from tests.runs import CLASSES, VQVAE_FLAGS, epochs_of, read
from training import reference
from training.data import waiting_note
from utils import log
from utils.curves import draw, read_curves, short_names


@pytest.fixture(scope='module')
def folder(train_for_module, tmp_path_factory):
    """A VAR over a tokenizer that was trained by the same program; validation in every second epoch."""
    root = tmp_path_factory.mktemp('logs')
    train_for_module(root / 'vae', '--ep=2', base=VQVAE_FLAGS)
    return train_for_module(root / 'var', f'--vae_ckpt={root / "vae" / "vae-ckpt-best.pth"}', '--ep=3',
                            '--eval_every=2', '--fp16=2')


def test_checkpoint_of_the_best_epoch_names_the_classes(folder):
    assert read(folder, 'ar-ckpt-best.pth')['classes'] == sorted(CLASSES)


def test_log_begins_with_the_settings(folder):
    first = json.loads((folder / 'log.txt').read_text().splitlines()[0])
    assert first['args']['depth'] == 1


def test_log_has_a_line_per_epoch(folder):
    lines = epochs_of(folder)
    assert [line['ep'] for line in lines] == ['1/3', '2/3', '3/3']
    assert {'it', 'lr', 'wd', 'grad_norm', 'L_mean', 'L_tail', 'acc_mean', 'acc_tail', 'remain_time',
            'finish_time'} <= lines[0].keys()


def test_validation_is_logged_where_it_was_due(folder):
    first, second, last = epochs_of(folder)
    assert first['vL_mean'] is None
    assert second['vL_mean'] > 0
    assert last['vL_tail'] > 0


def test_progress_is_printed(folder):
    text = (folder / 'stdout.txt').read_text()
    assert '[Ep]: [   0/3] [4/5]' in text
    assert 'images/s' in text
    assert re.search(r'  mfu: \d+\.\d%  data/tokenizer/model: ', text)
    assert '[*] [ep1]  (val 8)' in text


def test_the_progress_line_is_explained_and_names_the_end_of_the_run(folder):
    """The last step of an epoch has no time left in it, that of the last epoch none in the whole run."""
    text = (folder / 'stdout.txt').read_text()
    lines = re.findall(r'\[Ep\]: \[ +(\d)/3\] \[4/5\]  eta: 0:00:00  whole run: (\d+:\d\d:\d\d)', text)
    assert [epoch for epoch, _ in lines] == ['0', '1', '2']
    assert lines[-1][1] == '0:00:00'
    assert text.index('Lm is the cross-entropy') < text.index('tnm the norm') < text.index('[Ep]:')


def test_tensorboard_has_the_published_tags(folder):
    events = EventAccumulator(str(next(folder.glob('tb-VARd1__pn1_2_4*')))).Reload()
    assert {'AR_iter_loss/z_voc_usage', 'AR_iter_loss/acc_4', 'AR_iter_loss/L_16', 'AR_iter_schedule/prog_si',
            'AR_iter_schedule/prog_a_reso', 'AR_iter_schedule/prog_wp', 'AR_opt_lr/lr_min/sche_tlr',
            'AR_opt_lr/lr_max/sche_tlr', 'AR_opt_wd/wd_max/sche_twd', 'AR_opt_wd/wd_min/sche_twd',
            'AR_opt_grad/grad/grad_norm', 'AR_opt_grad/grad/grad_clip', 'AR_ep_loss/L_mean',
            'AR_ep_loss/vacc_tail', 'AR_z_burnout/rest_hours'} <= set(events.Tags()['scalars'])
    assert {event.step for event in events.Scalars('AR_iter_loss/z_voc_usage')} == {-10000, -1000, 0}


def test_first_loss_is_that_of_a_uniform_guess(train_here, tmp_path):
    train_here(tmp_path, '--ep=1', '--tblr=1e-9')
    assert epochs_of(tmp_path)[0]['L_mean'] == pytest.approx(3.4657, rel=0.02)  # ln 32


def test_progressive_training_runs_every_stage(train_here, tmp_path):
    train_here(tmp_path, '--ep=4', '--pg=0.8', '--pg0=0', '--wp=0.2', '--pgwp=0.5')
    lines = epochs_of(tmp_path)
    assert lines[0]['L_tail'] < 0 < lines[-1]['L_tail']
    assert read(tmp_path)['trainer']['config']['last_prog_si'] == 2


# ---------------------------------------------------------------------------------------------- waiting
def test_waiting_for_data_is_named_once(train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(log, 'MOST_WAITING', -1.)
    train_here(tmp_path, '--ep=2')
    text = (tmp_path / 'stdout.txt').read_text()
    assert text.count('waiting for data') == 1
    assert 'pass --workers=' in text or 'give the run more CPUs' in text


@pytest.mark.parametrize(('flags', 'remedies'), [
    (['--model=vqvae', '--workers=2'], 'pass --workers=8 (now 2), or put smaller files on a local disk'),
    (['--model=vqvae', '--workers=8', '--data_path=digits'], 'give the run more CPUs'),
    (['--model=vqvae', '--workers=2', '--bs=4', '--data_path=digits'], 'pass --workers=4 (now 2)'),
    (['--model=npp', '--workers=8'],
     'give the run more CPUs, or store the tokens once by extract.py and pass --cached_path=FOLDER, '
     'or put smaller files on a local disk'),
    (['--model=flowar', '--workers=0', '--cached_path=C'],
     'pass --workers=8 (now 0), or copy the tokens to a local disk')])
def test_what_helps_against_waiting(flags, remedies):
    config = parse_training(['--bs=64', *flags])
    assert waiting_note(config, 0.347, num_cpus=8) == f'waiting for data takes 35% of the time: {remedies}'


# ---------------------------------------------------------------------------------------------- TensorBoard
def test_samples_settings_and_times_are_in_tensorboard(folder):
    """Samples at both evaluations, of other weights: other pictures of the same noise."""
    [events] = [EventAccumulator(str(path), size_guidance={'images': 0}).Reload()
                for path in folder.glob('tb-*')]
    first, last = events.Images('AR_samples')
    assert first.step < last.step and first.encoded_image_string != last.encoded_image_string
    assert '| depth | 1 |' in events.Tensors('settings/text_summary')[0].tensor_proto.string_val[0].decode()
    shares = [events.Scalars(f'AR_time/{name}') for name in ('data', 'tokenizer', 'model')]
    assert sum(share[-1].value for share in shares) == pytest.approx(1, abs=1e-5)
    assert 0 < events.Scalars('AR_time/mfu')[-1].value < 1


def test_without_tensorboard_nothing_else_changes(folder, train_here, tmp_path):
    """Samples draw no random numbers of the training."""
    tokenizer = folder.parent / 'vae' / 'vae-ckpt-best.pth'
    train_here(tmp_path, f'--vae_ckpt={tokenizer}', '--ep=3', '--eval_every=2', '--fp16=2', '--tb=0')
    assert not list(tmp_path.glob('tb-*'))
    assert [line['L_mean'] for line in epochs_of(tmp_path)] == [line['L_mean'] for line in epochs_of(folder)]


def test_wandb_gets_what_tensorboard_gets(monkeypatch, tmp_path):
    """The same run for all starts of a training."""
    calls = []
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=lambda **options: calls.append(options)))
    for name in ('a', 'b', 'a'):
        log.mirror_in_wandb('digits', name, tmp_path / name, dict(depth=1))
    ids = [call.pop('id') for call in calls]
    assert ids[0] == ids[2] != ids[1]
    assert calls[0] == dict(project='digits', name='a', resume='allow', dir=str(tmp_path / 'a'),
                            config=dict(depth=1), sync_tensorboard=True)


def test_wandb_without_a_login_is_told_in_one_line(monkeypatch, tmp_path):
    class Error(Exception):
        pass

    def init(**_):
        raise Error('no API key\nconfigured')
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init, Error=Error))
    with pytest.raises(ValueError, match=r'cannot begin a run \(no API key configured\): log in'):
        log.mirror_in_wandb('digits', 'a', tmp_path, {})


@pytest.mark.parametrize(('flags', 'message'), [
    (['--wandb=digits'], '--wandb needs a package: pip install wandb'),
    (['--wandb=digits', '--tb=0'], '--wandb sends what TensorBoard gets'),
])
def test_wandb_is_refused_in_one_line(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit):
        parse_training(['--data_path=digits', *flags])
    assert capsys.readouterr().err.startswith(f'train.py: {message}')


# ---------------------------------------------------------------------------------------------- curves
def test_curves_have_each_evaluation_once(folder):
    curves = read_curves(folder)
    steps = [line['it'] for line in epochs_of(folder)]
    assert curves['L_mean'].steps == steps
    assert curves['vL_mean'].steps == steps[1:]
    assert 'lr' not in curves and 'vL_tail' in curves


def test_an_evaluation_with_one_score_as_before_is_kept(tmp_path):
    """A line without a new evaluation repeats all scores, not one of them."""
    lines = [dict(it=i, loss=1., vloss=loss, vacc=0.5) for i, loss in ((1, 3.), (2, 3.), (3, 2.))]
    (tmp_path / 'log.txt').write_text('\n'.join(map(json.dumps, lines)))
    assert read_curves(tmp_path)['vacc'].steps == [1, 3]


def test_curves_of_runs_are_drawn_side_by_side(folder, tmp_path):
    draw([folder, folder.parent / 'vae'], tmp_path / 'curves.png')
    with Image.open(tmp_path / 'curves.png') as picture:
        assert picture.size[0] > 1000  # three panels in a row
    assert short_names([folder, folder.parent / 'vae']) == ['var', 'vae']


@pytest.fixture
def stored(folder, tmp_path, monkeypatch):
    """A file of stored curves that holds the trainings of `folder`."""
    path = tmp_path / 'curves.json'
    monkeypatch.setattr(reference, 'STORED_CURVES', path)
    monkeypatch.setattr(sys, 'argv', ['', 'demo', str(folder.parent)])
    reference_curves.main()
    return path


def test_only_the_same_training_has_stored_curves(folder, stored):
    config = reference.settings_of(folder)
    elsewhere = dataclasses.replace(config, seed=9, output_dir='x', eval_every=1)
    for same in (config, elsewhere):
        assert reference.find_reference(same).name == 'demo/var'
    for changed in (dict(base_lr=1e-3), dict(init_from='x.pth'), dict(vae_ckpt='x.pth'), dict(epochs=4)):
        assert reference.find_reference(dataclasses.replace(config, **changed)) is None
    stored.unlink()
    assert reference.find_reference(config) is None


def test_an_evaluation_outside_the_stored_band_is_told(stored, train_here, tmp_path):
    entries = json.loads(stored.read_text())
    band = entries['demo/vae']['curves']['vpsnr']
    band['low'][-1] = 90.
    stored.write_text(json.dumps(entries))
    train_here(tmp_path / 'vae', '--ep=2', '--seed=4', '--eval_every=1', base=VQVAE_FLAGS)
    lines = (tmp_path / 'vae' / 'stdout.txt').read_text().splitlines()
    assert len([line for line in lines if 'these are the settings of recipes/demo.sh' in line]) == 1
    outside = [line for line in lines if 'of held-out images, the band of' in line]
    assert len(outside) == 1 and 'after 10 steps, psnr ' in outside[0] and ' is not in 90 to ' in outside[0]


def test_numbers_that_are_not_finite_lie_outside_every_band():
    bands = dict(vL_mean=reference.Band([5], [1.], [2.]))
    stored_run = reference.Reference('demo/var', 'recipes/demo.sh', bands)
    assert stored_run.departure(5, dict(L_mean=1.5, acc_mean=9.)) == ''
    assert stored_run.departure(4, dict(L_mean=9.)) == '', 'nothing is stored of this step'
    for value in (0.9, 2.1, math.nan, math.inf):
        assert 'see demo/var in recipes/' in stored_run.departure(5, dict(L_mean=value))


def test_the_band_is_drawn_behind_the_curve(folder, stored, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr('matplotlib.axes.Axes.fill_between', lambda self, *band, **style: drawn.append(band))
    draw([folder], tmp_path / 'curves.png')
    curves = read_curves(folder)
    assert [band[0] for band in drawn] == [curves[name].steps for name in ('L_mean', 'vL_mean')]
    for (_, low, high), name in zip(drawn, ('L_mean', 'vL_mean'), strict=True):
        assert all(map(lambda *values: sorted(values) == [*values], low, curves[name].values, high))


def test_folders_without_a_log_have_no_curves(tmp_path):
    with pytest.raises(ValueError, match='expected the log of a training'):
        read_curves(tmp_path)
