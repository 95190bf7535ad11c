"""Which images every rank sees, in which order: a function of (seed, epoch), resumable at any batch."""
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class EvalDistributedSampler(Sampler):
    """A contiguous share of the data set for each rank, every image exactly once over all ranks."""

    def __init__(self, dataset, num_replicas: int, rank: int):
        bounds = np.linspace(0, len(dataset), num_replicas + 1, dtype=int)
        self.indices = range(bounds[rank], bounds[rank + 1])

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class DistInfiniteBatchSampler(Sampler):
    """Batches of one rank, epoch after epoch without end.

    Args:
        glb_batch_size: images of all ranks per batch.
        same_seed_for_all_ranks: offset of the seed of the order.
        repeated_aug: r > 1 takes the first 1/r of the order, each image r times.
        fill_last: repeat images from the start of the order until the last batch is whole.
        start_ep, start_it: epoch and batch to begin with.
        by_batch: False cuts the epoch into one contiguous run per rank, as published; True (`train.py`) cuts
            every global batch into one run per rank: a step sees the same images for any number of ranks.
        with_epoch: yield (epoch, index) pairs, for data sets whose augmentation depends on the epoch.
    """

    def __init__(self, world_size: int, rank: int, dataset_len: int, glb_batch_size: int,
                 same_seed_for_all_ranks: int = 0, repeated_aug: int = 0, fill_last: bool = False,
                 shuffle: bool = True, start_ep: int = 0, start_it: int = 0, by_batch: bool = False,
                 with_epoch: bool = False):
        if glb_batch_size % world_size:
            raise ValueError(f'a global batch of {glb_batch_size} cannot be shared '
                             f'by {world_size} ranks evenly')
        self.world_size = world_size
        self.rank = rank
        self.dataset_len = dataset_len
        self.glb_batch_size = glb_batch_size
        self.batch_size = glb_batch_size // world_size
        self.seed = same_seed_for_all_ranks
        self.repeated_aug = repeated_aug
        self.fill_last = fill_last
        self.shuffle = shuffle
        self.start_ep = start_ep
        self.start_it = start_it
        self.by_batch = by_batch
        self.with_epoch = with_epoch
        self.iters_per_ep = -(-dataset_len // glb_batch_size)

    def __len__(self) -> int:
        return self.iters_per_ep

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """The order of all ranks together."""
        if not self.shuffle:
            indices = np.arange(self.dataset_len)
        else:
            generator = torch.Generator().manual_seed(epoch + self.seed)
            indices = torch.randperm(self.dataset_len, generator=generator).numpy()
            if self.repeated_aug > 1:
                distinct = -(-self.dataset_len // self.repeated_aug)
                indices = indices[:distinct].repeat(self.repeated_aug)
                indices = indices[:self.iters_per_ep * self.glb_batch_size]
        missing = self.iters_per_ep * self.glb_batch_size - len(indices)
        return np.resize(indices, len(indices) + missing) if self.fill_last and missing > 0 else indices

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """The batches of this rank."""
        indices = self.epoch_indices(epoch)
        if self.by_batch:
            rows = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            return [indices[i + rows.start:i + rows.stop].tolist()
                    for i in range(0, len(indices), self.glb_batch_size)]
        bounds = np.linspace(0, len(indices), self.world_size + 1, dtype=int)
        mine = indices[bounds[self.rank]:bounds[self.rank + 1]]
        return [mine[i:i + self.batch_size].tolist() for i in range(0, len(mine), self.batch_size)]

    def __iter__(self) -> Iterator[list]:
        epoch = self.start_ep
        first = self.start_it
        while True:
            for batch in self.epoch_batches(epoch)[first:]:
                yield [(epoch, index) for index in batch] if self.with_epoch else batch
            epoch = epoch + 1
            first = 0
