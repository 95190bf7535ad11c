"""The Inception network against stored features, and how its weights are found, fetched and verified."""
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from evaluation import inception
from evaluation.inception import SHA256, WEIGHTS, InceptionFeatures, MissingWeights, find_weights
from tests.seeded_inception import seeded_inception

DATA = Path(__file__).parent / 'data' / 'evaluation'
CASES = json.loads((DATA / 'cases.json').read_text())['inception']
NAMES = list(WEIGHTS)


@pytest.fixture(scope='session')
def state():
    """Random weights of the published shapes."""
    state = seeded_inception(CASES['weight_seed'])
    assert len(state) == 472
    for name, probe in CASES['probes'].items():
        assert torch.equal(state[name].flatten()[:5], torch.tensor(probe['first5'])), name
        assert state[name].double().sum().item() == pytest.approx(probe['sum_float64'], abs=1e-6), name
    return state


@pytest.fixture(scope='session')
def weights_file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp('inception') / 'seeded.pth'
    torch.save(state, path)
    return path


@pytest.fixture(scope='session')
def features(weights_file):
    return InceptionFeatures(str(weights_file), allow_unverified=True)


@pytest.fixture(autouse=True)
def nothing_is_here(tmp_path, monkeypatch):
    """No weights where the machine may have some, and no way to the network."""
    monkeypatch.delenv('INCEPTION_WEIGHTS', raising=False)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    serve(monkeypatch, tmp_path / 'no_server')


def serve(monkeypatch, path, digest=''):
    """Let both addresses be that of a local file, and its digest the published one."""
    monkeypatch.setattr(inception, 'WEIGHTS', dict.fromkeys(NAMES, path.as_uri()))
    monkeypatch.setattr(inception, 'SHA256', digest or SHA256)


def noise_u8(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------- network
@pytest.mark.parametrize('name', ['r64', 'r512', 'r32_checker', 'rect', 'one_pixel', 'two_by_two',
                                  'small_odd'])
def test_resize_is_that_of_tensorflow(name):
    with np.load(DATA / 'resize.npz') as arrays:
        source, rows, columns, expected = (torch.from_numpy(arrays[f'{name}.{key}'])
                                           for key in ('input', 'rows', 'cols', 'output'))
    size = (11, 13) if name == 'small_odd' else (299, 299)
    resized = interpolate_bilinear_2d_like_tensorflow1x(source.permute(0, 3, 1, 2).float(), size,
                                                        align_corners=False)
    assert (resized.permute(0, 2, 3, 1)[:, rows][:, :, columns] - expected).abs().max() <= 2e-4


@pytest.mark.parametrize('name', ['sq64', 'rect'])
def test_features_are_those_of_tensorflow(features, name):
    with np.load(DATA / 'inception.npz') as arrays:
        images, pool, spatial, logits = (torch.from_numpy(arrays[f'{name}.{key}']) for key in (
            'images', 'pool', 'spatial', 'logits_unbiased'))
    images = images.permute(0, 3, 1, 2)
    outputs = features.outputs(images)
    for actual, expected, tolerance in zip(outputs, (pool, spatial, logits), (2e-4, 2e-4, 1e-3), strict=True):
        assert actual.shape == expected.shape and actual.dtype == torch.float32
        assert (actual - expected).abs().max() <= tolerance
    sizes = features.num_features, features.num_spatial, features.num_classes
    assert tuple(t.shape[1] for t in outputs) == sizes
    if name == 'rect':  # float32 sums differ with the shape of a batch, no more than that
        assert torch.equal(features(images), outputs.pool)
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(features(images), outputs.pool)


def test_spatial_features_are_those_and_no_others(features):
    """The stored ones tell apart what has gone wrong in ports: layout, block, activation, channels."""
    with np.load(DATA / 'inception.npz') as arrays:
        images, expected = (torch.from_numpy(arrays[f'rect.{key}']) for key in ('images', 'spatial'))
    seen, block = {}, features.network.Mixed_6d.branch1x1
    hooks = [module.register_forward_hook(lambda *args, name=name: seen.update({name: args[-1].clone()}))
             for name, module in dict(right=block, later=features.network.Mixed_6e.branch1x1, norm=block.bn,
                                      earlier=features.network.Mixed_6c.branch1x1).items()]
    spatial = features.outputs(images.permute(0, 3, 1, 2)).spatial
    for hook in hooks:
        hook.remove()

    def flat(map_BCHW):
        return map_BCHW.permute(0, 2, 3, 1).flatten(1)
    right = flat(seen['right'][:, :7])
    wrong = dict(channels_first=seen['right'][:, :7].flatten(1), later_block=flat(seen['later'][:, :7]),
                 earlier_block=flat(seen['earlier'][:, :7]), before_relu=flat(seen['norm'][:, :7]),
                 last_channels=flat(seen['right'][:, -7:]), next_channels=flat(seen['right'][:, 1:8]))
    for actual in (spatial, right):
        assert (actual - expected).abs().max() <= 2e-4
    for name, values in wrong.items():
        assert values.shape == expected.shape and (values - expected).abs().max() > 0.1, name


def test_batches_of_any_size_give_the_same_features(features):
    images = noise_u8(7, 3, 24, 40)
    whole = features.outputs(images)
    for i in (0, 6):
        for all_at_once, alone in zip(whole, features.outputs(images[i:i + 1]), strict=True):
            assert (all_at_once[i] - alone[0]).abs().max() <= 1e-4
    assert [t.shape[0] for t in features.outputs(images[:0])] == [0, 0, 0]


def test_network_runs_in_full_precision_and_the_caller_does_not(features):
    seen = []
    hook = features.network.AvgPool.register_forward_hook(lambda *_: seen.append((
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
        torch.is_inference_mode_enabled(), features.network.training)))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision('high')
        torch.backends.cudnn.allow_tf32 = True
        features(noise_u8(1, 3, 8, 8))
        assert seen == [('highest', False, True, False)]
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ('high', True)
    finally:
        hook.remove()
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# ---------------------------------------------------------------------------------------------- files
@pytest.mark.slow
def test_weights_with_counters_and_in_float64(tmp_path, features):
    """Saved networks have num_batches_tracked and versions of layers, the published file has neither."""
    path, images = tmp_path / 'saved.pth', noise_u8(1, 3, 16, 16)
    torch.save(features.network.state_dict(), path)
    assert sum(name.endswith('num_batches_tracked') for name in torch.load(path)) == 94
    again = InceptionFeatures(str(path), allow_unverified=True, dtype='float64')
    assert (features.dtype, again.dtype) == ('float32', 'float64')  # by which names of scores tell them apart
    for expected, actual in zip(features.outputs(images), again.outputs(images), strict=True):
        assert actual.dtype == torch.float32 and 0 < (actual - expected).abs().max() <= 1e-4
    stripped = features.network.state_dict()  # keeps the versions
    for name in [name for name in stripped if name.endswith('num_batches_tracked')]:
        del stripped[name]
    torch.save(stripped, path)
    assert torch.equal(InceptionFeatures(str(path), allow_unverified=True)(images), features(images))


def test_other_content_is_refused(state, tmp_path):
    path, zero = tmp_path / 'other.pth', torch.zeros(())
    shaped = {name: zero.expand(t.shape) for name, t in state.items()}  # files of these are small
    missing = {name: t for name, t in shaped.items() if name != 'fc.bias'}
    for content, reason in ((missing, r'Missing key.*fc\.bias'),
                            (shaped | dict(more=zero), 'Unexpected key.*more'),
                            (missing | {'fc.bias': zero.expand(1000)}, r'mismatch for fc\.bias'),
                            (shaped | {'fc.bias': 'text'}, r'fc\.bias'), ({1: zero}, '')):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"other.pth' holds no Inception weights.*{reason}") as raised:
            InceptionFeatures(str(path), allow_unverified=True)
        assert '\n' not in str(raised.value)
    torch.save(shaped, path)
    InceptionFeatures(str(path), allow_unverified=True)
    for content in (b'', path.read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match='cannot be read'):
            InceptionFeatures(str(path), allow_unverified=True)


def test_code_in_a_file_does_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'ran',)
    path = tmp_path / 'harmful.pth'
    for save in (torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, protocol=2))):
        save({'fc.bias': Harmful()}, path)
        with pytest.raises(ValueError, match='cannot be read'):
            InceptionFeatures(str(path), allow_unverified=True)
    assert not (tmp_path / 'ran').exists()


def test_only_the_published_file_is_verified(weights_file, tmp_path, monkeypatch, features):
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert features.digest == digest
    with pytest.raises(ValueError, match=rf'SHA-256 {digest[:16]}.*95,628,359.*allow_unverified_weights'):
        InceptionFeatures(str(weights_file))
    serve(monkeypatch, weights_file, digest)
    assert InceptionFeatures(str(weights_file)).digest == digest
    truncated = tmp_path / NAMES[0]
    truncated.write_bytes(weights_file.read_bytes()[:12345])
    with pytest.raises(ValueError, match=r'has 12,345 bytes.*download it again'):
        InceptionFeatures(str(truncated))


def test_missing_package(weights_file, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_fidelity.feature_extractor_inceptionv3', None)
    with pytest.raises(ValueError, match="pip install 'torch-fidelity"):
        InceptionFeatures(str(weights_file), allow_unverified=True)


# ---------------------------------------------------------------------------------------------- places
def test_places_in_order(tmp_path, monkeypatch):
    cache, hub = tmp_path / 'cache', tmp_path / 'hub' / 'checkpoints'
    for folder in (hub, cache):  # each is preferred to those before
        folder.mkdir(parents=True)
        for name in reversed(NAMES):
            (folder / name).write_bytes(b'')
            assert find_weights(cache=str(cache)) == folder / name
    assert find_weights() == hub / NAMES[0]
    for place in ('variable', 'named'):
        path = tmp_path / f'{place}.pth'
        path.write_bytes(b'')
        if place == 'variable':
            monkeypatch.setenv('INCEPTION_WEIGHTS', str(path))
        assert find_weights(str(path) if place == 'named' else '', str(cache)) == path
    with pytest.raises(MissingWeights, match=r'at \S*nowhere\.pth: fetch'):  # no other file takes its place
        find_weights(str(tmp_path / 'nowhere.pth'), str(cache), download=True)


def test_message_of_missing_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, 'WEIGHTS', WEIGHTS)
    with pytest.raises(MissingWeights) as raised:
        find_weights(cache=str(tmp_path / 'cache'))
    message = str(raised.value)
    assert '\n' not in message
    for folder in (tmp_path / 'cache', tmp_path / 'hub' / 'checkpoints'):
        assert all(str(folder / name) in message for name in NAMES)
    for part in (WEIGHTS[NAMES[0]], '95,628,359 bytes', SHA256, '--inception_weights', 'INCEPTION_WEIGHTS'):
        assert part in message


def test_tensorflow_graphs_are_refused(tmp_path):
    path = tmp_path / 'classify_image_graph_def.pb'
    path.write_bytes(b'graph')
    with pytest.raises(ValueError, match=rf'TensorFlow graph .*{NAMES[0]}.*file://') as raised:
        find_weights(str(path))
    assert not isinstance(raised.value, MissingWeights)


# ---------------------------------------------------------------------------------------------- download
def test_download(tmp_path, monkeypatch):
    source, cache = tmp_path / 'source', tmp_path / 'new' / 'cache'
    source.write_bytes(b'weights')
    digest = hashlib.sha256(b'weights').hexdigest()
    serve(monkeypatch, source, digest)
    with pytest.raises(MissingWeights):
        find_weights(cache=str(cache))
    assert not cache.exists()
    path = find_weights(cache=str(cache), download=True)
    assert path == cache / NAMES[0] and path.read_bytes() == b'weights'
    source.unlink()
    assert find_weights(cache=str(cache), download=True) == path  # is not fetched again
    source.write_bytes(b'weights')
    assert find_weights(download=True) == tmp_path / 'hub' / 'checkpoints' / NAMES[0]


def test_second_address_where_the_first_fails(tmp_path, monkeypatch):
    (tmp_path / 'good').write_bytes(b'weights')
    (tmp_path / 'bad').write_bytes(b'a page of a proxy')
    serve(monkeypatch, tmp_path, hashlib.sha256(b'weights').hexdigest())
    for first in ('bad', 'nowhere'):
        addresses = [(tmp_path / name).as_uri() for name in (first, 'good')]
        monkeypatch.setattr(inception, 'WEIGHTS', dict(zip(NAMES, addresses, strict=True)))
        cache = tmp_path / f'cache_{first}'
        assert find_weights(cache=str(cache), download=True).read_bytes() == b'weights'


def test_downloads_need_no_locks(tmp_path, monkeypatch, caplog):
    """File systems of clusters may have none."""
    def no_locks(*_):
        raise OSError(errno.ENOLCK, 'No locks available')
    (tmp_path / 'source').write_bytes(b'weights')
    serve(monkeypatch, tmp_path / 'source', hashlib.sha256(b'weights').hexdigest())
    monkeypatch.setattr(fcntl, 'lockf', no_locks)
    path = find_weights(cache=str(tmp_path / 'cache'), download=True)
    assert path.read_bytes() == b'weights' and 'has no locks' in caplog.text


def test_downloads_that_fail(tmp_path, monkeypatch):
    cache, source = tmp_path / 'cache', tmp_path / 'source'
    with pytest.raises(MissingWeights, match=r'cannot download them \(file:.*no_server.*; file:.*\): fetch'):
        find_weights(cache=str(cache), download=True)
    source.write_bytes(b'truncat')
    serve(monkeypatch, source)
    with pytest.raises(MissingWeights, match=r'7 bytes with SHA-256 \w{64} came'):
        find_weights(cache=str(cache), download=True)
    assert not [path for path in cache.iterdir() if not path.name.endswith('.lock')]  # nothing half done
    (tmp_path / 'file').write_bytes(b'')
    with pytest.raises(MissingWeights, match='cannot download'):  # no folder can be made there
        find_weights(cache=str(tmp_path / 'file' / 'cache'), download=True)


def test_processes_that_download_at_once(tmp_path, monkeypatch):
    """One fetches from a slow server, the others wait and find the file."""
    processes = multiprocessing.get_context('fork')
    begin, requests, found = processes.Barrier(3), processes.Value('i', 0), processes.Value('i', 0)

    def slow(url, timeout):
        with requests.get_lock():
            requests.value += 1
        time.sleep(0.5)
        return io.BytesIO(b'weights')

    def run():
        begin.wait()
        path = find_weights(cache=str(tmp_path / 'cache'), download=True)
        with found.get_lock():
            found.value += path.read_bytes() == b'weights'
    serve(monkeypatch, tmp_path, hashlib.sha256(b'weights').hexdigest())
    monkeypatch.setattr(inception.urllib.request, 'urlopen', slow)
    runs = [processes.Process(target=run) for _ in range(3)]
    for process in runs:
        process.start()
    for process in runs:
        process.join(timeout=60)
    assert (requests.value, found.value, [process.exitcode for process in runs]) == (1, 3, [0, 0, 0])
