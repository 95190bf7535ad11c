"""`evaluate.py REF SAMPLE`, stats, pack: the stored report, ranks, cache, manifest, warnings, bad input."""
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import evaluate
from evaluation import features as extraction
from evaluation import images as command
from evaluation.features import Inspection
from tests.runs import launch
from utils.batches import shuffled
from utils.data import build_dataset
from utils.inception import Outputs
from utils.log import one_line_errors
from utils.metrics import to_uint8

DATA = Path(__file__).parent / 'data' / 'evaluation'
CASES = json.loads((DATA / 'cases.json').read_text())
DIGITS = ['--features=digits', '--cache=', '--allow_any_count']


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run evaluate.py in this process: (report or None, what it printed)."""
    handlers = logging.root.handlers[:]
    monkeypatch.delenv('INCEPTION_WEIGHTS', raising=False)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))

    def call(*argv):
        path = tmp_path / 'report.json'
        path.unlink(missing_ok=True)
        scoring = str(argv[0]) not in evaluate.COMMANDS
        argv = [str(arg) for arg in argv] + [f'--json={path}'] * scoring
        monkeypatch.setattr(sys, 'argv', ['evaluate.py', *argv])
        with one_line_errors('evaluate.py', exit_code=2):
            evaluate.main()
        return json.loads(path.read_text()) if scoring else None, capsys.readouterr().out
    yield call
    logging.root.handlers[:] = handlers
    logging.captureWarnings(False)


def noise(count, seed, side=8):
    return np.random.RandomState(seed).randint(0, 256, (count, side, side, 3), np.uint8)


@pytest.fixture
def files(tmp_path):
    """ref.npz with 60 images, sample.npz with 101 others, each with labels."""
    np.savez(tmp_path / 'ref.npz', arr_0=noise(60, 0))
    np.savez(tmp_path / 'sample.npz', arr_0=noise(101, 1), arr_1=np.arange(101) % 10)
    return tmp_path


# ---------------------------------------------------------------------------------------------- the original
class Stored:
    """Stands in for Inception: images of one pixel, whose value is a row of the stored activations."""

    name, digest = 'stored', '0' * 64

    def __init__(self, group):
        self.group = {side: [torch.from_numpy(group[f'{side}_{kind}']) for kind in ('pool', 'spatial')]
                      for side in ('ref', 'sample')}
        self.weight = torch.from_numpy(group['weight_in_out'])
        self.num_features, self.num_spatial = (t.shape[1] for t in self.group['ref'])
        self.num_classes = self.weight.shape[1]

    def images(self, side):
        rows = np.arange(len(self.group[side][0]))
        return np.stack([rows // 256, rows % 256, np.full_like(rows, side == 'sample')],
                        1).astype(np.uint8)[:, None, None]

    def outputs(self, images_u8):
        high, low, is_sample = images_u8[:, :, 0, 0].long().T
        pool, spatial = self.group['sample' if is_sample[0] else 'ref']
        rows = high * 256 + low
        return Outputs(pool[rows].float(), spatial[rows].float(), pool[rows].float() @ self.weight.float())


@pytest.mark.parametrize('case', ['with_reference_statistics', 'without_statistics'])
def test_report_equals_that_of_the_original(run, tmp_path, monkeypatch, case):
    group = {key: array for key, array in np.load(DATA / 'report.npz').items()}
    network, expected = Stored(group), CASES['report'][case]
    monkeypatch.setattr(command, 'load_network', lambda _: network)
    stored = {key: group[key] for key in ('mu', 'sigma', 'mu_s', 'sigma_s')} if 'with_' in case[:5] else {}
    np.savez(tmp_path / 'ref.npz', arr_0=network.images('ref'), **stored)
    np.savez(tmp_path / 'sample.npz', arr_0=network.images('sample'))
    report, printed = run(tmp_path / 'ref.npz', tmp_path / 'sample.npz', '--allow-any-count', '--bs=37',
                          f'--cache={tmp_path / "cache"}')
    scores = report['scores']
    assert scores['is'] == pytest.approx(expected['inception_score'], rel=1e-5)
    assert scores['fid'] == pytest.approx(expected['fid'], rel=1e-6)
    assert scores['sfid'] == pytest.approx(expected['sfid'], rel=1e-6)
    counts = [len(network.images(side)) for side in ('sample', 'ref')]
    for name, count in zip(('precision', 'recall'), counts, strict=True):
        assert abs(scores[name] - expected[name]) <= 2 / count
    lines = [line.partition(':')[0] for line in printed.splitlines()]
    assert [line for line in lines if line in command.METRICS.values()] == list(command.METRICS.values())
    monkeypatch.setattr(command, 'extract', forbid_reference(command.extract))  # comes from the cache now
    again, _ = run(tmp_path / 'ref.npz', tmp_path / 'sample.npz', '--allow-any-count', '--bs=37',
                   f'--cache={tmp_path / "cache"}')
    assert again['scores'] == scores


def forbid_reference(extract):
    def only_samples(batch, *args, **kwargs):
        assert batch.path.name == 'sample.npz'
        return extract(batch, *args, **kwargs)
    return only_samples


# ---------------------------------------------------------------------------------------------- ranks
@pytest.mark.parametrize(('count', 'nproc'), [(101, 2), (2, 3)])
def test_processes_do_not_change_scores(run, files, count, nproc):
    np.savez(files / 'sample.npz', arr_0=noise(count, 1))
    metrics = [] if count > 3 else ['--metrics=is,fid']
    flags = [files / 'ref.npz', files / 'sample.npz', *DIGITS, *metrics, '--split_size=40', '--bs=7']
    launch('evaluate.py', [*flags, f'--json={files / "many.json"}'], nproc=nproc)
    many, (one, _) = json.loads((files / 'many.json').read_text()), run(*flags)
    assert (many['world_size'], one['world_size']) == (nproc, 1)
    assert many['scores'].keys() == one['scores'].keys() and many['warnings'] == one['warnings']
    for name, value in one['scores'].items():
        assert many['scores'][name] == pytest.approx(value, rel=1e-6), name


def test_batches_and_formats_do_not_change_scores(run, files):
    reference, _ = run(files / 'ref.npz', files / 'sample.npz', *DIGITS)
    np.savez_compressed(files / 'small.npz', arr_0=noise(101, 1))
    folder = files / 'folder'
    folder.mkdir()
    for i, image in enumerate(noise(101, 1)):
        Image.fromarray(image).save(folder / f'{i:03d}.png')
    for sample, size in ((files / 'small.npz', 13), (folder, 64)):
        report, _ = run(files / 'ref.npz', sample, *DIGITS, f'--batch-size={size}')
        for name, value in reference['scores'].items():
            assert report['scores'][name] == pytest.approx(value, rel=1e-6), (sample.name, name)


# ---------------------------------------------------------------------------------------------- statistics
def test_stored_statistics_stand_for_their_images(run, files):
    direct, _ = run(files / 'ref.npz', files / 'sample.npz', *DIGITS, '--metrics=fid')
    run('stats', files / 'ref.npz', files / 'stats.npz', '--features=digits')
    assert set(np.load(files / 'stats.npz').files) == {'mu', 'sigma'}  # this network has no spatial features
    report, printed = run(files / 'stats.npz', files / 'sample.npz', *DIGITS)
    assert report['scores']['fid'] == pytest.approx(direct['scores']['fid'], rel=1e-9)
    assert set(report['unavailable']) == {'sfid', 'precision', 'recall'} and 'is' in report['scores']
    assert 'Precision: not available, stats.npz holds no images (arr_0)' in printed
    run('stats', files / 'ref.npz', files / 'full.npz', '--features=digits', '--keep_images')
    full, _ = run(files / 'full.npz', files / 'sample.npz', *DIGITS)
    assert set(full['unavailable']) == {'sfid'} and full['reference']['statistics'] == 'stored'
    own, _ = run(files / 'ref.npz', files / 'full.npz', *DIGITS)  # stored ones win on this side, too
    assert own['scores']['fid'] == pytest.approx(0, abs=1e-6)
    assert any('carries mu' in note for note in own['warnings'])


def test_scipy_route_and_clean_precision(run, files):
    plain, _ = run(files / 'ref.npz', files / 'sample.npz', *DIGITS)
    other, printed = run(files / 'ref.npz', files / 'sample.npz', *DIGITS, '--fd-method=scipy',
                         '--pr-mode=fp32')
    assert other['scores']['fid'] == pytest.approx(plain['scores']['fid'], rel=2e-2)  # 60 images, 64 features
    assert abs(other['scores']['precision'] - plain['scores']['precision']) <= 2 / 101
    assert 'fp32' in printed and 'scipy' in printed


# ---------------------------------------------------------------------------------------------- provenance
def test_manifest_is_checked(run, files):
    sample, manifest = files / 'sample.npz', files / 'sample.json'
    report, _ = run(files / 'ref.npz', sample, *DIGITS)
    assert report['manifest'] is None
    content = dict(npz_sha256=report['sample']['sha256'], settings=dict(cfg=1.5), rejection=dict(ratio=2.0))
    manifest.write_text(json.dumps(content))
    report, printed = run(files / 'ref.npz', sample, *DIGITS)
    assert report['manifest'] == content and 'with rejection (ratio 2)' in printed
    manifest.write_text(json.dumps(content | dict(npz_sha256='0' * 64)))
    with pytest.raises(SystemExit, match='other') as stop:
        run(files / 'ref.npz', sample, *DIGITS)
    assert stop.value.code == 2
    manifest.write_text('{"half":')
    with pytest.raises(SystemExit, match='manifest'):
        run(files / 'ref.npz', sample, *DIGITS)


def test_report_names_what_decides_the_scores(run, files):
    report, _ = run(files / 'ref.npz', files / 'sample.npz', *DIGITS)
    assert report['network']['name'] == 'digits' and len(report['network']['digest']) == 64
    assert not report['network']['published'] and report['settings']['pr_mode'] == 'adm'
    assert report['sample']['count'] == 101 and report['reference']['count'] == 60
    assert {'torch', 'numpy', 'python'} <= set(report['versions']) and report['seconds'] >= 0


# ---------------------------------------------------------------------------------------------- warnings
def test_order_by_class_is_noticed(run, files):
    """Ten kinds of real digits in ten chunks: each chunk looks like one class, all together like ten."""
    digits = load_digits()
    order = np.argsort(digits.target, kind='stable')[:1700]
    images = np.repeat((digits.images[order] * 255 / 16).astype(np.uint8)[..., None], 3, 3)
    np.savez(files / 'sorted.npz', arr_0=images)
    mixed = np.random.RandomState(0).permutation(len(images))
    np.savez(files / 'mixed.npz', arr_0=images[mixed])
    flags = [*DIGITS, '--split_size=170', '--metrics=is']
    report, printed = run(files / 'ref.npz', files / 'sorted.npz', *flags)
    assert report['scores']['is'] < 3 and report['scores']['is_one_chunk'] > 8
    assert 'warning: images look sorted by class' in printed and 'pack' in printed
    report, printed = run(files / 'ref.npz', files / 'mixed.npz', *flags)
    assert report['scores']['is'] > 7 and 'sorted' not in printed


def test_doubtful_sets_are_named(run, files):
    images = np.repeat(noise(50, 3)[..., :1], 3, 3)  # grey
    images[10:20] = images[0]
    images[20:23] = 7
    np.savez(files / 'odd.npz', arr_0=images)
    report, _ = run(files / 'ref.npz', files / 'odd.npz', *DIGITS)
    text = '\n'.join(report['warnings'])
    assert 'sample: 12 of 50 images repeat another image' in text
    assert 'sample: 3 of 50 images have one colour only' in text
    assert 'sample: all images are grey' in text and 'FID-0.05k' in text and 'rank-deficient' in text
    np.savez(files / 'larger.npz', arr_0=noise(101, 1, side=16))
    report, _ = run(files / 'ref.npz', files / 'larger.npz', *DIGITS)
    assert 'image sizes differ: reference 8x8, sample 16x16' in report['warnings']


def test_inspection_counts_over_parts():
    inspection, whole = Inspection(), noise(10, 0)
    for part in np.split(np.concatenate([whole, whole[:1]]), [4, 4, 9]):
        inspection.add(part)
    inspection.reduce()
    assert inspection.warnings('x') == ['x: 1 of 11 images repeat another image']


# ---------------------------------------------------------------------------------------------- bad input
def test_missing_inception_weights_exit_with_3(files):
    flags = [files / 'ref.npz', files / 'sample.npz', '--allow_any_count', '--offline',
             f'--json={files / "out.json"}', f'--cache={files / "cache"}', '--metrics=fid']
    process = launch('evaluate.py', flags, check=False)
    assert process.returncode == 3 and process.stdout == ''
    error = process.stderr.splitlines()
    assert len(error) == 1 and 'INCEPTION_WEIGHTS' in error[0] and str(files / 'cache') in error[0]
    assert 'checkpoints' in error[0] and '6726825d' in error[0]
    assert {path.name for path in files.iterdir()} == {'ref.npz', 'sample.npz'}


def test_non_finite_features_name_the_image(run, files, monkeypatch):
    class Broken:
        name, digest, num_features, num_spatial, num_classes = 'broken', '', 4, 0, 2

        def outputs(self, images_u8):
            pool = images_u8.flatten(1)[:, :4].float()
            pool[(images_u8 == 0).flatten(1).all(1)] = torch.nan
            return Outputs(pool, None, pool[:, :2])
    monkeypatch.setattr(command, 'load_network', lambda _: Broken())
    images = noise(101, 1)
    images[77] = 0
    np.savez(files / 'sample.npz', arr_0=images)
    with pytest.raises(SystemExit, match=r'sample\.npz: .*image 77 '):
        run(files / 'ref.npz', files / 'sample.npz', *DIGITS, '--bs=8')


@pytest.mark.parametrize(('change', 'flags', 'message'), [
    (None, ['--expected_count=100'], 'expected 100 images'),
    (dict(mu=np.zeros(64)), [], 'sigma'),
    (dict(mu=np.zeros(3), sigma=np.eye(3)), [], '64'),
    (dict(mu=np.zeros(64), sigma=np.triu(np.ones((64, 64)))), [], 'symmetric'),
    (dict(mu=np.full(64, np.nan), sigma=np.eye(64)), [], 'finite'),
    (dict(arr_0=noise(1, 0)), ['--metrics=fid'], 'at least 2'),
    (dict(arr_0=noise(3, 0)), [], 'at least 4'),
    (dict(arr_0=noise(5, 0) / 255), [], 'uint8'),
    (dict(arr_0=noise(5, 0).transpose(0, 3, 1, 2)), [], 'images.transpose(0, 2, 3, 1)'),
    (dict(arr_0=noise(0, 0)), [], 'got none'),
    (dict(other=np.zeros(3)), [], 'arr_0'),
    (dict(mu=np.zeros(64), sigma=np.eye(64), arr_0=None), [], 'arr_0'),
    (None, ['--metrics=sfid'], 'spatial'),
    (None, ['--metrics=fid,psnr'], 'psnr'),
    (None, ['--pr_mode=fp64'], 'adm or fp32'),
    (None, ['--split_size=0'], 'at least 1'),
    (None, ['--pr'], 'unknown argument'),
    (None, ['--device=tpu'], 'cpu, cuda'),
])
def test_errors_are_one_line_and_exit_with_2(run, files, capsys, change, flags, message):
    content = dict(arr_0=noise(101, 1)) | (change or {})
    if change and 'other' in change:
        del content['arr_0']
    np.savez(files / 'sample.npz', **{key: array for key, array in content.items() if array is not None})
    count = [] if '--expected_count=100' in flags else ['--allow_any_count']
    with pytest.raises(SystemExit) as stop:
        run(files / 'ref.npz', files / 'sample.npz', '--features=digits', '--cache=', *count, *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and error.startswith('evaluate.py: ') and message in error, error
    assert not (files / 'report.json').exists()


@pytest.mark.parametrize('argv', [['nowhere.npz', 'sample.npz'], ['ref.npz', 'nowhere'], ['ref.npz'],
                                  ['ref.npz', 'text.npz'], ['ref.npz', 'empty'], ['stats', 'ref.npz'],
                                  ['pack', 'empty', 'out.npz'], ['stats', 'nowhere', 'out.npz']])
def test_files_that_are_not_there_exit_with_2(run, files, monkeypatch, capsys, argv):
    monkeypatch.chdir(files)
    (files / 'text.npz').write_text('no zip')
    (files / 'empty').mkdir()
    with pytest.raises(SystemExit) as stop:
        run(*argv, *([] if argv[0] == 'pack' else ['--features=digits']))
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (files / 'out.npz').exists()


# ---------------------------------------------------------------------------------------------- pack
def test_pack_shuffles_images_with_their_labels(run, files):
    folder, images = files / 'folder', noise(12, 0)
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f'{i:02d}.png')
    np.save(folder / 'labels.npy', np.arange(12))
    run('pack', folder, files / 'a.npz', '--count=12', '--seed=3')
    packed = np.load(files / 'a.npz')
    assert np.array_equal(packed['arr_0'], images[packed['arr_1']])
    assert sorted(packed['arr_1']) == list(range(12)) != packed['arr_1'].tolist()
    run('pack', folder, files / 'b.npz', '--no-shuffle')
    assert np.array_equal(np.load(files / 'b.npz')['arr_0'], images)
    with pytest.raises(SystemExit, match='13'):
        run('pack', folder, files / 'c.npz', '--count=13')


def test_pack_of_a_data_set_is_a_reference(run, files, capsys):
    run('pack', 'digits', files / 'val.npz', '--image_size=16', '--no_shuffle')
    run('pack', 'digits', files / 'mixed.npz', '--image_size=16', '--seed=2')
    images = build_dataset('digits', 16, crop='adm')[2]
    plain, mixed = (np.load(files / f'{name}.npz') for name in ('val', 'mixed'))
    assert np.array_equal(plain['arr_0'][7], to_uint8(images[7][0]).permute(1, 2, 0))
    assert np.array_equal(plain['arr_1'], images.targets)
    order = shuffled(len(images), 2)
    assert np.array_equal(mixed['arr_0'], plain['arr_0'][order])
    assert np.array_equal(mixed['arr_1'], plain['arr_1'][order])
    for flags, message in ((['--split=test'], 'val or train'), (['--count=3'], 'expected 3 images')):
        with pytest.raises(SystemExit):
            run('pack', 'digits', files / 'none.npz', '--image_size=16', *flags)
        assert message in capsys.readouterr().err and not (files / 'none.npz').exists()


# ---------------------------------------------------------------------------------------------- reading ahead
def test_read_ahead_keeps_order_and_raises_at_its_place():
    def items():
        yield from range(5)
        raise ValueError('sixth')
    seen = []
    with pytest.raises(ValueError, match='sixth'):
        for item in extraction.read_ahead(items()):
            seen.append(item)
    assert seen == list(range(5))
    assert list(extraction.read_ahead([])) == []
