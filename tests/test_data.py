"""Data: order of images, transforms, keyed augmentation, data sets and their errors, the npz packer."""
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tests.golden import assert_within, load_json, load_tensors, needs_rng
from utils.data import (
    AdmRandomCrop,
    KeyedAugmentation,
    Shapes,
    adm_center_crop,
    build_dataset,
    build_transforms,
    normalize_01_into_pm1,
    open_split,
    pil_loader,
)
from utils.data_sampler import DistInfiniteBatchSampler, EvalDistributedSampler
from utils.misc import create_npz_from_sample_folder


def take(sampler, count):
    iterator = iter(sampler)
    return [next(iterator) for _ in range(count)]


def write_images(root, classes=('cat', 'dog'), splits=('train', 'val'), count=3, size=(40, 30)):
    for split in splits:
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.RandomState(10 * c + i).randint(0, 255, (size[1], size[0], 3),
                                                                   dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return root


# ---------------------------------------------------------------------------------------------- samplers
@pytest.mark.parametrize('case', load_json('samplers')['train'])
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


@pytest.mark.parametrize('case', load_json('samplers')['eval'])
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
    vectors = load_tensors('data')
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
    vectors = load_tensors('data')
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
        (tmp_path / f'{split}.txt').write_text('b.png 2\na c.png 0\n')
    num_classes, train_set, _ = build_dataset(str(tmp_path), 16, mid_reso=1.)
    assert num_classes == 3 and len(train_set) == 2
    (first, label), (second, other) = train_set
    assert (label, other) == (2, 0) and first[0].mean() < second[0].mean()
    for text, message in (('b.png 2\nb.png\n', "line 2 of .*train.txt, got 'b.png'"), ('', 'empty list')):
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
        lines = [f'{names[0]}/{path.name} 7\n' for path in (tmp_path / split / names[0]).iterdir()]
        (tmp_path / f'{split}.txt').write_text(''.join(lines))
    num_classes, train_set, _ = build_dataset(str(tmp_path), 16)
    assert num_classes == 8 and {label for _, label in train_set} == {7}


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
