"""Token caches: what is stored of an image, restart, training on them, import, and caches that do not fit."""
import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import socket
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

import extract
import train
from configs import parse_training
from configs.options import make_parser
from models import VQVAE, AutoencoderKL, VQModel
from tests.runs import (
    CACHE_FLAG,
    CLASSES,
    NUM_IMAGES,
    REPO,
    SIDE,
    STRIDE,
    TOKENIZER_FLAG,
    WHOLE,
    assert_equal,
    extraction,
    kill_tree,
    launch,
    make_folder,
    prepared,
    read,
    start,
    steps_of,
    training,
)
from tests.vectors import load_json, load_tensors
from training.data import Data, build_data
from utils import data, token_cache
from utils.data import (
    KeyedAugmentation,
    MirroredCrops,
    adm_center_crop,
    build_transforms,
    describe_data,
    open_split,
    ten_crop_views,
)
from utils.log import one_line_errors
from utils.token_cache import PackedWriter, TokenCache, weights_digest

LAYOUTS = [('flowar', 'packed'), ('flowar', 'files'), ('npp', 'packed')]


@pytest.fixture(scope='session')
def made(families):
    """(image folder, tokenizer file, tokenizer) of FlowAR."""
    return families['flowar']


def centre_views(image):
    """The centre crop and its mirror image (2, 3, SIDE, SIDE) in [-1, 1]."""
    crop = adm_center_crop(image, SIDE)
    return torch.stack([to_tensor(view) * 2 - 1 for view in (crop, ImageOps.mirror(crop))])


def tokens_of(tokenizer, image, crop_range=0.):
    """(A, ...) of the views of a PIL image, by itself."""
    views = ten_crop_views(image, SIDE, crop_range) if crop_range else centre_views(image)
    return tokenizer.precompute(views).numpy()


def drawn(cache, index, count):
    """Tokens that accesses with other seeds give."""
    for seed in range(count):
        torch.manual_seed(seed)
        yield cache[index][0].numpy()


def which(tokens, expected):
    """Index of the tokens among the expected ones, all of which differ."""
    close = [np.abs(tokens - e).max() < 1e-5 for e in expected]
    assert sum(close) == 1
    return close.index(True)


def write_square(root, splits=('train', 'val')):
    """Images that no crop changes, of the classes of `make_folder`."""
    rng = np.random.RandomState(0)
    for split in splits:
        for i in range(NUM_IMAGES if split == 'train' else 8):
            path = root / split / CLASSES[i % 4] / f'{i:02d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.randint(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return root


# ---------------------------------------------------------------------------------------------- views
@pytest.mark.parametrize('case', load_json('npp/data')['cases'], ids=lambda case: f'{case["image_size"]}')
def test_ten_crops_are_the_published_ones(case):
    vectors, size = load_tensors('npp/data'), case['image_size']
    views = ten_crop_views(Image.fromarray(vectors['src'].numpy()), size, case['crop_range'])
    expected = vectors[f'tencrop_{size}_{case["crop_range"]}'].permute(0, 3, 1, 2)
    assert views.shape == expected.shape
    assert (views.add(1).mul(127.5).round() - expected.float()).abs().max() <= 1, 'PIL may round elsewhere'


@pytest.mark.parametrize(('name', 'expected'), load_json('npp/data')['crop_sizes'].items())
def test_ten_crops_are_of_the_published_larger_crop(name, expected, monkeypatch):
    def stop(image, size):
        raise KeyError(size)
    monkeypatch.setattr(data, 'adm_center_crop', stop)
    size, crop_range = name.split('x')
    with pytest.raises(KeyError) as sizes:
        ten_crop_views(Image.new('RGB', (8, 8)), int(size), float(crop_range))
    assert sizes.value.args == (expected,)


def test_order_of_the_views():
    """Top left, top right, bottom left, bottom right, centre; the same of the mirror image."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (60, 50, 3), dtype=np.uint8))
    large = np.asarray(adm_center_crop(image, 35))
    expected = [whole[top:top + 32, left:left + 32] for whole in (large, large[:, ::-1])
                for top, left in ((0, 0), (0, 3), (3, 0), (3, 3), (2, 2))]
    views = ten_crop_views(image, 32, 1.1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(views, expected)


@pytest.mark.parametrize(('model', 'layout', 'crop_range'), [
    ('flowar', 'packed', 0.), ('flowar', 'files', 0.), ('npp', 'packed', 0.), ('npp', 'packed', 1.1)])
def test_tokens_are_those_of_the_views(families, here, tmp_path, model, layout, crop_range):
    made, folder = families[model], tmp_path / 'cache'
    more = ['--ten-crop', f'--crop-range={crop_range}'] if crop_range else []
    here(extract, *extraction(made, folder, f'--layout={layout}', *more, model=model))
    images = open_split(str(made[0]), 'train')
    cache, fair, fixed = (TokenCache(folder), TokenCache(folder, hflip=False), TokenCache(folder, fixed=True))
    assert len(cache) == len(images) and cache.classes == images.classes
    assert cache.targets.tolist() == images.targets
    for i in (0, 17, 39):
        expected = tokens_of(made[2], images[i][0], crop_range)
        num_views = len(expected)
        count = 8 * num_views
        assert num_views == (10 if crop_range else 2)
        stored = [cache.parts[0].read(i, view) for view in range(num_views)]
        assert [which(tokens, expected) for tokens in stored] == list(range(num_views))
        assert {which(tokens, expected) for tokens in drawn(cache, i, count)} == set(range(num_views))
        assert {which(tokens, expected) for tokens in drawn(fair, i, count)} == set(range(num_views // 2))
        assert {which(tokens, expected) for tokens in drawn(fixed, i, 9)} == {0}
        assert cache[i][1] == images.targets[i] and cache[i][0].dtype in (torch.float32, torch.int64)
    keyed = KeyedAugmentation(cache, seed=3)
    assert torch.equal(keyed[2, 5][0], keyed[2, 5][0]), 'a restart chooses the same one'


def test_two_folders_are_both_read(families, here, tmp_path):
    made = families['npp']
    for crop_range in (1.1, 1.05):
        here(extract, *extraction(made, tmp_path / f'{crop_range}', '--ten_crop',
                                  f'--crop_range={crop_range}', model='npp'))
    image = open_split(str(made[0]), 'train')[7][0]
    expected = [tokens for crop_range in (1.1, 1.05) for tokens in tokens_of(made[2], image, crop_range)]
    both = f'{tmp_path / "1.1"},{tmp_path / "1.05"}'
    for cache, views in ((TokenCache(both), range(20)), (TokenCache(both, fixed=True), [0]),
                         (TokenCache(both, hflip=False), [*range(5), *range(10, 15)])):
        seen = {tokens.tobytes() for tokens in drawn(cache, 7, 150)}
        assert seen == {expected[view].tobytes() for view in views}
    assert len({tokens.tobytes() for tokens in expected}) > 15


def test_published_layout(made, here, tmp_path):
    """`<class>/<file name>.npz` with two float32 arrays; read without a manifest, too, with a warning."""
    here(extract, *extraction(made, tmp_path / 'cache', '--layout=files'))
    path = tmp_path / 'cache' / 'ant' / '00.png.npz'
    with np.load(path) as file:
        assert sorted(file) == ['moments', 'moments_flip']
        assert all(file[name].shape == (8, 4, 4) and file[name].dtype == np.float32 for name in file)
    for name in ('manifest.json', 'settings.json', 'labels.npy'):
        (tmp_path / 'cache' / name).unlink(missing_ok=True)
    assert len(TokenCache(tmp_path / 'cache')) == 40


# ---------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize('model', ['flowar', 'npp'])
def test_training_on_tokens_is_training_on_the_images(families, here, tmp_path, model):
    """Step by step, whether validation reads images or tokens; what is in a cache need not be on disk."""
    made = (write_square(tmp_path / 'images'), *families[model][1:])
    for split in ('train', 'val'):
        here(extract, *extraction(made, tmp_path / split, f'--split={split}', model=model))
    here(train, *training(made, tmp_path / 'live', '--hflip=0', model=model))
    shutil.rmtree(tmp_path / 'images' / 'train')
    output = CACHE_FLAG[model]
    cached = f'--{output}={tmp_path / "train"}', '--hflip=0'
    here(train, *training(made, tmp_path / 'cached', *cached, model=model))
    here(train, *training(('/nowhere', *made[1:]), tmp_path / 'both', *cached,
                          f'--cached_val_path={tmp_path / "val"}', model=model))
    live, *others = (((tmp_path / name / 'steps.jsonl').read_text().splitlines(),
                      read(tmp_path / name)['run']['validation']) for name in ('live', 'cached', 'both'))
    assert len(live[0]) > 3 and live[1]['count'] == 8
    for lines, validation in others:
        for line, expected in zip(lines, live[0], strict=True):
            assert json.loads(line) == pytest.approx(json.loads(expected), rel=1e-4, nan_ok=True)
        assert validation == pytest.approx(live[1], rel=1e-4)
        assert model == 'flowar' or (lines, validation) == live, 'codes are exact'


class LiveViews(Dataset):
    """The crops that a cache of random crops holds, as images: the same view at every access as in it."""

    def __init__(self, config, count, seed):
        crop, _ = build_transforms(config.image_size, False, config.mid_reso, config.crop)
        self.views = MirroredCrops(open_split(config.data_path, 'train'), crop, count, seed)
        self.classes, self.targets = self.views.images.classes, self.views.images.targets

    def __len__(self):
        return len(self.views)

    def __getitem__(self, index):
        torch.randint(1, ())  # which folder
        view = int(torch.randint(2 * self.views.count, ()))
        images, label = self.views[index]
        return images[view], label


@pytest.mark.parametrize('model', [pytest.param('var', marks=pytest.mark.slow), 'flexvar'])
def test_training_on_stored_crops_is_training_on_these_crops(families, here, tmp_path, model):
    """Every loss, metric, weight and score is equal to the last bit, whatever validation reads."""
    made = families[model]
    here(extract, *extraction(made, tmp_path / 'train', '--views=3', '--seed=5', model=model))
    here(extract, *extraction(made, tmp_path / 'val', '--split=val', model=model))
    assert np.load(tmp_path / 'train' / 'tokens.npy').shape == (40, 6, 21 if model == 'var' else 91)

    flags = [*WHOLE[model], '--hflip=1']
    live = parse_training(training(made, tmp_path / 'live', *flags, model=model))
    images = build_data(live)
    train.train(train.Run(live, Data(LiveViews(live, 3, 5), images.val, images.classes)))
    cached = training(made, tmp_path / 'cached', *flags, f'--cached_path={tmp_path / "train"}', model=model)
    here(train, *cached)
    expected, found = read(tmp_path / 'live'), read(tmp_path / 'cached')
    assert len(steps_of(tmp_path / 'live')) > 4
    assert steps_of(tmp_path / 'cached') == steps_of(tmp_path / 'live')
    assert_equal(found['trainer'], expected['trainer'])
    assert found['run'] == expected['run']

    on_tokens_alone = prepared([*cached, '--data_path=/nowhere', f'--cached_val_path={tmp_path / "val"}'])
    validation = on_tokens_alone.trainer.eval_epoch(on_tokens_alone.val_loader)
    assert validation == expected['run']['validation'] and validation['count'] == 8


def test_stored_moments_are_as_good_as_the_image(made):
    """Equal noise gives equal latents."""
    tokenizer, images = made[2], torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    torch.manual_seed(1)
    live = tokenizer.encode(images)
    torch.manual_seed(1)
    assert torch.equal(tokenizer.encode(tokenizer.moments(images)), live)


def test_continued_training_accepts_the_published_resume(made, here, tmp_path):
    """It is the output folder, and no setting of the training."""
    here(train, *training(made, tmp_path, '--steps=1'))
    here(train, *training(made, tmp_path, '--steps=1', f'--resume={tmp_path}'))
    assert 'settings differ' not in (tmp_path / 'stdout.txt').read_text()


# ---------------------------------------------------------------------------------------------- restart
def count_encoded(monkeypatch, cls, stop_at=None):
    """List of the sizes of all batches that reach the tokenizer, but for black images."""
    seen, precompute = [], cls.precompute

    def counted(self, images):
        if images.any():
            if len(seen) == stop_at:
                raise ValueError('stop')
            seen.append(len(images))
        return precompute(self, images)
    monkeypatch.setattr(cls, 'precompute', counted)
    return seen


def contents(folder):
    """Bytes of every file of tokens, by its path."""
    paths = (path for path in folder.rglob('*') if path.suffix in ('.npy', '.npz'))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(('model', 'layout'), LAYOUTS)
def test_interrupted_extraction_continues(families, here, stops, tmp_path, monkeypatch, model, layout):
    made, straight, broken = families[model], tmp_path / 'a', tmp_path / 'b'
    monkeypatch.setattr(token_cache, 'FLUSH_EVERY', 1)
    here(extract, *extraction(made, straight, f'--layout={layout}', model=model))
    arguments = extraction(made, broken, f'--layout={layout}', model=model)
    with monkeypatch.context() as patch:
        count_encoded(patch, type(made[2]), stop_at=3)
        assert stops(extract, *arguments) == 'extract: stop'
    with pytest.raises(ValueError, match=r'is not complete: run the same extract\.py command again'):
        TokenCache(broken)
    for expected in ([16, 16, 8, 8], []):  # one batch of sixteen with its mirror images was stored
        with monkeypatch.context() as patch:
            seen = count_encoded(patch, type(made[2]))
            here(extract, *arguments)
        assert seen == expected
    assert contents(broken) == contents(straight)


def test_interrupted_extraction_of_random_crops_continues(families, here, stops, tmp_path, monkeypatch):
    """With the crops that it would have had; other crops are another extraction."""
    def flags(folder, *more):
        return extraction(families['var'], folder, '--views=2', '--seed=1', *more, model='var')
    monkeypatch.setattr(token_cache, 'FLUSH_EVERY', 1)
    here(extract, *flags(tmp_path / 'a'))
    with monkeypatch.context() as patch:
        count_encoded(patch, VQVAE, stop_at=7)
        assert stops(extract, *flags(tmp_path / 'b')) == 'extract: stop'
    others = stops(extract, *flags(tmp_path / 'b', '--seed=2', '--views=3', '--mid_reso=1.5', '--crop=adm'))
    assert 'was begun with another crop, mid_reso, seed, views ' in others
    with monkeypatch.context() as patch:
        seen = count_encoded(patch, VQVAE)
        here(extract, *flags(tmp_path / 'b'))
    assert seen == [8] * 16, 'one batch of eight images, with four views of each, was stored'
    assert contents(tmp_path / 'b') == contents(tmp_path / 'a')


def run_rank(rank, port, argv):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2',
                      MASTER_ADDR='localhost', MASTER_PORT=str(port))
    sys.argv = ['extract.py', *argv]
    with one_line_errors('extract.py'):
        extract.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason='forks, which CUDA does not survive')
@pytest.mark.parametrize(('model', 'layout'), LAYOUTS)
def test_two_processes_write_the_same_tokens(families, here, tmp_path, model, layout):
    made = families[model]
    here(extract, *extraction(made, tmp_path / 'one', f'--layout={layout}', model=model))
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    flags = extraction(made, tmp_path / 'two', f'--layout={layout}', model=model)
    processes = [multiprocessing.get_context('fork').Process(target=run_rank, args=(rank, port, flags))
                 for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = contents(tmp_path / 'one'), contents(tmp_path / 'two')
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'layout'), LAYOUTS)
def test_killed_ranks_leave_what_they_stored(families, here, tmp_path, monkeypatch, model, layout):
    made, folder = families[model], tmp_path / 'cache'
    here(extract, *extraction(made, tmp_path / 'straight', f'--layout={layout}', model=model))
    script = tmp_path / 'slowly.py'
    script.write_text(f'import sys, time\nsys.path.insert(0, {str(REPO)!r})\n'
                      'import extract\nfrom utils import token_cache\n'
                      'token_cache.FLUSH_EVERY = 1\nencoded = extract.tokens_of\n'
                      'extract.tokens_of = lambda *args: time.sleep(0.3) or encoded(*args)\nextract.main()\n')
    arguments = extraction(made, folder, f'--layout={layout}', '--batch_size=2', model=model)

    def stored():
        if layout == 'files':
            return len(list(folder.rglob('*.npz')))
        done = folder / 'done.npy'
        return int(np.load(done).sum()) if done.is_file() else 0
    process, begin = start(script, arguments, nproc=2), time.time()
    while stored() < 9 and time.time() - begin < 120:
        time.sleep(0.05)
    kill_tree(process.pid)
    process.wait()
    count = stored()
    assert 9 <= count < 40 and not (folder / 'manifest.json').exists()
    seen = count_encoded(monkeypatch, type(made[2]))
    here(extract, *arguments)
    assert sum(seen) == 2 * (40 - count)
    one, two = TokenCache(tmp_path / 'straight'), TokenCache(folder)
    for i in range(40):
        for view in (0, 1):
            assert np.allclose(one.parts[0].read(i, view), two.parts[0].read(i, view), atol=1e-5)


@pytest.mark.slow
def test_two_processes_of_torchrun(families, here, tmp_path):
    here(extract, *extraction(families['npp'], tmp_path / 'one', model='npp'))
    launch('extract.py', extraction(families['npp'], tmp_path / 'two', model='npp'), nproc=2)
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')


def test_no_manifest_while_anything_is_missing(made, stops, tmp_path, monkeypatch):
    monkeypatch.setattr(PackedWriter, 'put', lambda *args: None)
    message = stops(extract, *extraction(made, tmp_path / 'cache'))
    assert 'all 40 images' in message and '40 are missing: run the same command again' in message
    assert not (tmp_path / 'cache' / 'manifest.json').exists()


def test_full_disk_is_one_line(made, here, stops, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    one_line = f'{tmp_path / "cache"}.*No space left on device.*: free some space'
    with monkeypatch.context() as patch:
        patch.setattr(os, 'posix_fallocate', full)
        assert re.search(one_line, stops(extract, *extraction(made, tmp_path / 'cache')))
    assert sorted(path.name for path in (tmp_path / 'cache').iterdir()) == ['.lock', 'settings.json']
    with monkeypatch.context() as patch:
        patch.setattr(os, 'pwrite', full)
        assert re.search(one_line, stops(extract, *extraction(made, tmp_path / 'cache')))
    here(extract, *extraction(made, tmp_path / 'cache'))
    assert len(TokenCache(tmp_path / 'cache')) == 40


def test_unreadable_image_stops_with_a_line(made, stops, tmp_path):
    folder = make_folder(tmp_path / 'images')
    (folder / 'train' / 'ant' / '00.png').write_bytes(b'no image')
    assert 'expected an image, cannot read' in stops(extract, *extraction((folder, made[1]), tmp_path / 'c'))


# ---------------------------------------------------------------------------------------------- names
def assert_round_trip(made, here, data_path, folder, split='train'):
    """Every image is found in the files, under its own class; the paths of the files."""
    here(extract, *extraction((data_path, *made[1:]), folder, '--layout=files', f'--split={split}'))
    images, cache = open_split(str(data_path), split), TokenCache(folder, fixed=True)
    assert cache.classes == list(images.classes) and len(cache) == len(images)
    live = made[2].precompute(torch.stack([centre_views(image)[0] for image, _ in images])).numpy()
    found = [which(cache[i][0].numpy(), live) for i in range(len(cache))]
    assert sorted(found) == list(range(len(images)))
    assert [images.targets[i] for i in found] == cache.targets.tolist()
    return {str(path.relative_to(folder)) for path in folder.rglob('*.npz')}


def noise(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)


def test_equal_names_in_nested_folders(made, here, tmp_path):
    """One of them is called as the class is."""
    names = ['bee/0.png', 'ant/0.png', 'ant/old/0.png', 'ant/old/ant/0.png']
    for seed, name in enumerate(names):
        noise(tmp_path / 'images' / 'train' / name, seed)
    paths = assert_round_trip(made, here, tmp_path / 'images', tmp_path / 'cache')
    assert paths == {f'{name}.npz' for name in names}


def write_list(root, classes=11):
    lines = []
    for seed in range(2 * classes):
        noise(root / 'train' / f'{seed}.png', seed)
        lines.append(f'{seed}.png {seed % classes}\n')
    (root / 'train.txt').write_text(''.join(lines))
    return root


def test_lists_round_trip(made, here, tmp_path):
    """Where class 10 sorts before class 2."""
    paths = assert_round_trip(made, here, write_list(tmp_path / 'images'), tmp_path / 'cache')
    assert paths == {f'{i % 11}/{i}.png.npz' for i in range(22)}


@pytest.mark.parametrize('write', [write_square, write_list])
def test_the_place_of_the_images_is_no_setting(made, here, tmp_path, monkeypatch, write):
    root = write(tmp_path / 'images')
    here(extract, *extraction((root, *made[1:]), tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        seen = count_encoded(patch, AutoencoderKL)
        here(extract, *extraction(('images', *made[1:]), tmp_path / 'cache'))
        here(extract, *extraction((root.rename(tmp_path / 'moved'), *made[1:]), tmp_path / 'cache'))
    assert seen == []


class FewShapes(data.Shapes):
    def __init__(self, *args):
        super().__init__(*args)
        self.images_u8, self.targets = self.images_u8[:33], self.targets[:33]


def test_embedded_sets_round_trip(made, here, tmp_path, monkeypatch):
    """Their classes are not in alphabetical order."""
    monkeypatch.setitem(data.EMBEDDED, 'toy', FewShapes)
    paths = assert_round_trip(made, here, 'toy', tmp_path / 'cache', 'val')
    assert {'stripes/000003.npz', 'triangle/000032.npz'} < paths and len(paths) == 33


# ---------------------------------------------------------------------------------------------- misfits
@pytest.fixture(scope='module')
def caches(families, tmp_path_factory):
    """Complete caches by (model, layout); tests copy them before they change anything."""
    root = tmp_path_factory.mktemp('caches')
    for model, layout in LAYOUTS:
        settings = make_parser(extract.ExtractSettings, 'extract.py', '').parse(
            extraction(families[model], root / f'{model}_{layout}', f'--layout={layout}', model=model))
        extract.extract(extract.ExtractSettings(**settings))
    return root


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(('change', 'message'), [
    (lambda cache: shutil.rmtree(cache), 'expected tokens in .*, found no such folder: run extract'),
    (lambda cache: [path.unlink() for path in cache.iterdir()], 'found neither: run extract'),
    (lambda cache: edit_json(cache / 'manifest.json', tokenizer='x'), 'of another tokenizer .*npp.pth'),
    (lambda cache: edit_json(cache / 'manifest.json', image_size=64), 'of images of 64 pixels.* has 32'),
    (lambda cache: edit_json(cache / 'manifest.json', classes=['x']), 'of one data set'),
    (lambda cache: edit_json(cache / 'manifest.json', classes=['bee', 'ant', 'cow', 'doe']), 'their order'),
    (lambda cache: (cache / 'manifest.json').unlink(), 'is not complete: run the same extract'),
    (lambda cache: cut(cache / 'manifest.json', 9), r'expected JSON in .*manifest\.json'),
    (lambda cache: [(cache / name).unlink() for name in ('manifest.json', 'settings.json')],
     'expected manifest.json, labels.npy and tokens.npy'),
    (lambda cache: (cache / 'labels.npy').unlink(), 'expected manifest.json, labels.npy and tokens.npy'),
    (lambda cache: cut(cache / 'labels.npy', 200), 'expected manifest.json, labels.npy and tokens.npy'),
    (lambda cache: cut(cache / 'labels.npy', 0), 'expected manifest.json, labels.npy and tokens.npy'),
    (lambda cache: np.save(cache / 'labels.npy', np.zeros(39, int)), '39 labels, 40 images'),
    (lambda cache: cut(cache / 'tokens.npy', 900), 'expected manifest.json, labels.npy and tokens.npy'),
    (lambda cache: cut(cache / 'tokens.npy', 0), 'expected manifest.json, labels.npy and tokens.npy'),
])
def test_packed_caches_that_do_not_fit(families, caches, stops, tmp_path, change, message):
    shutil.copytree(caches / 'npp_packed', tmp_path / 'cache')
    change(tmp_path / 'cache')
    line = stops(train, *training(families['npp'], tmp_path / 'out', f'--code_path={tmp_path / "cache"}',
                                  model='npp'))
    assert re.search(message, line), line


@pytest.fixture(scope='module')
def pyramids(families, tmp_path_factory):
    """Complete caches of VAR and FlexVAR by model."""
    root = tmp_path_factory.mktemp('pyramids')
    parser = make_parser(extract.ExtractSettings, 'extract.py', '')
    for model in ('var', 'flexvar'):
        flags = extraction(families[model], root / model, model=model)
        extract.extract(extract.ExtractSettings(**parser.parse(flags)))
    return root


@pytest.mark.parametrize(('model', 'more', 'message'), [
    ('var', ['--pn=1_3_4'], r'v_patch_nums=\[1, 2, 4\], this training has v_patch_nums=\[1, 3, 4\]'),
    ('var', ['--pn=1_2_8'], r'v_patch_nums=\[1, 2, 4\], this training has v_patch_nums=\[1, 2, 8\]'),
    ('var', ['--vae_ckpt={phi}'], 'of another tokenizer'),
    ('flexvar', ['--vae_ckpt={code}'], 'of another tokenizer'),
    ('flexvar', ['--pn=1_2_4'], 'of images of 48 pixels, this training has 32'),
    ('flexvar', ['--final_reso=64'], 'of images of 48 pixels, this training has 64'),
    ('flexvar', ['--cached_val_path={cache}'], 'of the split train, expected val')])
def test_pyramids_that_do_not_fit(families, pyramids, stops, tmp_path, model, more, message):
    paths = dict(cache=pyramids / model)
    state = families[model][2].state_dict()
    for name, part in (('phi', 'quantize.quant_resi.'), ('code', 'quantize.embedding.')):
        moved = {key: t + 0.01 if key.startswith(part) else t for key, t in state.items()}
        paths[name] = tmp_path / f'{name}.pth'
        torch.save(moved, paths[name])
    flags = [flag.format(**paths) for flag in more]
    line = stops(train, *training(families[model], tmp_path / 'out', f'--cached_path={pyramids / model}',
                                  *flags, model=model))
    assert re.search(message, line), line


def test_other_crops_are_named(families, pyramids, tmp_path, caplog):
    """Where they are those of the training."""
    cached = f'--cached_path={pyramids / "var"}'
    prepared(training(families['var'], tmp_path / 'a', cached, model='var'))
    assert not caplog.records
    prepared(training(families['var'], tmp_path / 'b', cached, '--mid_reso=1.25', model='var'))
    assert 'extracted with --crop=resize --mid_reso=1.125, this training' in caplog.text
    assert 'by --crop=resize --mid_reso=1.25: pass' in caplog.text


@pytest.mark.parametrize(('model', 'more', 'message'), [
    ('var', ['--image_size=32'], 'of images of 16 pixels, got --image_size=32: pass that size, or the --pn'),
    ('var', ['--pn='], 'of images of 64 pixels, got --image_size=16: pass that size, or the --pn'),
    ('flexvar', ['--image_size=36'], 'multiples of the stride 8, got 36x36')])
def test_images_must_have_the_size_of_the_pyramid(families, stops, tmp_path, model, more, message):
    line = stops(extract, *extraction(families[model], tmp_path / 'cache', *more, model=model))
    assert message in line and not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('content', [b'', b'PK', b'PK\3\4 cut in the middle'])
def test_damaged_file_is_named(made, caches, stops, tmp_path, content):
    shutil.copytree(caches / 'flowar_files', tmp_path / 'cache')
    (tmp_path / 'cache' / 'ant' / '04.png.npz').write_bytes(content)
    line = stops(train, *training(made, tmp_path / 'out', f'--cached_path={tmp_path / "cache"}'))
    assert re.search(r'04\.png\.npz, cannot read it.*: remove the file', line), line


def test_a_file_that_vanished_is_missed(made, caches, stops, tmp_path):
    shutil.copytree(caches / 'flowar_files', tmp_path / 'cache')
    (tmp_path / 'cache' / 'ant' / '04.png.npz').unlink()
    line = stops(train, *training(made, tmp_path / 'out', f'--cached_path={tmp_path / "cache"}'))
    assert '40' in line and '39' in line


@pytest.mark.parametrize('other', ['fewer', 'as many'])
def test_folders_of_other_images_are_not_joined(families, caches, here, stops, tmp_path, other):
    """Whether labels tell them apart or not."""
    images = make_folder(tmp_path / 'images')
    file = images / 'train' / 'ant' / '00.png'
    file.unlink() if other == 'fewer' else file.rename(file.with_name('x.png'))
    here(extract, *extraction((images, *families['npp'][1:]), tmp_path / 'cache', model='npp'))
    both = f'--code_path={caches / "npp_packed"},{tmp_path / "cache"}'
    line = stops(train, *training(families['npp'], tmp_path / 'out', both, model='npp'))
    assert 'pass caches of the same images' in line


@pytest.mark.parametrize(('more', 'named'), [
    (['--image_size=64'], 'image_size'), (['--ten_crop'], 'crop_range'), (['--split=val'], 'count'),
    (['--vq_ckpt=other.pth'], 'tokenizer')])
def test_another_extraction_is_refused(families, caches, stops, tmp_path, monkeypatch, more, named):
    """And leaves the folder as it is."""
    monkeypatch.chdir(tmp_path)
    torch.save(VQModel(300, 4, net='tiny').state_dict(), 'other.pth')
    shutil.copytree(caches / 'npp_packed', tmp_path / 'cache')
    before = contents(tmp_path / 'cache')
    line = stops(extract, *extraction(families['npp'], tmp_path / 'cache', *more, model='npp'))
    assert f'{named}' in line and 'was begun with another' in line and 'pass another folder' in line
    assert contents(tmp_path / 'cache') == before and (tmp_path / 'cache' / 'manifest.json').exists()


def test_array_of_another_extraction_is_refused(caches):
    with pytest.raises(ValueError, match='of another extraction'):
        PackedWriter(caches / 'npp_packed', 41, (2, 16), np.uint16).create()


@pytest.mark.parametrize(('more', 'message'), [
    (['--image_size=36'], 'multiples of the stride 8, got 36x36'),
    (['--data_path=/nowhere'], "expected class folders in '/nowhere/train'"),
    (['--vq_ckpt=/nowhere.pth'], 'nowhere.pth')])
def test_what_cannot_begin_leaves_no_folder(families, stops, tmp_path, more, message):
    for model, layout in LAYOUTS:
        own = [flag.replace('vq_ckpt', TOKENIZER_FLAG[model]) for flag in (*more, f'--layout={layout}')]
        assert message in stops(extract, *extraction(families[model], tmp_path / 'cache', *own, model=model))
        assert not (tmp_path / 'cache').exists()


def test_caches_that_do_not_tell_about_orientation(families, caches, here, stops, tmp_path):
    """Earlier versions read the pixels as they are stored, and did not say so, nor how they cropped."""
    made = families['npp']
    for name in ('finished', 'begun'):
        shutil.copytree(caches / 'npp_packed', tmp_path / name)
    finished, begun = tmp_path / 'finished', tmp_path / 'begun'
    for path in (finished / 'settings.json', finished / 'manifest.json', begun / 'settings.json'):
        note = json.loads(path.read_text())
        for name in ('exif', 'views', 'crop', 'mid_reso', 'seed', 'codebook_l2_norm'):
            del note[name]
        path.write_text(json.dumps(note))
    (begun / 'manifest.json').unlink()
    for name, more in (('a', ()), ('b', ('--exif=0',))):
        here(train, *training(made, tmp_path / name, f'--code_path={finished}', *more, model='npp'))
    line = f'{finished} was extracted with --exif=0, this training has --exif=1'
    assert line in (tmp_path / 'a' / 'stdout.txt').read_text()
    assert 'was extracted with' not in (tmp_path / 'b' / 'stdout.txt').read_text()
    for folder in (finished, begun):
        line = stops(extract, *extraction(made, folder, model='npp'))
        assert f'{str(folder)!r} was begun with another exif' in line
        here(extract, *extraction(made, folder, '--exif=0', model='npp'))
        assert json.loads((folder / 'manifest.json').read_text())['exif'] is False
        assert 'another exif' in stops(extract, *extraction(made, folder, model='npp'))


def test_descriptions_of_caches(families, caches, here, tmp_path):
    """The same for the same images wherever they lie, another one for other images."""
    shutil.copytree(caches / 'npp_packed', tmp_path / 'moved')
    first = describe_data(TokenCache(caches / 'npp_packed'))
    assert first['count'] == 40 and first == describe_data(TokenCache(tmp_path / 'moved'))
    assert first == describe_data(TokenCache(caches / 'npp_packed', fixed=True))
    images = make_folder(tmp_path / 'images')
    file = images / 'train' / 'ant' / '00.png'
    file.rename(file.with_name('x.png'))
    here(extract, *extraction((images, *families['npp'][1:]), tmp_path / 'other', model='npp'))
    assert describe_data(TokenCache(tmp_path / 'other')) != first


@pytest.mark.parametrize('workers', [0, 2])
def test_damaged_images_end_an_extraction_in_one_line(families, stops, tmp_path, workers):
    images = make_folder(tmp_path / 'images')
    path = images / 'train' / 'ant' / '00.png'
    path.write_bytes(b'x')
    line = stops(extract, *extraction((images, *families['npp'][1:]), tmp_path / 'cache',
                                      f'--workers={workers}', model='npp'))
    assert line == (f'extract: expected an image, cannot read {str(path)!r} (its content is of no known '
                    'image format): repair or remove the file')
    assert not (tmp_path / 'cache' / 'manifest.json').exists()


@pytest.mark.parametrize(('label', 'message'), [(2, 'no image of class 0 .*begin at 0'),
                                                (2 ** 40, 'no image of class 0')])
def test_imported_codes_have_no_empty_class(stops, tmp_path, label, message):
    write_published(tmp_path / 'flip', count=3)
    for i, value in enumerate((1, 3, label)):
        np.save(tmp_path / 'flip' / 'imagenet32_labels' / f'{i}.npy', np.array([value]))
    line = stops(extract, *import_flags(tmp_path / 'flip', tmp_path / 'cache'))
    assert re.search(message, line) and 'imagenet32_labels' in line
    assert not (tmp_path / 'cache' / 'manifest.json').exists()


# ---------------------------------------------------------------------------------------------- import
def write_published(root, count=12, views=10, size=SIDE):
    """(codes (N, 1, A, L), labels (N,)), one file per image."""
    rng = np.random.RandomState(0)
    codes, labels = rng.randint(0, 300, (count, 1, views, (size // STRIDE) ** 2)), rng.randint(0, 4, count)
    labels[0] = 3
    for kind, arrays in (('codes', codes), ('labels', labels[:, None])):
        folder = root / f'imagenet{size}_{kind}'
        folder.mkdir(parents=True)
        for i, array in enumerate(arrays):
            np.save(folder / f'{i}.npy', array)
    return codes, labels


def import_flags(source, folder, size=SIDE):
    return ['--model=npp', f'--import_codes={source}', f'--code_path={folder}', f'--image_size={size}']


@pytest.mark.slow
def test_published_codes_are_imported(families, here, stops, tmp_path, monkeypatch):
    """Also where 10.npy comes before 2.npy; training takes them for images of as many classes."""
    made, folder = families['npp'], tmp_path / 'cache'
    codes, labels = write_published(tmp_path / 'flip')
    line = stops(train, *training(made, tmp_path / 'out', f'--code_path={tmp_path / "flip"}', model='npp'))
    assert f'extract.py --model=npp --import_codes={tmp_path / "flip"}' in line
    here(extract, *import_flags(tmp_path / 'flip', folder))
    cache = TokenCache(folder, fixed=True)
    assert cache.targets.tolist() == labels.tolist() and cache.classes == ['0', '1', '2', '3']
    assert np.array_equal(np.load(folder / 'tokens.npy'), codes[:, 0])
    assert np.load(folder / 'tokens.npy').dtype == np.uint16
    here(train, *training(made, tmp_path / 'out', f'--code_path={folder}', '--num_classes=4', model='npp'))
    assert 'does not say which tokenizer' in (tmp_path / 'out' / 'stdout.txt').read_text()

    again = stops(extract, *import_flags(tmp_path / 'flip', folder))
    assert f'{folder} holds a complete cache: pass another folder' in again
    note = json.loads((folder / 'manifest.json').read_text())
    (folder / 'manifest.json').write_text(json.dumps(note | dict(image_size=64)))
    line = stops(train, *training(made, tmp_path / 'b', f'--code_path={folder}', '--image_size=64',
                                  model='npp'))
    assert 'holds tokens of (16,), this tokenizer gives (64,) for 64 pixels' in line


@pytest.mark.parametrize(('change', 'message'), [
    (lambda source: (source / 'imagenet32_codes').rename(source / 'x'), 'imagenet32_codes, found no such'),
    (lambda source: (source / 'imagenet32_labels').rename(source / 'x'), 'imagenet32_labels, found no such'),
    (lambda source: (source / 'imagenet32_codes' / '7.npy').unlink(), r'expected 11\.npy|expected 7\.npy'),
    (lambda source: (source / 'imagenet32_labels' / '7.npy').unlink(), r'expected 7\.npy'),
    (lambda source: cut(source / 'imagenet32_codes' / '7.npy', 150), r'expected 7\.npy'),
    (lambda source: cut(source / 'imagenet32_codes' / '7.npy', 0), r'expected 7\.npy'),
    (lambda source: np.save(source / 'imagenet32_codes' / '7.npy', np.zeros((1, 2, 16), int)), r'7\.npy'),
    (lambda source: np.save(source / 'imagenet32_codes' / '7.npy', np.full((1, 10, 16), 2 ** 16)), '65536'),
    (lambda source: np.save(source / 'imagenet32_codes' / '7.npy', np.full((1, 10, 16), -1)), r'7\.npy'),
    (lambda source: np.save(source / 'imagenet32_labels' / '7.npy', np.array([-1])), r'7\.npy'),
])
def test_damaged_codes_are_not_imported(stops, tmp_path, change, message):
    write_published(tmp_path / 'flip')
    change(tmp_path / 'flip')
    line = stops(extract, *import_flags(tmp_path / 'flip', tmp_path / 'cache'))
    assert re.search(message, line), line
    assert not (tmp_path / 'cache' / 'manifest.json').exists()


def test_missing_codes_are_named_exactly(stops, tmp_path):
    line = stops(extract, *import_flags(tmp_path, tmp_path / 'cache', 256))
    assert f'{tmp_path}/imagenet256_codes' in line and not (tmp_path / 'cache').exists()


# ---------------------------------------------------------------------------------------------- details
@pytest.mark.parametrize('name', ['flowar_packed', 'flowar_files'])
def test_loader_processes_get_no_array(caches, name):
    """They read the files themselves; the tokens of these images are 40 kB."""
    cache = TokenCache(caches / name)
    content = pickle.dumps(cache)
    assert len(content) < 6000
    again = pickle.loads(content)
    for i in range(40):
        assert np.array_equal(again.parts[0].read(i, 1), cache.parts[0].read(i, 1))


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'layout'), LAYOUTS[1:])
def test_loader_processes_change_nothing(families, caches, here, tmp_path, model, layout):
    cached, steps = f'--{CACHE_FLAG[model]}={caches / f"{model}_{layout}"}', []
    for workers in (0, 2):
        here(train, *training(families[model], tmp_path / f'{workers}', cached, f'--workers={workers}',
                              model=model))
        steps.append((tmp_path / f'{workers}' / 'steps.jsonl').read_text())
    assert steps[0] == steps[1]


def test_digest_is_of_what_decides_the_tokens(families):
    for model in ('flowar', 'npp'):
        state = {name: t.clone() for name, t in families[model][2].state_dict().items()}
        digest = weights_digest(state)
        for name in ('decoder.x', 'post_quant_conv.weight', 'loss.logvar'):
            assert weights_digest(state | {name: torch.ones(3)}) == digest
        assert weights_digest(dict(reversed(state.items()))) == digest
        for name in ('encoder.body.0.weight', 'quant_conv.bias'):
            assert weights_digest(state | {name: state[name] + 1e-6}) != digest
    assert weights_digest(state | {'quantize.embedding.weight': torch.zeros(300, 4)}) != digest
