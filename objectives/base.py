"""The methods by which the trainer knows an objective.

Letters: B batch, 3HW image.
"""
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from configs import GeneratorConfig
from models import ARModel


class Objective:
    """What a training minimises.

    Attributes:
        headline: name in the progress line -> key of the metrics, beside those of the model.
        legend: what these names mean.
        frozen: models by name that the loss needs and no step moves. They are in no optimizer, average or
            checkpoint: that keeps a digest of their weights, by which a restart knows them again.
        heads: parts by name that are trained beside the model, and are no part of it: a checkpoint has them
            under a key of their own, and no average, export or sample does.
    """

    headline: dict[str, str] = {}
    legend = ''

    def __init__(self):
        self.frozen: dict[str, ARModel] = {}
        self.heads = nn.ModuleDict()

    @classmethod
    def from_config(cls, config: GeneratorConfig) -> 'Objective':
        """The objective with the settings of a training."""
        return cls()

    def prepare(self, model: ARModel, read_reference: Callable[[], ARModel]) -> None:
        """Get ready before the first step; every rank calls it.

        Args:
            model: that is trained, with the weights that it begins with.
            read_reference: gives a frozen copy of the model with the weights of `--ref_from`.
        """

    def begin_step(self, label_B: torch.Tensor) -> None:
        """Called once before the micro-steps of an optimizer step, on every rank.

        Args:
            label_B: labels of all images of this rank in that step.
        """

    def loss(self, model: ARModel, images_B3HW: torch.Tensor, label_B: torch.Tensor,
             progress: float) -> tuple[torch.Tensor, dict[str, Any]]:
        """The scalar to minimise, a mean over images, and what `metrics` needs.

        See `ARModel.training_loss`, whose arguments follow the model here.
        """
        raise NotImplementedError

    def metrics(self, model: ARModel, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Scalars to log, means over the batch; called on logging steps, on every rank."""
        return model.metrics(aux)

    def selection(self, model: ARModel) -> str:
        """The validation score whose lowest value marks the best checkpoint; '' where no score tells."""
        return model.selection

    def flops(self, flops_of_image: Callable[[int], int], aux: dict[str, Any]) -> int:
        """FLOPs of the products of a training image.

        Args:
            flops_of_image: those of plain likelihood, by the number of tokens.
        """
        return flops_of_image(aux.get('num_tokens', 0))
