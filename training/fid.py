"""Frechet distance of a small sample while a generator trains: `train.py --fid_images=5000`.

The score is always named by its number of images, `fid_5k`: it can be compared with other points of the same
curve, and never with the published FID of 50,000 images.
"""
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import dist
from configs import SAMPLE_CONFIGS, SampleConfig, TrainConfig
from configs.options import parse_flags
from evaluation.features import FeatureSet, FeatureSettings, load_network
from evaluation.inception import MissingWeights
from evaluation.metrics import frechet_distance, read_statistics, to_uint8
from models import ARModel, Trainable
from models.noise import ImageNoise
from utils.loading import without_child_signal

logger = logging.getLogger(__name__)


class TrainingFID:
    """Samples images of the same noise and classes at every call, and scores them.

    Args:
        network: see `evaluation.features`.
        settings: of the samples: `seed`, `num_images`, `batch_size` and what `sample_kwargs` returns.
        reference: (mean, covariance) of pool features.
    """

    def __init__(self, network: Any, settings: SampleConfig, reference: tuple[torch.Tensor, torch.Tensor]):
        self.network = network
        self.settings = settings
        self.reference = reference
        self.name = f'fid_{settings.num_images / 1000:g}k'

    def __call__(self, model: ARModel, autocast: AbstractContextManager,
                 stop_request: Any = False, after_batch: Callable[[], None] = lambda: None) -> float:
        """The distance; every rank calls it, and all get the same number; nan if an image is not finite.

        Args:
            model: the generator.
            autocast: the precision to sample in.
            stop_request: becomes true when this rank must end soon; all ranks then return nan, this one after
                its current batch.
            after_batch: is called after every batch.
        """
        count = self.settings.num_images
        size = self.settings.batch_size
        features = FeatureSet(self.network, count, model.device)
        is_finite = True

        # Ranks take batches in turn. Noise and class of an image follow from its index alone, so that all
        # points of the curve compare the same samples.
        for first in range(dist.get_rank() * size, count, dist.get_world_size() * size):
            index_B = range(first, min(first + size, count))
            labels = [i % model.num_classes for i in index_B]
            noise = ImageNoise(self.settings.seed, index_B)
            with torch.no_grad(), autocast:
                images_B3HW = model.sample(labels, rng=noise, **self.settings.sample_kwargs())
            is_finite = is_finite and bool(images_B3HW.isfinite().all())
            images_B3HW = images_B3HW.float().nan_to_num() * 2 - 1
            features.add(to_uint8(images_B3HW), first)
            after_batch()
            if stop_request:
                is_finite = False
                break

        # Also after a stop, since the other ranks wait in these calls.
        features.reduce()
        if not all(dist.allgather_object(is_finite)):
            return math.nan
        return frechet_distance(*self.reference, *features.statistics()[''])


def build_training_fid(config: TrainConfig, model: Trainable, val_loader: DataLoader) -> TrainingFID | None:
    """The distance that the config asks for; every rank calls it.

    Returns:
        None if the config asks for none, or if the default weights of the feature network are missing.
    Raises:
        MissingWeights: the config names a file of weights that is missing.
        ValueError: the flags of the samples or the reference are wrong.
    """
    if not config.fid_images:
        return None
    if getattr(config, 'cached_val_path', '') and not config.fid_ref:
        raise ValueError('--fid_images compares with the validation images, --cached_val_path holds none: '
                         'pass --fid_ref=FILE.npz')
    dist.require_equal(bool(config.fid_ref), 'whether --fid_ref is given',
                       'pass it on every node, or on none')

    # Of the flags of sample.py, those that the training decides or that change no image have no use here.
    cls = SAMPLE_CONFIGS[config.model]
    flags = parse_flags(cls, '--fid_flags', config.fid_flags)
    common = {field.name for field in fields(SampleConfig)}
    family_fields = {field.name for field in fields(cls)} - common
    useless = sorted(flags.keys() - family_fields - {'cfg', 'seed', 'batch_size'})
    if useless:
        raise ValueError(f'--fid_flags takes cfg, seed, batch_size and what is special to {config.model}, '
                         f'got {", ".join(useless)}: leave it out')
    settings = cls(**flags, model=config.model, ckpt='in training', num_images=config.fid_images)

    # One image shows before the first epoch whether the model refuses these settings, and its size.
    with torch.no_grad():
        image_13HW = model.sample([0], rng=ImageNoise(0, [0]), **settings.sample_kwargs())
    size = image_13HW.shape[2:]

    # A training on many nodes must not begin by a download, so missing weights only turn the distance off.
    feature_settings = FeatureSettings(
        features=config.fid_features,
        offline=True,
        inception_weights=config.inception_weights,
    )
    try:
        network = load_network(feature_settings)
    except MissingWeights as error:
        if config.inception_weights:
            raise
        if dist.is_master():
            logger.warning('--fid_images is off: %s', error)
        return None

    # The reference is a file, or else the validation images.
    if config.fid_ref:
        reference = read_statistics(config.fid_ref, network.num_features)
        return TrainingFID(network, settings, reference)
    features = FeatureSet(network, len(val_loader.dataset), model.device)
    seen = 0
    for images_B3HW, _ in without_child_signal(val_loader, config.loader_timeout):
        # A generator may train on larger images than it samples.
        if images_B3HW.shape[2:] != size:
            images_B3HW = F.interpolate(images_B3HW, size=size, mode='area')
        features.add(to_uint8(images_B3HW), seen)
        seen += len(images_B3HW)
    features.reduce()
    return TrainingFID(network, settings, features.statistics()[''])
