"""Trainings that are really killed end, once started again, as if nothing had happened; none runs twice."""
import random
import signal
import time

import pytest

from tests.runs import (
    STEPS_PER_EPOCH,
    VQVAE_WITH_GAN,
    assert_equal,
    kill_tree,
    launch,
    message,
    read,
    same_weights,
    start,
    start_ranks,
    training,
)

EPOCHS = 12


def long_training(data, folder, *more):
    return training(data, folder, f'--ep={EPOCHS}', '--save_every=3', *more, model='var')


def wait_for(path, is_running):
    while not path.exists() and is_running():
        time.sleep(0.02)


def assert_continues(data, straight, folder, nproc, *more):
    """What a kill has left is a checkpoint within the run, from which it ends like the one in `straight`."""
    interrupted = read(folder)
    position = interrupted['epoch'] * STEPS_PER_EPOCH + interrupted['iter']
    assert 0 < position < EPOCHS * STEPS_PER_EPOCH
    launch('train.py', long_training(data, folder, *more), nproc)
    launch('train.py', long_training(data, straight), nproc)
    final = read(folder)
    expected = read(straight)
    assert (final['epoch'], final['iter']) == (EPOCHS, 0)
    assert same_weights(final, expected)
    assert final['run']['best'] == expected['run']['best']


@pytest.mark.slow
def test_killed_training_with_workers_goes_on(data, tmp_path):
    folder = tmp_path / 'killed'
    process, = start_ranks('train.py', [long_training(data, folder, '--workers=2')], tmp_path)
    wait_for(folder / 'ar-ckpt-last.pth', process.is_alive)
    time.sleep(random.Random('12').uniform(0.1, 0.8))
    kill_tree(process.pid)
    process.join()
    assert process.exitcode == -signal.SIGKILL, 'the run ended before it was killed'
    assert_continues(data, tmp_path / 'straight', folder, 1, '--workers=2')


@pytest.mark.slow
def test_killed_training_of_two_processes_goes_on(data, tmp_path):
    folder = tmp_path / 'killed'
    process = start('train.py', long_training(data, folder), nproc=2)
    wait_for(folder / 'ar-ckpt-last.pth', lambda: process.poll() is None)
    time.sleep(random.Random('20').uniform(0.1, 0.8))
    killed = kill_tree(process.pid)
    assert process.wait() == -signal.SIGKILL, 'the run ended before it was killed'
    assert len(killed) >= 3, 'the launcher and both ranks'
    assert_continues(data, tmp_path / 'straight', folder, 2)


@pytest.mark.slow
def test_killed_training_of_a_tokenizer_goes_on(data, tmp_path):
    """At any moment of a run with deferral, k-means, restarts, GAN and averaged weights."""
    def flags(folder):
        return [f'--data_path={data[0]}', f'--output_dir={folder}', *VQVAE_WITH_GAN, '--ep=10', '--defer=20',
                '--disc_start=30', '--save_every=3']
    folder = tmp_path / 'killed'
    process = start('train.py', flags(folder), nproc=2)
    wait_for(folder / 'vae-ckpt-last.pth', lambda: process.poll() is None)
    time.sleep(random.Random(2).uniform(0.5, 4))
    kill_tree(process.pid)
    assert process.wait() == -signal.SIGKILL, 'the run ended before it was killed'
    assert read(folder, 'vae-ckpt-last.pth')['epoch'] < 10
    launch('train.py', flags(folder), nproc=2)
    launch('train.py', flags(tmp_path / 'straight'), nproc=2)
    final, expected = (read(path, 'vae-ckpt-last.pth') for path in (folder, tmp_path / 'straight'))
    assert_equal(final['trainer'], expected['trainer'])


def test_folder_in_use_is_refused(data, train_here, tmp_path, capsys):
    folder = tmp_path / 'used'
    process, = start_ranks('train.py', [long_training(data, folder)], tmp_path)
    wait_for(folder / 'stdout.txt', process.is_alive)
    text = message(lambda: train_here(folder, '--ep=1'), capsys)
    kill_tree(process.pid)
    process.join()
    assert f'in use by process {process.pid} on host' in text
    train_here(tmp_path / 'other', '--ep=1')
