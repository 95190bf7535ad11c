"""Encoders against features of the published wrappers on the same weights; their files; what they refuse."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation import encoders
from evaluation.encoders import (
    ENCODERS,
    EncoderFeatures,
    build_network,
    find_weights,
    look_for_weights,
    resample_as_hub,
    resize_by_pillow,
    resize_floats,
    resize_grey_levels,
)
from evaluation.fdr import FDR_ENCODERS
from evaluation.inception import MissingWeights
from evaluation.settings import ENCODERS as NAMES
from tests.replicas import DATA, KEYS, STORED, overrides_of, seeded_state, write_replicas

WRONG = {  # what a plausible mistake gives -> whose it is
    'convnext_with_head_norm': 'convnext', 'siglip_mean_token': 'siglip', 'clip_quickgelu': 'clip',
    'dinov2_at_252': 'dinov2', 'dinov2_timm_positions': 'dinov2_edm2'}


@pytest.fixture(scope='module')
def stored():
    with np.load(DATA / 'encoders.npz') as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope='module')
def images(stored):
    """8-bit images (B, 3, H, W) by the name of their size."""
    return {name: stored[f'images.{name}'].permute(0, 3, 1, 2) for name in ('i96', 'i256', 'i512')}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_replicas(tmp_path_factory.mktemp('encoders'))


@pytest.fixture(scope='module')
def replica(folder):
    """The small network of a row of the table, in float32."""
    made = {}

    def make(key):
        if key not in made:
            made[key] = EncoderFeatures(key, folder=str(folder), dtype='float32', **overrides_of(key))
        return made[key]
    return make


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Neither this user's weights nor the hub are looked at."""
    monkeypatch.delenv('ENCODER_WEIGHTS', raising=False)
    monkeypatch.setattr(encoders, 'locate', lambda name, *_, **__: refuse(name))


def refuse(name):
    raise ValueError(f'{name} cannot be fetched')


def largest(a, b):
    return (a - b).abs().max().item()


# ---------------------------------------------------------------------------------------------- stored values
@pytest.mark.parametrize('key', [key for key in KEYS if key in STORED['encoders']])
def test_weights_are_the_stored_ones(key):
    state = seeded_state(key)
    assert len(state) == STORED['encoders'][key]['tensors']
    for name, probe in STORED['encoders'][key]['probes'].items():
        assert state[name].flatten()[:3].tolist() == pytest.approx(probe['first3'], abs=1e-7), name
        assert state[name].double().sum().item() == pytest.approx(probe['sum'], abs=1e-4), name


@pytest.mark.parametrize('key', KEYS)
def test_features_are_the_published_ones(replica, images, stored, key):
    for size, images_u8 in images.items():
        features = replica(key)(images_u8)
        expected = stored[f'{key}.{size}']
        assert features.dtype == torch.float32 and features.shape == expected.shape
        assert largest(features, expected) <= 1e-4, size


@pytest.mark.parametrize('mistake', WRONG)
def test_plausible_mistakes_would_show(replica, images, stored, mistake):
    features = replica(WRONG[mistake])(images['i256'])
    assert largest(features, stored[f'wrong.{mistake}.i256']) > 1e-3


@pytest.mark.parametrize(('name', 'resize', 'size', 'side'), [
    ('fdr_256_to_224', resize_floats, 'i256', 224), ('fdr_512_to_256', resize_floats, 'i512', 256),
    ('dgm_256_to_224', resize_by_pillow, 'i256', 224), ('edm2_256_to_224', resize_grey_levels, 'i256', 224)])
def test_resizing(images, stored, name, resize, size, side):
    expected = stored[f'resize.{name}']
    resized = resize(images[size], side)[..., ::37, ::29]  # every 37th row, every 29th column
    assert resized.shape == expected.shape and largest(resized, expected) <= 2e-6


def test_positions_of_the_hub(stored):
    positions = stored['dinov2_hub.pos_embed_37_first4']
    assert largest(resample_as_hub(positions, 16), stored['dinov2_hub.pos_embed_16_first4']) <= 2e-6


# ---------------------------------------------------------------------------------------------- behaviour
def test_batches_do_not_change_features(replica, images):
    batch = torch.cat([images['i256'], images['i256'].flip(3), torch.full_like(images['i256'][:1], 77)])
    batch = batch.repeat(4, 1, 1, 1)[:18]  # more than are computed at once
    expected = replica('convnext')(batch)
    assert expected.isfinite().all()
    found = torch.cat([replica('convnext')(part) for part in batch[:7].split([1, 6])])
    assert largest(found, expected[:7]) <= 1e-5


def test_settings_of_the_caller_have_no_effect_and_stay(replica, images):
    expected = replica('mae')(images['i256'])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('medium')
    try:
        with torch.autocast('cpu', torch.bfloat16):
            features = replica('mae')(images['i256'])
            assert torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == torch.bfloat16
        assert torch.get_float32_matmul_precision() == 'medium'
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(features, expected) and not torch.is_autocast_enabled('cpu')


def test_half_precision(folder, images, monkeypatch):
    """The five encoders of FDr^6 are published in bfloat16, the other ones in float32."""
    half = {key for key, encoder in ENCODERS.items() if encoder.dtype == 'bfloat16'}
    assert half == set(FDR_ENCODERS) - {'inception'}
    monkeypatch.setattr(encoders, '_cpu_has_bfloat16', lambda: True)
    network = EncoderFeatures('mae', folder=str(folder), **overrides_of('mae'))
    exact = EncoderFeatures('mae', folder=str(folder), dtype='float32', **overrides_of('mae'))
    features, expected = network(images['i256']), exact(images['i256'])
    assert features.dtype == torch.float32 and 0 < largest(features, expected) < 0.1
    assert network.variant != exact.variant
    monkeypatch.setattr(encoders, '_cpu_has_bfloat16', lambda: False)
    with pytest.raises(ValueError, match='--encoder_dtype=float32'):
        EncoderFeatures('mae', folder=str(folder), **overrides_of('mae'))


def test_images_that_are_refused(replica, images):
    wide = images['i256'][:, :, :200]
    with pytest.raises(ValueError, match='square images, got 256x200'):
        replica('siglip')(wide)
    with pytest.raises(ValueError, match=r'8-bit images, got torch\.float32'):
        replica('siglip')(images['i256'].float())
    middle = images['i256'][:, :, :200, 28:228]
    assert torch.equal(replica('clip336')(wide), replica('clip336')(middle))  # its crop is part of CMMD
    assert replica('clip336')(wide).norm(dim=1).tolist() == pytest.approx([1] * len(wide), abs=1e-6)


def test_networks_are_loaded_when_they_are_used(folder, images):
    network = EncoderFeatures('mae', folder=str(folder), dtype='float32', **overrides_of('mae'))
    assert 'network' not in vars(network)
    features = network(images['i96'])
    network.free()
    assert 'network' not in vars(network) and torch.equal(network(images['i96']), features)


def test_building_draws_no_random_numbers():
    before = torch.get_rng_state()
    build_network(ENCODERS['mae'], **overrides_of('mae'))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------- the table
def test_every_name_of_the_settings_is_a_row():
    assert tuple(ENCODERS) == NAMES
    forbidden = {key for key, encoder in ENCODERS.items() if 'no commercial use' in encoder.licence}
    assert forbidden == {'convnext', 'mae'}
    for key, stored in STORED['encoders'].items():
        if 'timm' in stored:
            encoder = ENCODERS[key]
            assert (encoder.identifier, encoder.side) == (stored['timm'], stored['size'])
            assert encoder.mean == pytest.approx(stored['mean'], abs=1e-7)
            assert encoder.std == pytest.approx(stored['std'], abs=1e-7)


# ---------------------------------------------------------------------------------------------- files
def test_places_in_order(tmp_path, monkeypatch):
    identifier = ENCODERS['mae'].identifier
    places = []
    for place in ('given', 'variable', 'cache'):
        (tmp_path / place / identifier).mkdir(parents=True)
        places.append(tmp_path / place / f'{identifier}.safetensors')
        places.append(tmp_path / place / identifier / 'model.safetensors')
    monkeypatch.setenv('ENCODER_WEIGHTS', str(tmp_path / 'variable'))
    arguments = ('mae', str(tmp_path / 'given'), str(tmp_path / 'cache'))
    with pytest.raises(MissingWeights) as raised:
        find_weights(*arguments)
    message = str(raised.value)
    assert raised.value.exit_code == 3 and '\n' not in message
    for part in (*map(str, places), 'cache of the hub (timm/vit_large_patch16_224.mae)',
                 ENCODERS['mae'].url, '1.22 GB', '--encoder_weights', 'ENCODER_WEIGHTS'):
        assert part in message
    for path in reversed(places):  # each is preferred to those before
        path.write_bytes(b'')
        assert find_weights(*arguments) == path


def test_the_hub_is_asked_last_and_only_if_that_is_allowed(tmp_path, monkeypatch):
    asked = []

    def locate(name, revision, is_first=True):
        asked.append((name, is_first))
        if is_first:
            return tmp_path
        raise ValueError('not in the cache')
    monkeypatch.setattr(encoders, 'locate', locate)
    name = 'timm/vit_large_patch16_224.mae:model.safetensors'
    assert look_for_weights(ENCODERS['mae']).path is None
    with pytest.raises(MissingWeights):
        find_weights('mae')
    assert asked == [(name, False)] * 2
    assert find_weights('mae', download=True) == tmp_path and asked[2:] == [(name, False), (name, True)]
    monkeypatch.setattr(encoders, 'locate', lambda name, *_, **__: refuse(name))
    with pytest.raises(MissingWeights, match='and cannot download them'):
        find_weights('mae', download=True)


def test_pickles_are_refused(tmp_path):
    path = tmp_path / 'weights.pkl'
    path.write_bytes(b'cos\nsystem\n')
    with pytest.raises(ValueError, match=r'expected a folder of weights, got the file .*never read'):
        find_weights('mae', str(path))
    path.rename(tmp_path / f'{ENCODERS["mae"].identifier}.safetensors')
    with pytest.raises(ValueError, match='cannot be read'):
        EncoderFeatures('mae', folder=str(tmp_path), dtype='float32', **overrides_of('mae')).network  # noqa: B018


@pytest.mark.parametrize(('change', 'message'), [
    (lambda state: state.pop('norm.weight'), r'norm\.weight is missing'),
    (lambda state: state.update(extra=torch.zeros(2)), 'extra is of no use'),
    (lambda state: state.update({'norm.weight': torch.zeros(3)}), r'size mismatch for norm\.weight'),
    (lambda state: state.update({'head.weight': torch.zeros(3), 'fc_norm.bias': torch.zeros(2)}), None),
])
def test_keys(tmp_path, folder, images, replica, change, message):
    name = f'{ENCODERS["mae"].identifier}.safetensors'
    state = load_file(folder / name)
    change(state)
    save_file(state, tmp_path / name)
    network = EncoderFeatures('mae', folder=str(tmp_path), dtype='float32', **overrides_of('mae'))
    if message is None:  # heads that these features do not need
        assert torch.equal(network(images['i96']), replica('mae')(images['i96']))
        return
    with pytest.raises(ValueError, match=message):
        network(images['i96'])


def test_digests(tmp_path, folder, monkeypatch):
    plain = EncoderFeatures('mae', folder=str(folder), dtype='float32', **overrides_of('mae'))
    assert not plain.is_pinned
    for digest, is_pinned in ((plain.digest, True), ('0' * 64, False)):
        monkeypatch.setitem(ENCODERS, 'mae', replace(ENCODERS['mae'], sha256=digest))
        network = None
        if is_pinned:
            network = EncoderFeatures('mae', folder=str(folder), dtype='float32')
        else:
            with pytest.raises(ValueError, match=r'expected 0{16}\.\.\..*--allow_unverified_weights'):
                EncoderFeatures('mae', folder=str(folder), dtype='float32')
            network = EncoderFeatures('mae', folder=str(folder), dtype='float32', allow_unverified=True)
        assert network.is_pinned == is_pinned
    name = f'{ENCODERS["mae"].identifier}.safetensors'
    (tmp_path / name).write_bytes((folder / name).read_bytes()[:-1000])
    monkeypatch.setitem(ENCODERS, 'mae', replace(ENCODERS['mae'], sha256=''))
    with pytest.raises(ValueError, match='cannot be read'):
        EncoderFeatures('mae', folder=str(tmp_path), dtype='float32', **overrides_of('mae')).network  # noqa: B018


def test_a_missing_package_is_named(monkeypatch, folder):
    monkeypatch.setitem(__import__('sys').modules, 'timm', None)
    with pytest.raises(ValueError, match=r'pip install -r requirements-eval\.txt'):
        build_network(ENCODERS['mae'])


@pytest.mark.slow
@pytest.mark.parametrize('key', [key for key in KEYS if key not in ('dinov2_dgm', 'dinov2_edm2')])
def test_published_sizes(tmp_path, key):
    """Built with random weights, saved, loaded by the table's numbers alone."""
    encoder = ENCODERS[key]
    network = build_network(encoder)
    path = tmp_path / f'{encoder.identifier}.safetensors'
    save_file(network.state_dict(), path)
    del network
    features = EncoderFeatures(key, folder=str(tmp_path), dtype='float32')
    images_u8 = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    assert features(images_u8).shape == (1, encoder.num_features)
    megabytes = path.stat().st_size / 1e6
    number, unit = encoder.size.split()
    assert megabytes == pytest.approx(float(number) * dict(MB=1, GB=1000)[unit], rel=0.03)
    path.unlink()
