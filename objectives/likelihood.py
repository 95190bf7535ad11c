"""Plain likelihood: the loss of the model's own paper."""
from typing import Any

import torch

from models import ARModel
from objectives.base import Objective


class Likelihood(Objective):
    """`--objective=mle`: what `training_loss` of the model says."""

    def loss(self, model: ARModel, images_B3HW: torch.Tensor, label_B: torch.Tensor,
             progress: float) -> tuple[torch.Tensor, dict[str, Any]]:
        return model.training_loss(images_B3HW, label_B, progress)
