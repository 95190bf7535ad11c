"""VQVAE and its multi-scale quantizer; what trains the codebook is in test_codebook.py."""
from collections import defaultdict
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dist
from models import VQVAE, AutoencoderKL, VectorQuantizer2, build_tokenizer, build_vae_var, load_weights
from models.tokenizers.quantize import phi_index
from tests.vectors import (
    assert_norms,
    assert_stats,
    assert_within,
    load_json,
    load_tensors,
    named_grads,
    pixels,
    split_scales,
    stored_state,
    tiny_vqvae,
)
from training.build import lower_tokenizer

PATCH_NUMS = (1, 2, 3, 4)
SMALL = dict(vocab_size=24, z_channels=8, ch=32, v_patch_nums=(1, 2, 4))
TINY = dict(vocab_size=24, z_channels=8, net='tiny', v_patch_nums=(1, 2, 4))


@pytest.fixture(scope='module')
def vqvae():
    return tiny_vqvae()


@pytest.fixture(scope='module')
def vectors():
    return load_tensors('var/vqvae')


@pytest.fixture(scope='module')
def images(vectors):
    return pixels(vectors['images_u8'])


def idx_of(vectors, name='idx'):
    return [vectors[f'{name}.{k}'] for k in range(len(PATCH_NUMS))]


def all_equal(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def rms(t):
    return t.square().mean().sqrt().item()


# ------------------------------------------------------------ inference against the reference
def test_state_dict_is_the_published_one(vqvae):
    rules, state = load_json('var/vqvae')['state'], vqvae.state_dict()
    assert list(state) == list(rules)
    assert {key: list(t.shape) for key, t in state.items()} == {key: rules[key]['shape'] for key in rules}
    assert {str(t.dtype) for t in state.values()} == {'torch.float32'}


def test_published_size():
    with torch.device('meta'):
        vqvae = VQVAE(ch=160)
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in vqvae.named_children()}
    assert sizes == dict(encoder=44_107_872, decoder=64_653_923, quantize=168_064, quant_conv=9_248,
                         post_quant_conv=9_248)
    assert sum(sizes.values()) == 108_948_355
    assert len(vqvae.state_dict()) == 324
    assert vqvae.quantize.ema_vocab_hit_SV.shape == (10, 4096)


def test_features(vqvae, vectors, images):
    assert_within(vqvae.encoder(images), vectors['encoder_out'], 1e-4)
    assert_within(vqvae.features(images), vectors['feat'], 1e-4)


def test_every_convolution_output(vqvae, vectors, images):
    probes, seen = load_json('var/vqvae')['conv_output_probes'], {}
    handles = [module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.clone()}))
               for name, module in vqvae.named_modules()
               if isinstance(module, nn.Conv2d) and not name.startswith('quantize')]
    vqvae.quant_conv(vqvae.encoder(images))
    vqvae.fhat_to_img(vectors['feat'])
    for handle in handles:
        handle.remove()
    assert set(seen) == set(probes)
    for name, (expected,) in probes.items():
        assert_stats(seen[name], expected)


def test_codes(vqvae, vectors, images):
    for actual, expected in zip(vqvae.img_to_idxBl(images), idx_of(vectors), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize('as_pairs', [True, False])
def test_codes_of_another_pyramid(vqvae, vectors, images, as_pairs):
    sizes = [tuple(hw) for hw in load_json('var/vqvae')['custom_patch_hw']]
    sizes = sizes if as_pairs else [h if h == w else (h, w) for h, w in sizes]
    idx_kBl = vqvae.img_to_idxBl(images, v_patch_nums=sizes)
    for actual, expected in zip(idx_kBl, idx_of(vectors, 'custom_idx'), strict=True):
        assert torch.equal(actual, expected)


def test_pyramid_of_pairs_in_the_constructor(vectors, images):
    sizes = [tuple(hw) for hw in load_json('var/vqvae')['custom_patch_hw']]
    vqvae = tiny_vqvae(v_patch_nums=sizes)
    for actual, expected in zip(vqvae.encode(images), idx_of(vectors, 'custom_idx'), strict=True):
        assert torch.equal(actual, expected)


def test_last_scale_must_be_the_feature_map(vqvae, images):
    with pytest.raises(AssertionError, match=r'size of the feature map \(4, 4\), got \(3, 3\)'):
        vqvae.img_to_idxBl(images, v_patch_nums=(1, 2, 3))


def test_cumulative_features(vqvae, vectors):
    f_hats = vqvae.quantize.f_to_idxBl_or_fhat(vectors['feat'], to_fhat=True)
    for k, f_hat in enumerate(f_hats):
        assert_within(f_hat, vectors[f'fhat.{k}'], 1e-4)


def test_sum_over_scales_of_the_codes_is_f_hat(vqvae, vectors):
    quantize = vqvae.quantize
    maps = [quantize.embed(idx, (pn, pn)) for idx, pn in zip(idx_of(vectors), PATCH_NUMS, strict=True)]
    f_hats = quantize.embed_to_fhat(maps, all_to_max_scale=True)
    encoded = quantize.f_to_idxBl_or_fhat(vectors['feat'], to_fhat=True)
    for f_hat, expected in zip(f_hats, encoded, strict=True):
        assert torch.equal(f_hat, expected)
    assert torch.equal(quantize.embed_to_fhat(maps, all_to_max_scale=True, last_one=True), f_hats[-1])


def test_native_size_features(vqvae, vectors):
    quantize = vqvae.quantize
    maps = [quantize.embed(idx, (pn, pn)) for idx, pn in zip(idx_of(vectors), PATCH_NUMS, strict=True)]
    for k, f_hat in enumerate(quantize.embed_to_fhat(maps, all_to_max_scale=False)):
        assert_within(f_hat, vectors[f'embed_to_fhat.native.{k}'], 1e-4)


def test_images_of_codes(vqvae, vectors):
    info, idx_kBl = load_json('var/vqvae'), idx_of(vectors)
    full = vqvae.idxBl_to_img(idx_kBl, same_shape=True)
    for image, expected in zip(full, info['tok_img_same_shape_stats'], strict=True):
        assert_stats(image, expected)
    native = vqvae.idxBl_to_img(idx_kBl, same_shape=False)
    for image, expected in zip(native, info['tok_img_native_stats'], strict=True):
        assert_stats(image, expected)
    for k in range(2):
        assert_within(native[k], vectors[f'tok_img.native.{k}'], 2e-4)
    assert torch.equal(vqvae.decode(idx_kBl), full[-1])


def test_reconstructions(vqvae, vectors, images):
    recs = vqvae.img_to_reconstructed_img(images)
    for rec, expected in zip(recs, load_json('var/vqvae')['reconstruct_stats_per_scale'], strict=True):
        assert_stats(rec, expected)
    assert_within(recs[-1], vectors['rec.last'], 2e-4)
    assert torch.equal(vqvae.img_to_reconstructed_img(images, last_one=True), recs[-1])


def test_decoder_alone(vqvae, vectors):
    assert_within(vqvae.fhat_to_img(vectors['feat']), vectors['img_from_feat'], 2e-4)


def test_teacher_forcing_input_and_its_prefixes(vqvae, vectors):
    idx_kBl = idx_of(vectors)
    assert_within(vqvae.quantize.idxBl_to_var_input(idx_kBl), vectors['var_input'], 1e-4)
    for stage, info in load_json('var/vqvae')['prog'].items():
        prefix = vqvae.quantize.idxBl_to_var_input(idx_kBl[:int(stage) + 1])
        if info['var_input_len'] is None:
            assert prefix is None
        else:
            assert prefix.shape[1] == info['var_input_len']
            assert_within(prefix, vectors['var_input'][:, :info['var_input_len']], 1e-4)


def test_step_by_step_input(vqvae, vectors):
    quantize, f_hat = vqvae.quantize, torch.zeros_like(vectors['feat'])
    for k, idx in enumerate(idx_of(vectors)):
        h = quantize.embed(idx, (PATCH_NUMS[k], PATCH_NUMS[k]))
        returned, following = quantize.get_next_autoregressive_input(k, len(PATCH_NUMS), f_hat, h)
        assert returned is f_hat, 'f_hat is updated in place'
        assert_within(following, vectors[f'ar_next.{k}'], 1e-4)
        assert_within(f_hat, vectors[f'fhat.{k}'], 1e-4)


# ------------------------------------------------------------ quantizer variants
@pytest.mark.parametrize('name', list(load_json('var/quantizer_variants')['variants']))
def test_quantizer_variant(name):
    info, vectors = load_json('var/quantizer_variants'), load_tensors('var/quantizer_variants')
    variant, pns = info['variants'][name], info['config']['v_patch_nums']
    quantize = VectorQuantizer2(**info['config'], **variant['kwargs'])
    assert list(quantize.state_dict()) == list(variant['state'])
    quantize.load_state_dict(stored_state(variant['state'], quantize))
    quantize.eval()

    idx_kBl = quantize.f_to_idxBl_or_fhat(vectors['feat'], to_fhat=False)
    assert torch.equal(torch.cat(idx_kBl, dim=1), vectors[f'{name}.idx'])
    f_hats = quantize.f_to_idxBl_or_fhat(vectors['feat'], to_fhat=True)
    assert_within(f_hats[0], vectors[f'{name}.fhat_first'], 1e-5)
    assert_within(f_hats[-1], vectors[f'{name}.fhat_last'], 1e-5)
    idx_kBl = split_scales(vectors[f'{name}.idx'], pns)
    assert_within(quantize.idxBl_to_var_input(idx_kBl), vectors[f'{name}.var_input'], 1e-5)

    feat = vectors['feat'].clone().requires_grad_()
    f_hat, usages, loss = quantize(feat)
    assert usages is None
    assert loss.item() == pytest.approx(variant['train_loss'], rel=1e-5)
    assert_within(f_hat, vectors[f'{name}.train_fhat'], 1e-5)
    (loss + (f_hat * vectors['probe_weight']).sum()).backward()
    assert_within(feat.grad, vectors[f'{name}.grad_feat'], 1e-5)
    assert_norms(named_grads(quantize), variant['grad_l2'])


PHI_TABLES = load_json('var/quantizer_variants')['phi_index_per_scale']


@pytest.mark.parametrize(('key', 'table'), PHI_TABLES.items(), ids=PHI_TABLES)
def test_phi_of_each_scale(key, table):
    num_phis, num_scales = (int(part.strip('KSN')) for part in key.split('_'))
    assert [phi_index(num_phis, k, num_scales) for k in range(num_scales)] == table


def test_single_scale_uses_the_first_phi():
    assert [phi_index(n, 0, 1) for n in (1, 2, 4, 8)] == [0, 0, 0, 0]
    quantize = VectorQuantizer2(16, 8, False, v_patch_nums=(4,))
    assert quantize.f_to_idxBl_or_fhat(torch.randn(2, 8, 4, 4), to_fhat=False)[0].shape == (2, 16)


@pytest.mark.parametrize('using_znorm', [False, True])
def test_nearest_code_is_the_first_best_one(using_znorm):
    quantize = VectorQuantizer2(50, 8, using_znorm, v_patch_nums=(1,))
    with torch.no_grad():
        quantize.embedding.weight[30:40] = quantize.embedding.weight[10:20]  # exact ties
    query = torch.randn(200, 8)
    table = quantize.embedding.weight.detach()
    if using_znorm:
        best = (F.normalize(query.double()) @ F.normalize(table.double()).T).argmax(1)
    else:
        best = torch.cdist(query.double(), table.double()).argmin(1)
    assert torch.equal(quantize.nearest_code(query), best)
    assert not set(best.tolist()) & set(range(30, 40)) and set(best.tolist()) & set(range(10, 20))


@pytest.mark.parametrize('e', [0.05, -0.5])
def test_codebook_initialisation_by_hand(e):
    quantize = VectorQuantizer2(512, 32, False, v_patch_nums=(1,))
    quantize.eini(e)
    weight = quantize.embedding.weight
    if e > 0:
        assert weight.std().item() == pytest.approx(e, rel=0.05)
    else:
        assert weight.abs().max().item() <= -e / 512
        assert weight.std().item() == pytest.approx(-e / 512 / 3 ** 0.5, rel=0.05)


# ------------------------------------------------------------ training
def train_steps(vqvae, vectors, num_steps=3):
    """(row, gradients, reconstruction) of each forward of the reference's training runs."""
    for step in range(num_steps):
        images = pixels(vectors[f'images_u8.{step}'])
        rec, usages, vq_loss = vqvae(images, ret_usages=True)
        loss = F.mse_loss(rec, images) + vq_loss
        vqvae.zero_grad(set_to_none=True)
        loss.backward()
        yield dict(rec=rec, usages=usages, vq_loss=vq_loss.item(), total_loss=loss.item(),
                   grads=named_grads(vqvae))


@pytest.fixture
def process_group(request, tmp_path):
    if request.param:
        store = f'file://{tmp_path}/store'
        torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    assert dist.initialized() == request.param
    yield request.param
    dist.finalize()


@pytest.mark.parametrize('process_group', [False, True], indirect=True, ids=['no_group', 'world1'])
def test_training_forward(process_group):
    runs, vectors = load_json('var/vqvae_train')['runs'], load_tensors('var/vqvae_train')
    rows = runs['process_group_world1' if process_group else 'not_initialised']
    vqvae = tiny_vqvae(test_mode=False)
    for step, (actual, row) in enumerate(zip(train_steps(vqvae, vectors), rows, strict=True)):
        assert actual['vq_loss'] == pytest.approx(row['vq_loss'], rel=1e-5)
        assert actual['total_loss'] == pytest.approx(row['total_loss'], rel=1e-5)
        assert_norms(actual['grads'], row['grad_l2'])
        assert_stats(actual['rec'], row['rec_stats'])
        # counters of finer scales differ from the reference, whose decay counted scales instead of steps
        usage = runs['process_group_world1'][step]['usages'][0]
        assert actual['usages'][0] == pytest.approx(usage, rel=1e-6)
        if step == 0:
            assert_within(actual['rec'], vectors['rec.0'], 2e-4)
    assert_within(vqvae.quantize.ema_vocab_hit_SV[0], vectors['process_group_world1.ema.2'][0], 1e-5)

    vqvae.eval()
    hits = vqvae.quantize.ema_vocab_hit_SV.clone()
    images = pixels(vectors['images_u8.0'])
    with torch.no_grad():
        assert vqvae(images)[1] is None
        _, usages, vq_loss = vqvae(images, ret_usages=True)
    assert vq_loss.item() == pytest.approx(runs['process_group_world1_eval_after']['vq_loss'], rel=1e-5)
    assert usages[0] == pytest.approx(runs['process_group_world1_eval_after']['usages'][0], rel=1e-6)
    assert torch.equal(vqvae.quantize.ema_vocab_hit_SV, hits), 'evaluation must not count'


def test_hit_counters_advance_once_per_step():
    vectors, vqvae = load_tensors('var/vqvae_train'), tiny_vqvae(test_mode=False)
    quantize, expected = vqvae.quantize, None
    for step in range(3):
        images = pixels(vectors[f'images_u8.{step}'])
        hits = np.zeros((len(PATCH_NUMS), quantize.vocab_size))
        for k, idx in enumerate(vqvae.encode(images)):
            for code in idx.flatten().tolist():
                hits[k, code] += 1
        expected = hits if step == 0 else 0.9 * expected + 0.1 * hits
        with torch.no_grad():
            _, usages, _ = vqvae(images, ret_usages=True)
        assert quantize.record_hit == step + 1
        np.testing.assert_allclose(quantize.ema_vocab_hit_SV.numpy(), expected, rtol=1e-5)
        margin = 0.08 * 2 * 4 * 4 / quantize.vocab_size
        np.testing.assert_allclose(usages, 100 * (expected >= margin).mean(1), rtol=1e-6)


def test_hit_counters_slow_down_after_100_steps():
    quantize = VectorQuantizer2(8, 4, False, v_patch_nums=(1,))
    quantize.record_hit = 100
    quantize.ema_vocab_hit_SV.fill_(1.)
    quantize(torch.randn(3, 4, 1, 1))
    assert quantize.ema_vocab_hit_SV.sum().item() == pytest.approx(0.99 * 8 + 0.01 * 3)


@pytest.mark.parametrize('patch_nums', [PATCH_NUMS, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)])
def test_all_paths_of_the_quantizer_agree(patch_nums):
    quantize, last = VectorQuantizer2(64, 8, False, v_patch_nums=patch_nums).eval(), patch_nums[-1]
    f = torch.randn(4, 8, last, last)
    with torch.no_grad():
        out = quantize.quantised(f)
        steps = list(quantize.residual_scales(f))
    idx_kBl = quantize.f_to_idxBl_or_fhat(f, to_fhat=False)
    f_hats = quantize.f_to_idxBl_or_fhat(f, to_fhat=True)
    names = [f'{pn}x{pn}' for pn in patch_nums]
    assert list(out.codes) == names
    assert all_equal(out.codes.values(), idx_kBl)
    assert_within(out.f_hat_BZhw, f_hats[-1], 1e-6)
    maps = [quantize.embed(idx, (pn, pn)) for idx, pn in zip(idx_kBl, patch_nums, strict=True)]
    assert torch.equal(quantize.embed_to_fhat(maps, last_one=True), f_hats[-1])
    assert_within(sum(step.h_BZhw for step in steps), f_hats[-1], 1e-6)
    assert_within(steps[-1].residual_BZhw - steps[-1].h_BZhw, f - f_hats[-1], 1e-5)

    # the figures of the log, and the loss, from the same maps
    rest = [f, *(f - f_hat for f_hat in f_hats)]
    for name, expected in zip((*names, 'end'), rest, strict=True):
        assert out.parts[f'residual_{name}'].item() == pytest.approx(rms(expected), rel=1e-5)
    error = sum(rms(t) ** 2 for t in rest[1:]) / len(names)
    assert out.parts['code_loss'].item() == pytest.approx(error, rel=1e-5)
    assert out.parts['commitment'].item() == pytest.approx(0.25 * error, rel=1e-5)
    assert out.loss.item() == pytest.approx(1.25 * error, rel=1e-5)
    assert out.parts['latent_mean'].item() == pytest.approx(f.mean().item(), abs=1e-7)
    assert out.parts['latent_std'].item() == pytest.approx(f.std().item(), rel=1e-6)


def test_phi_of_the_published_pyramid():
    assert [phi_index(4, k, 10) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_straight_through_gradient():
    quantize = VectorQuantizer2(32, 8, False, v_patch_nums=PATCH_NUMS)
    f = torch.randn(2, 8, 4, 4, requires_grad=True)
    f_hat, _, loss = quantize(f)
    assert_within(f_hat, quantize.f_to_idxBl_or_fhat(f.detach(), to_fhat=True)[-1], 1e-6)
    probe = torch.randn_like(f)
    f_hat.backward(probe, retain_graph=True)
    assert torch.equal(f.grad, probe)
    assert all(p.grad is None for p in quantize.parameters())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in quantize.parameters())


def test_loss_gradient_by_finite_differences():
    """In float64, without a code changing: commitment moves f, the other term moves codes and phi."""
    quantize = VectorQuantizer2(16, 4, False, v_patch_nums=(1, 2, 4)).double()
    f = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    codes = quantize.quantised(f).codes
    quantize.quantised(f).loss.backward()
    phi = quantize.quant_resi.phis[3].weight
    for term, parameter in (('commitment', f), ('code_loss', quantize.embedding.weight), ('code_loss', phi)):
        direction, values = torch.randn_like(parameter), []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
                out = quantize.quantised(f)
                parameter -= step * direction
            assert all_equal(out.codes.values(), codes.values())
            values.append(out.parts[term].item())
        slope = (parameter.grad * direction).sum().item()
        assert abs(slope) > 1e-3
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_reconstruct_and_its_progressive_pictures(vqvae, images):
    rec = vqvae.reconstruct(images)
    (target, image), = rec.views
    assert target is images
    pictures = vqvae.progressive(images)
    assert list(pictures) == list(rec.codes) == ['1x1', '2x2', '3x3', '4x4']
    assert_within(image.clamp(-1, 1), pictures['4x4'], 1e-5)
    assert all_equal(rec.codes.values(), vqvae.encode(images))
    forward, usages, loss = vqvae(images)
    assert usages is None and torch.equal(forward, image) and torch.equal(loss, rec.latent_loss)


# ------------------------------------------------------------ precision
def test_training_forward_ignores_autocast():
    quantize, f = VectorQuantizer2(32, 8, False, v_patch_nums=(1, 2, 4)), torch.randn(2, 8, 4, 4)
    expected = quantize.quantised(f)
    with torch.autocast('cpu', torch.bfloat16):
        actual = quantize.quantised(f)
    assert actual.f_hat_BZhw.dtype == torch.float32
    assert torch.equal(actual.f_hat_BZhw, expected.f_hat_BZhw) and torch.equal(actual.loss, expected.loss)
    assert all_equal(actual.codes.values(), expected.codes.values())


def test_only_the_towers_run_in_half_precision(monkeypatch):
    vqvae = VQVAE(**TINY, test_mode=False, measures=dict(scale_drop=0.5, entropy=0.1, rotation=True))
    full, half, seen, nearest = torch.float32, torch.bfloat16, defaultdict(set), vqvae.quantize.nearest_code
    for part, child in vqvae.named_children():
        for module in child.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda module, args, out, part=part: seen[part].add(out.dtype))

    def noted(query_NZ, k):
        seen['query'].add(query_NZ.dtype)
        return nearest(query_NZ, k)
    monkeypatch.setattr(vqvae.quantize, 'nearest_code', noted)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.autocast('cpu', half):
        rec = vqvae.reconstruct(images)
    assert seen == dict(encoder={half}, quant_conv={full}, query={full}, quantize={full},
                        post_quant_conv={full}, decoder={half})
    assert {t.dtype for t in (*rec.views[0], rec.latent_loss, *rec.parts.values())} == {full}


@pytest.mark.parametrize('cls, options', [
    (VQVAE, TINY | dict(vocab_size=512)),
    (AutoencoderKL, dict(net='tiny')),
])
def test_encoding_in_bfloat16_changes_little_and_not_more_than_allowed(cls, options):
    torch.manual_seed(0)
    tokenizer = cls(**options)
    batches = [torch.rand(4, 3, 32, 32) * 2 - 1 for _ in range(2)]
    unchanged = deepcopy(tokenizer)
    dtype = tokenizer.precompute(batches[0]).dtype
    keys = list(tokenizer.state_dict())
    assert 0 < lower_tokenizer(tokenizer, iter(batches), limit=0.5) < 0.2
    assert tokenizer.precompute(batches[0]).dtype == dtype
    assert list(tokenizer.state_dict()) == keys
    with pytest.raises(ValueError, match='--vae_bf16=1e-09'):
        lower_tokenizer(unchanged, batches, limit=1e-9)


def test_float64_stays_float64():
    vqvae = VQVAE(**TINY, test_mode=False, measures=dict(scale_drop=0.5)).double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    rec = vqvae.reconstruct(images)
    vqvae.after_step(0.)
    dtypes = {t.dtype for t in (*rec.views[0], rec.latent_loss, *rec.parts.values())}
    assert dtypes | {vqvae.quantize.embedding.weight.dtype} == {torch.float64}
    assert {idx.dtype for idx in vqvae.encode(images)} == {torch.int64}


# ------------------------------------------------------------ weights
@pytest.mark.parametrize('num_scales', [3, 6])
def test_load_from_another_number_of_scales(num_scales):
    source = VQVAE(**{**SMALL, 'v_patch_nums': (*range(1, num_scales), 4)})
    target = VQVAE(**{**SMALL, 'v_patch_nums': (1, 2, 3, 4)})
    source.quantize.ema_vocab_hit_SV.fill_(3.)
    state = source.state_dict()
    untouched = {key: (id(value), value.clone()) for key, value in state.items()}
    target.load_state_dict(state)
    assert target.quantize.ema_vocab_hit_SV.shape == (4, SMALL['vocab_size'])
    assert not target.quantize.ema_vocab_hit_SV.any()
    assert {key: id(value) for key, value in state.items()} == {key: i for key, (i, _) in untouched.items()}
    assert all(torch.equal(state[key], value) for key, (_, value) in untouched.items())
    assert torch.equal(target.encoder.conv_in.weight, source.encoder.conv_in.weight)


def test_load_of_equal_scales_takes_the_counters():
    source, target = VQVAE(**SMALL), VQVAE(**SMALL)
    source.quantize.ema_vocab_hit_SV.fill_(3.)
    target.load_state_dict(source.state_dict())
    assert (target.quantize.ema_vocab_hit_SV == 3).all()




def test_build_tokenizer_refuses_other_weights():
    with pytest.raises(ValueError, match=r'file\.pth holds no VQVAE weights'):
        build_tokenizer(VQVAE, {'a': torch.zeros(1)}, 'file.pth', 'cpu')


@pytest.mark.parametrize(('change', 'name'), [(dict(ch=64), 'ch=64'), (dict(vocab_size=32), 'vocab_size=32'),
                                              (dict(z_channels=4), 'z_channels=4'),
                                              (dict(share_quant_resi=1), 'share_quant_resi=1')])
def test_load_weights_names_the_difference(change, name):
    with pytest.raises(ValueError, match=f'file.pth is a VQVAE with {name}') as error:
        load_weights(VQVAE(**SMALL), VQVAE(**{**SMALL, **change}).state_dict(), 'file.pth')
    assert '\n' not in str(error.value)


def test_export_in_the_published_layout(images):
    with torch.device('meta'):
        published = VQVAE(ch=160)
    exported = published.exported(published.state_dict())
    assert len(exported) == 324 and list(exported) == list(published.state_dict())

    trained = VQVAE(**SMALL, test_mode=False, measures=dict(defer_steps=5))
    trained.reconstruct(images)
    trained.after_step(0.)
    exported = trained.exported(trained.state_dict())
    with torch.device('meta'):
        assert list(exported) == list(VQVAE(ch=32).state_dict()), 'weights hold nothing of the training'
    target = VQVAE(**SMALL)
    target.load_state_dict(exported, strict=True)
    assert all_equal(target.encode(images), trained.eval().encode(images))


@pytest.mark.parametrize('option', [dict(using_znorm=True), dict(unshared=True)])
def test_export_of_what_no_published_file_holds(option, images):
    trained = VQVAE(**TINY, **option)
    exported = trained.exported(trained.state_dict())
    assert exported.keys() == {'model', 'config'}
    assert exported['config'] == dict(v_patch_nums=[1, 2, 4], using_znorm='using_znorm' in option)
    target = build_tokenizer(VQVAE, exported['model'], 'file.pth', 'cpu', **exported['config'])
    images = F.interpolate(images, (32, 32))
    assert all_equal(target.encode(images), trained.encode(images))


@pytest.fixture
def poisoned_constructors(monkeypatch):
    """Scripts of the published code switch `reset_parameters` off; NaN stands for the memory found then."""
    def poison(module):
        for p in module.parameters(recurse=False):
            p.data.fill_(float('nan'))
    for cls in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding):
        monkeypatch.setattr(cls, 'reset_parameters', poison)


def test_weights_are_sane_without_reset_parameters(poisoned_constructors):
    vqvae = VQVAE(**SMALL)
    around_codes = vqvae.quant_conv, vqvae.post_quant_conv
    for name, p in vqvae.named_parameters():
        assert p.isfinite().all(), name
        assert p.std() > 0 or 'norm' in name or name.endswith('quant_conv.bias'), name
    for module in vqvae.modules():
        if isinstance(module, nn.Conv2d) and module not in around_codes:
            assert module.weight.abs().max().item() <= module.weight[0].numel() ** -0.5
    x = torch.randn(1, 8, 4, 4)
    assert all(torch.equal(conv(x), x) for conv in around_codes), 'training starts from identities there'
    assert vqvae.quantize.embedding.weight.abs().max() <= 8 ** -0.5 / 36
    rec = vqvae.img_to_reconstructed_img(torch.rand(1, 3, 64, 64), last_one=True)
    assert rec.isfinite().all() and rec.std() > 0


def test_built_pair_is_sane_without_reset_parameters(poisoned_constructors):
    vae, var = build_vae_var('cpu', patch_nums=(1, 2), V=16, Cvae=8, ch=32, num_classes=3, depth=1)
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert var.training and all(p.requires_grad for p in var.parameters())
    assert var.autoregressive_infer_cfg(1, 0, g_seed=0).isfinite().all()


@pytest.mark.parametrize('size', [(32, 36), (4, 32)])
def test_sizes_that_do_not_divide_into_codes_are_refused_in_training(size):
    vqvae = VQVAE(**TINY, test_mode=False)
    with pytest.raises(ValueError, match='multiples of the stride'):
        vqvae.reconstruct(torch.zeros(1, 3, *size))
