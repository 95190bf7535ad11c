"""Runs that are stopped, go wrong or find something else than they left: what goes on, what is refused, what
is said."""
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dist
import train
import trainer
from tests.runs import (
    BATCH,
    CLASSES,
    REPO,
    STEPS_PER_EPOCH,
    VAR_FLAGS,
    VQVAE_FLAGS,
    end_within,
    environment,
    kill_tree,
    launch,
    make_folder,
    message,
    read,
    same_weights,
    start,
    start_ranks,
)
from training import resume
from utils import loading
from utils.checkpoint import first_not_finite
from utils.data import ClassFolders, build_dataset
from utils.stop import Stopped, StopRequest


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Killed(Exception):
    """Stands for SIGKILL: nothing of the project catches it."""


def kill_at(monkeypatch, step):
    """Within the returned context the run dies before it does this step."""
    patch = monkeypatch.context()
    context = patch.__enter__()
    original = train.Run.train_step

    def dies(self, images, labels, number):
        if number == step:
            raise Killed
        return original(self, images, labels, number)
    context.setattr(train.Run, 'train_step', dies)
    return patch


def killed_run(train_here, monkeypatch, folder, step, *flags, **options):
    patch = kill_at(monkeypatch, step)
    with pytest.raises(Killed):
        train_here(folder, *flags, **options)
    patch.__exit__(None, None, None)
    return folder


# ---------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1', 'SIGINT'])
def test_a_signal_saves_the_step_and_the_run_goes_on_exactly(train_here, tmp_path, monkeypatch, capsys, name):
    expected = read(train_here(tmp_path / 'straight', '--ep=2'))
    step = train.Run.train_step

    def signalled(self, images, labels, number):
        if number == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return step(self, images, labels, number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train.Run, 'train_step', signalled)
        train_here(tmp_path / 'run', '--ep=2')
    assert stop.value.code == Stopped.exit_code == 75
    assert f'stopped by {name}; everything is saved' in capsys.readouterr().err
    assert (read(tmp_path / 'run')['epoch'], read(tmp_path / 'run')['iter']) == (0, 3)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was before the run
    final = read(train_here(tmp_path / 'run', '--ep=2'))
    assert same_weights(final, expected) and final['run'] == expected['run']
    assert lines_of(tmp_path / 'run' / 'steps.jsonl') == lines_of(tmp_path / 'straight' / 'steps.jsonl')


def test_a_signal_in_an_evaluation_leaves_it_to_the_next_start(train_here, tmp_path, monkeypatch):
    expected = read(train_here(tmp_path / 'straight', '--ep=1'))
    evaluate = trainer.GeneratorTrainer.eval_epoch

    def signalled(self, loader):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, loader)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(trainer.GeneratorTrainer, 'eval_epoch', signalled)
        train_here(tmp_path / 'run', '--ep=1')
    saved = read(tmp_path / 'run')
    assert saved['iter'] == STEPS_PER_EPOCH and saved['run']['validation'] is None
    assert len(lines_of(tmp_path / 'run' / 'log.txt')) == 1  # the epoch has not ended
    final = read(train_here(tmp_path / 'run', '--ep=1'))
    assert final['run'] == expected['run'] and same_weights(final, expected)
    for line, other in zip(lines_of(tmp_path / 'run' / 'log.txt')[1:],
                           lines_of(tmp_path / 'straight' / 'log.txt')[1:], strict=True):
        times = 'remain_time', 'finish_time'
        assert {k: v for k, v in line.items() if k not in times} == \
            {k: v for k, v in other.items() if k not in times}
    assert (tmp_path / 'run' / 'ar-ckpt-best.pth').exists()


def test_a_second_interrupt_does_not_wait():
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal_name == 'SIGINT' and request
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_within_the_step(data, tmp_path):
    flags = [f'--data_path={data[0]}', f'--vae_ckpt={data[1]}', *VAR_FLAGS, f'--output_dir={tmp_path}',
             '--ep=400']
    ranks = start_ranks('train.py', [flags, flags], tmp_path)
    while not (tmp_path / 'steps.jsonl').exists() and ranks[0].is_alive():
        time.sleep(0.02)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    end_within(ranks, 60)
    assert [rank.exitcode for rank in ranks] == [75, 75]
    assert 'a signal to another process; everything is saved' in (tmp_path / '0.err').read_text()
    assert read(tmp_path)['epoch'] + read(tmp_path)['iter'] > 0


@pytest.mark.slow
def test_ranks_end_with_their_launcher(data, tmp_path):
    flags = [f'--data_path={data[0]}', f'--vae_ckpt={data[1]}', *VAR_FLAGS, f'--output_dir={tmp_path}',
             '--ep=400']
    launcher = start('train.py', flags, nproc=2)
    while not (tmp_path / 'steps.jsonl').exists() and launcher.poll() is None:
        time.sleep(0.02)
    ranks = [int(pid) for pid in subprocess.run(['pgrep', '-P', str(launcher.pid)], text=True,
                                                capture_output=True).stdout.split()]
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    deadline = time.time() + 30
    while any(map(is_running, ranks)) and time.time() < deadline:
        time.sleep(0.1)
    left = [pid for pid in ranks if is_running(pid)]
    for pid in left:
        kill_tree(pid)
    assert not left
    assert read(tmp_path)['epoch'] + read(tmp_path)['iter'] > 0  # and they have saved


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------- ranks
def impatient():
    """Do not wait long for a file to appear on a shared file system."""
    resume.WAIT_SECONDS = 1


@pytest.mark.slow
def test_a_node_without_the_checkpoint_ends_the_run_in_a_line(train_here, data, tmp_path, monkeypatch):
    train_here(tmp_path / 'first', '--ep=1')
    before = (tmp_path / 'first' / 'ar-ckpt-last.pth').read_bytes()
    shared = [f'--data_path={data[0]}', f'--vae_ckpt={data[1]}', *VAR_FLAGS, '--ep=2']
    ranks = start_ranks('train.py', [[*shared, f'--output_dir={tmp_path / "first"}'],
                                     [*shared, f'--output_dir={tmp_path / "second"}']], tmp_path, impatient)
    end_within(ranks, 90)
    assert [rank.exitcode for rank in ranks] == [1, 1]
    last = (tmp_path / '0.err').read_text().splitlines()[-1]
    assert last.startswith('train.py: rank 1 on ') and 'second/ar-ckpt-last.pth' in last
    assert 'all nodes share' in last
    assert (tmp_path / 'first' / 'ar-ckpt-last.pth').read_bytes() == before
    assert not list((tmp_path / 'second').glob('*.pth'))


def two_ranks(monkeypatch, rank, own, other):
    """Collectives as rank 0 of two sees them, the other one giving `other`."""
    values = [own, other] if rank == 0 else [other, own]
    monkeypatch.setattr(dist, 'allgather_object', lambda _: list(zip(('a', 'b'), values, strict=True)))
    monkeypatch.setattr(dist, 'get_rank', lambda: rank)


@pytest.mark.parametrize('rank', [0, 1])
def test_what_differs_between_ranks_is_named_with_both_hosts(monkeypatch, rank):
    two_ranks(monkeypatch, rank, 'x', 'x')
    dist.require_equal('x', 'the tokenizer', 'copy it')
    two_ranks(monkeypatch, rank, *(('x', 'y') if rank == 0 else ('y', 'x')))
    with pytest.raises(ValueError, match='the tokenizer differs between ranks: rank 0 on a has x, rank 1 on '
                                         'b has y: copy it'):
        dist.require_equal('x', 'the tokenizer', 'copy it')


def test_of_long_values_only_the_difference_is_named(monkeypatch):
    classes, data = [f'class {i}' for i in range(1000)], dict(train=dict(count=5), val=dict(count=3))
    others = [*classes[:999], 'another'], data
    two_ranks(monkeypatch, 0, (classes, data), others)
    with pytest.raises(ValueError, match='rank 0 on a has class 999, rank 1 on b has another: copy'):
        dist.require_equal((classes, data), 'the data set', 'copy it')
    two_ranks(monkeypatch, 0, (classes, data), (classes, dict(train=dict(count=5), val=dict(count=4))))
    with pytest.raises(ValueError, match=re.escape("has {'val': {'count': 3}}, rank 1 on b has {'val': ")):
        dist.require_equal((classes, data), 'the data set', 'copy it')


def test_a_failure_of_one_rank_is_raised_on_all(monkeypatch):
    two_ranks(monkeypatch, 0, None, ValueError('no such file'))
    with pytest.raises(ValueError, match='rank 1 on b: no such file'):
        dist.raise_together(None)


def test_the_checksum_notices_every_bit_and_every_swap():
    model = torch.nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.arange(9.).view(3, 3))
    before = trainer.weights_checksum(model)
    assert trainer.weights_checksum(model) == before
    with torch.no_grad():
        model.weight[0, :2] = model.weight[0, :2].flip(0)
    assert trainer.weights_checksum(model) != before
    with torch.no_grad():
        model.weight[0, :2] = model.weight[0, :2].flip(0)
        model.weight.view(torch.int32)[2, 2] ^= 1
    assert trainer.weights_checksum(model) != before


@pytest.mark.parametrize('model', [pytest.param('vq16', marks=pytest.mark.slow), 'flexvae', 'kl16'])
def test_ranks_that_train_a_tokenizer_agree(data, tmp_path, model):
    """Their weights are compared at every save; what a rank notes of its own images does not count."""
    launch('train.py', [f'--model={model}', '--preset=tiny', f'--data_path={data[0]}', '--image_size=16',
                        '--bs=8', '--steps=3', '--save_every=1', f'--output_dir={tmp_path}'], nproc=2)
    assert read(tmp_path, 'vae-ckpt-last.pth')['iter'] == 3


@pytest.mark.parametrize(('variables', 'words'), [
    (dict(RANK='0', WORLD_SIZE='2'), 'MASTER_ADDR and MASTER_PORT'),
    (dict(RANK='3', WORLD_SIZE='2', MASTER_ADDR='x', MASTER_PORT='1'), 'RANK below WORLD_SIZE=2'),
    (dict(RANK='0', WORLD_SIZE='two', MASTER_ADDR='x', MASTER_PORT='1'), "WORLD_SIZE='two'"),
    (dict(SLURM_STEP_NUM_TASKS='64'), 'srun started 64 processes')])
def test_variables_of_a_launcher_that_do_not_fit(monkeypatch, variables, words):
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'SLURM_STEP_NUM_TASKS'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        dist.initialize()


@pytest.mark.slow
def test_left_over_variables_and_a_taken_port_are_named():
    code = '''
import socket, sys
import dist
taken = socket.socket()
taken.bind(('127.0.0.1', 0))
taken.listen()
import os
os.environ.update(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1',
                  MASTER_PORT=str(taken.getsockname()[1]))
try:
    dist.initialize()
except ValueError as error:
    sys.stderr.write(f'{error}\\n')
'''
    run = subprocess.run([sys.executable, '-c', code], cwd=REPO, env=environment(), text=True, timeout=60,
                         capture_output=True)
    assert 'waiting for 2 processes at 127.0.0.1:' in run.stderr
    assert 'is taken by another program: pass another --master_port' in run.stderr


# ---------------------------------------------------------------------------------------------- numbers
def poisoned(monkeypatch, *steps):
    """Training steps whose images hold a nan."""
    step = train.Run.train_step

    def train_step(self, images, labels, number):
        if number in steps:
            images = images.clone()
            images[0] = torch.nan
        return step(self, images, labels, number)
    monkeypatch.setattr(train.Run, 'train_step', train_step)


@pytest.mark.parametrize('precision', [0, 1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_images(train_here, data, tmp_path,
monkeypatch, precision):
    # nan in the loss itself: a tokenizer of codes would hide it in the pixels
    original = trainer.GeneratorTrainer.train_step
    weights = {}

    def train_step(self, images, labels, progress, stepping=True):
        poison = round(progress * 10) == 3
        if poison:
            weights['before'] = {name: value.clone() for name, value in self.model.state_dict().items()}
            loss_of = self.model.training_loss
            monkeypatch.setattr(self.model, 'training_loss', lambda *args: (loss_of(*args)[0] * torch.nan,
                                                                             loss_of(*args)[1]),
                                                                             raising=False)
        info = original(self, images, labels, progress, stepping)
        if poison:
            monkeypatch.delattr(self.model, 'training_loss')
            weights['after'] = {name: value.clone() for name, value in self.model.state_dict().items()}
            assert not info.is_finite
        return info
    monkeypatch.setattr(trainer.GeneratorTrainer, 'train_step', train_step)
    folder = train_here(tmp_path, '--ep=2', f'--fp16={precision}', '--log_every=1', '--ema=0.9')
    assert all(torch.equal(value, weights['after'][name]) for name, value in weights['before'].items())
    checkpoint = read(folder)
    assert checkpoint['run']['skipped_steps'] == 1
    assert first_not_finite(checkpoint['trainer']) is None
    (line,) = lines_of(folder / 'not_finite.jsonl')
    assert line['step'] == 3 and len(line['images']) == BATCH
    assert all('train' in path for path in line['images'])
    text = (folder / 'stdout.txt').read_text()
    assert 'step 3 is left out' in text and '1 of 10 steps were not finite and left out' in text
    steps = (folder / 'steps.jsonl').read_text()
    assert 'NaN' not in steps and 'Infinity' not in steps
    assert [entry['step'] for entry in lines_of(folder / 'steps.jsonl')] == list(range(10))
    assert lines_of(folder / 'steps.jsonl')[3]['skipped']


@pytest.mark.parametrize(('precision', 'remedy'), [(0, 'lower the learning rate'), (1, '--fp16=2'),
                                                   (2, '--fp16=0')])
def test_steps_in_a_row_end_the_run(train_here, tmp_path, monkeypatch, capsys, precision, remedy):
    monkeypatch.setattr(trainer.torch.Tensor, 'backward', poisoned_backward(2))
    flags = '--ep=2', f'--fp16={precision}', '--max_skipped_steps=3'
    text = message(lambda: train_here(tmp_path, *flags), capsys)
    assert 'the last 3 steps up to step 4 were not finite' in text and remedy in text


def poisoned_backward(first):
    """`Tensor.backward` whose gradients are infinite from the call `first` on."""
    original, calls = torch.Tensor.backward, []

    def backward(self, *args, **kwargs):
        calls.append(0)
        if len(calls) > first:
            return original(self * torch.inf, *args, **kwargs)
        return original(self, *args, **kwargs)
    return backward


@pytest.mark.slow
def test_a_discriminator_forgets_a_step_that_is_not_finite(train_here, tmp_path, monkeypatch):
    discriminate = trainer.TokenizerLoss.discriminate
    flags = [flag.replace('1_2_4', '1_2_8') for flag in VQVAE_FLAGS if '--disc' not in flag]

    def poisoned_once(self, rec, progress, amp, net=None):
        loss, aux = discriminate(self, rec, progress, amp, net)
        if round(progress * 10) == 6:
            self.lecam.m_r.fill_(torch.nan)
            loss = loss * torch.nan
        return loss, aux
    monkeypatch.setattr(trainer.TokenizerLoss, 'discriminate', poisoned_once)
    folder = train_here(tmp_path, '--ep=2', '--disc=patchgan', '--disc_width=8', '--disc_start=0',
                        '--lecam=0.1', base=flags)
    checkpoint = read(folder, 'vae-ckpt-last.pth')
    assert checkpoint['run']['skipped_steps'] == 1
    assert all(value.isfinite().all() for value in checkpoint['trainer']['criterion'].values()
               if value.is_floating_point())


def test_a_checkpoint_whose_first_steps_fail_is_gone_back_from_once(train_here, tmp_path, monkeypatch):
    train_here(tmp_path, '--ep=2', '--eval_every=9')
    last, previous = read(tmp_path), read(tmp_path, 'ar-ckpt-prev.pth')
    original = trainer.GeneratorTrainer.load_state_dict

    def load(self, state, source='the checkpoint'):
        original(self, state, source)
        if source.endswith('last.pth') and 'damaged' not in source and not hasattr(load, 'done'):
            load.done = True
            with torch.no_grad():  # finite, and of no use: every loss overflows
                self.model.head.weight.fill_(3e38)
                self.model.head.bias.fill_(-3e38)
    monkeypatch.setattr(trainer.GeneratorTrainer, 'load_state_dict', load)
    train_here(tmp_path, '--ep=3', '--eval_every=9', '--max_skipped_steps=2')
    text = (tmp_path / 'stdout.txt').read_text()
    assert 'not one step after' in text and 'ar-ckpt-prev.pth at epoch 1' in text
    assert same_weights(torch.load(tmp_path / 'ar-ckpt-last.pth.damaged', weights_only=True), last)
    assert read(tmp_path)['epoch'] == 3 and previous['epoch'] == 1


def test_a_poisoned_checkpoint_is_not_continued(train_here, tmp_path):
    train_here(tmp_path, '--ep=2', '--eval_every=9')
    last = read(tmp_path)
    last['trainer']['var_wo_ddp']['head.weight'][0, 0] = torch.nan
    torch.save(last, tmp_path / 'ar-ckpt-last.pth')
    train_here(tmp_path, '--ep=3', '--eval_every=9')
    text = (tmp_path / 'stdout.txt').read_text()
    assert 'nan or infinite numbers (trainer.var_wo_ddp.head.weight)' in text
    assert 'ar-ckpt-prev.pth at epoch 1' in text and (tmp_path / 'ar-ckpt-last.pth.damaged').exists()
    assert read(tmp_path)['epoch'] == 3


# ---------------------------------------------------------------------------------------------- logs
def points(folder, tag):
    events = EventAccumulator(str(next(folder.glob('tb-*'))), size_guidance=dict(scalars=0)).Reload()
    return sorted(event.step for event in events.Scalars(tag))  # files of one second are read in any order


@pytest.mark.parametrize('step', [2, 4, 7, 9])
def test_every_step_is_logged_once_after_a_kill(train_here, tmp_path, monkeypatch, step):
    flags = '--ep=2', '--save_every=2', '--log_every=1', '--eval_every=1'
    killed_run(train_here, monkeypatch, tmp_path, step, *flags)
    train_here(tmp_path, *flags)
    assert [line['step'] for line in lines_of(tmp_path / 'steps.jsonl')] == list(range(10))
    assert [line.get('ep') for line in lines_of(tmp_path / 'log.txt')] == [None, '1/2', '2/2']
    assert points(tmp_path, 'AR_iter_loss/L_mean') == list(range(10))
    assert points(tmp_path, 'AR_ep_loss/L_mean') == [1, 2]
    assert points(tmp_path, 'AR_iter_loss/z_voc_usage') == [-10000, -1000, *range(10)]


def test_a_kill_before_the_first_checkpoint_leaves_no_trace(train_here, tmp_path, monkeypatch):
    flags = '--ep=1', '--log_every=1'
    killed_run(train_here, monkeypatch, tmp_path, 3, *flags)
    train_here(tmp_path, *flags)
    assert [line['step'] for line in lines_of(tmp_path / 'steps.jsonl')] == list(range(5))
    assert points(tmp_path, 'AR_iter_loss/z_voc_usage') == [-10000, -1000, *range(5)]
    assert len(lines_of(tmp_path / 'log.txt')) == 2
    for path in tmp_path.glob('*.pth'):  # somebody begins another training in this folder
        path.unlink()
    before = (tmp_path / 'steps.jsonl').read_bytes()
    train_here(tmp_path, '--ep=1', '--tblr=2e-2')
    assert (tmp_path / 'steps.jsonl.before1').read_bytes() == before
    assert len(lines_of(tmp_path / 'log.txt')) == 2


@pytest.mark.slow
def test_torn_lines_of_logs_are_left_out(train_here, tmp_path):
    flags = '--eval_every=1', '--fid_images=8', '--fid_features=digits', '--fid_flags=--top_k=8'
    train_here(tmp_path, '--ep=1', *flags)
    for name in ('log.txt', 'steps.jsonl'):
        with (tmp_path / name).open('a') as file:
            file.write('{"it": 3, "ep": "1/')
    train_here(tmp_path, '--ep=2', *flags)
    assert [line.get('ep') for line in lines_of(tmp_path / 'log.txt')] == [None, '1/1', '1/1', '2/2', '2/2']
    lines_of(tmp_path / 'steps.jsonl')


@pytest.mark.slow
def test_a_kill_while_the_best_is_written_is_mended_by_the_next_start(train_here, tmp_path, monkeypatch):
    flags = '--ep=2', '--eval_every=1'
    expected = read(train_here(tmp_path / 'straight', *flags), 'ar-ckpt-best.pth')
    save = train.CheckpointWriter.save

    def killed(self, state, *args):
        if state['epoch'] == 2:
            raise Killed
        save(self, state, *args)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.CheckpointWriter, 'save', killed)
        train_here(tmp_path / 'run', *flags)
    train_here(tmp_path / 'run', *flags)
    final = read(tmp_path / 'run', 'ar-ckpt-best.pth')
    assert same_weights(final, expected) and final['run'] == expected['run']
    assert [line.get('ep') for line in lines_of(tmp_path / 'run' / 'log.txt')] == [None, '1/2', '2/2']
    # where it is missing although the last checkpoint is the best one, it is made again
    (tmp_path / 'run' / 'ar-ckpt-best.pth').unlink()
    train_here(tmp_path / 'run', *flags)
    assert same_weights(read(tmp_path / 'run', 'ar-ckpt-best.pth'), read(tmp_path / 'run'))


def test_a_missing_export_is_made_by_the_next_start(train_here, tmp_path, monkeypatch):
    def killed(*_):
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.TokenizerTrainer, 'finish', killed)
        train_here(tmp_path, '--ep=1', base=VQVAE_FLAGS)
    assert not (tmp_path / 'vae-export.pth').exists()
    train_here(tmp_path, '--ep=1', base=VQVAE_FLAGS)
    assert 'encoder.conv_in.weight' in read(tmp_path, 'vae-export.pth')


def test_a_checkpoint_says_what_it_was_made_with(train_here, tmp_path):
    checkpoint = read(train_here(tmp_path, '--ep=1'))
    assert checkpoint['versions']['torch'] == torch.__version__ and 'git_commit' in checkpoint
    assert checkpoint['world_size'] == 1
    assert set(checkpoint) == {'epoch', 'iter', 'trainer', 'args', 'run', 'classes', 'data', 'world_size',
                               'git_commit', 'versions'}
    assert set(checkpoint['run']) == {'seed', 'steps_per_epoch', 'best', 'best_epoch', 'validation',
                                      'epochs_ended', 'skipped_steps', 'bad_images', 'left_out'}
    assert set(checkpoint['trainer']) == {'config', 'training_state', 'var_wo_ddp', 'vae_local', 'vae_config',
                                          'var_opt'}
    header = lines_of(tmp_path / 'log.txt')[0]
    assert set(header) == {'name', 'cmd', 'seed', 'args', 'git_commit', 'versions'}
    assert set(lines_of(tmp_path / 'log.txt')[1]) == {
        'it', 'ep', 'lr', 'wd', 'grad_norm', 'L_mean', 'L_tail', 'acc_mean', 'acc_tail', 'vL_mean', 'vL_tail',
        'vacc_mean', 'vacc_tail', 'remain_time', 'finish_time'}


# ---------------------------------------------------------------------------------------------- data and
# labels
def test_a_renamed_class_is_refused(train_here, tmp_path, capsys):
    root = make_folder(tmp_path / 'images')
    train_here(tmp_path / 'run', '--ep=1', f'--data_path={root}')
    before = (tmp_path / 'run' / 'ar-ckpt-last.pth').read_bytes()
    for split in ('train', 'val'):
        (root / split / 'ant').rename(root / split / 'zebra')
    text = message(lambda: train_here(tmp_path / 'run', '--ep=2', f'--data_path={root}'), capsys)
    assert "class 0 is 'ant' there, 'bee' here" in text
    assert (tmp_path / 'run' / 'ar-ckpt-last.pth').read_bytes() == before


def test_rows_of_other_weights_follow_the_names_of_the_classes(train_here, tmp_path, capsys):
    root = make_folder(tmp_path / 'images')
    first = read(train_here(tmp_path / 'a', '--ep=1', f'--data_path={root}'))
    for split in ('train', 'val'):
        (root / split / 'ant').rename(root / split / 'zebra')
    new = train_here(tmp_path / 'b', '--ep=1', f'--data_path={root}', '--tblr=1e-12',
                     f'--init_from={tmp_path / "a" / "ar-ckpt-last.pth"}')
    old_rows, rows = (c['trainer']['var_wo_ddp']['class_emb.weight'] for c in (first, read(new)))
    for row, name in enumerate(('bee', 'cow', 'doe')):
        assert (rows[row] - old_rows[CLASSES.index(name)]).abs().max() < 1e-6
    assert (rows[3] - old_rows[0]).abs().max() > 1e-3  # a new class begins anew
    assert (rows[4] - old_rows[4]).abs().max() < 1e-6  # that of no class
    text = (new / 'stdout.txt').read_text()
    assert "the rows of 3 of 4 classes follow their names; new: 'zebra'" in text


def test_a_changed_data_set_is_named_within_an_epoch(train_here, tmp_path, monkeypatch):
    root = make_folder(tmp_path / 'images')
    flags = '--ep=2', f'--data_path={root}', '--save_every=2'
    killed_run(train_here, monkeypatch, tmp_path / 'run', 3, *flags)
    (root / 'train' / 'ant' / '00.png').unlink()
    train_here(tmp_path / 'run', *flags)
    text = (tmp_path / 'run' / 'stdout.txt').read_text()
    assert 'train has 39 images in place of 40' in text and 'the rest of this epoch' in text.lower()
    # the same number under other names
    (root / 'train' / 'bee' / '01.png').rename(root / 'train' / 'bee' / 'new.png')
    train_here(tmp_path / 'run', *flags[1:], '--ep=3')
    text = (tmp_path / 'run' / 'stdout.txt').read_text()
    assert 'train has as many images as before, but other names among them' in text


def test_removing_images_within_an_epoch_is_no_dead_end(train_here, tmp_path, monkeypatch):
    root = make_folder(tmp_path / 'images')
    flags = '--ep=2', f'--data_path={root}', '--save_every=4'
    killed_run(train_here, monkeypatch, tmp_path / 'run', 4, *flags)
    for name in CLASSES:
        for path in sorted((root / 'train' / name).glob('*.png'))[:4]:
            path.unlink()
    final = read(train_here(tmp_path / 'run', *flags))
    assert (final['epoch'], final['run']['steps_per_epoch']) == (2, 3)


@pytest.mark.slow
def test_a_finished_folder_of_another_data_set_says_so(train_here, tmp_path, capsys):
    root = make_folder(tmp_path / 'images')
    train_here(tmp_path / 'run', '--ep=1', f'--data_path={root}', base=VQVAE_FLAGS)
    text = message(lambda: train_here(tmp_path / 'run', '--data_path=toy', base=VQVAE_FLAGS), capsys)
    assert f'trained on {str(root)!r}' in text and '--output_dir' in text


# ---------------------------------------------------------------------------------------------- loaders
@pytest.mark.slow
def test_a_killed_loader_process_is_started_again(train_here, tmp_path, monkeypatch):
    expected = read(train_here(tmp_path / 'straight', '--ep=2'))
    step = train.Run.train_step

    def kills(self, images, labels, number):
        if number == 1:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
        return step(self, images, labels, number)
    monkeypatch.setattr(train.Run, 'train_step', kills)
    final = read(train_here(tmp_path / 'run', '--ep=2', '--workers=2'))
    assert 'the loader is started again' in (tmp_path / 'run' / 'stdout.txt').read_text()
    assert same_weights(final, expected)


def stops_one(number, calls):
    """Training steps, of which step `number` stops a loader process: it then hears no signal but SIGKILL."""
    step = train.Run.train_step

    def train_step(self, images, labels, at):
        if at == number and not calls:
            calls.append(multiprocessing.active_children()[0].pid)
            os.kill(calls[0], signal.SIGSTOP)
        return step(self, images, labels, at)
    return train_step


@pytest.mark.slow
def test_a_loader_process_that_hangs_is_started_again(train_here, tmp_path, monkeypatch):
    flags = '--ep=2', '--loader_timeout=0.03'
    expected = read(train_here(tmp_path / 'straight', *flags))
    calls = []
    monkeypatch.setattr(train.Run, 'train_step', stops_one(1, calls))
    final = read(train_here(tmp_path / 'run', *flags, '--workers=2'))
    text = (tmp_path / 'run' / 'stdout.txt').read_text()
    assert text.count('no batch came for 0.03 minutes): the loader is started again at epoch 0') == 1
    assert same_weights(final, expected) and final['run'] == expected['run']
    assert not is_running(calls[0])


def broken_loader(monkeypatch, kill, start=0):
    """Validation images whose loader process, at its first image, does this to itself, in so many starts."""
    starts = []
    original = ClassFolders.__getitem__

    def getitem(self, index):
        if multiprocessing.parent_process() and self.root.endswith('val') and len(starts) <= start:
            os.kill(os.getpid(), kill)
        return original(self, index)
    begun = loading.begun

    def counted(loader):
        if getattr(loader.dataset, 'root', '').endswith('val'):
            starts.append(0)
        return begun(loader)
    monkeypatch.setattr(ClassFolders, '__getitem__', getitem)
    monkeypatch.setattr(loading, 'begun', counted)


@pytest.mark.slow
def test_loader_processes_of_an_evaluation_are_started_again(train_here, tmp_path, monkeypatch):
    expected = read(train_here(tmp_path / 'straight', '--ep=1'))
    broken_loader(monkeypatch, signal.SIGKILL, 1)
    final = read(train_here(tmp_path / 'run', '--ep=1', '--workers=1'))
    assert 'the loader is started again at batch 0' in (tmp_path / 'run' / 'stdout.txt').read_text()
    assert final['run'] == expected['run']


@pytest.mark.slow
def test_loader_processes_that_always_hang_end_the_run_in_a_line(train_here, tmp_path, monkeypatch, capsys):
    broken_loader(monkeypatch, signal.SIGSTOP, 99)
    flags = '--ep=1', '--workers=1', '--loader_timeout=0.02'
    text = message(lambda: train_here(tmp_path, *flags), capsys)
    assert 'loader processes died 4 times in a row (no batch came for 0.02 minutes): the disk' in text


def test_nothing_is_written_before_the_data_are_found(train_here, tmp_path, capsys):
    message(lambda: train_here(tmp_path / 'run', '--ep=1', '--data_path=/nowhere'), capsys)
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_two_processes_log_like_one(data, train_here, tmp_path):
    """What ranks exchange at every step does not change what is trained."""
    one = read(train_here(tmp_path / '1', '--ep=1'))
    launch('train.py', [f'--data_path={data[0]}', f'--vae_ckpt={data[1]}', *VAR_FLAGS,
                        f'--output_dir={tmp_path / "2"}', '--ep=1'], nproc=2)
    two = read(tmp_path / '2')
    assert one['data'] == two['data'] and one['data']['train']['count'] == len(build_dataset(str(data[0]),
    16)[1])
