"""`evaluate.py REF SAMPLE`, stats, pack: the stored report, ranks, cache, manifest, warnings, bad input."""
import errno
import json
import multiprocessing
import re
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import distributed

import evaluate
from evaluation import features as extraction
from evaluation import pack
from evaluation import score as command
from evaluation.features import Inspection
from evaluation.inception import Outputs
from evaluation.metrics import to_uint8
from evaluation.score import ScoreSettings, score_images
from evaluation.settings import COMMANDS, SCORES, PackSettings
from tests.runs import launch
from utils import provenance
from utils.data import build_dataset
from utils.image_sets import shuffled

DATA = Path(__file__).parent / 'data' / 'evaluation'
CASES = json.loads((DATA / 'cases.json').read_text())
DIGITS = ['--features=digits', '--cache=', '--allow_any_count']


@pytest.fixture
def run(evaluate_here, monkeypatch, tmp_path):
    """Run evaluate.py in this process: (report or None, what it printed)."""
    monkeypatch.delenv('INCEPTION_WEIGHTS', raising=False)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))

    def call(*argv):
        path = tmp_path / 'report.json'
        path.unlink(missing_ok=True)
        scoring = str(argv[0]) not in COMMANDS
        printed = evaluate_here(*[f'--json={path}'] * scoring, *argv)  # a later --json wins
        return json.loads(path.read_text()) if scoring else None, printed
    return call


def noise(count, seed, side=8):
    return np.random.RandomState(seed).randint(0, 256, (count, side, side, 3), np.uint8)


def write_pngs(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f'{i:03d}.png')
    return folder


class Stub:
    """A network with spatial features that costs nothing: all of them are pixels."""

    name, num_features, num_spatial, num_classes = 'stub', 6, 9, 4

    def __init__(self, digest='0' * 64):
        self.digest = digest

    def outputs(self, images_u8):
        pixels = images_u8.flatten(1).float() / 32
        return Outputs(pixels[:, :6], pixels[:, 6:15], pixels[:, 15:19])


@pytest.fixture
def stub(monkeypatch):
    """Stub stands in for the network of --features=inception."""
    for module in (command, pack):
        monkeypatch.setattr(module, 'load_network', lambda _: Stub())


@pytest.fixture
def extracted(monkeypatch):
    """Names of the files whose images were run through the network."""
    names = []
    for module in (command, pack):
        def noted(batch, *args, extract=module.extract, **kwargs):
            names.append(batch.path.name)
            return extract(batch, *args, **kwargs)
        monkeypatch.setattr(module, 'extract', noted)
    return names


def assert_equal_scores(some, others, names=None):
    assert names or some.keys() == others.keys()
    for name in names or some:
        assert some[name] == pytest.approx(others[name], rel=1e-6), name


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
    assert [line for line in lines if line in SCORES.values()] == list(SCORES.values())


# ---------------------------------------------------------------------------------------------- ranks
@pytest.mark.slow
def test_processes_do_not_change_scores(run, files):
    flags = [files / 'ref.npz', files / 'sample.npz', *DIGITS, '--split_size=40', '--bs=7']
    launch('evaluate.py', [*flags, f'--json={files / "many.json"}'], nproc=2)
    many, (one, _) = json.loads((files / 'many.json').read_text()), run(*flags)
    assert (many['world_size'], one['world_size']) == (2, 1) and many['warnings'] == one['warnings']
    assert_equal_scores(many['scores'], one['scores'])


def rank_of_many(rank, world_size, settings, folder):
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{folder / "group"}', rank=rank, world_size=world_size)
    report = score_images(settings, Stub())
    assert (report is None) == (rank > 0)
    if report:
        (folder / 'many.json').write_text(json.dumps(report))
    distributed.destroy_process_group()


@pytest.mark.parametrize(('count', 'nproc', 'metrics'), [(101, 2, ''), (5, 3, ''), (2, 3, 'is,fid,sfid')])
def test_ranks_share_images_and_statistics(files, count, nproc, metrics):
    """With spatial features; ragged shares, an empty one, and a reference that the master finds cached."""
    np.savez(files / 'sample.npz', arr_0=noise(count, 1))
    settings = ScoreSettings(ref=str(files / 'ref.npz'), sample=str(files / 'sample.npz'), metrics=metrics,
                             allow_any_count=True, split_size=40, batch_size=7, device='cpu',
                             cache=str(files / 'cache'))
    processes = multiprocessing.get_context('fork')
    for _ in ('extracted', 'cached'):
        ranks = [processes.Process(target=rank_of_many, args=(rank, nproc, settings, files))
                 for rank in range(nproc)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=60)
        assert [rank.exitcode for rank in ranks] == [0] * nproc
        many = json.loads((files / 'many.json').read_text())
        one = score_images(command.dataclasses.replace(settings, cache=''), Stub())
        assert (many['world_size'], one['world_size']) == (nproc, 1) and many['warnings'] == one['warnings']
        assert_equal_scores(many['scores'], one['scores'])
        assert set(one['scores']) >= {'is', 'fid', 'sfid'} and len(list((files / 'cache').iterdir())) == 1
        (files / 'group').unlink(missing_ok=True)


def test_batches_and_formats_do_not_change_scores(run, files):
    reference, _ = run(files / 'ref.npz', files / 'sample.npz', *DIGITS)
    np.savez_compressed(files / 'small.npz', arr_0=noise(101, 1))
    folder = write_pngs(files / 'folder', noise(101, 1))
    for sample, size in ((files / 'small.npz', 13), (folder, 64)):
        report, _ = run(files / 'ref.npz', sample, *DIGITS, f'--batch-size={size}')
        assert_equal_scores(report['scores'], reference['scores'])


# ---------------------------------------------------------------------------------------------- cache
def test_cached_reference_gives_the_same_report(run, files, stub, extracted):
    np.savez(files / 'ref.npz', arr_0=np.repeat(noise(60, 0)[..., :1], 3, 3))  # grey, which is warned of
    flags = [files / 'ref.npz', files / 'sample.npz', '--allow_any_count', f'--cache={files / "cache"}']
    first, _ = run(*flags)
    again, _ = run(*flags)
    assert extracted == ['ref.npz', 'sample.npz', 'sample.npz'] and 'sfid' in first['scores']
    assert again['scores'] == first['scores'] and again['warnings'] == first['warnings']
    assert 'reference: all images are grey (R = G = B)' in again['warnings']
    kept, = (files / 'cache').iterdir()  # nothing temporary
    for damaged in (b'', b'no zip', kept.read_bytes()[:-30], b'PK' + kept.read_bytes()[2:-3000]):
        kept.write_bytes(damaged)
        extracted.clear()
        again, printed = run(*flags)
        assert extracted == ['ref.npz', 'sample.npz'] and again['scores'] == first['scores']
        assert f'cannot read {kept}' in printed
    np.savez(kept, other=np.zeros(3))
    assert run(*flags)[0]['scores'] == first['scores']
    assert set(np.load(kept).files) == {'rows', 'mu', 'sigma', 'mu_s', 'sigma_s', 'warnings'}


def test_cache_forgets_what_depends_on_something_else(run, files, monkeypatch, extracted):
    network, cache = Stub(), files / 'cache'
    monkeypatch.setattr(command, 'load_network', lambda _: network)

    def reads_reference(*flags):
        extracted.clear()
        run(files / 'ref.npz', files / 'sample.npz', '--allow_any_count', f'--cache={cache}', *flags)
        return 'ref.npz' in extracted
    for change in ({}, dict(digest='1' * 64), dict(name='other')):
        for name, value in change.items():
            setattr(network, name, value)
        assert reads_reference() and not reads_reference(), change
    assert reads_reference('--dtype=float64') and reads_reference('--metrics=fid')
    np.savez(files / 'ref.npz', arr_0=noise(60, 5))
    assert reads_reference() and not reads_reference()


def test_cache_that_cannot_be_written_is_only_warned_of(run, files, stub):
    (files / 'file').write_text('')
    flags = [files / 'ref.npz', files / 'sample.npz', '--allow_any_count']
    plain, _ = run(*flags, '--cache=')
    report, printed = run(*flags, f'--cache={files / "file" / "cache"}')
    assert report['scores'] == plain['scores'] and printed.count('cannot keep the features') == 1


def test_runs_at_once_share_a_cache(files, monkeypatch, caplog):
    """Both write before either replaces: each has a temporary file of its own."""
    save, meet = np.savez, threading.Barrier(2, timeout=30)
    monkeypatch.setattr(extraction.np, 'savez', lambda *args, **kwargs: (save(*args, **kwargs), meet.wait()))
    path, arrays = files / 'cache' / 'x.npz', dict(rows=np.arange(5))
    runs = [threading.Thread(target=extraction.write_cache, args=(path, arrays)) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join(timeout=30)
    assert [entry.name for entry in path.parent.iterdir()] == ['x.npz'] and not caplog.messages
    assert np.array_equal(extraction.read_cache(path, ['rows'])['rows'], np.arange(5))


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


def test_statistics_of_spatial_features(run, files, stub):
    flags = ['--allow_any_count', '--cache=']
    direct, _ = run(files / 'ref.npz', files / 'sample.npz', *flags)
    run('stats', files / 'ref.npz', files / 'stats.npz', '--bs=7')
    assert {key: array.shape for key, array in np.load(files / 'stats.npz').items()} == \
        {'mu': (6,), 'sigma': (6, 6), 'mu_s': (9,), 'sigma_s': (9, 9)}
    report, _ = run(files / 'stats.npz', files / 'sample.npz', *flags)
    assert set(report['unavailable']) == {'precision', 'recall'}
    assert_equal_scores(report['scores'], direct['scores'], ['is', 'fid', 'sfid'])
    run('stats', files / 'ref.npz', files / 'full.npz', '--keep_images')
    assert np.array_equal(np.load(files / 'full.npz')['arr_0'], noise(60, 0))
    report, _ = run(files / 'full.npz', files / 'sample.npz', *flags)
    assert_equal_scores(report['scores'], direct['scores'])


def test_statistics_alone_are_a_sample(run, files, stub, extracted):
    flags = ['--allow_any_count', '--cache=']
    direct, _ = run(files / 'ref.npz', files / 'sample.npz', *flags)
    run('stats', files / 'sample.npz', files / 'stats.npz', '--keep_images')
    extracted.clear()
    for metrics in ('fid,sfid', 'fid'):  # no image is needed for these
        report, _ = run(files / 'ref.npz', files / 'stats.npz', *flags, f'--metrics={metrics}')
        assert_equal_scores(report['scores'], direct['scores'], metrics.split(','))
    assert set(extracted) == {'ref.npz'}
    run(files / 'ref.npz', files / 'stats.npz', *flags, '--metrics=is')
    assert extracted[2:] == ['stats.npz']
    run('stats', files / 'sample.npz', files / 'stats.npz')
    report, printed = run(files / 'ref.npz', files / 'stats.npz', '--cache=')  # no count to check
    assert set(report['scores']) == {'fid', 'sfid'}
    assert_equal_scores(report['scores'], direct['scores'], ['fid', 'sfid'])
    assert 'Inception Score: not available, stats.npz holds no images (arr_0)' in printed
    assert 'stats.npz holds statistics alone: of how many images is unknown' in '\n'.join(report['warnings'])


def test_statistics_of_spatial_features_count_beside_the_others_only(run, files, stub):
    flags = ['--allow_any_count', '--cache=']
    direct, _ = run(files / 'ref.npz', files / 'sample.npz', *flags)
    for side in ('ref', 'sample'):
        images = np.load(files / f'{side}.npz')['arr_0']
        np.savez(files / f'{side}2.npz', arr_0=images, mu_s=np.ones(9), sigma_s=np.eye(9))
        np.savez(files / f'{side}3.npz', arr_0=images, mu=np.ones(6), sigma=np.eye(6))
    for ref, sample in (('ref2', 'sample'), ('ref', 'sample2')):
        report, _ = run(files / f'{ref}.npz', files / f'{sample}.npz', *flags)
        assert report['scores'] == direct['scores'] and not report['unavailable']
    for ref, sample in (('ref3', 'sample'), ('ref', 'sample3')):
        report, _ = run(files / f'{ref}.npz', files / f'{sample}.npz', *flags)
        assert set(report['unavailable']) == {'sfid'} and report['scores']['fid'] != direct['scores']['fid']


def test_images_are_copied_piece_by_piece(run, files, stub):
    np.savez(files / 'many.npz', arr_0=noise(600, 0, side=128))
    tracemalloc.start()
    try:
        run('stats', files / 'many.npz', files / 'full.npz', '--keep_images', '--bs=16')
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (files / 'full.npz').stat().st_size > 29e6 and peak < 12e6


def test_modes_of_distance_and_precision_are_passed_on(run, files, stub, monkeypatch):
    asked, distance, coverage = [], command.frechet_distance, command.precision_recall

    def noted_distance(*statistics, method):
        asked.append(method)
        return distance(*statistics, method)

    def noted_coverage(ref, sample, mode, device):
        asked.append(mode)
        return coverage(ref, sample, mode, device=device)
    monkeypatch.setattr(command, 'frechet_distance', noted_distance)
    monkeypatch.setattr(command, 'precision_recall', noted_coverage)
    for flags, expected in (([], ['eigh', 'eigh', 'adm']), (['--fd-method=scipy'], ['scipy', 'scipy', 'adm']),
                            (['--pr-mode=fp32'], ['eigh', 'eigh', 'fp32'])):
        asked.clear()
        _, printed = run(files / 'ref.npz', files / 'sample.npz', '--allow_any_count', '--cache=', *flags)
        assert asked == expected
        assert f'precision and recall {expected[2]}, distance by {expected[0]}' in printed


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


def test_manifest_of_a_folder_is_used_only_if_it_describes_its_files(run, files):
    """The digest of the npz says nothing of PNG files beside it, which may have been replaced."""
    folder = write_pngs(files / 'drawn', noise(40, 1))
    content = dict(npz_sha256='0' * 64, settings=dict(cfg=1.5), rejection=dict(ratio=2.0))
    manifest = files / 'drawn.json'

    manifest.write_text(json.dumps(content))
    report, printed = run(files / 'ref.npz', folder, *DIGITS)
    assert report['manifest'] is None and 'with rejection' not in printed
    assert f'warning: {manifest} does not name the SHA-256 of the PNG files in {folder}' in printed

    content |= dict(folder_sha256=report['sample']['sha256'])
    manifest.write_text(json.dumps(content))
    report, printed = run(files / 'ref.npz', folder, *DIGITS)
    assert report['manifest'] == content and 'with rejection (ratio 2)' in printed
    assert str(manifest) not in printed

    Image.fromarray(noise(1, 2)[0]).save(folder / '007.png')
    report, printed = run(files / 'ref.npz', folder, *DIGITS)
    assert report['manifest'] is None and 'with rejection' not in printed
    assert f'warning: {manifest} describes other PNG files than those in {folder}' in printed


@pytest.mark.parametrize('name', ['sample.json', 'ref.json', 'sample.npz', 'ref.npz', 'a/../sample.json'])
def test_report_replaces_neither_manifests_nor_images(run, files, capsys, name):
    before = {path: path.read_bytes() for path in files.iterdir()}
    with pytest.raises(SystemExit):
        run(files / 'ref.npz', files / 'sample.npz', *DIGITS, f'--json={files / name}')
    assert 'expected a file of its own' in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_scores_outlive_a_full_disk(run, files, stub, monkeypatch, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(command, 'write_json', full)
    with pytest.raises(SystemExit) as stop:
        run(files / 'ref.npz', files / 'sample.npz', '--allow_any_count', '--cache=')
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and re.search(r'^FID: [\d.]+$', out, re.MULTILINE)
    assert len(err.strip().splitlines()) == 1 and 'report.json (No space left on device)' in err


@pytest.mark.parametrize('path', ['.', 'file/report.json'])
def test_output_that_cannot_be_written_shows_at_once(run, files, stub, extracted, capsys, path):
    (files / 'file').write_text('')
    commands = [files / 'ref.npz', files / 'sample.npz', '--allow_any_count', f'--json={files / path}'], \
        ['stats', files / 'ref.npz', files / path]
    for argv in commands:
        with pytest.raises(SystemExit):
            run(*argv)
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and 'expected a file that can be written' in error
    assert not extracted


def test_statistics_do_not_replace_their_images(run, files, capsys):
    before = (files / 'ref.npz').read_bytes()
    with pytest.raises(SystemExit):
        run('stats', files / 'ref.npz', files / 'x' / '..' / 'ref.npz', '--features=digits', '--keep_images')
    assert 'expected a file of its own' in capsys.readouterr().err
    assert (files / 'ref.npz').read_bytes() == before


def test_report_names_what_decides_the_scores(run, files):
    report, _ = run(files / 'ref.npz', files / 'sample.npz', *DIGITS)
    assert report['network']['name'] == 'digits' and len(report['network']['digest']) == 64
    assert not report['network']['published'] and report['settings']['pr_mode'] == 'adm'
    assert report['sample']['count'] == 101 and report['reference']['count'] == 60
    assert {'torch', 'numpy', 'python'} <= set(report['versions']) and report['seconds'] >= 0


def test_versions_name_what_may_be_missing(monkeypatch):
    def version(package):
        if package == 'torch-fidelity':
            raise provenance.metadata.PackageNotFoundError
        return f'{package} 1.2'
    monkeypatch.setattr(provenance.metadata, 'version', version)
    found = provenance.versions()
    assert (found['scipy'], found['scikit-learn']) == ('scipy 1.2', 'scikit-learn 1.2')
    assert found['torch-fidelity'] is None and found['torch'] == torch.__version__


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


def test_warnings_of_files_reach_the_reader(run, files, stub):
    ref, sample = write_pngs(files / 'refs', noise(60, 0)), write_pngs(files / 'pngs', noise(50, 1))
    Image.fromarray(noise(1, 2)[0]).save(ref / 'x.jpg')
    Image.fromarray(noise(1, 3)[0]).quantize(8).save(sample / 'x.png')
    report, printed = run(ref, sample, '--allow_any_count', '--cache=')
    for start in (f"JPEG images in {str(ref)!r}: 1 of 61 files, first 'x.jpg'",
                  f'P images in {str(sample)!r}: 1 of 51'):
        assert sum(note.startswith(start) for note in report['warnings']) == 1
        assert f'warning: {start}' in printed


@pytest.mark.parametrize(('pixels', 'is_constant', 'is_grey'), [
    ([[9, 9, 9], [9, 9, 9]], True, True), ([[9, 9, 9], [7, 7, 7]], False, True),
    ([[9, 9, 8], [9, 9, 8]], True, False), ([[8, 9, 9], [8, 9, 9]], True, False),
    ([[9, 9, 9], [9, 9, 8]], False, False), ([[9, 9, 9], [8, 9, 9]], False, False), ([[5, 5, 5]], True, True),
    ([[5, 5, 6]], True, False),
])
def test_inspection_of_one_image(pixels, is_constant, is_grey):
    inspection = Inspection()
    for order in 'CF':
        inspection.add(np.array([[pixels]], np.uint8, order=order))
    assert (inspection.num_constant, inspection.num_grey) == (2 * is_constant, 2 * is_grey)
    assert len(inspection.digests) == 2 and len(set(inspection.digests)) == 1


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
    begun, error = process.stderr.splitlines()
    assert begun == 'evaluate.py: loading torch and the images'
    assert 'INCEPTION_WEIGHTS' in error and str(files / 'cache') in error
    assert 'checkpoints' in error and '6726825d' in error
    assert {path.name for path in files.iterdir()} == {'ref.npz', 'sample.npz'}


@pytest.mark.parametrize(('kind', 'bad'), [('pool', np.nan), ('spatial', -np.inf), ('logits', np.inf)])
def test_non_finite_features_name_the_image(run, files, monkeypatch, kind, bad):
    class Broken(Stub):
        def outputs(self, images_u8):
            out = super().outputs(images_u8)
            getattr(out, kind)[(images_u8 == 0).flatten(1).all(1), 1] = bad
            return out
    monkeypatch.setattr(command, 'load_network', lambda _: Broken())
    images = noise(101, 1)
    images[77] = 0
    np.savez(files / 'sample.npz', arr_0=images)
    with pytest.raises(SystemExit, match=r'sample\.npz: .*image 77 '):
        run(files / 'ref.npz', files / 'sample.npz', '--allow_any_count', '--cache=', '--bs=8')
    of_a_rank = extraction.FeatureSet(Broken(), 101, torch.device('cpu'), split_size=40)
    with pytest.raises(ValueError, match='image 77 '):
        of_a_rank.add(torch.from_numpy(images[60:]).permute(0, 3, 1, 2), 60)


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
    (dict(mu=np.zeros(64), sigma=np.eye(64), arr_0=None), ['--metrics=is,fid'], 'asks for is'),
    (dict(mu_s=np.zeros(3), sigma_s=np.eye(3), arr_0=None), [], 'got the arrays mu_s, sigma_s'),
    (dict(sigma=np.eye(64)), [], 'got sigma alone'),
    (dict(mu_s=np.zeros(64)), [], 'got mu_s alone'),
    (None, ['--metrics=sfid'], 'spatial'),
    (None, ['--metrics=fid,psnr'], 'psnr'),
    (None, ['--pr_mode=fp64'], 'adm or fp32'),
    (None, ['--split_size=0'], 'at least 1'),
    (None, ['--bs=0'], '--bs must be at least 1'),
    (None, ['--pr'], 'unknown argument'),
    (None, ['--device=tpu'], 'cpu or cuda'),
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


@pytest.mark.parametrize('kind', ['npz', 'folder'])
def test_references_that_are_too_small_are_named_at_once(run, files, monkeypatch, capsys, kind):
    monkeypatch.setattr(command, 'load_network', None)
    one = files / 'one.npz'
    np.savez(one, arr_0=noise(1, 0))
    if kind == 'folder':
        one = write_pngs(files / 'one', noise(1, 0))
    for metrics, number in (('fid', 2), ('fid,recall', 4)):
        with pytest.raises(SystemExit):
            run(one, files / 'sample.npz', *DIGITS, f'--metrics={metrics}')
        assert f'at least {number} images, {one} holds 1' in capsys.readouterr().err


@pytest.mark.parametrize('size', [0, -3])
def test_batches_without_images_are_refused(run, files, capsys, size):
    with pytest.raises(SystemExit):
        run('stats', files / 'ref.npz', files / 'out.npz', '--features=digits', f'--bs={size}')
    assert '--bs must be at least 1' in capsys.readouterr().err and not (files / 'out.npz').exists()


# ---------------------------------------------------------------------------------------------- pack
def test_pack_shuffles_images_with_their_labels(run, files):
    images = noise(12, 0)
    folder = write_pngs(files / 'folder', images)
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
    PackSettings(folder='digits', output='x.npz', image_size=16).require_files()  # no folder of that name
    with pytest.raises(ValueError, match='found nothing at digits'):
        PackSettings(folder='digits', output='x.npz').require_files()
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


# ---------------------------------------------------------------------------------------------- outputs
@pytest.mark.parametrize('argv', [
    ['stats', 'folder', 'folder.npz'], ['stats', 'folder', 'folder.json'], ['stats', 'ref.npz', 'ref.json'],
    ['pack', 'folder', 'folder/00.png'], ['pack', 'folder', 'folder/labels.npy'],
    ['classify-eval', 'sample.npz', '--classifier=digits', '--json=sample.npz'],
    ['classify-eval', 'sample.npz', '--classifier=digits', '--json=sample.json']])
def test_results_never_replace_what_they_are_made_of(run, files, monkeypatch, capsys, argv):
    monkeypatch.chdir(files)
    (files / 'folder').mkdir()
    for i, image in enumerate(noise(3, 0)):
        Image.fromarray(image).save(files / 'folder' / f'{i:02d}.png')
    (files / 'folder.npz').write_bytes(b'kept')
    before = {path: path.read_bytes() for path in files.rglob('*') if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        run(*argv, *['--features=digits'] * (argv[0] == 'stats'))
    assert stop.value.code == 2 and 'pass another name' in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files.rglob('*') if path.is_file()} == before


def test_nearest_command_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', 'stat', 'a.npz', 'b.npz'])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert 'the nearest command is stats' in capsys.readouterr().err


def test_statistics_that_are_none(run, files, capsys):
    for sigma, dtype, word in ((-np.eye(64), float, 'variance'), (np.eye(64), complex, 'complex')):
        np.savez(files / 'stats.npz', mu=np.zeros(64, dtype), sigma=sigma)
        with pytest.raises(SystemExit, match='expected'):
            run(files / 'stats.npz', files / 'sample.npz', *DIGITS)
        assert word in capsys.readouterr().err


def test_few_reference_images_are_doubtful(run, files):
    np.savez(files / 'few.npz', arr_0=noise(10, 5))
    report, _ = run(files / 'few.npz', files / 'sample.npz', *DIGITS)
    assert any(note.startswith('reference: rank-deficient covariance of 10 ') for note in report['warnings'])
