"""Losses of tokenizer training: LPIPS, discriminators, adversarial terms, and their sum."""
import copy
import hashlib
import logging
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dist
from models.base import Reconstruction
from models.noise import GlobalBatch
from models.tokenizers.discriminators import (
    Block,
    DiffAug,
    DINODiscriminator,
    GlobalBatchNorm,
    PatchGAN,
    StyleGAN,
    VisionTransformer,
    blur,
)
from models.tokenizers.losses import (
    LPIPS,
    GANSettings,
    LeCAM,
    PyramidLoss,
    TokenizerLoss,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from tests.runs import on_two_ranks
from tests.vectors import fill, load_json, load_tensors, npp_numbers, npp_rule
from trainer import distributed
from utils import hub
from utils.hub import dino_state, lpips_state

FP32 = nullcontext()


# ---------------------------------------------------------------------------------------------- vectors
def stored():
    return load_json('npp/vq_loss'), load_tensors('npp/vq_loss')


def filled_lpips(prefix=''):
    lpips, keys = LPIPS(), stored()[0]['lpips']['keys']
    lpips.load_published({key: torch.from_numpy(npp_rule(prefix + key, shape))
                          for key, shape in keys.items()}, 'the stored keys')
    return lpips


def inputs():
    """(image, its reconstruction)."""
    image, noise = (torch.from_numpy(npp_numbers(f'input.{name}', (2, 3, 64, 64)).astype(np.float32))
                    for name in ('vl_img', 'vl_noise'))
    return image, 0.7 * image + 0.3 * noise


def shapes(module):
    return {key: list(t.shape) for key, t in module.state_dict().items()}


def num_params(make):
    with torch.device('meta'):
        return sum(p.numel() for p in make().parameters())


def close(actual, expected, rtol=1e-4, atol=1e-6):
    actual, expected = (torch.as_tensor(value).detach() for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


def test_patchgan_is_the_published_one():
    info, vectors = stored()
    patchgan = fill(PatchGAN(), npp_rule)
    assert list(shapes(patchgan).items()) == list(info['patchgan']['keys'].items())
    image, _ = inputs()
    close(patchgan.train()(image), vectors['patchgan_train'])
    close(patchgan.eval()(image), vectors['patchgan_eval_after_one_train_pass'])
    assert num_params(PatchGAN) == 2_765_633
    assert PatchGAN(8)(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert PatchGAN(8, num_layers=2)(torch.zeros(2, 3, 16, 16)).shape == (2, 1, 2, 2)


def test_patchgan_initialisation():
    layers = [layer for layer in PatchGAN().main if not isinstance(layer, nn.LeakyReLU)]
    assert all(layer.weight.std().item() == pytest.approx(0.02, rel=0.1) for layer in layers)
    norms = [layer for layer in layers if isinstance(layer, GlobalBatchNorm)]
    assert all(abs(norm.weight.mean() - 1) < 0.01 and not norm.bias.any() for norm in norms)


def test_stylegan_is_the_published_one():
    info, vectors = stored()
    stylegan = fill(StyleGAN(64), npp_rule)
    assert shapes(stylegan) == info['stylegan64']['keys']
    close(stylegan(inputs()[0]), vectors['stylegan_out_img64'])
    assert num_params(lambda: StyleGAN(64)) == info['stylegan64']['n_params'] == 34_619_905
    assert num_params(lambda: StyleGAN(256)) == info['stylegan256_n_params'] == 36_500_225
    with pytest.raises(ValueError, match='power of two'):
        StyleGAN(48)
    with pytest.raises(ValueError, match=r'64 pixels, got \(32, 32\)'):
        stylegan(torch.zeros(1, 3, 32, 32))


def test_lpips_is_the_published_one():
    close(filled_lpips()(*inputs()), stored()[1]['lpips_eval'].flatten())


def test_adversarial_terms():
    info, vectors = stored()
    real, fake = vectors['logits_real'], vectors['logits_fake']
    for kind, d_name, g_name in (('hinge', 'hinge', 'hinge'), ('vanilla', 'vanilla', 'hinge'),
                                 ('non-saturating', 'non_saturating_correct', 'non_saturating_correct')):
        close(discriminator_loss(kind, real, fake, half=True), info['d_loss'][d_name])
        close(discriminator_loss(kind, real, fake), 2 * info['d_loss'][d_name])
        close(generator_loss(kind, fake), info['g_loss'][g_name])


class PublishedForward(PatchGAN):
    """Train mode in both passes, and a forward of its own for real and for fake images, as published."""

    def train(self, mode=True):
        return super().train(True)

    def forward(self, x):
        return torch.cat([super(PublishedForward, self).forward(part) for part in x.split(2)])


@pytest.fixture(scope='module')
def published_parts():
    return fill(PublishedForward(), npp_rule, 'discriminator.'), filled_lpips('perceptual_loss.')


@pytest.mark.parametrize('row', stored()[0]['vqloss'],
                         ids=lambda row: f'{row["adaptive"]}_{row["global_step"]}')
def test_whole_loss_is_the_published_one(row, published_parts):
    """Published without a ramp and with constant codebook losses; before its start the GAN counts 0."""
    patchgan, lpips = published_parts
    criterion = TokenizerLoss(l1_weight=0., l2_weight=1., perceptual=lpips, discriminator=patchgan,
                              gan=GANSettings(0.5, start=0.5, ramp=0., half=True, adaptive=row['adaptive']))
    progress = row['global_step'] / 40_000
    image, rec = inputs()
    last = nn.Parameter(torch.from_numpy(npp_numbers('input.lastlayer', (3, 3, 1, 1)).astype(np.float32)))
    rec = Reconstruction([(image, F.conv2d(rec, last))], torch.tensor(0.11 + 0.022 + 0.003), {}, {})
    logged = row['logged_generator']
    loss, parts = criterion.generator(rec, progress, last, FP32)
    close(loss, row['gen'], rtol=1e-4)
    close(parts['l2'], logged['rec_loss'], atol=5e-5)
    close(parts['lp'], logged['perceptual_loss'], atol=5e-5)
    close(parts['gan_weight'] * parts['gen_loss'], logged['generator_adv_loss'], rtol=1e-3, atol=5e-5)
    loss, parts = criterion.discriminate(rec, progress, FP32)
    close(parts['logits_real'], row['logged_discriminator']['logits_real'], atol=5e-5)
    close(parts['logits_fake'], row['logged_discriminator']['logits_fake'], atol=5e-5)
    if criterion.is_active(progress):
        close(0.5 * loss, row['disc'])
        rec_loss = F.mse_loss(rec.views[0][1], image) + lpips(image, rec.views[0][1]).mean()
        gen_loss = generator_loss('hinge', patchgan(rec.views[0][1]))
        weight = adaptive_weight(rec_loss, gen_loss, last, 0., 1e4, 1e-4) if row['adaptive'] else 1.
        close(weight, logged['disc_adaptive_weight'], rtol=1e-3)


# ---------------------------------------------------------------------------------------------- LPIPS
def random_lpips(trunk):
    """(features by torchvision's keys, heads) with random numbers."""
    weights = dict(LPIPS(trunk).named_buffers())
    features = {name: torch.randn_like(t) * 0.1 for name, t in weights.items() if name.startswith('features')}
    heads = {f'lin{i}.model.1.weight': torch.rand(1, len(weights[f'lin{i}']), 1, 1) for i in range(5)}
    return features, heads


def combined_layout(features, heads, lins):
    """As taming's loader keeps them (`lin0`), or vaex's (`lins.0`)."""
    indices = sorted({int(key.split('.')[1]) for key in features})
    slices = {}
    for key, value in features.items():
        _, index, kind = key.split('.')
        slices[f'net.slice{1 + indices.index(int(index)) // 3}.{index}.{kind}'] = value
    return slices | {key.replace('lin', 'lins.') if lins else key: value for key, value in heads.items()} \
        | {'scaling_layer.shift': torch.zeros(1, 3, 1, 1)}


@pytest.mark.parametrize('trunk', ['vgg', 'alex'])
def test_lpips_layouts_are_equal(trunk, tmp_path):
    features, heads = random_lpips(trunk)
    if trunk == 'vgg':  # its files would be large
        states = [(features | heads | {'classifier.0.weight': torch.zeros(1)}, 'x'),
                  *((combined_layout(features, heads, lins), 'x') for lins in (False, True))]
    else:
        torch.save(features | {'classifier.1.bias': torch.zeros(1)}, tmp_path / 'trunk.pth')
        torch.save(heads, tmp_path / 'heads.pth')
        states = [lpips_state(tmp_path / 'trunk.pth', tmp_path / 'heads.pth', '', trunk=trunk)]
        for lins in (False, True):
            torch.save(combined_layout(features, heads, lins), tmp_path / f'{lins}.pth')
            states.append(lpips_state('', '', str(tmp_path / f'{lins}.pth')))
        assert states[1][1] == str(tmp_path / 'False.pth')
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    untrained, distances = LPIPS(trunk)(x, y), []
    for state, source in states:
        lpips = LPIPS(trunk)
        lpips.load_published(state, source)
        distances.append(lpips(x, y))
    assert torch.equal(distances[0], distances[1]) and torch.equal(distances[0], distances[2])
    assert distances[0].shape == (2,) and (distances[0] > 0).all()
    assert not torch.equal(distances[0], untrained)


def test_lpips_says_what_is_wrong_with_its_weights():
    features, heads = random_lpips('alex')
    with pytest.raises(ValueError, match=r'heads\.pth holds only the linear heads .*_lin.*_vgg.*_path'):
        LPIPS('alex').load_published(heads, 'heads.pth')
    with pytest.raises(ValueError, match=r"trunk 'alex', got others in x: lin0 missing, .* 5 of 17 weights"):
        LPIPS('alex').load_published(features, 'x')
    with pytest.raises(ValueError, match=r'in x: lin1 \(192,\) instead of \(128,\), .* of 33 weights'):
        LPIPS('vgg').load_published(features | heads, 'x')
    with pytest.raises(ValueError, match="got 'resnet'"):
        LPIPS('resnet')


def test_lpips_is_a_frozen_float32_distance():
    lpips = LPIPS('alex')
    criterion = TokenizerLoss(l1_weight=1., l2_weight=1., perceptual=lpips).train()
    assert criterion.training and not any(module.training for module in lpips.modules())
    assert not list(criterion.parameters()) and set(criterion.state_dict()) == {'num_alarming'}
    criterion.load_state_dict(criterion.state_dict(), strict=True)
    assert next(copy.deepcopy(lpips).double().buffers()).dtype == torch.float64
    x, y = torch.rand(2, 2, 3, 64, 64, dtype=torch.bfloat16) * 2 - 1
    y.requires_grad_()
    distance_B = lpips(x, y)
    assert distance_B.dtype == torch.float32
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(lpips(x, y), distance_B) and distance_B.dtype == torch.float32
        assert torch.equal(criterion.per_image(x, y)['lp'], distance_B)
    distance_B.sum().backward()
    assert y.grad.abs().sum() > 0
    assert all(not t.requires_grad and t.grad is None for t in lpips.buffers())
    assert not lpips(x, x).any()


def test_lpips_gradient_is_finite_where_all_features_vanish():
    lpips = LPIPS('alex')
    for name, t in lpips.named_buffers():
        if name.startswith('features'):
            t.zero_()
    y = torch.rand(1, 3, 64, 64, requires_grad=True)
    lpips(torch.zeros(1, 3, 64, 64), y).sum().backward()
    assert y.grad.isfinite().all()


def test_missing_lpips_files_are_named(tmp_path):
    pattern = (r'no file \S*vgg16-397923af\.pth and no file \S*vgg\.pth: '
               r'pass --lpips_vgg=vgg16-397923af\.pth \(528 MB, sha256 397923af8e79cdbb\) and '
               r'--lpips_lin=vgg\.pth \(7,289 bytes, md5 d507d7349b931f0638a25a48a722f98a\), '
               r'.*--lpips_path.*--allow_download.*--lpips=none')
    with pytest.raises(ValueError, match=pattern):
        lpips_state(tmp_path / 'vgg16-397923af.pth', tmp_path / 'vgg.pth', '')
    with pytest.raises(ValueError, match=r'no file nowhere\.pth: pass'):
        lpips_state('', '', 'nowhere.pth')
    (tmp_path / 'heads.pth').touch()
    with pytest.raises(ValueError, match=r'finds no file \S*trunk\.pth: pass'):  # a wrong path is no wish
        lpips_state(tmp_path / 'trunk.pth', tmp_path / 'heads.pth', '', allow_download=True)
    with pytest.raises(ValueError, match=r'no file \(no path given\): pass --dino_path=dino_deitsmall16_pre'):
        dino_state('')
    torch.save({'pos_embed': torch.ones(1)}, tmp_path / 'dino.pth')
    state, source = dino_state(str(tmp_path / 'dino.pth'))
    assert set(state) == {'pos_embed'} and source == str(tmp_path / 'dino.pth')


def test_published_names_promise_published_content(tmp_path, monkeypatch, caplog):
    def file(name, state, algorithm, digest=None):
        torch.save(state, tmp_path / name)
        digest = digest or hashlib.new(algorithm, (tmp_path / name).read_bytes()).hexdigest()
        return hub.GivenFile(name, 'https://x', '1 KB', algorithm, digest[:16])

    trunk = file('trunk.pth', {'features.0.bias': torch.ones(1)}, 'sha256')
    heads = file('heads.pth', {'lin0.model.1.weight': torch.ones(1)}, 'md5')
    monkeypatch.setitem(hub.LPIPS_FILES, 'vgg', (trunk, heads))
    state, source = lpips_state(tmp_path / 'trunk.pth', tmp_path / 'heads.pth')
    assert set(state) == {'features.0.bias', 'lin0.model.1.weight'} and not caplog.records
    assert source == f'{tmp_path}/trunk.pth and {tmp_path}/heads.pth'

    (tmp_path / 'heads.pth').rename(tmp_path / 'mine.pth')
    assert lpips_state(tmp_path / 'trunk.pth', tmp_path / 'mine.pth')[0].keys() == state.keys()
    assert [record.levelname for record in caplog.records] == ['WARNING'] and 'mine.pth' in caplog.text

    wrong = file('trunk.pth', {'features.0.bias': torch.zeros(1)}, 'sha256', digest=trunk.digest)
    actual = hashlib.sha256((tmp_path / 'trunk.pth').read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f'has sha256 {actual}, expected {wrong.digest}: download https://x'):
        lpips_state(tmp_path / 'trunk.pth', tmp_path / 'mine.pth')


def test_download_only_where_allowed(tmp_path, monkeypatch):
    asked = []

    def fetch(url, path, progress):
        asked.append(url)
        raise OSError('no network')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'cache'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    with pytest.raises(ValueError, match='finds no file'):
        lpips_state('vgg16-397923af.pth', 'vgg.pth', '')
    assert not asked
    with pytest.raises(ValueError, match=r'vgg16-397923af.pth cannot be downloaded \(no network\)'):
        lpips_state('vgg16-397923af.pth', 'vgg.pth', '', allow_download=True)
    assert asked == ['https://download.pytorch.org/models/vgg16-397923af.pth']


def test_pyramid_loss():
    pyramid = PyramidLoss()
    x = torch.rand(3, 3, 48, 40)
    checker = torch.ones(48, 40)
    checker[::2, 1::2] = checker[1::2, ::2] = -1
    assert not pyramid(x, x).any()
    close(pyramid(x, x + 0.3), torch.zeros(3))                     # the low pass is not compared
    close(pyramid(x, x + 0.3 * checker), torch.full((3,), 0.3))    # all of it in the finest band
    block = checker[:6, :5].repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert (pyramid(x, x + block) > 0.1).all()                     # coarser ones see what the finest does not
    y = x.bfloat16().requires_grad_()
    pyramid(x, y).sum().backward()
    assert pyramid(x, y).dtype == torch.float32 and y.grad.isfinite().all()
    assert pyramid(torch.rand(1, 3, 17, 23), torch.rand(1, 3, 17, 23)).shape == (1,)


# ----------------------------------------------------------------------------------------------- networks
def test_global_batch_norm_is_batch_norm_on_one_process():
    ours, torchs = GlobalBatchNorm(6), nn.BatchNorm2d(6)
    assert shapes(ours) == shapes(torchs)
    x = torch.randn(4, 6, 5, 3) * 3 + 1
    for train in (True, False):
        assert torch.equal(ours.train(train)(x), torchs.train(train)(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), torchs.state_dict().values(),
                                                 strict=True))
    assert ours(x.flatten(2)).shape == (4, 6, 15)


def tiny_dino(norm='group', image_size=48):
    trunk = VisionTransformer(image_size, patch=16, width=32, depth=4, num_heads=2)
    return DINODiscriminator(norm, trunk, taps=(0, 1, 2, 3))


def trunk_state(discriminator, extra=()):
    """As published: random, with a last norm that is not needed."""
    state = {key: torch.randn_like(t) for key, t in discriminator.trunk.named_buffers()}
    return state | {key: torch.zeros(3) for key in ('norm.weight', 'norm.bias', *extra)}


def test_dino_sizes():
    with torch.device('meta'):
        dino = DINODiscriminator()
        tokens = dino.trunk(torch.zeros(2, 3, 224, 224))
    assert sum(t.numel() for t in dino.trunk.buffers()) == 21_665_664 - 2 * 384  # without the last norm
    assert [t.shape for t in tokens] == 13 * [(2, 197, 384)]
    per_head = (384 + 1) * 384 + (384 * 9 + 1) * 384 + 4 * 384 + 384 + 1
    assert sum(p.numel() for p in dino.parameters()) == 5 * per_head


def test_transformer_block_is_torchs():
    block = Block(32, num_heads=4)
    layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0., activation=F.gelu, layer_norm_eps=1e-6,
                                       batch_first=True, norm_first=True)
    names = {'attn.qkv.': 'self_attn.in_proj_', 'attn.proj': 'self_attn.out_proj', 'mlp.fc1': 'linear1',
             'mlp.fc2': 'linear2', 'norm1': 'norm1', 'norm2': 'norm2'}
    state = {key.replace(ours, theirs): t for key, t in block.state_dict().items()
             for ours, theirs in names.items() if key.startswith(ours)}
    layer.load_state_dict(state, strict=True)
    x = torch.randn(2, 7, 32)
    close(block(x), layer(x), atol=1e-5)


@pytest.mark.parametrize('norm', ['group', 'batch'])
def test_dino_trunk_is_frozen_and_not_saved(norm):
    dino = tiny_dino(norm).train()
    dino.load_trunk(trunk_state(dino), 'x')
    assert dino.training and not dino.trunk.training and dino.heads.training
    assert {key.split('.')[0] for key in dino.state_dict()} == {'heads'}
    assert {name.split('.')[0] for name, _ in dino.named_parameters()} == {'heads'}
    images = torch.rand(2, 3, 40, 40, requires_grad=True)
    logits = dino(images)
    assert logits.shape == (2, 5 * 9) and logits.dtype == torch.float32
    logits.square().sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is not None for p in dino.parameters())
    dino.requires_grad_(True)
    assert not any(t.requires_grad for t in dino.trunk.buffers())

    other = tiny_dino(norm)
    other.load_trunk(dict(dino.trunk.named_buffers()), 'x')
    other.load_state_dict(dino.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(images), dino.eval()(images))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert dino(images).dtype == torch.float32


def test_dino_layouts():
    dino = tiny_dino().eval()
    state = trunk_state(dino)
    head = {'head.weight': torch.zeros(1), 'fc_norm.weight': torch.zeros(1)}
    layouts = dict(
        original=state,
        timm=state | head,
        nested={'model': {'state_dict': state}},
        training={'student': {}, 'epoch': 3,
                  'teacher': {f'module.backbone.{key}': t for key, t in state.items()}
                  | {'module.head.mlp.0.weight': torch.zeros(1)}})
    images, outputs = torch.rand(2, 3, 48, 48), []
    for name, layout in layouts.items():
        dino.load_trunk(copy.deepcopy(layout), name)
        outputs.append(dino(images))
        qkv = dino.trunk.blocks[1].attn.qkv.bias.view(3, 32)
        assert not qkv[1].any() and qkv[0].all() and qkv[2].all()
    assert all(torch.equal(outputs[0], output) for output in outputs)

    tokens = dino.trunk(images)  # the zeroed part changes nothing but rounding
    dino.trunk.load(state, '')
    assert dino.trunk.blocks[1].attn.qkv.bias.view(3, 32)[1].all()
    for ours, theirs in zip(tokens, dino.trunk(images), strict=True):
        close(ours, theirs, atol=1e-3)

    shallow = {key: t for key, t in state.items() if 'blocks.3' not in key}
    for wrong, found in ((shallow, r'blocks\.3\.norm1\.weight missing, .* 12 of 52 weights'),
                         (state | dict(pos_embed=torch.zeros(1, 577, 32)), r'\(1, 577, 32\) instead of '),
                         ({'vit.encoder.weight': torch.zeros(1)}, r'52 of 52 weights')):
        with pytest.raises(ValueError, match=r'expected a DINO ViT-S/16 .* weights in x: .*' + found):
            dino.load_trunk(wrong, 'x')
    with pytest.raises(ValueError, match="'group' or 'batch', got 'layer'"):
        tiny_dino('layer')


def test_dino_sees_images_of_any_size():
    dino, images = tiny_dino(image_size=32), torch.rand(1, 3, 64, 64)
    seen = []
    dino.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0] * dino.std + dino.mean))
    for size in (32, 20, 64):
        for _ in range(1 if size < 64 else 40):
            dino(images[..., :size, :size] * 2 - 1)
    exact, enlarged, *large = seen
    close(exact, images[..., :32, :32], atol=1e-6)
    close(enlarged, F.interpolate(images[..., :20, :20], size=(32, 32), mode='bicubic'), atol=1e-5)
    whole = [torch.allclose(x, F.avg_pool2d(images, 2), atol=1e-5) for x in large]
    assert 10 < sum(whole) < 30
    windows = images.unfold(2, 32, 1).unfold(3, 32, 1)[0].permute(1, 2, 0, 3, 4)  # of 33 x 33 places
    crops = [x for x, is_whole in zip(large, whole, strict=True) if not is_whole]
    assert all(((windows - x).abs().amax((2, 3, 4)) < 1e-5).any() for x in crops)


# ---------------------------------------------------------------------------------------------- what they see
def fixed_draws(monkeypatch, **values):
    """Every draw 0.5 (no change), except those named."""
    names = ('down', 'right', 'brightness', 'saturation', 'contrast', 'top', 'left')
    row = torch.tensor([values.get(name, 0.5) for name in names])
    monkeypatch.setattr(GlobalBatch, 'per_image', lambda self, batch, *_: row.expand(batch, 7))


def test_diffaug_parts(monkeypatch):
    x = torch.rand(2, 3, 40, 24) * 2 - 1
    still = DiffAug(cutout=0.)

    fixed_draws(monkeypatch)
    close(still(x), x)
    erased = DiffAug(cutout=0.25)(x)
    assert not erased[..., 15:25, 9:15].any() and (erased == 0).sum() == 2 * 3 * 10 * 6
    fixed_draws(monkeypatch, down=0.999, right=0.)
    close(still(x), F.pad(x, (0, 3, 5, 0))[..., :40, 3:])  # 5 of 40 down, 3 of 24 to the left
    fixed_draws(monkeypatch, brightness=1.)
    close(still(x), x + 0.5)
    fixed_draws(monkeypatch, saturation=0.)
    close(still(x), x.mean(1, keepdim=True).expand_as(x))
    fixed_draws(monkeypatch, contrast=1.)
    mean = x.mean((1, 2, 3), keepdim=True)
    close(still(x), mean + 1.5 * (x - mean))


def test_diffaug_is_differentiable_and_differs_per_image():
    x = (torch.rand(1, 3, 32, 32).expand(4, -1, -1, -1) * 2 - 1).requires_grad_()
    out = DiffAug()(x)
    assert len({tuple(image.flatten().tolist()) for image in out}) == 4
    out.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).float().mean() > 0.5


def test_diffaug_does_not_depend_on_the_split():
    x, augment = torch.rand(6, 3, 16, 16), DiffAug()

    def part(begin, end):
        torch.manual_seed(5)
        with GlobalBatch(begin, 6):
            return augment(x[begin:end])

    assert torch.equal(torch.cat([part(0, 1), part(1, 4), part(4, 6)]), part(0, 6))


def test_blur():
    x = torch.rand(2, 3, 24, 31)
    assert blur(x, 0.) is x and blur(x, -1.) is x
    close(blur(torch.full_like(x, 0.4), 3.), torch.full_like(x, 0.4))
    impulse = torch.zeros(1, 1, 41, 41)
    impulse[..., 20, 20] = 1
    position = torch.arange(41) - 20.
    gaussian = (-(position ** 2 + position[:, None] ** 2) / (2 * 2.5 ** 2)).exp()
    close(blur(impulse, 2.5)[0, 0], gaussian / gaussian.sum(), atol=5e-5)  # cut at 3 sigma
    close(blur(x, 0.05), x)
    spreads = [blur(x, sigma).std().item() for sigma in (0.5, 1., 4., 50.)]  # the last one beyond the image
    assert spreads == sorted(spreads, reverse=True)


def test_lecam():
    lecam, real, fake = LeCAM(decay=0.9), torch.tensor([2., -1.]), torch.tensor([0.5, -3.])
    close(lecam(real, fake), (2 ** 2 + 3 ** 2) / 2)
    lecam.update(real.mean(), fake.mean())
    close(lecam.m_r, 0.05)
    close(lecam.m_f, -0.125)
    close(lecam(real, fake), (2.125 ** 2 + 3.05 ** 2) / 2)
    assert set(lecam.state_dict()) == {'m_r', 'm_f'}


# ---------------------------------------------------------------------------------------------- the sum
class ToyTokenizer(nn.Module):
    """Reconstructs by two convolutions, at full size and (`views` 2) at half."""

    def __init__(self, views=1):
        super().__init__()
        self.views = views
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    @property
    def last_layer(self):
        return self.net[-1].weight

    def forward(self, images):
        views = [(x, self.net(x)) for x in (F.avg_pool2d(images, 2), images)[-self.views:]]
        return Reconstruction(views, self.net[0].weight.square().mean(), {}, {})


def settings(**changes):
    return GANSettings(**dict(weight=0.8, start=0.25, ramp=0.25, adaptive=True, adaptive_min=0.015) | changes)


def criterion_of(discriminator, perceptual=None, **changes):
    return TokenizerLoss(l1_weight=0.5, l2_weight=2., perceptual=perceptual, perceptual_weight=3.,
                         discriminator=discriminator, gan=settings(**changes))


def reconstruction(*sides, batch=2):
    return Reconstruction([(torch.rand(batch, 3, s, s), torch.rand(batch, 3, s, s, requires_grad=True))
                           for s in sides], torch.tensor(0.25), {}, {})


def test_settings_are_checked():
    for changes, message in ((dict(kind='wgan'), "got 'wgan'"), (dict(start=-0.1), 'start .* got -0.1'),
                             (dict(consistency=4.), 'switch the augmentation on')):
        with pytest.raises(ValueError, match=message):
            settings(**changes)
    for parts in (dict(discriminator=PatchGAN(8)), dict(gan=settings())):
        with pytest.raises(ValueError, match='go together'):
            TokenizerLoss(l1_weight=1., l2_weight=1., perceptual=None, **parts)


def test_sum_without_a_discriminator():
    criterion = TokenizerLoss(l1_weight=0.5, l2_weight=2., latent_weight=4., perceptual=PyramidLoss(),
                              perceptual_weight=3., perceptual_min=32)
    rec = reconstruction(16, 48)
    assert not criterion.is_active(1.) and criterion.ramp(1.) == 0.
    loss, parts = criterion.generator(rec, 1., nn.Parameter(torch.ones(1)), FP32)
    (x16, y16), (x48, y48) = rec.views
    close(parts['l1'], (F.l1_loss(x16, y16) + F.l1_loss(x48, y48)) / 2)
    close(parts['l2'], (F.mse_loss(x16, y16) + F.mse_loss(x48, y48)) / 2)
    close(parts['lp'], PyramidLoss()(x48, y48).mean() / 2)  # 16 pixels are too few
    close(parts['rec_loss'], 0.5 * parts['l1'] + 2 * parts['l2'] + 3 * parts['lp'])
    close(loss, parts['rec_loss'] + 4 * 0.25)
    assert parts['latent_loss'] == 0.25
    assert all(parts[name] == 0 for name in ('gen_loss', 'lambda', 'gan_weight'))
    assert not any(part.requires_grad for part in parts.values())
    per_image = criterion.per_image(x48, y48)
    assert {name: tuple(value.shape) for name, value in per_image.items()} == dict(l1=(2,), l2=(2,), lp=(2,))
    close(per_image['l2'][1], F.mse_loss(x48[1], y48[1]))
    assert not criterion.per_image(x16, y16)['lp'].any() and per_image['lp'].all()
    close(criterion.rec_loss(dict(l1=1., l2=10., lp=100.)), 320.5)


def test_ramp():
    criterion = criterion_of(PatchGAN(8), start=0.25, ramp=0.5)
    assert [criterion.is_active(p) for p in (0., 0.2499, 0.25, 1.)] == [False, False, True, True]
    assert [criterion.ramp(p) for p in (0., 0.25, 0.375, 0.5, 0.75, 1.)] == [0., 0., 0.25, 0.5, 1., 1.]
    at_once = criterion_of(PatchGAN(8), ramp=0.)
    assert [at_once.ramp(p) for p in (0.24, 0.25)] == [0., 1.]


def test_views_of_the_discriminator():
    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.seen = nn.Parameter(torch.ones(())), []

        def forward(self, x):
            self.seen.append(tuple(x.shape))
            return self.scale * x.mean((1, 2, 3))

    rec = reconstruction(16, 32, 48)
    for changes, sides in ((dict(), (32, 48)), (dict(full_size_only=True), (48,)),
                           (dict(min_pixels=33), (48,)), (dict(min_pixels=8), (16, 32, 48))):
        net = Means()
        criterion = criterion_of(net, adaptive=False, ramp=0., half=True, **changes)
        loss, parts = criterion.generator(rec, 1., None, FP32)
        assert net.seen == [(2, 3, s, s) for s in sides]
        shown = [(x, y) for x, y in rec.views if x.shape[-1] in sides]
        close(parts['gen_loss'], -sum(y.mean() for _, y in shown) / 3)  # each view counts 1/K
        close(loss, parts['rec_loss'] + 0.25 + 0.8 * parts['gen_loss'])
        assert (parts['lambda'], parts['gan_weight']) == (1., pytest.approx(0.8))

        net.seen.clear()
        loss, parts = criterion.discriminate(rec, 1., FP32)
        assert net.seen == [(4, 3, s, s) for s in sides]  # real and fake in one forward
        close(parts['logits_real'], sum(x.mean() for x, _ in shown) / len(shown))
        expected = [discriminator_loss('hinge', x.mean((1, 2, 3)), y.mean((1, 2, 3))) for x, y in shown]
        close(loss, sum(expected) / len(shown) / 2)
        assert (parts['acc_real'], parts['acc_fake']) == (1., 0.)  # all means are positive
    with pytest.raises(ValueError, match=r'at least 64 pixels, got \(48, 48\)'):
        criterion_of(Means(), min_pixels=64).generator(rec, 1., None, FP32)


def test_gan_plumbing():
    """40 steps, the discriminator from step 10, ramp over 10."""
    tokenizer = ToyTokenizer()
    criterion = criterion_of(PatchGAN(8), PyramidLoss(), lecam=0.05, augment=True, consistency=2., blur=0.2)
    optimizers = [torch.optim.Adam(part.parameters(), 1e-3) for part in (tokenizer, criterion.discriminator)]
    images, weights = torch.rand(4, 3, 32, 32) * 2 - 1, []
    for step in range(40):
        progress, lecam = step / 40, copy.deepcopy(criterion.lecam.state_dict())
        rec = tokenizer(images)
        loss, parts = criterion.generator(rec, progress, tokenizer.last_layer, FP32)
        loss.backward()
        assert all(p.grad is None for p in criterion.discriminator.parameters())
        assert all(p.grad.isfinite().all() for p in tokenizer.parameters())
        optimizers[0].step()
        optimizers[0].zero_grad()
        assert criterion.is_active(progress) == (step >= 10)
        if criterion.is_active(progress):
            assert not criterion.discriminator.training
            loss, disc_parts = criterion.discriminate(rec, progress, FP32)
            loss.backward()
            assert criterion.discriminator.training and all(p.grad is None for p in tokenizer.parameters())
            assert all(p.grad.isfinite().all() for p in criterion.discriminator.parameters())
            optimizers[1].step()
            optimizers[1].zero_grad()
            close(loss, sum(disc_parts[name] for name in ('disc_loss', 'consistency', 'lecam')))
            assert parts['lambda'].isfinite() and parts['lambda'] >= 0.015
            weights.append((parts['gan_weight'] / parts['lambda']).item() / 0.8)
        else:
            assert parts['gan_weight'] == parts['gen_loss'] == parts['lambda'] == 0
        changed = any(not torch.equal(criterion.lecam.state_dict()[name], t) for name, t in lecam.items())
        assert changed == (step >= 10)
    assert weights == pytest.approx([min(i / 10, 1.) for i in range(30)], abs=1e-6)
    assert 0 <= disc_parts['acc_real'] <= 1 and disc_parts['disc_loss'] > 0


def test_lambda_passes_no_gradient_and_is_clamped():
    tokenizer, images = ToyTokenizer(), torch.rand(2, 3, 32, 32)
    criterion = criterion_of(PatchGAN(8), ramp=0.)
    rec = tokenizer(images)
    loss, parts = criterion.generator(rec, 1., tokenizer.last_layer, FP32)
    loss.backward()
    gradient = tokenizer.last_layer.grad.clone()
    rec = tokenizer(images)
    values = criterion.per_image(*rec.views[0])
    rec_loss = criterion.rec_loss({name: value_B.mean() for name, value_B in values.items()})
    gen_loss = -criterion.discriminator(rec.views[0][1]).mean()
    by_rec, by_gan = (torch.autograd.grad(t, tokenizer.last_layer, retain_graph=True)[0]
                      for t in (rec_loss, gen_loss))
    close(parts['lambda'], by_rec.norm() / (by_gan.norm() + 1e-4))
    close(gradient, by_rec + 0.8 * parts['lambda'] * by_gan, atol=1e-6)
    for low, high, expected in ((1e6, 1e7, 1e6), (0., 1e-3, 1e-3)):
        weight = adaptive_weight(rec_loss, gen_loss, tokenizer.last_layer, low, high, 1e-4)
        assert weight.item() == pytest.approx(expected)


def test_alarm(caplog):
    """One warning after 100 steps of lambda > 100; a checkpoint keeps the count, a smaller lambda ends it."""
    critic = nn.Conv2d(3, 1, 1)
    criterion = criterion_of(critic, min_pixels=1)
    rec = Reconstruction([(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))], torch.tensor(0.), {}, {})

    def step(criterion, strength):
        critic.weight.data.fill_(strength)
        last = nn.Parameter(torch.ones(1, 3, 1, 1))
        views = [(torch.zeros(1, 3, 2, 2), last.expand(1, 3, 2, 2))]
        criterion.generator(rec._replace(views=views), 1., last, FP32)

    with caplog.at_level(logging.WARNING):
        for _ in range(60):
            step(criterion, 1e-6)
        resumed = criterion_of(critic, min_pixels=1)
        resumed.load_state_dict(criterion.state_dict())
        for _ in range(39):
            step(resumed, 1e-6)
        assert not caplog.records and resumed.num_alarming == 99
        for _ in range(20):
            step(resumed, 1e-6)
        assert len(caplog.records) == 1 and 'above 100 for 100 steps' in caplog.text
        step(resumed, 10.)
        assert resumed.num_alarming == 0


def test_state_holds_what_is_trained():
    criterion = criterion_of(tiny_dino(), LPIPS('alex'), lecam=0.1)
    names = set(criterion.state_dict())
    assert {name for name in names if not name.startswith('discriminator.heads.')} \
        == {'lecam.m_r', 'lecam.m_f', 'num_alarming'}
    assert {name for name, _ in criterion.named_parameters()} <= names
    assert set(criterion_of(PatchGAN(8)).state_dict()) \
        == {f'discriminator.{key}' for key in PatchGAN(8).state_dict()} | {'num_alarming'}


def test_only_the_discriminator_runs_in_half_precision():
    tokenizer, images = ToyTokenizer(), torch.rand(2, 3, 48, 48)
    fresh = criterion_of(PatchGAN(8), LPIPS('alex'), blur=0.5, augment=True, consistency=1., lecam=1.)
    rec, amp, results = tokenizer(images), torch.autocast('cpu', dtype=torch.bfloat16), {}
    for name, inner, outer in (('plain', FP32, FP32), ('surrounded', FP32, amp), ('half', amp, FP32)):
        torch.manual_seed(1)
        criterion, dtypes = copy.deepcopy(fresh), []
        criterion.discriminator.main[2].register_forward_hook(
            lambda module, args, output, dtypes=dtypes: dtypes.append(output.dtype))
        with outer:
            results[name] = (criterion.generator(rec, 0.5, tokenizer.last_layer, inner),
                             criterion.discriminate(rec, 0.5, inner))
        assert dtypes == 2 * [torch.bfloat16 if name == 'half' else torch.float32]
        for loss, parts in results[name]:
            assert {t.dtype for t in (loss, *parts.values())} == {torch.float32}
    for (plain, parts), (surrounded, same), (half, _) in zip(*results.values(), strict=True):
        assert plain == surrounded and parts == same
        close(half, plain, rtol=0.05)


# ---------------------------------------------------------------------------------------------- several ranks
def train_toy(rank, world_size):
    """Three steps of both players in float64 on this rank's share of 4 images; what all ranks agree on."""
    torch.manual_seed(0)
    tokenizer = ToyTokenizer(views=2).double()
    criterion = criterion_of(PatchGAN(8, num_layers=2), PyramidLoss(), start=0., ramp=1., augment=True,
                             consistency=2., lecam=0.05, blur=0.5, min_pixels=16).double()
    images = torch.rand(4, 3, 32, 32).double() * 2 - 1
    share = 4 // world_size
    images = images[rank * share:(rank + 1) * share]
    players = distributed(tokenizer), distributed(criterion.discriminator)
    optimizers = [torch.optim.SGD(player.parameters(), 0.1) for player in players]
    log = []
    for step in range(3):
        torch.manual_seed(step)
        with GlobalBatch(rank * share, 4):
            rec = players[0](images)
            loss, parts = criterion.generator(rec, step / 3, tokenizer.last_layer, FP32)
            loss.backward()
            disc_loss, disc_parts = criterion.discriminate(rec, step / 3, FP32, players[1])
            disc_loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        values = torch.stack([loss.detach(), disc_loss.detach(), *disc_parts.values()])
        dist.allreduce(values)
        log.append(torch.cat([values / world_size, parts['lambda'][None]]))
    return dict(log=torch.stack(log), **tokenizer.state_dict(), **criterion.state_dict())


def normalise(rank, world_size):
    """Output, gradients and statistics of two batch norms in turn, as the whole batch sees them."""
    torch.manual_seed(3)
    norm = GlobalBatchNorm(5).double()
    x = (torch.randn(4, 5, 3, 3).double() * 2 + 100).requires_grad_()
    target, weight = torch.randn(2, 4, 5, 3, 3).double()
    share = 4 // world_size
    rows = slice(rank * share, (rank + 1) * share)
    y = norm(norm(x[rows] * weight[rows]))
    loss = (y - target[rows]).pow(4).sum()
    loss.backward()
    out = torch.zeros_like(x.detach())
    out[rows] = y.detach()
    gathered = [out, x.grad, *(p.grad for p in norm.parameters())]
    for t in gathered:
        dist.allreduce(t)
    return dict(enumerate(gathered)) | norm.state_dict()


def rank_main(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank,
                                         world_size=2)
    torch.save((train_toy(rank, 2), normalise(rank, 2)), f'{folder}/{rank}.pt')
    dist.finalize()


def test_two_ranks_equal_one(tmp_path):
    on_two_ranks(rank_main, str(tmp_path))
    ranks = [torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1)]
    for case, single in enumerate((train_toy(0, 1), normalise(0, 1))):
        for name, expected in single.items():
            for rank in ranks:
                torch.testing.assert_close(rank[case][name], expected, rtol=1e-9, atol=1e-11,
                                           msg=lambda text, name=name: f'{name}: {text}')
    assert len(single) == 4 + 5
