"""Frechet distance of a small sample while a generator trains: `train.py --fid_images=5000`.

Always named by its number of images, `fid_5k`: it compares with other points of the same curve, never with
the published FID of 50,000 images.
"""
import logging
import math
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import dist
from configs import SAMPLE_RECIPES, Recipe, SampleRecipe
from configs.options import parse_flags
from evaluation.features import FeatureSet, FeatureSettings, load_network
from evaluation.inception import MissingWeights
from evaluation.metrics import frechet_distance, read_statistics, to_uint8
from models import ARModel, Trainable
from models.noise import ImageNoise
from utils.loading import without_child_signal

logger = logging.getLogger(__name__)


class TrainingFID:
    """Draws the same noise and classes at every call, shared among the ranks, and scores what comes out.

    Args:
        network: see `evaluation.features`.
        settings: of the samples; `seed`, `num_images` and what `sample_kwargs` gives.
        reference: mean and covariance of pool features.
    """

    def __init__(self, network: Any, settings: SampleRecipe, reference: tuple[torch.Tensor, torch.Tensor]):
        self.network = network
        self.settings = settings
        self.reference = reference
        self.name = f'fid_{settings.num_images / 1000:g}k'

    def __call__(self, model: ARModel, autocast: AbstractContextManager,
                 stop_request: Any = False) -> float:
        """The distance, equal on all ranks, which all call it; nan where an image is not finite.

        Args:
            stop_request: becomes true when a rank must end soon; all then give nan after their current batch.
        """
        count = self.settings.num_images
        size = self.settings.batch_size
        features = FeatureSet(self.network, count, model.device)
        is_finite = True
        for first in range(dist.get_rank() * size, count, dist.get_world_size() * size):
            index_B = range(first, min(first + size, count))
            with torch.no_grad(), autocast:
                images_B3HW = model.sample([i % model.num_classes for i in index_B],
                                           rng=ImageNoise(self.settings.seed, index_B),
                                           **self.settings.sample_kwargs())
            is_finite = is_finite and bool(images_B3HW.isfinite().all())
            features.add(to_uint8(images_B3HW.float().nan_to_num() * 2 - 1), first)
            if stop_request:
                is_finite = False
                break
        features.reduce()
        if not all(dist.allgather_object(is_finite)):
            return math.nan
        return frechet_distance(*self.reference, *features.statistics()[''])


def build_training_fid(recipe: Recipe, model: Trainable, val_loader: DataLoader) -> TrainingFID | None:
    """What the recipe asks for; None where it asks for nothing or weights are missing. Every rank calls it.

    Raises:
        ValueError: the flags of the samples or the reference are wrong.
    """
    if not recipe.fid_images:
        return None
    if getattr(recipe, 'cached_val_path', '') and not recipe.fid_ref:
        raise ValueError('--fid_images compares with the validation images, --cached_val_path holds none: '
                         'pass --fid_ref=FILE.npz')
    dist.require_equal(bool(recipe.fid_ref), 'whether --fid_ref is given',
                       'pass it on every node, or on none')
    cls = SAMPLE_RECIPES[recipe.model]
    flags = parse_flags(cls, '--fid_flags', recipe.fid_flags)
    of_the_family = {f.name for f in fields(cls)} - {f.name for f in fields(SampleRecipe)}
    useless = sorted(flags.keys() - of_the_family - {'cfg', 'seed', 'batch_size'})
    if useless:
        raise ValueError(f'--fid_flags takes cfg, seed, batch_size and what is special to {recipe.model}, '
                         f'got {", ".join(useless)}: leave it out')
    settings = cls(**flags, model=recipe.model, ckpt='in training', num_images=recipe.fid_images)
    with torch.no_grad():  # fail before the first epoch where the model refuses these settings
        size = model.sample([0], rng=ImageNoise(0, [0]), **settings.sample_kwargs()).shape[2:]
    feature_settings = FeatureSettings(features=recipe.fid_features, offline=True,
                                       inception_weights=recipe.inception_weights)
    try:
        network = load_network(feature_settings)
    except MissingWeights as error:
        if recipe.inception_weights:
            raise
        if dist.is_master():
            logger.warning('--fid_images is off: %s', error)
        return None
    if recipe.fid_ref:
        return TrainingFID(network, settings, read_statistics(recipe.fid_ref, network.num_features))
    features = FeatureSet(network, len(val_loader.dataset), model.device)
    seen = 0
    for images_B3HW, _ in without_child_signal(val_loader):
        if images_B3HW.shape[2:] != size:  # a generator may train on larger images than it draws
            images_B3HW = F.interpolate(images_B3HW, size=size, mode='area')
        features.add(to_uint8(images_B3HW), seen)
        seen += len(images_B3HW)
    features.reduce()
    return TrainingFID(network, settings, features.statistics()[''])
