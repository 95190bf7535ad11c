"""Scores of a set of images against a reference, as the evaluator of ADM (guided-diffusion) defines them.

`python evaluate.py REFERENCE SAMPLE` prints Inception Score, FID, sFID, precision and recall. Each
side is an npz file (images as `arr_0`, uint8 (N, H, W, 3); stored statistics as `mu`, `sigma`, `mu_s`,
`sigma_s`) or a folder of PNG files. Read it from `score_images`. Further scores, which --metrics names, are
in `evaluation.beyond_fid`.
"""
import dataclasses
import hashlib
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch

import dist
from evaluation.beyond_fid import BeyondFid, encoders_of, lines_of
from evaluation.feature_store import FeatureStore, SetFeatures
from evaluation.features import (
    extract,
    load_network,
    read_cache,
    torch_device,
    write_cache,
)
from evaluation.inception import SHA256
from evaluation.metrics import frechet_distance, read_statistics
from evaluation.precision_recall import precision_recall
from evaluation.settings import SCORES, STANDARD_COUNT, ScoreSettings, manifest_of
from evaluation.trained_on import mark_of, marked_scores, targets_of
from utils.files import write_text
from utils.hub import sha256_of
from utils.image_sets import ImageSet, npz_keys, open_images
from utils.provenance import device_name, versions

logger = logging.getLogger(__name__)
STATISTICS = {'': ('mu', 'sigma'), '_s': ('mu_s', 'sigma_s')}  # suffix -> mean and covariance in a file
CACHE_VERSION = 2  # raise it when extraction changes, so that features in the cache are computed again


# ---------------------------------------------------------------------------------------------- the command
def evaluate_images(settings: ScoreSettings) -> str | None:
    """`evaluate.py REF SAMPLE`: the text for the reader on the master, None on the other ranks.

    Raises:
        ValueError: see `score_images`; or the scores cannot be written to a file, and are in the log.
    """
    if settings.json:
        check_output(settings.json)
    report = score_images(settings)
    text = text_report(report) if report else None
    if settings.json and report:
        try:
            write_json(settings.json, report)
        except OSError as error:
            # Hours of work must not be lost because a disk is full.
            logger.warning('no file holds these scores:\n%s', text)
            raise ValueError(f'could not write {settings.json} ({error.strerror or error}), the scores are '
                             'above: free some space, or write elsewhere') from None
    dist.barrier()
    return text


def score_images(settings: ScoreSettings, network: Any = None) -> dict[str, Any] | None:
    """Everything that `evaluate.py REF SAMPLE` reports, on the master; None on the other ranks.

    Args:
        network: a feature network that is already loaded; None loads that of the settings if a score needs
            it.
    Raises:
        MissingWeights: the feature network has no weights.
        ValueError: a file cannot be read, has another number of images than expected, or lacks what a metric
            needs that was asked for by name.
    """
    begin = time.time()

    # 1. The files come before the network, so that a wrong path is found at once. Stored statistics and the
    # manifest come before the features, which take long: they may turn out to belong to another network or to
    # other images.
    ref = open_set(settings.ref, needs_images=False)
    sample = open_set(settings.sample, needs_images=False)
    plan = make_plan(settings, ref, sample, network)
    network = plan.network
    notes = plan.notes
    described = {}
    if dist.is_master():
        described = dict(reference=ref.describe(), sample=sample.describe())
    described = dist.allgather_object(described)[0]
    digests = {side: described[side]['sha256'] for side in described}
    manifest = read_manifest(sample.path, digests['sample'], notes)
    targets = targets_of(manifest)

    # Further scores may need features of both sides, too, by this network and others. All of them are then
    # kept on disk, and this network looks at each side once.
    beyond = None
    store = None
    if settings.beyond:
        beyond = BeyondFid(settings, ref.images, sample.images, network, digests, ref.stored)
        with_rows = beyond.with_rows
        if plan.needs_rows:
            with_rows.add(network.name)
        store = FeatureStore(settings, settings.split_size, with_rows)

    # 2. Features of all images, which all ranks compute together.
    comparison = None
    if plan.ref_is_read or (beyond is not None and beyond.needs_ref_statistics and not ref.stored):
        notes += features_of_reference(ref, network, settings, plan.needs_rows, digests['reference'], store)
    if plan.sample_is_read:
        notes += features_of_sample(sample, network, settings, plan.needs_rows, digests['sample'], store)
    if beyond is not None:
        comparison = beyond.extract(store, ref.statistics)

    # 3. The master has all features and statistics now, and computes the scores alone.
    if not dist.is_master():
        return None
    for side in (ref, sample):
        if side.images is not None:
            notes += side.images.warnings
    scores = compute(plan.wanted, settings, ref, sample, notes)
    further = {}
    if beyond is not None:
        further = dict(beyond=beyond.report(comparison))
        scores |= further['beyond']['scores']
        notes = list(dict.fromkeys(notes + beyond.notes))  # several encoders look at the same images
    trained_on = marked_scores(targets, scores, network, further.get('beyond'))
    if targets:
        notes.append(f'the generator was trained on {", ".join(targets)}: such scores say how well that '
                     'worked; look at those of other encoders')
    return dict(
        command='score',
        scores=scores,
        unavailable=plan.unavailable,
        warnings=notes,
        **further,
        **described,
        manifest=manifest,
        rejection=(manifest or {}).get('rejection'),
        trained_on=trained_on,
        network=describe_network(network),
        settings=dataclasses.asdict(settings),
        versions=versions(),
        device=device_name(torch_device(settings)),
        world_size=dist.get_world_size(),
        seconds=round(time.time() - begin, 1),
    )


def describe_network(network: Any) -> dict[str, Any] | None:
    """The network of --features for the report; None where no score needs it."""
    if network is None:
        return None
    return dict(name=network.name, digest=network.digest, published=network.digest == SHA256)


# ---------------------------------------------------------------------------------------------- the files
@dataclass
class ScoredSide:
    """One side of the comparison: its images, its stored statistics, or both; and their features.

    Attributes:
        keys: names of the arrays, if the side is an npz.
        statistics: (mean, covariance) by suffix '' and '_s'.
        rows_NF: pool features of single images, on the master; None where nobody needs them.
        inception_scores: see `SetFeatures`.
    """

    path: Path
    images: ImageSet | None
    keys: tuple[str, ...] = ()
    statistics: dict[str, tuple] = field(default_factory=dict)
    rows_NF: torch.Tensor | None = None
    inception_scores: tuple[float, float] | None = None

    def read_statistics(self, network: Any) -> None:
        """Read the stored statistics, if there are any; they win over images, as in the original.

        Raises:
            ValueError: the statistics belong to another network, or are damaged.
        """
        for suffix, num_features in (('', network.num_features), ('_s', network.num_spatial)):
            if num_features and self.stored and f'mu{suffix}' in self.keys:
                self.statistics[suffix] = read_statistics(self.path, num_features, suffix)

    def take(self, features: SetFeatures | None) -> list[str]:
        """Take over stored features, but for statistics that the side has already; warnings about it."""
        if features is None:
            return []  # on the other ranks
        self.statistics = features.statistics | self.statistics
        self.rows_NF = features.rows_NF
        self.inception_scores = features.inception_scores
        return features.warnings

    @property
    def stored(self) -> bool:
        """Whether the file holds statistics."""
        return 'mu' in self.keys

    def describe(self) -> dict[str, Any]:
        """What the report says about this side; reads the whole file for its hash."""
        digest = sha256_of(self.path) if self.images is None else self.images.sha256()
        statistics = 'stored' if self.stored else 'of the images'
        description = dict(path=str(self.path), sha256=digest, statistics=statistics)
        if self.images is not None:
            description['count'] = self.images.count
            description['height'] = self.images.height
            description['width'] = self.images.width
        return description


def open_set(path: str, needs_images: bool) -> ScoredSide:
    """Open a file or folder as one side of the comparison.

    Args:
        needs_images: refuse a file that holds statistics alone.
    Raises:
        ValueError: the file cannot be read, or lacks what is needed.
    """
    keys = () if Path(path).is_dir() else npz_keys(path)
    for pair in STATISTICS.values():
        found = set(pair) & set(keys)
        if len(found) == 1:
            raise ValueError(f'expected {" and ".join(pair)} together in {path}, got {found.pop()} alone: '
                             'compute the statistics again (evaluate.py stats)')
    # A file that has neither is opened as images, too: the error then says what such a file must hold.
    has_images = 'arr_0' in keys or 'mu' not in keys or needs_images
    images = open_images(path) if has_images else None
    return ScoredSide(Path(path), images, keys)


def read_manifest(path: Path, digest: str, notes: list[str]) -> dict[str, Any] | None:
    """The manifest that sample.py wrote beside images; None if there is none, or it may be of other images.

    Args:
        path: the file, or the folder of PNG files.
        digest: its SHA-256.
        notes: gets a line about the manifest of a folder that is not used.
    Raises:
        ValueError: the manifest cannot be read, or describes another file.
    """
    manifest_path = manifest_of(path)
    try:
        manifest = json.loads(manifest_path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f'expected the manifest of sample.py at {str(manifest_path)!r}, cannot read it '
                         f'({error}): restore or remove it') from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get('npz_sha256'), str):
        return None  # a JSON file of another program, which happens to have this name

    # Files come and go in a folder, so that other ones are no damage there. The digest of the npz beside it
    # says nothing of them, and earlier versions of sample.py wrote no other one.
    if path.is_dir():
        described = manifest.get('folder_sha256')
        if described == digest:
            return manifest
        problem = 'describes other PNG files than those in'
        if described is None:
            problem = 'does not name the SHA-256 of the PNG files in'
        notes.append(f'{manifest_path} {problem} {path}, so that nothing of it is in this report')
        return None
    if manifest['npz_sha256'] != digest:
        raise ValueError(f'{path} has SHA-256 {digest[:16]}..., its manifest {manifest_path} says '
                         f'{manifest["npz_sha256"][:16]}...: the images are others than those that were '
                         'sampled; sample again, or remove the manifest')
    return manifest


def unavailable_metrics(settings: ScoreSettings, ref: ScoredSide, sample: ScoredSide) -> dict[str, str]:
    """Metrics that these files or this network cannot give, with the reason.

    Raises:
        ValueError: one of these metrics was asked for by name.
    """
    reasons = {}
    for side in (ref, sample):
        if side.stored and 'mu_s' not in side.keys:
            reasons['sfid'] = f'{side.path.name} holds mu but no mu_s'
    if settings.features == 'digits':
        reasons['sfid'] = 'the digits network has no spatial features'
    if ref.images is None:
        reasons |= dict.fromkeys(('precision', 'recall'), f'{ref.path.name} holds no images (arr_0)')
    if sample.images is None:
        reasons |= dict.fromkeys(('is', 'precision', 'recall'), f'{sample.path.name} holds no images (arr_0)')
    for name, reason in reasons.items():
        if name in settings.named:
            raise ValueError(f'--metrics asks for {name}, but {reason}: leave it out')
    return {name: reason for name, reason in reasons.items() if name in settings.wanted}


def check_count(settings: ScoreSettings, sample: ScoredSide) -> list[str]:
    """Compare the number of images with the expected one.

    Returns:
        Warnings about the number of images.
    Raises:
        ValueError: the number is another than the expected one.
    """
    if sample.images is None:
        return [f'{sample.path.name} holds statistics alone: of how many images is unknown, '
                'FID is of 50,000']
    count = sample.images.count
    if count != settings.expected_count and not settings.allow_any_count:
        raise ValueError(f'expected {settings.expected_count:,} images in {sample.path}, got {count:,}: pass '
                         f'--expected_count={count} or --allow_any_count if that is meant')
    if count < STANDARD_COUNT:
        return [f'{count:,} images: report the distance as FID-{count / 1000:g}k, FID is of 50,000']
    return []


def check_enough_images(side: ScoredSide, needs_rows: bool) -> None:
    """Make sure that a side has the images that its scores need at least.

    Args:
        needs_rows: whether precision or recall is wanted, whose manifolds reach to the third neighbour.
    Raises:
        ValueError: the side has fewer.
    """
    count = side.images.count
    if needs_rows and count < 4:
        raise ValueError(f'precision and recall need at least 4 images, {side.path} holds {count}: add some, '
                         'or leave them out of --metrics')
    if count < 2:
        raise ValueError(f'statistics need at least 2 images, {side.path} holds {count}: add some')


# ---------------------------------------------------------------------------------------------- the plan
class Plan(NamedTuple):
    """What there is to do for the scores of ADM, and the network of --features."""
    wanted: list[str]            # names of the scores that the files allow
    unavailable: dict[str, str]  # those that were wanted and that they do not allow, with the reason
    network: Any                 # None if no score needs it
    needs_rows: bool             # whether single images are compared
    ref_is_read: bool            # whether the network must look at the images of the reference
    sample_is_read: bool         # and at those of the sample
    notes: list[str]             # warnings


def make_plan(settings: ScoreSettings, ref: ScoredSide, sample: ScoredSide, network: Any) -> Plan:
    """Find out what must be done, and whether it can be done; no image is read. Every rank calls it.

    Args:
        network: see `score_images`.
    Raises:
        MissingWeights, ValueError: see `score_images`.
    """
    unavailable = unavailable_metrics(settings, ref, sample)
    wanted = [name for name in SCORES if name in settings.wanted and name not in unavailable]
    notes = check_count(settings, sample)

    # Precision and recall compare single images; FID needs images only where no statistics are stored.
    needs_rows = 'precision' in wanted or 'recall' in wanted
    needs_statistics = 'fid' in wanted or 'sfid' in wanted
    ref_is_read = needs_rows or (not ref.stored and needs_statistics)
    sample_is_read = needs_rows or (not sample.stored and needs_statistics) or 'is' in wanted
    if ref_is_read:
        check_enough_images(ref, needs_rows)
    if sample_is_read:
        check_enough_images(sample, needs_rows)
    if sample.stored and sample.images is not None:
        notes.append(f'{sample.path.name} carries mu: these statistics are used, not those of its images')

    if network is None and (wanted or settings.features in encoders_of(settings)):
        network = load_network(settings)
    if network is not None:
        ref.read_statistics(network)
        sample.read_statistics(network)
    return Plan(wanted, unavailable, network, needs_rows, ref_is_read, sample_is_read, notes)


def check_scoring(settings: ScoreSettings, count: int) -> tuple[Any, str]:
    """Find out what would keep `score_images` from scoring images that are still to be drawn.

    Every rank calls it.

    Args:
        settings: with the path at which the images will be.
        count: how many they will be.
    Returns:
        The network for `score_images`, None if no score needs it; and the SHA-256 of the reference.
    Raises:
        MissingWeights, ValueError: see `score_images`.
    """
    ref = open_set(settings.ref, needs_images=False)
    sample = ScoredSide(Path(settings.sample), PlannedImages(settings.sample, count))
    plan = make_plan(settings, ref, sample, None)
    described = dist.from_master(ref.describe)
    if settings.beyond:
        # No other set has the digest of images that are not there.
        digests = dict(reference=described['sha256'], sample='')
        BeyondFid(settings, ref.images, sample.images, plan.network, digests, ref.stored)
    return plan.network, described['sha256']


class PlannedImages(ImageSet):
    """Square images that are not drawn yet; nobody knows their size before."""

    height = 0
    width = 0
    labels = None

    def __init__(self, path: str, count: int):
        self.path = Path(path)
        self.count = count
        self.warnings = []


# ---------------------------------------------------------------------------------------------- scoring
def features_of_reference(
    ref: ScoredSide,
    network: Any,
    settings: ScoreSettings,
    keep_rows: bool,
    digest: str,
    store: FeatureStore | None,
) -> list[str]:
    """Features of the reference, from the cache where an earlier run left them; every rank calls it.

    On the master `ref` gets pool features and, where it stores no statistics, those of its images.

    Args:
        keep_rows: whether the features themselves are wanted, not just their statistics.
        digest: SHA-256 of the reference.
        store: where they are shared with other scores; None uses a file of their own.
    Returns:
        Warnings about the images, on the master.
    """
    if store is not None:
        return ref.take(store.get(ref.images, digest, network, 'reference'))
    pairs = {}
    if not ref.stored:
        pairs[''] = STATISTICS['']
        if network.num_spatial:
            pairs['_s'] = STATISTICS['_s']

    # The name of the file in the cache is a hash of everything that its content depends on.
    text = f'{digest} {network.name} {network.digest} {settings.dtype} {CACHE_VERSION} {keep_rows}'
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    path = Path(settings.cache) / f'features-{key}.npz'
    names = ['warnings']
    if keep_rows:
        names.append('rows')
    for pair in pairs.values():
        names += pair
    known = None
    if settings.cache and dist.is_master():
        known = read_cache(path, names)

    # Only the master reads the cache, so it decides for all ranks whether they must compute.
    if not dist.allgather_object(known is not None)[0]:
        features, inspection = extract(ref.images, network, settings, keep_rows=keep_rows)
        if dist.is_master():
            known = dict(warnings=np.array(inspection.warnings('reference'), dtype=str))
            if keep_rows:
                known['rows'] = features.rows_NF.numpy()
            if not ref.stored:
                known |= features.arrays()
            if settings.cache:
                write_cache(path, known)
    if known is None:
        return []

    # Computed or read, the arrays are used in the same way, so that both give the same scores.
    for suffix, (mean, covariance) in pairs.items():
        ref.statistics[suffix] = (torch.from_numpy(known[mean]), torch.from_numpy(known[covariance]))
    if keep_rows:
        ref.rows_NF = torch.from_numpy(known['rows'])
    return known['warnings'].tolist()


def features_of_sample(
    sample: ScoredSide,
    network: Any,
    settings: ScoreSettings,
    keep_rows: bool,
    digest: str,
    store: FeatureStore | None,
) -> list[str]:
    """Features of the sample; every rank calls it, and arguments are those of `features_of_reference`.

    Returns:
        Warnings about the images.
    """
    if store is not None:
        return sample.take(store.get(sample.images, digest, network, 'sample'))
    features, inspection = extract(sample.images, network, settings, settings.split_size, keep_rows)
    sample.statistics = features.statistics() | sample.statistics
    sample.inception_scores = features.score.scores()
    if keep_rows:
        sample.rows_NF = features.rows_NF
    return inspection.warnings('sample')


def compute(
    wanted: list[str],
    settings: ScoreSettings,
    ref: ScoredSide,
    sample: ScoredSide,
    notes: list[str],
) -> dict[str, float]:
    """The scores by name.

    Args:
        wanted: names of the metrics, all of which the files allow.
        notes: gets a line for everything that makes a score doubtful.
    """
    scores = {}

    # The Inception Score is a mean over chunks of the file. Chunks of few classes each have a low score, so
    # a file that is sorted by class shows in a much higher score of all images at once.
    if 'is' in wanted:
        scores['is'], scores['is_one_chunk'] = sample.inception_scores
        if scores['is_one_chunk'] > 1.2 * scores['is']:
            notes.append('images look sorted by class: Inception Score '
                         f'{scores["is_one_chunk"]:.2f} over all, {scores["is"]:.2f} in chunks of '
                         f'{settings.split_size}; shuffle them (evaluate.py pack)')

    # FID is the distance of pool features, sFID that of spatial ones (Nash et al., arXiv 2103.03841).
    for name, suffix in (('fid', ''), ('sfid', '_s')):
        if name in wanted:
            scores[name] = frechet_distance(
                *ref.statistics[suffix],
                *sample.statistics[suffix],
                method=settings.fd_method,
            )

    # A covariance of N images has a rank below N, and the distance is the more biased the fewer they are.
    if 'fid' in wanted:
        for name, side in (('sample', sample), ('reference', ref)):
            if side.stored:
                continue
            mean_F, _ = side.statistics['']
            if side.images.count <= len(mean_F):
                notes.append(f'{name}: rank-deficient covariance of {side.images.count:,} images; FID is '
                             'strongly biased for few images, 50,000 is standard')

    # The network resizes both sides, and what resizing does to an image depends on its size.
    if ref.images and sample.images:
        ref_size = f'{ref.images.height}x{ref.images.width}'
        sample_size = f'{sample.images.height}x{sample.images.width}'
        if ref_size != sample_size:
            notes.append(f'image sizes differ: reference {ref_size}, sample {sample_size}')

    # Precision and recall come last, as they take longest.
    if 'precision' in wanted or 'recall' in wanted:
        both = precision_recall(ref.rows_NF, sample.rows_NF, settings.pr_mode, device=torch_device(settings))
        for name in ('precision', 'recall'):
            if name in wanted:
                scores[name] = getattr(both, name)
    return scores


# ---------------------------------------------------------------------------------------------- output
def text_report(report: dict[str, Any]) -> str:
    """The report for a reader: what was compared, the scores as the original prints them, warnings."""
    def side(name: str) -> str:
        values = report[name]
        images = ''
        if 'count' in values:
            images = f', {values["count"]:,} images of {values["width"]}x{values["height"]}'
        return f'{name:10} {values["path"]}{images}, statistics {values["statistics"]}'

    network = report['network']
    settings = report['settings']
    rejected = ''
    if report['rejection']:
        rejected = f' with rejection (ratio {report["rejection"]["ratio"]:g})'

    lines = [side('reference'), side('sample') + rejected]
    if network:
        published = 'no Inception weights of FID: these scores compare with nothing published'
        if network['published']:
            published = 'published weights'
        lines.append(f'{"features":10} {network["name"]} {network["digest"][:8]} ({published}), '
                     f'{settings["dtype"]}, precision and recall {settings["pr_mode"]}, distance by '
                     f'{settings["fd_method"]}')
    for name, words in SCORES.items():
        if name in report['scores']:
            lines.append(f'{words}: {report["scores"][name]:.6g}{mark_of(report, name)}')
        elif name in report['unavailable']:
            lines.append(f'{words}: not available, {report["unavailable"][name]}')
    if 'beyond' in report:
        lines += lines_of(report)
    lines += [f'warning: {note}' for note in report['warnings']]
    return '\n'.join(lines)


def check_output(path: str | Path) -> None:
    """Make the folder of a file that will be written at the end, and find out now if that will fail.

    Raises:
        ValueError: the path is a folder, or its folder cannot be made or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError(f'{path} is a folder')
    except OSError as error:
        raise ValueError(f'expected a file that can be written, got {path} ({error.strerror or error}): pass '
                         'another name, or change the permissions') from None


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write indented JSON whole or not at all.

    Raises:
        OSError: see `utils.files.write_text`.
    """
    write_text(path, json.dumps(content, indent=2) + '\n')
