"""The one command for own photos: what it finds in a folder, proposes, leaves behind, and goes on with."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from configs import parse_training
from recipes import photos
from tests.runs import REPO, environment
from tests.scenes import CLASSES, draw
from utils.stop import StopRequest


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Scenes of two classes, of which the first lies on its side; a broken one, a text, a hidden folder."""
    root = tmp_path_factory.mktemp('album')
    draw(root, 24)
    whole = (root / 'day' / 'DSC_0002.JPG').read_bytes()
    (root / 'day' / 'half.jpg').write_bytes(whole[:len(whole) // 2])
    (root / 'notes.txt').write_text('summer')
    (root / '.thumbnails').mkdir()
    shutil.copy(root / 'day' / 'DSC_0004.JPG', root / '.thumbnails')
    return root


# ---------------------------------------------------------------------------------------------- the photos
def test_a_folder_is_described(folder):
    found = photos.look_at(folder)
    assert {name: len(files) for name, files in found.classes.items()} == dict(day=13, night=12)
    text = photos.describe(found)
    assert 'found 25 photos of 2 classes (day 13, night 12)' in text
    assert 'no images: 1 .txt' in text


def test_photos_without_folders_are_one_class(folder, tmp_path):
    for path in (folder / 'night').iterdir():
        shutil.copy(path, tmp_path)
    found = photos.look_at(tmp_path)
    assert {name: len(files) for name, files in found.classes.items()} == {tmp_path.name: 12}
    (tmp_path / 'night').mkdir()
    shutil.copy(folder / 'night' / 'DSC_0001.JPG', tmp_path / 'night')
    shutil.copy(folder / 'night' / 'DSC_0003.JPG', tmp_path / 'night')
    assert 'left out: 12 images beside the class folders' in photos.describe(photos.look_at(tmp_path))


def test_a_folder_without_photos_is_refused(tmp_path):
    (tmp_path / 'film.mov').write_bytes(b'')
    with pytest.raises(ValueError, match=r'found 1 \.mov: images end with \.jpg'):
        photos.look_at(tmp_path)


def test_copies_are_small_and_upright_and_leave_the_photos_alone(folder, tmp_path, capsys):
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    copies = photos.copy_photos(photos.look_at(folder), tmp_path, 32, StopRequest())
    assert {name: len(files) for name, files in copies.items()} == dict(day=12, night=12)
    assert 'half.jpg' in capsys.readouterr().out
    assert {min(Image.open(path).size) for files in copies.values() for path in files} == {48}

    # The sky, which is blue, is above the hills.
    turned = np.asarray(Image.open(copies['day'][0])).astype(int)
    assert copies['day'][0].name == 'DSC_0000.JPG.jpg'
    assert turned[:8, :, 2].mean() > turned[-8:, :, 2].mean() + 20
    assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before


def test_some_photos_of_each_class_are_held_out(folder, tmp_path):
    copies = photos.copy_photos(photos.look_at(folder), tmp_path, 32, StopRequest())
    copies['night'] = copies['night'][:1]
    assert photos.arrange(copies, tmp_path / 'data', photos.ON_CPU) == 12
    names = {part: {path.read_bytes() for path in (tmp_path / 'data' / part).rglob('*.jpg')}
             for part in ('train', 'val')}
    assert len(names['val']) == 2
    assert names['train'] & names['val'] == {copies['night'][0].read_bytes()}  # a single photo is both
    assert len(list((tmp_path / 'data' / 'train').rglob('*.jpg'))) >= 100 * 64


# ---------------------------------------------------------------------------------------------- the proposal
def test_the_size_fits_photos_time_and_machine():
    large = [3000] * 50
    assert photos.first_size(large, 30, on_gpu=False) == 64
    assert photos.first_size(large, 30, on_gpu=True) == 128
    assert photos.first_size(large, 1, on_gpu=False) == 32
    assert photos.first_size([50] * 9, 30, on_gpu=False) == 48
    assert photos.first_size([20], 30, on_gpu=False) == 32


def test_steps_fill_the_time():
    shape = photos.shape_of(64, on_gpu=False)
    speeds = photos.Speed(0.5, 10.), photos.Speed(1., 10.)
    tokenizer, generator = photos.steps_within(shape, *speeds, 1800, num_train=10_000)
    assert 0.5 * tokenizer + generator + 30 == pytest.approx(1800, rel=0.06)
    assert 0.5 * tokenizer == pytest.approx(0.4 / 0.6 * generator, rel=0.01)

    # A fast machine trains a deeper generator, a slow one the smallest.
    fast, _ = photos.with_depth(shape, speeds[0], photos.Speed(0.05, 10.), 1800, num_train=10_000)
    slow, (_, speed) = photos.with_depth(shape, speeds[0], photos.Speed(5., 10.), 1800, num_train=10_000)
    assert (fast.depth, slow.depth) == (10, 3)
    assert speed.step == pytest.approx(5 * (3 / 4) ** 3)

    # Of few photos, a day is not used up; where there is no time at all, a few steps are made.
    day = photos.steps_within(shape, *speeds, 86_400, num_train=270)
    assert day == (4 * 2531, 2531)
    assert min(photos.steps_within(shape, *speeds, 5, num_train=270)) > 0


@pytest.mark.parametrize('on_gpu', [False, True])
@pytest.mark.parametrize('size', photos.SIZES)
def test_proposed_commands_are_understood(tmp_path, size, on_gpu):
    shape = photos.shape_of(size, on_gpu)
    for command in (photos.tokenizer_command(shape, tmp_path, tmp_path, 10),
                    photos.generator_command(shape, on_gpu, tmp_path, tmp_path, 10)):
        config = parse_training(command[2:])
        assert config.image_size == size and config.steps == 10
        config.check_batch(world_size=1)


def test_a_folder_belongs_to_one_plan(folder, tmp_path):
    plan = photos.Plan(folder=str(folder), minutes=5., on_gpu=False, classes=['day'], tokenizer_steps=1,
                       generator_steps=1, **vars(photos.shape_of(32, on_gpu=False)))
    options = photos.parse([str(folder)])
    assert photos.earlier_plan(tmp_path, options) is None
    photos.write_plan(plan, tmp_path)
    assert photos.earlier_plan(tmp_path, options) == plan
    with pytest.raises(ValueError, match='begun with size=32, got 64: pass the same, or another --out'):
        photos.earlier_plan(tmp_path, photos.parse([str(folder), '--size=64']))


@pytest.mark.parametrize(('argv', 'words'), [
    (['/nowhere'], 'found none at'), (['.', '--size=50'], 'choose from'), (['.', '--minutes=0'], 'above 0')])
def test_wrong_options_are_one_line(argv, words, capsys):
    with pytest.raises(SystemExit, match='2'):
        photos.parse(argv)
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1


# ---------------------------------------------------------------------------------------------- whole runs
def start(*argv):
    command = [sys.executable, '-m', 'recipes.photos', *map(str, argv), '--yes']
    return subprocess.Popen(command, cwd=REPO, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def has_pictures(out, num_classes):
    """Whether all that a finished run leaves is there."""
    plan = json.loads((out / 'photos.json').read_text())
    assert plan['done'] == ['tokenizer', 'generator', 'samples']
    assert len(plan['classes']) == num_classes
    samples = np.load(out / 'samples.npz')
    assert samples['arr_0'].shape == (photos.NUM_SAMPLES, 32, 32, 3)
    assert samples['arr_0'].std() > 10
    assert {*samples['arr_1'].tolist()} == {*range(num_classes)}
    assert (out / 'samples.png').exists() and (out / 'pictures' / 'reconstructions.png').exists()
    return True


@pytest.mark.slow
def test_photos_become_pictures_in_a_minute(tmp_path):
    draw(tmp_path / 'album', 300)
    (tmp_path / 'album' / 'day' / 'broken.jpg').write_bytes(b'broken')
    run = start(tmp_path / 'album', '--minutes=1', f'--out={tmp_path / "out"}')
    text, _ = run.communicate()
    assert run.returncode == 0, text
    assert has_pictures(tmp_path / 'out', num_classes=2)
    assert 'broken.jpg' in text and 'plan for this machine' in text and '--classes=day' in text


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_photos_need_no_classes(tmp_path):
    draw(tmp_path, 40)
    album = tmp_path / 'album'
    album.mkdir()
    for name in CLASSES:
        for path in (tmp_path / name).iterdir():
            path.rename(album / path.name)
    out = tmp_path / 'out'
    run = start(album, '--minutes=1.5', f'--out={out}')
    steps = out / 'generator' / 'steps.jsonl'
    while run.poll() is None and not steps.exists():
        time.sleep(0.1)
    os.kill(run.pid, signal.SIGTERM)
    text, _ = run.communicate()
    assert run.returncode == 75 and 'run the same command again' in text
    assert json.loads((out / 'photos.json').read_text())['done'] == ['tokenizer']
    tokenizer = (out / 'tokenizer' / 'vae-ckpt-last.pth').stat().st_mtime_ns

    # What was done is not done again, and what was begun goes on.
    run = start(album, f'--out={out}')
    text, _ = run.communicate()
    assert run.returncode == 0, text
    assert has_pictures(out, num_classes=1)
    assert (out / 'tokenizer' / 'vae-ckpt-last.pth').stat().st_mtime_ns == tokenizer
    assert 'resumed from' in (out / 'generator' / 'stdout.txt').read_text()
