"""Data: order of images, transforms, keyed augmentation, data sets and their errors, the npz packer."""
import itertools
import logging
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS, DatasetFolder

from configs import parse_training
from tests.runs import CLASSES, make_folder, read, same_weights
from tests.vectors import assert_within, load_json, load_tensors, needs_rng
from training.data import build_data, train_sampler
from utils.data import (
    AdmRandomCrop,
    ClassFolders,
    KeyedAugmentation,
    MirroredCrops,
    Shapes,
    adm_center_crop,
    build_dataset,
    build_transforms,
    describe_data,
    name_of,
    normalize_01_into_pm1,
    open_both,
    open_split,
    pil_loader,
)
from utils.data_sampler import DistInfiniteBatchSampler, EvalDistributedSampler
from utils.images import ImageError
from utils.misc import create_npz_from_sample_folder


def take(sampler, count):
    iterator = iter(sampler)
    return [next(iterator) for _ in range(count)]


def write_images(root, classes=('cat', 'dog'), splits=('train', 'val'), count=3, size=(40, 30)):
    for split in splits:
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = np.random.RandomState(10 * c + i).randint(0, 255, (size[1], size[0], 3),
                                                                   dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return root


# ---------------------------------------------------------------------------------------------- samplers
@pytest.mark.parametrize('case', load_json('var/samplers')['train'])
def test_train_sampler_vectors(case):
    needs_rng()
    kwargs = {k: v for k, v in case.items() if k not in ('len', 'batches', 'start_it')}
    sampler = DistInfiniteBatchSampler(**kwargs)
    per_rank = case['glb_batch_size'] // case['world_size']
    if case['fill_last'] and any(len(batch) < per_rank for batch in case['batches']):
        # upstream fills at most one copy; here every batch is whole, and begins with the same images
        batches = take(sampler, len(case['batches']))
        assert all(len(batch) == per_rank for batch in batches)
        if case['rank'] == 0:
            assert batches[0][:len(case['batches'][0])] == case['batches'][0]
        return
    assert len(sampler) == case['len']
    assert take(sampler, len(case['batches'])) == case['batches']


@pytest.mark.parametrize('case', load_json('var/samplers')['eval'])
def test_eval_sampler_vectors(case):
    indices = list(EvalDistributedSampler(range(case['dataset_len']), case['world_size'], case['rank']))
    assert len(indices) == case['len']
    assert not indices or (indices[0], indices[-1]) == (case['first'], case['last'])


@pytest.mark.parametrize('world_size', [1, 2, 4])
@pytest.mark.parametrize('dataset_len', [23, 24, 3])
def test_global_batches_do_not_depend_on_ranks(world_size, dataset_len):
    def global_batches(world_size):
        ranks = [DistInfiniteBatchSampler(world_size, rank, dataset_len, 8, fill_last=True, by_batch=True)
                 for rank in range(world_size)]
        return [list(itertools.chain.from_iterable(parts))
                for parts in zip(*(take(rank, 7) for rank in ranks), strict=True)]
    batches = global_batches(world_size)
    assert batches == global_batches(1)
    per_epoch = -(-dataset_len // 8)
    assert set(itertools.chain.from_iterable(batches[:per_epoch])) == set(range(dataset_len))
    assert all(len(batch) == 8 for batch in batches)


@pytest.mark.parametrize('by_batch', [False, True])
def test_resume_at_every_batch(by_batch):
    kwargs = dict(world_size=2, rank=1, dataset_len=23, glb_batch_size=8, fill_last=True, by_batch=by_batch,
                  with_epoch=True)
    straight = take(DistInfiniteBatchSampler(**kwargs), 9)
    for epoch in range(2):
        for it in range(3):
            resumed = DistInfiniteBatchSampler(**kwargs, start_ep=epoch, start_it=it)
            assert take(resumed, 3) == straight[3 * epoch + it:][:3]


# ---------------------------------------------------------------------------------------------- transforms
@pytest.mark.parametrize(('key', 'reso', 'mid_reso', 'hflip'), [('r64.m1.125', 64, 1.125, False),
                                                                ('r48.m1.5', 48, 1.5, True)])
def test_transform_vectors(key, reso, mid_reso, hflip):
    needs_rng()
    vectors = load_tensors('var/data')
    image = Image.fromarray(vectors['source_hwc_u8'].numpy())
    train, val = build_transforms(reso, hflip=hflip, mid_reso=mid_reso)
    assert_within(val(image), vectors[f'val.{key}'], atol=2 / 255)
    torch.manual_seed(9)
    assert_within(train(image), vectors[f'train.{key}.hflip{int(hflip)}.seed9'], atol=2 / 255)


@pytest.mark.parametrize(('size', 'zoom', 'key'), [(17, 1, 'center_17'), (20, 1, 'center_20'),
                                                   (33, 1, 'center_33'), (18, 5, 'center_big_18')])
def test_adm_center_crop_vectors(size, zoom, key):
    vectors = load_file(Path(__file__).parent / 'data' / 'evaluation' / 'center_crops.safetensors')
    source = Image.fromarray(vectors['src'].numpy())
    source = source.resize((zoom * source.width, zoom * source.height), Image.Resampling.BICUBIC)
    crop = np.asarray(adm_center_crop(source, size)).astype(int)
    assert np.abs(crop - vectors[key].numpy()).max() <= 1


def gradient(width=90, height=70):
    """An image whose red is the column and whose green is the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_adm_random_crop_draws_size_and_place():
    crop, spans = AdmRandomCrop(32), set()
    assert crop.largest == 40
    for seed in range(300):
        torch.manual_seed(seed)
        pixels = np.asarray(crop(gradient())).astype(int)
        assert pixels.shape == (32, 32, 3)
        spans.add((round((pixels[16, 30, 0] - pixels[16, 1, 0]) / 29, 1), pixels[0, 0, 0] // 8))
    steps, places = zip(*spans, strict=True)
    assert min(steps) == pytest.approx(70 / 40, abs=0.06)  # source pixels per pixel: the shorter side was 40
    assert max(steps) == pytest.approx(70 / 32, abs=0.06)  # to 32 long
    assert len(set(places)) >= 3
    torch.manual_seed(3)
    first = np.asarray(crop(gradient()))
    torch.manual_seed(3)
    assert np.array_equal(first, np.asarray(crop(gradient())))


def test_crops_of_training_and_validation():
    image = gradient()
    center = adm_center_crop(image, 32)
    for crop in ('adm', 'vae'):
        val = build_transforms(32, crop=crop, mid_reso=1.25)[1](image)
        assert np.array_equal(val.add(1).mul(127.5).round().byte().permute(1, 2, 0), np.asarray(center))
    torch.manual_seed(0)
    lanczos = build_transforms(32, mid_reso=1.)[0](image)
    torch.manual_seed(0)
    assert torch.equal(build_transforms(32, mid_reso=1., crop='vae')[0](image), lanczos)
    with pytest.raises(ValueError, match=r'--crop must be one of resize, adm, vae, got .zoom'):
        build_transforms(32, crop='zoom')


@pytest.mark.parametrize('crop', ['resize', 'adm', 'vae'])
def test_images_of_the_right_size_stay_as_they_are(crop):
    image = gradient(32, 32)
    train, val = build_transforms(32, mid_reso=1., crop=crop)
    same, flipped = torch.from_numpy(np.asarray(image).copy()), set()
    for transform in (train, val):
        assert torch.equal(transform(image).add(1).mul(127.5).round().byte().permute(1, 2, 0), same)
    train = build_transforms(32, True, 1., crop)[0]
    for seed in range(8):
        torch.manual_seed(seed)
        pixels = train(image).add(1).mul(127.5).round().byte().permute(1, 2, 0)
        flipped.add(bool(pixels[0, 0, 0] > 0))
        assert torch.equal(pixels, same.flip(1) if pixels[0, 0, 0] else same)
    assert flipped == {False, True}


def test_normalize_leaves_its_argument():
    vectors = load_tensors('var/data')
    x = vectors['normalize_in'].clone()
    assert torch.equal(normalize_01_into_pm1(x), vectors['normalize_out'])
    assert torch.equal(x, vectors['normalize_in'])


@pytest.mark.parametrize('num_workers', [0, 2])
def test_augmentation_depends_on_seed_epoch_and_image_only(tmp_path, num_workers):
    _, dataset, _ = build_dataset(str(write_images(tmp_path)), 16, hflip=True, mid_reso=1.5)
    keys = [(epoch, index) for epoch in range(2) for index in range(len(dataset))]
    one_by_one = [KeyedAugmentation(dataset, seed=7)[key][0] for key in keys]
    state = torch.get_rng_state()
    loader = DataLoader(KeyedAugmentation(dataset, seed=7), batch_sampler=[keys[::-1]],
                        num_workers=num_workers)
    (images, labels), = list(loader)
    assert torch.equal(images, torch.stack(one_by_one[::-1]))
    assert labels.tolist() == [dataset.targets[index] for _, index in keys[::-1]]
    if num_workers == 0:
        KeyedAugmentation(dataset, seed=7)[keys[0]]
    other_epoch = torch.stack(one_by_one[:6]) - torch.stack(one_by_one[6:])
    assert other_epoch.abs().max() > 0.1
    assert not torch.equal(KeyedAugmentation(dataset, seed=8)[keys[0]][0], one_by_one[0])
    before = torch.get_rng_state()
    KeyedAugmentation(dataset, seed=7)[keys[0]]
    assert torch.equal(before, torch.get_rng_state()) and state.shape == before.shape


def test_an_epoch_may_be_several_passes(tmp_path):
    """`--repeat` shows every image so many times an epoch, each time with other random numbers."""
    folder = str(write_images(tmp_path))
    config = parse_training([f'--data_path={folder}', '--pn=1_2', '--patch_size=8', '--hflip=1', '--bs=4',
                             '--mid_reso=1.5', '--repeat=3', '--workers=0'])
    data = build_data(config)
    sampler = train_sampler(config, len(data.train))
    numbers = [number for batch in sampler.epoch_batches(epoch=0) for number in batch]
    assert sorted(numbers[:18]) == [*range(18)]

    # Image 2, in two of the passes.
    keyed = KeyedAugmentation(data.train, seed=7)
    image, label = keyed[0, 2]
    again, same_label = keyed[0, 2 + 6]
    assert label == same_label and not torch.equal(image, again)


@pytest.mark.parametrize(('crop', 'mid_reso'), [('resize', 1.5), ('adm', 1.25)])
def test_stored_crops_are_those_that_training_sees(tmp_path, crop, mid_reso):
    """View v is that of epoch v; mirror images follow in the same order."""
    folder = str(write_images(tmp_path))
    random_crop, _ = build_transforms(16, False, mid_reso, crop)
    stored = MirroredCrops(open_split(folder, 'train'), random_crop, count=3, seed=7)
    live = KeyedAugmentation(open_split(folder, 'train', random_crop), seed=7)
    for index in range(len(stored)):
        views, label = stored[index]
        crops = torch.stack([live[epoch, index][0] for epoch in range(3)])
        assert torch.equal(views[:3], crops) and torch.equal(views[3:], crops.flip(-1))
        assert label == live[0, index][1]
        assert len(crops.unique(dim=0)) > 1
    assert not torch.equal(views, MirroredCrops(stored.images, random_crop, count=3, seed=8)[index][0])


# ---------------------------------------------------------------------------------------------- data sets
def test_digits():
    num_classes, train_set, val_set = build_dataset('digits', 32, mid_reso=1.)
    assert num_classes == 10 and len(train_set) + len(val_set) == 1797
    image, label = val_set[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert image.min() >= -1 and image.max() <= 1
    assert isinstance(label, int)
    train_images = {train_set.images_u8[i].tobytes() for i in range(len(train_set))}
    assert not any(val_set.images_u8[i].tobytes() in train_images for i in range(len(val_set)))
    assert set(np.bincount(val_set.targets) > 20) == {True}


def test_toy_set():
    num_classes, train_set, val_set = build_dataset('toy', 32, mid_reso=1.)
    assert num_classes == 10 and (len(train_set), len(val_set)) == (8000, 1024)
    image, label = val_set[13]
    assert image.shape == (3, 32, 32) and label == 3 and val_set.classes[3] == 'stripes'
    assert torch.equal(image.add(1).mul(127.5).round().byte().permute(1, 2, 0),
                       torch.from_numpy(val_set.images_u8[13]))
    assert np.array_equal(train_set.targets, np.arange(8000) % 10)
    assert np.array_equal(Shapes(False).images_u8, val_set.images_u8)
    assert len(np.unique(train_set.images_u8[:1024].reshape(1024, -1), axis=0)) == 1024
    assert not np.array_equal(train_set.images_u8[:1024], val_set.images_u8)
    levels = val_set.images_u8.reshape(-1, 3)
    assert levels.min() == 0 and levels.max() == 255 and np.all(np.abs(levels.mean(0) - 127.5) < 8)


def test_toy_classes_are_what_they_are_called():
    """Colours lie on the line from background to shape; the position on it is the mask, here found by PCA."""
    images = Shapes(False).images_u8[:1000].astype(float) / 255
    masks = {}
    for label, name in enumerate(Shapes.classes):
        pixels = images[label::10].reshape(100, 1024, 3)
        centered = pixels - pixels.mean(1, keepdims=True)
        direction = np.linalg.eigh(centered.transpose(0, 2, 1) @ centered)[1][:, :, -1:]
        line = (centered @ direction)[..., 0]
        off_line = centered - line[..., None] * direction.transpose(0, 2, 1)
        assert np.sqrt(np.square(off_line).mean() * 1.5) < 0.021, name  # two of three axes: noise of 0.02
        distinct = np.ptp(line, axis=1) > 0.6  # shape and background differ well
        mask = line[distinct] - line[distinct].min(1, keepdims=True)
        masks[name] = (mask / mask.max(1, keepdims=True)).reshape(-1, 32, 32)
    extreme = {name: np.mean((m < 0.2) | (m > 0.8)) for name, m in masks.items()}
    assert all(extreme[name] > 0.8 for name in ('disc', 'square', 'triangle', 'checker', 'cross'))
    assert extreme['ramp'] < 0.7 and extreme['stripes'] < 0.75
    # shapes are compact: their border is constant; patterns reach it
    ground = {name: m[:, [0, 0, -1, -1], [0, -1, 0, -1]] for name, m in masks.items()}  # the four corners
    spread = {name: np.median(np.ptp(corners, axis=1)) for name, corners in ground.items()}
    assert all(spread[name] < 0.25 for name in ('disc', 'square', 'triangle', 'ring', 'cross'))
    assert all(spread[name] > 0.4 for name in ('stripes', 'checker', 'ramp', 'ripples'))


@pytest.mark.parametrize('split', ['train', 'val'])
def test_open_split_needs_that_split_alone(tmp_path, split):
    images = open_split(str(write_images(tmp_path, splits=(split,))), split)
    assert len(images) == 6 and images[0][0].size == (40, 30)


def test_folder_classes_are_sorted(tmp_path):
    num_classes, train_set, val_set = build_dataset(str(write_images(tmp_path, ('zebra', 'ant', 'cow'))), 16)
    assert num_classes == 3 and train_set.classes == val_set.classes == ['ant', 'cow', 'zebra']
    (tmp_path / 'train' / '.ipynb_checkpoints').mkdir()
    assert build_dataset(str(tmp_path), 16)[0] == 3
    image, label = train_set[0]
    assert image.shape == (3, 16, 16) and label == 0


def test_listed_images(tmp_path):
    """A list of paths and classes decides, in flat folders and in class folders."""
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        for i, name in enumerate(('b.png', 'a c.png')):
            Image.new('RGB', (16, 16), (80 * i, 0, 0)).save(tmp_path / split / name)
        (tmp_path / f'{split}.txt').write_text('b.png 1\na c.png 0\n')
    num_classes, train_set, _ = build_dataset(str(tmp_path), 16, mid_reso=1.)
    assert num_classes == 2 and len(train_set) == 2
    (first, label), (second, other) = train_set
    assert (label, other) == (1, 0) and first[0].mean() < second[0].mean()
    for text, message in (('b.png 2\nb.png\n', "line 2 of .*train.txt', got 'b.png'"), ('', 'empty list')):
        (tmp_path / 'train.txt').write_text(text)
        with pytest.raises(ValueError, match=message):
            build_dataset(str(tmp_path), 16)
    (tmp_path / 'train.txt').unlink()
    write_images(tmp_path)
    with pytest.raises(ValueError, match=r'both train.txt and val.txt in .*, or neither'):
        build_dataset(str(tmp_path), 16)
    (tmp_path / 'val.txt').unlink()
    names = build_dataset(str(tmp_path), 16)[1].classes
    for split in ('train', 'val'):  # as published: paths with the folders of the classes
        lines = [f'{names[0]}/{path.name} 0\n' for path in (tmp_path / split / names[0]).iterdir()]
        (tmp_path / f'{split}.txt').write_text(''.join(lines))
    num_classes, train_set, _ = build_dataset(str(tmp_path), 16)
    assert num_classes == 1 and {label for _, label in train_set} == {0}


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r'train.*--data_path'):
        build_dataset(str(tmp_path / 'nowhere'), 16)
    write_images(tmp_path, splits=('train',))
    with pytest.raises(ValueError, match='val'):
        build_dataset(str(tmp_path), 16)
    (tmp_path / 'val').mkdir()
    with pytest.raises(ValueError, match='holds no class folder'):
        build_dataset(str(tmp_path), 16)


def test_empty_class_and_differing_classes(tmp_path):
    write_images(tmp_path)
    (tmp_path / 'val' / 'emu').mkdir()
    with pytest.raises(ValueError, match='emu'):
        build_dataset(str(tmp_path), 16)
    Image.new('RGB', (20, 20)).save(tmp_path / 'val' / 'emu' / '0.png')
    with pytest.raises(ValueError, match='same classes'):
        build_dataset(str(tmp_path), 16)


# ---------------------------------------------------------------------------------------------- what is data
def names_in(dataset):
    return [Path(path).relative_to(dataset.root).as_posix() for path, _ in dataset.samples]


def test_order_is_that_of_torchvision(tmp_path):
    """So the numbers of images mean the same as they did for the published code."""
    names = ['b/2.png', 'b/10.PNG', 'b/a/x.jpeg', 'b/a.a/x.png', 'b/a-a/x.webp', 'b/é.png', 'b/Z.tif',
             'b/ .png', 'B/x y/1.ppm', 'B/x y.bmp', 'a b/deep/er/0.jpg', 'a b/deep.jpg', '10/1.png',
             '9/1.pgm', 'b/a/notes.txt']
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / 'b' / 'empty').mkdir()
    (tmp_path / 'elsewhere.png').touch()
    (tmp_path / 'b' / 'link.png').symlink_to(tmp_path / 'elsewhere.png')
    ours, theirs = (kind(str(tmp_path), loader=pil_loader, extensions=IMG_EXTENSIONS)
                    for kind in (ClassFolders, DatasetFolder))
    assert ours.samples == theirs.samples and len(ours.samples) == len(names)
    assert ours.classes == theirs.classes and ours.class_to_idx == theirs.class_to_idx
    assert ours.targets == theirs.targets


def test_what_is_no_data_is_left_out(tmp_path, caplog):
    write_images(tmp_path)
    train = tmp_path / 'train'
    before = names_in(open_split(str(tmp_path), 'train'))
    image = (train / 'cat' / '0.png').read_bytes()
    for name in ('cat/.ipynb_checkpoints/0.png', '.cache/0.png', '__MACOSX/0.png', 'cat/__MACOSX/0.png',
                 'cat/._0.png', 'cat/@eaDir/0.png', 'dog/.hidden.png', 'lost+found/0.png', 'cat/.DS_Store'):
        path = train / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    with caplog.at_level(logging.INFO):
        assert names_in(open_split(str(tmp_path), 'train')) == before
    assert not caplog.records
    for name in ('cat/a.HEIC', 'cat/b.heic', 'dog/c.mov', 'cat/Thumbs.db', 'dog/README', 'dog/odd.a\nb'):
        (train / name).touch()
    with caplog.at_level(logging.INFO):
        assert names_in(open_split(str(tmp_path), 'train')) == before
    (record,) = caplog.records
    line = record.getMessage()
    assert 'left out 6 files' in line and '2 .heic, 1 ' in line and '1 without suffix' in line
    assert len(line.splitlines()) == 1 and repr(str(train)) in line


def test_links(tmp_path):
    """Files and folders elsewhere are read; no link leads to an image of another class or split."""
    root, other = write_images(tmp_path / 'root'), write_images(tmp_path / 'other', classes=('emu', 'cow'))
    train = root / 'train'
    expected = names_in(open_split(str(root), 'train'))
    for name, target in [
            ('cat/self', 'self'), ('cat/here', '.'), ('cat/up', '..'), ('cat/further', '../..'),
            ('cat/absolute', train), ('dog/slash', '/'), ('nothing', 'nowhere'), ('loop', 'loop')]:
        (train / name).symlink_to(target)
    assert names_in(open_split(str(root), 'train')) == expected
    (train / 'emu').symlink_to(other / 'train' / 'emu')
    (train / 'cat' / 'more').symlink_to(other / 'train' / 'cow')
    (train / 'cat' / 'z.png').symlink_to(other / 'train' / 'emu' / '1.png')
    (other / 'train' / 'emu' / 'up').symlink_to('..')
    dataset = open_split(str(root), 'train')
    assert dataset.classes == ['cat', 'dog', 'emu']
    assert names_in(dataset) == [*expected[:3], 'cat/z.png', *(f'cat/more/{i}.png' for i in range(3)),
                                 *expected[3:], *(f'emu/{i}.png' for i in range(3))]
    assert dataset[3][0].size == (40, 30)
    link = tmp_path / 'link'
    link.symlink_to(root)
    assert names_in(open_split(str(link), 'train')) == names_in(dataset)


# ---------------------------------------------------------------------------------------------- lists
def listed(root, text, split='train'):
    """A list of bytes beside three images a.png, b c.png and d.png."""
    folder = root / split
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(('a', 'b c', 'd')):
        Image.new('RGB', (16, 16), (50 * i, 0, 0)).save(folder / f'{name}.png')
    (root / f'{split}.txt').write_bytes(text)
    return open_split(str(root), split)


@pytest.mark.parametrize('text', [
    b'a.png 0\nb c.png 1\nd.png 0', b'\xef\xbb\xbfa.png 0\nb c.png 1\nd.png 0\n',
    b'a.png 0\r\nb c.png 1\r\n\r\nd.png 0\r\n\r\n', b'a.png\t0\nb c.png\t 1\n \t\n\nd.png 0 \n\n\n'])
def test_forms_of_lists(tmp_path, text):
    images = listed(tmp_path, text)
    assert [Path(path).name for path in images.paths] == ['a.png', 'b c.png', 'd.png']
    assert images.targets == [0, 1, 0] and images.classes == ['0', '1']
    assert [image.getpixel((0, 0))[0] for image, _ in map(images.__getitem__, range(3))] == [0, 50, 100]


@pytest.mark.parametrize(('text', 'message'), [
    (b'a.png 1\nd.png 2', r'train\.txt. has no image of class 0 \(1 of 3 .*classes begin at 0'),
    (b'a.png 0\nd.png 2', r'no image of class 1 \(1 of 3'),
    (b'a.png 0\nd.png 999999999999', r'no image of class 1 \('),  # as quick as the others
    (b'a.png 0\nd.png -1', 'line 2 of '), (b'a.png 0\n\nd.png 1.5', 'line 3 of '), (b'a.png', 'line 1 of '),
    ('a.png \u0661'.encode(), 'line 1 of '), (b'\n \n', 'empty list')])
def test_refused_lists(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        listed(tmp_path, text)
    assert len(str(caught.value).splitlines()) == 1


def test_listed_file_that_is_missing(tmp_path):
    images = listed(tmp_path, b'a.png 0\nx\xff.png 0\n')
    with pytest.raises(ImageError, match=r'there is no file .*udcff\.png.*list'):
        images[1]


# ---------------------------------------------------------------------------------------------- advice
def advice(root):
    with pytest.raises(ValueError) as caught:
        build_dataset(str(root), 16)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and repr(str(root))[1:-1] in message
    return message


def opens(root, classes=('cat', 'dog'), val_split=0.):
    _, train_set, val_set = build_dataset(str(root), 16, val_split=val_split)
    assert train_set.classes == val_set.classes == list(classes) and len(train_set) and len(val_set)


def move_part(root, source, target):
    """One image of each class."""
    for folder in sorted((root / source).iterdir()):
        (root / target / folder.name).mkdir(parents=True)
        image = sorted(folder.iterdir())[0]
        image.rename(root / target / folder.name / image.name)


def test_advice_for_class_folders_without_splits(tmp_path):
    write_images(tmp_path, splits=('.',))
    message = advice(tmp_path)
    assert "2 folders of images itself (the first is 'cat'): pass --val_split=0.1" in message
    assert 'or move them into train/' in message
    opens(tmp_path, val_split=0.1)
    (tmp_path / 'train').mkdir()
    for name in ('cat', 'dog'):
        (tmp_path / name).rename(tmp_path / 'train' / name)
    message = advice(tmp_path)  # the second half of the advice, if it was forgotten
    assert 'pass --val_split=0.1' in message and 'a tenth say, from train/<class>/ to val/<class>/' in message
    opens(tmp_path, val_split=0.1)
    move_part(tmp_path, 'train', 'val')
    opens(tmp_path)


def test_advice_for_validation_images_alone(tmp_path):
    write_images(tmp_path, splits=('val',))
    assert 'nine tenths say, from val/<class>/ to train/<class>/' in advice(tmp_path)
    move_part(tmp_path, 'val', 'train')
    opens(tmp_path)


def test_advice_for_flat_images(tmp_path):
    write_images(tmp_path, classes=('.',), splits=('.',))
    message = advice(tmp_path)
    assert 'holds 3 images without folders: pass --val_split=0.1' in message
    assert 'or put them into train/<class>/' in message
    opens(tmp_path, ['images'], val_split=0.1)
    (tmp_path / 'train').mkdir()
    for path in tmp_path.glob('*.png'):
        path.rename(tmp_path / 'train' / path.name)
    assert 'pass --val_split=0.1' in advice(tmp_path)
    opens(tmp_path, ['images'], val_split=0.1)
    (tmp_path / 'train' / 'all').mkdir()
    for path in (tmp_path / 'train').glob('*.png'):
        path.rename(tmp_path / 'train' / 'all' / path.name)
    move_part(tmp_path, 'train', 'val')
    opens(tmp_path, ['all'])


def test_advice_for_flat_validation(tmp_path):
    write_images(tmp_path, splits=('train',))
    write_images(tmp_path, classes=('.',), splits=('val',))
    message = advice(tmp_path)
    assert 'sort the images of val/ into class folders as in train/, or list them in val.txt' in message
    for split in ('train', 'val'):
        paths = sorted((tmp_path / split).rglob('*.png'))
        names = [path.relative_to(tmp_path / split).as_posix() for path in paths]
        (tmp_path / f'{split}.txt').write_text(''.join(f'{name} 0\n' for name in names))
    opens(tmp_path, ['0'])
    for split in ('train', 'val'):
        (tmp_path / f'{split}.txt').unlink()
    for name in ('cat', 'dog'):
        (tmp_path / 'val' / name).mkdir()
        shutil.copy(tmp_path / 'val' / '0.png', tmp_path / 'val' / name)
    for path in (tmp_path / 'val').glob('*.png'):
        path.unlink()
    opens(tmp_path)


def test_advice_for_flat_training(tmp_path):
    write_images(tmp_path, classes=('.',), splits=('train',))
    write_images(tmp_path, splits=('val',))
    assert 'sort the images of train/ into class folders as in val/' in advice(tmp_path)


def test_advice_for_empty_folders(tmp_path):
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
    assert 'holds no class folder and no images: put images into train/<class>/' in advice(tmp_path)
    for split in ('train', 'val'):
        (tmp_path / split / 'cat').mkdir()
    message = advice(tmp_path)
    assert "no valid file for 'cat' (1 in all)" in message and 'add images to it or remove' in message
    (tmp_path / 'train' / 'cat' / '0.heic').touch()
    assert 'other files there: 1 .heic' in advice(tmp_path)


@pytest.mark.parametrize(('train', 'val'), [('Train', 'Val'), ('training', 'validation'), ('train', 'valid')])
def test_advice_for_other_names_of_splits(tmp_path, train, val):
    write_images(tmp_path, splits=(train, val))
    for found, split in ((train, 'train'), (val, 'val')):
        if found != split:
            assert f'{found!r} is there: rename that folder to {split!r}'.replace(
                repr(found), repr(str(tmp_path / found))) in advice(tmp_path)
            (tmp_path / found).rename(tmp_path / split)
    opens(tmp_path)


def test_advice_for_a_folder_too_many(tmp_path):
    write_images(tmp_path / 'My Photos')
    inner = tmp_path / 'My Photos'
    assert f'{str(inner)!r} holds train/ and val/: pass that as --data_path' in advice(tmp_path)
    opens(inner)


def test_advice_for_other_unicode_forms(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    write_images(tmp_path, classes=(composed,), splits=('train',))
    write_images(tmp_path, classes=(decomposed,), splits=('val',))
    message = advice(tmp_path)
    assert 'so that both are composed or both decomposed' in message
    assert ascii(composed) in message and ascii(decomposed) in message
    (tmp_path / 'val' / decomposed).rename(tmp_path / 'val' / composed)
    opens(tmp_path, [composed])


# ------------------------------------------------------------------------------------------ held-out images
def of_one_of_these(*sets):
    """The names in each data set, after making sure that none is in two."""
    names = [set(images.names()) for images in sets]
    assert sum(map(len, names)) == len(set.union(*names))
    return names


def test_a_part_of_each_class_is_held_out(tmp_path):
    for name, count in (('ant', 30), ('bee', 4), ('cow', 1)):
        write_images(tmp_path, (name,), ('.',), count)
    train_set, val_set = open_both(str(tmp_path), val_split=0.1)
    train_names, val_names = of_one_of_these(train_set, val_set)
    assert train_set.classes == val_set.classes == ['ant', 'bee', 'cow']
    assert np.bincount(train_set.targets).tolist() == [27, 3, 1]  # a single image is for training
    assert np.bincount(val_set.targets).tolist() == [3, 1]
    assert train_set.names() == sorted(train_names)  # in the order that they have without a part held out
    assert len({name.partition('/')[2] for name in val_names}) > 1  # not the first ones of every class
    for split, names in (('train', train_names), ('val', val_names)):
        assert set(open_split(str(tmp_path), split, val_split=0.1).names()) == names

    # The same in train/; where images come later, most of the others stay on their side.
    (tmp_path / 'train').mkdir()
    for name in ('ant', 'bee', 'cow'):
        (tmp_path / name).rename(tmp_path / 'train' / name)
    moved = open_both(str(tmp_path), val_split=0.1)
    assert list(map(describe_data, moved)) == [describe_data(train_set), describe_data(val_set)]
    write_images(tmp_path, ('ant',), ('train',), 36)
    more = set(open_both(str(tmp_path), val_split=0.1)[1].names())
    assert len(more & val_names) >= 3

    # What somebody sorts into train/ and val/ like that is the same data set.
    for split, names in (('train', train_names), ('val', val_names)):
        for name in names:
            path = tmp_path / 'sorted' / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / 'train' / name, path)
    assert describe_data(open_split(str(tmp_path / 'sorted'), 'train')) == describe_data(train_set)


def test_a_part_of_a_list_is_held_out(tmp_path):
    listed(tmp_path, b'a.png 0\nb c.png 0\nd.png 1\n')
    train_set, val_set = open_both(str(tmp_path), val_split=0.3)
    of_one_of_these(train_set, val_set)
    assert (train_set.targets, val_set.targets) == ([0, 1], [0]) and val_set.classes == ['0', '1']
    assert Path(val_set.path_of(0)).name in ('a.png', 'b c.png') and val_set[0][0].size == (16, 16)


def test_images_without_class_folders_are_one_class(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        write_images(tmp_path, classes=('.',), count=5)
        opens(tmp_path, ['images'])
    assert [record.getMessage() for record in caplog.records] == [
        f'{str(tmp_path / split)!r} has no class folders: its 5 images are of one class'
        for split in ('train', 'val')]
    train_set = open_split(str(tmp_path), 'train')
    assert train_set.names() == [f'{i}.png' for i in range(5)] and train_set.targets == [0] * 5


def test_a_folder_of_images_trains_without_classes(train_here, tmp_path):
    """Once the images are sorted into train/ and val/ like that, it is the same training without the flag."""
    images = make_folder(tmp_path / 'made') / 'train'
    for path in sorted(images.glob('*/*.png')):
        path.rename(images / path.name)
    for name in CLASSES:
        (images / name).rmdir()
    flat = read(train_here(tmp_path / 'flat', f'--data_path={images}', '--val_split=0.2', '--ep=1'))
    assert flat['classes'] == ['images']
    assert [flat['data'][split]['count'] for split in ('train', 'val')] == [32, 8]
    for split, names in zip(('train', 'val'), open_both(str(images), val_split=0.2), strict=True):
        (tmp_path / 'sorted' / split).mkdir(parents=True)
        for name in names.names():
            shutil.copy(images / name, tmp_path / 'sorted' / split)
    by_hand = read(train_here(tmp_path / 'by_hand', f'--data_path={tmp_path / "sorted"}', '--ep=1'))
    assert same_weights(by_hand, flat) and by_hand['data'] == flat['data'] and by_hand['run'] == flat['run']


@pytest.mark.parametrize(('folders', 'words'), [
    (('train/cat', 'val/cat'), "val' is there: leave out the flag"),
    (('cat', 'dog', 'Validation'), "'Validation' looks like a part of the data"),
    (('cat', 'test'), "'test' looks like a part of the data"),
    (('My Photos/train/cat',), "My Photos' holds train/: pass that as --data_path"),
    (('.git',), 'holds no class folder and no images')])
def test_data_that_is_not_split(tmp_path, folders, words):
    for folder in folders:
        write_images(tmp_path, (folder,), ('.',), 2)
    with pytest.raises(ValueError) as caught:
        open_both(str(tmp_path), val_split=0.1)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_split_without_an_image_is_refused(tmp_path):
    write_images(tmp_path, splits=('.',), count=1)
    with pytest.raises(ValueError, match=r'every class in .* has a single image, which stays in training'):
        open_both(str(tmp_path), val_split=0.5)
    with pytest.raises(ValueError, match="'digits' has its own validation images"):
        open_both('digits', val_split=0.5)
    with pytest.raises(ValueError, match=r'nowhere.*found no such folder: correct --data_path'):
        open_both(str(tmp_path / 'nowhere'), val_split=0.5)


# ---------------------------------------------------------------------------------------------- descriptions
def test_description_tells_data_sets_apart(tmp_path):
    def described():
        return describe_data(open_split(str(tmp_path / 'a'), 'train', lambda image: image))
    write_images(tmp_path / 'a')
    first = described()
    assert first['count'] == 6 and first == described()
    shutil.copytree(tmp_path / 'a', tmp_path / 'elsewhere' / 'b')
    for moved in (tmp_path / 'elsewhere' / 'b', f'{tmp_path}/elsewhere/b/', os.path.relpath(tmp_path / 'a')):
        assert describe_data(open_split(str(moved), 'train')) == first
    cat, dog = (tmp_path / 'a' / 'train' / name for name in ('cat', 'dog'))
    seen = [first]
    for change in (
            lambda: (cat / '0.png').rename(cat / '9.png'),
            lambda: (cat / '9.png').rename(dog / '9.png'),
            lambda: shutil.copy(dog / '9.png', cat / '9.png'),
            lambda: dog.rename(dog.with_name('bee'))):
        change()
        assert described() not in seen
        seen.append(described())


def test_description_of_lists_and_embedded_sets(tmp_path):
    texts = (b'a.png 0\nd.png 0', b'd.png 0\na.png 0', b'a.png 0\nd.png 1', b'a.png 0\nb c.png 0')
    descriptions = [describe_data(listed(tmp_path, text)) for text in texts]
    assert len({description['digest'] for description in descriptions}) == 4
    assert describe_data(listed(tmp_path, b'\na.png\t0\r\nd.png 0\n')) == descriptions[0]
    (tmp_path / 'copy').mkdir()
    assert describe_data(listed(tmp_path / 'copy', texts[0])) == descriptions[0]
    digits = [describe_data(open_split('digits', split)) for split in ('train', 'val')]
    assert [description['count'] for description in digits] == [1437, 360] and digits[0] != digits[1]
    assert digits[0] == describe_data(open_split('digits', 'train'))
    assert describe_data(open_split('toy', 'val'))['count'] == 1024


def test_names_of_images(tmp_path):
    images = open_split(str(write_images(tmp_path)), 'train')
    assert name_of(images, 4) == str(tmp_path / 'train' / 'dog' / '1.png')
    assert name_of(Subset(Subset(images, [4, 5]), [1]), 0) == str(tmp_path / 'train' / 'dog' / '2.png')
    assert name_of(open_split('digits', 'val'), 3) == 'Digits[3]'
    (tmp_path / 'listed').mkdir()
    assert name_of(listed(tmp_path / 'listed', b'd.png 0'), 0) == str(tmp_path / 'listed' / 'train' / 'd.png')


# --------------------------------------------------------------------------------------------- damaged images
@pytest.fixture
def damaged(tmp_path):
    """Sixteen images, of which two cannot be read."""
    write_images(tmp_path, count=8)
    (tmp_path / 'train' / 'cat' / '3.png').write_bytes(b'not an image')
    (tmp_path / 'train' / 'dog' / '0.png').write_bytes(b'')
    return build_dataset(str(tmp_path), 16, hflip=True, mid_reso=1.5)[1]


def items(dataset, num_workers, **kwargs):
    """{(epoch, index): (image, label, damage)}, in batches of processes."""
    keys = [(epoch, index) for epoch in range(2) for index in range(len(dataset))]
    loader = DataLoader(KeyedAugmentation(dataset, replace_damaged=True, **kwargs),
                        batch_sampler=[keys[i::4] for i in range(4)], num_workers=num_workers)
    found = {}
    for i, (images, labels, damages) in enumerate(loader):
        assert isinstance(damages, (list, tuple)) and all(isinstance(damage, str) for damage in damages)
        found |= {key: (image, int(label), damage) for key, image, label, damage
                  in zip(keys[i::4], images, labels, damages, strict=True)}
    return found


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


def test_damaged_images_are_replaced(damaged):
    found = items(damaged, 0, seed=5)
    assert all(same(found[key], other) for key, other in items(damaged, 2, seed=5).items())
    plain = KeyedAugmentation(damaged, seed=5)
    for (epoch, index), (image, label, damage) in found.items():
        if index in (3, 8):
            path = name_of(damaged, index)
            assert damage.startswith('expected an image') and repr(path) in damage and '\n' not in damage
            with pytest.raises(ImageError):
                plain[epoch, index]
        else:
            assert damage == '' and same((image, label), plain[epoch, index])
    # what stands in for an image changes from epoch to epoch, and with the seed
    stand_ins = [found[epoch, index][0] for epoch in range(2) for index in (3, 8)]
    assert len({image.numpy().tobytes() for image in stand_ins}) > 2
    assert not all(same(found[key], other) for key, other in items(damaged, 0, seed=6).items() if key[1] == 3)
    one = KeyedAugmentation(damaged, seed=5, replace_damaged=True)[1, 8]
    assert same(one, found[1, 8])  # whatever was read before


def test_a_set_without_any_readable_image_is_refused(damaged):
    for path, _ in damaged.samples:
        Path(path).write_bytes(b'x')
    with pytest.raises(ImageError, match=r'0\.png.* 19 others in its place cannot be read either') as caught:
        KeyedAugmentation(damaged, seed=0, replace_damaged=True)[0, 0]
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_damage_is_not_hidden(damaged):
    """Only images that cannot be read are replaced, not an error of the program."""
    damaged.transform = lambda image: image.no_such_method()
    with pytest.raises(AttributeError):
        KeyedAugmentation(damaged, seed=0, replace_damaged=True)[0, 0]


@pytest.mark.parametrize('content', [b'', b'not an image', None])
def test_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / 'broken.png'
    if content is None:  # a file cut in the middle
        Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:200]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'broken\.png'):
        pil_loader(str(path))


def test_sixteen_bit_grey_keeps_its_levels(tmp_path):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / 'grey.png')
    pixels = np.asarray(pil_loader(str(tmp_path / 'grey.png')))
    assert pixels.shape == (16, 16, 3) and np.array_equal(pixels[:, :, 0], levels // 257)


def half_transparent(mode):
    """Left half opaque red (or dark grey), right half transparent."""
    image = Image.new('RGBA', (8, 4), (200, 0, 0, 255))
    image.paste((0, 200, 0, 0), (4, 0, 8, 4))
    if mode == 'P':
        image = image.convert('RGB').quantize(4)
        image.info['transparency'] = image.getpixel((6, 0))
        return image
    return image.convert(mode)


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparency_shows_white(tmp_path, mode):
    path = tmp_path / 'image.png'
    half_transparent(mode).save(path)
    pixels = np.asarray(pil_loader(str(path)))
    assert pixels.shape == (4, 8, 3) and (pixels[:, 4:] == 255).all()
    expected = [200, 0, 0] if mode != 'LA' else [60, 60, 60]
    assert np.abs(pixels[:, :4].astype(int) - expected).max() <= 1


def test_half_opaque_pixels_are_mixed_with_white(tmp_path):
    Image.new('RGBA', (2, 2), (100, 0, 50, 128)).save(tmp_path / 'image.png')
    assert np.abs(np.asarray(pil_loader(str(tmp_path / 'image.png'))) - np.array([177, 127, 152])).max() <= 1


@pytest.mark.parametrize(('mode', 'colour', 'suffix'), [
    ('L', 70, 'png'), ('P', (10, 200, 30), 'png'), ('1', 1, 'png'), ('CMYK', (0, 255, 255, 0), 'tif')])
def test_other_modes_become_rgb(tmp_path, mode, colour, suffix):
    path = tmp_path / f'image.{suffix}'
    image = Image.new('RGB', (6, 4), colour).quantize(2) if mode == 'P' else Image.new(mode, (6, 4), colour)
    image.save(path)
    assert Image.open(path).mode == mode
    loaded = pil_loader(str(path))
    assert loaded.mode == 'RGB'
    expected = dict(L=(70, 70, 70), P=(10, 200, 30), CMYK=(255, 0, 0)) | {'1': (255, 255, 255)}
    assert loaded.getpixel((3, 2)) == expected[mode]


# ---------------------------------------------------------------------------------------------- packing
def write_samples(folder, count, size=(6, 4), mode='RGB'):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new(mode, size, i if mode == 'L' else (i, 2 * i, 0)).save(folder / f'{i:03d}.png')


def test_npz_is_streamed_in_name_order(tmp_path):
    folder = tmp_path / 'samples'
    write_samples(folder, 5)
    (folder / 'settings.json').write_text('{}')
    path = create_npz_from_sample_folder(str(folder) + '/', num_images=5)
    assert path == str(tmp_path / 'samples.npz')
    array = np.load(path)['arr_0']
    assert array.shape == (5, 4, 6, 3) and array.dtype == np.uint8
    assert array[:, 0, 0, 1].tolist() == [0, 2, 4, 6, 8]


def test_npz_refuses_wrong_counts_sizes_and_types(tmp_path):
    folder = tmp_path / 'samples'
    write_samples(folder, 3)
    with pytest.raises(ValueError, match=r'50000 PNG.*got 3'):
        create_npz_from_sample_folder(str(folder))
    Image.new('RGB', (7, 4)).save(folder / '001.png')
    with pytest.raises(ValueError, match=r'6x4.*7x4.*001\.png'):
        create_npz_from_sample_folder(str(folder), num_images=3)
    Image.new('L', (6, 4)).save(folder / '001.png')
    with pytest.raises(ValueError, match=r'RGB.*got L'):
        create_npz_from_sample_folder(str(folder), num_images=3)
    (folder / '001.png').write_bytes(b'x')
    with pytest.raises(ValueError, match=r'001\.png.*remove the file'):
        create_npz_from_sample_folder(str(folder), num_images=3)
    assert not list(tmp_path.glob('*.npz')) and not list(tmp_path.glob('.*tmp'))
