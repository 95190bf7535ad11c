"""One thread and a fixed seed for every test, so that float32 sums and draws repeat; commands in process."""
import os
import sys

import pytest
import torch

import sample
import train
from tests.runs import VAR_FLAGS, ToyRun, kept_logging, make_folder, make_tokenizer
from utils.log import one_line_errors

os.environ['OMP_NUM_THREADS'] = '1'  # of processes that tests start, too
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def here(monkeypatch):
    """Run an entry point in this process: `here(train, '--depth=1', ...)`."""
    def run(script, *argv):
        monkeypatch.setattr(sys, 'argv', [script.__file__, *map(str, argv)])
        sample.load_generator.cache_clear()
        with one_line_errors(script.__name__):
            script.main()
    with kept_logging():
        yield run


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """(image folder, tokenizer file)."""
    root = tmp_path_factory.mktemp('data')
    return make_folder(root / 'images'), make_tokenizer(root / 'vae.pth')


@pytest.fixture
def train_here(monkeypatch, data):
    """Run train.py in this process; returns the flags' output folder."""
    def run(folder, *flags, base=None):
        base = VAR_FLAGS if base is None else base
        argv = [f'--data_path={data[0]}', f'--vae_ckpt={data[1]}', f'--output_dir={folder}', *base, *flags]
        argv = [arg for arg in argv if '--model=vqvae' not in base or not arg.startswith('--vae_ckpt')]
        monkeypatch.setattr(sys, 'argv', ['train.py', *argv])
        with one_line_errors('train.py'):
            train.main()
        return folder
    with kept_logging():
        yield run


@pytest.fixture
def stops(here):
    """The one line with which an entry point ends."""
    def run(script, *argv):
        with pytest.raises(SystemExit) as stop:
            here(script, *argv)
        message = str(stop.value)
        assert message.startswith(f'{script.__name__}: ') and len(message.splitlines()) == 1
        return message
    return run


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    """Runs by (model, flags), made on demand."""
    done = {}

    def get(model, *flags):
        if (model, flags) not in done:
            done[model, flags] = ToyRun(tmp_path_factory.mktemp(model), model, *flags)
        return done[model, flags]
    return get


LONG = ('test_toy.py', 'test_toy_others.py', 'test_run.py', 'test_pinned.py', 'test_continue.py',
        'test_sample.py', 'test_tokenizer_training.py', 'test_token_cache.py', 'test_notebook.py',
        'test_scores.py')


def pytest_collection_modifyitems(items):
    """The files with whole trainings first: they take longest, and two processes share the files."""
    items.sort(key=lambda item: item.path.name not in LONG)
