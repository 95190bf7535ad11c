"""What scripts and notebooks written for the published package rely on: names, signatures, use of the API."""
import inspect
import os
import subprocess
import sys

import torch

import dist
import models
import models.basic_var
import models.helpers
import models.var
import utils.data
import utils.misc
from models import VAR, VQVAE, VectorQuantizer2, build_vae_var
from tests.test_imports import REPO
from tests.vectors import tiny_var

PYRAMID = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIGNATURES = {
    build_vae_var: dict(patch_nums=PYRAMID, V=4096, Cvae=32, ch=160, share_quant_resi=4, num_classes=1000,
                        depth=16, shared_aln=False, attn_l2_norm=True, flash_if_available=True,
                        fused_if_available=True, init_adaln=0.5, init_adaln_gamma=1e-5, init_head=0.02,
                        init_std=-1),
    VQVAE: dict(vocab_size=4096, z_channels=32, ch=128, dropout=0., beta=0.25, using_znorm=False,
                quant_conv_ks=3, quant_resi=0.5, share_quant_resi=4, default_qresi_counts=0,
                v_patch_nums=PYRAMID, test_mode=True),
    VectorQuantizer2: dict(beta=0.25, default_qresi_counts=0, v_patch_nums=None, quant_resi=0.5,
                           share_quant_resi=4),
    VAR: dict(num_classes=1000, depth=16, embed_dim=1024, num_heads=16, mlp_ratio=4., drop_rate=0.,
              attn_drop_rate=0., drop_path_rate=0., norm_eps=1e-6, shared_aln=False, cond_drop_rate=0.1,
              attn_l2_norm=False, patch_nums=PYRAMID, flash_if_available=True, fused_if_available=True),
    VAR.autoregressive_infer_cfg: dict(g_seed=None, cfg=1.5, top_k=0, top_p=0., more_smooth=False),
    VAR.init_weights: dict(init_adaln=0.5, init_adaln_gamma=1e-5, init_head=0.02, init_std=0.02,
                           conv_std_or_gain=0.02),
    VQVAE.idxBl_to_img: dict(last_one=False),
    VQVAE.img_to_idxBl: dict(v_patch_nums=None),
    VQVAE.img_to_reconstructed_img: dict(v_patch_nums=None, last_one=False),
    VQVAE.forward: dict(ret_usages=False),
    VectorQuantizer2.f_to_idxBl_or_fhat: dict(v_patch_nums=None),
    VectorQuantizer2.embed_to_fhat: dict(all_to_max_scale=True, last_one=False),
    models.helpers.sample_with_top_k_top_p_: dict(top_k=0, top_p=0., rng=None, num_samples=1),
    models.helpers.gumbel_softmax_with_rng: dict(tau=1, hard=False, eps=1e-10, dim=-1, rng=None),
    utils.data.build_dataset: dict(hflip=False, mid_reso=1.125),
}


def test_signatures_keep_published_names_order_and_defaults():
    for function, published in SIGNATURES.items():
        ours = {name: p.default for name, p in inspect.signature(function).parameters.items()}
        assert {name: ours[name] for name in published} == published, function
        names = [name for name in ours if name in published]
        assert names == list(published), function
    block = inspect.signature(models.basic_var.AdaLNSelfAttn.forward).parameters
    assert list(block) == ['self', 'x', 'cond_BD', 'attn_bias']


def test_published_names_are_where_they_were():
    for name in ('AdaLNSelfAttn', 'sample_with_top_k_top_p_', 'gumbel_softmax_with_rng', 'VARHF',
                 'SharedAdaLin'):
        assert hasattr(models.var, name)
    for name in ('FFN', 'SelfAttention', 'AdaLNSelfAttn', 'AdaLNBeforeHead'):
        assert hasattr(models.basic_var, name)
    for name in ('pil_loader', 'normalize_01_into_pm1', 'build_dataset'):
        assert hasattr(utils.data, name)
    for name in ('create_npz_from_sample_folder', 'auto_resume'):
        assert hasattr(utils.misc, name)
    for name in ('initialized', 'initialize', 'get_rank', 'get_local_rank', 'get_world_size', 'get_device',
                 'set_gpu_id', 'is_master', 'is_local_master', 'new_group', 'barrier', 'allreduce',
                 'allgather', 'allgather_diff_shape', 'broadcast', 'dist_fmt_vals', 'master_only',
                 'local_master_only', 'for_visualize', 'finalize'):
        assert callable(getattr(dist, name))


def test_attributes_that_notebooks_read():
    var = tiny_var('sep_l2')
    assert isinstance(var.rng, torch.Generator) and var.rng.device == var.device
    assert var.uniform_prob.shape == (1, 5) and var.uniform_prob.sum() == 1
    assert (var.patch_nums, var.first_l, var.num_stages_minus_1, var.Cvae) == ((1, 2, 3, 4), 1, 3, 16)
    assert var.begin_ends == [(0, 1), (1, 5), (5, 14), (14, 30)] and var.L == 30 and var.prog_si == -1
    assert var.vae_proxy == (var.tokenizer,) and var.vae_quant_proxy == (var.tokenizer.quantize,)
    assert var.lvl_1L.shape == (1, 30) and var.attn_bias_for_masking.shape == (1, 1, 30, 30)


SAMPLING_NOTEBOOK = '''
import random, numpy as np, torch, torch.nn as nn
setattr(torch.nn.Linear, 'reset_parameters', lambda self: None)
setattr(torch.nn.LayerNorm, 'reset_parameters', lambda self: None)
setattr(torch.nn.Conv2d, 'reset_parameters', lambda self: None)
setattr(torch.nn.Embedding, 'reset_parameters', lambda self: None)
from models import VQVAE, build_vae_var
device = 'cpu'
vae, var = build_vae_var(V=64, Cvae=16, ch=32, share_quant_resi=4, device=device, patch_nums=(1, 2, 3),
                         num_classes=1000, depth=2, shared_aln=False)
torch.save(vae.state_dict(), folder + '/vae.pth'); torch.save(var.state_dict(), folder + '/var.pth')
vae.load_state_dict(torch.load(folder + '/vae.pth', map_location='cpu'), strict=True)
var.load_state_dict(torch.load(folder + '/var.pth', map_location='cpu'), strict=True)
vae.eval(), var.eval()
for p in vae.parameters(): p.requires_grad_(False)
for p in var.parameters(): p.requires_grad_(False)
seed, cfg, class_labels, more_smooth = 0, 4, (980, 980, 437, 437, 22, 22, 562, 562), False
torch.manual_seed(seed); random.seed(seed); np.random.seed(seed)
B = len(class_labels)
label_B = torch.tensor(class_labels, device=device)
with torch.inference_mode():
    with torch.autocast('cuda', enabled=False, dtype=torch.float16, cache_enabled=True):
        recon_B3HW = var.autoregressive_infer_cfg(B=B, label_B=label_B, cfg=cfg, top_k=60, top_p=0.95,
                                                  g_seed=seed, more_smooth=more_smooth)
assert recon_B3HW.shape == (8, 3, 48, 48) and recon_B3HW.isfinite().all()
assert 0 <= recon_B3HW.min() and recon_B3HW.max() <= 1 and recon_B3HW.std() > 0
image = torch.rand(2, 3, 48, 48) * 2 - 1
tokens = vae.img_to_idxBl(image, var.patch_nums)
assert [t.shape for t in tokens] == [(2, 1), (2, 4), (2, 9)]
torch.testing.assert_close(vae.idxBl_to_img(tokens, same_shape=True, last_one=True),
                           vae.img_to_reconstructed_img(image, last_one=True), atol=2e-4, rtol=0)
'''


def test_sampling_notebook_runs_with_the_users_own_patches(tmp_path):
    """Random weights stand in for released files; the editing notebook's loop is in test_sampling.py."""
    code = f'folder = {str(tmp_path)!r}\n{SAMPLING_NOTEBOOK}'
    run = subprocess.run([sys.executable, '-c', code], cwd=REPO, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ''


def test_collectives_without_a_group():
    t = torch.arange(3.)
    dist.allreduce(t)
    dist.broadcast(t, 0)
    dist.barrier()
    assert t.tolist() == [0., 1., 2.] and torch.equal(dist.allgather(t), t)
    assert dist.allgather(t, cat=False)[0] is t and dist.allgather_diff_shape(t, cat=False)[0] is t
    assert (dist.get_rank(), dist.get_world_size(), dist.is_master()) == (0, 1, True)
    assert dist.dist_fmt_vals(1.234) == ['1.23'] and dist.new_group([0]) is None


GLOO = '''
import torch, dist
dist.initialize(backend='gloo')
rank = dist.get_rank()
t = torch.tensor([1. + rank]); dist.allreduce(t); assert t.item() == 3
t = torch.tensor([5. + rank]); dist.broadcast(t, 1); assert t.item() == 6
assert dist.allgather(torch.tensor([rank])).tolist() == [0, 1]
assert dist.allgather_diff_shape(torch.full((rank + 1, 2), rank)).tolist() == [[0, 0], [1, 1], [1, 1]]
assert dist.allgather_object({'r': rank}) == [{'r': 0}, {'r': 1}]
assert dist.dist_fmt_vals(rank) == ['0.00', '1.00']
assert dist.master_only(lambda: 'x')() == ('x' if rank == 0 else None)
assert dist.master_only(lambda: 'x')(force=True) == 'x'
dist.barrier(); dist.finalize()
assert not dist.initialized()
'''


def test_collectives_on_two_processes(tmp_path):
    (tmp_path / 'gloo.py').write_text(GLOO)
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                          str(tmp_path / 'gloo.py')], cwd=REPO, text=True, capture_output=True, check=False,
                         env={**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stderr
