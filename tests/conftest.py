"""One thread and a fixed seed for every test, so that float32 sums and draws repeat; commands in process."""
import contextlib
import os
import sys
from unittest import mock

import pytest
import torch

import evaluate
import extract
import sample
import train
from configs.options import make_parser
from models import VQVAE, AutoencoderKL, FlexVAE, VQModel
from tests.runs import (
    TINY_VQVAE,
    VAR_FLAGS,
    WHOLE,
    ToyRun,
    extraction,
    kept_logging,
    make_folder,
    make_tokenizer,
    prepared,
    saved,
    training,
)
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


@pytest.fixture
def evaluate_here(monkeypatch, capsys):
    """Run evaluate.py in this process: what it printed."""
    def run(*argv):
        monkeypatch.setattr(sys, 'argv', ['evaluate.py', *map(str, argv)])
        with one_line_errors('evaluate.py', exit_code=2):
            evaluate.main()
        return capsys.readouterr().out
    with kept_logging():
        yield run


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """(image folder, tokenizer file)."""
    root = tmp_path_factory.mktemp('data')
    return make_folder(root / 'images'), make_tokenizer(root / 'vae.pth')


@pytest.fixture(scope='session')
def families(data, tmp_path_factory):
    """(image folder, tokenizer file, tokenizer) by the name of the generator."""
    torch.manual_seed(0)  # fixtures of a session are made before the seed of a test
    root = tmp_path_factory.mktemp('tokenizers')
    tokenizers = dict(flexvar=FlexVAE(24, 8, z_channels=16, net='tiny'),
                      flowar=AutoencoderKL(4, net='tiny', test_mode=True),
                      npp=VQModel(codebook_size=300, codebook_embed_dim=4, net='tiny', test_mode=True))
    made = {model: (data[0], *saved(tokenizer, root / f'{model}.pth'))
            for model, tokenizer in tokenizers.items()}
    vqvae = VQVAE(**TINY_VQVAE)
    vqvae.load_state_dict(torch.load(data[1]))
    return made | dict(var=(*data, vqvae))


@pytest.fixture(scope='session')
def codes(families, tmp_path_factory):
    """Folders of codes of the two published crop ranges, joined by a comma, as NPP trains on them."""
    parser = make_parser(extract.ExtractSettings, 'extract.py', '')
    folders = [tmp_path_factory.mktemp('codes') for _ in range(2)]
    for folder, crop_range in zip(folders, (1.1, 1.05), strict=True):
        flags = extraction(families['npp'], folder, '--ten-crop', f'--crop-range={crop_range}', model='npp')
        extract.extract(extract.ExtractSettings(**parser.parse(flags)))
    return ','.join(map(str, folders))


@pytest.fixture(scope='session')
def whole_training(families, request):
    """Command lines of trainings over two epochs by family; NPP trains on codes."""
    def flags(model, folder, *more):
        on_codes = [f'--code_path={request.getfixturevalue("codes")}'] if model == 'npp' else []
        return training(families[model], folder, *WHOLE[model], *on_codes, *more, model=model)
    return flags


@pytest.fixture(scope='session')
def trained_folder(whole_training, tmp_path_factory):
    """Folders of these trainings by family, made on demand."""
    done = {}

    def get(model):
        if model not in done:
            folder = tmp_path_factory.mktemp(f'trained_{model}')
            with kept_logging():
                train.train(prepared(whole_training(model, folder)))
            done[model] = folder
        return done[model]
    return get


@contextlib.contextmanager
def trains(data):
    """A function that runs train.py in this process and returns the flags' output folder."""
    def run(folder, *flags, base=VAR_FLAGS):
        argv = [f'--data_path={data[0]}', f'--output_dir={folder}', *base, *flags]
        if '--model=vqvae' not in base:
            argv.insert(1, f'--vae_ckpt={data[1]}')
        with mock.patch.object(sys, 'argv', ['train.py', *argv]), one_line_errors('train.py'):
            train.main()
        return folder
    with kept_logging():
        yield run


@pytest.fixture
def train_here(data):
    with trains(data) as run:
        yield run


@pytest.fixture(scope='module')
def train_for_module(data):
    """As `train_here`, for folders that several tests read."""
    torch.manual_seed(0)
    with trains(data) as run:
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


LONG = ('test_pinned.py', 'test_continue.py', 'test_killed.py', 'test_toy.py', 'test_training_fid.py',
        'test_resume.py', 'test_sample.py', 'test_bad_input.py', 'test_ranks.py', 'test_token_cache.py',
        'test_tokenizer_training.py', 'test_notebook.py', 'test_evaluate_images.py')


def pytest_collection_modifyitems(items):
    """The files with whole trainings first: they take longest, and two processes share the files."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))
