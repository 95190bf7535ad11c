"""Data: order of images, transforms, keyed augmentation, digits, folders and their errors, the npz packer."""
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.golden import assert_within, load_json, load_tensors, needs_rng
from utils.data import KeyedAugmentation, build_dataset, build_transforms, normalize_01_into_pm1, pil_loader
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


def test_folder_classes_are_sorted(tmp_path):
    num_classes, train_set, val_set = build_dataset(str(write_images(tmp_path, ('zebra', 'ant', 'cow'))), 16)
    assert num_classes == 3 and train_set.classes == val_set.classes == ['ant', 'cow', 'zebra']
    (tmp_path / 'train' / '.ipynb_checkpoints').mkdir()
    assert build_dataset(str(tmp_path), 16)[0] == 3
    image, label = train_set[0]
    assert image.shape == (3, 16, 16) and label == 0


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
