"""The data of a training: images or a token cache, their order, and their batches."""
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

import dist
from configs import SAMPLE_CONFIGS, SampleConfig, TrainConfig
from configs.options import flag_of
from configs.training import CachedConfig
from models import Trainable
from utils.data import EMBEDDED, KeyedAugmentation, build_dataset, build_transforms, describe_data, open_split
from utils.data_sampler import DistInfiniteBatchSampler, EvalDistributedSampler
from utils.drawn_images import DrawnImages
from utils.image_cache import cached_in_memory
from utils.loading import restarting_batches, without_child_signal
from utils.machine import available_cpus, local_ranks
from utils.stop import leave_signals_to_parent
from utils.token_cache import TokenCache, weights_digest

logger = logging.getLogger(__name__)
CALIBRATION_IMAGES = 10_000  # at most so many training images calibrate a tokenizer


@dataclass
class Data:
    """The images of a training, or token caches in their place.

    Attributes:
        train: the training set.
        val: the validation set.
        classes: names of the classes, by label.
        caches: those of the two sets that are token caches, by split.
    """
    train: Dataset
    val: Dataset
    classes: list[str]
    caches: dict[str, TokenCache] = field(default_factory=dict)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Number and digest of the images of both splits, as checkpoints hold them."""
        return dict(train=describe_data(self.train), val=describe_data(self.val))


def build_data(config: TrainConfig) -> Data:
    """Training and validation set of a config.

    Raises:
        ValueError: a folder is missing, or caches and images belong to different data sets.
    """
    # A rank that fills no memory would not wait for those that do.
    dist.require_equal(config.cache, '--cache', 'pass the same flags everywhere')
    if not config.cached_path:
        _, train_set, val_set = build_dataset(config.data_path, config.image_size, config.hflip,
                                              config.mid_reso, config.crop, config.exif,
                                              config.val_split, config.val_path)
        if isinstance(train_set, DrawnImages):
            note = note_on_drawing(config.data_path, train_set.manifest)
            if note and dist.is_master():
                logger.warning('%s', note)
        if config.cache == 'memory' and config.data_path not in EMBEDDED:
            train_set, val_set = cached_in_memory(train_set, val_set)
        return Data(train_set, val_set, list(train_set.classes))

    # With a token cache, the training images themselves need not be there.
    train_set = TokenCache(config.cached_path, config.hflip)
    if config.cached_val_path:
        val_set = TokenCache(config.cached_val_path, fixed=True)
    else:
        _, val_transform = build_transforms(config.image_size, False, config.mid_reso, config.crop)
        val_set = open_split(config.data_path, 'val', val_transform, config.exif, config.val_split)

    # Classes must agree in names and order; those of imported codes have numbers in place of names.
    numbers = [str(label) for label in range(len(val_set.classes))]
    if train_set.classes not in (list(val_set.classes), numbers):
        odd = sorted(set(train_set.classes) ^ set(val_set.classes)) or ['their order']
        raise ValueError(f'{config.cached_path} holds {len(train_set.classes)} classes, those of validation '
                         f'are {len(val_set.classes)} and differ in {odd[:5]}: pass caches and images of one '
                         'data set')
    logger.info('training reads the tokens in %s', config.cached_path)
    caches = dict(train=train_set)
    if config.cached_val_path:
        caches['val'] = val_set
    return Data(train_set, val_set, list(val_set.classes), caches)


def note_on_drawing(path: str, manifest: dict[str, Any]) -> str:
    """One line where images were drawn from a model's own distribution; '' where they were not.

    The expected gradient of such images is zero, so that nothing but noise is learnt from them.

    Args:
        manifest: of sample.py; {} where it is not known how the images were drawn.
    """
    settings = manifest.get('settings', {})
    family = settings.get('model')
    if not isinstance(family, str) or family not in SAMPLE_CONFIGS:
        return ''
    cls = SAMPLE_CONFIGS[family]
    shared = {f.name for f in dataclasses.fields(SampleConfig)} - {'model', 'cfg'}
    own = {f.name for f in dataclasses.fields(cls)} - shared
    try:
        job = cls(**{name: settings[name] for name in own if name in settings}, ckpt='drawn')
    except (TypeError, ValueError):  # of another version, whose settings had other values
        return ''
    options = job.sample_kwargs()
    favours_the_likely = [
        options['guidance'] != 1,
        options.get('top_k', 0) > 0,
        0 < options.get('top_p', 0.) < 1,
        options.get('temperature', 1.) != 1,
        options.get('more_smooth', False),
        options.get('ssg', 0.) > 0,
    ]
    if any(favours_the_likely):
        return ''
    return (f'{path} was drawn without guidance, top-k, top-p and temperature: from such images a model '
            'learns noise alone; draw them with --cfg, --top_k or --top_p')


def check_caches(caches: dict[str, TokenCache], config: TrainConfig, model: Trainable) -> None:
    """Make sure that the caches hold tokens of the model's tokenizer; see `TokenCache.check`.

    Raises:
        ValueError: a cache was made otherwise.
    """
    if not caches:
        return
    digest = weights_digest(model.tokenizer.state_dict())
    settings = model.tokenizer.settings_of_codes()
    shape = model.tokenizer.shape_of_stored(config.image_size)
    for split, cache in caches.items():
        cache.check(digest, settings, config.image_size, split, shape)
        cache.warn_of_other_crops(config.exif, config.crop, config.mid_reso)


def train_sampler(config: TrainConfig, num_images: int,
                  start: tuple[int, int] = (0, 0)) -> DistInfiniteBatchSampler:
    """The images that this rank sees at every step, from `start` = (epoch, step) on.

    A batch holds the images of all micro-steps of one optimizer step on this rank. Where an epoch is several
    passes over the images, each has a number for every pass: i, i + num_images, and so on.
    """
    world_size = dist.get_world_size()
    epoch, step = start
    return DistInfiniteBatchSampler(
        world_size,
        dist.get_rank(),
        num_images * config.repeat,
        glb_batch_size=config.micro_batch(world_size) * config.accumulate,
        same_seed_for_all_ranks=config.same_seed_for_all_ranks,
        fill_last=True,
        start_ep=epoch,
        start_it=step,
        by_batch=True,
        with_epoch=True,
    )


def loader_options(config: TrainConfig) -> dict[str, Any]:
    """Arguments of every loader of a training."""
    return dict(
        num_workers=config.num_workers(dist.get_world_size()),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_parent,
    )


def train_batches(config: TrainConfig, train_set: Dataset, seed: int, start: tuple[int, int],
                  steps_per_epoch: int) -> Iterator:
    """Endless batches (images, labels, damage) from `start` on.

    `damage` has a string per image: '', or why a file could not be read, in whose place this image stands.

    Args:
        start: (epoch, step within it).
    """
    keyed = KeyedAugmentation(train_set, seed, replace_damaged=True)

    def make_loader(position: tuple[int, int]) -> DataLoader:
        sampler = train_sampler(config, len(train_set), position)
        return DataLoader(keyed, batch_sampler=sampler, **loader_options(config))

    # Of an epoch whose steps are done only the end is left, which needs no batches.
    epoch, step = start
    if step >= steps_per_epoch:
        start = (epoch + 1, 0)
    return restarting_batches(make_loader, start, steps_per_epoch, config.loader_timeout)


def waiting_note(config: TrainConfig, share: float, num_cpus: int | None = None) -> str:
    """One line for a training that waits for data: how long, and what makes the data come faster.

    Args:
        share: of the time.
        num_cpus: CPUs for all ranks of this machine; None takes `available_cpus`.
    """
    # A loader process per CPU, also on the one that the automatic number leaves free.
    world_size = dist.get_world_size()
    workers = config.num_workers(world_size)
    cpus_per_rank = (num_cpus or available_cpus()) // local_ranks()
    most_workers = min(max(cpus_per_rank, 1), config.local_batch(world_size))
    remedies = ['give the run more CPUs']
    if workers < most_workers:
        remedies = [f'pass --workers={most_workers} (now {workers})']

    # Stored tokens need no decoding at all; otherwise fewer bytes and pixels are read faster.
    if isinstance(config, CachedConfig) and not config.cached_path:
        remedies.append('store the tokens once by extract.py and pass '
                        f'--{flag_of(config, "cached_path")}=FOLDER')
    if config.cached_path:
        remedies.append('copy the tokens to a local disk')
    elif config.data_path not in EMBEDDED:
        remedies.append('put smaller files on a local disk')
    return f'waiting for data takes {share:.0%} of the time: {", or ".join(remedies)}'


def validation_batch(config: TrainConfig) -> int:
    """Images per batch of an evaluation, which needs less memory than a training step."""
    return round(1.5 * config.local_batch(dist.get_world_size()))


def validation_loader(config: TrainConfig, val_set: Dataset) -> DataLoader:
    """Batches of the validation images of this rank."""
    sampler = EvalDistributedSampler(val_set, dist.get_world_size(), dist.get_rank())
    return DataLoader(val_set, validation_batch(config), sampler=sampler, **loader_options(config))


def calibration_images(config: TrainConfig, train_set: Dataset, seed: int,
                       count: int = CALIBRATION_IMAGES) -> Iterator[torch.Tensor]:
    """Batches of training images of this rank, in [-1, 1] on its device; the same ones at every call.

    All ranks together have up to `count`, spread over the data set and augmented as in epoch 0.
    """
    count = min(len(train_set), count)
    chosen = [(0, i * len(train_set) // count) for i in range(count)]
    subset = Subset(KeyedAugmentation(train_set, seed, replace_damaged=True), chosen)
    sampler = EvalDistributedSampler(subset, dist.get_world_size(), dist.get_rank())
    loader = DataLoader(subset, validation_batch(config), sampler=sampler, **loader_options(config))
    for images_B3HW, _, _ in without_child_signal(loader, config.loader_timeout):
        yield images_B3HW.to(dist.get_device())
