"""The notebooks run from top to bottom, on tiny checkpoints and without the hub."""
import shutil

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from models import VAR, VQVAE, FlexVAE, FlexVAR
from tests.runs import REPO, TINY_VQVAE
from utils.data import build_transforms, pil_loader


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


def run_notebook(name, folder):
    """(printed text, number of pictures) of a run in a kernel of its own."""
    notebook = nbformat.read(REPO / name, as_version=4)
    assert not any(cell.get('outputs') for cell in notebook.cells)  # committed without outputs
    NotebookClient(notebook, timeout=120, resources=dict(metadata=dict(path=str(folder)))).execute()
    outputs = [out for cell in notebook.cells for out in cell.get('outputs', [])]
    return (''.join(out.get('text', '') for out in outputs),
            sum('image/png' in out.get('data', {}) for out in outputs))


@pytest.mark.parametrize('given', [pytest.param(True, marks=pytest.mark.slow), False])
def test_sampling_notebook_runs(checkpoint, tmp_path, monkeypatch, without_hub, given):
    """With CKPT it loads that file; without, and without the hub, the demo's own checkpoint."""
    monkeypatch.setenv('CKPT', str(checkpoint) if given else '')
    monkeypatch.setenv('VAE_CKPT', '')
    text, num_pictures = run_notebook('demo_sample.ipynb', tmp_path)
    assert f'{checkpoint if given else "local_output/demo/var/ar-ckpt-last.pth"}: depth 1' in text
    assert ('cannot be fetched' in text) == (not given)
    assert num_pictures == 6


# ---------------------------------------------------------------------------------------------- editing
DIGITS_FLEXVAR = 'local_output/demo_flexvar/flexvar/ar-ckpt-last.pth'
EDIT_CELLS = [cell.source for cell in nbformat.read(REPO / 'demo_zero_shot_edit.ipynb', as_version=4).cells
              if cell.cell_type == 'code']


@pytest.fixture
def edit(tmp_path, monkeypatch, without_hub):
    """Runs the first cells of the editing notebook in this process; its variables and pictures."""
    monkeypatch.chdir(tmp_path)

    def unreachable(*args):
        raise OSError
    monkeypatch.setattr('huggingface_hub.hf_hub_download', unreachable)

    def run(model, num_cells=None, **environment):
        for name, value in dict(MODEL=model, **environment).items():
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
    pixels = np.asarray(pictures[0])
    assert (pixels[:row, :100] < 128).any()  # a name before the row
    assert not np.array_equal(pixels[:row], pixels[row:2 * row])


@pytest.mark.slow
def test_editing_notebook_runs(tmp_path, monkeypatch, without_hub):
    save_checkpoint(build_flexvar(), tmp_path / DIGITS_FLEXVAR)
    monkeypatch.setenv('MODEL', 'digits-flexvar')
    text, num_pictures = run_notebook('demo_zero_shot_edit.ipynb', tmp_path)
    assert f'{DIGITS_FLEXVAR}: depth 1, 10 classes, scales (1, 2, 3, 4), 32 px' in text
    assert num_pictures == 8


def test_editing_with_flexvar(tmp_path, edit):
    """Digits are edited as with VAR, and refined, expanded and drawn at other sizes."""
    save_checkpoint(build_flexvar(), tmp_path / DIGITS_FLEXVAR)
    variables, pictures = edit('digits-flexvar')
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
    variables, pictures = edit('var_d36')
    check_shared(variables, pictures)
    assert len(pictures) == 4  # the rest is for FlexVAR
    assert variables['settings'] == dict(guidance=4, top_k=32, top_p=0.95, more_smooth=True)
    assert variables['images'].shape == (4, 3, 16, 16)


def test_editing_takes_the_demo_that_is_there(tmp_path, checkpoint, edit):
    """Without MODEL: that of FlexVAR where there are both, else the only one; or a line, if there is none."""
    assert edit('', num_cells=1)[0]['MODEL'] == 'digits-var'
    save_checkpoint(build_flexvar(), tmp_path / DIGITS_FLEXVAR)
    assert edit('', num_cells=1)[0]['MODEL'] == 'digits-flexvar'
    shutil.rmtree(tmp_path / 'local_output')
    with pytest.raises(SystemExit, match='no weights: run `make demo` or `make demo-flexvar` first'):
        edit('', num_cells=1)


def test_editing_an_image_file(tmp_path, checkpoint, edit):
    """It is cut to the model's side; without a label it gets the null class."""
    pixels = np.random.RandomState(0).randint(0, 256, (24, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'mine.png')
    expected = build_transforms(16, mid_reso=1.)[1](pil_loader(tmp_path / 'mine.png'))
    for environment, label in (({}, 4), (dict(LABEL=2), 2)):
        variables, _ = edit('digits-var', num_cells=2, IMAGE='mine.png', **environment)
        assert torch.equal(variables['images'], expected.expand(4, -1, -1, -1))
        assert variables['labels'] == [label] * 4


@pytest.mark.parametrize('model, line', [
    ('digits-var', 'digits-var needs local_output/demo/var/ar-ckpt-last.pth: run `make demo`'),
    ('digits-flexvar', f'digits-flexvar needs {DIGITS_FLEXVAR}: run `make demo-flexvar`'),
    ('var_d36', 'var_d36 needs var_d36.pth and vae_ch160v4096z32.pth: put them here, from the hub repository '
                'FoundationVision/var'),
    ('flexvar_d24', 'flexvar_d24 needs FlexVARd24-epo349.pth and FlexVAE.pth: put them here, from the hub '
                    'repository jiaosiyu1999/FlexVAR'),
])
def test_missing_files(edit, model, line):
    """One line says what is missing and what brings it."""
    with pytest.raises(SystemExit) as stop:
        edit(model)
    assert str(stop.value) == line
