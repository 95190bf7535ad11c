"""The one command for own photos: what it finds in a folder, proposes, leaves behind, and goes on with."""
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image

from configs import parse_sampling, parse_training
from evaluation.settings import parse_evaluation
from recipes import photos
from recipes.photos import CPU, GPU, Plan, Settings, Speed
from tests.runs import REPO, environment
from tests.scenes import draw
from utils.data import open_both


@pytest.fixture(scope='module')
def album(tmp_path_factory):
    """Scenes of two classes, of which the first lies on its side; half a photo, a text, a hidden folder."""
    folder = tmp_path_factory.mktemp('album')
    draw(folder, 12)
    whole = (folder / 'day' / 'DSC_0002.JPG').read_bytes()
    (folder / 'day' / 'half.jpg').write_bytes(whole[:len(whole) // 2])
    (folder / 'notes.txt').write_text('summer')
    (folder / '.thumbnails').mkdir()
    shutil.copy(folder / 'day' / 'DSC_0004.JPG', folder / '.thumbnails')
    return folder


@pytest.fixture(scope='module')
def flat(album, tmp_path_factory):
    """The scenes of one class, without a folder of their own."""
    return shutil.copytree(album / 'night', tmp_path_factory.mktemp('flat') / 'night')


# ---------------------------------------------------------------------------------------------- the photos
def test_folders_are_classes(album):
    found = photos.find_photos(album)
    assert {name: len(paths) for name, paths in found.classes.items()} == dict(day=7, night=6)
    assert photos.describe(found).splitlines() == ['13 photos of 2 classes: day 7, night 6',
                                                   'left out, since they are no images: 1 .txt']


def test_photos_without_folders_have_no_class(flat, album, tmp_path):
    assert photos.describe(photos.find_photos(flat)) == '6 photos without classes'
    both = shutil.copytree(flat, tmp_path / 'both')
    shutil.copytree(album / 'day', both / 'day')
    assert photos.describe(photos.find_photos(both)).splitlines() == [
        '7 photos of 1 class: day 7', 'left out, since they lie beside the folders of the classes: 6 images']


def test_other_folders_are_refused(tmp_path):
    (tmp_path / 'film.mov').write_bytes(b'')
    with pytest.raises(ValueError, match=r'found 0 and 1 \.mov: images end with \.jpg'):
        photos.find_photos(tmp_path)
    (tmp_path / 'train').mkdir()
    with pytest.raises(ValueError, match=r"holds train/.* pass '.*/train'"):
        photos.find_photos(tmp_path)


def test_copies_are_small_and_upright_and_leave_the_photos_alone(album, tmp_path, capsys):
    def contents():
        return {path: path.read_bytes() for path in album.rglob('*') if path.is_file()}

    before = contents()
    photos.copy_photos(photos.find_photos(album), tmp_path, 32)
    assert contents() == before
    assert 'half.jpg' in capsys.readouterr().out
    copies = sorted((tmp_path / 'photos').rglob('*.png'))
    assert len(copies) == 12
    assert {min(Image.open(path).size) for path in copies} == {36}

    # The sky, which is blue, is above the hills in the photo that lies on its side.
    turned = np.asarray(Image.open(tmp_path / 'photos' / 'train' / 'day' / 'DSC_0000.JPG.png')).astype(int)
    assert turned[:8, :, 2].mean() > turned[-8:, :, 2].mean() + 20

    # A second command makes none of them again, and training takes them as they are.
    written = {path: path.stat().st_mtime_ns for path in copies}
    photos.copy_photos(photos.find_photos(album), tmp_path, 32)
    assert {path: path.stat().st_mtime_ns for path in copies} == written
    train_set, val_set = open_both(str(tmp_path / 'photos'), val_split=0.1)
    assert (train_set.classes, len(train_set), len(val_set)) == (['day', 'night'], 10, 2)


# ---------------------------------------------------------------------------------------------- the proposal
def proposed(machine=CPU, tokenizer=0.2, generator=0.4, num_photos=10_000, short_side=1000, **settings):
    """The plan for a machine on which steps take so many seconds."""
    plan = Plan('', num_photos, machine.size, machine.depths[0], machine.batch, machine.precision)
    return photos.plan_for(Settings(folder='.', out='/out', **settings), machine, short_side,
                           Speed(plan, tokenizer, generator, start=10.))


@pytest.mark.parametrize(('given', 'size', 'depth'), [
    (dict(minutes=15.), 64, 3),
    (dict(minutes=120.), 64, 5),
    (dict(minutes=3.), 32, 3),                         # which gives more steps
    (dict(minutes=0.5), 32, 3),                        # whatever can be had in no time
    (dict(short_side=50), 48, 3),
    (dict(short_side=20), 32, 4),
    (dict(size=128), 128, 3),                          # where somebody insists
    (dict(tokenizer=0.03, generator=0.03), 64, 6),     # many cores
    (dict(machine=GPU, tokenizer=0.05, generator=0.05), 128, 12),
])
def test_proposal_suits_photos_machine_and_time(given, size, depth):
    plan = proposed(**given)
    assert (plan.size, plan.depth) == (size, depth)


def test_steps_fill_the_time():
    speed = Speed(Plan('', 10_000, 64, 3, 16, 0), tokenizer=0.2, generator=0.4, start=10.)
    plan = proposed(minutes=30.)
    assert speed.minutes(plan) == pytest.approx(30, rel=0.02)
    assert plan.tokenizer_steps * 0.2 == pytest.approx(plan.generator_steps * 0.4 * 2 / 3, rel=0.02)

    # Of few photos a VAR soon knows all, and a day is not used up.
    assert proposed(num_photos=300, minutes=60. * 24).generator_steps == 300 * 300 // 16
    assert proposed(minutes=0.1).generator_steps == photos.TRIAL_STEPS


@pytest.mark.parametrize('machine', [CPU, GPU])
@pytest.mark.parametrize('size', photos.SIZES)
def test_proposed_commands_are_understood(tmp_path, machine, size):
    plan = proposed(machine, size=size)
    parsers = {'evaluate.py': partial(parse_evaluation, text=''), 'sample.py': parse_sampling}
    for command in (photos.tokenizer_command(plan, tmp_path), photos.generator_command(plan, tmp_path)):
        config = parse_training(command[2:])
        assert config.image_size == size
        config.check_batch(world_size=1)
        words = shlex.split(config.after_save.partition(' >')[0])
        parsers[words[1].rpartition('/')[2]](words[2:])


# ---------------------------------------------------------------------------------------------- the command
@pytest.fixture
def tiny_plan(album):
    """Makes an output folder with a plan that takes a moment."""
    def write(out, steps=1):
        plan = Plan(str(album), 13, size=32, depth=1, batch=4, precision=0, tokenizer_steps=steps,
                    generator_steps=steps)
        out.mkdir()
        (out / 'plan.json').write_text(json.dumps(dataclasses.asdict(plan)))
        return out
    return write


def test_an_output_folder_belongs_to_one_plan(album, flat, tiny_plan, tmp_path):
    out = str(tiny_plan(tmp_path / 'out'))
    assert photos.earlier_plan(Settings(str(album), out=out)).depth == 1
    assert photos.earlier_plan(Settings(str(album), out=f'{out}2')) is None
    with pytest.raises(ValueError, match='begun with --size=32, got 64: pass the same, or another --out'):
        photos.earlier_plan(Settings(str(album), out=out, size=64))
    with pytest.raises(ValueError, match=r'for the photos in .*album.*: pass another --out'):
        photos.earlier_plan(Settings(str(flat), out=out))
    with pytest.raises(ValueError, match='lies among the photos'):
        Settings(str(album), out=str(album / 'day' / 'out'))


def test_what_is_done_is_not_done_again(album, tiny_plan, tmp_path, monkeypatch, capsys):
    out = tiny_plan(tmp_path / 'out')
    ran = []
    monkeypatch.setattr(photos, 'run', lambda command, progress=None: ran.append(command[1:]))
    monkeypatch.setattr(sys, 'argv', ['photos.py', str(album), f'--out={out}'])
    (out / 'tokenizer').mkdir()
    (out / 'tokenizer' / 'vae-export.pth').touch()
    photos.main()
    assert [command[0].rpartition('/')[2] for command in ran] == ['train.py', 'sample.py']
    assert ran[0][-1] == f'--output_dir={out / "generator"}'
    last = capsys.readouterr().out.splitlines()[-1]
    config = parse_sampling(shlex.split(last.partition(' sample.py ')[2]))
    assert (config.classes, config.seed) == ('day', 1)  # not those that were drawn already


# ---------------------------------------------------------------------------------------------- whole runs
def start(*argv):
    command = [sys.executable, '-m', 'recipes.photos', *map(str, argv)]
    return subprocess.Popen(command, cwd=REPO, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(path, run):
    while run.poll() is None and not path.exists():
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_command_goes_on_as_if_nothing_had_happened(album, tiny_plan, tmp_path):
    whole = tiny_plan(tmp_path / 'whole', steps=60)
    text, _ = (run := start(album, f'--out={whole}')).communicate()
    assert run.returncode == 0, text

    # It is stopped in the first stage, and killed with all that it has started in the second one.
    parts = tiny_plan(tmp_path / 'parts', steps=60)
    run = start(album, f'--out={parts}')
    wait_for(parts / 'tokenizer' / 'vae-ckpt-last.pth', run)
    run.terminate()
    text, _ = run.communicate()
    assert run.returncode == 75 and 'run the same command again' in text
    run = start(album, f'--out={parts}')
    wait_for(parts / 'generator' / 'ar-ckpt-last.pth', run)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert not (parts / 'generator' / 'model').exists()
    text, _ = (run := start(album, f'--out={parts}')).communicate()
    assert run.returncode == 0, text
    assert 'training the tokenizer' not in text
    assert (parts / 'samples.png').read_bytes() == (whole / 'samples.png').read_bytes()


@pytest.mark.slow
def test_photos_without_classes_become_pictures(tmp_path):
    draw(tmp_path / 'scenes', 40)
    album = tmp_path / 'album'
    album.mkdir()
    for path in (tmp_path / 'scenes').rglob('*.JPG'):
        path.rename(album / path.name)
    (album / 'broken.jpg').write_bytes(b'broken')
    out = tmp_path / 'out'
    text, _ = (run := start(album, '--minutes=1', f'--out={out}')).communicate()
    assert run.returncode == 0, text
    assert '41 photos without classes' in text and 'broken.jpg' in text and 'the plan, for about' in text
    samples = np.load(out / 'samples.npz')['arr_0']
    assert samples.shape == (photos.NUM_PICTURES, 32, 32, 3) and samples.std() > 10
    assert (out / 'samples.png').exists() and (out / 'pictures' / 'reconstructions.png').exists()
