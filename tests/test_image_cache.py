"""--cache=memory: equal pixels and trainings, one copy for all processes, no more memory than there is."""
import gc
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import train
from configs import parse_training
from tests.runs import launch, make_folder, message, read, same_weights, training
from tests.test_packed import packed
from utils import image_cache
from utils.data import KeyedAugmentation, build_dataset, describe_data, name_of
from utils.image_cache import cached_in_memory
from utils.images import ImageError


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A folder of images, of which one for training is broken."""
    root = make_folder(tmp_path_factory.mktemp('cache') / 'images')
    (root / 'train' / 'bee' / '05.png').write_bytes(b'broken')
    return root


def items(dataset, num_workers):
    keyed = KeyedAugmentation(dataset, 3, replace_damaged=True)
    keys = [(epoch, index) for epoch in range(2) for index in range(len(dataset))]
    return list(DataLoader(keyed, batch_sampler=[keys[i::4] for i in range(4)], num_workers=num_workers))


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('kind', ['folder', 'tar'])
def test_items_are_those_of_the_files(root, tmp_path, monkeypatch, kind, num_workers):
    path = packed(root, tmp_path / 'tar') if kind == 'tar' else root
    _, *sets = build_dataset(str(path), 16, True, 1.2)
    cached = cached_in_memory(*sets)
    expected = items(sets[0], num_workers)
    assert list(map(describe_data, cached)) == list(map(describe_data, sets))
    assert name_of(cached[0], 7) == name_of(sets[0], 7)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(cached[1], sets[1], strict=True))

    # Files are not read any more, but for those that cannot be read.
    broken = sets[0].names().index('bee/05.png')
    with pytest.raises(ImageError, match=r'bee/05\.png'):
        cached[0][broken]
    if kind == 'folder':
        monkeypatch.setattr(sets[0], 'loader', lambda path: pytest.fail(path) if '05' not in path else
                            build_dataset(str(root), 16)[1].loader(path))
    for ours, theirs in zip(items(cached[0], num_workers), expected, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert list(ours[2]) == list(theirs[2])


def test_memory_is_shared_and_given_back(root):
    _, *sets = build_dataset(str(root), 16)
    cached = cached_in_memory(*sets)
    path = Path(cached[0].memory.paths[0])
    num_bytes = sum(24 * 20 * 3 for images in sets for _ in images.targets) - 24 * 20 * 3
    assert os.stat(path).st_size == num_bytes
    copy = pickle.loads(pickle.dumps(cached[1]))  # as a process gets it that is not forked
    assert torch.equal(copy[3][0], cached[1][3][0])
    assert os.path.samestat(os.fstat(copy.memory.descriptors[0]), os.stat(path))
    del cached, copy
    gc.collect()
    assert not path.exists()


def test_a_cache_that_would_take_too_much_is_refused(root, data, tmp_path, monkeypatch, capsys, train_here):
    monkeypatch.setattr(image_cache, 'free_memory', lambda: 80_000)
    text = message(lambda: train_here(tmp_path, f'--data_path={root}', '--cache=memory'), capsys)
    assert '--cache=memory needs 0 MiB or more for 48 decoded images, and may take half of the 0 MiB' in text
    # where the first images are smaller than those that follow
    monkeypatch.setattr(image_cache, 'expected_bytes', lambda sets: 0)
    text = message(lambda: train_here(tmp_path, f'--data_path={root}', '--cache=memory'), capsys)
    assert 'leave it out, or make the images smaller' in text
    text = message(lambda: parse_training(['--cache=memory', '--cached_path=x']), capsys)
    assert '--cached_path holds tokens already: leave out one' in text


@pytest.mark.slow
def test_a_training_with_a_cache_equals_one_without(root, data, tmp_path, train_here):
    flags = f'--data_path={root}', '--ep=2'
    plain = read(train_here(tmp_path / 'plain', *flags))
    for name, more in (('main', []), ('workers', ['--workers=2'])):
        cached = read(train_here(tmp_path / name, *flags, '--cache=memory', *more))
        assert same_weights(cached, plain) and cached['data'] == plain['data']
        assert cached['run'] == plain['run']


@pytest.mark.slow
def test_ranks_share_one_copy(root, data, tmp_path):
    """Both see the pixels that the first of them has decoded; the log names their size once."""
    flags = ['--ep=1', '--workers=1']
    made = root, data[1]
    run = launch('train.py', training(made, tmp_path / 'two', *flags, '--cache=memory', model='var'), nproc=2)
    assert run.stdout.count('48 images are decoded into 0.1 MiB of memory') == 1
    launch('train.py', training(made, tmp_path / 'plain', *flags, model='var'), nproc=2)
    assert same_weights(read(tmp_path / 'two'), read(tmp_path / 'plain'))


def test_the_embedded_sets_are_in_memory_already(tmp_path):
    config = parse_training(['--data_path=digits', '--cache=memory', '--pn=1_2_3_4', '--patch_size=8'])
    assert type(train.build_data(config).train).__name__ == 'Digits'
