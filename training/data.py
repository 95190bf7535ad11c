"""What a training reads: images or stored tokens, in which order, in which batches."""
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

import dist
from configs import Recipe
from models import Trainable
from utils.data import KeyedAugmentation, build_dataset, build_transforms, describe_data, open_split
from utils.data_sampler import DistInfiniteBatchSampler, EvalDistributedSampler
from utils.loading import restarting_batches, without_child_signal
from utils.stop import leave_signals_to_parent
from utils.token_cache import TokenCache, weights_digest

logger = logging.getLogger(__name__)
CALIBRATION_IMAGES = 10_000  # training images that a tokenizer is calibrated on


@dataclass
class Data:
    """The images of a training, or stored tokens in their place.

    Attributes:
        classes: names of the classes, by label.
        caches: those of `train` and `val` that are stored tokens, by split.
    """
    train: Dataset
    val: Dataset
    classes: list[str]
    caches: dict[str, TokenCache] = field(default_factory=dict)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Number and digest of the images of both splits, as a checkpoint keeps them."""
        return dict(train=describe_data(self.train), val=describe_data(self.val))


def build_data(recipe: Recipe) -> Data:
    """Training and validation set of a recipe.

    Raises:
        ValueError: a folder is missing, or caches are of other images.
    """
    if not recipe.cached_path:
        _, train_set, val_set = build_dataset(recipe.data_path, recipe.image_size, recipe.hflip,
                                              recipe.mid_reso, recipe.crop, exif=recipe.exif)
        return Data(train_set, val_set, list(train_set.classes))
    train_set = TokenCache(recipe.cached_path, recipe.hflip)
    if recipe.cached_val_path:
        val_set = TokenCache(recipe.cached_val_path, fixed=True)
    else:  # the training images need not be there
        _, val_transform = build_transforms(recipe.image_size, False, recipe.mid_reso, recipe.crop)
        val_set = open_split(recipe.data_path, 'val', val_transform, exif=recipe.exif)
    numbers = [str(label) for label in range(len(val_set.classes))]  # imported codes know no names
    if train_set.classes not in (list(val_set.classes), numbers):
        odd = sorted(set(train_set.classes) ^ set(val_set.classes)) or ['their order']
        raise ValueError(f'{recipe.cached_path} holds {len(train_set.classes)} classes, those of validation '
                         f'are {len(val_set.classes)} and differ in {odd[:5]}: pass caches and images of one '
                         'data set')
    logger.info('training reads the tokens in %s', recipe.cached_path)
    caches = dict(train=train_set)
    if recipe.cached_val_path:
        caches['val'] = val_set
    return Data(train_set, val_set, list(val_set.classes), caches)


def check_caches(caches: dict[str, TokenCache], recipe: Recipe, model: Trainable) -> None:
    """Make sure that stored tokens are those of the model's tokenizer; see `TokenCache.check`.

    The tokenizer is hashed and asked once for all of them.
    """
    if not caches:
        return
    digest = weights_digest(model.tokenizer.state_dict())
    shape = model.tokenizer.shape_of_stored(recipe.image_size)
    for split, cache in caches.items():
        cache.check(digest, recipe.image_size, split, shape, recipe.exif)


def train_sampler(recipe: Recipe, num_images: int,
                  start: tuple[int, int] = (0, 0)) -> DistInfiniteBatchSampler:
    """Which images every rank sees at every step, from `start` = (epoch, step) on.

    A batch holds the images of all micro-steps of one optimizer step on this rank.
    """
    world_size = dist.get_world_size()
    return DistInfiniteBatchSampler(
        world_size, dist.get_rank(), num_images, recipe.micro_batch(world_size) * recipe.accumulate,
        same_seed_for_all_ranks=recipe.same_seed_for_all_ranks, fill_last=True, start_ep=start[0],
        start_it=start[1], by_batch=True, with_epoch=True)


def loader_options(recipe: Recipe) -> dict[str, Any]:
    """Arguments of every loader of a training."""
    return dict(num_workers=recipe.num_workers(dist.get_world_size()),
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=leave_signals_to_parent)


def train_batches(recipe: Recipe, train_set: Dataset, seed: int, start: tuple[int, int],
                  steps_per_epoch: int) -> Iterator:
    """Endless batches (images, labels, damage) from `start` on.

    `damage` has a string per image: empty, or why the file could not be read that the image stands in for.
    """
    keyed = KeyedAugmentation(train_set, seed, replace_damaged=True)

    def make_loader(position: tuple[int, int]) -> DataLoader:
        return DataLoader(keyed, batch_sampler=train_sampler(recipe, len(train_set), position),
                          **loader_options(recipe))

    epoch, step = start
    if step >= steps_per_epoch:  # only the end of that epoch is left to do
        start = epoch + 1, 0
    return restarting_batches(make_loader, start, steps_per_epoch)


def validation_batch(recipe: Recipe) -> int:
    """Images per batch of an evaluation, which needs less memory than a training step."""
    return round(1.5 * recipe.local_batch(dist.get_world_size()))


def validation_loader(recipe: Recipe, val_set: Dataset) -> DataLoader:
    """This rank's share of the validation images."""
    sampler = EvalDistributedSampler(val_set, dist.get_world_size(), dist.get_rank())
    return DataLoader(val_set, validation_batch(recipe), sampler=sampler, **loader_options(recipe))


def calibration_images(recipe: Recipe, train_set: Dataset, seed: int) -> Iterator[torch.Tensor]:
    """This rank's share of up to `CALIBRATION_IMAGES` training images in batches, the same at every call."""
    count = min(len(train_set), CALIBRATION_IMAGES)
    chosen = [(0, i * len(train_set) // count) for i in range(count)]
    subset = Subset(KeyedAugmentation(train_set, seed, replace_damaged=True), chosen)
    sampler = EvalDistributedSampler(subset, dist.get_world_size(), dist.get_rank())
    loader = DataLoader(subset, validation_batch(recipe), sampler=sampler, **loader_options(recipe))
    for images_B3HW, _, _ in without_child_signal(loader):
        yield images_B3HW.to(dist.get_device())
