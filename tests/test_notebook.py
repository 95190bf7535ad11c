"""demo_sample.ipynb runs from top to bottom, on a tiny checkpoint and without the hub."""
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from models import VAR, VQVAE
from tests.runs import REPO, TINY_VQVAE


@pytest.fixture
def checkpoint(tmp_path):
    vae = VQVAE(**TINY_VQVAE)
    var = VAR(vae, num_classes=4, patch_nums=TINY_VQVAE['v_patch_nums'], attn_l2_norm=True,
              **VAR.published_sizes(1))
    var.init_weights()
    path = tmp_path / 'local_output' / 'demo' / 'var' / 'ar-ckpt-last.pth'
    path.parent.mkdir(parents=True)
    torch.save(dict(trainer=dict(var_wo_ddp=var.state_dict(), vae_local=vae.state_dict())), path)
    return path


@pytest.mark.parametrize('given', [True, False])
def test_notebook_runs(checkpoint, tmp_path, monkeypatch, given):
    """With CKPT it loads that file; without, and without the hub, the demo's own checkpoint."""
    monkeypatch.setenv('PYTHONPATH', str(REPO))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hub'))
    monkeypatch.setenv('CKPT', str(checkpoint) if given else '')
    monkeypatch.setenv('VAE_CKPT', '')
    notebook = nbformat.read(REPO / 'demo_sample.ipynb', as_version=4)
    assert not any(cell.get('outputs') for cell in notebook.cells)  # committed without outputs
    NotebookClient(notebook, timeout=120, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    outputs = [out for cell in notebook.cells for out in cell.get('outputs', [])]
    text = ''.join(out.get('text', '') for out in outputs)
    assert f'{checkpoint if given else "local_output/demo/var/ar-ckpt-last.pth"}: depth 1' in text
    assert ('cannot be fetched' in text) == (not given)
    assert sum('image/png' in out.get('data', {}) for out in outputs) == 6
