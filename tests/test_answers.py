"""What can be said about a command without torch is said before it is imported, which takes seconds."""
import os
import subprocess
import sys

import pytest

from evaluation.metrics import SSIM_DEFINITIONS
from evaluation.settings import SSIM_KINDS, TOKENIZERS
from models import FAMILIES
from tests.runs import REPO


@pytest.fixture(scope='module')
def without_torch(tmp_path_factory):
    """Run a command in an environment whose torch cannot be imported: (exit code, output, errors)."""
    folder = tmp_path_factory.mktemp('without_torch')
    (folder / 'torch.py').write_text('raise SystemExit("torch is imported")')

    def run(command):
        done = subprocess.run([sys.executable, *command.split()], cwd=REPO, text=True, capture_output=True,
                              env={**os.environ, 'PYTHONPATH': str(folder)}, check=False)
        return done.returncode, done.stdout, done.stderr
    return run


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'extract.py', 'evaluate.py', 'app.py',
                                    '-m recipes.photos'])
def test_help_needs_no_torch(without_torch, script):
    code, output, errors = without_torch(f'{script} --help')
    assert (code, errors) == (0, '')
    assert '--' in output


@pytest.mark.parametrize(('command', 'exit_code', 'words'), [
    ('train.py --detph=2', 2, 'the nearest flag is --depth'),
    ('train.py --data_path=/nowhere', 1, "a data set in '/nowhere'"),
    ('train.py --model=npp --data_path=digits --vq_ckpt=/nowhere.pt', 1, "no file '/nowhere.pt'"),
    ('sample.py --ckpt=/nowhere.pth', 1, "no file '/nowhere.pth'"),
    ('app.py --prot=80', 2, 'the nearest flag is --port'),
    ('app.py --listen', 2, 'pass --auth=FILE'),
    ('extract.py --vae_path=/nowhere.pth --cached_path=OUT', 1, "no file '/nowhere.pth'"),
    ('evaluate.py stat', 2, 'the nearest command is stats'),
    ('evaluate.py /nowhere.npz /nowhere', 2, 'found nothing at /nowhere.npz'),
    ('evaluate.py tokenizer --ckpt=/nowhere.pth --data_path=toy', 2, "no file '/nowhere.pth'"),
    ('-m recipes.photos /nowhere', 2, "a folder of photos, found none at '/nowhere'"),
    ('-m recipes.photos configs', 1, 'expected at least 2 photos'),
    ('-m recipes.photos configs --size=50', 2, '--size must be one of')])
def test_a_wrong_command_needs_no_torch(without_torch, command, exit_code, words):
    code, _, errors = without_torch(command)
    assert code == exit_code
    assert words in errors and errors.count('\n') == 1


def test_a_right_command_says_at_once_what_it_waits_for(without_torch):
    _, _, errors = without_torch('train.py --data_path=digits')
    assert errors == 'train.py: loading torch, the data and the model\ntorch is imported\n'


def test_settings_of_commands_name_what_the_modules_have():
    assert tuple(SSIM_DEFINITIONS) == SSIM_KINDS
    assert {*TOKENIZERS} == {name for name, family in FAMILIES.items() if family.tokenizer is None}
