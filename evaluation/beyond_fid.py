"""Scores beyond those of ADM: FDr^6, FD-DINOv2, KID, CMMD, density and coverage, MIND, and diagnostics.

`evaluate.py REF SAMPLE --metrics=adm,fdr6,kid` asks for them by the names in `METRICS`. Three sets may stand
beside the sample: the training images, of which Frechet distances need statistics alone; real images, which
are compared one by one (those of REF, or --real); and a bank of training images. Every name says encoder and
number of images, and whatever differs from the published setting. Letters: N images, F features.
"""
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import dist
from evaluation.copies import find_copies
from evaluation.encoders import ENCODERS, EncoderFeatures
from evaluation.fdr import DIVISORS, FDR_ENCODERS, fdr6, ratios
from evaluation.feature_store import FeatureStore, SetFeatures
from evaluation.features import load_network, torch_device
from evaluation.kernels import KID_SEED, KID_SUBSET_SIZE, KID_SUBSETS, cmmd, cmmd_error, kid, kid_of_subsets
from evaluation.metrics import (
    FeatureStatistics,
    distance_at_infinity,
    frechet_distance,
    infinite_sample_counts,
    read_statistics,
    vendi_score,
)
from evaluation.pictures import save_contact_sheet
from evaluation.precision_recall import density_coverage
from evaluation.settings import BEYOND, STANDARD_COUNT, ScoreSettings
from evaluation.sliced import MIND_DIRECTIONS, MIND_SEED, mind
from evaluation.trained_on import mark_of
from utils.hub import sha256_of
from utils.image_sets import ImageSet, npz_keys, open_images, read_npz_arrays, shuffled

logger = logging.getLogger(__name__)
PUBLISHED_SIDE = 256   # pixels of the images that published statistics and numbers are of
ROWS_SEED = 2020       # of the images that are chosen for prdc and fd_inf
SET_NAMES = ('sample', 'real', 'bank')
Scores = dict[str, Any]


# ---------------------------------------------------------------------------------------------- references
class Training(NamedTuple):
    """Statistics of training images by one encoder, and where they come from."""
    statistics: tuple[torch.Tensor, torch.Tensor]  # mean and covariance
    is_published: bool                             # whether published distances are to the same
    side: int                                      # pixels of the images; 0 if that is not known
    described: dict[str, Any]                      # for the report


class StatisticsFile(NamedTuple):
    """A file of statistics, and what it says about itself."""
    path: Path
    statistics: tuple[torch.Tensor, torch.Tensor]  # mean and covariance
    is_ours: bool                                  # made by `evaluate.py stats --encoder`
    side: int                                      # pixels of the images


def find_statistics(folder: str, key: str, network: Any) -> StatisticsFile | None:
    """The file with statistics of an encoder in a folder; None if there is none.

    Args:
        key: of `ENCODERS`.
        network: the encoder, with which the file must agree.
    Raises:
        ValueError: the file is damaged, a pickle, or of another encoder, precision or weights.
    """
    path = Path(folder) / ENCODERS[key].statistics
    if not folder or not path.is_file():
        pickles = sorted(Path(folder).glob('*.pkl')) if folder else []
        if pickles:
            raise ValueError(f'expected {path.name} in {folder}, found {pickles[0].name}, which can run code '
                             'and is never read: fetch the npz files of the hub data set '
                             'nanovisionx/nanogen-evals-stats')
        return None
    if 'encoder' not in npz_keys(path):
        return StatisticsFile(path, read_statistics(path, network.num_features), False, PUBLISHED_SIDE)
    texts = ('encoder', 'dtype', 'weights_sha256')
    described = dict(zip(texts, read_texts(path, texts), strict=True))
    expected = dict(encoder=key, dtype=dtype_of(network), weights_sha256=network.digest)
    for name, value in expected.items():
        if described[name] != value:
            raise ValueError(f'expected statistics with the {name} {value} in {path}, got '
                             f'{described[name]}: compute them again (evaluate.py stats IMAGES OUT.npz '
                             f'--encoder={key})')
    side, = read_npz_arrays(path, {'image_size': ()})
    return StatisticsFile(path, read_statistics(path, network.num_features), True, int(side))


def read_texts(path: Path, names: Iterable[str]) -> list[str]:
    """Texts in an npz file by name."""
    return [str(array) for array in read_npz_arrays(path, {name: () for name in names}, kinds='U')]


def dtype_of(network: Any) -> str:
    """The precision of a network: that of the digits has no choice."""
    return getattr(network, 'dtype', 'float32')


# ---------------------------------------------------------------------------------------------- comparison
@dataclass
class Comparison:
    """Everything that scores are computed from; on the master alone.

    Attributes:
        settings: of the command.
        encoders: the networks by name.
        features: of a set of images by encoder: `features['sample']['dinov2']`; also of 'real' and 'bank'.
        training: statistics of the training images by encoder.
        side: pixels of the sample.
        unavailable: gets scores that cannot be computed, and why.
    """

    settings: ScoreSettings
    encoders: dict[str, Any]
    features: dict[str, dict[str, SetFeatures]]
    training: dict[str, Training]
    side: int
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of images of the sample."""
        return next(iter(self.features['sample'].values())).count

    @property
    def device(self) -> torch.device:
        """Where distances are computed."""
        return torch_device(self.settings)

    def rows(self, of: str, encoder: str) -> torch.Tensor:
        """Features of single images of a set, (N, F)."""
        return self.features[of][encoder].rows_NF

    def name(self, base: str, *encoders: str, count: int | None = None) -> str:
        """The name of a score: what it is, and what differs from the published setting.

        Args:
            base: the published name.
            encoders: that it is made of.
            count: number of images, where `base` already says that; None adds the number of the sample.
        """
        if count is None and self.count != STANDARD_COUNT:
            base += f'_{thousands(self.count)}'
        for suffix in dict.fromkeys(self._precision(encoder) for encoder in encoders):
            base += suffix
        return base

    def _precision(self, encoder: str) -> str:
        """A suffix for another precision than the published one."""
        dtype = dtype_of(self.encoders[encoder])
        if dtype == ENCODERS[encoder].dtype:
            return ''
        return {'float64': '_fp64', 'float32': '_fp32', 'bfloat16': '_bf16'}[dtype]

    def distance_name(self, base: str, *encoders: str) -> str:
        """The name of a score that compares with training images; see `name`."""
        base = self.name(base, *encoders)
        if not all(self.training[encoder].is_published for encoder in encoders):
            return f'{base}_own'
        sides = {self.training[encoder].side for encoder in encoders} - {0}
        if sides and self.side != PUBLISHED_SIDE:
            base += ''.join(f'_ref{side}' for side in sorted(sides))
        return base

    def distance(self, encoder: str, of: str = 'sample') -> float:
        """Frechet distance between a set and the training images."""
        training = self.training[encoder].statistics
        statistics = self.features[of][encoder].statistics['']
        return frechet_distance(*training, *statistics, method=self.settings.fd_method)


def with_error(name: str, value: float, error: float) -> Scores:
    """A score and its standard error, unless there were too few images for one."""
    return {name: value} if math.isnan(error) else {name: value, f'{name}_error': error}


def thousands(count: int) -> str:
    """A number of images as names have it: 5k, 0.3k."""
    return f'{count / 1000:g}k'


# ---------------------------------------------------------------------------------------------- scores
def score_fdr6(given: Comparison) -> Scores:
    """Six distances, and their ratios by the divisors of the paper, of its code, and of the images here.

    The ratios of the paper need its training statistics. Own divisors need statistics of training images from
    files, and validation images as --real.
    """
    distances = {encoder: given.distance(encoder) for encoder in FDR_ENCODERS}
    scores = {}
    for encoder, distance in distances.items():
        scores[given.distance_name(f'fd_{encoder}', encoder)] = distance
    if all(given.training[encoder].is_published for encoder in FDR_ENCODERS):
        for encoder, ratio in ratios(distances, DIVISORS['paper']).items():
            scores[given.distance_name(f'fdr_{encoder}_paper', encoder)] = ratio
        for kind, divisors in DIVISORS.items():
            scores[given.distance_name(f'fdr6_{kind}', *FDR_ENCODERS)] = fdr6(distances, divisors)
    else:
        given.unavailable['fdr6_paper'] = ('some statistics of training images are not the published ones, '
                                           'to which its divisors belong')
    kinds = {given.training[encoder].described['kind'] for encoder in FDR_ENCODERS}
    if given.settings.real and 'real' not in kinds:
        divisors = {encoder: given.distance(encoder, 'real') for encoder in FDR_ENCODERS}
        for encoder, ratio in ratios(distances, divisors).items():
            scores[given.name(f'fdr_{encoder}_own', encoder)] = ratio
        scores[given.name('fdr6_own', *FDR_ENCODERS)] = fdr6(distances, divisors)
    else:
        given.unavailable['fdr6_own'] = ('it needs training statistics in --statistics, and validation '
                                         'images as --real')
    return scores


def score_fd_dinov2(given: Comparison) -> Scores:
    """The distance of FD-DINOv2 as EDM2 computes it."""
    return {given.distance_name('fd_dinov2_edm2', 'dinov2_edm2'): given.distance('dinov2_edm2')}


def score_fd_dinov2_dgm(given: Comparison) -> Scores:
    """The distance of FD-DINOv2 as dgm-eval computes it."""
    return {given.distance_name('fd_dinov2_dgm', 'dinov2_dgm'): given.distance('dinov2_dgm')}


def score_kid(given: Comparison) -> Scores:
    """KID of all images with its error, and over the published subsets where there are enough images."""
    encoder = given.settings.features
    sample_NF = given.rows('sample', encoder)
    real_MF = given.rows('real', encoder)
    estimate = kid(sample_NF, real_MF, given.device)
    scores = with_error(given.name(f'kid_{encoder}_all', encoder), estimate.value, estimate.error)
    base = f'kid_{encoder}_s{KID_SUBSETS}x{KID_SUBSET_SIZE}'
    if min(len(sample_NF), len(real_MF)) < KID_SUBSET_SIZE:
        given.unavailable[base] = f'a set has fewer than {KID_SUBSET_SIZE:,} images: take kid_{encoder}_all'
        return scores
    subsets = kid_of_subsets(sample_NF, real_MF, device=given.device)
    name = given.name(base, encoder)
    scores[name] = subsets.mean
    scores[f'{name}_std'] = subsets.std
    return scores


def score_cmmd(given: Comparison) -> Scores:
    """CMMD in the published form, and without bias with its error."""
    sample_NF = given.rows('sample', 'clip336')
    real_MF = given.rows('real', 'clip336')
    found = cmmd(sample_NF, real_MF, given.device)
    error = cmmd_error(sample_NF, real_MF, given.device)
    scores = {given.name('cmmd_clip336', 'clip336'): found.biased}
    return scores | with_error(given.name('cmmd_clip336_unbiased', 'clip336'), found.unbiased, error)


def score_prdc(given: Comparison) -> Scores:
    """Density, coverage, precision and recall of as many images of each side, chosen by a seed."""
    settings = given.settings
    encoder = row_encoder(settings)
    sample_NF = given.rows('sample', encoder)
    real_MF = given.rows('real', encoder)
    count = min(settings.prdc_count, len(sample_NF), len(real_MF))
    chosen = []
    for rows in (real_MF, sample_NF):
        index = shuffled(len(rows), ROWS_SEED)[:count]
        chosen.append(rows[torch.from_numpy(index)])
    prdc = density_coverage(*chosen, k=settings.prdc_k, device=given.device)
    name = given.name(f'prdc{settings.prdc_k}_{encoder}_{thousands(count)}', encoder, count=count)
    return {name: prdc._asdict()}


def score_mind(given: Comparison) -> Scores:
    """MIND of as many images of each side."""
    encoder = given.settings.features
    found = mind(given.rows('sample', encoder), given.rows('real', encoder), given.settings.mind_count)
    base = f'mind_{encoder}_m{MIND_DIRECTIONS}_{thousands(found.count)}'
    name = given.name(base, encoder, count=found.count)
    return with_error(name, found.value, found.error)


def score_vendi(given: Comparison) -> Scores:
    """The number of different images that the sample seems to have."""
    encoder = row_encoder(given.settings)
    return {given.name(f'vendi_{encoder}', encoder): vendi_score(given.rows('sample', encoder))}


def score_fd_inf(given: Comparison) -> Scores:
    """The distance that infinitely many images would have."""
    encoder = row_encoder(given.settings)
    rows_NF = given.rows('sample', encoder)
    counts = infinite_sample_counts(len(rows_NF))
    rng = np.random.RandomState(ROWS_SEED)
    distances = []
    for count in counts:
        index = torch.from_numpy(rng.choice(len(rows_NF), count, replace=False))
        statistics = FeatureStatistics(rows_NF.shape[1], given.device)
        for part in index.split(2000):
            statistics.add(rows_NF[part])
        distance = frechet_distance(
            *given.training[encoder].statistics,
            statistics.mean,
            statistics.covariance(),
            method=given.settings.fd_method,
        )
        distances.append(distance)
    line = distance_at_infinity(counts, distances)
    return {given.distance_name(f'fd_inf15_{encoder}', encoder): line.at_infinity}


def score_memory(given: Comparison) -> Scores:
    """Distances to the nearest training images, of samples and of images that nobody trained on."""
    encoder = row_encoder(given.settings)
    sets = [given.rows(of, encoder) for of in SET_NAMES]
    copies = find_copies(*sets, device=given.device)
    return {given.name(f'nn_{encoder}', encoder): copies._asdict()}


# ---------------------------------------------------------------------------------------------- the table
class Metric(NamedTuple):
    """A group of scores that --metrics names; its words stand in `evaluation.settings.BEYOND`."""
    encoders: Callable[[ScoreSettings], tuple[str, ...]]
    score: Callable[[Comparison], Scores]
    training: bool = False  # it compares with statistics of training images
    rows: bool = False      # it needs features of single images of the sample, and of the sets that follow
    real: bool = False      # it compares with real images, one by one
    bank: bool = False      # it compares with a bank of training images


def row_encoder(settings: ScoreSettings) -> str:
    """The encoder of the scores that users may choose one for."""
    return settings.prdc_encoder or settings.features


def always(*encoders: str) -> Callable[[ScoreSettings], tuple[str, ...]]:
    """These encoders, whatever the settings are."""
    return lambda settings: encoders


def _features(settings: ScoreSettings) -> tuple[str, ...]:
    return (settings.features,)


def _row_encoder(settings: ScoreSettings) -> tuple[str, ...]:
    return (row_encoder(settings),)


METRICS = {
    'fdr6': Metric(always(*FDR_ENCODERS), score_fdr6, training=True),
    'fd_dinov2': Metric(always('dinov2_edm2'), score_fd_dinov2, training=True),
    'fd_dinov2_dgm': Metric(always('dinov2_dgm'), score_fd_dinov2_dgm, training=True),
    'kid': Metric(_features, score_kid, rows=True, real=True),
    'cmmd': Metric(always('clip336'), score_cmmd, rows=True, real=True),
    'prdc': Metric(_row_encoder, score_prdc, rows=True, real=True),
    'mind': Metric(_features, score_mind, rows=True, real=True),
    'vendi': Metric(_row_encoder, score_vendi, rows=True),
    'fd_inf': Metric(_row_encoder, score_fd_inf, training=True, rows=True),
    'memory': Metric(_row_encoder, score_memory, rows=True, real=True, bank=True),
}


def encoders_of(settings: ScoreSettings) -> list[str]:
    """Names of the encoders that the scores of `settings.beyond` need, each once."""
    names = [encoder for name in settings.beyond for encoder in METRICS[name].encoders(settings)]
    return list(dict.fromkeys(names))


SEEDS = {  # settings of a metric that its report names
    'kid': dict(seed=KID_SEED, subsets=KID_SUBSETS, subset_size=KID_SUBSET_SIZE),
    'prdc': dict(seed=ROWS_SEED),
    'mind': dict(seed=MIND_SEED, directions=MIND_DIRECTIONS),
    'fd_inf': dict(seed=ROWS_SEED),
}


# ---------------------------------------------------------------------------------------------- a run
class GivenSet(NamedTuple):
    """A set of images and its SHA-256."""
    images: ImageSet
    digest: str

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return dict(kind='images', path=str(self.images.path), sha256=self.digest, count=self.images.count)


def open_given(path: str) -> GivenSet:
    """Open a set of images; the master alone reads it for its hash. Every rank calls it."""
    images = open_images(path)
    return GivenSet(images, dist.from_master(images.sha256))


class BeyondFid:
    """The scores of `settings.beyond`: make it before any image is read, then `extract`, then `report`.

    Args:
        settings: of the command.
        ref_images: images of REF; None if it holds statistics alone.
        sample_images: of SAMPLE.
        network: the one of --features; None if no score needs it.
        digests: SHA-256 of both, by 'reference' and 'sample'.
        ref_is_stored: whether REF stores statistics.
    Raises:
        MissingWeights: an encoder has no weights.
        ValueError: a metric lacks what it compares with, or a set has too few images or another shape.
    """

    def __init__(self, settings: ScoreSettings, ref_images: ImageSet | None, sample_images: ImageSet | None,
                 network: Any, digests: dict[str, str], ref_is_stored: bool):
        self.settings = settings
        self.network_name = network.name if network is not None else ''
        self.ref_is_stored = ref_is_stored
        self.metrics = {name: METRICS[name] for name in settings.beyond}
        self.notes: list[str] = []
        if sample_images is None:
            raise ValueError(f'{settings.sample} holds statistics alone, but --metrics asks for '
                             f'{", ".join(self.metrics)}, which need images: pass the images')
        self.sets = {'sample': GivenSet(sample_images, digests['sample'])}
        if settings.real:
            self.sets['real'] = open_given(settings.real)
            if any(metric.real for metric in self.metrics.values()):
                self.notes.append(f'single images are compared with those of {settings.real}, not of REF')
        elif ref_images is not None:
            self.sets['real'] = GivenSet(ref_images, digests['reference'])
        if settings.bank:
            self.sets['bank'] = open_given(settings.bank)

        self._check_sets()
        self.encoders = {}
        for encoder in encoders_of(settings):
            is_given = encoder == self.network_name
            self.encoders[encoder] = network if is_given else load_network(settings, encoder)
        self.files = self._find_training()

    def _check_sets(self) -> None:
        """Make sure that there is what is compared with, and that it can be compared.

        Raises:
            ValueError: it is not.
        """
        sample, digest = self.sets['sample']
        for name, metric in self.metrics.items():
            if metric.real and 'real' not in self.sets:
                raise ValueError(f'{name} compares single images, but {self.settings.ref} holds statistics '
                                 'alone: pass --real=IMAGES')
            least = self.settings.prdc_k + 1 if name == 'prdc' else 2
            for of in ('sample', *self._references(metric)):
                images, _ = self.sets[of]
                if images.count < least:
                    raise ValueError(f'{name} needs at least {least} images, {images.path} holds '
                                     f'{images.count}: add some, or leave it out of --metrics')
            for encoder in metric.encoders(self.settings):
                is_square = sample.height == sample.width
                known = ENCODERS[encoder]
                if known.identifier and not known.takes_any_shape and not is_square:
                    raise ValueError(f'{encoder} is defined for square images, {sample.path} has '
                                     f'{sample.width}x{sample.height}: crop them, or leave {name} out of '
                                     '--metrics')
        owner_of = {digest: sample.path}
        for of, (images, other) in self.sets.items():
            if of == 'sample':
                continue
            if other in owner_of:
                raise ValueError(f'{owner_of[other]} and {images.path} are the same images: comparing a set '
                                 'with itself says nothing, pass others')
            owner_of[other] = images.path

    def _find_training(self) -> dict[str, StatisticsFile | None]:
        """Files with statistics of training images by encoder; None where REF or the real images give them.

        Raises:
            ValueError: an encoder has none.
        """
        files = {}
        for name, metric in self.metrics.items():
            if not metric.training:
                continue
            for encoder in metric.encoders(self.settings):
                if encoder == self.network_name:
                    continue
                files[encoder] = find_statistics(self.settings.statistics, encoder, self.encoders[encoder])
                if files[encoder] is None and not self.settings.real:
                    raise ValueError(
                        f'{name} needs statistics of training images by {encoder}: pass --statistics=FOLDER '
                        f'with {ENCODERS[encoder].statistics} (hub data set nanovisionx/nanogen-evals-stats, '
                        f'or evaluate.py stats IMAGES OUT.npz --encoder={encoder}), or --real=IMAGES to '
                        'compare with these')
        return files

    @property
    def needs_ref_statistics(self) -> bool:
        """Whether the statistics of REF are compared with."""
        return self.network_name in self.encoders and self._is_compared_with_training(self.network_name)

    @property
    def with_rows(self) -> set[str]:
        """Encoders whose features of single images are needed."""
        found = set()
        for metric in self.metrics.values():
            if metric.rows:
                found.update(metric.encoders(self.settings))
        return found

    def _needed(self, encoder: str) -> list[str]:
        """Names of the sets that an encoder must look at."""
        needed = {'sample'}
        for metric in self.metrics.values():
            if encoder in metric.encoders(self.settings):
                needed.update(self._references(metric))
        return [of for of in SET_NAMES if of in needed]

    def extract(self, store: FeatureStore, ref_statistics: dict[str, tuple]) -> Comparison | None:
        """Features of all sets by all encoders; every rank calls it, and the master gets them.

        Args:
            ref_statistics: of REF by the network of --features, by suffix.
        Raises:
            ValueError: an image cannot be read, features are not finite, or statistics do not fit.
        """
        features: dict[str, dict[str, SetFeatures]] = {}
        training = {}
        for encoder, network in self.encoders.items():
            for of in self._needed(encoder):
                images, digest = self.sets[of]
                found = store.get(images, digest, network, of)
                if found is None:
                    continue
                features.setdefault(of, {})[encoder] = found
                self.notes += found.warnings
                num_features = len(found.statistics[''][0])
                if found.count <= num_features and self._is_compared_with_training(encoder):
                    self.notes.append(f'{of}: rank-deficient covariance of {found.count:,} images and '
                                      f'{num_features:,} features of {encoder}, whose distance is biased')
            if isinstance(network, EncoderFeatures):
                network.free()  # of a few GB at most one is in memory
            if features and self._is_compared_with_training(encoder):
                training[encoder] = self._training(encoder, features, ref_statistics)
        if not features:
            return None
        return Comparison(self.settings, self.encoders, features, training, self.sets['sample'].images.width)

    def _is_compared_with_training(self, encoder: str) -> bool:
        metrics = self.metrics.values()
        return any(metric.training and encoder in metric.encoders(self.settings) for metric in metrics)

    def _training(self, encoder: str, features: dict[str, dict[str, SetFeatures]],
                  ref_statistics: dict[str, tuple]) -> Training:
        """Statistics of the training images by an encoder, from REF, a file, or the real images."""
        if encoder == self.network_name:
            described = dict(kind='reference', path=self.settings.ref)
            return Training(ref_statistics[''], self.ref_is_stored, 0, described)
        file = self.files[encoder]
        if file is None:
            given = self.sets['real']
            self.notes.append(f'{encoder}: compared with the statistics of {given.images.path}, not of '
                              'training images')
            described = given.describe() | dict(kind='real')
            statistics = features['real'][encoder].statistics['']
            return Training(statistics, False, given.images.width, described)
        dtype = dtype_of(self.encoders[encoder])
        if not file.is_ours and dtype != ENCODERS[encoder].dtype:
            self.notes.append(f'{encoder}: features of {dtype} against published statistics of '
                              f'{ENCODERS[encoder].dtype}')
        described = dict(
            kind='statistics',
            path=str(file.path),
            sha256=sha256_of(file.path),
            made_here=file.is_ours,
        )
        return Training(file.statistics, not file.is_ours, file.side, described)

    def report(self, given: Comparison) -> dict[str, Any]:
        """Scores by name, and what they were made of; on the master."""
        scores = {}
        described = {}
        for name, metric in self.metrics.items():
            logger.info('computing %s', name)
            found = metric.score(given)
            scores |= found
            if name == 'memory' and self.settings.pairs:
                copies, = found.values()
                self._draw_pairs(copies['pairs'])
            encoders = metric.encoders(self.settings)
            described[name] = dict(
                words=BEYOND.get(name, name),
                scores=list(found),
                encoders=list(encoders),
                references={of: self.sets[of].describe() for of in self._references(metric)},
                **SEEDS.get(name, {}),
            )
            if name == 'prdc':
                described[name]['k'] = self.settings.prdc_k
        return dict(
            scores=scores,
            unavailable=given.unavailable,
            metrics=described,
            encoders={name: self._describe(name, given) for name in self.encoders},
        )

    def _draw_pairs(self, pairs: list[tuple[int, int, float]]) -> None:
        """Write the nearest samples, and below them the training images that they are nearest to."""
        sample = self.sets['sample'].images
        bank = self.sets['bank'].images
        rows: list[list[np.ndarray]] = [[], []]
        try:
            for i, j, _ in pairs:
                trained_on = Image.fromarray(bank[j]).resize((sample.width, sample.height))
                rows[0].append(sample[i])
                rows[1].append(np.asarray(trained_on))
        except ValueError as error:  # of a compressed npz; the scores are there all the same
            self.notes.append(f'no picture of pairs: {error}')
            return
        save_contact_sheet(self.settings.pairs, rows)

    def _references(self, metric: Metric) -> list[str]:
        """Names of the sets of images that a metric compares with."""
        found = []
        # Real images may stand for training images, and FDr^6 has own divisors by them.
        if metric.real or (metric.training and self.settings.real):
            found.append('real')
        if metric.bank:
            found.append('bank')
        return found

    def _describe(self, name: str, given: Comparison) -> dict[str, Any]:
        """An encoder for the report; an unknown file of weights is also a warning."""
        encoder = ENCODERS[name]
        network = self.encoders[name]
        described = dict(
            identifier=encoder.identifier,
            licence=encoder.licence,
            sha256=network.digest,
            dtype=dtype_of(network),
            published_dtype=encoder.dtype,
            px=encoder.side,
        )
        if isinstance(network, EncoderFeatures):
            described |= dict(file=str(network.path), pinned=network.is_pinned, variant=network.variant)
            if not network.is_pinned:
                self.notes.append(f'{name}: weights with SHA-256 {network.digest}; that of the published '
                                  'ones is not known here')
        if name in given.training:
            described['training'] = given.training[name].described
        return described


# ---------------------------------------------------------------------------------------------- text
def lines_of(report: dict[str, Any]) -> list[str]:
    """The scores for a reader: a line each, and a table of the six encoders of FDr^6."""
    beyond = report['beyond']
    lines = []
    for name, metric in beyond['metrics'].items():
        for score in metric['scores']:
            value = beyond['scores'][score]
            mark = mark_of(report, score)
            if isinstance(value, dict):
                numbers = {key: number for key, number in value.items() if isinstance(number, float)}
                parts = [f'{key} {number:.6g}' for key, number in numbers.items()]
                lines.append(f'{score}: {", ".join(parts)}{mark}')
            elif name != 'fdr6' or score.startswith('fdr6'):
                lines.append(f'{score}: {value:.6g}{mark}')
        if name == 'fdr6':
            lines += _table_of_ratios(metric['scores'], report)
    lines += [f'{name}: not available, {reason}' for name, reason in beyond['unavailable'].items()]
    return lines


def _table_of_ratios(names: list[str], report: dict[str, Any]) -> list[str]:
    """A row per encoder: its distance, and its ratios."""
    rows = []
    for encoder in FDR_ENCODERS:
        of_encoder = [name for name in names if name.startswith((f'fd_{encoder}', f'fdr_{encoder}'))]
        cells = [f'{name} {report["beyond"]["scores"][name]:.6g}' for name in of_encoder]
        rows.append(f'    {encoder:9} {"   ".join(cells)}{mark_of(report, *of_encoder)}')
    return rows
