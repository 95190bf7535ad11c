"""Scores beyond ADM's: values, names, kept features; `stats --encoder`, `encoders`; bad input."""
import json
import multiprocessing
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed

import evaluate
from evaluation import beyond_fid, digits_features, encoders, feature_store, pack
from evaluation import score as command
from evaluation.beyond_fid import METRICS, Metric
from evaluation.digits_features import DigitsFeatures
from evaluation.fdr import DIVISORS, FDR_ENCODERS
from evaluation.features import load_network
from evaluation.inception import MissingWeights, Outputs
from evaluation.kernels import cmmd, kid
from evaluation.metrics import FeatureStatistics, frechet_distance
from evaluation.precision_recall import density_coverage
from evaluation.settings import BEYOND
from evaluation.sliced import mind
from tests.replicas import KEYS, small_table, write_replicas
from utils.console import one_line_errors
from utils.hub import sha256_of

DIGITS = ['--features=digits', '--allow_any_count']
ON_DIGITS = '--metrics=adm,kid,prdc,mind,vendi,fd_inf'


def noise(count, seed, side=8):
    return np.random.RandomState(seed).randint(0, 256, (count, side, side, 3), np.uint8)


@pytest.fixture(autouse=True)
def random_digits_network(monkeypatch):
    """The network of the digits has random weights, since fitting takes seconds."""
    rng = np.random.RandomState(0)
    arrays = []
    for inputs, outputs in ((64, 128), (128, 64), (64, 10)):
        arrays += [rng.standard_normal((outputs, inputs)) / inputs ** 0.5, rng.standard_normal(outputs) / 10]
    monkeypatch.setattr(digits_features, '_fit', lambda hidden: arrays)


@pytest.fixture
def files(tmp_path):
    """ref.npz with 60 images, sample.npz with 40 others."""
    np.savez(tmp_path / 'ref.npz', arr_0=noise(60, 0))
    np.savez(tmp_path / 'sample.npz', arr_0=noise(40, 1) // 2)
    return tmp_path


@pytest.fixture
def run(evaluate_here, monkeypatch, tmp_path):
    """Run evaluate.py in this process: (report or None, what it printed)."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.delenv('ENCODER_WEIGHTS', raising=False)
    path = tmp_path / 'report.json'

    def call(*argv):
        path.unlink(missing_ok=True)
        argv = [str(arg) for arg in argv]
        flags = [] if argv[0] in ('stats', 'encoders') else [f'--json={path}']
        if argv[0] != 'encoders':
            flags += [f'--cache={tmp_path / "cache"}', '--offline']
        printed = evaluate_here(*argv, *flags)
        return json.loads(path.read_text()) if path.exists() else None, printed
    return call


@pytest.fixture
def extracted(monkeypatch):
    """(file, encoder) of every pass over images."""
    passes = []

    def noted(images, network, *args, **kwargs):
        passes.append((images.path.name, network.name))
        return extract(images, network, *args, **kwargs)
    extract = feature_store.extract
    monkeypatch.setattr(feature_store, 'extract', noted)
    return passes


def rows_of(images_NHW3, network):
    return network.outputs(torch.from_numpy(images_NHW3).permute(0, 3, 1, 2)).pool


def gaussian(rows_NF):
    statistics = FeatureStatistics(rows_NF.shape[1])
    statistics.add(rows_NF)
    return statistics.mean, statistics.covariance()


# ---------------------------------------------------------------------------------------------- one encoder
def test_scores_are_those_of_the_features(run, files, extracted):
    plain, _ = run(files / 'ref.npz', files / 'sample.npz', *DIGITS)
    report, printed = run(files / 'ref.npz', files / 'sample.npz', *DIGITS, ON_DIGITS)
    assert extracted == [('ref.npz', 'digits'), ('sample.npz', 'digits')]  # once each, for all scores
    scores = report['scores']
    for name, value in plain['scores'].items():
        assert scores[name] == pytest.approx(value, rel=1e-12), name
    network = DigitsFeatures()
    sample, real = rows_of(noise(40, 1) // 2, network), rows_of(noise(60, 0), network)
    estimate = kid(sample, real)
    assert scores['kid_digits_all_0.04k'] == pytest.approx(estimate.value, rel=1e-9)
    assert scores['kid_digits_all_0.04k_error'] == pytest.approx(estimate.error, rel=1e-9)
    assert scores['mind_digits_m1000_0.04k'] == pytest.approx(mind(sample, real).value, rel=1e-9)
    assert set(scores['prdc5_digits_0.04k']) == {'precision', 'recall', 'density', 'coverage'}
    assert 1 < scores['vendi_digits_0.04k'] < 40 and 'fd_inf15_digits_own_0.04k' not in scores
    assert scores['fd_inf15_digits_0.04k_own'] != scores['fid']
    assert 'kid_digits_s100x1000: not available, a set has fewer than 1,000 images' in printed
    assert f'kid_digits_all_0.04k: {scores["kid_digits_all_0.04k"]:.6g}' in printed
    described = report['beyond']['metrics']['kid']
    assert described['references']['real']['count'] == 60 and described['seed'] == 2020
    assert described['references']['real']['sha256'] == report['reference']['sha256']
    assert len(report['beyond']['encoders']['digits']['sha256']) == 64


def test_as_many_images_of_both_sides(run, files):
    report, _ = run(files / 'ref.npz', files / 'sample.npz', *DIGITS, '--metrics=prdc,mind',
                    '--prdc_count=40',
                    '--prdc_k=3', '--mind_count=25')
    assert set(report['scores']) == {'prdc3_digits_0.04k', 'mind_digits_m1000_0.025k',
                                     'mind_digits_m1000_0.025k_error'}
    network = DigitsFeatures()
    sample, real = rows_of(noise(40, 1) // 2, network), rows_of(noise(60, 0), network)
    chosen = np.random.RandomState(2020).permutation(60)[:40]
    expected = density_coverage(real[torch.from_numpy(chosen)], sample, k=3)
    assert report['scores']['prdc3_digits_0.04k'] == pytest.approx(expected._asdict())


def test_real_images_take_the_place_of_those_of_the_reference(run, files):
    np.savez(files / 'real.npz', arr_0=noise(30, 7))
    run('stats', files / 'ref.npz', files / 'stats.npz', '--features=digits')
    report, _ = run(files / 'stats.npz', files / 'sample.npz', *DIGITS, '--metrics=fid,kid',
                    f'--real={files / "real.npz"}')
    network = DigitsFeatures()
    expected = kid(rows_of(noise(40, 1) // 2, network), rows_of(noise(30, 7), network)).value
    assert report['scores']['kid_digits_all_0.04k'] == pytest.approx(expected, rel=1e-9)
    assert any('not of REF' in note for note in report['warnings'])


def test_copies_are_reported(run, files):
    np.savez(files / 'real.npz', arr_0=noise(30, 7))
    train = noise(50, 9)
    np.savez(files / 'bank.npz', arr_0=train)
    np.savez(files / 'sample.npz', arr_0=np.concatenate([noise(20, 1), train[:20]]))
    report, _ = run(files / 'ref.npz', files / 'sample.npz', *DIGITS, '--metrics=memory',
                    f'--real={files / "real.npz"}', f'--bank={files / "bank.npz"}',
                    f'--pairs={files / "pairs.png"}')
    copies = report['scores']['nn_digits_0.04k']
    assert copies['share_nearer'] >= 0.5 and {tuple(pair[:2]) for pair in copies['pairs']} \
        == {(20 + i, i) for i in range(20)}
    assert Image.open(files / 'pairs.png').size == (20 * 8 + 19 * 2, 8 + 2 + 8)


def test_scores_that_a_generator_was_trained_on_are_marked(run, files):
    flags = [files / 'ref.npz', files / 'sample.npz', *DIGITS, '--metrics=fid,is,kid,prdc']
    report, printed = run(*flags)
    assert report['trained_on'] == {} and 'trained on' not in printed
    manifest = dict(npz_sha256=report['sample']['sha256'], trained_on=['kid', 'fid'])
    (files / 'sample.json').write_text(json.dumps(manifest))
    report, printed = run(*flags)
    assert report['trained_on'] == {'fid': ['fid'], 'kid_digits_all_0.04k': ['kid'],
                                    'kid_digits_all_0.04k_error': ['kid']}
    scores = report['scores']
    assert f'FID: {scores["fid"]:.6g} (trained on fid)\n' in printed
    assert f'Inception Score: {scores["is"]:.6g}\n' in printed
    assert f'kid_digits_all_0.04k: {scores["kid_digits_all_0.04k"]:.6g} (trained on kid)\n' in printed
    assert 'warning: the generator was trained on kid, fid: ' in printed

    # An encoder stands for all that is made of its features; what was rejected is still of that generator.
    manifest = dict(npz_sha256=report['sample']['sha256'], candidates=dict(trained_on=['digits']))
    (files / 'sample.json').write_text(json.dumps(manifest))
    report, printed = run(*flags)
    assert report['trained_on'] == {name: ['digits'] for name in report['scores']}
    assert printed.count(' (trained on digits)\n') == 5
    (files / 'sample.json').write_text(json.dumps(manifest | dict(trained_on='fid')))
    with pytest.raises(SystemExit, match='expected a list of names as trained_on'):
        run(*flags)


def rank_of_two(rank, settings, folder):
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{folder / "group"}', rank=rank, world_size=2)
    report = command.score_images(settings)
    assert (report is None) == (rank > 0)
    if report:
        (folder / 'many.json').write_text(json.dumps(report))
    distributed.destroy_process_group()


def test_processes_do_not_change_scores(run, files):
    one, _ = run(files / 'ref.npz', files / 'sample.npz', *DIGITS, ON_DIGITS, '--bs=7')
    settings = command.ScoreSettings(
        ref=str(files / 'ref.npz'), sample=str(files / 'sample.npz'), metrics=ON_DIGITS.partition('=')[2],
        features='digits', allow_any_count=True, batch_size=7, device='cpu', cache=str(files / 'others'))
    processes = multiprocessing.get_context('fork')
    ranks = [processes.Process(target=rank_of_two, args=(rank, settings, files)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    many = json.loads((files / 'many.json').read_text())
    assert many['world_size'] == 2 and many['warnings'] == one['warnings']
    assert one['scores'].keys() == many['scores'].keys()
    for name, value in one['scores'].items():
        assert many['scores'][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert not list((files / 'others').glob('.*'))  # nothing temporary


# ---------------------------------------------------------------------------------------------- kept features
def test_kept_features_give_the_same_report(run, files, extracted):
    flags = [files / 'ref.npz', files / 'sample.npz', *DIGITS]
    run(*flags, '--metrics=fid,vendi')  # of the reference, statistics alone would do
    first, _ = run(*flags, ON_DIGITS)
    assert len(extracted) == 2
    again, _ = run(*flags, ON_DIGITS, '--bs=7')
    assert len(extracted) == 2 and again['scores'] == first['scores']
    assert again['warnings'] == first['warnings']
    np.savez(files / 'sample.npz', arr_0=noise(41, 1))
    run(*flags, ON_DIGITS)
    assert extracted[2:] == [('sample.npz', 'digits')]
    assert not [path for path in (files / 'cache').iterdir() if path.suffix not in ('.npy', '.npz')]


def test_features_without_classes_serve_any_chunks_of_the_inception_score(run, files, small, extracted):
    flags = [files / 'stats.npz', files / 'sample.npz', '--allow_any_count', '--metrics=is,vendi',
             '--prdc_encoder=mae', '--encoder_dtype=float32', f'--encoder_weights={small}']
    run(*flags)
    assert [encoder for _, encoder in extracted] == ['inception', 'mae']
    run(*flags, '--split_size=3')
    assert [encoder for _, encoder in extracted] == ['inception', 'mae', 'inception']


@pytest.mark.parametrize('suffix', ['.npy', '.npz'])
def test_damaged_features_are_computed_again(run, files, extracted, suffix):
    flags = [files / 'ref.npz', files / 'sample.npz', *DIGITS, '--metrics=kid']
    first, _ = run(*flags)
    for change in (lambda data: data[:-5], lambda data: data[:-5] + bytes(5), lambda data: b''):
        for path in (files / 'cache').glob(f'set-*{suffix}'):
            path.write_bytes(change(path.read_bytes()))
        extracted.clear()
        again, printed = run(*flags)
        assert len(extracted) == 2 and again['scores'] == first['scores']
        assert printed.count('computed again') == 2


def test_without_a_cache_features_vanish(run, files, monkeypatch, tmp_path, extracted):
    flags = [files / 'ref.npz', files / 'sample.npz', *DIGITS, '--metrics=kid']
    first, _ = run(*flags)
    (files / 'file').write_text('')
    (files / 'temporary').mkdir()
    monkeypatch.setattr(feature_store.tempfile, 'tempdir', str(files / 'temporary'))
    for cache in ('', files / 'file' / 'cache'):
        extracted.clear()
        settings = command.ScoreSettings(ref=str(flags[0]), sample=str(flags[1]), features='digits',
                                         metrics='kid', allow_any_count=True, cache=str(cache))
        report = command.score_images(settings)
        assert report['scores'] == first['scores'] and len(extracted) == 2
    assert list((files / 'temporary').iterdir()) == []


def test_a_killed_run_continues_with_the_next_pass(run, files, small, monkeypatch, extracted):
    class Killed(Exception):
        pass
    flags = [files / 'stats.npz', files / 'sample.npz', '--allow_any_count', '--metrics=fdr6',
             f'--statistics={small}', '--encoder_dtype=float32', f'--encoder_weights={small}']
    noted = feature_store.extract

    def killed(images, network, *args, **kwargs):
        if network.name == 'siglip':
            raise Killed
        return noted(images, network, *args, **kwargs)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(feature_store, 'extract', killed)
        run(*flags)
    assert [encoder for _, encoder in extracted] == ['inception', 'convnext', 'dinov2', 'mae']
    extracted.clear()
    run(*flags)
    assert [encoder for _, encoder in extracted] == ['siglip', 'clip']


# ---------------------------------------------------------------------------------------------- six encoders
class SmallInception:
    """Stands in for Inception: features are pixels."""

    name, digest, num_features, num_spatial, num_classes = 'inception', '1' * 64, 6, 0, 4

    def __init__(self, dtype='float32'):
        self.dtype = dtype

    def outputs(self, images_u8):
        pixels = images_u8.flatten(1).float() / 32
        return Outputs(pixels[:, :6], None, pixels[:, 15:19])


def load_small(settings, encoder=''):
    """`load_network` with the small Inception."""
    if (encoder or settings.features) == 'inception':
        return SmallInception(settings.dtype)
    return load_network(settings, encoder)


@pytest.fixture(scope='module')
def made_small(tmp_path_factory):
    """Weights of small encoders, and statistics of train.npz by each; stats.npz is Inception's."""
    folder = write_replicas(tmp_path_factory.mktemp('small') / 'encoders')
    np.savez(folder.parent / 'train.npz', arr_0=noise(8, 0))
    targets = {key: folder / encoders.ENCODERS[key].statistics for key in KEYS}
    with small_table(), mock.patch.object(pack, 'load_network', load_small):
        for key, target in [('', folder.parent / 'stats.npz'), *targets.items()]:
            settings = pack.StatsSettings(
                images=str(folder.parent / 'train.npz'), output=str(target), encoder=key,
                encoder_dtype='float32', encoder_weights=str(folder), offline=True)
            pack.evaluate_stats(settings)
    return folder.parent


@pytest.fixture
def small(files, monkeypatch, made_small):
    """A copy of these files beside six images as sample.npz."""
    shutil.copytree(made_small, files, dirs_exist_ok=True)
    np.savez(files / 'sample.npz', arr_0=noise(6, 1) // 2)
    for module in (command, pack, beyond_fid):
        monkeypatch.setattr(module, 'load_network', load_small)
    with small_table():
        yield files / 'encoders'


def test_six_encoders(run, files, small):
    flags = [files / 'stats.npz', files / 'sample.npz', '--allow_any_count', f'--statistics={small}',
             '--encoder_dtype=float32', f'--encoder_weights={small}']
    np.savez(files / 'real.npz', arr_0=noise(5, 7))
    manifest = dict(npz_sha256=sha256_of(files / 'sample.npz'), trained_on=['mae'])
    (files / 'sample.json').write_text(json.dumps(manifest))
    report, printed = run(*flags, '--metrics=fdr6,fd_dinov2,fd_dinov2_dgm,cmmd',
                          f'--real={files / "real.npz"}')
    scores = report['scores']

    # Statistics of our own are compared with own divisors alone, and names say what differs.
    images = [noise(8, 0), noise(6, 1) // 2, noise(5, 7)]
    names = {key: f'fd_{key}_0.006k_fp32_own' for key in FDR_ENCODERS} | dict(inception='fd_inception_0.006k')
    for key in ('inception', 'mae'):
        network = SmallInception()
        if key == 'mae':
            network = encoders.EncoderFeatures(key, folder=str(small), dtype='float32')
        train, sample, real = (rows_of(part, network) for part in images)
        distance = frechet_distance(*gaussian(train), *gaussian(sample))
        assert scores[names[key]] == pytest.approx(distance, rel=1e-4), key
        ratio = distance / frechet_distance(*gaussian(train), *gaussian(real))
        suffix = '' if key == 'inception' else '_fp32'
        assert scores[f'fdr_{key}_own_0.006k{suffix}'] == pytest.approx(ratio, rel=1e-4), key
    ratios = [value for name, value in scores.items() if name.startswith('fdr_') and '_own_' in name]
    assert len(ratios) == 6 and scores['fdr6_own_0.006k_fp32'] == pytest.approx(np.mean(ratios), rel=1e-9)
    assert report['beyond']['unavailable'].keys() == {'fdr6_paper'}
    assert report['beyond']['metrics']['fdr6']['references']['real']['count'] == 5  # of its divisors
    clip = encoders.EncoderFeatures('clip336', folder=str(small))
    expected = cmmd(rows_of(images[1], clip), rows_of(images[2], clip)).biased
    assert scores['cmmd_clip336_0.006k'] == pytest.approx(expected, rel=1e-4)
    assert {'fd_dinov2_edm2_0.006k_own', 'fd_dinov2_dgm_0.006k_own'} < set(scores)
    assert 'fdr6_own_0.006k_fp32: ' in printed
    mae = report['beyond']['encoders']['mae']
    assert mae['identifier'] == 'vit_large_patch16_224.mae' and not mae['pinned'] and mae['px'] == 224
    assert mae['training']['path'].endswith('vit_large_patch16_224_mae_in256_t224_stats.npz')
    assert any(note.startswith('mae: weights with SHA-256') for note in report['warnings'])

    # The generator was trained on one of the encoders.
    marked = ('fd_mae_0.006k_fp32_own', 'fdr_mae_own_0.006k_fp32', 'fdr6_own_0.006k_fp32')
    assert report['trained_on'] == {name: ['mae'] for name in marked}
    assert printed.count(' (trained on mae)\n') == 2  # FDr^6, and a row of its table

    # Published statistics have no name inside; the divisors of the paper belong to them.
    for path in small.glob('*.npz'):
        with np.load(path) as arrays:
            np.savez(path, mu=arrays['mu'], sigma=arrays['sigma'])
    with np.load(files / 'stats.npz') as arrays:
        np.savez(files / 'full.npz', arr_0=images[0], **arrays)
    report, printed = run(files / 'full.npz', *flags[1:], '--metrics=fdr6,kid')
    assert set(report['beyond']['unavailable']) == {'fdr6_own', 'kid_inception_s100x1000'}
    for kind, divisors in DIVISORS.items():
        expected = np.mean([scores[names[key]] / divisors[key] for key in FDR_ENCODERS])
        assert report['scores'][f'fdr6_{kind}_0.006k_fp32_ref256'] == pytest.approx(expected, rel=1e-6)
    assert 'fdr_mae_paper_0.006k_fp32_ref256' in printed
    text = ' '.join(report['warnings'])
    assert 'mae: features of float32 against published statistics of bfloat16' in text


def test_statistics_say_what_they_are_of(run, files, small):
    flags = [files / 'stats.npz', files / 'sample.npz', '--allow_any_count', '--metrics=fd_dinov2',
             f'--statistics={small}', f'--encoder_weights={small}']
    path = small / 'dinov2_edm2_stats.npz'
    with np.load(path) as arrays:
        content = dict(arrays)
    assert (content['count'], content['image_size'], content['encoder']) == (8, 8, 'dinov2_edm2')
    for name, value in (('encoder', 'mae'), ('dtype', 'bfloat16'), ('weights_sha256', '0' * 64)):
        np.savez(path, **content | {name: np.array(value)})
        with pytest.raises(SystemExit, match=f'expected statistics with the {name} .* got {value}'):
            run(*flags)
    path.unlink()
    with pytest.raises(SystemExit, match=r'pass --statistics=FOLDER with dinov2_edm2_stats\.npz .*--enc'):
        run(*flags)
    (small / 'paper_ref_stats.pkl').write_bytes(b'')
    with pytest.raises(SystemExit, match=r'paper_ref_stats\.pkl, which can run code .*nanogen-evals-stats'):
        run(*flags)


def test_names_say_that_inception_ran_in_float64(run, files, small):
    flags = [files / 'stats.npz', files / 'sample.npz', '--allow_any_count', '--metrics=fid,vendi,fd_inf']
    plain, _ = run(*flags)
    assert set(plain['scores']) == {'fid', 'vendi_inception_0.006k', 'fd_inf15_inception_0.006k'}
    report, printed = run(*flags, '--dtype=float64')
    assert set(report['scores']) == {'fid', 'vendi_inception_0.006k_fp64', 'fd_inf15_inception_0.006k_fp64'}
    assert report['beyond']['encoders']['inception']['dtype'] == 'float64' and ', float64, ' in printed


# ---------------------------------------------------------------------------------------------- more metrics
def test_a_metric_is_a_row(run, files, monkeypatch):
    """A name and words, and what is compared how."""
    def score(given):
        means = [given.rows(of, 'digits').mean() for of in ('sample', 'real')]
        return {given.name('toy_digits', 'digits'): (means[0] - means[1]).abs().item()}
    monkeypatch.setitem(BEYOND, 'toy', 'difference of means')
    monkeypatch.setitem(METRICS, 'toy', Metric(lambda settings: ('digits',), score, rows=True, real=True))
    report, printed = run(files / 'ref.npz', files / 'sample.npz', *DIGITS, '--metrics=toy')
    assert report['scores']['toy_digits_0.04k'] > 0 and 'toy_digits_0.04k: ' in printed
    assert report['beyond']['metrics']['toy']['words'] == 'difference of means'


def test_every_name_of_the_settings_is_a_metric():
    assert list(METRICS) == list(BEYOND)


def test_encoders_are_listed(run, files, small, monkeypatch):
    monkeypatch.setenv('INCEPTION_WEIGHTS', str(files / 'none.pth'))
    (small / 'vit_large_patch14_clip_224.openai.safetensors').unlink()
    (small / 'convnext_in256_t224_stats.npz').unlink()
    _, printed = run('encoders', f'--encoder_weights={small}', f'--statistics={small}',
                     f'--cache={files / "cache"}')
    lines = printed.splitlines()
    assert [line.partition(':')[0] for line in lines if not line.startswith(' ')] == list(encoders.ENCODERS)
    text = printed.replace('\n    ', ' | ')
    mae, = (line for line in text.splitlines() if line.startswith('mae: '))
    assert 'no commercial use' in mae and 'not pinned' in mae
    assert str(small / 'vit_large_patch16_224.mae.safetensors') in mae
    assert 'statistics: convnext_in256_t224_stats.npz is missing' in text
    clip, = (line for line in text.splitlines() if line.startswith('clip: '))
    assert 'weights: none at' in clip and encoders.ENCODERS['clip'].url in clip


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(('flags', 'message'), [
    (['--metrics=kdi'], 'the nearest is kid'),
    (['--metrics=memory'], 'pass --bank=IMAGES'),
    (['--metrics=prdc', '--prdc_encoder=dino'], '--prdc_encoder must be one of inception'),
    (['--metrics=prdc', '--prdc_k=60'], 'prdc needs at least 61 images'),
    (['--metrics=kid', '--real={sample}'], 'comparing a set with itself'),
    (['--metrics=kid', '--real=nowhere.npz'], 'found nothing at nowhere.npz'),
    (['--metrics=fdr6', '--statistics=nowhere'], 'expected a folder of statistics'),
    (['--metrics=cmmd', '--encoder_dtype=float16'], 'bfloat16 or float32'),
])
def test_errors_are_one_line(run, files, extracted, capsys, flags, message):
    flags = [flag.format(sample=files / 'sample.npz') for flag in flags]
    with pytest.raises(SystemExit) as stop, one_line_errors('evaluate.py', exit_code=2):
        argv = [str(files / 'ref.npz'), str(files / 'sample.npz'), *DIGITS, *flags]
        settings = evaluate.parse_evaluation(argv, '')
        settings.require_files()
        run(*argv)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and message in error, error
    assert not extracted


def test_references_without_images(run, files, extracted):
    run('stats', files / 'ref.npz', files / 'stats.npz', '--features=digits')
    with pytest.raises(SystemExit, match=r'kid compares single images, but .* holds statistics alone'):
        run(files / 'stats.npz', files / 'sample.npz', *DIGITS, '--metrics=kid')
    with pytest.raises(SystemExit, match='which need images'):
        run(files / 'ref.npz', files / 'stats.npz', *DIGITS, '--metrics=kid')
    assert not extracted


def test_weights_that_are_missing_end_the_run_before_images_are_read(run, files, small, extracted):
    (small / 'vit_large_patch14_clip_224.openai.safetensors').unlink()
    flags = [files / 'stats.npz', files / 'sample.npz', '--allow_any_count', f'--statistics={small}',
             '--encoder_dtype=float32', f'--encoder_weights={small}']
    with pytest.raises(SystemExit, match='no weights of clip at') as stop:
        run(*flags, '--metrics=adm,fdr6')
    assert not extracted and stop.value.code == MissingWeights.exit_code


def test_shapes_that_are_refused(run, files, small, extracted, monkeypatch):
    np.savez(files / 'sample.npz', arr_0=noise(6, 1)[:, :, :6])
    flags = [files / 'train.npz', files / 'sample.npz', '--allow_any_count', f'--statistics={small}',
             '--encoder_dtype=float32', f'--encoder_weights={small}']
    extracted.clear()
    with pytest.raises(SystemExit, match=r'mae is defined for square images, .* has 6x8'):
        run(*flags, '--metrics=prdc', '--prdc_encoder=mae')
    assert not extracted
    with monkeypatch.context() as patched:  # CMMD needs no Inception
        patched.setattr(command, 'load_network', None)
        report, printed = run(*flags, '--metrics=cmmd')
    assert 'cmmd_clip336_0.006k' in report['scores'] and report['network'] is None
    assert 'cmmd_clip336_0.006k: ' in printed and 'features' not in printed.splitlines()[2]
