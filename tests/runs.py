"""Launches train.py and sample.py as users do, on a tiny image folder."""
import contextlib
import functools
import json
import logging
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import train
from configs import parse_training
from models import VQVAE
from training.data import build_data

FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['tests.entries'])
REPO = Path(__file__).resolve().parent.parent
NUM_IMAGES, CLASSES, BATCH = 40, ('ant', 'bee', 'cow', 'doe'), 8
STEPS_PER_EPOCH = NUM_IMAGES // BATCH
TINY_VQVAE = dict(vocab_size=32, z_channels=8, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1,
                  v_patch_nums=(1, 2, 4))
PYRAMID = ['--pn=1_2_4', '--patch_size=4', f'--bs={BATCH}', '--workers=0', '--seed=3', '--hflip=1']
VQVAE_FLAGS = ['--model=vqvae', *PYRAMID, '--vocab_size=32', '--z_channels=8', '--ch=32', '--ch_mult=1_1_1',
               '--num_res_blocks=1', '--dropout=0', '--tblr=3e-3', '--lpips=none', '--disc=none', '--defer=2',
               '--scale_drop=0.3']
# images of 32x32 are the smallest that the discriminator takes
VQVAE_WITH_GAN = ['--pn=1_2_8' if flag == '--pn=1_2_4' else flag for flag in VQVAE_FLAGS] + [
    '--disc=patchgan', '--disc_width=8', '--disc_ramp=4', '--disc_blur=4', '--lecam=0.1', '--lpips=pyramid']
VAR_FLAGS = [*PYRAMID, '--depth=1', '--alng=1e-2', '--tblr=1e-2', '--drop_path=0.2']

# the smallest training of each family, on images of SIDE pixels but for VAR, in the spelling of its users
SIDE, STRIDE = 32, 8
ON_TOKENS = ['--depth=1', '--width=64', f'--bs={BATCH}', '--seed=0', '--workers=0', '--mid_reso=1']
SMALLEST = dict(
    var=VAR_FLAGS,
    flexvar=['--pn=1_2_3_4_6', '--patch_size=8', f'--bs={BATCH}', '--workers=0', '--seed=3', '--depth=1',
             '--alng=1e-2', '--tblr=1e-2', '--drop_path=0.2'],
    flowar=[f'--img_size={SIDE}', '--size=small', '--vae_stride=8', '--diffloss_d=1', '--diffloss_w=64',
            '--warmup_epochs=0.1', '--epochs=1', *ON_TOKENS],
    npp=[f'--image_size={SIDE}', '--downsample_size=8', '--mixed_precision=none', '--epochs=2', *ON_TOKENS])
TOKENIZER_FLAG = dict(var='vae_ckpt', flexvar='vae_ckpt', flowar='vae_path', npp='vq_ckpt')
CACHE_FLAG = dict(var='cached_path', flexvar='cached_path', flowar='cached_path', npp='code_path')
# what of the images and of the tokenizer's file extract.py must be told
EXTRACTION = dict(var=('--image_size=16', '--pn=1_2_4'), flexvar=('--image_size=48',),
                  flowar=(f'--img_size={SIDE}',), npp=(f'--image_size={SIDE}',))
# two epochs (NPP: two of each phase) with dropout, dropped labels and averaged weights
WHOLE = dict(var=('--ep=2', '--ema=0.9'), flexvar=('--ep=2', '--ema=0.9'),
             flowar=('--ep=2', '--lr=1e-3', '--ema_rate=0.9'),
             npp=('--epochs=4', '--lr=1e-2', '--scheduler', '--ema=0.9'))


def make_folder(root):
    """40 + 8 noisy images of 20x24 in four classes, told apart by their brightness."""
    rng = np.random.RandomState(0)
    for split, count in (('train', NUM_IMAGES), ('val', 8)):
        for i in range(count):
            folder = root / split / CLASSES[i % 4]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.randint(0, 64, (24, 20, 3)) + 48 * (i % 4)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i:02d}.png')
    return root


def make_tokenizer(path):
    """Random weights with a codebook wide enough that many codes are used, as a flat state dict."""
    torch.manual_seed(0)
    vae = VQVAE(**TINY_VQVAE)
    torch.nn.init.normal_(vae.quantize.embedding.weight, std=0.3)
    torch.save(vae.state_dict(), path)
    return path


def saved(tokenizer, path):
    """(file of its weights, the tokenizer)."""
    torch.save(tokenizer.state_dict(), path)
    return path, tokenizer


def training(made, folder, *more, model='flowar'):
    """Command line of train.py for the smallest generator over these images and this tokenizer."""
    return [f'--model={model}', f'--data_path={made[0]}', f'--{TOKENIZER_FLAG[model]}={made[1]}',
            *SMALLEST[model], f'--output_dir={folder}', *more]


def extraction(made, folder, *more, model='flowar'):
    """Command line of extract.py, as users of each family spell it."""
    return [f'--model={model}', f'--data_path={made[0]}', f'--{TOKENIZER_FLAG[model]}={made[1]}',
            f'--{CACHE_FLAG[model]}={folder}', *EXTRACTION[model], '--workers=0', '--batch_size=32', *more]


def command(script, flags, nproc=1):
    launcher = [] if nproc == 1 else ['-m', 'torch.distributed.run', '--standalone',
                                      f'--nproc_per_node={nproc}']
    return [sys.executable, *launcher, str(REPO / script), *map(str, flags)]


def environment():
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'CUDA_VISIBLE_DEVICES': ''}


def launch(script, flags, nproc=1, check=True):
    """Run to the end in processes of its own; what they printed, and the highest exit code.

    `start` goes through torchrun, as users do; here the processes are forked from one that has imported all
    entry scripts, since imports take longer than these runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = start_ranks(script, [flags] * nproc, folder)
        while any(rank.is_alive() for rank in ranks):
            time.sleep(0.01)
            if any(rank.exitcode for rank in ranks):  # as torchrun does, which gives the others 30 seconds
                end_within(ranks, 30)
        texts = [''.join(Path(f'{folder}/{rank}.{kind}').read_text() for rank in range(nproc))
                 for kind in ('out', 'err')]
    code = max(abs(rank.exitcode) for rank in ranks)
    assert code == 0 or not check, texts[1]
    return subprocess.CompletedProcess([script, *flags], code, *texts)


@functools.cache
def fork_server():
    """The context of processes that are forked from one that has imported everything.

    It begins in the repository, since torch-fidelity installs another package that is named `tests`, which
    its search for modules would find from any other folder.
    """
    folder = os.getcwd()
    os.chdir(REPO)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.chdir(folder)
    return FORKS


def start_ranks(script, flags_of_ranks, folder, before=None):
    """Start a process per rank, each with flags of its own; rank i prints to <folder>/<i>.out and .err.

    Args:
        before: is called in every process first.
    """
    ranks, group = [], {}
    if len(flags_of_ranks) > 1:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            group = dict(WORLD_SIZE=str(len(flags_of_ranks)), MASTER_ADDR='127.0.0.1',
                         MASTER_PORT=str(free.getsockname()[1]))
    for i, flags in enumerate(flags_of_ranks):
        variables = environment()
        if group:
            variables |= dict(**group, RANK=str(i), LOCAL_RANK=str(i))
        arguments = (script, list(map(str, flags)), variables, f'{folder}/{i}', before)
        process = fork_server().Process(target=run_as_main, args=arguments)
        process.start()
        ranks.append(process)
    return ranks


def end_within(processes, seconds):
    """Wait for them so long, then kill those that are left."""
    deadline = time.time() + seconds
    for process in processes:
        process.join(max(0, deadline - time.time()))
    for process in processes:
        process.kill()
        process.join()


def run_as_main(script, flags, variables, output, before):
    """In a forked process: the script with these flags and environment, its output in two files."""
    os.environ.clear()
    os.environ.update(variables)
    for kind, descriptor in (('out', 1), ('err', 2)):
        os.dup2(os.open(f'{output}.{kind}', os.O_WRONLY | os.O_CREAT), descriptor)
    if before:
        before()
    sys.argv = [str(REPO / script), *flags]
    runpy.run_path(sys.argv[0], run_name='__main__')


def on_two_ranks(function, *args):
    """`function(rank, *args)` in two processes, forked like those of `launch`."""
    fork_server()
    torch.multiprocessing.start_processes(function, args, nprocs=2, start_method='forkserver')


def prepared(argv):
    """The run of a command line of train.py, in this process; `train.train` does the rest."""
    config = parse_training(argv)
    return train.Run(config, build_data(config))


class Interrupt(Exception):
    """Stands for a kill."""


def interrupt(run, step):
    """`run()` until its training dies before a step."""
    original = train.Run.train_step

    def train_step(self, images, labels, number):
        if number == step:
            raise Interrupt
        return original(self, images, labels, number)
    with mock.patch.object(train.Run, 'train_step', train_step), pytest.raises(Interrupt):
        run()


def tree_of(pid):
    """A process and all below it; torchrun's workers have sessions of their own."""
    parents = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(')')[2].split()[1])
    tree = [pid]
    for member in tree:  # grows while it is walked
        tree += [child for child, parent in parents.items() if parent == member]
    return tree


def kill_tree(pid):
    """SIGKILL a process and all below it."""
    tree = tree_of(pid)
    for member in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    return tree


def start(script, flags, nproc=1):
    """Start without waiting; end it with `kill_tree`."""
    return subprocess.Popen(command(script, flags, nproc), env=environment(), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def largest_difference(a, b):
    """Between the weights of two checkpoints."""
    return max((value.float() - b['trainer']['var_wo_ddp'][name].float()).nan_to_num().abs().max().item()
               for name, value in a['trainer']['var_wo_ddp'].items())


def same_images(a, b):
    """Equal but for a rounding step here and there: kernels may sum in another order in another batch."""
    difference = np.abs(a.astype(int) - b.astype(int))
    return difference.max() <= 1 and (difference > 0).mean() < 1e-3


def same_weights(a, b, key='var_wo_ddp'):
    return all(torch.equal(value, b['trainer'][key][name]) for name, value in a['trainer'][key].items())


@contextlib.contextmanager
def kept_logging():
    """Inside, entry points may set up the logging of this process; afterwards it is as before."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        logging.captureWarnings(False)


def message(run, capsys):
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as stop:
        run()
    code = stop.value.code
    text = code if isinstance(code, str) else capsys.readouterr().err.strip()
    assert code not in (0, None) and len(text.splitlines()) == 1, text
    return text


def read(folder, name='ar-ckpt-last.pth'):
    return torch.load(Path(folder) / name, weights_only=True)


def steps_of(folder):
    """What was logged of the steps."""
    return [json.loads(line) for line in (folder / 'steps.jsonl').read_text().splitlines()]


def epochs_of(folder):
    """What was logged of the epochs; the settings stand above them."""
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()][1:]


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
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(torch.as_tensor(actual), expected), path
    else:
        assert actual == expected, path


class ToyRun:
    """A finished training with its logs and the last validation."""

    def __init__(self, folder, model, *flags):
        self.folder = folder
        launch('train.py', [f'--model={model}', '--preset=tiny', '--seed=0', '--log_every=10',
                            f'--output_dir={folder}', *flags])
        self.steps = steps_of(folder)
        self.epochs = epochs_of(folder)
        self.scores = read(folder, 'vae-ckpt-last.pth')['run']['validation']

    def mean(self, key, first, last):
        """Of the logged steps in [first, last)."""
        values = [line[key] for line in self.steps if first <= line['step'] < last and key in line]
        return sum(values) / len(values)
