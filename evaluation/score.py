"""Scores of a set of images against a reference, as the evaluator of ADM (guided-diffusion) defines them.

`python evaluate.py REFERENCE SAMPLE` prints Inception Score, FID, sFID, precision and recall. Both sides are
npz files (`arr_0` uint8 (N, H, W, 3); `mu`, `sigma`, `mu_s`, `sigma_s` where statistics are stored) or
folders of PNG files.
"""
import dataclasses
import hashlib
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch

import dist
from configs.options import INF, opt
from evaluation.features import (
    FeatureSet,
    FeatureSettings,
    extract,
    load_network,
    read_cache,
    write_cache,
)
from evaluation.inception import SHA256
from evaluation.metrics import frechet_distance, read_statistics
from evaluation.precision_recall import precision_recall
from utils.batches import SUFFIXES, ImageBatch, npz_keys, open_batch
from utils.files import write_text
from utils.hub import sha256_of
from utils.provenance import device_name, versions

logger = logging.getLogger(__name__)
STANDARD_COUNT = 50_000
METRICS = {'is': 'Inception Score', 'fid': 'FID', 'sfid': 'sFID', 'precision': 'Precision',
           'recall': 'Recall'}  # in the original's order and words
STATISTICS = {'': ('mu', 'sigma'), '_s': ('mu_s', 'sigma_s')}  # suffix -> mean and covariance in a file
CACHE_VERSION = 2  # of extraction and of what is kept; a new one forgets what is cached


@dataclass(frozen=True)
class ScoreSettings(FeatureSettings):
    """Settings of `evaluate.py REF SAMPLE`."""

    ref: str = opt('', 'reference: npz or folder of PNG files', positional=True, path=True)
    sample: str = opt('', 'images to score: npz or folder of PNG files', positional=True, path=True)
    metrics: str = opt('', f'{",".join(METRICS)} or some of them; empty takes all that the files allow')
    pr_mode: str = opt('adm', 'precision and recall: adm (float16 as the original) or fp32',
                       choices=('adm', 'fp32'))
    fd_method: str = opt('eigh', 'Frechet distance: eigh, or scipy (sqrtm as the original)',
                         choices=('eigh', 'scipy'))
    split_size: int = opt(5000, 'images per chunk of the Inception Score', limits=(1, INF))
    expected_count: int = opt(STANDARD_COUNT, 'number of images that the sample must hold', limits=(1, INF))
    allow_any_count: bool = opt(False, 'score any number of images')
    json: str = opt('', 'file for scores, settings, hashes and versions', path=True)

    def __post_init__(self):
        super().__post_init__()
        for name, what in (('ref', 'reference'), ('sample', 'sample')):
            if not getattr(self, name):
                raise ValueError(f'expected REF and SAMPLE, got no {what}: evaluate.py REF.npz SAMPLE.npz, '
                                 'or one of the commands that --help lists')
        unknown = sorted(set(self.wanted) - set(METRICS))
        if unknown:
            raise ValueError(f'--metrics must be of {", ".join(METRICS)}, got {", ".join(unknown)}')
        if self.json:
            refuse_overwriting(self.json, self.ref, self.sample)
        if self.features == 'digits' and self.metrics and 'sfid' in self.wanted:
            raise ValueError('--metrics asks for sfid, but the digits network has no spatial features: '
                             'leave it out')

    @property
    def wanted(self) -> tuple[str, ...]:
        return tuple(self.metrics.replace(' ', '').split(',')) if self.metrics else tuple(METRICS)


@dataclass
class ImageSet:
    """A side of the comparison: its images, its stored statistics, or both."""

    path: Path
    batch: ImageBatch | None
    keys: tuple[str, ...] = ()  # of the npz
    statistics: dict[str, tuple] = field(default_factory=dict)  # (mean, covariance) by suffix '' and '_s'

    def read_statistics(self, network: Any) -> None:
        """Stored statistics win over images, as in the original."""
        for suffix, size in (('', network.num_features), ('_s', network.num_spatial)):
            if size and self.stored and f'mu{suffix}' in self.keys:
                self.statistics[suffix] = read_statistics(self.path, size, suffix)

    @property
    def stored(self) -> bool:
        """Whether the file holds statistics."""
        return 'mu' in self.keys

    def describe(self) -> dict[str, Any]:
        """What the report says of it; reads the whole file for its hash."""
        images = {} if self.batch is None else dict(
            count=self.batch.count, height=self.batch.height, width=self.batch.width)
        digest = sha256_of(self.path) if self.batch is None else self.batch.sha256()
        return dict(path=str(self.path), sha256=digest,
                    statistics='stored' if self.stored else 'of the images', **images)


def open_set(path: str, needs_images: bool) -> ImageSet:
    """A file or folder as a side of the comparison.

    Raises:
        ValueError: it cannot be read, or lacks what is needed.
    """
    keys = () if Path(path).is_dir() else npz_keys(path)
    for pair in STATISTICS.values():
        found = set(pair) & set(keys)
        if len(found) == 1:
            raise ValueError(f'expected {" and ".join(pair)} together in {path}, got {found.pop()} alone: '
                             'compute the statistics again (evaluate.py stats)')
    has_images = 'arr_0' in keys or 'mu' not in keys or needs_images
    return ImageSet(Path(path), open_batch(path) if has_images else None, keys)


def manifest_of(path: Path) -> Path:
    """Where sample.py describes a file or folder of images."""
    return path.absolute().with_name(f'{path.absolute().name.removesuffix(".npz")}.json')


def read_manifest(path: Path, digest: str) -> dict[str, Any] | None:
    """What sample.py wrote beside a file of images, if it did.

    Raises:
        ValueError: the manifest belongs to other content.
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
        return None  # somebody else's file
    if path.suffix == '.npz' and manifest['npz_sha256'] != digest:
        raise ValueError(f'{path} has SHA-256 {digest[:16]}..., its manifest {manifest_path} says '
                         f'{manifest["npz_sha256"][:16]}...: the images are others than those that were '
                         'sampled; sample again, or remove the manifest')
    return manifest


# ---------------------------------------------------------------------------------------------- scoring
def unavailable_metrics(settings: ScoreSettings, ref: ImageSet, sample: ImageSet) -> dict[str, str]:
    """Metrics that these files or this network cannot give, with the reason.

    Raises:
        ValueError: one of them was asked for by name.
    """
    reasons = {}
    for side in (ref, sample):
        if side.stored and 'mu_s' not in side.keys:
            reasons['sfid'] = f'{side.path.name} holds mu but no mu_s'
    if settings.features == 'digits':
        reasons['sfid'] = 'the digits network has no spatial features'
    if ref.batch is None:
        reasons |= dict.fromkeys(('precision', 'recall'), f'{ref.path.name} holds no images (arr_0)')
    if sample.batch is None:
        reasons |= dict.fromkeys(('is', 'precision', 'recall'), f'{sample.path.name} holds no images (arr_0)')
    for name, reason in reasons.items():
        if settings.metrics and name in settings.wanted:
            raise ValueError(f'--metrics asks for {name}, but {reason}: leave it out')
    return {name: reason for name, reason in reasons.items() if name in settings.wanted}


def check_count(settings: ScoreSettings, sample: ImageSet) -> list[str]:
    """Warnings about the number of images.

    Raises:
        ValueError: it is not the expected one.
    """
    if sample.batch is None:
        return [f'{sample.path.name} holds statistics alone: of how many images is unknown, '
                'FID is of 50,000']
    count = sample.batch.count
    if count != settings.expected_count and not settings.allow_any_count:
        raise ValueError(f'expected {settings.expected_count:,} images in {sample.path}, got {count:,}: pass '
                         f'--expected_count={count} or --allow_any_count if that is meant')
    if count < STANDARD_COUNT:
        return [f'{count:,} images: report the distance as FID-{count / 1000:g}k, FID is of 50,000']
    return []


def features_of_reference(ref: ImageSet, network: Any, settings: ScoreSettings, keep_rows: bool,
                          digest: str) -> tuple[torch.Tensor | None, list[str]]:
    """Pool features (N, F) of the reference images, and warnings about these; every rank calls it.

    Both are on the master alone, as are the statistics that `ref` gets where none are stored. All of it is
    kept in the cache, under what it depends on.

    Args:
        keep_rows: whether the features are wanted.
        digest: SHA-256 of the reference.
    """
    text = f'{digest} {network.name} {network.digest} {settings.dtype} {CACHE_VERSION} {keep_rows}'
    path = Path(settings.cache) / f'features-{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz'
    pairs = {suffix: pair for suffix, pair in STATISTICS.items()
             if not ref.stored and (network.num_spatial or not suffix)}
    names = ['warnings', *['rows'] * keep_rows, *(name for pair in pairs.values() for name in pair)]
    known = read_cache(path, names) if settings.cache and dist.is_master() else None
    if not dist.allgather_object(known is not None)[0]:  # the master decides
        features, inspection = extract(ref.batch, network, settings, keep_rows=keep_rows)
        if dist.is_master():
            known = dict(warnings=np.array(inspection.warnings('reference'), dtype=str))
            known |= dict(rows=features.rows_NF.numpy()) if keep_rows else {}
            known |= features.arrays() if not ref.stored else {}
            if settings.cache:
                write_cache(path, known)
    if known is None:
        return None, []
    for suffix, pair in pairs.items():
        ref.statistics[suffix] = tuple(torch.from_numpy(known[name]) for name in pair)
    return torch.from_numpy(known['rows']) if keep_rows else None, known['warnings'].tolist()


def score_images(settings: ScoreSettings, network: Any = None) -> dict[str, Any] | None:
    """Everything that `evaluate.py REF SAMPLE` reports, on the master; None on the other ranks.

    Args:
        network: a loaded one; None loads that of the settings.
    Raises:
        MissingWeights: of the feature network.
        ValueError: see `utils.batches` and the checks above.
    """
    begin = time.time()
    # 1. the files, before any network
    ref = open_set(settings.ref, needs_images=False)
    sample = open_set(settings.sample, needs_images=False)
    unavailable = unavailable_metrics(settings, ref, sample)
    wanted = [name for name in METRICS if name in settings.wanted and name not in unavailable]
    notes = check_count(settings, sample)
    keep_rows = bool({'precision', 'recall'} & set(wanted))
    ref_is_read = keep_rows or (not ref.stored and wanted != ['is'])
    sample_is_read = keep_rows or not sample.stored or 'is' in wanted
    for side, is_read in ((ref, ref_is_read), (sample, sample_is_read)):
        if is_read and side.batch.count < (4 if keep_rows else 2):
            least = 'precision and recall need at least 4' if keep_rows else 'statistics need at least 2'
            raise ValueError(f'{least} images, {side.path} holds {side.batch.count}: add some'
                             + ', or leave them out of --metrics' * keep_rows)
    if sample.stored and sample.batch is not None:
        notes.append(f'{sample.path.name} carries mu: these statistics are used, not those of its images')

    # 2. the network, and statistics that the files hold
    network = network or load_network(settings)
    for side in (ref, sample):
        side.read_statistics(network)
    described = {}
    if dist.is_master():
        described = dict(reference=ref.describe(), sample=sample.describe())
    described = dist.allgather_object(described)[0]
    manifest = read_manifest(sample.path, described['sample']['sha256'])

    # 3. features
    ref_rows = features = None
    if ref_is_read:
        ref_rows, found = features_of_reference(ref, network, settings, keep_rows,
                                                described['reference']['sha256'])
        notes += found
    if sample_is_read:
        features, inspection = extract(sample.batch, network, settings, settings.split_size, keep_rows)
        sample.statistics = features.statistics() | sample.statistics
        notes += inspection.warnings('sample')
    if not dist.is_master():
        return None

    # 4. scores
    for side in (ref, sample):
        notes += side.batch.warnings if side.batch is not None else []
    scores = compute(wanted, settings, ref, sample, features, ref_rows, notes)
    return dict(
        command='score', scores=scores, unavailable=unavailable, warnings=notes, **described,
        manifest=manifest, rejection=(manifest or {}).get('rejection'),
        network=dict(name=network.name, digest=network.digest, published=network.digest == SHA256),
        settings=dataclasses.asdict(settings), versions=versions(),
        device=device_name(settings.torch_device), world_size=dist.get_world_size(),
        seconds=round(time.time() - begin, 1))


def compute(wanted: list[str], settings: ScoreSettings, ref: ImageSet, sample: ImageSet,
            features: FeatureSet | None, ref_rows: torch.Tensor | None, notes: list[str]) -> dict[str, float]:
    """The scores by name; adds to `notes` what is doubtful about them."""
    scores = {}
    if 'is' in wanted:
        scores['is'], scores['is_one_chunk'] = features.score.scores()
        if scores['is_one_chunk'] > 1.2 * scores['is']:
            notes.append('images look sorted by class: Inception Score '
                         f'{scores["is_one_chunk"]:.2f} over all, {scores["is"]:.2f} in chunks of '
                         f'{settings.split_size}; shuffle them (evaluate.py pack)')
    for name, suffix in (('fid', ''), ('sfid', '_s')):
        if name in wanted:
            scores[name] = frechet_distance(*ref.statistics[suffix], *sample.statistics[suffix],
                                            method=settings.fd_method)
    for name, side in (('sample', sample), ('reference', ref)):
        if 'fid' in wanted and not side.stored and side.batch.count <= len(side.statistics[''][0]):
            notes.append(f'{name}: rank-deficient covariance of {side.batch.count:,} images; FID is strongly '
                         'biased for few images, 50,000 is standard')
    if ref.batch and sample.batch:
        sizes = [(side.batch.height, side.batch.width) for side in (ref, sample)]
        if sizes[0] != sizes[1]:
            notes.append('image sizes differ: reference {}x{}, sample {}x{}'.format(*sizes[0], *sizes[1]))
    if ref_rows is not None:
        both = precision_recall(ref_rows, features.rows_NF, settings.pr_mode, device=settings.torch_device)
        scores |= {name: getattr(both, name) for name in ('precision', 'recall') if name in wanted}
    return scores


def text_report(report: dict[str, Any]) -> str:
    """The report for a reader: what was compared, the scores as the original prints them, warnings."""
    def side(name: str) -> str:
        values = report[name]
        images = f', {values["count"]:,} images of {values["width"]}x{values["height"]}' \
            if 'count' in values else ''
        return f'{name:10} {values["path"]}{images}, statistics {values["statistics"]}'
    network = report['network']
    settings = report['settings']
    published = 'published weights' if network['published'] else \
        'no Inception weights of FID: these scores compare with nothing published'
    rejected = f' with rejection (ratio {report["rejection"]["ratio"]:g})' if report['rejection'] else ''
    lines = [side('reference'), side('sample') + rejected,
             f'{"features":10} {network["name"]} {network["digest"][:8]} ({published}), {settings["dtype"]}, '
             f'precision and recall {settings["pr_mode"]}, distance by {settings["fd_method"]}']
    for name, words in METRICS.items():
        if name in report['scores']:
            lines.append(f'{words}: {report["scores"][name]:.6g}')
        elif name in report['unavailable']:
            lines.append(f'{words}: not available, {report["unavailable"][name]}')
    return '\n'.join(lines + [f'warning: {note}' for note in report['warnings']])


def evaluate_images(settings: ScoreSettings) -> str | None:
    """`evaluate.py REF SAMPLE`: the text for the reader, on the master."""
    if settings.json:
        check_output(settings.json)
    report = score_images(settings)
    text = text_report(report) if report else None
    if settings.json and report:
        try:
            write_json(settings.json, report)
        except OSError as error:
            logger.warning('no file holds these scores:\n%s', text)
            raise ValueError(f'could not write {settings.json} ({error.strerror or error}), the scores are '
                             'above: free some space, or write elsewhere') from None
    dist.barrier()
    return text


def refuse_overwriting(output: str, *inputs: str) -> None:
    """Make sure that a file to be written is none that was given, none of a given folder, and no manifest.

    Raises:
        ValueError: it is.
    """
    target = Path(output).resolve()
    for path in map(Path, inputs):
        is_image = target.parent == path.resolve() and target.suffix.lower() in (*SUFFIXES, '.npy')
        neighbours = (manifest_of(path), manifest_of(path).with_suffix('.npz'))
        if is_image or target in (path.resolve(), *(neighbour.resolve() for neighbour in neighbours)):
            raise ValueError(f'expected a file of its own for the result, got {output}, which is or '
                             f'describes {path}: pass another name')


def check_output(path: str | Path) -> None:
    """Make the folder of a file that will be written at the end; if it cannot be, say so now.

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
    write_text(path, json.dumps(content, indent=2) + '\n')
