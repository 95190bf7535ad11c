"""classify-eval and reject: classifiers and their weights, accuracy, what is kept, processes, bad input."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

import dist
from evaluation import classifiers, classify
from evaluation.classifiers import Classifier, load_classifier
from evaluation.classify import Judgement, judge, select
from evaluation.inception import MissingWeights
from evaluation.score import read_manifest
from tests.runs import launch
from utils.data import open_split
from utils.hub import sha256_of
from utils.image_sets import open_images, shuffled

NET = 'shufflenet_v2_x0_5'  # the fastest of torchvision here


@pytest.fixture(scope='module')
def network_file(tmp_path_factory):
    """Random weights of ten classes, with statistics of noise, so that images are told apart."""
    torch.manual_seed(0)
    network = models.get_model(NET, num_classes=10)
    network(torch.randn(8, 3, 64, 64))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean of what comes
            module.reset_running_stats()
    with torch.no_grad():
        network(torch.randn(8, 3, 64, 64))
    path = tmp_path_factory.mktemp('network') / 'network.pth'
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """An empty hub folder."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    return tmp_path / 'hub' / 'checkpoints'


@pytest.fixture
def fails(evaluate_here, capsys):
    """Run evaluate.py, which must fail with one line; that line."""
    def call(*argv, code=2):
        with pytest.raises(SystemExit) as stop:
            evaluate_here(*argv)
        assert stop.value.code == code
        message = capsys.readouterr().err
        assert message.count('\n') == 1 and message.endswith('\n')
        return message
    return call


def row_classifier(images_u8):
    """Logits in the top left of the red channel: coarse, so that many are equal."""
    return images_u8[:, 0, 0, :10].float() / 32


@pytest.fixture
def toy(monkeypatch):
    """`--classifier=toy` reads its logits off the images."""
    classifier = Classifier('toy', 10, 'c0ffee' * 10, torch.device('cpu'), row_classifier)
    monkeypatch.setattr(classify, 'load_classifier', lambda *_: classifier)
    return classifier


def noise(count, seed=0):
    """Images (N, 6, 12, 3) of five grey levels."""
    return np.random.RandomState(seed).randint(0, 5, (count, 6, 12, 3)).astype(np.uint8) * 50


def log_probs(images):
    """Of the toy, by numpy in float64."""
    logits_NC = images[:, 0, :10, 0] / 32.
    return logits_NC - np.log(np.exp(logits_NC).sum(1, keepdims=True))


@pytest.fixture
def candidates(tmp_path):
    """200 images, about 20 of each class in random order."""
    path = tmp_path / 'candidates.npz'
    np.savez(path, arr_0=noise(200), arr_1=np.random.RandomState(1).permutation(np.arange(200) % 10))
    return path


# ---------------------------------------------------------------------------------------------- classifiers
def test_network_gets_what_its_metadata_says(network_file):
    images_u8 = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (3, 3, 40, 30), np.uint8))
    classifier = load_classifier(NET, str(network_file))
    network = models.get_model(NET, num_classes=10).eval()
    network.load_state_dict(torch.load(network_file, weights_only=True))
    preprocess = models.get_model_weights(NET).DEFAULT.transforms()
    with torch.no_grad():
        expected = torch.cat([network(preprocess(image)[None]) for image in images_u8]).log_softmax(1)
    log_prob_BC = classifier(images_u8)
    assert expected.std(0).max() > 0.1, 'the images must differ'
    torch.testing.assert_close(log_prob_BC, expected, atol=1e-5, rtol=0)
    assert log_prob_BC.dtype == torch.float32
    assert (classifier.name, classifier.num_classes, classifier.digest) == (NET, 10, sha256_of(network_file))


def test_published_file_of_older_weights_brings_its_own_preprocessing(tmp_path, monkeypatch):
    old, new = models.MobileNet_V2_Weights.IMAGENET1K_V1, models.MobileNet_V2_Weights.DEFAULT
    assert old.transforms().resize_size != new.transforms().resize_size
    path = tmp_path / 'mine.pth'
    torch.save(models.mobilenet_v2().state_dict(), path)

    def preprocessing():
        return load_classifier('mobilenet_v2', str(path)).logits[0].resize_size
    assert preprocessing() == new.transforms().resize_size
    monkeypatch.setattr(old.value, 'url', f'https://host/mine-{sha256_of(path)[:8]}.pth')
    path = path.rename(tmp_path / old.url.rpartition('/')[2])
    assert preprocessing() == old.transforms().resize_size


@pytest.mark.parametrize('name', ['densenet121', 'googlenet'])
def test_published_weights_give_the_network_that_torchvision_builds(name, monkeypatch, tmp_path):
    """Files of densenet have old names of layers; googlenet was trained on other means and deviations."""
    network = models.get_model(name, **dict(init_weights=False) if name == 'googlenet' else {})
    state = {key.replace('.norm1.', '.norm.1.').replace('.conv2.', '.conv.2.'): value
             for key, value in network.state_dict().items() if not key.endswith('num_batches_tracked')}
    torch.save(state, tmp_path / 'state.pth')
    monkeypatch.setattr(models.WeightsEnum, 'get_state_dict', lambda *_, **__: dict(state))
    theirs = models.get_model(name, weights='DEFAULT').eval()
    images_u8 = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (1, 3, 256, 256), np.uint8))
    with torch.no_grad():
        expected = theirs(models.get_model_weights(name).DEFAULT.transforms()(images_u8))
    assert torch.equal(load_classifier(name, str(tmp_path / 'state.pth')).logits(images_u8), expected)


def test_vision_transformer_has_the_size_of_its_crops(monkeypatch, tmp_path):
    """By the first one whose published weights need another size, too large to be built here."""
    asked = []
    monkeypatch.setattr(models, 'get_model',
                        lambda *_, **options: asked.append(options) or nn.Linear(3, 1000))
    torch.save(nn.Linear(3, 1000).state_dict(), tmp_path / 'linear.pth')
    load_classifier('vit_h_14', str(tmp_path / 'linear.pth'))
    assert asked == [dict(image_size=518)]


@pytest.fixture
def published(network_file, monkeypatch, tmp_path):
    """Makes torchvision's table name our file, at a file:// address."""
    path = tmp_path / 'server' / f'net-{sha256_of(network_file)[:8]}.pth'
    path.parent.mkdir()
    path.write_bytes(network_file.read_bytes())
    monkeypatch.setattr(models.get_model_weights(NET).DEFAULT.value, 'url', path.as_uri())
    return path


def test_weights_are_downloaded_only_if_allowed_then_found(published, hub):
    with pytest.raises(MissingWeights, match=f'no weights of {NET} at {hub / published.name}: fetch file'):
        load_classifier(NET)
    digest = load_classifier(NET, download=True).digest
    published.unlink()
    assert load_classifier(NET).digest == digest == sha256_of(hub / published.name)


def test_download_of_other_bytes_or_none_leaves_no_file(published, hub):
    published.write_bytes(b'something else')
    with pytest.raises(MissingWeights, match=r'cannot download them .invalid hash'):
        load_classifier(NET, download=True)
    published.unlink()
    with pytest.raises(MissingWeights, match=r'cannot download them .*No such file'):
        load_classifier(NET, download=True)
    assert list(hub.iterdir()) == []


def test_damaged_file_under_a_published_name(published, hub):
    hub.mkdir(parents=True)
    (hub / published.name).write_bytes(published.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r'has SHA-256 .*download .* again') as error:
        load_classifier(NET)
    assert not isinstance(error.value, MissingWeights)


def test_named_file_does_not_fall_through(published, hub, tmp_path):
    load_classifier(NET, download=True)
    with pytest.raises(MissingWeights, match=f'at {tmp_path / "absent.pth"}: fetch'):
        load_classifier(NET, str(tmp_path / 'absent.pth'), download=True)


@pytest.mark.parametrize('content', [models.squeezenet1_1().state_dict(), torch.zeros(3), dict(a=1)])
def test_weights_of_another_network(content, tmp_path):
    torch.save(content, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=f"other.pth'(, got| holds no weights of {NET} )") as error:
        load_classifier(NET, str(tmp_path / 'other.pth'))
    assert '\n' not in str(error.value) and len(str(error.value)) < 500


# ---------------------------------------------------------------------------------------------- judgement
def test_accuracy_equals_a_numpy_reference(evaluate_here, toy, candidates, tmp_path):
    out = evaluate_here('classify-eval', candidates, '--classifier=toy', f'--json={tmp_path / "r.json"}',
                        '--bs=7')
    report = json.loads((tmp_path / 'r.json').read_text())
    labels_N, reference = np.load(candidates)['arr_1'], log_probs(noise(200))
    order = np.argsort(-reference.round(6), axis=1, kind='stable')  # of equal ones the first class
    rank_N = (order == labels_N[:, None]).argmax(1)
    prob_N = np.exp(reference[np.arange(200), labels_N])
    assert report['scores'] == pytest.approx(dict(
        top1=(rank_N == 0).mean(), top5=(rank_N < 5).mean(), mean_prob=prob_N.mean(),
        mean_log_prob=np.log(prob_N).mean()), rel=1e-6)
    assert report['top1_per_class'] == {str(c): (rank_N == 0)[labels_N == c].mean() for c in range(10)}
    assert 0 < report['scores']['top1'] < report['scores']['top5'] < 1
    assert report['count'] == 200 and report['rejection'] is None and report['labels'] is None
    assert report['sample']['sha256'] == sha256_of(candidates)
    assert report['classifier'] == dict(name='toy', sha256=toy.digest, num_classes=10)
    assert f'top-1 {report["scores"]["top1"]:.2%}, top-5' in out and 'rejection' not in out


def test_given_labels_replace_the_stored_ones(evaluate_here, toy, candidates, tmp_path):
    labels_N = log_probs(noise(200)).round(6).argmax(1)
    np.save(tmp_path / 'labels.npy', labels_N.astype(np.uint8))
    path = tmp_path / 'r.json'
    evaluate_here('classify-eval', candidates, '--classifier=toy', f'--labels={tmp_path / "labels.npy"}',
                  f'--json={path}')
    report = json.loads(path.read_text())
    assert report['scores']['top1'] == 1 and report['labels']['sha256'] == sha256_of(tmp_path / 'labels.npy')


def test_top5_needs_more_than_five_classes():
    judgement = Judgement(np.log(np.float32([1, 0.25])), np.array([0, 4]))
    assert judgement.scores(6)['top5'] == 1
    assert 'top5' not in judgement.scores(5)
    assert judgement.scores(5) == pytest.approx(dict(top1=0.5, mean_prob=0.625, mean_log_prob=-np.log(2)))


@pytest.mark.parametrize('world_size', [2, 3, 5])
def test_shares_of_ranks_make_up_the_whole(world_size, candidates, monkeypatch, network_file):
    """Bit for bit, as batches are the same; with 17 images in batches of 8, some of 5 ranks have none."""
    np.savez(candidates, arr_0=noise(17))
    batch, labels_N = open_images(candidates), np.arange(17) % 10
    classifier = load_classifier(NET, str(network_file))
    whole = judge(batch, labels_N, classifier, 8)
    monkeypatch.setattr(dist, 'get_world_size', lambda: world_size)
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr(dist, 'get_rank', lambda rank=rank: rank)
        parts.append(judge(batch, labels_N, classifier, 8))
    assert [len(part.rank_N) for part in parts].count(0) == max(0, world_size - 3)
    for values, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(values, np.concatenate(pieces)) and len(np.unique(values)) > 1


# ---------------------------------------------------------------------------------------------- rejection
def best_by_sorting(index, log_prob_N, n_keep):
    return sorted(sorted(index, key=lambda i: (-log_prob_N[i], i))[:n_keep])


def test_select_best_equals_sorting():
    """On coarse values, where the first of equal candidates must win."""
    rng = np.random.RandomState(0)
    log_prob_N = -rng.randint(0, 6, 300).astype(np.float32)
    index = rng.permutation(300)
    candidates = {4: np.sort(index[:100]), 7: np.sort(index[100:140])}
    kept_K, seen = select(candidates, log_prob_N, 30)
    expected = [i for index in candidates.values() for i in best_by_sorting(index, log_prob_N, 30)]
    assert kept_K.tolist() == sorted(expected)
    assert {label: index.tolist() for label, index in seen.items()} == \
        {label: index.tolist() for label, index in candidates.items()}


def test_threshold_takes_the_first_and_counts_no_further():
    log_prob_N = np.float32([-1, -5, -2, -9, -2.5, -1, 0])
    kept_K, seen = select({3: np.array([0, 1, 2, 4, 5, 6])}, log_prob_N, 3, threshold=-2.5)
    assert kept_K.tolist() == [0, 2, 4]  # -2.5 counts, too
    assert seen[3].tolist() == [0, 1, 2, 4]
    with pytest.raises(ValueError, match=r'class 3 has 2 among 4 candidates'):
        select({3: np.array([0, 1, 2, 3])}, log_prob_N, 3, threshold=-2.5)


def reject(evaluate_here, source, target, *flags):
    """(npz, manifest, what was printed)."""
    out = evaluate_here('reject', source, target, '--classifier=toy', *flags)
    with np.load(target) as file:
        return dict(file), json.loads(target.with_suffix('.json').read_text()), out


@pytest.mark.parametrize(('ratio', 'threshold'), [(2, None), (0, None), (3, None), (0, -3.1), (3, -4.3)])
def test_reject_equals_a_numpy_reference(ratio, threshold, evaluate_here, toy, candidates, tmp_path):
    flags = [f'--ratio={ratio}', '--n_keep=5'] + ([f'--threshold={threshold}'] if threshold else [])
    npz, manifest, out = reject(evaluate_here, candidates, tmp_path / 'kept.npz', *flags)
    images, labels_N = noise(200), np.load(candidates)['arr_1']
    log_prob_N = log_probs(images)[np.arange(200), labels_N].round(5)
    kept, seen = [], {}
    for label in range(10):
        index = [i for i in range(200) if labels_N[i] == label][:5 * ratio or None]
        if threshold is None:
            kept += best_by_sorting(index, log_prob_N, 5)
        else:
            kept += [i for i in index if log_prob_N[i] >= threshold][:5]
            index = index[:index.index(kept[-1]) + 1]
        seen[str(label)] = len(index)
    rejection = manifest['rejection']
    assert sorted(rejection['kept']) == sorted(kept)
    assert (npz['arr_0'] == images[rejection['kept']]).all()
    assert (npz['arr_1'] == labels_N[rejection['kept']]).all()
    assert np.bincount(npz['arr_1']).tolist() == [5] * 10
    assert rejection['kept'] == np.sort(kept)[shuffled(50, 0)].tolist()
    assert rejection['candidates_per_class'] == seen
    assert rejection['ratio'] == sum(seen.values()) / 50
    assert rejection['source_sha256'] == sha256_of(candidates) and rejection['threshold'] == threshold
    assert (rejection['classifier'], rejection['classifier_sha256']) == ('toy', toy.digest)
    assert manifest['npz_sha256'] == sha256_of(tmp_path / 'kept.npz') and manifest['num_images'] == 50
    scores = rejection['scores']
    assert scores['kept']['mean_log_prob'] > scores['candidates']['mean_log_prob']
    assert scores['kept']['mean_log_prob'] == pytest.approx(log_prob_N[kept].mean(), abs=1e-4)
    assert f'(ratio {rejection["ratio"]:g})' in out


def test_order_of_what_is_kept(evaluate_here, toy, candidates, tmp_path):
    target = tmp_path / 'kept.npz'

    def kept(*flags):
        return reject(evaluate_here, candidates, target, '--n_keep=4', *flags)[1]['rejection']['kept']
    plain = kept('--no_shuffle')
    assert plain == sorted(plain)
    assert kept() == [plain[i] for i in shuffled(40, 0)]
    assert kept('--seed=5') == [plain[i] for i in shuffled(40, 5)]


def test_repeated_images_are_kept_in_file_order(evaluate_here, toy, tmp_path):
    images = np.repeat(noise(2), 8, axis=0)
    np.savez(tmp_path / 'in.npz', arr_0=images, arr_1=np.zeros(16, int))
    _, manifest, _ = reject(evaluate_here, tmp_path / 'in.npz', tmp_path / 'out.npz', '--n_keep=3',
                            '--ratio=0', '--no_shuffle')
    first = 0 if log_probs(images)[0, 0] > log_probs(images)[8, 0] else 8
    assert manifest['rejection']['kept'] == [first, first + 1, first + 2]


def test_results_are_labelled_and_the_manifest_of_candidates_kept(evaluate_here, toy, candidates, tmp_path):
    source = dict(npz_sha256=sha256_of(candidates), settings=dict(seed=11))
    candidates.with_suffix('.json').write_text(json.dumps(source))
    target = tmp_path / 'kept.npz'
    _, manifest, _ = reject(evaluate_here, candidates, target, '--n_keep=5', '--ratio=3')
    assert manifest['candidates'] == source
    assert read_manifest(target, sha256_of(target), []) == manifest
    out = evaluate_here('classify-eval', target, '--classifier=toy', f'--json={tmp_path / "r.json"}')
    assert 'with rejection (ratio 3)' in out
    report = json.loads((tmp_path / 'r.json').read_text())
    assert report['scores'] == pytest.approx(manifest['rejection']['scores']['kept'])
    assert report['rejection'] == manifest['rejection']


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(evaluate_here, candidates, network_file, tmp_path):
    np.savez(candidates, arr_0=noise(21), arr_1=np.arange(21) % 2)
    files = {}
    for nproc in (1, 2):
        target = tmp_path / f'{nproc}' / 'kept.npz'
        flags = ['reject', candidates, target, f'--classifier={NET}', f'--classifier_weights={network_file}',
                 '--n_keep=5', '--bs=4']
        out = evaluate_here(*flags) if nproc == 1 else launch('evaluate.py', flags, nproc=2).stdout
        assert out.count('ratio 2') == 1
        files[nproc] = [path.read_bytes() for path in (target, target.with_suffix('.json'))]
    assert files[1] == files[2]


def test_digits_rejection_throws_out_wrong_labels(evaluate_here, tmp_path, monkeypatch):
    """Of real held-out digits nearly all are seen as what they are; half of them get another label."""
    network = classifiers.DigitsFeatures()
    monkeypatch.setattr(classifiers, 'DigitsFeatures', lambda _: network)
    digits = open_split('digits', 'val')
    images = np.stack([np.asarray(image) for image, _ in digits])
    true_N = np.array(digits.targets)
    np.savez(tmp_path / 'true.npz', arr_0=images, arr_1=true_N)
    np.savez(tmp_path / 'half.npz', arr_0=images, arr_1=(true_N + 3 * (np.arange(len(images)) % 2)) % 10)
    top1 = {}
    for name in ('true', 'half'):
        path = tmp_path / f'{name}.json.report'
        evaluate_here('classify-eval', tmp_path / f'{name}.npz', '--classifier=digits', f'--json={path}')
        top1[name] = json.loads(path.read_text())['scores']['top1']
    assert top1['true'] >= 0.97 and 0.45 < top1['half'] < 0.55

    out = evaluate_here('reject', tmp_path / 'half.npz', tmp_path / 'kept.npz', '--classifier=digits',
                        '--n_keep=10', '--ratio=0')
    kept = json.loads((tmp_path / 'kept.json').read_text())['rejection']['kept']
    labels_K = np.load(tmp_path / 'kept.npz')['arr_1']
    assert np.bincount(labels_K).tolist() == [10] * 10
    assert (true_N[kept] == labels_K).mean() >= 0.99
    assert 'will flatter' in out


# ---------------------------------------------------------------------------------------------- bad input
def test_missing_weights_have_their_exit_code(fails, candidates, hub):
    message = fails('classify-eval', candidates, '--classifier=resnet18', code=3)
    assert f'no weights of resnet18 at {hub / "resnet18-f37072fd.pth"}: fetch https://download' in message
    assert '(45 MB, SHA-256 f37072fd...)' in message and '--classifier_weights=FILE' in message


@pytest.mark.parametrize(('flags', 'message'), [
    (['--classifier='], 'expected a classifier: pass --classifier=NAME'),
    (['--classifier=resnet51'], "got 'resnet51': the nearest is resnet50"),
    (['--classifier=digits', '--classifier_weights=x.pth'], 'leave out --classifier_weights'),
    (['--device=tpu'], "--device must be cpu or cuda, got 'tpu'"),
    (['--bs=0'], '--bs must be at least 1, got 0'),
    (['--labels=absent.npy'], 'expected the class of every image in absent.npy, cannot read it'),
])
def test_bad_flags_of_both(flags, message, fails, candidates, tmp_path):
    for command in (['classify-eval', candidates], ['reject', candidates, tmp_path / 'o.npz', '--n_keep=9']):
        assert message in fails(*command, '--classifier=resnet18', *flags)


@pytest.mark.parametrize(('flags', 'message'), [
    (['--n_keep=0'], '--n_keep must be at least 1, got 0'),
    (['--ratio=-1'], '--ratio must be at least 0, got -1'),
    (['--threshold=0.5'], '--threshold is a log-probability, at most 0, got 0.5'),
    (['--threshold=nan'], '--threshold is a log-probability, at most 0, got nan'),
    (['--seed=4294967296'], '--seed must be below 2**32'),
    (['--classifier=inception_v3'], 'must not be the network of the scores'),
    (['--n_keep=11'], 'expected at least 22 candidates of each class, class 0 has 20'),
    (['--n_keep=21', '--ratio=0'], 'expected at least 21 candidates of each class, class 0 has 20'),
    (['--n_keep=5', '--threshold=-0.01'], 'class 0 has 0 among 10 candidates: sample more'),
])
def test_bad_flags_of_reject(flags, message, fails, toy, candidates, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert message in fails('reject', candidates, tmp_path / 'out.npz', '--classifier=toy', *flags)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize('target', ['candidates.npz', 'out.zip', 'candidates', ''])
def test_output_must_be_another_npz(target, fails, toy, candidates, tmp_path):
    before = candidates.read_bytes()
    message = fails('reject', candidates, tmp_path / target, '--classifier=toy', '--n_keep=5')
    assert 'expected an npz of another name' in message and candidates.read_bytes() == before


def test_output_must_not_replace_the_manifest_of_a_folder(fails, toy, candidates, tmp_path):
    (tmp_path / 'drawn').mkdir()
    message = fails('reject', tmp_path / 'drawn', tmp_path / 'drawn.npz', '--classifier=toy')
    assert 'expected an npz of another name' in message


def test_files_must_be_named(fails, candidates):
    assert 'expected SAMPLE: evaluate.py classify-eval' in fails('classify-eval', '--classifier=toy')
    assert 'expected IN and OUT: evaluate.py reject' in fails('reject', candidates, '--classifier=toy')


@pytest.mark.parametrize(('labels', 'message'), [
    (np.arange(199), 'expected 200 integers in'), (np.zeros(200), 'got float64 of shape (200,)'),
    (np.full(200, 10), 'toy knows classes 0..9, image 0 has label 10: pass a classifier'),
    (np.where(np.arange(200) == 7, -1, 0), 'image 7 has label -1'),
    (np.array([None] * 200), 'cannot read it'),
])
def test_bad_labels(labels, message, fails, toy, candidates, tmp_path):
    np.save(tmp_path / 'labels.npy', labels)
    flags = ['--classifier=toy', f'--labels={tmp_path / "labels.npy"}']
    assert message in fails('classify-eval', candidates, *flags)
    assert message in fails('reject', candidates, tmp_path / 'o.npz', '--n_keep=1', '--ratio=0', *flags)


@pytest.mark.parametrize('labels', [{}, dict(arr_1=np.arange(199))])
def test_labels_are_needed(labels, fails, toy, candidates, tmp_path):
    np.savez(candidates, arr_0=noise(200), **labels)
    for command in (['classify-eval', candidates], ['reject', candidates, tmp_path / 'out.npz']):
        assert 'found none: pass --labels=FILE' in fails(*command, '--classifier=toy')


def test_compressed_candidates_are_news_before_all_the_work(fails, toy, candidates, tmp_path, monkeypatch):
    np.savez_compressed(candidates, arr_0=noise(200), arr_1=np.arange(200) % 10)
    monkeypatch.setattr(classify, 'load_classifier', lambda *_: pytest.fail('too late'))
    message = fails('reject', candidates, tmp_path / 'out.npz', '--classifier=toy', '--n_keep=5')
    assert 'store them by np.savez' in message


def test_manifest_of_other_images(fails, toy, candidates, tmp_path):
    candidates.with_suffix('.json').write_text(json.dumps(dict(npz_sha256='0' * 64)))
    for command in (['classify-eval', candidates], ['reject', candidates, tmp_path / 'o.npz', '--n_keep=5']):
        assert 'its manifest' in fails(*command, '--classifier=toy')


def test_probabilities_that_are_not_finite(fails, toy, candidates, tmp_path, monkeypatch):
    images = noise(200).clip(50)
    images[70] = 0
    np.savez(candidates, arr_0=images, arr_1=np.arange(200) % 10)
    broken = dataclasses.replace(toy, logits=lambda images_u8: row_classifier(images_u8).log() * 0)
    monkeypatch.setattr(classify, 'load_classifier', lambda *_: broken)
    message = fails('reject', candidates, tmp_path / 'out.npz', '--classifier=toy', '--n_keep=5')
    assert f'toy gives nan for image 70 of {candidates}: check the weights' in message
    assert not (tmp_path / 'out.npz').exists()
