"""VQ-16, VQ-8 and FlexVAE: the published outputs, and what training here adds."""
import logging

import numpy as np
import pytest
import torch
from torch import nn

from models import load_weights
from models.tokenizers.conv import (
    KL_LAYOUT,
    LLAMAGEN_LAYOUT,
    VAR_LAYOUT,
    AttnBlock,
    build_encoder_decoder,
    read_ch_mult,
    read_encoder_decoder,
)
from models.tokenizers.flex_vae import FlexVAE
from models.tokenizers.vq_model import VectorQuantizer, VQ_models, VQModel, entropy_loss
from tests.vectors import (
    assert_within,
    build_filled,
    fill,
    flexvar_rule,
    load_json,
    load_tensors,
    npp_rule,
    uniform_images,
)

SMALL = dict(codebook_size=64, codebook_embed_dim=8, z_channels=16, net='tiny')


def load(name):
    return load_json(name), load_tensors(name)


# ------------------------------------------------------------ LlamaGen
@pytest.fixture(scope='module')
def vq():
    return load('npp/vq')


def build_tiny(**overrides):
    return fill(VQModel(**load_json('npp/vq')['tiny']['config'], **overrides), npp_rule)


def test_tiny_model(vq):
    info, vectors = vq
    model = build_tiny().eval()
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == info['tiny']['keys']
    assert sum(p.numel() for p in model.parameters()) == info['tiny']['n_params']
    with torch.no_grad():
        z = model.features(vectors['tiny.img'])
        assert_within(z, vectors['tiny.z'], 2e-4)
        out = model.quantize(z)
        assert_within(out.quant_BZhw, vectors['tiny.quant'], 1e-5)
        assert torch.equal(out.idx_Bl.flatten(), vectors['tiny.indices'])
        rec, losses = model(vectors['tiny.img'])
        assert_within(rec, vectors['tiny.recon'], 1e-3)
        decoded = model.decode_code(vectors['tiny.rand_codes'], (3, 4, 8, 8))
        assert_within(decoded, vectors['tiny.rand_codes_decoded'], 1e-3)
        flat = vectors['tiny.rand_codes'].flatten()
        assert torch.equal(model.decode_code(flat, (3, 8, 8, 4), channel_first=False), decoded)
    assert all(t.isfinite() for t in losses[:3])
    assert not model.quantize.codebook_used.any(), 'evaluation must not count'
    idx_BL = model.encode(vectors['tiny.img'])
    assert torch.equal(idx_BL, vectors['tiny.indices'].view(2, 64)) and idx_BL.dtype == torch.int64
    assert_within(model.decode(idx_BL), vectors['tiny.recon'].clamp(-1, 1), 1e-3)


@pytest.mark.parametrize('case', range(4))
def test_training_losses_and_gradients(vq, case):
    info, vectors = vq
    case = info['cases'][case]
    model = build_tiny(codebook_l2_norm=case['l2_norm'], entropy_loss_ratio=case['entropy_loss_ratio'])
    images = vectors['tiny.img'].clone().requires_grad_()
    rec, losses = model(images)
    mse = (rec - vectors['tiny.img']).square().mean()
    total = mse + sum(losses[:3])
    total.backward()
    for name, value in zip(('mse', 'vq_loss', 'commit_loss', 'entropy_loss', 'codebook_usage', 'total'),
                           (mse, *losses, total), strict=True):
        assert float(torch.as_tensor(value).detach()) == pytest.approx(case[name], rel=1e-4, abs=1e-7), name
    grads = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert sum(norm ** 2 for norm in grads.values()) ** 0.5 == pytest.approx(case['grad_norm'], rel=1e-3)
    for name, norm in case['grad_norms'].items():
        assert grads[name] == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    assert images.grad.norm().item() == pytest.approx(case['input_grad_norm'], rel=1e-3)
    assert len(model.quantize.codebook_used.unique()) == case['unique_in_buffer']


def build_quantizer(info):
    info = info['quantizer']
    quantize = VectorQuantizer(info['n_e'], info['e_dim'], info['beta'], info['entropy_ratio'], info['l2'])
    return fill(quantize, npp_rule, 'q.')


def test_quantizer_alone(vq):
    info, vectors = vq
    quantize = build_quantizer(info)
    z = vectors['q.z'].clone().requires_grad_()
    out = quantize(z)
    assert torch.equal(out.idx_Bl.flatten(), vectors['q.idx'])
    assert_within(out.quant_BZhw, vectors['q.zq'], 1e-5)
    losses = (out.vq_loss.item(), out.commit_loss.item(), out.entropy_loss.item(), quantize.usage())
    assert losses == pytest.approx(info['quantizer']['losses'], rel=1e-5)
    ((out.quant_BZhw * vectors['q.w']).sum() + out.loss).backward()
    assert_within(z.grad, vectors['q.grad_z'], 1e-5)
    assert_within(quantize.embedding.weight.grad, vectors['q.grad_emb'], 1e-5)
    tail = torch.tensor(info['quantizer']['codebook_used_tail'])
    assert torch.equal(quantize.codebook_used[-len(tail):], tail)
    entries = torch.tensor([0, 3, 5, 15])
    assert_within(quantize.get_codebook_entry(entries, (2, 4, 1, 2)), vectors['q.entry'], 1e-5)
    assert_within(quantize.get_codebook_entry(entries, (2, 1, 2, 4), channel_first=False),
                  vectors['q.entry_last'], 1e-5)
    assert_within(quantize.get_codebook_entry(entries)[1], vectors['q.entry_last'][0, 0, 1], 1e-5)


def test_entropy_loss(vq):
    info, vectors = vq
    assert entropy_loss(vectors['ent.aff']).item() == pytest.approx(info['entropy_loss'], abs=1e-5)


@pytest.mark.parametrize('name', ['VQ-16', 'VQ-8'])
def test_published_size(vq, name):
    info, vectors = vq
    model = build_filled(VQ_models[name], npp_rule).eval()
    assert sum(p.numel() for p in model.parameters()) == info[name]['n_params']
    images = vectors[f'{name}.img']
    with torch.no_grad():
        z = model.features(images)
        assert_within(z, vectors[f'{name}.z'], 2e-4)
        idx_Bl = model.quantize.codes(z)
        assert torch.equal(idx_Bl.flatten(), vectors[f'{name}.indices'])
        rec = model.decode_code(idx_Bl, (1, 8, *z.shape[2:]))
    assert_within(rec, vectors[f'{name}.recon'], 1e-3)


@pytest.mark.parametrize('name', ['VQ-16', 'VQ-8'])
def test_published_keys(name):
    keys = load_json('flexvar/state_dict_keys')[f'{name}_V8912_C32']
    with torch.device('meta'):
        model = VQ_models[name](codebook_size=8912, codebook_embed_dim=32)
    state = model.state_dict()
    assert {key: list(t.shape) for key, t in state.items()} == keys and list(state) == list(keys)
    assert (len(keys), sum(p.numel() for p in model.parameters())) \
        == {'VQ-16': (344, 72_049_827), 'VQ-8': (300, 70_276_259)}[name]
    assert not isinstance(model.quantize.codebook_used, nn.Parameter)


# ------------------------------------------------------------ FlexVAR
@pytest.fixture(scope='module', params=['vae_tiny', 'vae_vq16_full'])
def flex(request):
    info, vectors = load(f'flexvar/{request.param}')
    config = info['config']['vae']

    def make():
        return FlexVAE(config['V'], config['dim'], ch=config['ch'] or 128, z_channels=config['z'],
                       encoder_ch_mult=config['ch_mult'], decoder_ch_mult=config['ch_mult'],
                       entropy_loss_ratio=config['ent'])
    return info, vectors, build_filled(make, flexvar_rule(info['config']['wseed'])).eval()


@pytest.fixture
def flex_images(flex):
    config = flex[0]['config']
    return uniform_images(config['xseed'], config['xshape'])


def test_weights_follow_the_rule(flex):
    info, _, model = flex
    for name, expected in info['weight_check'].items():
        weight = model.state_dict()[name].double()
        assert list(weight.shape) == expected['shape']
        assert weight.sum().item() == pytest.approx(expected['sum'], rel=1e-5)
        assert weight.norm().item() == pytest.approx(expected['norm'], rel=1e-6)


@torch.no_grad()
def test_native_codes(flex, flex_images):
    info, vectors, model = flex
    s = info['config']['stride']
    assert_within(model.encoder(flex_images)[:1], vectors['encoder_out'], 2e-5)
    z = model.features(flex_images)
    assert_within(z, vectors['encode_conti'], 2e-5)
    out = model.quantize(z)
    assert torch.equal(out.idx_Bl.flatten(), vectors['native_idx'])
    assert_within(out.quant_BZhw[:1], vectors['native_quant'], 2e-6)
    assert_within(model(flex_images)[0][..., ::s, ::s], vectors['native_dec'], 1e-4)


@torch.no_grad()
def test_codes_of_every_side(flex, flex_images):
    info, vectors, model = flex
    s, sides = info['config']['stride'], info['config']['patch_nums']
    idx_kBl = model.encode(flex_images, patch_nums=sides)
    quants, _ = model.multi_scale_encode(flex_images, sides)
    recs, losses = model(flex_images[:1], sides)
    assert len(recs) == len(losses) == len(sides)
    for side, idx_Bl, quant, rec in zip(sides, idx_kBl, quants, recs, strict=True):
        assert torch.equal(idx_Bl, vectors[f'idx_{side}'])
        assert_within(quant[:1], vectors[f'quant_{side}'], 2e-6)
        assert_within(rec[..., ::s, ::s], vectors[f'dec_{side}'], 1e-4)
    decoded = model.decode_code(idx_kBl[-1][:1], (1, model.channels, sides[-1], sides[-1]))
    assert_within(decoded[..., ::s, ::s], vectors['decode_code_last'], 1e-4)
    assert_within(model.decode(idx_kBl)[:1], decoded.clamp(-1, 1), 1e-4)


@torch.no_grad()
def test_pictures_of_every_side(flex, flex_images):
    info, vectors, model = flex
    s, sides = 2 * info['config']['stride'], info['config']['patch_nums']
    recs = model.img_to_reconstructed_multi_scale_img(flex_images[:1], sides)
    assert [list(rec.shape[1:]) for rec in recs] == [shape[1:] for shape in info['ms_img_shapes']]
    assert_within(recs[0][..., ::s, ::s], vectors['ms_img_first'], 1e-4)
    assert_within(recs[len(sides) // 2][..., ::s, ::s], vectors['ms_img_mid'], 1e-4)
    native, = model.img_to_reconstructed_multi_scale_img(flex_images[:1])
    assert_within(native[..., ::s, ::s], vectors['native_dec'][:1, :, ::2, ::2], 1e-4)


@torch.no_grad()
def test_oblong_images(flex):
    info, vectors, model = flex
    config, s = info['config'], info['config']['stride']
    images = uniform_images(config['xseed'] + 1, config['rshape'])
    assert_within(model.features(images), vectors['rect_conti'], 2e-5)
    size = tuple(vectors['rect_conti'].shape[2:])
    idx_kBl = model.encode(images, [1, size])
    assert torch.equal(idx_kBl[-1].flatten(), vectors['rect_idx'])
    assert_within(model.decode(idx_kBl, size)[..., ::s, ::s], vectors['rect_dec'].clamp(-1, 1), 1e-4)
    with pytest.raises(ValueError, match=r'codes per image, got .*pass size=\(rows, columns\)'):
        model.decode(idx_kBl)
    assert model.encode(images)[-1].shape == idx_kBl[-1].shape


def test_losses_of_several_sides(flex, flex_images):
    info, _, model = flex
    config, expected = info['config'], info['train_mode']
    images = flex_images[..., :config['tcrop'], :config['tcrop']]
    model.train()
    model.quantize.codebook_used.zero_()
    recs, losses = model(images, config['tpns'])
    total = sum(rec.square().mean() + sum(terms[:3]) for rec, terms in zip(recs, losses, strict=True))
    model.zero_grad()
    total.backward()
    for terms, row in zip(losses, expected['per_scale'], strict=True):
        for name, value in zip(('vq', 'commit', 'entropy', 'usage'), terms, strict=True):
            assert float(torch.as_tensor(value).detach()) == pytest.approx(row[name], abs=2e-5), name
    assert total.item() == pytest.approx(expected['total'], abs=2e-5)
    parameters = dict(model.named_parameters())
    for name, norm in expected['grad_norm'].items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-3), name
    tail = expected['codebook_used_tail']
    assert model.quantize.codebook_used[-len(tail):].int().tolist() == tail
    model.quantize.codebook_used.zero_()
    model.zero_grad()
    model.eval()


# ------------------------------------------------------------ quantizer
def test_straight_through_gradient():
    quantize = VectorQuantizer(32, 8, l2_norm=False)
    z, probe = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4)
    out = quantize(z)
    assert_within(out.quant_BZhw, quantize.embed(quantize.codes(z), (4, 4)), 1e-6)
    out.quant_BZhw.backward(probe)
    assert torch.equal(z.grad, probe) and quantize.embedding.weight.grad is None


def test_gradient_of_the_quantizer_loss():
    torch.manual_seed(1)
    quantize = VectorQuantizer(16, 4, entropy_ratio=0.1).double()
    z = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    assert quantize(z).quant_BZhw.dtype == torch.float64

    def differences(loss, x, eps=1e-6):  # the codes stay the same under so small a change
        grad = torch.zeros_like(x)
        for i in range(x.numel()):
            values = []
            for sign in (1, -1):
                x.data.view(-1)[i] += sign * eps
                values.append(loss().item())
                x.data.view(-1)[i] -= sign * eps
            grad.view(-1)[i] = (values[0] - values[1]) / (2 * eps)
        return grad

    z.requires_grad_()
    weight = quantize.embedding.weight
    out = quantize(z)
    for part, to_z, to_code in (('vq_loss', False, True), ('commit_loss', True, False),
                                ('entropy_loss', True, True)):
        grads = torch.autograd.grad(getattr(out, part), (z, weight), retain_graph=True, allow_unused=True)
        for grad, x, wanted in zip(grads, (z, weight), (to_z, to_code), strict=True):
            if wanted:
                numeric = differences(lambda part=part: getattr(quantize(z), part), x)
                torch.testing.assert_close(grad, numeric, atol=1e-6, rtol=1e-5)
            else:
                assert grad is None or not grad.any(), part


def test_quantizer_ignores_autocast():
    quantize, z = VectorQuantizer(512, 8, entropy_ratio=0.1), torch.randn(4, 8, 8, 8)
    expected = quantize(z)
    seen = []
    quantize.embedding.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        actual = quantize(z)
        assert torch.equal(quantize.codes(z), expected.idx_Bl)
        assert torch.equal(quantize(z.bfloat16()).query_NZ, quantize.queries(z.bfloat16().float()))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert set(seen) == {torch.float32}


def test_nearest_code_is_the_first_best_one():
    for l2_norm in (True, False):
        quantize = VectorQuantizer(50, 8, l2_norm=l2_norm)
        with torch.no_grad():
            quantize.embedding.weight[30:40] = quantize.embedding.weight[10:20]  # exact ties
        z = torch.randn(1, 8, 20, 10)
        table, query = quantize.embedding.weight.detach().double(), z.double().flatten(2)[0].T
        if l2_norm:
            table, query = nn.functional.normalize(table), nn.functional.normalize(query)
        distance = torch.cdist(query, table)
        assert torch.equal(quantize.codes(z)[0], distance.argmin(1))
        assert not torch.isin(quantize.codes(z), torch.arange(30, 40)).any()


def test_history_of_codes_is_bounded():
    quantize = VectorQuantizer(8, 4)
    quantize.codebook_used.fill_(7)
    out = quantize(torch.randn(2, 4, 5, 5))
    assert torch.equal(quantize.codebook_used[-50:], out.idx_Bl.flatten().float())
    assert (quantize.codebook_used[:-50] == 7).all() and len(quantize.codebook_used) == 65536
    quantize(torch.randn(17, 4, 64, 64))  # more codes than it holds
    assert len(quantize.codebook_used) == 65536 and quantize.usage() == 1.


# ------------------------------------------------------------ training
def images_of(side, batch=2):
    return torch.rand(batch, 3, side, side) * 2 - 1


@pytest.mark.parametrize('training', [True, False])
def test_reconstruct_one_map(training):
    model, images = VQModel(**SMALL, entropy_loss_ratio=0.1).train(training), images_of(32)
    out = model.reconstruct(images)
    (target, rec), = out.views
    assert target is images and rec.shape == images.shape
    assert list(out.codes) == ['4x4'] and torch.equal(out.codes['4x4'], model.encode(images))
    assert set(out.parts) == {'vq_loss', 'commit_loss', 'entropy_loss', 'latent_mean', 'latent_std'}
    assert not any(t.requires_grad for t in out.parts.values())
    terms = sum(out.parts[name] for name in ('vq_loss', 'commit_loss', 'entropy_loss'))
    assert out.latent_loss.item() == pytest.approx(terms.item(), rel=1e-6)
    assert out.parts['latent_std'].item() == pytest.approx(model.features(images).std().item(), rel=1e-5)
    ((rec - target).square().mean() + out.latent_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    picture, = model.progressive(images).values()
    assert_within(picture, rec.clamp(-1, 1), 1e-5)


def test_oblong_round_trip():
    model = VQModel(**SMALL).eval()
    images = torch.rand(2, 3, 24, 40)
    idx_BL = model.encode(images)
    assert idx_BL.shape == (2, 15)
    assert torch.equal(model.decode(idx_BL, (3, 5)), model.progressive(images)['3x5'])
    with pytest.raises(ValueError, match='expected 3x3 codes per image, got 15'):
        model.decode(idx_BL)
    with pytest.raises(ValueError, match='expected 3x4 codes per image, got 15'):
        model.decode(idx_BL, (3, 4))


def test_sides_of_a_training_step():
    model = FlexVAE(**SMALL, num_sides=5)
    drawn = []
    for seed in range(400):
        torch.manual_seed(seed)
        sizes = model.training_sizes((16, 16))
        torch.manual_seed(seed)
        assert model.training_sizes((16, 16)) == sizes
        assert sizes[-1] == (16, 16) and len(set(sizes)) == 5 and sizes == sorted(sizes)
        drawn += [side for side, _ in sizes[:-1]]
    counts = np.bincount(drawn, minlength=16)
    assert counts[0] == 0 and len(counts) == 16
    expected = 400 * 4 / 15  # uniform over 1..15; standard deviation below 9
    assert abs(counts[1:] - expected).max() < 40
    assert len(model.training_sizes((4, 4))) == 4 and model.training_sizes((1, 1)) == [(1, 1)]
    model.min_side = 3
    assert model.training_sizes((4, 4)) == [(3, 3), (4, 4)] and model.training_sizes((2, 2)) == [(2, 2)]


def test_sides_of_validation():
    model = FlexVAE(**SMALL).eval()
    assert model.training_sizes((16, 16)) == [(p, p) for p in (1, 2, 4, 8, 16)]
    assert model.training_sizes((6, 6)) == [(p, p) for p in (1, 2, 4, 6)]
    assert model.training_sizes((1, 1)) == [(1, 1)]
    assert model.training_sizes((3, 12)) == [(1, 1), (1, 2), (1, 4), (2, 8), (3, 12)]


def test_reconstruct_every_side():
    model, images = FlexVAE(**SMALL, num_sides=3).train(), images_of(32)
    torch.manual_seed(3)
    sizes = model.training_sizes((4, 4))
    torch.manual_seed(3)
    out = model.reconstruct(images)
    assert list(out.codes) == [f'{p}x{p}' for p, _ in sizes] and len(out.views) == 3
    for (p, _), (target, rec), idx_Bl in zip(sizes, out.views, out.codes.values(), strict=True):
        assert target.shape == rec.shape == (2, 3, 8 * p, 8 * p) and idx_Bl.shape == (2, p * p)
        assert_within(target, nn.functional.interpolate(images, size=(8 * p, 8 * p), mode='area'), 1e-6)
    _, losses = model(images, [p for p, _ in sizes])
    expected = sum(sum(terms[:3]) for terms in losses) / 3
    assert out.latent_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    model.eval()
    pictures = model.progressive(images)
    assert list(pictures) == ['1x1', '2x2', '4x4'] == list(model.reconstruct(images).codes)
    assert all(picture.shape == images.shape and picture.abs().max() <= 1 for picture in pictures.values())
    assert_within(pictures['4x4'], model.decode(model.encode(images)), 1e-5)


def test_restart_of_dead_codes():
    model = VQModel(**SMALL, upkeep=dict(ema=False, restart=True))
    assert model.quantize.embedding.weight.requires_grad
    with torch.no_grad():
        model.quantize.embedding.weight[:32] = model.quantize.embedding.weight[32]  # 33 equal codes
    images, replaced = images_of(32, batch=8), {}
    for _ in range(60):
        queries = model.quantize.queries(model.features(images))
        model.reconstruct(images)
        for weight, rows in model.after_step(progress=0.).items():
            assert weight is model.quantize.embedding.weight
            replaced.update({row: weight[row].detach().clone() for row in rows.tolist()})
    assert replaced
    for row in replaced.values():
        assert row.norm().item() == pytest.approx(1, abs=1e-5), 'candidates have unit length'
        assert (row - queries).norm(dim=1).min() < 1e-5, 'and come from the batch'
    assert model.code_metrics()['restarts'] == len(replaced)
    assert list(model.code_counts()) == ['4x4']
    assert model.upkeep.step == 60


def test_nothing_is_kept_up_without_upkeep():
    model = VQModel(**SMALL)
    model.reconstruct(images_of(32))
    assert model.after_step(0.) == model.code_metrics() == model.code_counts() == model.training_state() == {}
    model.load_training_state({})


@pytest.mark.parametrize('codebook_init', ['uniform', 'inv_v', 'normal'])
def test_codebook_init(codebook_init):
    unit = VQModel(**SMALL)
    unit.init_weights(codebook_init)
    assert_within(unit.quantize.embedding.weight.norm(dim=1), torch.ones(64), 1e-5)
    plain = VQModel(**SMALL, codebook_l2_norm=False)
    plain.init_weights(codebook_init)
    largest = plain.quantize.embedding.weight.abs().max().item()
    assert largest > 1 if codebook_init == 'normal' else 0.9 / 64 < largest <= 1 / 64


# ------------------------------------------------------------ weights
def test_a_foreign_file_is_named():
    model = VQModel(**SMALL)
    with pytest.raises(ValueError, match=r'file\.pt is a VQModel with codebook_size=32 \(here 64\)'):
        load_weights(model, VQModel(**{**SMALL, 'codebook_size': 32}).state_dict(), 'file.pt')
    with pytest.raises(ValueError, match='net=published'):
        load_weights(model, VQModel(codebook_size=64, ch=32, z_channels=16).state_dict(), 'file.pt')
    with pytest.raises(ValueError, match=r'file\.pt holds no VQModel weights'):
        load_weights(model, dict(a=torch.zeros(1)), 'file.pt')


def test_warm_start_from_another_codebook():
    source = VQModel(**SMALL)
    model = FlexVAE(**{**SMALL, 'codebook_size': 96, 'codebook_embed_dim': 4})
    before = {key: t.clone() for key, t in model.state_dict().items()}
    model.warm_start(source.state_dict(), 'file.pt')
    for key, t in model.state_dict().items():
        expected = source.state_dict() if key.startswith(('encoder.', 'decoder.')) else before
        assert torch.equal(t, expected[key]), key
    same = FlexVAE(**SMALL)
    same.warm_start(FlexVAE(**SMALL).state_dict() | source.state_dict(), 'file.pt')
    assert torch.equal(same.quantize.embedding.weight, source.quantize.embedding.weight)
    for state in (dict(a=torch.zeros(1)), VQModel(**{**SMALL, 'z_channels': 8}).state_dict()):
        with pytest.raises(ValueError, match=r'file\.pt fits only \d+ of the \d+ tensors.*pass a VQ-16'):
            model.warm_start(state, 'file.pt')


def test_the_wrong_vocabulary_is_pointed_out(caplog):
    with torch.device('meta'), caplog.at_level(logging.WARNING):
        FlexVAE(net='tiny')
        assert not caplog.records
        FlexVAE(8192, net='tiny')
    assert '8912' in caplog.text


# ------------------------------------------------------------ towers
def test_unknown_network():
    with pytest.raises(ValueError, match="'published' or 'tiny', got 'large'"):
        build_encoder_decoder('large')
    with pytest.raises(ValueError, match=r'equally many levels, got the multipliers \(1, 2\) and \(1,\)'):
        build_encoder_decoder('published', ch_mult=(1, 2), decoder_ch_mult=(1,))
    with pytest.raises(KeyError):
        read_encoder_decoder({})


@pytest.mark.parametrize('layout', [VAR_LAYOUT, KL_LAYOUT, LLAMAGEN_LAYOUT])
def test_towers_are_read_back_in_every_layout(layout):
    with torch.device('meta'):
        encoder, decoder = build_encoder_decoder('published', ch=32, ch_mult=(1, 2, 4),
                                                 decoder_ch_mult=(2, 1, 3), num_res_blocks=1, layout=layout)
    state = {f'encoder.{key}': t for key, t in encoder.state_dict().items()}
    state |= {f'decoder.{key}': t for key, t in decoder.state_dict().items()}
    assert read_encoder_decoder(state) == dict(net='published', ch=32, ch_mult=(1, 2, 4), num_res_blocks=1)
    assert read_ch_mult(state, 'decoder') == (2, 1, 3)


@torch.no_grad()
def test_attention_with_one_convolution_or_three():
    fused, split = AttnBlock(32, fused_qkv=True), AttnBlock(32, fused_qkv=False)
    state = fused.state_dict()
    for kind in ('weight', 'bias'):
        parts = state.pop(f'qkv.{kind}').chunk(3)
        state |= {f'{name}.{kind}': part for name, part in zip('qkv', parts, strict=True)}
    split.load_state_dict(state)
    x = torch.randn(2, 32, 4, 6)
    assert_within(split(x), fused(x), 1e-5)


def test_tiny_network():
    encoder, decoder = build_encoder_decoder('tiny', z_channels=16, encoder_channels=32)
    images = torch.randn(2, 3, 32, 48)
    assert encoder(images).shape == (2, 32, 4, 6)
    assert decoder(torch.randn(2, 16, 4, 6)).shape == images.shape
    assert decoder.last_layer is decoder.conv_out.weight
    widths = [m.out_channels for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert widths == [24, 48, 48] and encoder.stride == 8
    assert {m.num_groups for m in encoder.modules() if isinstance(m, nn.GroupNorm)} == {8}
