"""DDO: a generator as the discriminator of real images from those of its own earlier self.

The optimum of the loss has sigmoid(beta gap) = p_data / (p_data + alpha p_reference): with alpha = beta = 1
the model becomes the distribution of the data. Images of the reference are drawn as the training goes on.
Letters: B batch, 3HW image. Source: arXiv 2503.01103.
"""
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from configs import GeneratorConfig
from models import ARModel
from models.noise import noise_of_step
from objectives.contrast import Contrast


def ddo_loss(gap_real_B: torch.Tensor, gap_fake_B: torch.Tensor, is_null_B: torch.Tensor, beta: float,
             alpha: float, null_weight: float = 1.) -> torch.Tensor:
    """- mean a log sigmoid(beta gap_real) - mean f log sigmoid(- beta gap_fake), over max(alpha, 1).

    Args:
        gap_real_B, gap_fake_B: see `Gap`, of real images and of those of the reference.
        is_null_B: images of the null class. They have no fakes, f = 0 in place of alpha: with guidance that
            class is the negative example already.
        alpha: weight of the fakes.
        null_weight: a of real images of the null class; that of all others is 1.
    """
    a_B = torch.where(is_null_B, null_weight, 1.)
    f_B = torch.where(is_null_B, 0., alpha)
    real = (a_B * F.logsigmoid(beta * gap_real_B)).mean()
    fake = (f_B * F.logsigmoid(-beta * gap_fake_B)).mean()
    return -(real + fake) / max(alpha, 1.)


class DDO(Contrast):
    """`--objective=ddo`: real images against images of the reference, one for each.

    Args:
        beta, uncond_ratio: see `Contrast`.
        alpha: weight of the images of the reference.
        null_weight: '1' weighs a real image of the null class as any other, as the published code does by a
            slip; 'alpha' by max(alpha, 1), as it means to, since the loss is divided by that.
        codes: 'reencoded' decodes drawn images and encodes them again, as published, so that nothing but the
            image tells them from real ones; 'drawn' takes the drawn codes, which saves decoder and encoder.
    """

    def __init__(self, beta: float, uncond_ratio: float, alpha: float, null_weight: str = '1',
                 codes: str = 'reencoded'):
        super().__init__(beta, uncond_ratio)
        self.alpha = alpha
        self.null_weight = max(alpha, 1.) if null_weight == 'alpha' else 1.
        self.codes = codes

    @classmethod
    def from_config(cls, config: GeneratorConfig) -> 'DDO':
        return cls(config.contrast_beta, config.uncond_ratio, config.ddo_alpha, config.ddo_null_weight,
                   config.ddo_codes)

    def loss(self, model: ARModel, images_B3HW: torch.Tensor, label_B: torch.Tensor,
             progress: float) -> tuple[torch.Tensor, dict[str, Any]]:
        # 1. Real images, and an image of the reference for each, of the same class. Both kinds are encoded
        #    alike, also where every step has a pyramid of its own.
        encoding = model.encoding_of_step()
        real_tokens = model.tokenizer.encode(images_B3HW, *encoding)
        fake_tokens, is_finite_B = self.fakes(label_B, encoding)

        # 2. The null class for some pairs: the likelihood of both is then that without a class, also of a
        #    fake that was drawn with one.
        label_B, is_null_B = self.dropped(model, label_B)

        # 3. The gaps, one kind after the other: drop path follows the place of an image in the batch.
        real = self.gap(model, label_B, real_tokens)
        fake = self.gap(model, label_B, fake_tokens)
        # A fake that is not finite must not look like an image: its step is left out, as any such step is.
        fake = fake._replace(gap_B=fake.gap_B + torch.where(is_finite_B, 0., torch.nan))
        loss = ddo_loss(real.gap_B, fake.gap_B, is_null_B, self.beta, self.alpha, self.null_weight)
        return loss, self.aux_of(loss, real, fake, is_null_B, ~is_null_B)

    @torch.no_grad()
    def fakes(self, label_B: torch.Tensor, encoding: tuple[Any, ...]) -> tuple[Any, torch.Tensor]:
        """Tokens of images of the reference, and (B,) whether these are finite; in float32, as published.

        They follow from the seed, the step, and the place of an image among those of all ranks.

        Args:
            encoding: what `encoding_of_step` gave.
        """
        reference = self.frozen['reference']
        noise = noise_of_step(len(label_B))
        with torch.autocast(label_B.device.type, enabled=False):
            if self.codes == 'drawn':
                tokens = reference.draw_tokens(label_B, noise, *encoding)
                return tokens, torch.ones_like(label_B, dtype=torch.bool)
            images_B3HW = reference.tokenizer.decode(reference.draw_tokens(label_B, noise))
            tokens = reference.tokenizer.encode(images_B3HW, *encoding)
        return tokens, images_B3HW.isfinite().flatten(1).all(1)

    def flops(self, flops_of_image: Callable[[int], int], aux: dict[str, Any]) -> int:
        """As for all contrasts, and one image drawn."""
        return super().flops(flops_of_image, aux) + flops_of_image(aux['num_tokens']) // 3
