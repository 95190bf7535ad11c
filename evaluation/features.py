"""Features of whole sets of images: extraction over batches and ranks, statistics, what is odd about a set.

A feature network has `name`, `digest` (SHA-256 of its weights), `num_features`, `num_spatial` (0 = none),
`num_classes`, and `outputs(images_u8)`; see `evaluation.inception.InceptionFeatures`.
Letters: B batch, N images, F features, H W height and width.
"""
import hashlib
import logging
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dist
from configs.options import INF, REPO, check_values, expand_paths, opt
from evaluation.digits_features import DigitsFeatures
from evaluation.inception import InceptionFeatures
from evaluation.metrics import FeatureStatistics, InceptionScore
from utils.batches import ImageBatch
from utils.log import progress_bar

logger = logging.getLogger(__name__)
NETWORKS = ('inception', 'digits')
ODD_SHARE = 0.01  # of constant or repeated images, above which a set is worth a warning


@dataclass(frozen=True)
class DeviceSettings:
    """Where a command runs."""

    batch_size: int = opt(64, 'images per batch and rank', 'bs', limits=(1, INF))
    device: str = opt('', 'cpu or cuda; empty takes cuda where there is one', choices=('', 'cpu', 'cuda'))

    def __post_init__(self):
        expand_paths(self)
        check_values(self)

    @property
    def torch_device(self) -> torch.device:
        """The device of this rank."""
        here = dist.get_device()
        if self.device == 'cuda' and here.type != 'cuda':
            raise ValueError('--device=cuda, but torch finds no CUDA device: leave it out')
        return torch.device('cpu') if self.device == 'cpu' else here


@dataclass(frozen=True)
class FeatureSettings(DeviceSettings):
    """The feature network of a command, and how it runs."""

    features: str = opt('inception', 'network: inception, or digits, which needs no file, for digits alone',
                        choices=NETWORKS)
    inception_weights: str = opt('', 'its published weights; empty searches $INCEPTION_WEIGHTS, the cache, '
                                     "torch's hub folder, then downloads", path=True)
    allow_unverified_weights: bool = opt(False, 'accept other weights: the scores compare with nothing')
    offline: bool = opt(False, 'never download')
    cache: str = opt(str(REPO / 'local_output' / 'cache'), 'folder for weights and features of references',
                     path=True)
    dtype: str = opt('float32', 'of the network: float32 or float64', choices=('float32', 'float64'))


def load_network(settings: FeatureSettings) -> Any:
    """The feature network; the first process of a node downloads what is missing. Every rank calls it.

    Raises (on all ranks, if on one):
        MissingWeights: there are none.
        ValueError: they are damaged or not the published ones.
    """
    if settings.features == 'digits':
        return DigitsFeatures(settings.torch_device)
    return dist.first_of_node_first(lambda is_first: InceptionFeatures(
        settings.inception_weights, settings.torch_device, settings.allow_unverified_weights, settings.cache,
        is_first and not settings.offline, settings.dtype))


# ---------------------------------------------------------------------------------------------- one set
class FeatureSet:
    """Streams images through a network: `add` on any rank, `reduce` once on all, then read.

    Args:
        num_images: of all ranks; images are numbered 0 .. num_images - 1.
        split_size: images per chunk of the Inception Score; 0 leaves it out.
        num_rows: images of this rank whose pool features are kept, for precision and recall: all or none.
    Attributes:
        rows_NF: these features, float32 on the CPU; after `reduce` those of all images, on the master alone.
    """

    def __init__(self, network: Any, num_images: int, device: torch.device, split_size: int = 0,
                 num_rows: int = 0):
        self.network = network
        self.device = device
        self.pool = FeatureStatistics(network.num_features, device)
        self.spatial = FeatureStatistics(network.num_spatial, device) if network.num_spatial else None
        self.score = None
        if split_size:
            self.score = InceptionScore(num_images, network.num_classes, split_size, device)
        self.rows_NF = torch.empty(num_rows, network.num_features)
        self.num_filled = 0

    @torch.inference_mode()
    def add(self, images_u8: torch.Tensor, first: int) -> None:
        """Take in images first, first + 1, ... of the set; a rank adds its own in their order.

        Args:
            images_u8: uint8 (B, 3, H, W).
        Raises:
            ValueError: an image has features that are not finite.
        """
        out = self.network.outputs(images_u8.to(self.device, non_blocking=True).contiguous())
        self.pool.add(out.pool, first)
        if self.spatial is not None:
            self.spatial.add(out.spatial, first)
        if self.score is not None:
            self.score.add(out.logits, first)
        if len(self.rows_NF):
            self.rows_NF[self.num_filled:self.num_filled + len(out.pool)] = out.pool.cpu()
            self.num_filled += len(out.pool)

    def reduce(self) -> None:
        """Gather what all ranks have seen; every rank calls it, once."""
        self.pool.reduce()
        if self.spatial is not None:
            self.spatial.reduce()
        if self.score is not None:
            self.score.reduce()
        self.rows_NF = gather_rows(self.rows_NF, self.device)

    def statistics(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Mean and covariance under '' for pool features and '_s' for spatial ones."""
        named = {'': self.pool} | ({'_s': self.spatial} if self.spatial is not None else {})
        return {suffix: (part.mean, part.covariance()) for suffix, part in named.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """The same as a file holds them: mu, sigma and, with spatial features, mu_s, sigma_s."""
        return {f'{key}{suffix}': t.cpu().numpy() for suffix, pair in self.statistics().items()
                for key, t in zip(('mu', 'sigma'), pair, strict=True)}


def gather_rows(rows_NF: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows of every rank in rank order on the master, none elsewhere; pieces of at most 1,000 travel."""
    counts = dist.allgather_object(len(rows_NF))
    if len(counts) == 1 or not sum(counts):
        return rows_NF
    gathered = torch.empty(sum(counts) if dist.is_master() else 0, rows_NF.shape[1])
    begin = 0
    for rank, count in enumerate(counts):
        for first in range(0, count, 1000):
            piece = rows_NF[first:first + 1000].to(device) if rank == dist.get_rank() else \
                torch.empty(min(1000, count - first), rows_NF.shape[1], device=device)
            dist.broadcast(piece, src_rank=rank)
            if dist.is_master():
                gathered[begin:begin + len(piece)] = piece.cpu()
            begin += len(piece)
    return gathered


class Inspection:
    """What is odd about a set of images: `add` on any rank, `reduce` once on all."""

    def __init__(self):
        self.digests = []
        self.num_constant = 0
        self.num_grey = 0

    def add(self, images_NHW3: np.ndarray) -> None:
        for digest, is_constant, is_grey in map(_inspect, images_NHW3):
            self.digests.append(digest)
            self.num_constant += is_constant
            self.num_grey += is_grey

    def reduce(self) -> None:
        parts = dist.allgather_object((self.digests, self.num_constant, self.num_grey))
        self.digests = [digest for part in parts for digest in part[0]]
        self.num_constant, self.num_grey = (sum(part[i] for part in parts) for i in (1, 2))

    def warnings(self, name: str) -> list[str]:
        """One line for each thing that makes scores doubtful."""
        total = len(self.digests)
        found = []
        repeated = total - len(set(self.digests))
        for count, what in ((repeated, 'repeat another image'), (self.num_constant, 'have one colour only')):
            if count > ODD_SHARE * total:
                found.append(f'{name}: {count} of {total} images {what}')
        if total and self.num_grey == total:
            found.append(f'{name}: all images are grey (R = G = B)')
        return found


def _inspect(image_HW3: np.ndarray) -> tuple[bytes, bool, bool]:
    """Digest of an image, whether it has one colour only, and whether it is grey."""
    values = image_HW3.reshape(-1)  # R G B R G B ...: numpy compares neighbours in memory fastest
    repeats = values[1:] == values[:-1]
    return (hashlib.sha1(values, usedforsecurity=False).digest()[:8],  # processors have instructions for it
            bool((values[3:] == values[:-3]).all()), bool(repeats[::3].all() and repeats[1::3].all()))


# ---------------------------------------------------------------------------------------------- extraction
def rank_range(count: int) -> tuple[int, int]:
    """First image of this rank, and the one after its last: contiguous, none twice, maybe none at all."""
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    return count * rank // world_size, count * (rank + 1) // world_size


def read_ahead(items: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, made by a thread while the caller works on earlier ones."""
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(1) as thread:
        pending = [thread.submit(next, iterator, end) for _ in range(depth)]
        while (item := pending.pop(0).result()) is not end:
            pending.append(thread.submit(next, iterator, end))
            yield item


def extract(batch: ImageBatch, network: Any, settings: FeatureSettings, split_size: int = 0,
            keep_rows: bool = False) -> tuple[FeatureSet, Inspection]:
    """Features of all images of a file or folder, shared among the ranks; every rank calls it.

    Returns:
        (reduced features, reduced inspection).
    Raises:
        ValueError: an image cannot be read, or gives features that are not finite.
    """
    device = settings.torch_device
    begin, end = rank_range(batch.count)
    num_rows = end - begin if keep_rows else 0
    features = FeatureSet(network, batch.count, device, split_size, num_rows)
    inspection = Inspection()

    def tensors() -> Iterator[torch.Tensor]:
        for images_NHW3 in batch.blocks(begin, end, settings.batch_size):
            inspection.add(images_NHW3)
            images = torch.from_numpy(images_NHW3)
            images = images.pin_memory() if device.type == 'cuda' else images
            yield images.permute(0, 3, 1, 2)  # the device brings them into this order, faster than numpy

    first = begin
    with progress_bar(end - begin, batch.path.name) as bar:
        for images_u8 in read_ahead(tensors()):
            try:
                features.add(images_u8, first)
            except ValueError as error:
                raise ValueError(f'{batch.path}: {error}') from None
            first += len(images_u8)
            bar.update(len(images_u8))
    features.reduce()
    inspection.reduce()
    return features, inspection


# ---------------------------------------------------------------------------------------------- cache
def read_cache(path: Path, names: list[str]) -> dict[str, np.ndarray] | None:
    """Arrays that an earlier run kept; None if there are none, or if they cannot be read."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as archive:
            return {name: archive[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning('cannot read %s (%s): the features of the reference are computed again', path, error)
        return None


def write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Keep arrays for later runs, if the folder can be written; runs at once do not disturb each other."""
    temporary = path.with_name(f'.{uuid.uuid4().hex}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open('wb') as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError as error:
        logger.warning('cannot keep the features of the reference in %s (%s): the next run computes them '
                       'again', path, error.strerror or error)
    finally:
        with suppress(OSError):
            temporary.unlink()
