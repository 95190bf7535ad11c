"""KL-16: the published outputs, and what training here adds."""
import functools

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import dist
from models import load_weights
from models.noise import GlobalBatch
from models.tokenizers.kl_vae import AutoencoderKL, Posterior
from tests.vectors import assert_within, build_filled, flowar_rule, load_json, load_tensors

SMALL = dict(embed_dim=4, net='tiny')


@functools.cache
def published(name):
    """(description, vectors, model in eval mode)."""
    info = load_json(f'flowar/{name}')
    config = info['config']

    def make():
        return AutoencoderKL(config['embed_dim'], config['ch_mult'], ch=config['ch'],
                             num_res_blocks=config['num_res_blocks'], test_mode=True)
    return info, load_tensors(f'flowar/{name}'), build_filled(make, flowar_rule(info['weight_seed']))


def images_of(side, batch=2):
    return torch.rand(batch, 3, side, side) * 2 - 1


# ------------------------------------------------------------ against the reference
def test_published_keys():
    info = load_json('flowar/state_dict_keys')['kl16_vae']
    with torch.device('meta'):
        model = AutoencoderKL()
    state = model.state_dict()
    assert {key: list(t.shape) for key, t in state.items()} == info['keys']
    assert list(state) == list(info['keys'])
    assert len(state) == 312
    assert sum(p.numel() for p in model.parameters()) == info['parameters_total'] == 66_456_019
    assert (model.stride, model.channels, model.vocab_size) == (16, 16, None)


@pytest.mark.parametrize('name', ['vae_tiny', 'vae_kl16_full'])
def test_outputs(name):
    info, vectors, model = published(name)
    atol = info['tolerance']['atol']
    for key, row in (info['state_dict'] or {}).items():
        assert model.state_dict()[key].sum().item() == pytest.approx(row['sum'], rel=1e-4, abs=1e-4), key
    posterior = model.posterior(vectors['image'])
    mean, logvar = vectors['moments'].chunk(2, dim=1)
    assert_within(posterior.mean, mean, atol)
    assert_within(posterior.logvar, logvar.clamp(-30, 20), atol)
    latent = model.scaling_factor * posterior.sample(vectors['posterior_noise'])
    assert_within(latent, vectors['latent_scaled'], atol)
    assert_within(model.pixels(latent / model.scaling_factor), vectors['decoded'], atol)
    assert_within(model.decode(vectors['latent_scaled']), vectors['decoded'].clamp(-1, 1), atol)
    assert_within(model.encode_mode(vectors['image']), 0.2325 * mean, atol)
    if 'moments_flip' in vectors:
        flipped = model.posterior(vectors['image'].flip(-1))
        assert_within(flipped.mean, vectors['moments_flip'].chunk(2, dim=1)[0], atol)


# ------------------------------------------------------------ posterior
def test_divergence_is_that_of_torch():
    mean, logvar = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0., 1.))
    posterior = Posterior(mean, logvar)
    assert_within(posterior.elementwise_kl(), expected, 1e-5)
    torch.testing.assert_close(posterior.kl(), expected.sum((1, 2, 3)), rtol=1e-5, atol=0)


def test_variance_is_clamped():
    mean = torch.zeros(1, 1, 1, 3)
    posterior = Posterior(mean, torch.tensor([-100., 0., 100.]).view(1, 1, 1, 3))
    assert posterior.std.flatten().tolist() == pytest.approx([np.exp(-15), 1, np.exp(10)])
    assert posterior.kl().isfinite().all()


def test_samples_follow_the_posterior():
    posterior = Posterior(torch.full((1, 1, 100, 100), 3.), torch.full((1, 1, 100, 100), 2 * np.log(0.5)))
    sample = posterior.sample()
    assert sample.mean().item() == pytest.approx(3, abs=0.02)
    assert sample.std().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(posterior.mode(), posterior.mean)
    noise = torch.randn(1, 1, 100, 100)
    assert_within(posterior.sample(noise), 3 + 0.5 * noise, 1e-6)


def test_noise_of_an_image_follows_its_place_in_the_global_batch():
    model, images = AutoencoderKL(**SMALL).eval(), images_of(32, batch=4)
    torch.manual_seed(5)
    whole = model.encode(images)
    for start in (0, 2):
        torch.manual_seed(5)
        with GlobalBatch(start, 4):
            assert_within(model.encode(images[start:start + 2]), whole[start:start + 2], 1e-5)


# ------------------------------------------------------------ use
def test_round_trip_of_oblong_images():
    model, images = AutoencoderKL(**SMALL).eval(), torch.rand(2, 3, 24, 40)
    latent = model.encode(images)
    assert latent.shape == (2, 4, 3, 5) and latent.dtype == torch.float32 and not latent.requires_grad
    rec = model.decode(latent)
    assert rec.shape == images.shape and rec.abs().max() <= 1
    mode = model.encode_mode(images)
    assert torch.equal(mode, model.encode_mode(images)) and not torch.equal(mode, latent)
    assert torch.equal(model.progressive(images)['3x5'], model.decode(mode))


# ------------------------------------------------------------ training
def test_reconstruct():
    model, images = AutoencoderKL(**SMALL), images_of(32)
    torch.manual_seed(1)
    out = model.reconstruct(images)
    torch.manual_seed(1)
    posterior = model.posterior(images)
    (target, rec), = out.views
    assert target is images and out.codes == {}
    assert_within(rec, model.pixels(posterior.sample()), 1e-6)
    expected = 1e-6 / (3 * 32 * 32) * posterior.kl().mean()
    assert out.latent_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.parts['kl'].item() == pytest.approx(posterior.kl().mean().item(), rel=1e-5)
    assert out.parts['posterior_std'].item() == pytest.approx(posterior.std.mean().item(), rel=1e-5)
    kl_Z = [out.parts[f'kl_channel_{c}'].item() for c in range(4)]
    assert sum(kl_Z) * 16 == pytest.approx(out.parts['kl'].item(), rel=1e-5)  # 4x4 positions
    assert not any(t.requires_grad for t in out.parts.values())
    ((rec - target).abs().mean() + 1e6 * out.latent_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    (_, rec), = model.reconstruct(images).views
    assert torch.equal(rec, model.reconstruct(images).views[0][1]), 'no noise in eval mode'
    assert_within(rec, model.pixels(model.posterior(images).mode()), 1e-6)


def test_dead_channels_raise_the_alarm():
    model, images = AutoencoderKL(**SMALL), images_of(32)
    assert model.reconstruct(images).parts['alarm_collapse'] == 0
    with torch.no_grad():
        model.quant_conv.weight[[2, 6]] = 0
        model.quant_conv.bias[[2, 6]] = 0  # mean 0, variance 1
    out = model.reconstruct(images)
    assert out.parts['kl_channel_2'].abs() < 1e-6 < 0.01 < out.parts['kl_channel_1']
    assert out.parts['alarm_collapse'] == 1
    assert model.reconstruct(images, progress=0.05).parts['alarm_collapse'] == 0


def test_plain_autoencoder():
    model, images = AutoencoderKL(**SMALL, use_variational=False), images_of(32)
    assert model.quant_conv.weight.shape == (4, 4, 1, 1)
    out = model.reconstruct(images)
    assert out.latent_loss == 0 and out.parts['kl'] == 0 and out.parts['alarm_collapse'] == 0
    assert torch.equal(model.encode(images), model.encode_mode(images))
    assert AutoencoderKL.kwargs_from_state_dict(model.state_dict())['use_variational'] is False


# ------------------------------------------------------------ calibration
def test_calibration_is_the_spread_of_samples():
    model, images = AutoencoderKL(**SMALL), images_of(32, batch=256)
    model.calibrate([images])
    assert model.needs_calibration
    with torch.no_grad():
        z = model.posterior(images).sample()
    assert model.scaling_factor == pytest.approx(1 / z.std().item(), rel=0.01)
    assert model.latent_std == pytest.approx(z.std((0, 2, 3)).tolist(), rel=0.05)
    assert model.latent_mean == pytest.approx(z.mean((0, 2, 3)).tolist(), abs=0.05)
    assert model.encode(images).std().item() == pytest.approx(1, rel=0.01)

    whole = model.config_state(1.)
    model.calibrate(images.split([100, 6, 150]))
    for name, value in model.config_state(1.).items():
        assert value == pytest.approx(whole[name], rel=1e-6, abs=1e-6), name
    with pytest.raises(ValueError, match='needs at least one image'):
        model.calibrate([])


def test_calibration_counts_every_rank(monkeypatch):
    model, images = AutoencoderKL(**SMALL), images_of(32, batch=6)
    model.calibrate([images])
    whole, first_rank = model.config_state(1.), []
    monkeypatch.setattr(dist, 'allreduce', lambda t: first_rank.append(t.clone()))
    model.calibrate([images[:2], images[2:4]])
    monkeypatch.setattr(dist, 'allreduce', lambda t: t.add_(first_rank[0]))
    model.calibrate([images[4:]])
    for name, value in model.config_state(1.).items():
        assert value == pytest.approx(whole[name], rel=1e-6, abs=1e-6), name


# ------------------------------------------------------------ weights
def test_published_file(tmp_path):
    source, path = AutoencoderKL(**SMALL), tmp_path / 'kl16.ckpt'
    state = source.state_dict() | {'loss.logvar': torch.zeros(())}
    torch.save(dict(model=state), path)
    model = AutoencoderKL(**SMALL, ckpt_path=str(path), test_mode=True)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for key, t in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], t)
    assert 'loss.logvar' in state
    load_weights(model, state, str(path))
    with pytest.raises(ValueError, match=r'is a AutoencoderKL with embed_dim=4 \(here 8\)'):
        AutoencoderKL(embed_dim=8, net='tiny', ckpt_path=str(path))


@pytest.mark.parametrize(('content', 'words'), [
    (None, 'check the path'), (b'', 'download it again'), (b'no weights', 'download it again'),
    (b'PK\3\4' + bytes(100), 'download it again'), ([torch.zeros(2)], 'tensors by name'),
    (dict(model=[1]), 'tensors by name'), ({'a': 1}, 'tensors by name'),
    ({'a': torch.zeros(2)}, 'AutoencoderKL'), (dict(model={'post_quant_conv.weight': torch.tensor(1.)}),
                                               'AutoencoderKL'),
    (dict(model=Posterior(torch.zeros(2))), 'download it again')])
def test_foreign_files_are_told_in_one_line(tmp_path, content, words):
    path = str(tmp_path / 'odd\nname.ckpt')
    if isinstance(content, bytes):
        (tmp_path / 'odd\nname.ckpt').write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=words) as stop:
        AutoencoderKL(**SMALL, ckpt_path=path)
    assert len(str(stop.value).splitlines()) == 1 and repr(path) in str(stop.value)


def test_noise_does_not_hide_the_mean_at_the_start():
    model, images = AutoencoderKL(**SMALL), images_of(32)
    with torch.no_grad():
        moments, posterior = model.encoder(images), model.posterior(images)
    assert torch.equal(posterior.mean, moments[:, :4])
    assert_within(model.pixels(posterior.mean), model.decoder(posterior.mean), 1e-6)
    assert posterior.std.mean() < 0.5 * posterior.mean.std()


