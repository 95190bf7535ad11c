"""Training losses of image tokenizers: pixels, perception, and a game against a discriminator.

    L_G = L_rec + w_lat L_lat + s(t) w_gan lambda L_adv,   L_rec = w1 |x - y| + w2 (x - y)^2 + w_p LPIPS(x, y)

All reductions run in float32 with autocast off.
Letters: B batch, C channels, 3HW image.
Source: arXiv 2012.09841, Sec. 3.1 (the sum and lambda), 1801.03924 (LPIPS), 2006.10738 (DiffAug), 2002.04724
(balanced consistency), 2104.03310 (LeCAM).
"""
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

import dist
from models.base import Reconstruction, at_least_float32
from models.tokenizers.discriminators import DiffAug, Frozen, blur

logger = logging.getLogger(__name__)
T = TypeVar('T', float, torch.Tensor)
ALARM = 100  # a larger lambda for as many steps in a row is worth a warning


# ---------------------------------------------------------------------------------------------- perceptual
def vgg16_features() -> nn.Sequential:
    """Convolutions of VGG16 up to relu5_3; indices as in torchvision."""
    layers = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


def alexnet_features() -> nn.Sequential:
    """Convolutions of AlexNet (arXiv 1404.5997) up to the fifth ReLU; indices as in torchvision."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU())


LPIPS_TRUNKS = {  # constructor, the layers compared, and their channels
    'vgg': (vgg16_features, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
    'alex': (alexnet_features, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
}


class LPIPS(Frozen):
    """Perceptual distance, version 0.1: weighted squared differences of a frozen trunk's normalised features.

    Args:
        trunk: 'vgg' (training) or 'alex'; random until `load_published`.
    """

    def __init__(self, trunk: str = 'vgg'):
        super().__init__()
        if trunk not in LPIPS_TRUNKS:
            raise ValueError(f'the trunk of LPIPS must be one of {list(LPIPS_TRUNKS)}, got {trunk!r}')
        make_features, self.taps, widths = LPIPS_TRUNKS[trunk]
        self.trunk = trunk
        self.features = make_features()
        for i, width in enumerate(widths):
            self.register_parameter(f'lin{i}', nn.Parameter(torch.full((width,), 1 / width)))
        self.shift = nn.Parameter(torch.tensor([-.030, -.088, -.188]).view(3, 1, 1))
        self.scale = nn.Parameter(torch.tensor([.458, .448, .450]).view(3, 1, 1))
        self.freeze()

    def load_published(self, state: dict[str, torch.Tensor], source: str) -> None:
        """Take trunk and heads, from torchvision's keys beside `lin0.model.1.weight` or from a combined file.

        Raises:
            ValueError: heads or trunk are missing, or belong to another trunk.
        """
        weights = dict(shift=self.shift, scale=self.scale)
        for key, value in state.items():
            if match := re.fullmatch(r'(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))', key):
                weights[f'features.{match[1]}'] = value
            elif match := re.fullmatch(r'lin(?:s\.)?(\d)\.model\.1\.weight', key):
                weights[f'lin{match[1]}'] = value.flatten()
        expected = f'expected LPIPS weights with the trunk {self.trunk!r}, got others in {source}'
        if 'lin0' in weights and not any(key.startswith('features') for key in weights):
            expected = (f'{source} holds only the linear heads of LPIPS: pass them as --lpips_lin beside the '
                        'trunk as --lpips_vgg, or a file with both as --lpips_path')
        self.load(weights, expected)

    def _normalised(self, images_B3HW: torch.Tensor) -> Iterator[torch.Tensor]:
        """Feature maps of the compared layers, every spatial vector divided by its length."""
        x = (images_B3HW.to(self.shift.dtype) - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                yield x / (x.square().sum(1, keepdim=True) + 1e-9).sqrt()  # finite gradient at a zero vector

    def forward(self, x_B3HW: torch.Tensor, y_B3HW: torch.Tensor) -> torch.Tensor:
        """(B,) float32 distances of images in [-1, 1].

        Raises:
            ValueError: the shapes differ.
        """
        check_same_shape(x_B3HW, y_B3HW)
        with torch.autocast(x_B3HW.device.type, enabled=False):
            distance_B = 0.
            for i, (x, y) in enumerate(zip(self._normalised(x_B3HW), self._normalised(y_B3HW), strict=True)):
                weight_C11 = getattr(self, f'lin{i}').view(-1, 1, 1)
                distance_B = distance_B + ((x - y).square() * weight_C11).sum(1).mean((1, 2))
            return distance_B


def check_same_shape(x: torch.Tensor, y: torch.Tensor) -> None:
    """Make sure that two batches can be compared image by image.

    Raises:
        ValueError: their shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f'expected two batches of equal shape, got {tuple(x.shape)} and {tuple(y.shape)}: '
                         'compare as many images of one size')


class PyramidLoss(nn.Module):
    """Weight-free stand-in for a perceptual distance: L1 between the bands of two Laplacian pyramids.

    Args:
        num_octaves: bands compared, the finest first; the low pass that is left is for the pixel loss.
    """

    def __init__(self, num_octaves: int = 3):
        super().__init__()
        self.num_octaves = num_octaves

    def forward(self, x_B3HW: torch.Tensor, y_B3HW: torch.Tensor) -> torch.Tensor:
        """(B,) float32 distances.

        Raises:
            ValueError: the shapes differ.
        """
        check_same_shape(x_B3HW, y_B3HW)
        error = at_least_float32(x_B3HW) - at_least_float32(y_B3HW)  # a pyramid is linear: one will do
        distance_B = 0.
        for _ in range(self.num_octaves):
            low = F.avg_pool2d(error, 2, ceil_mode=True)
            band = error - F.interpolate(low, size=error.shape[-2:], mode='bilinear', align_corners=False)
            distance_B = distance_B + band.abs().mean((1, 2, 3))
            error = low
        return distance_B


# ---------------------------------------------------------------------------------------------- adversarial
GAN_KINDS = ('hinge', 'vanilla', 'non-saturating')


def discriminator_loss(kind: str, real: torch.Tensor, fake: torch.Tensor, half: bool = False) -> torch.Tensor:
    """What the discriminator minimises, from its logits; `half` takes the mean of both terms, not the sum."""
    if kind == 'hinge':
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    else:
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
    return loss / 2 if half else loss


def generator_loss(kind: str, fake: torch.Tensor) -> torch.Tensor:
    """What the generator minimises; 'vanilla' plays the linear loss of 'hinge', as VQGAN does."""
    return F.softplus(-fake).mean() if kind == 'non-saturating' else -fake.mean()


def adaptive_weight(rec_loss: torch.Tensor, gen_loss: torch.Tensor, last_layer: nn.Parameter, low: float,
                    high: float, eps: float) -> torch.Tensor:
    """lambda = |dL_rec/dW| / (|dL_adv/dW| + eps), clamped; W is the last weight both losses share.

    The gradients are averaged over ranks first, so that lambda is that of the global batch.
    """
    grads = torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                         for loss in (rec_loss, gen_loss)])
    dist.allreduce(grads)
    rec_norm, gen_norm = (grads / dist.get_world_size()).flatten(1).norm(dim=1)
    return (rec_norm / (gen_norm + eps)).clamp(low, high)


class LeCAM(nn.Module):
    """Pulls the logits of real images towards the mean of fake ones and vice versa.

    Buffers m_r and m_f are moving averages of the mean logits of real and fake images over all ranks.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer('m_r', torch.zeros(()))
        self.register_buffer('m_f', torch.zeros(()))

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return F.relu(real - self.m_f).square().mean() + F.relu(self.m_r - fake).square().mean()

    @torch.no_grad()
    def update(self, real_mean: torch.Tensor, fake_mean: torch.Tensor) -> None:
        """Note the mean logits of this rank's step; every rank calls it."""
        means = torch.stack([real_mean, fake_mean])
        dist.allreduce(means)
        for average, mean in zip((self.m_r, self.m_f), means / dist.get_world_size(), strict=True):
            average.lerp_(mean.to(average.dtype), 1 - self.decay)


@dataclass(frozen=True)
class GANSettings:
    """How the discriminator takes part.

    Raises:
        ValueError: an unknown kind, a negative share, consistency without augmentation.
    """
    weight: float              # of the generator's adversarial loss, before lambda and the ramp
    start: float               # share of training before the discriminator's first step; above 1 = never
    ramp: float                # share of training in which the weight then rises from 0; 0 = at once
    kind: str = 'hinge'        # one of GAN_KINDS
    half: bool = False         # halve the discriminator's loss
    adaptive: bool = False     # multiply by lambda, see `adaptive_weight`, with its limits:
    adaptive_min: float = 0.
    adaptive_max: float = 1e4
    adaptive_eps: float = 1e-4
    augment: bool = False      # DiffAug on all the discriminator sees
    consistency: float = 0.    # weight of balanced consistency; 0 = off
    lecam: float = 0.          # weight of LeCAM; 0 = off
    blur: float = 0.           # share of training after the start in which a blur of its input fades; 0 = off
    full_view_only: bool = False  # show it the last view alone
    min_pixels: int = 32       # views with a shorter side are not shown

    def __post_init__(self):
        if self.kind not in GAN_KINDS:
            raise ValueError(f'the kind of GAN loss must be one of {list(GAN_KINDS)}, got {self.kind!r}')
        for name in ('start', 'ramp', 'blur'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name} of the GAN must be a share of training, 0 or more, '
                                 f'got {getattr(self, name)}')
        if self.consistency and not self.augment:
            raise ValueError(f'balanced consistency ({self.consistency:g}) compares augmented images: '
                             'switch the augmentation on, or set it to 0')


# ---------------------------------------------------------------------------------------------- the sum
class TokenizerLoss(nn.Module):
    """Losses of both players; its state dict holds the discriminator, the LeCAM means and a counter.

    Args:
        l1_weight, l2_weight, latent_weight: of |x - y|, of (x - y)^2, and of the tokenizer's own loss.
        perceptual: maps two batches to distances (B,); None leaves the term out.
        perceptual_min: images with a shorter side, in pixels, skip it.
        discriminator: None trains without a GAN.
        gan: needed with a discriminator.
    """

    def __init__(self, *, l1_weight: float, l2_weight: float, latent_weight: float = 1.,
                 perceptual: nn.Module | None, perceptual_weight: float = 1., perceptual_min: int = 48,
                 discriminator: nn.Module | None = None, gan: GANSettings | None = None):
        super().__init__()
        if (discriminator is None) != (gan is None):
            raise ValueError('a discriminator and its GANSettings go together: pass both or none')
        self.l1_weight = l1_weight
        self.l2_weight = l2_weight
        self.latent_weight = latent_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_min = perceptual_min
        self.perceptual = perceptual
        self.discriminator = discriminator
        self.gan = gan
        self.augment = DiffAug()
        self.lecam = LeCAM() if gan and gan.lecam else None
        self.register_buffer('num_alarming', torch.zeros((), dtype=torch.int64))  # steps in a row

    # ------------------------------------------------------------------------------ schedule
    def is_active(self, progress: float) -> bool:
        """True if the discriminator takes part, at this share of the training."""
        return self.discriminator is not None and progress >= self.gan.start

    def ramp(self, progress: float) -> float:
        """Factor s of the adversarial loss: 0 up to the start, then rising linearly to 1."""
        if not self.is_active(progress):
            return 0.
        return min((progress - self.gan.start) / self.gan.ramp, 1.) if self.gan.ramp else 1.

    # ------------------------------------------------------------------------------ generator
    def per_image(self, target_B3HW: torch.Tensor, rec_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        """l1, l2 and lp (perceptual distance, 0 where skipped) of every image, (B,) float32, unweighted."""
        with torch.autocast(rec_B3HW.device.type, enabled=False):
            target_B3HW = at_least_float32(target_B3HW)
            rec_B3HW = at_least_float32(rec_B3HW)
            error = rec_B3HW - target_B3HW
            l1_B = error.abs().mean((1, 2, 3))
            l2_B = error.square().mean((1, 2, 3))
            skipped = self.perceptual is None or min(rec_B3HW.shape[-2:]) < self.perceptual_min
            lp_B = torch.zeros_like(l1_B) if skipped else self.perceptual(target_B3HW, rec_B3HW)
            return dict(l1=l1_B, l2=l2_B, lp=lp_B)

    def rec_loss(self, means: dict[str, T]) -> T:
        """L_rec from the means of what `per_image` returns."""
        return (self.l1_weight * means['l1'] + self.l2_weight * means['l2']
                + self.perceptual_weight * means['lp'])

    def generator(self, rec: Reconstruction, progress: float, last_layer: nn.Parameter,
                  amp: AbstractContextManager) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the tokenizer, the mean over its views; the discriminator is left frozen and in eval mode.

        Args:
            progress: share of the training done, in [0, 1].
            last_layer: weight of the decoder's last convolution, for lambda; not wrapped by DDP.
            amp: precision of the discriminator's trunk.
        Returns:
            (scalar float32, detached scalars); lambda and what belongs to the GAN are 0 before its start.
        """
        with torch.autocast(rec.latent_loss.device.type, enabled=False):
            views = [self.per_image(target, image) for target, image in rec.views]
            l1, l2, lp = (sum(view[name].mean() for view in views) / len(views)
                          for name in ('l1', 'l2', 'lp'))
            rec_loss = self.rec_loss(dict(l1=l1, l2=l2, lp=lp))
            latent_loss = at_least_float32(rec.latent_loss)
            loss = rec_loss + self.latent_weight * latent_loss
            gen_loss = weight = gan_weight = torch.zeros_like(rec_loss)
            if self.is_active(progress):
                self.discriminator.eval().requires_grad_(False)
                logits = [self._logits(self.discriminator, self._shown(fake, progress), amp)
                          for _, fake in self._gan_views(rec)]
                gen_loss = sum(generator_loss(self.gan.kind, fake) for fake in logits) / len(rec.views)
                weight = self._lambda(rec_loss, gen_loss, last_layer)
                gan_weight = self.ramp(progress) * self.gan.weight * weight
                loss = loss + gan_weight * gen_loss
        parts = dict(l1=l1, l2=l2, lp=lp, rec_loss=rec_loss, latent_loss=latent_loss, gen_loss=gen_loss,
                     gan_weight=gan_weight) | {'lambda': weight}
        return loss, {name: value.detach() for name, value in parts.items()}

    def _lambda(self, rec_loss: torch.Tensor, gen_loss: torch.Tensor,
                last_layer: nn.Parameter) -> torch.Tensor:
        """Adaptive weight, 1 if it is off, watched for growing out of bounds."""
        gan = self.gan
        if not gan.adaptive:
            return torch.ones_like(rec_loss)
        weight = adaptive_weight(rec_loss, gen_loss, last_layer, gan.adaptive_min, gan.adaptive_max,
                                 gan.adaptive_eps)
        self.num_alarming.copy_(torch.where(weight > ALARM, self.num_alarming + 1, 0))
        if self.num_alarming == ALARM:
            logger.warning('the adaptive GAN weight was above %d for %d steps in a row: expect worse '
                           'reconstructions; a lower adaptive_max or GAN weight helps', ALARM, ALARM)
        return weight

    # ------------------------------------------------------------------------------ discriminator
    def discriminate(self, rec: Reconstruction, progress: float, amp: AbstractContextManager,
                     net: nn.Module | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the discriminator, the mean over the views it sees; it is left trainable and in train mode.

        Real and fake images of a view share one forward, and so their batch statistics.

        Args:
            net: the discriminator as wrapped by DDP.
        Returns:
            (scalar float32, detached scalars): losses, mean logits, shares of images told right.
        """
        self.discriminator.train().requires_grad_(True)
        gan = self.gan
        terms = defaultdict(list)
        with torch.autocast(rec.latent_loss.device.type, enabled=False):
            for target, image in self._gan_views(rec):
                shown = [self._shown(target, progress), self._shown(image.detach(), progress)]
                if gan.consistency:  # augmented once more: the same images, changed more strongly
                    shown += [self.augment(x) for x in shown]
                logits = self._logits(self.discriminator if net is None else net, torch.cat(shown), amp)
                real, fake, *again = logits.chunk(len(shown))
                terms['disc_loss'].append(discriminator_loss(gan.kind, real, fake, gan.half))
                if gan.consistency:
                    terms['consistency'].append(gan.consistency * F.mse_loss(torch.cat(again),
                                                                             torch.cat([real, fake])))
                if gan.lecam:
                    terms['lecam'].append(gan.lecam * self.lecam(real, fake))
                terms['logits_real'].append(real.mean())
                terms['logits_fake'].append(fake.mean())
                terms['acc_real'].append((real > 0).to(real.dtype).mean())
                terms['acc_fake'].append((fake < 0).to(fake.dtype).mean())
            means = {name: torch.stack(values).mean() for name, values in terms.items()}
            loss = sum(means[name] for name in ('disc_loss', 'consistency', 'lecam') if name in means)
        if gan.lecam:
            self.lecam.update(means['logits_real'], means['logits_fake'])
        return loss, {name: value.detach() for name, value in means.items()}

    def _gan_views(self, rec: Reconstruction) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The views that the discriminator sees."""
        views = rec.views[-1:] if self.gan.full_view_only else rec.views
        large = [view for view in views if min(view[0].shape[-2:]) >= self.gan.min_pixels]
        if not large:
            raise ValueError(f'the discriminator needs images of at least {self.gan.min_pixels} pixels, got '
                             f'{tuple(views[-1][0].shape[-2:])}: train on larger ones or without it')
        return large

    def _shown(self, images_B3HW: torch.Tensor, progress: float) -> torch.Tensor:
        """Images as the discriminator sees them, blurred by a Gaussian that fades from sqrt(H / 2) pixels."""
        if self.gan.blur:
            fade = 1 - (progress - self.gan.start) / self.gan.blur
            images_B3HW = blur(images_B3HW, fade * math.sqrt(images_B3HW.shape[-2] / 2))
        return self.augment(images_B3HW) if self.gan.augment else images_B3HW

    @staticmethod
    def _logits(net: nn.Module, images_B3HW: torch.Tensor, amp: AbstractContextManager) -> torch.Tensor:
        with amp:
            return net(images_B3HW)
