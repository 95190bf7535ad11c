"""Images judged by a classifier: how often it recognises the requested class, and rejection sampling.

`evaluate.py classify-eval SAMPLE` reports accuracy; `evaluate.py reject IN OUT.npz` keeps those candidates of
each class that the classifier is surest of, as the authors of VAR did for VAR-d30-re. Candidates are numbered
in the order of the file: a random order in an npz of sample.py, the order of the indices in its folder.
Letters: N images, K images that are kept, B batch, C classes.
"""
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import dist
from evaluation.classifiers import Classifier, load_classifier
from evaluation.features import rank_range, read_ahead, torch_device
from evaluation.score import check_output, read_manifest, write_json
from evaluation.settings import ClassifierSettings, ClassifySettings, RejectSettings
from utils.hub import sha256_of
from utils.image_sets import NUM_READERS, ImageSet, open_images, read_labels, shuffled, write_npz
from utils.image_store import map_ahead
from utils.log import progress_bar
from utils.provenance import device_name, versions

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------- judgement
class Judgement(NamedTuple):
    """What a classifier says about the label of every image."""
    log_prob_N: np.ndarray  # float32, log p(label | image)
    rank_N: np.ndarray      # int64, number of classes that it deems likelier than the label; 0 means correct

    def scores(self, num_classes: int, rows: np.ndarray | slice = np.s_[:]) -> dict[str, float]:
        """Accuracy and mean probability of some images.

        Args:
            num_classes: of the classifier; with 5 classes or fewer there is no top-5 accuracy.
            rows: which images; by default all of them.
        Returns:
            top1, top5, mean_prob in [0, 1]; mean_log_prob, the mean natural logarithm.
        """
        log_prob_K = self.log_prob_N[rows].astype(np.float64)
        rank_K = self.rank_N[rows]
        scores = dict(top1=float((rank_K == 0).mean()))
        if num_classes > 5:
            scores['top5'] = float((rank_K < 5).mean())
        scores['mean_prob'] = float(np.exp(log_prob_K).mean())
        scores['mean_log_prob'] = float(log_prob_K.mean())
        return scores


def load_labels(images: ImageSet, path: str) -> np.ndarray:
    """(N,) int64 classes of the images, from a file or else from beside the images.

    Args:
        path: the file; empty takes the labels that lie beside the images.
    Raises:
        ValueError: there are no labels, or another number of labels than of images.
    """
    if path:
        return read_labels(path, images.count)
    if images.labels is None:
        raise ValueError(f'expected a class per image in {images.path} (arr_1 of an npz, labels.npy of a '
                         'folder), found none: pass --labels=FILE')
    return images.labels


def load(settings: ClassifierSettings, labels_N: np.ndarray) -> Classifier:
    """The classifier, which must know the labels; each node downloads missing weights once.

    Raises:
        MissingWeights: the classifier has no weights here.
        ValueError: a label is none of its classes; or see `load_classifier`.
    """
    def load_here(is_first: bool) -> Classifier:
        may_download = is_first and settings.download
        return load_classifier(settings.classifier, settings.classifier_weights, torch_device(settings),
                               may_download)

    classifier = dist.first_of_node_first(load_here)
    unknown = np.flatnonzero((labels_N < 0) | (labels_N >= classifier.num_classes))
    if len(unknown):
        raise ValueError(f'{classifier.name} knows classes 0..{classifier.num_classes - 1}, image '
                         f'{unknown[0]} has label {labels_N[unknown[0]]}: pass a classifier of these classes')
    return classifier


def judge(images: ImageSet, labels_N: np.ndarray, classifier: Classifier, batch_size: int) -> Judgement:
    """Judge all images; every rank calls it, judges a part of the images and gets the whole judgement.

    Raises:
        ValueError: an image cannot be read, or gives probabilities that are not finite.
    """
    # Ranks take whole batches, which are the same for any number of ranks: kernels may round differently in
    # another batch.
    num_batches = -(-images.count // batch_size)
    first_batch, end_batch = rank_range(num_batches)
    begin = min(batch_size * first_batch, images.count)
    end = min(batch_size * end_batch, images.count)
    own = Judgement(np.empty(end - begin, np.float32), np.empty(end - begin, np.int64))
    own_labels_N = labels_N[begin:end]
    classes_C = torch.arange(classifier.num_classes, device=classifier.device)

    # A thread reads the next images while the classifier works on these.
    def batches() -> Iterator[torch.Tensor]:
        for images_NHW3 in images.blocks(begin, end, batch_size):
            images_N3HW = np.ascontiguousarray(images_NHW3.transpose(0, 3, 1, 2))
            yield torch.from_numpy(images_N3HW)

    first = 0
    with progress_bar(end - begin, images.path.name) as bar:
        for images_u8 in read_ahead(batches()):
            rows = slice(first, first + len(images_u8))
            labels_B1 = torch.from_numpy(own_labels_N[rows, None]).to(classifier.device)
            log_prob_BC = classifier(images_u8)
            log_prob_B1 = log_prob_BC.gather(1, labels_B1)

            # The rank of the label is the number of classes before it; equal ones stand in the order of ids.
            is_equal_BC = log_prob_BC == log_prob_B1
            is_before_BC = (log_prob_BC > log_prob_B1) | (is_equal_BC & (classes_C < labels_B1))
            own.log_prob_N[rows] = log_prob_B1[:, 0].cpu()
            own.rank_N[rows] = is_before_BC.sum(1).cpu()
            first += len(images_u8)
            bar.update(len(images_u8))

    # Ranks have contiguous parts in the order of ranks, so joining them restores the order of the file.
    parts = dist.allgather_object(own)
    judgement = Judgement(
        np.concatenate([part.log_prob_N for part in parts]),
        np.concatenate([part.rank_N for part in parts]),
    )
    is_finite_N = np.isfinite(judgement.log_prob_N)
    if not is_finite_N.all():
        raise ValueError(f'expected finite probabilities, {classifier.name} gives '
                         f'{judgement.log_prob_N[~is_finite_N][0]} for image {is_finite_N.argmin()} of '
                         f'{images.path}: check the weights')
    return judgement


def describe_images(images: ImageSet) -> tuple[str, dict[str, Any] | None]:
    """SHA-256 of the images, and the manifest beside them or None; every rank calls it.

    The images get a warning about a manifest that is not used.

    Raises:
        ValueError: the manifest belongs to another file.
    """
    # The digest needs the whole file, so the master alone reads it for all ranks.
    digest = images.sha256() if dist.is_master() else ''
    digest = dist.allgather_object(digest)[0]
    return digest, read_manifest(images.path, digest, images.warnings)


def line(scores: dict[str, float]) -> str:
    """The scores of `Judgement.scores` as text for a reader."""
    top5 = f'top-5 {scores["top5"]:.2%}, ' if 'top5' in scores else ''
    return f'top-1 {scores["top1"]:.2%}, {top5}mean p(y|x) {scores["mean_prob"]:.4f}'


# ---------------------------------------------------------------------------------------------- accuracy
def evaluate_classify(settings: ClassifySettings) -> str | None:
    """`evaluate.py classify-eval`: the text for the reader on the master, None on the other ranks.

    Raises:
        MissingWeights: the classifier has no weights here.
        ValueError: images, labels or classifier cannot be used, or do not fit together.
    """
    begin = time.time()

    # Files come before the classifier, and the classifier before hours of judging.
    if settings.json:
        check_output(settings.json)
    images = open_images(settings.sample)
    labels_N = load_labels(images, settings.labels)
    classifier = load(settings, labels_N)
    digest, manifest = describe_images(images)
    judgement = judge(images, labels_N, classifier, settings.batch_size)
    scores = judgement.scores(classifier.num_classes)
    rejection = (manifest or {}).get('rejection')

    if settings.json and dist.is_master():
        top1_per_class = {}
        for label in np.unique(labels_N).tolist():
            rank_K = judgement.rank_N[labels_N == label]
            top1_per_class[label] = float((rank_K == 0).mean())
        labels = None
        if settings.labels:
            labels = dict(path=settings.labels, sha256=sha256_of(settings.labels))
        report = dict(
            command='classify-eval',
            scores=scores,
            count=images.count,
            top1_per_class=top1_per_class,
            sample=dict(path=str(images.path), sha256=digest, height=images.height, width=images.width),
            labels=labels,
            classifier=dict(
                name=classifier.name,
                sha256=classifier.digest,
                num_classes=classifier.num_classes,
            ),
            manifest=manifest,
            rejection=rejection,
            warnings=images.warnings,
            settings=dataclasses.asdict(settings),
            versions=versions(),
            device=device_name(torch_device(settings)),
            world_size=dist.get_world_size(),
            seconds=round(time.time() - begin, 1),
        )
        write_json(settings.json, report)
    dist.barrier()
    if not dist.is_master():
        return None

    # Rejection changes all scores, so a reader must not overlook it.
    rejected = f' with rejection (ratio {rejection["ratio"]:g})' if rejection else ''
    lines = [
        f'{images.path}, {images.count:,} images of {images.width}x{images.height}{rejected}',
        f'{classifier.name} {classifier.digest[:8]}, {classifier.num_classes} classes: {line(scores)}',
    ]
    lines += [f'warning: {note}' for note in images.warnings]
    return '\n'.join(lines)


# ---------------------------------------------------------------------------------------------- rejection
def candidates_of(labels_N: np.ndarray, n_keep: int, ratio: int) -> dict[int, np.ndarray]:
    """Indices of the candidates of each class, in the order of the file.

    Args:
        labels_N: (N,) classes of all images.
        n_keep: number of images that will be kept of each class.
        ratio: candidates per kept image; the first ones of each class are taken, or all of them if it is 0.
    Raises:
        ValueError: a class has too few images.
    """
    needed = n_keep * max(ratio, 1)
    candidates = {}
    for label in np.unique(labels_N).tolist():
        index = np.flatnonzero(labels_N == label)
        if len(index) < needed:
            raise ValueError(f'expected at least {needed} candidates of each class, class {label} has '
                             f'{len(index)}: sample more, or lower --n_keep or --ratio')
        candidates[label] = index[:needed] if ratio else index
    return candidates


def select(candidates: dict[int, np.ndarray], log_prob_N: np.ndarray, n_keep: int,
           threshold: float | None = None) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Choose the candidates to keep: the likeliest of each class, or the first that reach a threshold.

    Of equally likely candidates the first ones are kept.

    Args:
        candidates: indices by class, as returned by `candidates_of`.
        log_prob_N: (N,) log p(label | image) of all images.
        n_keep: number of candidates to keep of each class.
        threshold: log-probability that a kept candidate must have; None keeps the likeliest ones.
    Returns:
        The indices of the kept candidates (K,), ascending; and by class the indices of the candidates that
        count for the ratio, which with a threshold are those up to the last kept one.
    Raises:
        ValueError: in some class too few candidates reach the threshold.
    """
    kept = []
    seen = {}
    for label, index in candidates.items():
        log_prob = log_prob_N[index]
        if threshold is None:
            chosen = np.argsort(-log_prob, kind='stable')[:n_keep]
            end = len(index)
        else:
            chosen = np.flatnonzero(log_prob >= threshold)[:n_keep]
            if len(chosen) < n_keep:
                raise ValueError(f'expected {n_keep} images of each class with log p(y|x) >= {threshold:g}, '
                                 f'class {label} has {len(chosen)} among {len(index)} candidates: '
                                 'sample more, or lower --threshold or --n_keep')
            end = chosen[-1] + 1
        kept.append(index[chosen])
        seen[label] = index[:end]
    return np.sort(np.concatenate(kept)), seen


def evaluate_reject(settings: RejectSettings) -> str | None:
    """`evaluate.py reject`: write the images that are kept, and a manifest.

    Equal inputs and settings give equal files, for any number of processes.

    Returns:
        The text for the reader on the master, None on the other ranks.
    Raises:
        MissingWeights: the classifier has no weights here.
        ValueError: a file cannot be used, or a class has too few candidates.
    """
    # All that can fail comes before hours of judging.
    target = Path(settings.output)
    check_output(target)
    images = open_images(settings.images)
    images[0]  # raises for a compressed npz, which cannot be read in random order
    labels_N = load_labels(images, settings.labels)
    candidates = candidates_of(labels_N, settings.n_keep, settings.ratio)
    classifier = load(settings, labels_N)
    digest, manifest = describe_images(images)
    if classifier.name == 'digits' and dist.is_master():
        logger.warning('scores with --features=digits will flatter what their own network has chosen')

    # Choose, then shuffle: candidates may be sorted by class, and the Inception Score needs a mixed order.
    judgement = judge(images, labels_N, classifier, settings.batch_size)
    kept_K, seen = select(candidates, judgement.log_prob_N, settings.n_keep, settings.threshold)
    if not settings.no_shuffle:
        kept_K = kept_K[shuffled(len(kept_K), settings.seed)]
    seen_N = np.concatenate(list(seen.values()))
    ratio = len(seen_N) / len(kept_K)
    scores = dict(
        candidates=judgement.scores(classifier.num_classes, seen_N),
        kept=judgement.scores(classifier.num_classes, kept_K),
    )

    if dist.is_master():
        kept_images = map_ahead(images.__getitem__, kept_K.tolist(), NUM_READERS)
        write_npz(target, kept_images, len(kept_K), images.height, images.width, labels_N[kept_K])
        rejection = dict(
            classifier=classifier.name,
            classifier_sha256=classifier.digest,
            ratio=ratio,
            n_keep=settings.n_keep,
            threshold=settings.threshold,
            seed=None if settings.no_shuffle else settings.seed,
            batch_size=settings.batch_size,
            source=str(images.path),
            source_sha256=digest,
            scores=scores,
            candidates_per_class={label: len(index) for label, index in seen.items()},
            kept=kept_K.tolist(),  # row r of the npz is candidate kept[r]
        )
        manifest_of_kept = dict(
            num_images=len(kept_K),
            npz=target.name,
            npz_sha256=sha256_of(target),
            rejection=rejection,
            candidates=manifest,
            versions=versions(),
        )
        write_json(target.with_suffix('.json'), manifest_of_kept)
    dist.barrier()
    if not dist.is_master():
        return None

    lines = [
        f'{target}: {len(kept_K):,} of {len(seen_N):,} candidates (ratio {ratio:g}), {settings.n_keep} of '
        f'each of {len(seen)} classes, by {classifier.name} {classifier.digest[:8]}',
    ]
    lines += [f'{name:10} {line(values)}' for name, values in scores.items()]
    lines += [f'warning: {note}' for note in images.warnings]
    return '\n'.join(lines)
