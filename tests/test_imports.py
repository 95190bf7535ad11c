"""Import direction, silence, and freedom from side effects."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ENTRIES = {'train', 'sample', 'evaluate', 'extract', 'export', 'app', 'hubconf', 'utils.doctor',
           'utils.curves', 'utils.pack_data', 'utils.check_data', 'utils.posthoc_ema', 'utils.merge'}
LAYERS = [{'dist'}, {'utils', 'models'}, {'configs'}, {'pipeline'}, {'evaluation'}, {'objectives'},
          {'trainer'}, {'training'}, {'web'}]
OPTIONAL = {'safetensors', 'safetensors.torch', 'sklearn.datasets', 'huggingface_hub',
            'huggingface_hub.utils', 'torch.utils.tensorboard',
            'torch_fidelity.feature_extractor_inceptionv3', 'timm',
            'tensorboard.backend.event_processing.event_file_loader',
            'tensorboard.compat.proto.event_pb2', 'tensorboard.summary.writer.record_writer',
            'wandb', 'matplotlib.backends.backend_agg', 'matplotlib.figure', 'sklearn.neural_network', 'yaml'}
# inside models
ORDER = ['noise', 'precision', 'scales', 'ssg', 'attention', 'sampling', 'loading', 'recompute', 'base',
         'helpers', 'layers', 'editing', 'basic_var', 'tokenizers', 'vqvae', 'quant', 'basic_vae', 'var',
         'flexvar', 'flowar', 'npp', '']


def modules():
    files = [*REPO.glob('*.py'), *REPO.glob('models/**/*.py'), *REPO.glob('utils/*.py'),
             *REPO.glob('configs/*.py'), *REPO.glob('evaluation/*.py'), *REPO.glob('training/*.py'),
             *REPO.glob('web/*.py'), *REPO.glob('objectives/*.py')]
    for path in files:
        name = '.'.join(path.relative_to(REPO).with_suffix('').parts).removesuffix('.__init__')
        yield name, ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def layer(name):
    """Of this project's modules, each of which imports from its own package and from lower layers alone."""
    if name in ENTRIES:
        return len(LAYERS)
    top = name.split('.')[0]
    return next((i for i, names in enumerate(LAYERS) if top in names), None)


def test_import_direction():
    seen = 0
    for name, tree in modules():
        for target in imported(tree):
            if layer(target) is None:
                continue
            seen += 1
            assert layer(target) <= layer(name), f'{name} imports {target}'
            if layer(name) == layer(target) < len(LAYERS):
                assert name.split('.')[0] == target.split('.')[0], f'{name} imports {target}'
    assert seen > 40


def test_order_inside_models():
    for name, tree in modules():
        if name.startswith('models.'):
            here = ORDER.index(name.split('.')[1])
            for target in imported(tree):
                if target.startswith('models.'):
                    there = ORDER.index(target.split('.')[1])
                    inside_folder = there == here and 'tokenizers' in name
                    assert there < here or inside_folder, f'{name} imports {target}'


def test_no_print_and_no_late_import():
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'print':
                assert name in ENTRIES, f'print in {name}'
            if isinstance(node, ast.FunctionDef):
                late = set(imported(node))
                assert late <= OPTIONAL, f'{name}.{node.name} imports {late - OPTIONAL}'


def test_imports_are_silent_and_change_nothing():
    code = '''
import importlib, logging, random, torch
from torch import nn
classes = [nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Conv2d, nn.ConvTranspose2d]
def state():
    patched = [vars(c).get('reset_parameters') for c in classes]
    return patched, torch.get_rng_state().tolist(), random.getstate()
before, printer = state(), print
for module in ('dist', 'models', 'utils.data', 'trainer', 'evaluation.score', 'pipeline', 'train', 'sample',
               'evaluate', 'export'):
    importlib.import_module(module)
    assert before == state() and print is printer and not logging.root.handlers, module
    assert not torch.cuda.is_initialized(), module
    assert torch.get_default_device() == torch.device('cpu') and torch.is_grad_enabled(), module
'''
    run = subprocess.run([sys.executable, '-c', code], cwd=REPO, text=True,
                         capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, '', '')


@pytest.mark.slow
def test_systems_without_the_locks_and_signals_of_unix_can_import_all(tmp_path):
    """As on Windows; a folder is then used without a lock, and that is said."""
    code = '''
import importlib, logging, os, signal, sys
sys.modules['fcntl'] = sys.modules['resource'] = None
for module, name in ((signal, 'SIGUSR1'), (signal, 'SIGHUP'), (signal, 'SIGKILL'), (os, 'sched_getaffinity'),
                     (os, 'fork')):
    delattr(module, name)
for module in ('train', 'sample', 'evaluate', 'extract', 'export', 'pipeline', 'utils.doctor'):
    importlib.import_module(module)
from utils.files import lock_folder
from utils.machine import available_cpus
from utils.stop import StopRequest
with StopRequest(), lock_folder(sys.argv[1]):
    print(available_cpus() > 0)
'''
    run = subprocess.run([sys.executable, '-c', code, str(tmp_path)], cwd=REPO, text=True,
                         capture_output=True, check=False)
    assert (run.returncode, run.stdout) == (0, 'True\n'), run.stderr
    assert 'has no locks (not on this system)' in run.stderr


def test_an_installation_has_every_module():
    tomllib = pytest.importorskip('tomllib')  # since Python 3.11
    settings = tomllib.loads((REPO / 'pyproject.toml').read_text())['tool']['setuptools']
    packages = {path.parent.name for path in REPO.glob('*/__init__.py')} - {'tests'}
    # torch.hub reads hubconf.py in the repository itself.
    assert {*settings['py-modules']} == {path.stem for path in REPO.glob('*.py')} - {'hubconf'}
    assert {name.removesuffix('*') for name in settings['packages']['find']['include']} == packages


def test_tested_versions_are_within_the_bounds():
    """constraints.txt pins every package of the requirement files, inside its bounds."""
    packaging = pytest.importorskip('packaging.requirements')
    pinned = {}
    for line in (REPO / 'constraints.txt').read_text().splitlines():
        name, _, version = line.partition('==')
        pinned[name.lower().replace('_', '-')] = version
    for file in ('requirements.txt', 'requirements-eval.txt', 'requirements-dev.txt'):
        for line in (REPO / file).read_text().splitlines():
            text = line.partition('#')[0].strip()
            if text:  # lines of extras can be no flags such as -r
                requirement = packaging.Requirement(text)
                version = pinned[requirement.name.lower().replace('_', '-')]
                assert version in requirement.specifier, text
                assert '<' in str(requirement.specifier), f'{text} has no upper bound'
