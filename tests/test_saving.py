"""Checkpoints are written while the training goes on, kept as asked, and restored after bad steps."""
import errno
import logging
import threading
import time
from unittest import mock

import pytest
import torch

import train
from tests.runs import assert_equal, message, prepared, read, steps_of, training
from training import saving
from training.faults import LossSpikes
from utils.checkpoint import load_file

PREFIX = 'ar-ckpt'


def state_of(step):
    """What a checkpoint holds, as far as saving looks at it: two names of one tensor among it."""
    weight = torch.full((3, 2), float(step))
    return dict(epoch=0, iter=step, run=dict(bad_images=[f'image {step}']),
                trainer=dict(var_wo_ddp=dict(head=weight, tied=weight), moments=[torch.tensor(step)]))


# ---------------------------------------------------------------------------------------------- background
def test_what_is_saved_is_the_state_at_that_step(tmp_path, monkeypatch):
    go_on = threading.Event()
    write = saving.write_checkpoint

    def held(*args, **kwargs):
        assert go_on.wait(20)
        write(*args, **kwargs)
    monkeypatch.setattr(saving, 'write_checkpoint', held)
    state = state_of(1)
    with saving.CheckpointWriter(tmp_path, PREFIX) as checkpoints:
        checkpoints.save(state, 1)
        assert not list(tmp_path.glob('*.pth')), 'it is written in the background'
        # the training goes on and changes everything in place
        state['trainer']['var_wo_ddp']['head'].zero_()
        state['run']['bad_images'].append('later')
        state['trainer']['moments'][0].zero_()
        go_on.set()
        checkpoints.wait()
        saved = read(tmp_path)
        assert_equal(saved, state_of(1))
        names = saved['trainer']['var_wo_ddp']
        assert names['head'].data_ptr() == names['tied'].data_ptr()
        # the memory of the copy serves the next save
        checkpoints.save(state_of(2), 2)
    assert_equal(read(tmp_path), state_of(2))
    assert_equal(read(tmp_path, 'ar-ckpt-prev.pth'), state_of(1))


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_failing_write_is_told_at_once_and_costs_nothing(tmp_path, monkeypatch, caplog):
    with saving.CheckpointWriter(tmp_path, PREFIX) as checkpoints:
        checkpoints.save(state_of(1), 1)
        checkpoints.wait()
        monkeypatch.setattr(saving, 'write_checkpoint', full_disk)
        checkpoints.save(state_of(2), 2)
        while not checkpoints.has_failed:
            time.sleep(0.01)
        assert 'the checkpoint of step 2 is lost' in caplog.text
        with pytest.raises(OSError, match='No space left'):
            checkpoints.save(state_of(3), 3)
    assert_equal(load_file(tmp_path / 'ar-ckpt-last.pth', verify=True), state_of(1))


def test_a_training_ends_when_a_checkpoint_is_lost(train_here, tmp_path, monkeypatch, capsys):
    write = saving.write_checkpoint

    def once_full(state, *args, **kwargs):
        if state['iter'] == 4:
            full_disk()
        write(state, *args, **kwargs)
    monkeypatch.setattr(saving, 'write_checkpoint', once_full)
    text = message(lambda: train_here(tmp_path, '--ep=9', '--save_every=2'), capsys)
    assert 'No space left on device' in text
    assert read(tmp_path)['iter'] == 2


def test_a_training_is_the_same_with_and_without_the_thread(train_here, tmp_path):
    flags = '--ep=2', '--save_every=1', '--ema=0.9'
    runs = [train_here(tmp_path / name, *flags, f'--background_save={name}') for name in ('1', '0')]
    for name in ('ar-ckpt-last.pth', 'ar-ckpt-prev.pth'):
        a, b = (read(folder, name) for folder in runs)
        assert_equal(a['trainer'], b['trainer'])
        assert_equal(a['run'], b['run'])


# ---------------------------------------------------------------------------------------------- what is kept
def test_older_checkpoints_are_kept_as_asked(tmp_path):
    with saving.CheckpointWriter(tmp_path, PREFIX, keep_newest=4, keep_every=4) as checkpoints:
        for step in range(2, 13, 2):
            checkpoints.save(state_of(step), step)
    found = {path.name: read(tmp_path, path.name)['iter'] for path in tmp_path.iterdir()}
    assert found == {'ar-ckpt-last.pth': 12, 'ar-ckpt-prev.pth': 10, 'ar-ckpt-prev2.pth': 8,
                     'ar-ckpt-prev3.pth': 6, 'ar-ckpt-step00000004.pth': 4, 'ar-ckpt-step00000008.pth': 8,
                     'ar-ckpt-step00000012.pth': 12}

    # of damaged ones the next older is taken, and fewer are kept from the next save on
    order = ['last', 'prev', 'prev2', 'prev3', 'step00000012', 'step00000008', 'step00000004']
    for name in order:
        found = train.choose_checkpoint(tmp_path, f'{PREFIX}*.pth')
        assert found.path.name == f'ar-ckpt-{name}.pth'
        found.path.rename(tmp_path / f'{name}.away')
    for path in tmp_path.glob('*.away'):
        path.rename(tmp_path / f'ar-ckpt-{path.stem}.pth')
    with saving.CheckpointWriter(tmp_path, PREFIX, keep_newest=1) as checkpoints:
        checkpoints.save(state_of(14), 14)
    assert not list(tmp_path.glob('*prev*')) and len(list(tmp_path.glob('*step*'))) == 3


def test_a_training_saves_where_a_checkpoint_is_to_be_kept(train_here, tmp_path):
    train_here(tmp_path, '--ep=2', '--keep_every=3')
    assert sorted(path.stem[-4:] for path in tmp_path.glob('ar-ckpt-step*')) == ['0003', '0006', '0009']
    position = read(tmp_path, 'ar-ckpt-step00000006.pth')
    assert (position['epoch'], position['iter']) == (1, 1)


def test_a_command_follows_every_save(tmp_path, caplog):
    """It finds the file of its own save, whatever is saved meanwhile, and its failure is only named."""
    out = tmp_path / 'out'
    out.mkdir()
    command = f'sleep 0.5; cp "$CHECKPOINT" {out}/$STEP.pth; exit 3'
    with caplog.at_level(logging.WARNING), \
            saving.CheckpointWriter(tmp_path, PREFIX, command=command) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state_of(step), step)
            checkpoints.wait()
    assert [path.name for path in out.iterdir()] == ['1.pth']
    assert_equal(read(out, '1.pth'), state_of(1))
    assert 'left out at step 2' in caplog.text and 'exit code 3' in caplog.text
    assert not list(tmp_path.glob('.*')) and read(tmp_path)['iter'] == 2


# ---------------------------------------------------------------------------------------------- bad steps
def bad_batches(monkeypatch, *steps):
    """Let the gradient of these steps be infinite, whatever the weights are."""
    train_step = train.Run.train_step
    backward = torch.Tensor.backward

    def overflowing(self, *args, **kwargs):
        return backward(self * torch.inf, *args, **kwargs)

    def patched(self, images, labels, step):
        with mock.patch.object(torch.Tensor, 'backward', overflowing if step in steps else backward):
            return train_step(self, images, labels, step)
    monkeypatch.setattr(train.Run, 'train_step', patched)


@pytest.mark.parametrize('precision', [0, pytest.param(1, marks=pytest.mark.slow),
                                       pytest.param(2, marks=pytest.mark.slow)])
def test_bad_batches_are_gone_past(data, train_here, tmp_path, monkeypatch, precision):
    flags = ('--ep=3', '--save_every=3', '--max_skipped_steps=2', '--log_every=1', '--eval_every=9',
             f'--fp16={precision}')
    with monkeypatch.context() as patch:
        bad_batches(patch, 8, 9)
        folder = train_here(tmp_path / 'restored', *flags)
    final = read(folder)
    assert final['run']['left_out'] == [(6, 9)] and final['run']['skipped_steps'] == 0
    assert 'restored, and steps 6 to 9 are left out' in (folder / 'stdout.txt').read_text()
    assert [line['step'] for line in steps_of(folder)] == [*range(6), *range(10, 15)]
    assert '"first": 6, "last": 9' in (folder / 'left_out.jsonl').read_text()

    # as if these steps had been left out from the beginning
    run = prepared(training(data, tmp_path / 'plain', *flags, model='var'))
    run.state.left_out = [(6, 9)]
    train.train(run)
    run.wait_for_checkpoint()
    plain = read(tmp_path / 'plain')
    assert_equal(final['trainer'], plain['trainer'])
    assert final['run'] == plain['run']


def test_too_many_restores_end_the_run(train_here, tmp_path, monkeypatch, capsys):
    bad_batches(monkeypatch, *range(4, 30))
    flags = '--ep=6', '--save_every=2', '--max_skipped_steps=2', '--max_restores=2', '--eval_every=9'
    text = message(lambda: train_here(tmp_path, *flags), capsys)
    assert 'were not finite' in text
    assert len((tmp_path / 'left_out.jsonl').read_text().splitlines()) == 2


def test_a_leap_of_the_loss_is_named_once(caplog):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=generator).mul(0.1).tolist()
    losses = [8 - step / 100 + noise[step] for step in range(400)]
    losses[250] = 12.
    losses[370:] = [loss + 6 for loss in losses[370:]]
    losses[120] = float('nan')
    spikes = LossSpikes()
    with caplog.at_level(logging.WARNING):
        for step, loss in enumerate(losses):
            spikes.add(step, loss)
    assert [record.args[0] for record in caplog.records] == [250, 370]


def test_a_run_that_ends_among_bad_steps_is_an_error(train_here, tmp_path, monkeypatch, capsys):
    """No checkpoint is restored where nothing would follow it."""
    bad_batches(monkeypatch, *range(7, 10))
    flags = '--ep=2', '--save_every=3', '--max_skipped_steps=3', '--eval_every=9'
    for _ in range(2):
        text = message(lambda: train_here(tmp_path, *flags), capsys)
        assert 'up to step 9 were not finite' in text
    assert read(tmp_path)['epoch'] < 2
