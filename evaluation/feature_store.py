"""Features of sets of images, each computed once by each encoder, and kept on disk for later runs.

An entry is named by a hash of all that it depends on: images, weights, and how the encoder computes. It is an
npz file with statistics; where single images are compared, their features lie beside it as an .npy file,
which is mapped into memory and never read as a whole. Letters: N images, F features.
"""
import hashlib
import logging
import os
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dist
from evaluation.features import extract, read_cache, write_cache
from evaluation.settings import FeatureSettings, ScoreSettings
from utils.hub import sha256_of
from utils.image_sets import ImageSet

logger = logging.getLogger(__name__)
STORE_VERSION = 1  # raise it when extraction changes, so that stored features are computed again


@dataclass
class SetFeatures:
    """What an encoder makes of all images of a set; on the master alone.

    Attributes:
        count: N.
        statistics: (mean (F,), covariance (F, F)) float64 by suffix: '' for pool features, '_s' for spatial
            ones.
        rows_NF: float32 pool features, mapped from a file; None where nobody needs them.
        inception_scores: in chunks, and of all images as one chunk; None where the encoder has no classes.
        warnings: what makes the images doubtful, one line each.
    """

    count: int
    statistics: dict[str, tuple[torch.Tensor, torch.Tensor]]
    rows_NF: torch.Tensor | None
    inception_scores: tuple[float, float] | None
    warnings: list[str]


class FeatureStore:
    """Gives the features of a set by an encoder: from a folder if they are there, else by computing them.

    Args:
        settings: of the command, with the folder of the cache; an empty one keeps features until the end.
        split_size: images per chunk of the Inception Score.
        with_rows: names of the encoders whose features of single images are needed.
    """

    def __init__(self, settings: FeatureSettings, split_size: int, with_rows: set[str]):
        self.settings = settings
        self.split_size = split_size
        self.with_rows = with_rows
        self.temporary = None
        self.folder = Path(settings.cache)
        try:
            if not settings.cache:
                raise OSError('--cache is empty')
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            if settings.cache:
                logger.warning('cannot keep features in %s (%s): the next run computes them again',
                               self.folder, error.strerror or error)
            self.temporary = tempfile.TemporaryDirectory()  # lives as long as this object
            self.folder = Path(self.temporary.name)

    def get(self, images: ImageSet, digest: str, network: Any, name: str) -> SetFeatures | None:
        """The features of a set; every rank calls it, and the master gets them.

        Args:
            digest: SHA-256 of the set.
            network: see `evaluation.features`.
            name: what warnings call the set.
        Raises:
            ValueError: an image cannot be read, or gives features that are not finite.
        """
        needs_rows = network.name in self.with_rows
        variant = getattr(network, 'variant', self.settings.dtype)
        # Without classes there is no Inception Score. Keys of earlier versions had its chunks all the same,
        # which were most often the default, so that their entries are found.
        split_size = self.split_size if network.num_classes else ScoreSettings.split_size
        text = f'{digest} {network.name} {network.digest} {variant} {STORE_VERSION} {split_size}'
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        path = self.folder / f'set-{key}.npz'
        found = None
        if dist.is_master():
            found = self._read(path, network, images.count, needs_rows)

        # Only the master reads the folder, so it decides for all ranks whether they must compute.
        if not dist.allgather_object(found is not None)[0]:
            self._compute(path, images, network, needs_rows)
            failure = None
            if dist.is_master():
                found = self._read(path, network, images.count, needs_rows)
                if found is None:
                    failure = ValueError(f'expected to keep features in {self.folder}, cannot read what was '
                                         'written: free some space, or pass another --cache')
            dist.raise_together(failure)
        if found is not None:
            found.warnings = [f'{name}: {note}' for note in found.warnings]
        return found

    def _read(self, path: Path, network: Any, count: int, needs_rows: bool) -> SetFeatures | None:
        """The entry at `path`; None if there is none, or it is damaged, or lacks rows that are needed."""
        names = ['mu', 'sigma', 'warnings', 'rows_sha256']
        if network.num_spatial:
            names += ['mu_s', 'sigma_s']
        if network.num_classes:
            names.append('inception_scores')
        arrays = read_cache(path, names)
        if arrays is None:
            return None
        rows_NF = None
        if needs_rows:
            digest = str(arrays['rows_sha256'])
            if not digest:
                return None  # an earlier run needed the statistics alone
            rows_NF = _mapped(path.with_suffix('.npy'), digest, (count, len(arrays['mu'])))
            if rows_NF is None:
                return None
        statistics = {}
        for suffix in ('', '_s'):
            if f'mu{suffix}' in arrays:
                pair = (arrays[f'mu{suffix}'], arrays[f'sigma{suffix}'])
                statistics[suffix] = (torch.from_numpy(pair[0]), torch.from_numpy(pair[1]))
        scores = None
        if 'inception_scores' in arrays:
            scores = tuple(arrays['inception_scores'].tolist())
        return SetFeatures(count, statistics, rows_NF, scores, arrays['warnings'].tolist())

    def _compute(self, path: Path, images: ImageSet, network: Any, needs_rows: bool) -> None:
        """Compute an entry on all ranks, and write it on the master."""
        split_size = self.split_size if network.num_classes else 0
        files = _RowFiles(self.folder)
        try:
            features, inspection = extract(images, network, self.settings, split_size, needs_rows, files.new)
            if not dist.is_master():
                return
            arrays = features.arrays()
            if features.score is not None:
                arrays['inception_scores'] = np.array(features.score.scores())
            notes = [line.partition(': ')[2] for line in inspection.warnings('set')]
            arrays['warnings'] = np.array(notes, dtype=str)

            # The rows come first: an entry is there once its npz is, which names the digest of the rows.
            digest = ''
            if needs_rows:
                digest = files.keep(path.with_suffix('.npy'))
            arrays['rows_sha256'] = np.array(digest)
            write_cache(path, arrays)
        finally:
            files.remove()


class _RowFiles:
    """Tensors in temporary files of a folder, the last of which may be kept.

    Every rank makes one for its own rows; the master, where there are several ranks, another one for all
    rows.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths: list[Path] = []

    def new(self, num_rows: int, num_features: int) -> torch.Tensor:
        """A float32 tensor of zeros whose memory is that of a new .npy file.

        Raises:
            OSError: the disk is full.
        """
        path = self.folder / f'.{uuid.uuid4().hex}.tmp'
        self.paths.append(path)
        array = np.lib.format.open_memmap(path, 'w+', np.float32, (num_rows, num_features))
        # The file has holes so far. Writing to one on a full disk would end this process by a signal.
        if hasattr(os, 'posix_fallocate'):
            with path.open('r+b') as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return torch.from_numpy(array)

    def keep(self, target: Path) -> str:
        """Give the last file its name, and return its SHA-256."""
        path = self.paths.pop()
        digest = sha256_of(path)
        path.replace(target)
        return digest

    def remove(self) -> None:
        """Remove all files that were not kept."""
        for path in self.paths:
            with suppress(OSError):
                path.unlink()


def _mapped(path: Path, digest: str, shape: tuple[int, int]) -> torch.Tensor | None:
    """The rows in a file as a tensor over its map; None with a warning if the file is damaged or missing."""
    try:
        if sha256_of(path) != digest:
            raise ValueError('its bytes are not those that were written')
        # The map is private: torch has no tensors that cannot be written.
        rows = np.load(path, mmap_mode='c')
        if rows.shape != shape or rows.dtype != np.float32:
            raise ValueError(f'it holds {rows.dtype} of shape {rows.shape}')
    except (OSError, EOFError, ValueError) as error:
        logger.warning('cannot use %s (%s): the features are computed again', path, error)
        return None
    return torch.from_numpy(rows)
