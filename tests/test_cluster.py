"""Runs on many ranks and machines: which rank is slow, what hangs, what a folder tells, who starts what."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

import dist
import train
from tests.runs import (
    REPO,
    VAR_FLAGS,
    assert_equal,
    end_within,
    environment,
    kill_tree,
    launch,
    message,
    read,
    start_ranks,
    steps_of,
)
from tests.test_docs import commands_of
from training.life import last_end, noted_variables, refuse_restart_after_stop, this_launcher
from utils.log import read_json_lines
from utils.stop import Stopped
from utils.watchdog import EXIT_CODE


def flags_of(data, folder, *more):
    return [f'--data_path={data[0]}', f'--vae_ckpt={data[1]}', *VAR_FLAGS, f'--output_dir={folder}', *more]


def is_rank_1():
    return os.environ.get('RANK') == '1'


# ---------------------------------------------------------------------------------------------- each rank
def slow_forward():
    """Rank 1 takes longer, in a part of its step for which the other rank must wait."""
    if not is_rank_1():
        return
    from models import VAR
    training_loss = VAR.training_loss

    def slower(self, *args):
        time.sleep(0.2)
        return training_loss(self, *args)
    VAR.training_loss = slower


@pytest.mark.slow
def test_the_slowest_rank_is_named_and_every_rank_keeps_its_words(data, tmp_path):
    """Steps of both ranks last equally long, since each waits for the gradients of the other."""
    folder = tmp_path / 'run'
    flags = flags_of(data, folder, '--ep=1', '--log_every=1', '--rank_logs=1')
    ranks = start_ranks('train.py', [flags, flags], tmp_path, before=slow_forward)
    end_within(ranks, 60)
    assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / '1.err').read_text()
    first, *lines = steps_of(folder)
    assert 'slowest_rank' not in first  # no step has ended before it
    assert [line['slowest_rank'] for line in lines] == [1] * 4
    assert all(line['slowest_seconds'] >= 0.2 and line['slowest_data'] < 0.9 for line in lines)
    host = lines[0]['slowest_host']
    for name in ('stdout.txt', 'rank_000.txt', 'rank_001.txt'):
        assert f'rank 1 on {host})' in (folder / name).read_text(), name
    beat = json.loads((folder / 'heartbeat.json').read_text())
    assert (beat['doing'], beat['step'], beat['total_steps'], beat['hosts']) == ('done', 5, 5, [host])
    assert beat['slowest']['rank'] == 1 and beat['images_per_second'] > 0


# ---------------------------------------------------------------------------------------------- what hangs
def end_at_once():
    """Of two ranks one hangs, so that the other one need not wait for its stacks."""
    from utils import watchdog
    watchdog.OTHERS_SECONDS = 0


def test_a_rank_that_hangs_ends_the_others_with_their_stacks(data, tmp_path):
    folder = tmp_path / 'run'
    flags = flags_of(data, folder, '--ep=400', '--watchdog=0.02')
    ranks = start_ranks('train.py', [flags, flags], tmp_path, before=end_at_once)
    while not (folder / 'steps.jsonl').exists() and ranks[0].is_alive():
        time.sleep(0.02)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    began = time.monotonic()
    ranks[0].join(30)
    end_within(ranks, 0)
    assert ranks[0].exitcode == EXIT_CODE and time.monotonic() - began < 20
    assert 'rank 0 on ' in (tmp_path / '0.err').read_text()
    stacks = (folder / 'stacks_rank_000.txt').read_text()
    assert 'nothing has moved for 0.02 minutes' in stacks
    assert 'train.py", line' in stacks and ' in train_from_newest\n' in stacks  # of the thread that hangs
    assert last_end(folder / 'restarts.jsonl').startswith('failed: nothing has moved')


# ---------------------------------------------------------------------------------------------- its history
def test_a_folder_tells_how_its_starts_began_and_ended(train_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('NCCL_DEBUG', 'WARN')
    monkeypatch.setenv('SECRET_TOKEN', 'abc')

    def stop(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return note_step(self, step)

    def fail(self, step):
        raise ValueError('expected this')
    note_step = train.Run.note_step
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Run, 'note_step', stop)
        train_here(tmp_path, '--ep=1')
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, 'note_step', fail)
        message(lambda: train_here(tmp_path, '--ep=1', '--tclip=3'), capsys)
    with (tmp_path / 'restarts.jsonl').open('a') as file:
        file.write('{"resumed_from": null}\n')  # of a start that was killed
    train_here(tmp_path, '--ep=1')
    first, stopped, second, failed, _, third, done = read_json_lines(tmp_path / 'restarts.jsonl')
    assert [line['end'] for line in (stopped, failed, done)] == ['stopped', 'failed: expected this', 'done']
    assert [line['previous'] for line in (first, second, third)] == [None, 'stopped', 'killed']
    assert (first['resumed_from'], second['resumed_from']) == (None, 'ar-ckpt-last.pth')
    assert (second['epoch'], second['step']) == (0, 3) and second['changed_settings'] == ['tclip 2.0 -> 3.0']
    assert first['world_size'] == 1 and first['git_commit'] and first['versions']['torch']
    assert first['environment']['NCCL_DEBUG'] == 'WARN' and 'abc' not in str(first)


def test_variables_that_are_noted_hold_no_secrets():
    noted = dict(NCCL_IB_HCA='mlx5', OMP_NUM_THREADS='1', SLURM_JOB_ID='7')
    assert noted_variables(dict(noted, WANDB_API_KEY='k', HF_TOKEN='t', SLURM_JWT='j', PATH='p')) == noted


def test_torchrun_does_not_wake_a_run_that_a_signal_has_stopped(tmp_path, monkeypatch):
    def write(*lines):
        (tmp_path / 'restarts.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    begun, stopped = dict(launchers=['other:1', this_launcher()]), dict(end='stopped')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    refuse_restart_after_stop(tmp_path)  # no start yet
    for lines in ([begun], [begun, dict(end='failed: x')], [dict(launchers=['other:1']), stopped],
                  [begun, stopped, dict(launchers=['other:1'])]):
        write(*lines)
        refuse_restart_after_stop(tmp_path)
    write(begun, stopped)
    with pytest.raises(Stopped):
        refuse_restart_after_stop(tmp_path)
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')  # of a new launcher, a process number taken again
    refuse_restart_after_stop(tmp_path)


# ---------------------------------------------------------------------------------------------- launchers
@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a program of this name, a script of bash, before those of the machine."""
    folder = tmp_path / 'programs'
    folder.mkdir()
    monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')

    def write(name, text):
        path = folder / name
        path.write_text(f'#!/usr/bin/env bash\n{text}\n')
        path.chmod(0o755)
    return write


@pytest.fixture
def task_of_srun(monkeypatch):
    """The variables of a task of srun, and none of another launcher; `dist` only sets variables here."""
    variables = dict(SLURM_STEP_NUM_TASKS='12', SLURM_PROCID='9', SLURM_LOCALID='1', SLURM_JOB_ID='40007',
                     SLURM_STEP_ID='2', SLURM_NODEID='2', SLURM_STEP_NODELIST='gpu[07-09]',
                     SLURM_STEP_TASKS_PER_NODE='4(x2),3,1')
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')  # so that it is as before after the test
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_tasks_of_srun_are_ranks(program, task_of_srun, monkeypatch):
    program('scontrol', '[ "$*" = "show hostnames gpu[07-09]" ] && printf "gpu07\\ngpu08\\ngpu09\\n"')
    joined = []
    monkeypatch.setattr(dist.tdist, 'init_process_group', lambda *args, **kwargs: joined.append(kwargs))
    monkeypatch.setattr(dist, '_end_with_launcher', lambda: None)
    dist.initialize(timeout=7)
    assert joined[0]['timeout'].total_seconds() == 7 * 60
    expected = dict(RANK='9', LOCAL_RANK='1', WORLD_SIZE='12', LOCAL_WORLD_SIZE='3', MASTER_ADDR='gpu07',
                    MASTER_PORT=str(15000 + (40007 + 2) % 15000))
    assert {name: os.environ[name] for name in expected} == expected


def test_tasks_that_cannot_meet_are_refused(program, task_of_srun):
    program('scontrol', 'exit 1')
    with pytest.raises(ValueError, match='12 processes that know nothing of each other'):
        dist.initialize()


@pytest.fixture
def slurm(program, tmp_path, monkeypatch):
    """A Slurm of two nodes, both on this machine: starts recipes/slurm.sbatch, and gives signals."""
    program('scontrol', f"""
if [ "$1" = requeue ]; then echo "$2" >> {tmp_path}/requeued; else echo 127.0.0.1; fi""")
    program('srun', f"""
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node "$@" & echo $! >> {tmp_path}/tasks
    tasks+=($!)
    sleep 0.2
done
code=0
for task in "${{tasks[@]}}"; do wait $task || code=$?; done
exit $code""")
    variables = dict(SLURM_JOB_ID=os.getpid(), SLURM_JOB_NAME='test', SLURM_NNODES=2, GPUS=1,
                     SLURM_JOB_NODELIST='node[1-2]', SLURM_SUBMIT_DIR=REPO, OUT=tmp_path / 'run')
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))

    class Slurm:
        requeued = property(lambda self: (tmp_path / 'requeued').exists())

        def submit(self, *flags):
            (tmp_path / 'tasks').unlink(missing_ok=True)
            return subprocess.Popen(['bash', str(REPO / 'recipes' / 'slurm.sbatch'), *map(str, flags)],
                                    env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def signal_tasks(self):
            for task in (tmp_path / 'tasks').read_text().split():
                os.kill(int(task), signal.SIGUSR1)
    return Slurm()


@pytest.mark.parametrize(('how', 'code', 'is_requeued'), [('stopped', 0, True), ('done', 0, False),
                                                          ('failed', 1, False)])
def test_slurm_requeues_what_a_signal_has_stopped_and_nothing_else(slurm, program, tmp_path, how, code,
                                                                   is_requeued):
    """With a launcher that, as torchrun, ends with 1 where its rank ends with 75."""
    (tmp_path / 'run').mkdir()
    program('rank', """
trap 'echo "{\\"end\\": \\"stopped\\"}" >> "$OUT/restarts.jsonl"; exit 75' USR1
touch "$OUT/began$SLURM_NODEID"
for i in {1..600}; do [ -e "$OUT/end" ] && exit "$(cat "$OUT/end")"; sleep 0.05; done""")
    program('torchrun', 'echo "$@" > "$OUT/flags"; rank & wait $! || exit 1')
    job = slurm.submit('--depth=3')
    while not all((tmp_path / 'run' / f'began{node}').exists() for node in (0, 1)):
        assert job.poll() is None
        time.sleep(0.02)
    if how == 'stopped':
        slurm.signal_tasks()
    else:
        (tmp_path / 'run' / 'end').write_text('0' if how == 'done' else '1')
    assert (job.wait(120), slurm.requeued) == (code, is_requeued)
    flags = (tmp_path / 'run' / 'flags').read_text().split()
    assert {'--nnodes=2', '--nproc_per_node=1', '--depth=3', f'--output_dir={tmp_path / "run"}'} <= {*flags}


def two_hosts(data, folder):
    """Flags of a training, long enough for a loss in the middle."""
    return [*flags_of(data, folder, '--ep=12'), '--save_every=3']


@pytest.mark.slow
def test_slurm_stops_and_goes_on(slurm, program, data, tmp_path, monkeypatch):
    program('torchrun', f'exec {sys.executable} -m torch.distributed.run "$@"')
    monkeypatch.setenv('DATA', str(data[0]))
    flags = two_hosts(data, tmp_path / 'run')
    job = slurm.submit(*flags)
    while not (tmp_path / 'run' / 'ar-ckpt-last.pth').exists():
        assert job.poll() is None
        time.sleep(0.02)
    slurm.signal_tasks()
    assert job.wait(300) == 0 and slurm.requeued
    ends = [line['end'] for line in read_json_lines(tmp_path / 'run' / 'restarts.jsonl') if 'end' in line]
    assert ends == ['stopped'], 'torchrun has started the run again'
    assert slurm.submit(*flags).wait(300) == 0
    launch('train.py', two_hosts(data, tmp_path / 'straight'), nproc=2)
    assert_equal(read(tmp_path / 'run')['trainer'], read(tmp_path / 'straight')['trainer'])


@pytest.mark.slow
@pytest.mark.parametrize('seconds_away', [8, 25])
def test_a_host_that_is_lost_and_comes_back(data, tmp_path, seconds_away):
    """By the command of docs/cluster.md, with two launchers in place of two hosts."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    commands = commands_of(REPO / 'docs' / 'cluster.md')
    words = next(words for words in commands if '--rdzv_backend=c10d' in words)
    variable, launcher, *options = words[:words.index('train.py')]
    assert launcher == 'torchrun'
    changed = {'--nnodes': '--nnodes=2', '--nproc_per_node': '--nproc_per_node=1',
               '--rdzv_endpoint': f'--rdzv_endpoint=127.0.0.1:{port}'}
    options = [changed.get(option.partition('=')[0], option) for option in options]
    name, value = variable.split('=')
    command = [sys.executable, '-m', 'torch.distributed.run', *options, str(REPO / 'train.py'),
               *two_hosts(data, tmp_path / 'run')]

    def start_host():
        return subprocess.Popen(command, env={**environment(), name: value}, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
    first = start_host()
    time.sleep(3)  # the store is at the first host, the other one is lost
    second = start_host()
    while not (tmp_path / 'run' / 'ar-ckpt-last.pth').exists():
        assert first.poll() is None
        time.sleep(0.02)
    kill_tree(second.pid)
    second.wait()
    assert read(tmp_path / 'run')['epoch'] < 12
    time.sleep(seconds_away)
    second = start_host()
    assert (first.wait(300), second.wait(60)) == (0, 0)
    launch('train.py', two_hosts(data, tmp_path / 'straight'), nproc=2)
    assert_equal(read(tmp_path / 'run')['trainer'], read(tmp_path / 'straight')['trainer'])
    previous = [line['previous'] for line in read_json_lines(tmp_path / 'run' / 'restarts.jsonl')
                if 'previous' in line]
    # The first rank is killed with its host, or notices that the other one is gone.
    assert previous[0] is None and previous[1].startswith(('killed', 'failed: '))
