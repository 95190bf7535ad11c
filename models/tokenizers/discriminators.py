"""Discriminators of tokenizer training: images (B, 3, H, W) in [-1, 1] -> float32 logits, positive for real.

PatchGAN looks at overlapping patches, StyleGAN at the whole image, DINODiscriminator at the features of a
frozen vision transformer.
Letters: B batch, C channels (in, out: of a layer), l tokens, H heads, d head dim, h w feature map, 3HW image.
"""
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import dist
from models.attention import attend
from models.base import at_least_float32
from models.noise import GlobalBatch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------- parts
class Frozen(nn.Module):
    """A network whose weights come from a file and never change: not trained, not saved, always in eval mode.

    Its weights are buffers that are not part of the state dict: `.to()` moves them, while `parameters()` and
    `state_dict()` are empty.
    """

    def freeze(self) -> None:
        """Turn every parameter into such a buffer; a constructor calls it last."""
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> 'Frozen':
        """Stay in eval mode: a parent module passes its own mode on."""
        return super().train(False)

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor], expected: str) -> None:
        """Copy all weights from a state dict; further entries of it are ignored.

        Args:
            expected: what was asked for and what came, as the beginning of the error.
        Raises:
            ValueError: a weight is missing or has another shape.
        """
        own = dict(self.named_buffers())
        wrong = []
        for name, weight in own.items():
            if name not in state:
                wrong.append(f'{name} missing')
            elif state[name].shape != weight.shape:
                wrong.append(f'{name} {tuple(state[name].shape)} instead of {tuple(weight.shape)}')
        if wrong:
            listing = ', '.join(wrong[:3])
            if len(wrong) > 3:
                listing += ', ...'
            raise ValueError(f'{expected}: {listing}, {len(wrong)} of {len(own)} weights')
        for name, weight in own.items():
            weight.copy_(state[name])


class SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks.

    Every rank computes a loss of its own from the sum, so its gradient is the sum over ranks as well.
    """

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        """The sum, of the shape of `t`, equal on all ranks."""
        total = t.clone()
        dist.allreduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """The gradient, summed by the same function: it has a gradient in turn."""
        return SumOverRanks.apply(grad)


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm of (B, C, ...) over the images of all ranks, each of which has equally many.

    It works on any device, while nn.SyncBatchNorm needs CUDA; with one process it is torch's own batch norm.
    """

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Allow any number of dimensions after the channels, so that it normalises tokens, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or dist.get_world_size() == 1:
            return super().forward(x)
        all_but_channels = [0, *range(2, x.dim())]
        per_channel = (1, -1, *[1] * (x.dim() - 2))
        count = x.numel() // self.num_features * dist.get_world_size()

        # The variance is taken of centred values, which needs a second sum over ranks but cancels nothing.
        values = at_least_float32(x)
        mean_C = SumOverRanks.apply(values.sum(all_but_channels)) / count                  # (C,)
        values = values - mean_C.view(per_channel)                                         # (B, C, ...)
        var_C = SumOverRanks.apply(values.square().sum(all_but_channels)) / count          # (C,)

        # As in torch, the running variance is the unbiased one, although the batch uses the biased one.
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased_var_C = var_C.to(self.running_var.dtype) * (count / (count - 1))
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased_var_C, self.momentum)

        factor_C = self.weight * (var_C + self.eps).rsqrt()
        normalised = values * factor_C.view(per_channel) + self.bias.view(per_channel)
        return normalised.to(x.dtype)                                                      # (B, C, ...)


# ---------------------------------------------------------------------------------------------- inputs
class DiffAug(nn.Module):
    """Differentiable translation, colour change and cut-out, each applied to every image: arXiv 2006.10738.

    The discriminator never sees an image as it is, so it cannot learn the training images by heart.

    Args:
        cutout: side of the erased square as a fraction of the image's.
        translation: largest shift as a fraction of the image's side; zeros come in.
    """

    def __init__(self, cutout: float = 0.2, translation: float = 1 / 8):
        super().__init__()
        self.cutout = cutout
        self.translation = translation

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Augmented images of the same shape; each draws seven uniform numbers of its own."""
        x = images_B3HW
        batch = GlobalBatch.current
        u_B7 = batch.per_image(len(x), x.device, lambda t: t.uniform_(), (7,)).to(x.dtype)  # (B, 7)
        down, right, brightness, saturation, contrast, top, left = u_B7.T                  # (B,) each

        # 1. Translation, in whole pixels.
        x = self._shifted(x, down, dim=2)                                                  # (B, 3, H, W)
        x = self._shifted(x, right, dim=3)

        # 2. Colour: brightness moves by -0.5 to 0.5; saturation, the distance from the grey image, is scaled
        #    by 0 to 2; contrast, the distance from the mean of the image, by 0.5 to 1.5.
        x = x + brightness.view(-1, 1, 1, 1) - 0.5
        grey = x.mean(1, keepdim=True)                                                     # (B, 1, H, W)
        x = torch.lerp(grey, x, 2 * saturation.view(-1, 1, 1, 1))
        mean = x.mean((1, 2, 3), keepdim=True)                                             # (B, 1, 1, 1)
        x = torch.lerp(mean, x, contrast.view(-1, 1, 1, 1) + 0.5)

        # 3. Cut-out: a square becomes mid-grey.
        hole = self._window(x, top, dim=2) & self._window(x, left, dim=3)                  # (B, 1, H, W)
        return x.masked_fill(hole, 0)

    def _shifted(self, x: torch.Tensor, u_B: torch.Tensor, dim: int) -> torch.Tensor:
        """Images moved along `dim` by a whole number of pixels, which u_B in [0, 1) decides."""
        limit = round(x.shape[dim] * self.translation)
        offset_B = (u_B * (2 * limit + 1)).floor() - limit

        # Every pixel knows where it comes from; sources beyond the border give 0.
        source = self._positions(x, dim) - offset_B.view(-1, 1, 1, 1)
        inside = source.clamp(0, x.shape[dim] - 1)
        moved = x.gather(dim, inside.long().expand_as(x))
        return moved * (source == inside).to(x.dtype)

    def _window(self, x: torch.Tensor, u_B: torch.Tensor, dim: int) -> torch.Tensor:
        """True where the square lies along `dim`; its centre is anywhere, so a part may be outside."""
        side = round(x.shape[dim] * self.cutout)
        first = (u_B * x.shape[dim]).floor().view(-1, 1, 1, 1) - side // 2
        position = self._positions(x, dim)
        return (position >= first) & (position < first + side)

    @staticmethod
    def _positions(x: torch.Tensor, dim: int) -> torch.Tensor:
        """0, 1, 2, ... along `dim`, broadcastable to x."""
        shape = [1, 1, 1, 1]
        shape[dim] = -1
        return torch.arange(x.shape[dim], device=x.device).view(shape)


def blur(images_B3HW: torch.Tensor, sigma: float) -> torch.Tensor:
    """Images (B, 3, H, W) filtered by a Gaussian of standard deviation `sigma` pixels.

    The borders are mirrored. 0 or less changes nothing.
    """
    if sigma <= 0:
        return images_B3HW
    channels, height, width = images_B3HW.shape[1:]

    # Beyond three deviations there is nothing to see, and mirroring reaches no further than an image.
    radius = min(math.ceil(3 * sigma), height - 1, width - 1)
    position = torch.arange(-radius, radius + 1, device=images_B3HW.device, dtype=images_B3HW.dtype)
    kernel = (-position.square() / (2 * sigma ** 2)).exp()
    kernel = (kernel / kernel.sum()).expand(channels, 1, 1, -1)                            # (3, 1, 1, size)

    # A Gaussian in two dimensions is the product of two in one dimension: rows first, then columns.
    padded = F.pad(images_B3HW, (radius, radius, radius, radius), mode='reflect')
    blurred = F.conv2d(padded, kernel, groups=channels)
    return F.conv2d(blurred, kernel.mT, groups=channels)                                   # (B, 3, H, W)


# ---------------------------------------------------------------------------------------------- PatchGAN
class PatchGAN(nn.Module):
    """Strided 4x4 convolutions: one logit per overlapping patch, (B, 1, H / 8 - 2, W / 8 - 2) with 3 layers.

    Args:
        width: channels of the first layer; they double up to 8 times that.
        num_layers: how often the sides are halved.
    Source: arXiv 1611.07004, Sec. 3.2.2; keys as in FoundationVision/LlamaGen.
    """

    def __init__(self, width: int = 64, num_layers: int = 3):
        super().__init__()
        # The first layer has no norm, the last halving is followed by a layer without stride.
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, num_layers + 1):
            previous = channels
            channels = width * min(2 ** i, 8)
            stride = 2 if i < num_layers else 1
            layers.append(nn.Conv2d(previous, channels, 4, stride=stride, padding=1, bias=False))
            layers.append(GlobalBatchNorm(channels))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.main = nn.Sequential(*layers)

        # Initialisation as in DCGAN (arXiv 1511.06434) and pix2pix.
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
            elif isinstance(layer, GlobalBatchNorm):
                nn.init.normal_(layer.weight, mean=1., std=0.02)

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Logits of all patches."""
        return at_least_float32(self.main(images_B3HW))                                    # (B, 1, h, w)


# ---------------------------------------------------------------------------------------------- StyleGAN
class Smooth(nn.Module):
    """(B, C, h, w) -> (B, C, h, w): every channel smoothed by [1, 2, 1] / 4 along both sides.

    The borders are mirrored. A strided convolution after it aliases less (arXiv 1904.11486).
    """

    def __init__(self):
        super().__init__()
        self.register_buffer('f', torch.tensor([1., 2., 1.]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        kernel = torch.outer(self.f, self.f).div(self.f.sum() ** 2).to(x.dtype)            # (3, 3)
        padded = F.pad(x, (1, 1, 1, 1), mode='reflect')
        return F.conv2d(padded, kernel.expand(channels, 1, 3, 3), groups=channels)         # (B, C, h, w)


class DownBlock(nn.Module):
    """(B, in, h, w) -> (B, out, h / 2, w / 2): two convolutions, smoothed and strided, beside a shortcut."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, channels, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.downsample = nn.Sequential(Smooth(), nn.Conv2d(channels, channels, 3, stride=2, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.net(x)                                                                    # (B, out, h, w)
        h = self.downsample(h)                                                             # half the sides
        shortcut = self.conv_res(x)                                                        # half the sides
        return (h + shortcut) / math.sqrt(2)  # the sum of two keeps the variance of one


class StyleGAN(nn.Module):
    """Residual blocks down to 4x4, then linear layers: one logit (B, 1) for an image of one fixed size.

    Args:
        image_size: side in pixels, a power of two in 8..1024.
    Raises:
        ValueError: another image size.
    Source: arXiv 1912.04958, Sec. 4; keys as in FoundationVision/LlamaGen.
    """

    def __init__(self, image_size: int):
        super().__init__()
        if image_size not in (8, 16, 32, 64, 128, 256, 512, 1024):
            raise ValueError(f'the StyleGAN discriminator needs a power of two in 8..1024 as image size, '
                             f'got {image_size}: use another size, or PatchGAN')
        self.image_size = image_size

        # The channels double whenever the sides halve, up to 512.
        def width(side: int) -> int:
            """Channels of feature maps with that side."""
            return min(512, 2 ** 14 // side)

        self.blocks = nn.Sequential(nn.Conv2d(3, width(image_size), 3, padding=1), nn.LeakyReLU(0.2))
        side = image_size
        while side > 4:
            self.blocks.append(DownBlock(width(side), width(side // 2)))
            side //= 2
        self.final_conv = nn.Sequential(nn.Conv2d(512, 512, 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(nn.Linear(512 * 4 * 4, 512), nn.LeakyReLU(0.2), nn.Linear(512, 1))

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Logit of each image.

        Raises:
            ValueError: the images have another size than the one given to the constructor.
        """
        if images_B3HW.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f'this StyleGAN discriminator sees images of {self.image_size} pixels, got '
                             f'{tuple(images_B3HW.shape[-2:])}: resize them, or use PatchGAN')
        h = self.blocks(images_B3HW)                                                       # (B, 512, 4, 4)
        h = self.final_conv(h)
        return at_least_float32(self.final_linear(h.flatten(1)))                           # (B, 1)


# ---------------------------------------------------------------------------------------------- DINO
class Block(nn.Module):
    """Transformer block, (B, l, C) -> (B, l, C), with norms before attention and MLP."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        # Plain dictionaries of layers: they exist for the published keys.
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)))
        self.num_heads = num_heads

    def forward(self, x_BlC: torch.Tensor) -> torch.Tensor:
        qkv_BlC = self.attn.qkv(self.norm1(x_BlC))                                         # (B, l, 3 C)
        q, k, v = qkv_BlC.unflatten(2, (3, self.num_heads, -1)).unbind(2)                  # 3 x (B, l, H, d)
        out_BlC = attend(q, k, v, backend='sdpa').flatten(2)                               # (B, l, C)
        x_BlC = x_BlC + self.attn.proj(out_BlC)

        hidden = F.gelu(self.mlp.fc1(self.norm2(x_BlC)))                                   # (B, l, 4 C)
        return x_BlC + self.mlp.fc2(hidden)                                                # (B, l, C)


class VisionTransformer(Frozen):
    """Frozen vision transformer that returns the tokens after every block; the defaults are ViT-S/16.

    Args:
        image_size: side of its input in pixels.
        patch: side of a token in pixels.
        width: C.
        depth: number of blocks.
        num_heads: H, a divisor of the width.
    Source: arXiv 2010.11929; keys as in facebookresearch/dino and timm.
    """

    def __init__(self, image_size: int = 224, patch: int = 16, width: int = 384, depth: int = 12,
                 num_heads: int = 6):
        super().__init__()
        self.image_size = image_size
        self.width = width
        num_tokens = (image_size // patch) ** 2
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + num_tokens, width) * 0.02)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, width, patch, stride=patch)))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.freeze()

    def forward(self, images_B3HW: torch.Tensor) -> list[torch.Tensor]:
        """Tokens (B, 1 + l, C) after the embedding and after every block; the class token is first."""
        h = self.patch_embed.proj(images_B3HW)                                             # (B, C, h, w)
        x_BlC = h.flatten(2).transpose(1, 2)                                               # (B, h * w, C)
        class_B1C = self.cls_token.expand(len(x_BlC), -1, -1)
        x_BlC = torch.cat([class_B1C, x_BlC], 1) + self.pos_embed                          # (B, 1 + h*w, C)
        outputs = [x_BlC]
        for block in self.blocks:
            x_BlC = block(x_BlC)
            outputs.append(x_BlC)
        return outputs


class Residual(nn.Module):
    """(f(u) + u) / sqrt(2) for a module f that keeps the shape; the root keeps the variance."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return (self.body(u) + u) / math.sqrt(2)


class DINODiscriminator(nn.Module):
    """Light heads on the tokens of five layers of a frozen DINO transformer; logits (B, 5 * l).

    Images of any size are resized to that of the trunk; where they are larger, half of the calls take a
    random crop instead. The trunk is not part of `parameters()` and `state_dict()`: call `load_trunk` after
    the constructor.

    Args:
        norm: norm inside the heads: 'group' (32 groups), or 'batch' (over all ranks, which wants 8 or more
            images per rank).
        trunk: the transformer; None builds ViT-S/16 with random weights.
        taps: blocks whose output gets a head; the embedding always gets one.
    Raises:
        ValueError: an unknown norm.
    Source: arXiv 2301.09515, Sec. 3.2; FoundationVision/vaex.
    """

    def __init__(self, norm: str = 'group', trunk: VisionTransformer | None = None,
                 taps: Sequence[int] = (2, 5, 8, 11)):
        super().__init__()
        if norm not in ('group', 'batch'):
            raise ValueError(f"norm of the discriminator's heads must be 'group' or 'batch', got {norm!r}")
        self.trunk = trunk or VisionTransformer()
        self.taps = [0, *(block + 1 for block in taps)]  # as indices into the list that the trunk returns

        # Mean and standard deviation of ImageNet's colours, which the trunk expects.
        self.register_buffer('mean', torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

        # One head per layer. Its convolutions run over the sequence of tokens, rows joined end to end.
        self.heads = nn.ModuleList()
        for _ in self.taps:
            first = self._normalised_conv(kernel=1, norm=norm)
            second = Residual(self._normalised_conv(kernel=9, norm=norm))
            last = self._spectral_conv(1, kernel=1)
            self.heads.append(nn.Sequential(first, second, last))

    def _normalised_conv(self, kernel: int, norm: str) -> nn.Sequential:
        """(B, C, l) -> (B, C, l): convolution, norm, activation."""
        width = self.trunk.width
        conv = self._spectral_conv(width, kernel)
        norm_layer = nn.GroupNorm(32, width) if norm == 'group' else GlobalBatchNorm(width)
        return nn.Sequential(conv, norm_layer, nn.LeakyReLU(0.2))

    def _spectral_conv(self, out_channels: int, kernel: int) -> nn.Module:
        """(B, C, l) -> (B, out_channels, l): circular convolution, spectral norm (arXiv 1802.05957)."""
        layer = nn.Conv1d(self.trunk.width, out_channels, kernel, padding=kernel // 2,
                          padding_mode='circular')
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        return spectral_norm(layer)

    def load_trunk(self, state: dict[str, Any], source: str) -> None:
        """Load the weights of a DINO ViT-S/16.

        Args:
            state: the original layout or that of timm; it may be nested and its keys may have prefixes.
            source: where the weights come from, for the error.
        Raises:
            ValueError: `state` holds another network.
        """
        # Training checkpoints keep the state dict in a dictionary, or in several.
        wrappers = ('teacher', 'state_dict', 'model')
        nested = [state[key] for key in wrappers if isinstance(state.get(key), dict)]
        while nested:
            state = nested[0]
            nested = [state[key] for key in wrappers if isinstance(state.get(key), dict)]
        weights = {re.sub(r'^(module\.|backbone\.)+', '', key): value for key, value in state.items()}
        self.trunk.load(weights, 'expected a DINO ViT-S/16 for 224 pixels (dino_deitsmall16_pretrain.pth or '
                                 f'timm vit_small_patch16_224.dino), got other weights in {source}')

        # A bias of the keys adds the same number to all scores of a query, so softmax cancels it. In half
        # precision it is not cancelled exactly, and only costs digits.
        for block in self.trunk.blocks:
            _, key_bias, _ = block.attn.qkv.bias.view(3, -1)
            key_bias.zero_()

    def _at_trunk_size(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) at the trunk's size, resized or cropped.

        Chance decides once for the whole batch, by a generator that is equal on all ranks.
        """
        size = self.trunk.image_size
        height, width = images_B3HW.shape[-2:]

        # A crop shows the discriminator details that resizing would hide.
        if min(height, width) > size:
            chance, top, left = torch.rand(3, device='cpu').tolist()
            if chance < 0.5:
                top = int(top * (height - size + 1))
                left = int(left * (width - size + 1))
                return images_B3HW[..., top:top + size, left:left + size]

        if (height, width) == (size, size):
            return images_B3HW
        mode = 'area' if min(height, width) >= size else 'bicubic'
        return F.interpolate(images_B3HW, size=(size, size), mode=mode)

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Logits of all tokens of all layers that have a head."""
        # 1. Features of the frozen transformer, in the precision of autocast.
        x_B3HW = self._at_trunk_size(images_B3HW)                                          # the trunk's size
        x_B3HW = ((x_B3HW + 1) / 2 - self.mean) / self.std
        outputs = self.trunk(x_B3HW)                                                       # (B, 1 + l, C)

        # 2. Heads in float32. The class token, which knows the whole image, is added to every other one.
        with torch.autocast(images_B3HW.device.type, enabled=False):
            logits = []
            for tap, head in zip(self.taps, self.heads, strict=True):
                tokens_BlC = at_least_float32(outputs[tap])
                tokens_BlC = tokens_BlC[:, 1:] + tokens_BlC[:, :1]                         # (B, l, C)
                logits_B1l = head(tokens_BlC.transpose(1, 2))                              # (B, 1, l)
                logits.append(logits_B1l.flatten(1))
            return torch.cat(logits, 1)                                                    # (B, 5 * l)
