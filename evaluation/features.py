"""Features of whole sets of images: extraction over batches and ranks, statistics, what is odd about a set.

A feature network has `name`, `digest` (SHA-256 of its weights), `num_features`, `num_spatial` (0 = none),
`num_classes`, and `outputs(images_u8)`; see `utils.inception.InceptionFeatures`.
Letters: B batch, N images, F features, H W height and width.
"""
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import dist
from utils.arg_util import opt
from utils.batches import ImageBatch
from utils.digits import DigitsFeatures
from utils.inception import InceptionFeatures
from utils.log import progress_bar
from utils.metrics import FeatureStatistics, InceptionScore
from utils.recipe import REPO

NETWORKS = ('inception', 'digits')
ODD_SHARE = 0.01  # of constant or repeated images, above which a set is worth a warning


@dataclass(frozen=True)
class FeatureSettings:
    """The feature network of a command, and how it runs."""

    features: str = opt('inception', 'network: inception, or digits, which needs no file, for digits alone')
    inception_weights: str = opt('', 'its published weights; empty searches $INCEPTION_WEIGHTS, the cache, '
                                     "torch's hub folder, then downloads")
    allow_unverified_weights: bool = opt(False, 'accept other weights: the scores compare with nothing')
    offline: bool = opt(False, 'never download')
    cache: str = opt(str(REPO / 'local_output' / 'cache'), 'folder for weights and features of references')
    batch_size: int = opt(64, 'images per batch and rank; does not change the scores', 'bs')
    device: str = opt('', 'cpu or cuda; empty takes cuda where there is one')
    dtype: str = opt('float32', 'of the network: float32 or float64')

    def __post_init__(self):
        choices = dict(features=NETWORKS, device=('', 'cpu', 'cuda'), dtype=('float32', 'float64'))
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'--{name} must be one of {", ".join(filter(None, allowed))}, '
                                 f'got {getattr(self, name)!r}')

    @property
    def torch_device(self) -> torch.device:
        """The device of this rank."""
        here = dist.get_device()
        if self.device == 'cuda' and here.type != 'cuda':
            raise ValueError('--device=cuda, but torch finds no CUDA device: leave it out')
        return torch.device('cpu') if self.device == 'cpu' else here


def load_network(settings: FeatureSettings) -> Any:
    """The feature network; the first process of a node downloads what is missing. Every rank calls it.

    Raises (on all ranks, if on one):
        MissingWeights: there are none.
        ValueError: they are damaged or not the published ones.
    """
    if settings.features == 'digits':
        return DigitsFeatures(settings.torch_device)
    network, failure = None, None
    for is_first in (True, False):
        if dist.is_local_master() == is_first:
            try:
                network = InceptionFeatures(
                    settings.inception_weights, settings.torch_device, settings.allow_unverified_weights,
                    settings.cache, is_first and not settings.offline, settings.dtype)
            except ValueError as error:
                failure = error
        dist.barrier()
    for of_a_rank in filter(None, dist.allgather_object(failure)):
        raise of_a_rank
    return network


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
        self.network, self.device = network, device
        self.pool = FeatureStatistics(network.num_features, device)
        self.spatial = FeatureStatistics(network.num_spatial, device) if network.num_spatial else None
        self.score = None
        if split_size:
            self.score = InceptionScore(num_images, network.num_classes, split_size, device)
        self.rows_NF, self.num_filled = torch.empty(num_rows, network.num_features), 0

    @torch.inference_mode()
    def add(self, images_u8: torch.Tensor, first: int) -> None:
        """Take in images first, first + 1, ... of the set; a rank adds its own in their order.

        Args:
            images_u8: uint8 (B, 3, H, W).
        Raises:
            ValueError: an image has features that are not finite.
        """
        out = self.network.outputs(images_u8.to(self.device, non_blocking=True))
        finite_B = out.pool.isfinite().all(1)
        if out.spatial is not None:
            finite_B &= out.spatial.isfinite().all(1)
        if not finite_B.all():
            raise ValueError(f'expected finite features, image {first + finite_B.int().argmin().item()} '
                             'gives nan or infinite ones: check its pixels and the weights')
        self.pool.add(out.pool)
        if self.spatial is not None:
            self.spatial.add(out.spatial)
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


def gather_rows(rows_NF: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows of every rank in rank order on the master, none elsewhere; pieces of at most 1,000 travel."""
    counts = dist.allgather_object(len(rows_NF))
    if len(counts) == 1 or not sum(counts):
        return rows_NF
    gathered, begin = torch.empty(sum(counts) if dist.is_master() else 0, rows_NF.shape[1]), 0
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
        self.digests, self.num_constant, self.num_grey = [], 0, 0

    def add(self, images_NHW3: np.ndarray) -> None:
        for image in images_NHW3:
            grey = bool((image[..., :1] == image[..., 1:]).all())
            self.num_grey += grey
            self.num_constant += bool((image == image[:1, :1]).all())
            self.digests.append(hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest())

    def reduce(self) -> None:
        parts = dist.allgather_object((self.digests, self.num_constant, self.num_grey))
        self.digests = [digest for part in parts for digest in part[0]]
        self.num_constant, self.num_grey = (sum(part[i] for part in parts) for i in (1, 2))

    def warnings(self, name: str) -> list[str]:
        """One line for each thing that makes scores doubtful."""
        total, found = len(self.digests), []
        repeated = total - len(set(self.digests))
        for count, what in ((repeated, 'repeat another image'), (self.num_constant, 'have one colour only')):
            if count > ODD_SHARE * total:
                found.append(f'{name}: {count} of {total} images {what}')
        if total and self.num_grey == total:
            found.append(f'{name}: all images are grey (R = G = B)')
        return found


# ---------------------------------------------------------------------------------------------- extraction
def share(count: int) -> tuple[int, int]:
    """First image of this rank, and the one after its last: contiguous, none twice, maybe none at all."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return count * rank // world_size, count * (rank + 1) // world_size


def read_ahead(items: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, made by a thread while the caller works on earlier ones."""
    iterator, end = iter(items), object()
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
    device, (begin, end) = settings.torch_device, share(batch.count)
    num_rows = end - begin if keep_rows else 0
    features, inspection = FeatureSet(network, batch.count, device, split_size, num_rows), Inspection()

    def tensors() -> Iterator[torch.Tensor]:
        for images_NHW3 in batch.blocks(begin, end, settings.batch_size):
            inspection.add(images_NHW3)
            images_u8 = torch.from_numpy(np.ascontiguousarray(images_NHW3.transpose(0, 3, 1, 2)))
            yield images_u8.pin_memory() if device.type == 'cuda' else images_u8

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
