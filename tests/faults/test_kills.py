"""200 kills: whatever ends a training, the same command ends it as if nothing had happened.

Five trainings of 56 steps with a checkpoint every 4 steps, 40 kills each, at moments drawn by a seed of its
own. A training that ends between two kills is compared with an undisturbed one, and another one begins.
"""
import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.runs import (
    VQVAE_WITH_GAN,
    assert_equal,
    epochs_of,
    launch,
    read,
    start,
    start_ranks,
    steps_of,
    training,
    tree_of,
)
from utils.checkpoint import newest_checkpoint
from utils.log import read_json_lines

KILLS = 40
SAVE_EVERY = 4
PATIENCE = 90  # seconds until a process that should end counts as one that does not
SIGNALS = dict(term=signal.SIGTERM, int=signal.SIGINT, usr1=signal.SIGUSR1)
KINDS = ('ranks', 'rank', 'tree', 'launcher', 'save', 'best', 'restart', *SIGNALS)
TRAININGS = dict(var=2, flexvar=1, npp=3, flowar=2, vqvae=2)  # model -> processes


def flags_of(model, families, folder, *more):
    """The command line of a training of 8 epochs of 7 steps, of which every one is logged."""
    logs = ('--bs=6', '--eval_every=2', '--log_every=1', f'--save_every={SAVE_EVERY}',
            f'--output_dir={folder}')
    if model == 'vqvae':
        images = families['var'][0]
        return [f'--data_path={images}', *VQVAE_WITH_GAN, '--ep=8', '--defer=20', '--disc_start=30',
                *logs]
    length = '--epochs=8' if model in ('npp', 'flowar') else '--ep=8'
    average = '--ema_rate=0.9' if model == 'flowar' else '--ema=0.9'
    return training(families[model], folder, length, average, *logs, *more, model=model)


class Victim:
    """A training in a folder, started again and again.

    Args:
        model: what is trained.
        flags: of train.py.
        folder: of the training.
        scratch: of what its processes print.
    """

    def __init__(self, model, flags, folder, scratch):
        self.prefix = 'vae-ckpt' if model == 'vqvae' else 'ar-ckpt'
        self.flags = flags
        self.folder = folder
        self.scratch = scratch
        self.processes = TRAININGS[model]

    def logged(self):
        """Steps in the log: one more than the last one."""
        return 1 + max((line['step'] for line in read_json_lines(self.folder / 'steps.jsonl')), default=-1)

    def position(self):
        """Steps in the newest checkpoint, which must be readable, and whose neighbours must be, too."""
        found = newest_checkpoint(self.folder, f'{self.prefix}*.pth')
        assert found.unusable == ()
        if found.path is None:
            return 0
        return found.content['epoch'] * found.content['run']['steps_per_epoch'] + found.content['iter']

    def run_and_kill(self, kind, rng):
        """Start it, and end it in one of the ways of `KINDS`; whether it was done before that."""
        before = self.logged()
        if kind in ('tree', 'launcher'):
            process = start('train.py', self.flags, self.processes)
            self._wait(kind, rng, before, lambda: process.poll() is None)
            pids = tree_of(process.pid)
            for pid in pids[:1] if kind == 'launcher' else pids:
                send(pid, signal.SIGKILL)
            process.wait(PATIENCE)
            wait_for_end(pids)
            return process.returncode == 0

        ranks = start_ranks('train.py', [self.flags] * self.processes, self.scratch)
        self._wait(kind, rng, before, lambda: any(rank.is_alive() for rank in ranks))
        chosen = ranks if kind != 'rank' else [rng.choice(ranks)]
        for rank in chosen:
            send(rank.pid, SIGNALS.get(kind, signal.SIGKILL))
        if kind == 'rank':  # as torchrun does
            time.sleep(0.2)
            for rank in ranks:
                send(rank.pid, signal.SIGTERM)
        for rank in ranks:
            rank.join(PATIENCE)
            assert not rank.is_alive(), f'{kind}: a rank does not end'
        codes = [rank.exitcode for rank in ranks]
        if kind in SIGNALS and all(code == 75 for code in codes):
            assert self.position() >= self.logged(), f'{kind}: steps are done again'
        return all(code == 0 for code in codes)

    def _wait(self, kind, rng, before, is_running):
        """Let the moment of the kill come, or the end of the run."""
        if kind == 'restart':
            time.sleep(rng.uniform(0, 1))
            return
        deadline = time.time() + PATIENCE
        while is_running() and self.logged() <= before and time.time() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.8))
        if kind in ('save', 'best'):
            name = f'.{self.prefix}-{"last" if kind == "save" else "best"}.pth.tmp'
            deadline = time.time() + 3
            while is_running() and not (self.folder / name).exists() and time.time() < deadline:
                time.sleep(0.0005)


def send(pid, number):
    """A signal to a process, which may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_for_end(pids):
    """Wait until none of these processes is left; one that nobody has waited for counts as ended."""
    deadline = time.time() + PATIENCE
    while time.time() < deadline:
        states = [state_of(pid) for pid in pids]
        if all(state in ('', 'Z', 'X') for state in states):
            return
        time.sleep(0.05)
    raise AssertionError(f'processes are left: {pids}, {states}')


def state_of(pid):
    """The letter of a process in /proc, '' if there is none."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except OSError:
        return ''


def files_of(folder):
    """Names of what a training has left."""
    return {path.name for path in folder.iterdir()}


def measured_steps(folder):
    """What was logged of the steps, but for the times that they took."""
    return [{key: line[key] for key in line if not key.startswith('slowest_')} for line in steps_of(folder)]


def assert_as_if_undisturbed(victim, straight, expected_files):
    """Weights, optimizer, averages, logs and files are those of the undisturbed training."""
    for name in ('last', 'best'):  # a signal saves at a step of its own, which may be the one before the last
        actual, expected = (read(path, f'{victim.prefix}-{name}.pth') for path in (victim.folder, straight))
        assert_equal(actual['trainer'], expected['trainer'], name)
        assert_equal(actual['run'], expected['run'], name)
    assert measured_steps(victim.folder) == measured_steps(straight)
    epochs = []
    for folder in (victim.folder, straight):
        lines = epochs_of(folder)
        epochs.append([{key: line[key] for key in line if not key.endswith('_time')} for line in lines])
    assert epochs[0] == epochs[1]
    assert files_of(victim.folder) == expected_files


@pytest.mark.slow
@pytest.mark.parametrize('model', TRAININGS)
def test_forty_kills_leave_no_trace(families, tmp_path, model):
    rng = random.Random(list(TRAININGS).index(model))
    straight = tmp_path / 'straight'
    launch('train.py', flags_of(model, families, straight), TRAININGS[model])
    expected_files = files_of(straight)
    counts = dict.fromkeys(KINDS, 0)
    compared = 0
    victim = None
    while sum(counts.values()) < KILLS:
        if victim is None:
            folder = tmp_path / f'victim{compared}'
            folder.mkdir()
            victim = Victim(model, flags_of(model, families, folder), folder, tmp_path)
        kind = rng.choice(KINDS)
        is_done = victim.run_and_kill(kind, rng)
        if is_done:
            assert_as_if_undisturbed(victim, straight, expected_files)
            compared += 1
            victim = None
            continue
        counts[kind] += 1
        repeated = victim.logged() - victim.position()
        # A save in the background may be lost, and the one before it may have waited for it.
        assert repeated <= 2 * SAVE_EVERY, f'{repeated} steps are done again after {kind}'
    if victim:
        launch('train.py', victim.flags, victim.processes)
        assert_as_if_undisturbed(victim, straight, expected_files)
        compared += 1
    print(f'{model}: {KILLS} kills {counts}, {compared} trainings compared')
