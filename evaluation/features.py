"""Features of whole sets of images: extraction over batches and ranks, statistics, warnings about a set.

A feature network has `name`, `digest` (SHA-256 of its weights), `num_features`, `num_spatial` (0 = none),
`num_classes`, and `outputs(images_u8)`; see `evaluation.inception.InceptionFeatures`.
Letters: B batch, N images, F features, H W height and width.
"""
import hashlib
import logging
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dist
from evaluation.digits_features import DigitsFeatures
from evaluation.encoders import EncoderFeatures
from evaluation.inception import InceptionFeatures
from evaluation.metrics import FeatureStatistics, InceptionScore
from evaluation.settings import DeviceSettings, FeatureSettings
from utils.image_sets import ImageSet
from utils.log import progress_bar

logger = logging.getLogger(__name__)
NewRows = Callable[[int, int], torch.Tensor]  # (N, F) -> a tensor for as many rows: float32, on the CPU
MAX_ODD_FRACTION = 0.01  # of constant or repeated images; a set with more of them gets a warning


def torch_device(settings: DeviceSettings) -> torch.device:
    """The device of a command on this rank.

    Raises:
        ValueError: CUDA was asked for, and there is none.
    """
    here = dist.get_device()
    if settings.device == 'cuda' and here.type != 'cuda':
        raise ValueError('--device=cuda, but torch finds no CUDA device: leave it out')
    return torch.device('cpu') if settings.device == 'cpu' else here


def load_network(settings: FeatureSettings, encoder: str = '') -> Any:
    """The feature network; the first process of a node downloads what is missing. Every rank calls it.

    Args:
        encoder: of `evaluation.encoders.ENCODERS`; empty is the one that --features names.
    Raises (on all ranks, if on one of them):
        MissingWeights: there are no weights.
        ValueError: the weights are damaged or not the published ones.
    """
    encoder = encoder or settings.features
    if encoder == 'digits':
        return DigitsFeatures(torch_device(settings))

    def load(is_first: bool) -> InceptionFeatures | EncoderFeatures:
        may_download = is_first and not settings.offline
        if encoder != 'inception':
            return EncoderFeatures(
                encoder,
                torch_device(settings),
                settings.encoder_weights,
                settings.cache,
                may_download,
                settings.encoder_dtype,
                settings.allow_unverified_weights,
            )
        return InceptionFeatures(settings.inception_weights, torch_device(settings),
                                 settings.allow_unverified_weights, settings.cache, may_download,
                                 settings.dtype)

    return dist.first_of_node_first(load)


# ---------------------------------------------------------------------------------------------- one set
class FeatureSet:
    """Streams images through a network: `add` on any rank, `reduce` once on all, then read.

    Args:
        network: see the top of this file.
        num_images: number of images on all ranks together; they are numbered 0 .. num_images - 1.
        device: where the network is and the statistics are summed.
        split_size: images per chunk of the Inception Score; 0 leaves the score out.
        num_rows: number of images of this rank whose pool features are kept, for precision and recall: all
            images or 0.
        new_rows: makes the tensors for these features; by default they are in memory.
    Attributes:
        pool: statistics of pool features.
        spatial: statistics of spatial features; None if the network has none.
        score: the Inception Score; None if it is left out.
        rows_NF: the pool features that are kept, float32 on the CPU; after `reduce` those of all images on
            the master, and none on the other ranks.
    """

    def __init__(self, network: Any, num_images: int, device: torch.device, split_size: int = 0,
                 num_rows: int = 0, new_rows: NewRows = torch.empty):
        self.network = network
        self.device = device
        self.pool = FeatureStatistics(network.num_features, device)
        self.spatial = None
        if network.num_spatial:
            self.spatial = FeatureStatistics(network.num_spatial, device)
        self.score = None
        if split_size:
            self.score = InceptionScore(num_images, network.num_classes, split_size, device)
        self.new_rows = new_rows
        self.rows_NF = torch.empty(0, network.num_features)
        if num_rows:
            self.rows_NF = new_rows(num_rows, network.num_features)
        self.num_filled = 0

    @torch.inference_mode()
    def add(self, images_u8: torch.Tensor, first: int) -> None:
        """Add the images first, first + 1, ... of the set; a rank adds its own images in their order.

        Args:
            images_u8: uint8 (B, 3, H, W).
            first: number of the first of these images in the set.
        Raises:
            ValueError: an image has features that are not finite.
        """
        images_u8 = images_u8.to(self.device, non_blocking=True).contiguous()
        out = self.network.outputs(images_u8)
        self.pool.add(out.pool, first)
        if self.spatial is not None:
            self.spatial.add(out.spatial, first)
        if self.score is not None:
            self.score.add(out.logits, first)
        if len(self.rows_NF):
            end = self.num_filled + len(out.pool)
            self.rows_NF[self.num_filled:end] = out.pool.cpu()
            self.num_filled = end

    def reduce(self) -> None:
        """Gather what all ranks have seen; every rank calls it, once."""
        self.pool.reduce()
        if self.spatial is not None:
            self.spatial.reduce()
        if self.score is not None:
            self.score.reduce()
        self.rows_NF = gather_rows(self.rows_NF, self.device, self.new_rows)

    def statistics(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(mean (F,), covariance (F, F)) by suffix: '' for pool features and '_s' for spatial ones."""
        statistics = {'': (self.pool.mean, self.pool.covariance())}
        if self.spatial is not None:
            statistics['_s'] = (self.spatial.mean, self.spatial.covariance())
        return statistics

    def arrays(self) -> dict[str, np.ndarray]:
        """The statistics as a file holds them: mu, sigma and, with spatial features, mu_s, sigma_s."""
        arrays = {}
        for suffix, (mean, covariance) in self.statistics().items():
            arrays[f'mu{suffix}'] = mean.cpu().numpy()
            arrays[f'sigma{suffix}'] = covariance.cpu().numpy()
        return arrays


def gather_rows(rows_NF: torch.Tensor, device: torch.device,
                new_rows: NewRows = torch.empty) -> torch.Tensor:
    """The rows of every rank, in the order of ranks, on the master; (0, F) on the other ranks.

    Every rank calls it. The rows travel in pieces of at most 1,000, so that a GPU need not hold all of them.

    Args:
        rows_NF: float32 (N, F) rows of this rank on the CPU.
        device: through which the pieces travel.
        new_rows: makes the tensor for all rows, on the master.
    """
    counts = dist.allgather_object(len(rows_NF))
    if len(counts) == 1 or not sum(counts):
        return rows_NF
    num_features = rows_NF.shape[1]
    gathered = torch.empty(0, num_features)
    if dist.is_master():
        gathered = new_rows(sum(counts), num_features)
    begin = 0
    for rank, count in enumerate(counts):
        for first in range(0, count, 1000):
            if rank == dist.get_rank():
                piece = rows_NF[first:first + 1000].to(device)
            else:
                piece = torch.empty(min(1000, count - first), num_features, device=device)
            dist.broadcast(piece, src_rank=rank)
            if dist.is_master():
                gathered[begin:begin + len(piece)] = piece.cpu()
            begin += len(piece)
    return gathered


class Inspection:
    """Looks for what makes a set of images doubtful: `add` on any rank, `reduce` once on all."""

    def __init__(self):
        self.digests = []
        self.num_constant = 0
        self.num_grey = 0

    def add(self, images_NHW3: np.ndarray) -> None:
        """Look at images, uint8 (N, H, W, 3)."""
        for image_HW3 in images_NHW3:
            digest, is_constant, is_grey = _inspect(image_HW3)
            self.digests.append(digest)
            if is_constant:
                self.num_constant += 1
            if is_grey:
                self.num_grey += 1

    def reduce(self) -> None:
        """Gather what all ranks have seen; every rank calls it, once."""
        parts = dist.allgather_object((self.digests, self.num_constant, self.num_grey))
        self.digests = []
        self.num_constant = 0
        self.num_grey = 0
        for digests, num_constant, num_grey in parts:
            self.digests += digests
            self.num_constant += num_constant
            self.num_grey += num_grey

    def warnings(self, name: str) -> list[str]:
        """One line for each thing that makes scores doubtful.

        Args:
            name: what the lines call the set.
        """
        total = len(self.digests)
        found = []
        repeated = total - len(set(self.digests))
        for count, what in ((repeated, 'repeat another image'), (self.num_constant, 'have one colour only')):
            if count > MAX_ODD_FRACTION * total:
                found.append(f'{name}: {count} of {total} images {what}')
        if total and self.num_grey == total:
            found.append(f'{name}: all images are grey (R = G = B)')
        return found


def _inspect(image_HW3: np.ndarray) -> tuple[bytes, bool, bool]:
    """Digest of an image, whether it has one colour only, and whether it is grey."""
    # SHA-1 is the fastest digest here, as processors have instructions for it.
    values = image_HW3.reshape(-1)
    digest = hashlib.sha1(values, usedforsecurity=False).digest()[:8]

    # The values lie in memory as R G B R G B ..., and numpy compares neighbours in memory fastest. In an
    # image of one colour every value equals the third one after it; in a grey one R equals G and G equals B.
    is_constant = bool((values[3:] == values[:-3]).all())
    repeats = values[1:] == values[:-1]
    is_grey = bool(repeats[::3].all() and repeats[1::3].all())
    return digest, is_constant, is_grey


# ---------------------------------------------------------------------------------------------- extraction
def rank_range(count: int) -> tuple[int, int]:
    """The part of `count` images that this rank works on: its first image, and the one after its last.

    The parts of all ranks are contiguous and in the order of ranks; a part may be empty.
    """
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    begin = count * rank // world_size
    end = count * (rank + 1) // world_size
    return begin, end


def read_ahead(items: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, made by a thread while the caller works on earlier ones.

    Unlike `utils.image_store.map_ahead`, which makes items independently in several threads, it takes from an
    iterator, such as an open file, whose items come one after the other.

    Args:
        depth: number of items that are made ahead.
    """
    iterator = iter(items)
    end = object()  # what `next` gives after the last item; no item is this object
    with ThreadPoolExecutor(1) as thread:
        pending = [thread.submit(next, iterator, end) for _ in range(depth)]
        while (item := pending.pop(0).result()) is not end:
            pending.append(thread.submit(next, iterator, end))
            yield item


def extract(image_set: ImageSet, network: Any, settings: FeatureSettings, split_size: int = 0,
            keep_rows: bool = False, new_rows: NewRows = torch.empty) -> tuple[FeatureSet, Inspection]:
    """Features of all images of a file or folder, computed by all ranks together; every rank calls it.

    Args:
        split_size: images per chunk of the Inception Score; 0 leaves the score out.
        keep_rows: whether the pool features of the images are kept, for precision and recall.
        new_rows: makes the tensors for them; by default they are in memory.
    Returns:
        (features, inspection), both reduced.
    Raises:
        ValueError: an image cannot be read, or gives features that are not finite.
    """
    device = torch_device(settings)
    begin, end = rank_range(image_set.count)
    num_rows = end - begin if keep_rows else 0
    features = FeatureSet(network, image_set.count, device, split_size, num_rows, new_rows)
    inspection = Inspection()

    # A thread reads and inspects the next images while the network works on these.
    def batches() -> Iterator[torch.Tensor]:
        for images_NHW3 in image_set.blocks(begin, end, settings.batch_size):
            inspection.add(images_NHW3)
            images = torch.from_numpy(images_NHW3)
            if device.type == 'cuda':
                images = images.pin_memory()
            yield images.permute(0, 3, 1, 2)  # a view: the device copies it into this order faster than numpy

    first = begin
    with progress_bar(end - begin, image_set.path.name) as bar:
        for images_u8 in read_ahead(batches()):
            try:
                features.add(images_u8, first)
            except ValueError as error:
                raise ValueError(f'{image_set.path}: {error}') from None
            first += len(images_u8)
            bar.update(len(images_u8))

    # From here on the statistics are those of the images of all ranks.
    features.reduce()
    inspection.reduce()
    return features, inspection


# ---------------------------------------------------------------------------------------------- cache
def read_cache(path: Path, names: list[str]) -> dict[str, np.ndarray] | None:
    """Arrays that an earlier run wrote; None if there is no such file, or if it cannot be read."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as archive:
            return {name: archive[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning('cannot read %s (%s): the features of the reference are computed again', path, error)
        return None


def write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays for later runs; only a warning if the folder cannot be written.

    Several runs may write the same file at once: each has a temporary file of its own, and the last one wins.
    """
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
