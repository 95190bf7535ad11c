"""Packed images: tar files are the same data set as their folder, whatever is wrong with its files."""
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import extract
import train
from configs.options import make_parser
from evaluation.pack import PackSettings as NpzSettings
from evaluation.pack import evaluate_pack
from tests.runs import (
    REPO,
    assert_equal,
    environment,
    extraction,
    interrupt,
    make_folder,
    message,
    prepared,
    read,
    training,
)
from utils import check_data, pack_data
from utils.check_data import CheckSettings, check
from utils.data import KeyedAugmentation, build_dataset, describe_data, name_of, open_both, open_split
from utils.pack_data import PackSettings, pack
from utils.shards import BEGUN, INDEX, PackedImages


def broken(content, number):
    """One of ten ways in which a file is no image."""
    return [
        content[:60],                              # cut within the header
        content[:len(content) // 2],               # cut within the pixels
        b'',
        b'<html>404 not found</html>',
        bytes(len(content)),
        content[:8] + bytes(8) + content[16:],     # a wrong chunk
        content[::-1],
        b'\xff\xd8\xff\xe0' + content[4:],         # the beginning of a JPEG
        content[:40] + bytes(40) + content[80:],   # damaged pixels
        b'GIF89a',
    ][number % 10]


def noisy_folder(root, num_train, num_val, num_broken):
    """Images of four classes in both splits, of which some of the training images are broken; their names."""
    rng = np.random.RandomState(0)
    for split, count in (('train', num_train), ('val', num_val)):
        for i in range(count):
            folder = root / split / f'class {i % 4}'
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.randint(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f'{i:04d}é.png')
    chosen = sorted((root / 'train').rglob('*.png'))[::num_train // num_broken][:num_broken]
    for number, path in enumerate(chosen):
        path.write_bytes(broken(path.read_bytes(), number))
    return [path.relative_to(root / 'train').as_posix() for path in chosen]


def packed(root, output, **settings):
    pack(PackSettings(str(root), str(output), **settings))
    return output


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != '.lock'}


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """(folder, the same packed, names of its broken images): 100 training images, ten of them broken."""
    root = tmp_path_factory.mktemp('both')
    names = noisy_folder(root / 'images', 100, 8, 10)
    return root / 'images', packed(root / 'images', root / 'tar'), names


# ---------------------------------------------------------------------------------------------- the same data
def assert_same_items(folder, tar, workers=0):
    """Names, classes, order, digests, pixels, labels, and what stands in for broken images."""
    for split in ('train', 'val'):
        sets = [open_split(str(path), split) for path in (folder, tar)]
        assert sets[0].names() == sets[1].names() and list(sets[0].classes) == sets[1].classes
        assert sets[1].targets.tolist() == sets[0].targets
        assert describe_data(sets[0]) == describe_data(sets[1])
    items = []
    for path in (folder, tar):
        dataset = KeyedAugmentation(build_dataset(str(path), 16, True, 1.2)[1], seed=5, replace_damaged=True)
        keys = [(1, index) for index in range(len(dataset))]
        items.append(list(DataLoader(dataset, batch_sampler=[keys[i:i + 25] for i in range(0, len(keys), 25)],
                                     num_workers=workers)))
    damaged = set()
    for i, (ours, theirs) in enumerate(zip(*items, strict=True)):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert [bool(damage) for damage in ours[2]] == [bool(damage) for damage in theirs[2]]
        damaged |= {25 * i + row for row, damage in enumerate(theirs[2]) if damage}
        assert all('.tar: class ' in damage for damage in theirs[2] if damage)
    return {open_split(str(folder), 'train').names()[index] for index in damaged}


@pytest.mark.parametrize('workers', [0, 2])
def test_packed_images_are_those_of_the_folder(both, workers):
    folder, tar, names = both
    assert assert_same_items(folder, tar, workers) == set(names)
    assert name_of(open_split(str(tar), 'train'), 3).endswith(
        f'train-00000.tar: {open_split(str(folder), "train").names()[3]}')


def test_any_tar_program_gives_the_folder_back(both, tmp_path):
    folder, tar, _ = both
    for path in sorted(tar.glob('*.tar')):
        subprocess.run(['tar', 'xf', path, '-C', tmp_path], check=True)
    for path in folder.rglob('*.png'):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_training_goes_on_from_a_folder_to_its_tar_files(both, data, tmp_path):
    """Half a run on the folder and half on the tar files ends with the weights of a run on the folder."""
    folder, tar, names = both
    flags = '--ep=1', '--save_every=4', '--workers=0'
    train.train(prepared(training((folder, data[1]), tmp_path / 'folder', *flags, model='var')))
    run = prepared(training((folder, data[1]), tmp_path / 'both', *flags, model='var'))
    interrupt(lambda: train.train(run), 6)
    train.train(prepared(training((tar, data[1]), tmp_path / 'both', *flags, model='var')))
    final, expected = read(tmp_path / 'both'), read(tmp_path / 'folder')
    assert_equal(final['trainer'], expected['trainer'])
    assert final['data'] == expected['data'] and len(expected['run']['bad_images']) == len(names)


@pytest.mark.slow
def test_a_thousand_images_of_which_forty_are_broken(data, tmp_path):
    names = noisy_folder(tmp_path / 'images', 1000, 16, 40)
    tar = packed(tmp_path / 'images', tmp_path / 'tar')
    assert assert_same_items(tmp_path / 'images', tar, 2) == set(names)
    finals = []
    for path in (tmp_path / 'images', tar):
        output = tmp_path / f'run on {path.name}'
        train.train(prepared(training((path, data[1]), output, '--ep=1', '--workers=2', model='var')))
        finals.append(read(output))
        found = check(CheckSettings(str(path), workers=2))
        assert len(found.unreadable) == 40
        assert all(any(f'{name}\'' in line for line in found.unreadable) for name in names)
    assert_equal(finals[0]['trainer'], finals[1]['trainer'])
    assert [len(final['run']['bad_images']) for final in finals] == [40, 40]


def test_other_commands_read_packed_images(data, tmp_path):
    """extract.py and the packer of references give the same from both."""
    tar = packed(data[0], tmp_path / 'tar')
    parser = make_parser(extract.ExtractSettings, 'extract.py', '')
    for name, path in (('folder', data[0]), ('packed', tar)):
        flags = extraction((path, data[1]), tmp_path / name, model='var')
        extract.extract(extract.ExtractSettings(**parser.parse(flags)))
        evaluate_pack(NpzSettings(str(path), str(tmp_path / f'{name}.npz'), image_size=16))
    for name in ('tokens.npy', 'labels.npy'):
        assert (tmp_path / 'folder' / name).read_bytes() == (tmp_path / 'packed' / name).read_bytes()
    manifests = [json.loads((tmp_path / name / 'manifest.json').read_text()) for name in ('folder', 'packed')]
    assert manifests[0] | dict(data_path='') == manifests[1] | dict(data_path='')
    ours, theirs = (np.load(tmp_path / f'{name}.npz') for name in ('folder', 'packed'))
    assert np.array_equal(ours['arr_0'], theirs['arr_0']) and np.array_equal(ours['arr_1'], theirs['arr_1'])


# ---------------------------------------------------------------------------------------------- packing
def test_a_copy_gives_equal_bytes_and_shards_are_filled(both, tmp_path):
    folder, tar, _ = both
    shutil.copytree(folder, tmp_path / 'copy')
    assert content_of(packed(tmp_path / 'copy', tmp_path / 'tar')) == content_of(tar)
    assert set(content_of(tar)) == {'train-00000.tar', 'val-00000.tar', 'train.index.npz', 'val.index.npz'}
    rng = np.random.RandomState(0)  # larger files, so that they need several shards
    for i in range(5):
        Image.fromarray(rng.randint(0, 255, (400, 400, 3), dtype=np.uint8)).save(
            tmp_path / 'copy' / 'train' / 'class 0' / f'{"long" * 40} {i}.png')
    output = packed(tmp_path / 'copy', tmp_path / 'several', shard_mb=1)
    sizes = [path.stat().st_size for path in sorted(output.glob('train*.tar'))]
    assert len(sizes) == 3 and max(sizes) <= 2 ** 20
    names = []
    for path in sorted(output.glob('train*.tar')):
        with tarfile.open(path) as archive:
            names += [entry.name.removeprefix('train/') for entry in archive]
    assert names == open_split(str(output), 'train').names()
    assert_same_items(tmp_path / 'copy', output)


class Killed(Exception):
    """Stands for SIGKILL."""


@pytest.mark.parametrize('moment', [0, 1, 2, 3])
def test_a_killed_packer_goes_on(both, tmp_path, monkeypatch, moment):
    """At its first tar file, at the second one, before and between the indices."""
    folder, tar, _ = both
    calls = []
    name = 'write_shard' if moment < 2 else 'finish'
    original = getattr(pack_data.Packing, name)

    def killed(self, *args):
        if len(calls) == moment % 2:
            raise Killed
        calls.append(0)
        return original(self, *args)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pack_data.Packing, name, killed)
        packed(folder, tmp_path)
    with pytest.raises(ValueError, match='are not all packed yet: run the same utils'):
        open_both(str(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('*.tar')}
    assert content_of(packed(folder, tmp_path)) == content_of(tar)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob('*.tar')}
    assert before.items() <= after.items()  # what was there is not written again


@pytest.mark.slow
def test_a_packer_that_is_really_killed_goes_on(tmp_path):
    noisy_folder(tmp_path / 'images', 200, 8, 10)
    rng = np.random.RandomState(0)
    for i in range(40):
        pixels = rng.randint(0, 255, (600, 600, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'images' / 'train' / 'class 1' / f'large {i}.png')
    expected = content_of(packed(tmp_path / 'images', tmp_path / 'straight', shard_mb=2))
    command = [sys.executable, '-m', 'utils.pack_data', tmp_path / 'images', tmp_path / 'out', '--shard_mb=2']
    for attempt in range(20):
        process = subprocess.Popen(command, cwd=REPO, env=environment(), stdout=subprocess.DEVNULL)
        while not (tmp_path / 'out' / BEGUN.format(split='train')).exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(random.Random(attempt).uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
    subprocess.run(command, cwd=REPO, env=environment(), check=True)
    assert content_of(tmp_path / 'out') == expected


def test_packing_into_the_folder_of_another_data_set_is_refused(both, tmp_path):
    folder, tar, _ = both
    noisy_folder(tmp_path / 'other', 20, 4, 1)
    before = content_of(tar)
    with pytest.raises(ValueError, match=r'tar. was begun with another count, digest of train: pass another'):
        packed(tmp_path / 'other', tar)
    with pytest.raises(ValueError, match='was begun with another shard_mb of train'):
        packed(folder, tar, shard_mb=7)
    with pytest.raises(ValueError, match='is packed or embedded already'):
        packed(tar, tmp_path / 'out')
    with pytest.raises(ValueError, match='is packed or embedded already'):
        packed('digits', tmp_path / 'out')
    assert content_of(tar) == before


def test_files_that_are_no_files_or_change(tmp_path, caplog):
    """A link to nowhere is replaced in a training, from the folder or packed; a changed file is refused."""
    root = make_folder(tmp_path / 'images')
    (root / 'train' / 'ant' / 'nowhere.png').symlink_to('nowhere')
    output = packed(root, tmp_path / 'tar')
    assert "there is no file" in caplog.text and 'nowhere.png' in caplog.text
    dataset = open_split(str(output), 'train')
    index = dataset.names().index('ant/nowhere.png')
    with pytest.raises(ValueError, match=r'tar: ant/nowhere\.png'):
        dataset[index]
    (tmp_path / 'tar' / 'train-00000.tar').unlink()
    with (root / 'train' / 'bee' / '01.png').open('ab') as file:
        file.write(b'more')
    with pytest.raises(ValueError, match=r'bee/01.png. has .* bytes, it had .* when packing began: remove'):
        packed(root, output)


def test_a_part_that_is_held_out_is_packed(tmp_path):
    root = make_folder(tmp_path / 'images')
    shutil.rmtree(root / 'val')
    output = packed(root, tmp_path / 'tar', val_split=0.2)
    expected = open_both(str(root), val_split=0.2)
    assert list(map(describe_data, open_both(str(output)))) == list(map(describe_data, expected))
    with pytest.raises(ValueError, match='has its own validation images: leave out the flag'):
        open_both(str(output), val_split=0.2)


# ---------------------------------------------------------------------------------------------- damage
@pytest.fixture
def copied(both, tmp_path):
    return shutil.copytree(both[1], tmp_path / 'tar')


def without_arrays(path, **changes):
    """Replace arrays of an index; None leaves one out."""
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize(('damage', 'words'), [
    (lambda path: path.write_bytes(b''), 'cannot read it'),
    (lambda path: path.write_bytes(b'x' * 500), 'cannot read it'),
    (lambda path: path.write_bytes(path.read_bytes()[:-300]), 'cannot read it'),
    (lambda path: path.write_bytes(path.read_bytes().replace(b'sizes', b'sizzs')), 'cannot read it'),
    (lambda path: without_arrays(path, sizes=None), 'sizes is not a file'),
    (lambda path: without_arrays(path, header=np.frombuffer(b'{"kind": "other"}', np.uint8)), "'other'"),
    (lambda path: without_arrays(path, header=np.frombuffer(b'[]', np.uint8)), 'cannot read it'),
    (lambda path: without_arrays(path, labels=np.full(100, 9)), 'labels in 9..9 of 4 classes'),
    (lambda path: without_arrays(path, offsets=np.full(100, 2 ** 40)), 'outside the tar files'),
    (lambda path: without_arrays(path, shards=np.full(100, 3)), 'cannot read it'),
    (lambda path: without_arrays(path, sizes=np.zeros(99, int)), 'numbers of images in its parts: [99, 100]'),
    (lambda path: path.unlink(), 'found no such file')])
def test_a_damaged_index_is_named_in_a_line(copied, damage, words):
    damage(copied / INDEX.format(split='train'))
    with pytest.raises(ValueError, match=r'train\.index\.npz') as caught:
        open_split(str(copied), 'train')
    text = str(caught.value)
    assert words in text and 'run the same utils.pack_data command again' in text
    assert len(text.splitlines()) == 1


def test_a_missing_or_short_shard_is_named_and_mended(both, copied, data, tmp_path, capsys, train_here):
    shard = copied / 'train-00000.tar'
    os.truncate(shard, 1000)
    text = message(lambda: train_here(tmp_path / 'run', f'--data_path={copied}'), capsys)
    assert "bytes in '" in text and 'train-00000.tar' in text and 'got 1,000: copy it again' in text
    shard.unlink()
    with pytest.raises(ValueError, match=r'train-00000\.tar., found no such file: copy it again'):
        open_split(str(copied), 'train')
    packed(both[0], copied)
    assert content_of(copied) == content_of(both[1])


def test_a_shard_that_shrinks_in_a_training_is_damage_of_its_images(copied):
    dataset = open_split(str(copied), 'train')
    dataset[1]
    os.truncate(copied / 'train-00000.tar', 2000)
    with pytest.raises(ValueError, match=r'cannot read .*train-00000\.tar: class .*has become shorter'):
        dataset[50]


def test_descriptors_of_processes(both):
    """A copy in another process opens the files itself; in one process a file is opened once."""
    dataset = PackedImages(both[1], 'train')
    assert dataset.files.descriptors == {}
    expected = dataset[1][0].tobytes()
    opened = dict(dataset.files.descriptors)
    assert list(opened) == [0]
    dataset[2]
    assert dataset.files.descriptors == opened
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.files.descriptors == {} and copy[1][0].tobytes() == expected
    assert copy.files.descriptors[0] != opened[0]
    del copy
    assert dataset[1][0].tobytes() == expected


# ---------------------------------------------------------------------------------------------- the check
def run_check(monkeypatch, capsys, *argv):
    """Exit code and printed lines of the command."""
    monkeypatch.setattr(sys, 'argv', ['check_data', *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        check_data.main()
    return stop.value.code, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize('place', [0, 1])
def test_the_check_names_every_broken_image(both, tmp_path, monkeypatch, capsys, place):
    path = tmp_path / 'report.json'
    code, lines = run_check(monkeypatch, capsys, both[place], '--workers=2', f'--report={path}')
    assert code == 1
    report = json.loads(path.read_text())
    assert len(report['unreadable']) == 10 and report['images'] == dict(train=100, val=8)
    for name in both[2]:
        assert sum(f"{name}'" in line for line in lines) == 1
        assert sum(f"{name}'" in line for line in report['unreadable']) == 1
    assert sum(report['reasons'].values()) == 10 and len(report['reasons']) == 3
    assert '100 of train, 8 of val: 10 cannot be read, 0 other files are left out' in lines
    assert lines[-1].startswith('108 images in ') and lines[-1].endswith(' images/s')


def test_the_check_lists_what_is_left_out_and_classes_that_differ(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / 'images')
    assert run_check(monkeypatch, capsys, root, '--workers=0')[0] == 0
    (root / 'train' / 'ant' / 'a.heic').touch()
    (root / 'val' / 'bee' / 'Thumbs.db').touch()
    code, lines = run_check(monkeypatch, capsys, root, '--workers=0')
    assert code == 0
    assert {f'left out: {root}/train/ant/a.heic', f'left out: {root}/val/bee/Thumbs.db'} <= set(lines)
    (root / 'val' / 'doe').rename(root / 'val' / 'emu')
    code, lines = run_check(monkeypatch, capsys, root, '--workers=0')
    assert code == 1 and {"class 'doe' is in train alone", "class 'emu' is in val alone"} <= set(lines)
    shutil.rmtree(root / 'val')
    code, lines = run_check(monkeypatch, capsys, root, '--workers=0')
    assert code == 1 and any('found no such folder' in line and '--val_split=0.1' in line for line in lines)
    assert '40 of train: 0 cannot be read, 1 other files are left out' in lines
    assert run_check(monkeypatch, capsys, root, '--workers=0', '--val_split=0.1')[0] == 0
    for path in (root / 'train').rglob('*.png'):
        path.rename(root / 'train' / path.name)
    (root / 'train.txt').write_text(''.join(f'{i:02d}.png 0\n' for i in range(39)))
    code, lines = run_check(monkeypatch, capsys, root, '--workers=0', '--val_split=0.1')
    assert code == 0 and f'left out: {root}/train/39.png' in lines
