"""CCA: images with their own labels against the same images with labels of others.

The optimum is gap = 1 / beta log [p(image | label) / (lambda p(image))]: what classifier-free guidance of
strength 1 / beta does in two passes, the model then does in one. Nothing is drawn in training.
Letters: B batch, G images of all ranks, 3HW image. Source: arXiv 2410.09347.
"""
import logging
from typing import Any

import torch
from torch.nn import functional as F

import dist
from configs import GeneratorConfig
from models import ARModel
from models.noise import GlobalBatch
from objectives.contrast import Contrast

logger = logging.getLogger(__name__)


def cca_loss(gap_right_B: torch.Tensor, gap_wrong_B: torch.Tensor, is_negative_B: torch.Tensor, beta: float,
             weight: float) -> torch.Tensor:
    """- mean log sigmoid(beta gap_right) - mean w log sigmoid(sign beta gap_wrong), over max(weight, 1).

    Args:
        gap_right_B, gap_wrong_B: see `Gap`, with an image's own label and with that of another one.
        is_negative_B: where the other label is another class: sign -1 and w = weight. All other pairs are
            positive examples once more: sign and w are 1.
        weight: lambda, of negative examples.
    """
    w_B = torch.where(is_negative_B, weight, 1.)
    sign_B = torch.where(is_negative_B, -1., 1.)
    right = F.logsigmoid(beta * gap_right_B).mean()
    wrong = (w_B * F.logsigmoid(sign_B * beta * gap_wrong_B)).mean()
    return -(right + wrong) / max(weight, 1.)


class CCA(Contrast):
    """`--objective=cca`: right labels against wrong ones.

    Args:
        beta, uncond_ratio: see `Contrast`.
        weight: lambda, of wrong labels; more of it follows the class more closely, with less variety.
    """

    def __init__(self, beta: float, uncond_ratio: float, weight: float):
        super().__init__(beta, uncond_ratio)
        self.weight = weight
        self.next_label_G: torch.Tensor | None = None  # of the step: for every image, the label of the next
        self.has_warned = False

    @classmethod
    def from_config(cls, config: GeneratorConfig) -> 'CCA':
        return cls(config.contrast_beta, config.uncond_ratio, config.cca_lambda)

    def begin_step(self, label_B: torch.Tensor) -> None:
        # The wrong label is that of the next image among those of all ranks, so that it is the same for any
        # number of ranks and micro-steps.
        label_G = dist.allgather(label_B.to(dist.get_device()))
        self.next_label_G = label_G.roll(-1)

    def loss(self, model: ARModel, images_B3HW: torch.Tensor, label_B: torch.Tensor,
             progress: float) -> tuple[torch.Tensor, dict[str, Any]]:
        # 1. Codes of the images, and one mask of the null class for the right and the wrong labels. With it
        #    an image is a positive example twice, so that guidance stays possible.
        tokens = model.tokenizer.encode(images_B3HW, *model.encoding_of_step())
        next_B = self.next_labels(label_B)
        right_B, is_null_B = self.dropped(model, label_B)
        wrong_B = next_B.masked_fill(is_null_B, model.num_classes)
        is_negative_B = wrong_B != right_B

        # 2. The gaps, one kind after the other: drop path follows the place of an image in the batch.
        right = self.gap(model, right_B, tokens)
        wrong = self.gap(model, wrong_B, tokens)
        loss = cca_loss(right.gap_B, wrong.gap_B, is_negative_B, self.beta, self.weight)
        return loss, self.aux_of(loss, right, wrong, is_null_B, is_negative_B)

    def next_labels(self, label_B: torch.Tensor) -> torch.Tensor:
        """(B,) the labels of the images after these; of a step that nobody has begun, these are all."""
        if self.next_label_G is None:
            return label_B.roll(-1)
        rows = GlobalBatch.current.rows(len(label_B))
        return self.next_label_G[rows.start:rows.stop]

    def metrics(self, model: ARModel, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.next_label_G is not None and not self.has_warned and dist.is_master():
            self.has_warned = bool((self.next_label_G == self.next_label_G[0]).all())
            if self.has_warned:
                logger.warning('all %d images of a step are of one class: there is no wrong label to learn '
                               'from', len(self.next_label_G))
        return super().metrics(model, aux)
