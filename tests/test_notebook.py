"""The notebooks run from top to bottom on tiny checkpoints, without the hub; what they store is sound.

`tests/test_demo.py` runs them on the demos, and compares what they show with what is stored.
"""
import base64
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from models import VAR, VQVAE, FlexVAE, FlexVAR
from tests.runs import REPO, TINY_VQVAE
from utils.data import build_transforms, pil_loader

NOTEBOOKS = ('demo_sample.ipynb', 'demo_zero_shot_edit.ipynb', 'demo_scaling_laws.ipynb')
MOST_BYTES = 150_000  # of the outputs of a cell


def build_var(num_classes=10):
    vae = VQVAE(**TINY_VQVAE)
    torch.nn.init.normal_(vae.quantize.embedding.weight, std=0.3)
    var = VAR(vae, num_classes=num_classes, patch_nums=TINY_VQVAE['v_patch_nums'], attn_l2_norm=True,
              **VAR.published_sizes(1))
    var.init_weights(init_head=1., init_std=-1, init_adaln_gamma=0.5)
    return var


def build_flexvar():
    """32 px in codes of 8, so that 2/3, 4/3 and 3/2 of it differ."""
    flexvar = FlexVAR(FlexVAE(24, 8, z_channels=16, net='tiny', test_mode=True), num_classes=10,
                      patch_nums=(1, 2, 3, 4), attn_l2_norm=True, **FlexVAR.published_sizes(1))
    flexvar.init_weights(init_head=1., init_std=-1, init_adaln_gamma=0.5)
    return flexvar


def save_checkpoint(model, path):
    """As train.py leaves it: the tokenizer inside."""
    path.parent.mkdir(parents=True)
    torch.save(dict(trainer=dict(var_wo_ddp=model.state_dict(), config=model.config_state(1.),
                                 vae_local=model.tokenizer.state_dict())), path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(build_var(4), tmp_path / 'local_output' / 'demo' / 'var' / 'ar-ckpt-last.pth')


@pytest.fixture
def without_hub(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(REPO))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hub'))
    for name in ('IMAGE', 'LABEL'):
        monkeypatch.delenv(name, raising=False)


def cells_of(name):
    """The sources of its code cells."""
    notebook = nbformat.read(REPO / name, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == 'code']


def run_notebook(name, folder):
    """(printed text, number of pictures) of a run in a kernel of its own."""
    notebook = nbformat.read(REPO / name, as_version=4)
    NotebookClient(notebook, timeout=120, resources=dict(metadata=dict(path=str(folder)))).execute()
    outputs = [out for cell in notebook.cells for out in cell.get('outputs', [])]
    return (''.join(out.get('text', '') for out in outputs),
            sum('image/png' in out.get('data', {}) for out in outputs))


# ---------------------------------------------------------------------------------------------- outputs
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebooks_are_stored_executed_and_small(name):
    """Run from top to bottom at once, without errors, warnings or paths of a machine, with pictures."""
    cells = [cell for cell in nbformat.read(REPO / name, as_version=4).cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {'stream', 'display_data', 'execute_result'}
    assert all(output.name == 'stdout' for output in outputs if output.output_type == 'stream')
    for cell in cells:
        assert len(str(cell.outputs)) < MOST_BYTES
        assert not re.search(r'/(tmp|home|root|work)/', str(cell.outputs))
    pictures = [output.data['image/png'] for output in outputs if 'image/png' in output.get('data', {})]
    assert pictures
    for picture in pictures:
        assert np.asarray(open_png(picture).convert('RGB')).std() > 20


def open_png(text):
    """The picture of an output."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_first_cell_fetches_the_code_where_it_is_not(name, tmp_path, monkeypatch):
    """On a hosted notebook alone; without an address of the repository one line asks for it."""
    commands = []

    def run(command, check):
        commands.append(command)
        (tmp_path / 'next-scale').mkdir(exist_ok=True)
    monkeypatch.setattr(subprocess, 'run', run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    first = cells_of(name)[0]

    exec(first, {})
    assert commands == [] and Path.cwd() == tmp_path

    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    monkeypatch.delenv('REPOSITORY', raising=False)
    with pytest.raises(SystemExit, match='set REPOSITORY to the address'):
        exec(first, {})
    monkeypatch.setenv('REPOSITORY', 'https://host/owner/name.git')
    exec(first, {})
    clone, install = commands
    assert clone[:2] == ['git', 'clone'] and 'https://host/owner/name.git' in clone
    assert install[1:3] == ['-m', 'pip'] and install[-1] == 'next-scale/requirements.txt'
    assert Path.cwd() == tmp_path / 'next-scale' and sys.path[0] == str(Path.cwd())


# ---------------------------------------------------------------------------------------------- sampling
@pytest.mark.slow
@pytest.mark.parametrize('given', [True, False])
def test_sampling_notebook_runs(checkpoint, tmp_path, monkeypatch, without_hub, given):
    """With CKPT it loads that file, without it the demo's own checkpoint."""
    monkeypatch.setenv('CKPT', str(checkpoint) if given else '')
    monkeypatch.setenv('VAE_CKPT', '')
    text, num_pictures = run_notebook('demo_sample.ipynb', tmp_path)
    assert f'{checkpoint if given else "local_output/demo/var/ar-ckpt-last.pth"}: depth 1' in text
    assert num_pictures == 5


# ---------------------------------------------------------------------------------------------- editing
DIGITS_FLEXVAR = 'local_output/demo_flexvar/flexvar/ar-ckpt-last.pth'
DIGITS_VAR = 'local_output/demo/var/ar-ckpt-last.pth'
EDIT_CELLS = cells_of('demo_zero_shot_edit.ipynb')


@pytest.fixture
def edit(tmp_path, monkeypatch, without_hub):
    """Runs the first cells of the editing notebook in this process; its variables and pictures."""
    monkeypatch.chdir(tmp_path)

    def unreachable(*args):
        raise OSError
    monkeypatch.setattr('huggingface_hub.hf_hub_download', unreachable)

    def run(source='', num_cells=None, **environment):
        for name, value in dict(CKPT=source, VAE_CKPT='', **environment).items():
            monkeypatch.setenv(name, str(value))
        pictures = []
        variables = dict(display=pictures.append)
        for source in EDIT_CELLS[:num_cells]:
            exec(source, variables)
        return variables, pictures
    return run


def check_shared(variables, pictures):
    """Kept pixels, the veil, and pictures with as many rows as the cells name, for any model."""
    given, drawn, pasted, box = (variables[name] for name in ('given', 'drawn', 'pasted', 'box'))
    assert torch.equal(pasted[..., ~box], given[..., ~box])
    assert torch.equal(pasted[..., box], drawn[..., box])
    assert not torch.equal(drawn[..., ~box], given[..., ~box])  # these came through the tokenizer
    veiled = (variables['veil'](given, ~box) != given).any(1)
    assert veiled[:, box].all() and not veiled[:, ~box].any()
    assert len({image.sum().item() for image in variables['edited'].values()}) == 3  # a class each
    assert not torch.equal(*variables['outside'].values())  # a seed each
    assert 0.1 < variables['wave'].float().mean() < 0.9
    row = variables['zoom'] * (variables['side'] + 2)
    assert [picture.height for picture in pictures[:4]] == [4 * row, 4 * row, 5 * row, 4 * row]
    pixels = np.asarray(pictures[0].convert('RGB'))
    assert (pixels[:row, :100] < 128).any()  # a name before the row
    assert not np.array_equal(pixels[:row], pixels[row:2 * row])


@pytest.mark.slow
def test_editing_notebook_runs(tmp_path, without_hub):
    save_checkpoint(build_flexvar(), tmp_path / DIGITS_FLEXVAR)
    text, num_pictures = run_notebook('demo_zero_shot_edit.ipynb', tmp_path)
    assert f'{DIGITS_FLEXVAR}: depth 1, 10 classes, scales (1, 2, 3, 4), 32 px' in text
    assert num_pictures == 8


def test_editing_with_flexvar(tmp_path, edit):
    """Digits are edited as with VAR, and refined, expanded and drawn at other sizes."""
    save_checkpoint(build_flexvar(), tmp_path / DIGITS_FLEXVAR)
    variables, pictures = edit()
    check_shared(variables, pictures)
    images, given, framed = variables['images'], variables['given'], variables['framed']
    assert variables['labels'] == [0, 2, 3, 4, 5, 6, 8, 9] and images.shape == (8, 3, 32, 32)
    assert framed.shape == variables['expanded'].shape == (8, 3, 48, 48)
    assert torch.equal(framed[..., 8:40, 8:40], given)
    assert variables['larger'].shape == (8, 3, 40, 40)
    assert {name: row.shape for name, row in variables['refined'].items()} == {'kept to 2x2': given.shape}
    assert [list(pyramid) for pyramid in variables['pyramids']] == [[1, 4], [1, 2, 4], [1, 2, 3, 4],
                                                                   [1, 2, 3, 4]]
    heights = [height for height, _ in variables['sizes']]
    assert heights == [24, 32, 40, 40, 24]
    assert pictures[-1].height == variables['zoom'] * sum(height + 2 for height in heights)


def test_editing_with_released_files(tmp_path, edit):
    """Two plain state dicts of 1,000 classes: samples are edited with the published settings."""
    var = build_var(1000)
    torch.save(var.state_dict(), tmp_path / 'var_d36.pth')
    torch.save(var.tokenizer.state_dict(), tmp_path / 'vae_ch160v4096z32.pth')
    variables, pictures = edit('var_d36.pth')
    check_shared(variables, pictures)
    assert len(pictures) == 4  # the rest is for FlexVAR
    assert variables['settings'] == dict(guidance=4, top_k=32, top_p=0.95, more_smooth=True)
    assert variables['images'].shape == (4, 3, 16, 16)


def test_editing_takes_the_demo_that_is_there(tmp_path, checkpoint, edit):
    """Without CKPT: that of FlexVAR where there are both, else the only one."""
    assert str(edit(num_cells=2)[0]['source']) == DIGITS_VAR
    save_checkpoint(build_flexvar(), tmp_path / DIGITS_FLEXVAR)
    assert str(edit(num_cells=2)[0]['source']) == DIGITS_FLEXVAR
    assert edit(DIGITS_VAR, num_cells=2)[0]['pipe'].family == 'var'


def test_editing_an_image_file(tmp_path, checkpoint, edit):
    """It is cut to the model's side; without a label it gets the null class."""
    pixels = np.random.RandomState(0).randint(0, 256, (24, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'mine.png')
    expected = build_transforms(16, mid_reso=1.)[1](pil_loader(tmp_path / 'mine.png'))
    for environment, label in (({}, 4), (dict(LABEL=2), 2)):
        variables, _ = edit(num_cells=3, IMAGE='mine.png', **environment)
        assert torch.equal(variables['images'], expected.expand(4, -1, -1, -1))
        assert variables['labels'] == [label] * 4


@pytest.mark.parametrize(('source', 'words'), [
    ('', 'var_d16.pth'), ('nowhere/mine.pth', 'nowhere/mine.pth'), ('var_d36_512', 'var_d36.pth')])
def test_missing_files(edit, source, words):
    """One line says what is missing and what brings it."""
    with pytest.raises(SystemExit) as stop:
        edit(source)
    line = str(stop.value)
    assert words in line and line.endswith('; or run `make demo` or `make demo-flexvar` first')
    assert '\n' not in line
