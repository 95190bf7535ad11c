"""What DDO and CCA share: how much likelier an image is to the model than to a frozen reference.

Both raise this ratio for some images (or pairs of image and label) and lower it for others, so that it
becomes what a classifier of these two kinds needs. The reference is the model as it was before.
Letters: B batch, L codes of an image.
"""
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import dist
from models import ARModel
from models.helpers import drop_labels
from objectives.base import Objective

logger = logging.getLogger(__name__)
PUBLISHED_BETA = 0.02
PUBLISHED_CODES = 680  # of an image of 256x256 pixels in VAR; 576 in LlamaGen
MUCH = 2.              # a factor between the rule for beta and the flag that is worth a line


class Gap(NamedTuple):
    """How an image looks to the model that is trained, and to the reference."""
    gap_B: torch.Tensor   # log-likelihood under the model less that under the reference, float32
    nll_B: torch.Tensor   # cross-entropy under the reference, mean over the codes
    aux: dict[str, Any]   # for `ARModel.metrics`


def log_likelihood(model: ARModel, label_B: torch.Tensor, tokens: Any) -> torch.Tensor:
    """Log-likelihood (B,) of images in nats, float32: the sum over all codes of an image.

    Args:
        tokens: what `tokenizer.encode` gives.
    """
    log_prob_BL, _ = model.log_probabilities(label_B, tokens)
    return log_prob_BL.sum(1)


def advised_beta(num_codes: int) -> float:
    """The rule for beta: the published value, in proportion to one over the number of codes."""
    return PUBLISHED_BETA * PUBLISHED_CODES / num_codes


class Contrast(Objective):
    """An objective over the ratio of likelihoods of the model and of a frozen reference.

    Args:
        beta: factor of the logarithm of the ratio.
        uncond_ratio: share of the images whose labels become the null class, so that guidance stays possible.
    """

    headline = {'gap': 'gap', 'gapn': 'gap_negative'}
    legend = ('gap is the log-likelihood of an image under the model less that under the reference, gapn the '
              'same of what must become less likely')

    def __init__(self, beta: float, uncond_ratio: float):
        super().__init__()
        self.beta = beta
        self.uncond_ratio = uncond_ratio

    def prepare(self, model: ARModel, read_reference: Callable[[], ARModel]) -> None:
        self.frozen['reference'] = read_reference()
        beta = advised_beta(model.codes_per_image)
        if dist.is_master() and not beta / MUCH < self.beta < beta * MUCH:
            num_codes = model.codes_per_image
            logger.warning('--contrast_beta=%g, but images have %d codes here, and the rule %g * %d / %d '
                           'gives %.2g: far below it, negatives are pushed down without bound',
                           self.beta, num_codes, PUBLISHED_BETA, PUBLISHED_CODES, num_codes, beta)

    def dropped(self, model: ARModel, label_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The labels with the null class in the place of some, and (B,) which; one draw per image.

        Model and reference must see the same labels, so the model itself drops none.
        """
        dropped_B = drop_labels(label_B, model.num_classes, self.uncond_ratio)
        return dropped_B, dropped_B == model.num_classes

    def gap(self, model: ARModel, label_B: torch.Tensor, tokens: Any) -> Gap:
        """Compare model and reference on these tokens; the gradient is that of the model."""
        log_prob_BL, aux = model.log_probabilities(label_B, tokens)
        with torch.no_grad():
            reference_BL, _ = self.frozen['reference'].log_probabilities(label_B, tokens)
        # The sum of differences is rounded less than the difference of sums of hundreds of codes.
        return Gap((log_prob_BL - reference_BL).sum(1), -reference_BL.mean(1), aux)

    def aux_of(self, loss: torch.Tensor, positive: Gap, negative: Gap, is_null_B: torch.Tensor,
               is_negative_B: torch.Tensor) -> dict[str, Any]:
        """What `metrics` needs.

        Args:
            is_null_B: which images have the null class.
            is_negative_B: which entries of `negative` the loss pushes down.
        """
        return positive.aux | dict(
            contrast_loss=loss.detach(),
            gap_B=positive.gap_B.detach(),
            gap_negative_B=negative.gap_B.detach(),
            nll_reference_B=positive.nll_B,
            is_null_B=is_null_B,
            is_negative_B=is_negative_B,
        )

    @torch.no_grad()
    def metrics(self, model: ARModel, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Those of the model on the real images, and how far the two kinds of images are apart.

        A mean over no image at all is 0: where all of a step have a class, `gap_null` is.
        """
        gap_B = aux['gap_B']
        is_negative_B = aux['is_negative_B']
        margin_B = gap_B - aux['gap_negative_B']
        return model.metrics(aux) | dict(
            contrast_loss=aux['contrast_loss'],
            L_reference=aux['nll_reference_B'].mean(),
            gap=mean_where(gap_B, ~aux['is_null_B']),
            gap_null=mean_where(gap_B, aux['is_null_B']),
            gap_negative=mean_where(aux['gap_negative_B'], is_negative_B),
            margin=mean_where(margin_B, is_negative_B),
            share_above=mean_where((margin_B > 0).float(), is_negative_B),
        )

    def selection(self, model: ARModel) -> str:
        """No score: the cross-entropy of real images rises while the samples become better."""
        return ''

    def flops(self, flops_of_image: Callable[[int], int], aux: dict[str, Any]) -> int:
        """Two images forward and backward, and both forward once more through the reference."""
        return super().flops(flops_of_image, aux) * 8 // 3


def mean_where(value_B: torch.Tensor, mask_B: torch.Tensor) -> torch.Tensor:
    """Mean of the values in the mask over all ranks; every rank calls it."""
    sums = torch.stack([value_B[mask_B].sum(), mask_B.sum().to(value_B.dtype)])
    dist.allreduce(sums)
    return sums[0] / sums[1].clamp_min(1)
