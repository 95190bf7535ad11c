"""The images that every rank sees, and their order: a function of (seed, epoch), resumable at any batch."""
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


class EvalDistributedSampler(Sampler):
    """A contiguous part of the data set for each rank, in which every image comes on exactly one rank.

    Args:
        num_replicas: number of ranks.
        rank: of this process.
    """

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
        world_size: number of ranks.
        rank: of this process.
        dataset_len: number of images.
        glb_batch_size: images per batch on all ranks together.
        same_seed_for_all_ranks: is added to the epoch, as the seed of its order.
        repeated_aug: r > 1 takes the first 1/r of the order, each image r times.
        fill_last: whether images from the start of the order are repeated until the last batch is whole.
        shuffle: False keeps the order of the data set.
        start_ep: epoch to begin with.
        start_it: batch of that epoch to begin with.
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
        """Indices of the images of an epoch, in the order of all ranks together."""
        num_images = self.iters_per_ep * self.glb_batch_size
        if not self.shuffle:
            indices = np.arange(self.dataset_len)
        else:
            # Seeded by the epoch, so that a restart finds the same order without replaying the epochs before.
            generator = torch.Generator().manual_seed(epoch + self.seed)
            indices = torch.randperm(self.dataset_len, generator=generator).numpy()
            if self.repeated_aug > 1:
                distinct = -(-self.dataset_len // self.repeated_aug)
                indices = indices[:distinct].repeat(self.repeated_aug)
                indices = indices[:num_images]
        if self.fill_last and len(indices) < num_images:
            indices = np.resize(indices, num_images)  # numpy repeats the array from its start
        return indices

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """The batches of this rank in an epoch, as lists of indices."""
        indices = self.epoch_indices(epoch)
        batches = []
        if self.by_batch:
            begin = self.rank * self.batch_size
            for first in range(0, len(indices), self.glb_batch_size):
                global_batch = indices[first:first + self.glb_batch_size]
                batches.append(global_batch[begin:begin + self.batch_size].tolist())
            return batches
        bounds = np.linspace(0, len(indices), self.world_size + 1, dtype=int)
        own = indices[bounds[self.rank]:bounds[self.rank + 1]]
        for first in range(0, len(own), self.batch_size):
            batches.append(own[first:first + self.batch_size].tolist())
        return batches

    def __iter__(self) -> Iterator[list]:
        epoch = self.start_ep
        first = self.start_it
        while True:
            for batch in self.epoch_batches(epoch)[first:]:
                if self.with_epoch:
                    yield [(epoch, index) for index in batch]
                else:
                    yield batch
            epoch += 1
            first = 0
