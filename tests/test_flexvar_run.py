"""FlexVAR through train.py and sample.py: sizes and steps by flags."""
import json
import re

import numpy as np
import pytest

import sample
import train
from tests.runs import largest_difference, read, training

PYRAMID = (1, 2, 3, 4, 6)


@pytest.fixture
def trained(trained_folder):
    """Folder of a training of two epochs with averaged weights."""
    return trained_folder('flexvar')


def test_larger_training_images(families, here, trained, tmp_path):
    """--final_reso averages the same sides over more pixels: another training of the same model."""
    here(train, *training(families['flexvar'], tmp_path, '--ep=1', '--final_reso=64', '--keep_last=1',
                          model='flexvar'))
    assert read(tmp_path)['trainer']['config']['patch_nums'] == list(PYRAMID)
    assert largest_difference(read(tmp_path), read(trained)) > 1e-3


def test_larger_images_than_in_training_are_announced(here, trained, tmp_path, capsys):
    drawn(here, trained, tmp_path / 'a', '--infer_patch_nums=1_2_4_8')
    assert 'ends at 8, the model was trained up to 6' in ''.join(capsys.readouterr())
    images, _ = drawn(here, trained, tmp_path / 'b', '--preset=fid', '--num_images=2')
    assert images.shape == (2, 48, 48, 3) and 'trained up to' not in ''.join(capsys.readouterr())


def test_spelling_and_checks_are_no_other_job(here, trained, tmp_path):
    drawn(here, trained, tmp_path / 'a', '--infer_patch_nums=1_2_3')
    drawn(here, trained, tmp_path / 'a', '--infer-patch-nums=1-2-3', '--depth=1')


def drawn(here, trained, output, *more):
    """Images by index, and the manifest."""
    here(sample, '--model=flexvar', f'--var_ckpt={trained / "ar-ckpt-last.pth"}', '--num_images=6',
         '--shuffle=-1', f'--output={output}', *more, '--top_k=20')
    return np.load(f'{output}.npz')['arr_0'], json.loads(output.with_suffix('.json').read_text())


@pytest.mark.parametrize(('more', 'size'), [
    (['--infer_patch_nums=1_3'], (24, 24)),
    (['--infer_patch_nums=1_2_3_4_5_6_7_8_9', '--greedy_unseen=0'], (72, 72)),
    (['--size=32x56', '--pos_mode=crop'], (32, 56)),
])
def test_steps_and_sizes(here, trained, tmp_path, more, size):
    images, _ = drawn(here, trained, tmp_path / 'a', *more)
    assert images.shape == (6, *size, 3) and len(np.unique(images.reshape(6, -1), axis=0)) > 3


@pytest.mark.parametrize(('more', 'message'), [
    ('--depth=2', r'--depth=2, but .*ar-ckpt-last.pth has 1 blocks: pass the file of that depth'),
    ('--infer_patch_nums=2_4', 'must begin with 1 and .*got 2_4'),
    ('--infer_patch_nums=1_3_2', 'from coarse to fine, got 1_3_2'),
    ('--infer_patch_nums=1_two', "joined by \"_\".*got '1_two'"),
    ('--size=48x', "rows x columns in pixels, such as 384x256, or one number for squares, got '48x'"),
    ('--size=48x50', 'multiples of the stride 8, got 48x50'),
    ('--pos_mode=tile', "stretch or crop, got 'tile'"),
    ('--maxpn=-1', '--maxpn must be at least 0'),
    ('--more_smooth=1', '--more_smooth'),
    ('--sweep=depth=1,2', 'name=value,value with a name of'),
])
def test_bad_sampling_flags(here, trained, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        drawn(here, trained, tmp_path / 'a', more, '--ref=x.npz')
    error = capsys.readouterr().err or stop.value.code  # flags are refused by the parser, the rest later
    assert re.search(message, error) and len(error.splitlines()) == 1, error
    assert not (tmp_path / 'a.npz').exists()


def test_sides_are_those_of_the_checkpoint_unless_given(here, trained, tmp_path):
    images, manifest = drawn(here, trained, tmp_path / 'a', '--maxpn=16')
    assert images.shape == (6, 48, 48, 3)
    assert manifest['settings']['maxpn'] == 16
    given, _ = drawn(here, trained, tmp_path / 'b', '--maxpn=16', '--infer_patch_nums=1-2-3-4-6')
    assert np.array_equal(images, given)
