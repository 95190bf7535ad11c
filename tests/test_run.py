"""Whole trainings: kill and resume, ranks, accumulation, logs, tokenizer into generator, and bad input."""
import json
import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sample
import train
import trainer
from configs import parse_sample_recipe
from evaluation.metrics import to_uint8
from evaluation.score import ScoreSettings, score_images
from tests.runs import (
    BATCH,
    CLASSES,
    STEPS_PER_EPOCH,
    VAR_FLAGS,
    VQVAE_FLAGS,
    kill_tree,
    launch,
    make_folder,
    message,
    read,
    same_weights,
    start,
)
from utils.checkpoint import newest_checkpoint
from utils.data import build_dataset
from utils.misc import auto_resume


def largest_difference(a, b):
    return max((value.float() - b['trainer']['var_wo_ddp'][name].float()).nan_to_num().abs().max().item()
               for name, value in a['trainer']['var_wo_ddp'].items())


# ---------------------------------------------------------------------------------------------- exactness
EPOCHS = 12


def run_flags(data, folder, *more):
    return [f'--data_path={data[0]}', f'--vae_ckpt={data[1]}', *VAR_FLAGS, f'--output_dir={folder}',
            f'--ep={EPOCHS}', '--save_every=3', *more]


@pytest.fixture(scope='session')
def straight(data, tmp_path_factory):
    """Uninterrupted runs by number of processes, made on demand."""
    done = {}

    def get(nproc):
        if nproc not in done:
            folder = tmp_path_factory.mktemp(f'straight{nproc}')
            launch('train.py', run_flags(data, folder), nproc)
            done[nproc] = read(folder)
        return done[nproc]
    return get


@pytest.mark.parametrize(('nproc', 'workers'), [(1, 2), (2, 0)])
def test_killed_and_restarted_equals_straight(data, straight, tmp_path, nproc, workers):
    flags, last = run_flags(data, tmp_path, f'--workers={workers}'), tmp_path / 'ar-ckpt-last.pth'
    process = start('train.py', flags, nproc)
    while not last.exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(random.Random(f'{nproc}{workers}').uniform(0.1, 0.8))
    killed = kill_tree(process.pid)
    assert process.wait() == -signal.SIGKILL, 'the run ended before it was killed'
    assert len(killed) >= nproc + (nproc > 1)  # the launcher and every worker
    interrupted = read(tmp_path)
    position = interrupted['epoch'] * STEPS_PER_EPOCH + interrupted['iter']
    assert 0 < position < EPOCHS * STEPS_PER_EPOCH
    launch('train.py', flags, nproc)
    final, expected = read(tmp_path), straight(nproc)
    assert (final['epoch'], final['iter']) == (EPOCHS, 0)
    assert same_weights(final, expected)
    assert final['run']['best'] == expected['run']['best']


def test_two_processes_and_accumulation_equal_one(data, tmp_path, train_here):
    """With label dropout, drop path, augmentation and order: all depend on the place in the global batch."""
    one = read(train_here(tmp_path / '1', '--ep=1'))
    four_micro = read(train_here(tmp_path / 'ac4', '--ep=1', '--ac=4'))
    launch('train.py', run_flags(data, tmp_path / '2', '--ep=1'), nproc=2)
    two = read(tmp_path / '2')
    assert one['epoch'] * one['run']['steps_per_epoch'] == 5
    assert largest_difference(one, two) < 1e-6
    assert largest_difference(one, four_micro) < 1e-6
    moved = train_here(tmp_path / 'other', '--ep=1', '--same_seed_for_all_ranks=1')
    assert largest_difference(one, read(moved)) > 1e-4  # the comparison would notice another order


class Interrupt(Exception):
    pass


# images of 32x32, the smallest that the discriminator takes
VQVAE_32 = [{'--pn=1_2_4': '--pn=1_2_8'}.get(flag, flag) for flag in VQVAE_FLAGS]

GAN_FLAGS = ['--disc=patchgan', '--disc_width=8', '--disc_ramp=4', '--disc_blur=4', '--lecam=0.1',
             '--lpips=pyramid']


def assert_equal(actual, expected, path=''):
    """Equal trees of tensors and plain values, bit for bit."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key in expected:
            assert_equal(actual[key], expected[key], f'{path}.{key}')
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), path
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_equal(*pair, f'{path}.{i}')
    else:
        assert torch.equal(torch.as_tensor(actual), torch.as_tensor(expected)) \
            if isinstance(expected, torch.Tensor) else actual == expected, path


def test_tokenizer_resume_is_exact(train_here, tmp_path, monkeypatch):
    """Across deferral, k-means (after step 3), restarts (4, 6, 8, 10) and the start of the GAN (5)."""
    monkeypatch.setattr('models.tokenizers.codebook.CHECK_EVERY', 2)
    monkeypatch.setattr('models.tokenizers.codebook.MIN_PATIENCE', 1)
    monkeypatch.setattr('models.tokenizers.codebook.PATIENCE_TOKENS', 0)
    flags = ('--ep=3', '--save_every=1', '--dropout=0.1', '--defer=3', '--disc_start=5', *GAN_FLAGS)
    expected = read(train_here(tmp_path / 'a', *flags, base=VQVAE_32), 'vae-ckpt-last.pth')
    assert expected['trainer']['training_state']['upkeeps'][0]['num_restarts'] > 0
    step = train.Run.train_step

    def interrupted(self, images, labels, number):
        if number == stop_at:
            raise Interrupt
        return step(self, images, labels, number)
    for stop_at in (3, 10):
        folder = tmp_path / f'{stop_at}'
        with monkeypatch.context() as patch, pytest.raises(Interrupt):
            patch.setattr(train.Run, 'train_step', interrupted)
            train_here(folder, *flags, base=VQVAE_32)
        final = read(train_here(folder, *flags, base=VQVAE_32), 'vae-ckpt-last.pth')
        assert final['trainer'].keys() == {'config', 'training_state', 'vae_wo_ddp', 'vae_opt', 'vae_ema',
                                           'ema_updates', 'criterion', 'disc_opt'}
        assert_equal(final['trainer'], expected['trainer'])


@pytest.mark.slow
def test_killed_tokenizer_training_equals_straight(data, tmp_path):
    """SIGKILL at any moment of a run with deferral, k-means, restarts, GAN and averaged weights."""
    nproc = 2
    def flags(folder):
        return [f'--data_path={data[0]}', f'--output_dir={folder}', *VQVAE_32, *GAN_FLAGS, '--ep=10',
                '--defer=20', '--disc_start=30', '--save_every=3']
    launch('train.py', flags(tmp_path / 'a'), nproc)
    expected = read(tmp_path / 'a', 'vae-ckpt-last.pth')
    process = start('train.py', flags(tmp_path / 'b'), nproc)
    while not (tmp_path / 'b' / 'vae-ckpt-last.pth').exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(random.Random(nproc).uniform(0.5, 4))
    kill_tree(process.pid)
    assert process.wait() == -signal.SIGKILL, 'the run ended before it was killed'
    assert read(tmp_path / 'b', 'vae-ckpt-last.pth')['epoch'] < 10
    launch('train.py', flags(tmp_path / 'b'), nproc)
    assert_equal(read(tmp_path / 'b', 'vae-ckpt-last.pth')['trainer'], expected['trainer'])


def test_tokenizer_codebook_is_equal_on_two_processes(data, tmp_path, train_here):
    launch('train.py', [f'--data_path={data[0]}', f'--output_dir={tmp_path / "2"}', *VQVAE_FLAGS, '--ep=1',
                        '--defer=2'], 2)
    one = read(train_here(tmp_path / '1', '--ep=1', '--defer=2', base=VQVAE_FLAGS),
               'vae-ckpt-last.pth')['trainer']
    two = read(tmp_path / '2', 'vae-ckpt-last.pth')['trainer']
    for name in ('quantize.embedding.weight', 'quantize.ema_vocab_hit_SV', 'encoder.conv_in.weight'):
        assert (one['vae_wo_ddp'][name] - two['vae_wo_ddp'][name]).abs().max() < 1e-5, name


# ---------------------------------------------------------------------------------------------- results
def test_tokenizer_drops_into_generator_training_and_logs_are_complete(train_here, tmp_path):
    train_here(tmp_path / 'vae', '--ep=2', base=VQVAE_FLAGS)
    folder = train_here(tmp_path / 'var', f'--vae_ckpt={tmp_path / "vae" / "vae-ckpt-best.pth"}', '--ep=3',
                        '--eval_every=2', '--fp16=2')
    checkpoint = read(folder, 'ar-ckpt-best.pth')
    assert checkpoint['classes'] == sorted(CLASSES)
    lines = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    assert lines[0]['args']['depth'] == 1 and [line['ep'] for line in lines[1:]] == ['1/3', '2/3', '3/3']
    assert lines[1]['vL_mean'] is None and lines[2]['vL_mean'] > 0 and lines[3]['vL_tail'] > 0
    assert {'it', 'lr', 'wd', 'grad_norm', 'L_mean', 'L_tail', 'acc_mean', 'acc_tail', 'remain_time',
            'finish_time'} <= lines[1].keys()
    text = (folder / 'stdout.txt').read_text()
    assert '[Ep]: [   0/3] [4/5]' in text and 'images/s' in text and '[*] [ep1]  (val 8)' in text
    events = EventAccumulator(str(next(folder.glob('tb-VARd1__pn1_2_4*')))).Reload()
    tags = set(events.Tags()['scalars'])
    assert {'AR_iter_loss/z_voc_usage', 'AR_iter_loss/acc_4', 'AR_iter_loss/L_16', 'AR_iter_schedule/prog_si',
            'AR_iter_schedule/prog_a_reso', 'AR_iter_schedule/prog_wp', 'AR_opt_lr/lr_min/sche_tlr',
            'AR_opt_lr/lr_max/sche_tlr', 'AR_opt_wd/wd_max/sche_twd', 'AR_opt_wd/wd_min/sche_twd',
            'AR_opt_grad/grad/grad_norm', 'AR_opt_grad/grad/grad_clip', 'AR_ep_loss/L_mean',
            'AR_ep_loss/vacc_tail', 'AR_z_burnout/rest_hours'} <= tags
    assert {event.step for event in events.Scalars('AR_iter_loss/z_voc_usage')} == {-10000, -1000, 0}


def test_first_loss_is_that_of_a_uniform_guess(train_here, tmp_path):
    folder = train_here(tmp_path, '--ep=1', '--tblr=1e-9')
    loss = json.loads((folder / 'log.txt').read_text().splitlines()[1])['L_mean']
    assert loss == pytest.approx(3.4657, rel=0.02)  # ln 32


def test_finished_run_ends_cleanly_and_keeps_its_weights(train_here, tmp_path):
    train_here(tmp_path, '--ep=1')
    before = read(tmp_path)
    train_here(tmp_path, '--ep=1')
    assert same_weights(before, read(tmp_path))


def test_folder_in_use_is_refused(data, train_here, tmp_path, capsys):
    process = start('train.py', run_flags(data, tmp_path))
    while not (tmp_path / 'stdout.txt').exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)
    text = message(lambda: train_here(tmp_path, '--ep=1'), capsys)
    kill_tree(process.pid)
    process.wait()
    assert f'in use by process {process.pid} on host' in text
    train_here(tmp_path / 'other', '--ep=1')


def test_changed_settings_are_named_on_resume(train_here, tmp_path):
    train_here(tmp_path, '--ep=2')
    train_here(tmp_path, '--ep=1', '--tblr=2e-2', '--save_every=7')
    text = (tmp_path / 'stdout.txt').read_text()
    assert 'another training: tblr 0.01 -> 0.02, ep 2 -> 1\n' in text
    assert 'nothing left to train: the checkpoint holds 10 steps of 5' in text


def test_best_score_survives_a_restart(train_here, tmp_path, monkeypatch):
    scores = iter([3., 5., 4., 2.])
    evaluate = trainer.GeneratorTrainer.eval_epoch
    monkeypatch.setattr(trainer.GeneratorTrainer, 'eval_epoch',
                        lambda *a: evaluate(*a) | dict(L_tail=next(scores)))
    train_here(tmp_path, '--ep=2', '--eval_every=1')
    assert read(tmp_path, 'ar-ckpt-best.pth')['epoch'] == 1
    train_here(tmp_path, '--ep=3', '--eval_every=1')
    assert read(tmp_path, 'ar-ckpt-best.pth')['epoch'] == 1
    train_here(tmp_path, '--ep=4', '--eval_every=1')
    assert read(tmp_path, 'ar-ckpt-best.pth')['epoch'] == 4


@pytest.mark.parametrize(('save_every', 'expected'), [('', [5, 10]), ('3', [3, 5, 6, 9, 10]),
                                                      ('1m', [*range(1, 11)])])
def test_checkpoints_by_step_and_by_minute(train_here, tmp_path, monkeypatch, save_every, expected):
    positions = []
    monkeypatch.setattr(train, 'save_checkpoint', lambda state, *_: positions.append(
        state['epoch'] * STEPS_PER_EPOCH + state['iter']))
    clock = iter(range(0, 10 ** 6, 60))  # every look at the clock is a minute later
    monkeypatch.setattr(train.time, 'time', lambda: next(clock))
    train_here(tmp_path, '--ep=2', f'--save_every={save_every}')
    assert positions == expected


def test_progressive_training_runs_every_stage(train_here, tmp_path):
    folder = train_here(tmp_path, '--ep=4', '--pg=0.8', '--pg0=0', '--wp=0.2', '--pgwp=0.5')
    lines = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()[1:]]
    assert lines[0]['L_tail'] < 0 < lines[-1]['L_tail']
    assert read(folder)['trainer']['config']['last_prog_si'] == 2


def test_auto_resume_has_the_published_form(train_here, tmp_path):
    class Args:
        local_out_dir_path = str(tmp_path)
    assert auto_resume(Args, 'ar-ckpt*.pth')[1:] == (0, 0, {}, {})
    train_here(tmp_path, '--ep=2')
    info, epoch, iteration, trainer_state, args_state = auto_resume(Args, 'ar-ckpt*.pth')
    assert (epoch, iteration) == (2, 0) and 'var_wo_ddp' in trainer_state and args_state['depth'] == 1
    assert str(tmp_path) in info[0]


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(('flags', 'words'), [
    (['--data_path=/nowhere'], ['/nowhere/train', '--data_path']),
    (['--num_classes=5'], ['--num_classes=5', '4 classes']),
    (['--num_clases=4'], ['--num_clases', '--num_classes']),
    (['--bs=9', '--ac=2'], ['--bs=9', '--bs=8']),
    (['--vae_ckpt=vae_ch160v4096z3.pth'], ['vae_ch160v4096z3.pth', 'vae_ch160v4096z32.pth']),
    (['--patch_size=8'], ['stride 4', '--patch_size=4']),
    (['--output_dir=/proc/nowhere'], ['/proc/nowhere', 'another one'])])
def test_bad_settings(train_here, tmp_path, capsys, flags, words):
    text = message(lambda: train_here(tmp_path, '--ep=1', *flags), capsys)
    assert all(word in text for word in words), text
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_replaced_and_listed_up_to_a_limit(train_here, tmp_path, capsys, workers):
    root = make_folder(tmp_path / 'images')
    (root / 'train' / 'bee' / '01.png').write_bytes(b'broken')
    flags = '--ep=2', f'--data_path={root}', f'--workers={workers}'
    checkpoint = read(train_here(tmp_path / 'out', *flags))
    assert len(checkpoint['run']['bad_images']) == 1 and "bee/01.png'" in checkpoint['run']['bad_images'][0]
    log = (tmp_path / 'out' / 'stdout.txt').read_text()
    assert log.count('an image is replaced by another one') == 1  # though it came in both epochs
    assert '1 images could not be read' in log
    text = message(lambda: train_here(tmp_path / 'none', *flags, '--max_bad_images=0'), capsys)
    assert "bee/01.png'" in text and '--max_bad_images=0' in text

    # an image of the validation is never replaced
    (root / 'val' / 'cow' / '02.png').write_bytes(b'broken')
    text = message(lambda: train_here(tmp_path / 'val', *flags), capsys)
    assert "cow/02.png'" in text and 'repair or remove' in text
    assert 'Traceback' in (tmp_path / 'val' / 'stdout.txt').read_text()  # the details are kept


@pytest.mark.parametrize(('flags', 'words'), [
    (['--depth=2'], ['depth=1 (here 2)']),
    (['--pn=1_3_4'], ['patch_nums=(1, 2, 4) (here (1, 3, 4))']),
    (['--saln=1'], ['shared_aln=False (here True)']),
    (['--seed=4'], ['seed 3', '--seed=4'])])
def test_checkpoint_of_another_run(train_here, tmp_path, capsys, flags, words):
    train_here(tmp_path, '--ep=1')
    before = (tmp_path / 'ar-ckpt-last.pth').read_bytes()
    text = message(lambda: train_here(tmp_path, '--ep=2', *flags), capsys)
    assert all(word in text for word in words), text
    assert (tmp_path / 'ar-ckpt-last.pth').read_bytes() == before


@pytest.mark.parametrize(('flags', 'words'), [
    (['--lpips=vgg'], ['vgg16-397923af.pth', '528 MB', 'vgg.pth', 'd507d7349b931f0638a25a48a722f98a',
                       '--lpips=none']),
    (['--lpips=vgg', '--lpips_path={heads}'], ['heads.pth', 'only the linear heads', '--lpips_vgg']),
    (['--lpips=vgg', '--lpips_vgg={wrong}', '--lpips_lin={heads}'],
     ['vgg16-397923af.pth', '397923af8e79cdbb']),
    (['--disc=dino'], ['DINO', '--dino_path']),
    (['--fp16=1'], ['float16', '--fp16=2']),
    (['--init_from=/nowhere.pth'], ['/nowhere.pth']),
    (['--disc=patchgan', '--disc_start=0'], ['at least 32 pixels', '16'])])
def test_bad_tokenizer_settings(train_here, tmp_path, capsys, monkeypatch, flags, words):
    heads, wrong = tmp_path / 'heads.pth', tmp_path / 'vgg16-397923af.pth'
    torch.save({f'lin{i}.model.1.weight': torch.rand(1, channels, 1, 1)
                for i, channels in enumerate((64, 128, 256, 512, 512))}, heads)
    torch.save({'features.0.weight': torch.zeros(64, 3, 3, 3)}, wrong)
    flags = [flag.format(heads=heads, wrong=wrong) for flag in flags]
    monkeypatch.chdir(tmp_path)
    text = message(lambda: train_here(tmp_path / 'run', '--ep=1', *flags, base=VQVAE_FLAGS), capsys)
    assert all(word in text for word in words), text


def test_tokenizer_settings_that_a_checkpoint_cannot_follow(train_here, tmp_path, capsys):
    train_here(tmp_path, '--ep=1', base=VQVAE_FLAGS)
    text = message(lambda: train_here(tmp_path, '--ep=2', '--ema=0', base=VQVAE_FLAGS), capsys)
    assert '--ema' in text and '--init_from' in text


def test_decoder_training_from_a_finished_tokenizer(train_here, tmp_path):
    train_here(tmp_path / 'a', '--ep=1', base=VQVAE_FLAGS)
    ckpt = tmp_path / 'a' / 'vae-ckpt-last.pth'
    train_here(tmp_path / 'b', '--ep=1', f'--init_from={ckpt}', '--train_only=decoder', base=VQVAE_FLAGS)
    first, second = read(tmp_path / 'a', 'vae-export.pth'), read(tmp_path / 'b', 'vae-export.pth')
    for name, value in first.items():
        kept = not name.startswith(('decoder', 'post_quant_conv', 'quantize.ema_vocab_hit'))
        assert not kept or torch.equal(value, second[name]), name
    assert not torch.equal(first['decoder.conv_out.weight'], second['decoder.conv_out.weight'])


def test_checkpoint_of_another_vocabulary(train_here, tmp_path, capsys):
    train_here(tmp_path / 'vae', '--ep=1', '--vocab_size=64', base=VQVAE_FLAGS)
    train_here(tmp_path / 'var', '--ep=1')
    text = message(lambda: train_here(tmp_path / 'var', '--ep=2',
                                      f'--vae_ckpt={tmp_path}/vae/vae-ckpt-last.pth'), capsys)
    assert 'vocab_size=32 (here 64)' in text


def test_generator_file_as_tokenizer(train_here, tmp_path, capsys):
    train_here(tmp_path, '--ep=1')
    flat = tmp_path / 'flat.pth'
    torch.save(read(tmp_path)['trainer']['var_wo_ddp'], flat)
    text = message(lambda: train_here(tmp_path / 'b', '--ep=1', f'--vae_ckpt={flat}'), capsys)
    assert 'holds no VQVAE' in text


def test_truncated_checkpoint_falls_back_and_says_so(train_here, tmp_path, capsys):
    train_here(tmp_path, '--ep=2', '--eval_every=1')
    last = tmp_path / 'ar-ckpt-last.pth'
    (tmp_path / 'ar-ckpt-best.pth').unlink()
    last.write_bytes(last.read_bytes()[:-1000])
    train_here(tmp_path, '--ep=3', '--eval_every=1')
    text = (tmp_path / 'stdout.txt').read_text()
    assert "ar-ckpt-last.pth' cannot be read" in text and 'falling back' in text
    assert 'resumed from' in text and 'ar-ckpt-prev.pth at epoch 1' in text
    assert read(tmp_path)['epoch'] == 3
    for path in tmp_path.glob('*.pth'):
        path.write_bytes(path.read_bytes()[:500])
    assert 'none of the' in message(lambda: train_here(tmp_path, '--ep=3'), capsys)


def test_full_disk_keeps_the_old_checkpoint(train_here, tmp_path, capsys):
    train_here(tmp_path, '--ep=1')
    before = (tmp_path / 'ar-ckpt-last.pth').read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # no file may grow beyond this
    try:
        text = message(lambda: train_here(tmp_path, '--ep=2'), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'could not save a checkpoint' in text and 'free some space' in text
    assert (tmp_path / 'ar-ckpt-last.pth').read_bytes() == before
    assert not list(tmp_path.glob('.*.tmp'))
    train_here(tmp_path, '--ep=2')
    assert newest_checkpoint(tmp_path, 'ar-ckpt-last.pth')[1]['epoch'] == 2


def test_file_systems_without_hard_links_and_leftovers_of_a_kill(train_here, tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError('no hard links here')
    monkeypatch.setattr('os.link', no_links)
    (tmp_path / '.ar-ckpt-last.pth.tmp').write_bytes(b'half a checkpoint')
    (tmp_path / '.ar-ckpt-prev.pth.tmp').write_bytes(b'half a checkpoint')
    train_here(tmp_path, '--ep=2')
    assert (read(tmp_path, 'ar-ckpt-prev.pth')['epoch'], read(tmp_path)['epoch']) == (1, 2)
    assert not list(tmp_path.glob('.*.tmp'))


def test_non_finite_loss_stops_with_a_line(train_here, tmp_path, capsys):
    flags = '--ep=2', '--tblr=1e12', '--tclip=0', '--max_skipped_steps=4'
    text = message(lambda: train_here(tmp_path, *flags), capsys)
    assert 'not finite' in text and 'lower the learning rate' in text


def test_other_batch_size_within_an_epoch(train_here, tmp_path, capsys, monkeypatch):
    step = train.Run.train_step
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        def interrupted(self, images, labels, number):
            if number == 3:
                raise Interrupt
            return step(self, images, labels, number)
        patch.setattr(train.Run, 'train_step', interrupted)
        train_here(tmp_path, '--ep=2', '--save_every=2')
    text = message(lambda: train_here(tmp_path, '--ep=2', f'--bs={BATCH // 2}'), capsys)
    assert 'epoch of 5 steps' in text and '--bs' in text


# ---------------------------------------------------------------------------------------------- distance
FID_FLAGS = ['--ep=2', '--eval_every=1', '--ema=0.9', '--fid_images=20', '--fid_features=digits',
             '--fid_flags=--cfg=2 --top_k=8 --bs=7']


def epoch_lines(folder):
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()][1:]


def test_distance_of_samples_during_training(data, train_here, tmp_path):
    folder = train_here(tmp_path / 'a', *FID_FLAGS)
    curve = [line['fid_0.02k'] for line in epoch_lines(folder) if 'fid_0.02k' in line]
    assert len(curve) == 2 and curve[0] != curve[1] and min(curve) > 0
    scalars = EventAccumulator(str(next(folder.glob('tb-*')))).Reload()
    assert [event.value for event in scalars.Scalars('AR_ep_loss/fid_0.02k')] == pytest.approx(curve)

    # the last point again, from the checkpoint: averaged weights, the same noise, the same reference
    flags = [f'--ckpt={folder / "ar-ckpt-last.pth"}', '--num_images=20', f'--output={tmp_path / "drawn"}']
    sample.sample(parse_sample_recipe([*flags, '--cfg=2', '--top_k=8', '--bs=7']))
    pictures = [image for image, _ in build_dataset(str(data[0]), 16)[2]]
    np.savez(tmp_path / 'val.npz', arr_0=to_uint8(torch.stack(pictures)).permute(0, 2, 3, 1).numpy())
    report = score_images(ScoreSettings(features='digits', ref=str(tmp_path / 'val.npz'), cache='',
                                        sample=str(tmp_path / 'drawn.npz'), allow_any_count=True))
    assert report['scores']['fid'] == pytest.approx(curve[-1], rel=1e-3)

    # drawing changes nothing of the training, and two processes draw the same
    without = [flag for flag in FID_FLAGS if not flag.startswith('--fid')]
    plain = train_here(tmp_path / 'plain', *without)
    assert same_weights(read(plain), read(folder)) and same_weights(read(plain), read(folder), 'var_ema')
    launch('train.py', [f'--data_path={data[0]}', f'--vae_ckpt={data[1]}', *VAR_FLAGS,
                        f'--output_dir={tmp_path / "two"}', *FID_FLAGS], nproc=2)
    assert epoch_lines(tmp_path / 'two')[-1]['fid_0.02k'] == pytest.approx(curve[-1], rel=1e-3)


def test_missing_inception_weights_do_not_stop_a_training(train_here, tmp_path, monkeypatch):
    monkeypatch.setenv('INCEPTION_WEIGHTS', str(tmp_path / 'nowhere.pth'))
    train_here(tmp_path / 'a', '--ep=1', '--fid_images=20')
    text = (tmp_path / 'a' / 'stdout.txt').read_text()
    assert '--fid_images is off: no Inception weights at' in text and 'nowhere.pth' in text
    assert not any(name.startswith('fid') for name in epoch_lines(tmp_path / 'a')[-1])


def test_distance_that_a_kill_prevented_is_drawn_by_the_next_start(train_here, tmp_path, monkeypatch):
    straight = [line for line in epoch_lines(train_here(tmp_path / 'a', *FID_FLAGS)) if 'fid_0.02k' in line]
    draw = train.Run.draw_distance

    def killed(self, epoch):
        raise KeyboardInterrupt
    monkeypatch.setattr(train.Run, 'draw_distance', killed)
    with pytest.raises(SystemExit, match='interrupted'):
        train_here(tmp_path / 'b', *FID_FLAGS)
    monkeypatch.setattr(train.Run, 'draw_distance', draw)
    train_here(tmp_path / 'b', *FID_FLAGS)
    lines = epoch_lines(tmp_path / 'b')
    assert [line for line in lines if 'fid_0.02k' in line] == straight
    assert [line['ep'] for line in lines] == ['1/2', '1/2', '2/2', '2/2']  # an epoch, then its distance
    train_here(tmp_path / 'b', *FID_FLAGS)  # nothing is left to draw
    assert epoch_lines(tmp_path / 'b') == lines


@pytest.mark.parametrize(('flag', 'word'), [
    ('--fid_flags=--top_q=3', '--top_p'), ('--fid_flags=--cfg=x', '--cfg'),
    ('--fid_flags=--classes=3', 'classes'), ('--fid_flags=--top_k=900', 'top_k'),
    ("--fid_flags='", 'quotation'),
    ('--fid_ref=nowhere.npz', 'nowhere.npz'), ('--inception_weights=nowhere.pth', 'nowhere.pth')])
def test_flags_of_the_distance_are_checked_first(train_here, tmp_path, capsys, flag, word):
    features = '--fid_features=' + ('inception' if 'inception' in flag else 'digits')
    with pytest.raises(SystemExit) as stop:
        train_here(tmp_path, '--ep=1', '--fid_images=20', features, flag)
    assert word in capsys.readouterr().err + str(stop.value)
    assert not (tmp_path / 'ar-ckpt-last.pth').exists()


def test_a_copied_folder_continues_from_its_last_checkpoint(tmp_path):
    """Copies have other times than the originals."""
    for epoch, name in enumerate(('best', 'prev', 'last')):
        torch.save(dict(epoch=epoch, iter=0, trainer={}), tmp_path / f'ar-ckpt-{name}.pth')
        os.utime(tmp_path / f'ar-ckpt-{name}.pth', ns=(10 ** 18 - epoch, 10 ** 18 - epoch))
    for name in ('last', 'prev', 'best'):
        assert newest_checkpoint(tmp_path, 'ar-ckpt*.pth')[0].stem == f'ar-ckpt-{name}'
        (tmp_path / f'ar-ckpt-{name}.pth').unlink()
