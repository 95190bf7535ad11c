"""Training losses of image tokenizers: pixels, a perceptual distance, and an adversarial loss.

The tokenizer is the generator of a GAN. With images x, reconstructions y and the progress t of the training,

    L_G = L_rec + w_lat L_lat + s(t) w_gan lambda L_adv,   L_rec = w1 |x - y| + w2 (x - y)^2 + w_p LPIPS(x, y)

All reductions run in float32 with autocast off.
Letters: B batch, C channels, h w feature map, 3HW image.
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
ALARM = 100  # a warning follows when lambda exceeds this number for as many steps in a row


# ---------------------------------------------------------------------------------------------- perceptual
def vgg16_features() -> nn.Sequential:
    """Convolutions of VGG16 (arXiv 1409.1556) up to relu5_3; indices as in torchvision."""
    layers = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            layers.append(nn.ReLU())
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])  # nothing reads the last pooling


def alexnet_features() -> nn.Sequential:
    """Convolutions of AlexNet (arXiv 1404.5997) up to the fifth ReLU; indices as in torchvision."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


LPIPS_TRUNKS = {  # constructor, indices of the layers whose features are compared, and their channels
    'vgg': (vgg16_features, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
    'alex': (alexnet_features, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
}


class LPIPS(Frozen):
    """Learned perceptual distance, version 0.1: d(x, y) = sum_l mean_hw sum_C w_l (f_l(x) - f_l(y))^2.

    f_l are the features of layer l of a frozen classifier, divided by their length over the channels.

    Args:
        trunk: the classifier, 'vgg' (used in training) or 'alex'. All weights are random until
            `load_published` is called.
    Raises:
        ValueError: an unknown trunk.
    Source: arXiv 1801.03924, Eq. 1; keys as in richzhang/PerceptualSimilarity.
    """

    def __init__(self, trunk: str = 'vgg'):
        super().__init__()
        if trunk not in LPIPS_TRUNKS:
            raise ValueError(f'the trunk of LPIPS must be one of {list(LPIPS_TRUNKS)}, got {trunk!r}')
        make_features, self.taps, widths = LPIPS_TRUNKS[trunk]
        self.trunk = trunk
        self.features = make_features()

        # The linear heads w_l: one weight for every channel of a compared layer.
        for i, width in enumerate(widths):
            self.register_parameter(f'lin{i}', nn.Parameter(torch.full((width,), 1 / width)))

        # Mean and standard deviation of ImageNet's colours, for images in [-1, 1].
        self.shift = nn.Parameter(torch.tensor([-.030, -.088, -.188]).view(3, 1, 1))
        self.scale = nn.Parameter(torch.tensor([.458, .448, .450]).view(3, 1, 1))
        self.freeze()

    def load_published(self, state: dict[str, torch.Tensor], source: str) -> None:
        """Load the weights of the trunk and of the linear heads.

        Args:
            state: the trunk under torchvision's keys together with heads such as `lin0.model.1.weight`, or
                the content of a file that holds both.
            source: where the weights come from, for the error.
        Raises:
            ValueError: heads or trunk are missing, or belong to another trunk.
        """
        # Whatever the file calls them, the weights get the names that they have here.
        weights = dict(shift=self.shift, scale=self.scale)
        for key, value in state.items():
            if match := re.fullmatch(r'(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))', key):
                weights[f'features.{match[1]}'] = value
            elif match := re.fullmatch(r'lin(?:s\.)?(\d)\.model\.1\.weight', key):
                weights[f'lin{match[1]}'] = value.flatten()

        # Files with the heads alone are common, so that mistake has an error of its own.
        expected = f'expected LPIPS weights with the trunk {self.trunk!r}, got others in {source}'
        has_trunk = any(key.startswith('features') for key in weights)
        if 'lin0' in weights and not has_trunk:
            expected = (f'{source} holds only the linear heads of LPIPS: pass them as --lpips_lin beside the '
                        'trunk as --lpips_vgg, or a file with both as --lpips_path')
        self.load(weights, expected)

    def _normalised_features(self, images_B3HW: torch.Tensor) -> Iterator[torch.Tensor]:
        """Feature maps (B, C, h, w) of the compared layers, divided by their length over the channels."""
        x = (images_B3HW.to(self.shift.dtype) - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                # The small number is inside the root, so that a vector of zeros has a finite gradient.
                length = (x.square().sum(1, keepdim=True) + 1e-9).sqrt()
                yield x / length

    def forward(self, x_B3HW: torch.Tensor, y_B3HW: torch.Tensor) -> torch.Tensor:
        """Distances (B,) in float32 of images in [-1, 1].

        Raises:
            ValueError: the shapes differ.
        """
        check_same_shape(x_B3HW, y_B3HW)
        with torch.autocast(x_B3HW.device.type, enabled=False):
            features_of_both = zip(self._normalised_features(x_B3HW), self._normalised_features(y_B3HW),
                                   strict=True)
            distance_B = 0.
            for i, (x, y) in enumerate(features_of_both):
                weight_C11 = getattr(self, f'lin{i}').view(-1, 1, 1)
                error = (x - y).square() * weight_C11                                      # (B, C, h, w)
                distance_B = distance_B + error.sum(1).mean((1, 2))                        # (B,)
            return distance_B


def check_same_shape(x: torch.Tensor, y: torch.Tensor) -> None:
    """Make sure that two batches can be compared image by image: LPIPS would broadcast them silently.

    Raises:
        ValueError: their shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f'expected two batches of equal shape, got {tuple(x.shape)} and {tuple(y.shape)}: '
                         'compare as many images of one size')


class PyramidLoss(nn.Module):
    """Substitute for a perceptual distance without weights: L1 between the bands of two Laplacian pyramids.

    Args:
        num_octaves: number of bands that are compared, beginning with the finest. What is left, an image of
            low resolution, is the business of the pixel loss.
    """

    def __init__(self, num_octaves: int = 3):
        super().__init__()
        self.num_octaves = num_octaves

    def forward(self, x_B3HW: torch.Tensor, y_B3HW: torch.Tensor) -> torch.Tensor:
        """Distances (B,) in float32.

        Raises:
            ValueError: the shapes differ.
        """
        check_same_shape(x_B3HW, y_B3HW)

        # A pyramid is linear, so the pyramid of the difference equals the difference of the pyramids.
        error = at_least_float32(x_B3HW) - at_least_float32(y_B3HW)                        # (B, 3, H, W)
        distance_B = 0.
        for _ in range(self.num_octaves):
            low = F.avg_pool2d(error, 2, ceil_mode=True)                                   # (B, 3, H/2, W/2)
            smooth = F.interpolate(low, size=error.shape[-2:], mode='bilinear', align_corners=False)
            band = error - smooth                                                          # (B, 3, H, W)
            distance_B = distance_B + band.abs().mean((1, 2, 3))                           # (B,)
            error = low
        return distance_B


# ---------------------------------------------------------------------------------------------- adversarial
GAN_KINDS = ('hinge', 'vanilla', 'non-saturating')


def discriminator_loss(kind: str, real: torch.Tensor, fake: torch.Tensor, half: bool = False) -> torch.Tensor:
    """Loss that the discriminator minimises, a scalar.

    Args:
        kind: one of `GAN_KINDS`. 'hinge' is arXiv 1705.02894; the others are the binary cross-entropy of
            arXiv 1406.2661.
        real, fake: logits of any shape for real images and for reconstructions.
        half: the mean of both terms in place of their sum, as in VQGAN.
    """
    if kind == 'hinge':
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    else:
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
    if half:
        loss = loss / 2
    return loss


def generator_loss(kind: str, fake: torch.Tensor) -> torch.Tensor:
    """Loss L_adv that the tokenizer minimises, a scalar, from the logits of its reconstructions.

    'hinge' and, as in VQGAN, 'vanilla' take the negative mean logit.
    """
    if kind == 'non-saturating':
        return F.softplus(-fake).mean()
    return -fake.mean()


def adaptive_weight(rec_loss: torch.Tensor, gen_loss: torch.Tensor, last_layer: nn.Parameter, low: float,
                    high: float, eps: float) -> torch.Tensor:
    """lambda = |dL_rec/dW| / (|dL_adv/dW| + eps), clamped to [low, high]; arXiv 2012.09841, Eq. 7.

    It makes the adversarial gradient about as long as that of the reconstruction loss.

    Args:
        rec_loss, gen_loss: scalars L_rec and L_adv with a graph, which stays.
        last_layer: W, the last weight that both losses share.
    """
    rec_grad = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)[0]
    gen_grad = torch.autograd.grad(gen_loss, last_layer, retain_graph=True)[0]

    # Gradients are averaged over ranks before their norms are taken, which gives the lambda of the global
    # batch, equal on all ranks.
    grads = torch.stack([rec_grad, gen_grad])
    dist.allreduce(grads)
    grads = grads / dist.get_world_size()
    rec_norm, gen_norm = grads.flatten(1).norm(dim=1)
    return (rec_norm / (gen_norm + eps)).clamp(low, high)


class LeCAM(nn.Module):
    """Pulls the logits of real images towards the mean logit of fake ones, and vice versa: arXiv 2104.03310.

    It regularises a discriminator that has few images to learn from.

    Args:
        decay: of the moving averages m_r and m_f, the mean logits of real and fake images over all ranks.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer('m_r', torch.zeros(()))
        self.register_buffer('m_f', torch.zeros(()))

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Penalty, a scalar, of logits of any shape; one-sided, as in the code of its authors."""
        real_penalty = F.relu(real - self.m_f).square().mean()
        fake_penalty = F.relu(self.m_r - fake).square().mean()
        return real_penalty + fake_penalty

    @torch.no_grad()
    def update(self, real_mean: torch.Tensor, fake_mean: torch.Tensor) -> None:
        """Move the averages by the mean logits of this rank's step, two scalars; every rank calls it."""
        means = torch.stack([real_mean, fake_mean])
        dist.allreduce(means)
        means = means / dist.get_world_size()
        for average, mean in zip((self.m_r, self.m_f), means, strict=True):
            average.lerp_(mean.to(average.dtype), 1 - self.decay)


@dataclass(frozen=True)
class GANSettings:
    """When and how the discriminator takes part in the training of a tokenizer.

    Raises:
        ValueError: an unknown kind, a negative fraction, consistency without augmentation.
    """
    weight: float              # w_gan, the weight of the adversarial loss before lambda and the ramp
    start: float               # fraction of training before the discriminator's first step; above 1 = never
    ramp: float                # fraction of training in which the weight then rises from 0; 0 = at once
    kind: str = 'hinge'        # one of GAN_KINDS
    half: bool = False         # halve the discriminator's loss
    adaptive: bool = False     # multiply the weight by lambda, see `adaptive_weight`
    adaptive_min: float = 0.   # lower limit of lambda
    adaptive_max: float = 1e4  # upper limit of lambda
    adaptive_eps: float = 1e-4  # added to the norm of the adversarial gradient in lambda
    augment: bool = False      # apply DiffAug to everything that the discriminator gets
    consistency: float = 0.    # weight of balanced consistency; 0 = off
    lecam: float = 0.          # weight of LeCAM; 0 = off
    blur: float = 0.           # fraction of training after the start in which its input is blurred; 0 = off
    full_size_only: bool = False  # of several decoded sizes, the discriminator gets the last one alone
    min_pixels: int = 32       # decoded sizes with a shorter side are not given to the discriminator

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
    """Losses of a tokenizer and of its discriminator.

    The state dict holds the discriminator, the averages of LeCAM and a counter.

    Args:
        l1_weight: w1, of |x - y|.
        l2_weight: w2, of (x - y)^2.
        latent_weight: w_lat, of the tokenizer's own loss: that of its quantizer, or the divergence.
        perceptual: maps two batches of images to distances (B,); None leaves the term out.
        perceptual_weight: w_p.
        perceptual_min: images with a side shorter than that, in pixels, get no perceptual loss.
        discriminator: maps images to logits; None trains without an adversarial loss.
        gan: settings of the adversarial loss; needed together with a discriminator.
    Raises:
        ValueError: a discriminator without settings, or settings without a discriminator.
    """

    def __init__(
        self,
        *,
        l1_weight: float,
        l2_weight: float,
        latent_weight: float = 1.,
        perceptual: nn.Module | None,
        perceptual_weight: float = 1.,
        perceptual_min: int = 48,
        discriminator: nn.Module | None = None,
        gan: GANSettings | None = None,
    ):
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
        # number of steps in a row at which lambda was too large
        self.register_buffer('num_alarming', torch.zeros((), dtype=torch.int64))

    # ------------------------------------------------------------------------------ schedule
    def is_active(self, progress: float) -> bool:
        """Whether the discriminator takes part at this fraction of the training."""
        return self.discriminator is not None and progress >= self.gan.start

    def ramp(self, progress: float) -> float:
        """Factor s(t) of the adversarial loss: 0 up to the start, then rising linearly to 1.

        A discriminator that has only just begun to learn would pull the tokenizer in random directions.
        """
        if not self.is_active(progress):
            return 0.
        if not self.gan.ramp:
            return 1.
        return min((progress - self.gan.start) / self.gan.ramp, 1.)

    # ------------------------------------------------------------------------------ generator
    def per_image(self, target_B3HW: torch.Tensor, rec_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Unweighted terms of L_rec, each (B,) in float32.

        Returns:
            l1 and l2: means over all values of an image; lp: perceptual distance, 0 for images below
            `perceptual_min`.
        """
        with torch.autocast(rec_B3HW.device.type, enabled=False):
            target_B3HW = at_least_float32(target_B3HW)
            rec_B3HW = at_least_float32(rec_B3HW)
            error = rec_B3HW - target_B3HW
            l1_B = error.abs().mean((1, 2, 3))
            l2_B = error.square().mean((1, 2, 3))

            # Deep layers of the trunk have hardly a position left on small images.
            lp_B = torch.zeros_like(l1_B)
            is_large = min(rec_B3HW.shape[-2:]) >= self.perceptual_min
            if self.perceptual is not None and is_large:
                lp_B = self.perceptual(target_B3HW, rec_B3HW)
            return dict(l1=l1_B, l2=l2_B, lp=lp_B)

    def rec_loss(self, means: dict[str, T]) -> T:
        """L_rec, from the means of the terms that `per_image` returns."""
        return (self.l1_weight * means['l1'] + self.l2_weight * means['l2']
                + self.perceptual_weight * means['lp'])

    def generator(self, rec: Reconstruction, progress: float, last_layer: nn.Parameter,
                  amp: AbstractContextManager) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss L_G of the tokenizer, the mean over all sizes it decodes.

        It leaves the discriminator frozen and in eval mode.

        Args:
            rec: what the tokenizer made of a batch.
            progress: fraction of the training done, in [0, 1].
            last_layer: weight of the decoder's last convolution, not wrapped by DDP; lambda needs it.
            amp: precision of the discriminator.
        Returns:
            loss: scalar float32.
            parts: detached scalars worth logging; lambda and the adversarial terms are 0 before the start.
        Raises:
            ValueError: all images are too small for the discriminator.
        """
        with torch.autocast(rec.latent_loss.device.type, enabled=False):
            # Reconstruction: a size counts as much as any other, however many pixels it has.
            terms = [self.per_image(target, image) for target, image in rec.views]
            means = {}
            for name in ('l1', 'l2', 'lp'):
                means[name] = sum(values[name].mean() for values in terms) / len(terms)
            rec_loss = self.rec_loss(means)

            # The tokenizer's own term: it keeps codes close to features, or latents close to N(0, 1).
            latent_loss = at_least_float32(rec.latent_loss)
            loss = rec_loss + self.latent_weight * latent_loss

            gen_loss = weight = gan_weight = torch.zeros_like(rec_loss)
            if self.is_active(progress):
                # The discriminator only gives an opinion here. It must not move, nor update its statistics.
                self.discriminator.eval().requires_grad_(False)
                gen_losses = []
                for _, image in self._large_enough(rec):
                    fake = self._logits(self.discriminator, self._as_input(image, progress), amp)
                    gen_losses.append(generator_loss(self.gan.kind, fake))
                # The mean is over all sizes again, also over those that the discriminator did not get.
                gen_loss = sum(gen_losses) / len(rec.views)

                # The weight of the adversarial term: s(t) * w_gan * lambda.
                weight = self._lambda(rec_loss, gen_loss, last_layer)
                gan_weight = self.ramp(progress) * self.gan.weight * weight
                loss = loss + gan_weight * gen_loss

        parts = {
            **means,
            'rec_loss': rec_loss,
            'latent_loss': latent_loss,
            'gen_loss': gen_loss,
            'gan_weight': gan_weight,
            'lambda': weight,
        }
        return loss, {name: value.detach() for name, value in parts.items()}

    def _lambda(self, rec_loss: torch.Tensor, gen_loss: torch.Tensor,
                last_layer: nn.Parameter) -> torch.Tensor:
        """Adaptive weight, a scalar; 1 if it is switched off."""
        gan = self.gan
        if not gan.adaptive:
            return torch.ones_like(rec_loss)
        weight = adaptive_weight(rec_loss, gen_loss, last_layer, gan.adaptive_min, gan.adaptive_max,
                                 gan.adaptive_eps)

        # A large lambda means that the discriminator hardly has a gradient left, and noise is amplified.
        self.num_alarming.copy_(torch.where(weight > ALARM, self.num_alarming + 1, 0))
        if self.num_alarming == ALARM:
            logger.warning('the adaptive GAN weight was above %d for %d steps in a row: expect worse '
                           'reconstructions; a lower adaptive_max or GAN weight helps', ALARM, ALARM)
        return weight

    # ------------------------------------------------------------------------------ discriminator
    def discriminate(self, rec: Reconstruction, progress: float, amp: AbstractContextManager,
                     net: nn.Module | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the discriminator, the mean over the decoded sizes that it gets.

        It leaves the discriminator trainable and in train mode.

        Args:
            rec: what the tokenizer made of a batch; no gradient flows back into it.
            progress: fraction of the training done, in [0, 1].
            amp: precision of the discriminator.
            net: the discriminator as wrapped by DDP; None takes the bare one.
        Returns:
            loss: scalar float32.
            parts: detached scalars worth logging: the terms of the loss, mean logits, and the fractions of
                real and fake logits that have the right sign.
        Raises:
            ValueError: all images are too small for the discriminator.
        """
        self.discriminator.train().requires_grad_(True)
        if net is None:
            net = self.discriminator
        gan = self.gan
        terms = defaultdict(list)
        with torch.autocast(rec.latent_loss.device.type, enabled=False):
            for target, image in self._large_enough(rec):
                # Real and fake images share one forward pass, and with it the statistics of batch norms. For
                # balanced consistency they are augmented once more: the same images, changed more strongly.
                inputs = [self._as_input(target, progress), self._as_input(image.detach(), progress)]
                if gan.consistency:
                    inputs += [self.augment(x) for x in inputs]
                logits = self._logits(net, torch.cat(inputs), amp)
                real, fake, *augmented_again = logits.chunk(len(inputs))
                terms['disc_loss'].append(discriminator_loss(gan.kind, real, fake, gan.half))

                # Balanced consistency: an augmentation must not change the logits of real and fake images.
                if gan.consistency:
                    change = F.mse_loss(torch.cat(augmented_again), torch.cat([real, fake]))
                    terms['consistency'].append(gan.consistency * change)
                if gan.lecam:
                    terms['lecam'].append(gan.lecam * self.lecam(real, fake))

                # How far ahead of the tokenizer the discriminator is, for the log.
                terms['logits_real'].append(real.mean())
                terms['logits_fake'].append(fake.mean())
                terms['acc_real'].append((real > 0).to(real.dtype).mean())
                terms['acc_fake'].append((fake < 0).to(fake.dtype).mean())
            means = {name: torch.stack(values).mean() for name, values in terms.items()}
            loss = sum(means[name] for name in ('disc_loss', 'consistency', 'lecam') if name in means)

        # The averages of LeCAM move after the loss has used them.
        if gan.lecam:
            self.lecam.update(means['logits_real'], means['logits_fake'])
        return loss, {name: value.detach() for name, value in means.items()}

    def _large_enough(self, rec: Reconstruction) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (target, reconstruction) of the sizes that the discriminator gets.

        Raises:
            ValueError: all sizes are too small for it.
        """
        pairs = rec.views
        if self.gan.full_size_only:
            pairs = pairs[-1:]
        large = [pair for pair in pairs if min(pair[0].shape[-2:]) >= self.gan.min_pixels]
        if not large:
            raise ValueError(f'the discriminator needs images of at least {self.gan.min_pixels} pixels, got '
                             f'{tuple(pairs[-1][0].shape[-2:])}: train on larger ones or without it')
        return large

    def _as_input(self, images_B3HW: torch.Tensor, progress: float) -> torch.Tensor:
        """Images (B, 3, H, W) as the discriminator gets them: blurred and augmented, where switched on."""
        if self.gan.blur:
            # The blur keeps a young discriminator away from details that no tokenizer has learned yet (the
            # idea is of arXiv 2106.12423). It fades linearly from a deviation of sqrt(H / 2) pixels.
            fade = 1 - (progress - self.gan.start) / self.gan.blur
            sigma = fade * math.sqrt(images_B3HW.shape[-2] / 2)
            images_B3HW = blur(images_B3HW, sigma)
        if self.gan.augment:
            images_B3HW = self.augment(images_B3HW)
        return images_B3HW

    @staticmethod
    def _logits(net: nn.Module, images_B3HW: torch.Tensor, amp: AbstractContextManager) -> torch.Tensor:
        """Logits in float32 of a network that may run in half precision inside."""
        with amp:
            return net(images_B3HW)
