"""An npz of sample.py as a training set: its images and labels, and what is checked of them."""
import json

import numpy as np
import pytest
from PIL import Image

from configs import parse_training
from tests.runs import CLASSES
from training.data import note_on_drawing
from training.finetune import check_same_classes
from utils.data import build_dataset
from utils.drawn_images import DrawnImages
from utils.image_sets import write_npz


def drawn(path, count=12, names=CLASSES, side=20, labels=None, **settings):
    """An npz with its manifest, as sample.py leaves them."""
    rng = np.random.RandomState(1)
    labels = np.arange(count) % len(names) if labels is None else np.array(labels)
    write_npz(path, rng.randint(0, 256, (count, side, side, 3)).astype(np.uint8), count, side, side, labels)
    manifest = dict(settings=dict(model='var', cfg=1.5, top_k=0, top_p=0.) | settings, npz_sha256='abc',
                    classes={str(label): names[label] for label in np.unique(labels)})
    path.with_suffix('.json').write_text(json.dumps(manifest))
    return path


def test_images_and_labels_of_an_npz(data, tmp_path):
    path = drawn(tmp_path / 'S.npz')
    num_classes, train_set, val_set = build_dataset(str(path), 16, val_path=str(data[0]))
    assert isinstance(train_set, DrawnImages) and num_classes == 4 and len(train_set) == 12
    assert train_set.classes == val_set.classes == list(CLASSES) and len(val_set) == 8
    packed = np.load(path)
    plain = DrawnImages(path, CLASSES)
    for i in range(12):
        image, label = plain[i]
        assert isinstance(image, Image.Image) and label == packed['arr_1'][i]
        np.testing.assert_array_equal(np.array(image), packed['arr_0'][i])
    image_3HW, _ = train_set[3]
    assert image_3HW.shape == (3, 16, 16) and -1 <= image_3HW.min() < 0 < image_3HW.max() <= 1


@pytest.mark.parametrize(('change', 'words'), [
    (dict(names=CLASSES[::-1]), "class 0 of .* is 'doe', that of the validation images is 'ant'"),
    (dict(labels=[0, 1, 4] * 4, names=(*CLASSES, 'elk')), r'labels 0..4, the validation images have classes'),
    (dict(compressed=True), 'compressed'), (dict(unlabelled=True), 'a class id for each image')])
def test_files_that_cannot_be_trained_on(data, tmp_path, change, words):
    path = tmp_path / 'S.npz'
    if change.keys() & {'compressed', 'unlabelled'}:
        images = np.zeros((4, 8, 8, 3), np.uint8)
        if 'compressed' in change:
            np.savez_compressed(path, images, np.arange(4))
        else:
            np.savez(path, images)
    else:
        drawn(path, **change)
    with pytest.raises(ValueError, match=words):
        build_dataset(str(path), 16, val_path=str(data[0]))


@pytest.mark.parametrize('labels', [
    np.arange(4.), np.arange(3), np.eye(4, dtype=int), np.array(list('abcd'))])
def test_labels_of_another_kind_are_described(tmp_path, labels):
    path = tmp_path / 'S.npz'
    np.savez(path, np.zeros((4, 8, 8, 3), np.uint8), labels)
    with pytest.raises(ValueError, match='4 integers, got ') as error:
        DrawnImages(path, CLASSES)
    assert f'{labels.dtype} of shape {labels.shape}' in str(error.value)


@pytest.mark.parametrize(('change', 'words'), [
    ('{', 'cannot read it'), ('[1]', 'a list instead'), (dict(classes=['ant']), 'its classes are no object'),
    (dict(classes=dict(ant=0)), "a class 'ant', which is no number"),
    (dict(settings=3), 'its settings are no object'),
    (dict(classes={'99': 'elk'}), "class 99 of .* is 'elk', that of the validation images is missing")])
def test_a_damaged_manifest_is_named(tmp_path, change, words):
    path = drawn(tmp_path / 'S.npz')
    manifest = path.with_suffix('.json')
    text = change if isinstance(change, str) else json.dumps(json.loads(manifest.read_text()) | change)
    manifest.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        DrawnImages(path, CLASSES)
    assert 'S.' in str(error.value)


def test_a_file_of_another_program_is_no_manifest(tmp_path):
    path = drawn(tmp_path / 'S.npz')
    path.with_suffix('.json').write_text('{"classes": ["red"], "settings": 1}')
    assert DrawnImages(path, CLASSES).manifest == {}


@pytest.mark.parametrize(('flags', 'words'), [
    (['--data_path=S.npz'], 'pass --val_path=ROOT'),
    (['--data_path=digits', '--val_path=toy'], 'leave it out'),
    (['--data_path=S.npz', '--val_path=digits', '--cache=memory'], '--cache is for files'),
    (['--data_path=digits', '--val_path='], '')])
def test_flags(capsys, flags, words):
    if not words:
        assert parse_training(flags).val_path == ''
        return
    with pytest.raises(SystemExit):
        parse_training(flags)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(('flags', 'words'), [
    (['--data_path=nowhere.npz', '--val_path=digits'], 'found no such file: pass --data_path=FOLDER'),
    (['--data_path={}', '--val_path=nowhere'], 'found no such folder: pass --val_path=FOLDER')])
def test_a_missing_set_is_named_by_its_flag(tmp_path, flags, words):
    path = drawn(tmp_path / 'S.npz')
    config = parse_training([flag.format(path) for flag in flags])
    with pytest.raises(ValueError, match=words):
        config.require_files()


@pytest.mark.parametrize(('settings', 'is_named'), [
    (dict(model='var', cfg=0., top_k=0, top_p=0.), True), (dict(model='var', cfg=1.5), False),
    (dict(model='var', cfg=0., top_k=9), False), (dict(model='var', cfg=0., ssg=0.1), False),
    (dict(model='flexvar', cfg=1., used_llamagen_cfg=True, top_p=0.), True),
    (dict(model='flexvar', cfg=0., top_p=0.95), False), (dict(model='npp', cfg=1., top_p=1.), True),
    (dict(model='npp', cfg=1., temperature=0.9), False), (dict(model='flowar', cfg=1.), True),
    (dict(model='flowar', cfg=2.), False), ({}, False), (dict(model=['var']), False),
    (dict(model='var', cfg=0., top_k='few'), False)])
def test_samples_that_teach_nothing_are_named(settings, is_named):
    """Nothing is said of an npz without a manifest."""
    manifest = dict(settings=settings) if settings else {}
    note = note_on_drawing('S.npz', manifest)
    assert bool(note) == is_named and note.count('\n') == 0


def test_classes_in_another_order_are_refused():
    check_same_classes(dict(classes=list(CLASSES)), 'r.pth', list(CLASSES))
    check_same_classes({}, 'var_d16.pth', list(CLASSES))  # published files name none
    with pytest.raises(ValueError, match="class 0 is 'doe' there, 'ant' here: images that it has drawn"):
        check_same_classes(dict(classes=list(CLASSES[::-1])), 'r.pth', list(CLASSES))
