"""Discriminators of tokenizer training: images (B, 3, h, w) in [-1, 1] -> float32 logits, positive for real.

PatchGAN judges overlapping patches, StyleGAN the whole image, DINODiscriminator the features of a frozen
vision transformer.
Letters: B batch, C channels, l tokens, H heads, d head dim, h w feature map, 3HW image.
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
    """A network whose weights are given: in eval mode whatever its parent says, never trained, never saved.

    Its weights are buffers that are not saved: `.to()` moves them, parameters() and state_dict() are empty.
    """

    def freeze(self) -> None:
        """Turn every parameter into such a buffer; the last line of a constructor."""
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> 'Frozen':
        return super().train(False)

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor], expected: str) -> None:
        """Copy all weights; other entries of `state` are ignored.

        Args:
            expected: what was asked for and what came, the beginning of the error.
        Raises:
            ValueError: a weight is missing or has another shape.
        """
        own = dict(self.named_buffers())
        wrong = [f'{name} {tuple(state[name].shape)} instead of {tuple(weight.shape)}' if name in state
                 else f'{name} missing' for name, weight in own.items()
                 if name not in state or state[name].shape != weight.shape]
        if wrong:
            raise ValueError(f'{expected}: {", ".join(wrong[:3])}{", ..." * (len(wrong) > 3)}, '
                             f'{len(wrong)} of {len(own)} weights')
        for name, weight in own.items():
            weight.copy_(state[name])


class SumOverRanks(torch.autograd.Function):
    """A sum over ranks whose gradient is the sum over ranks, too."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        dist.allreduce(t)
        return t

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return SumOverRanks.apply(grad)


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm of (B, C, ...) over the images of all ranks, on any device; every rank has equally many.

    With one process it is torch's own; nn.SyncBatchNorm does the same for CUDA alone.
    """

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any number of dimensions after the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or dist.get_world_size() == 1:
            return super().forward(x)
        others = [0, *range(2, x.dim())]
        per_channel = (1, -1, *[1] * (x.dim() - 2))
        num = x.numel() // self.num_features * dist.get_world_size()
        values = at_least_float32(x)
        mean_C = SumOverRanks.apply(values.sum(others)) / num
        values = values - mean_C.view(per_channel)
        var_C = SumOverRanks.apply(values.square().sum(others)) / num  # of centred values: no cancellation
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var_C.to(self.running_var.dtype) * (num / (num - 1)), self.momentum)
        factor_C = self.weight * (var_C + self.eps).rsqrt()
        return (values * factor_C.view(per_channel) + self.bias.view(per_channel)).to(x.dtype)


# ---------------------------------------------------------------------------------------------- what they see
class DiffAug(nn.Module):
    """Differentiable translation, colour change and cut-out, each applied to every image.

    Args:
        cutout: side of the erased square as a share of the image's.
        translation: largest shift as a share of the side; zeros come in.
    """

    def __init__(self, cutout: float = 0.2, translation: float = 1 / 8):
        super().__init__()
        self.cutout = cutout
        self.translation = translation

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        x = images_B3HW
        draws = GlobalBatch.current.per_image(len(x), x.device, lambda t: t.uniform_(), (7,)).to(x.dtype)
        down, right, brightness, saturation, contrast, top, left = draws.T
        x = self._shifted(self._shifted(x, down, dim=2), right, dim=3)
        brightness, saturation, contrast = (u.view(-1, 1, 1, 1) for u in (brightness, saturation, contrast))
        x = x + brightness - 0.5
        x = torch.lerp(x.mean(1, keepdim=True), x, 2 * saturation)
        x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast + 0.5)
        hole = self._window(x, top, dim=2) & self._window(x, left, dim=3)
        return x.masked_fill(hole, 0)

    def _shifted(self, x: torch.Tensor, u_B: torch.Tensor, dim: int) -> torch.Tensor:
        """x moved along `dim` by a whole number of pixels per image."""
        limit = round(x.shape[dim] * self.translation)
        offset_B = (u_B * (2 * limit + 1)).floor() - limit
        source = self._positions(x, dim) - offset_B.view(-1, 1, 1, 1)
        inside = source.clamp(0, x.shape[dim] - 1)
        return x.gather(dim, inside.long().expand_as(x)) * (source == inside)

    def _window(self, x: torch.Tensor, u_B: torch.Tensor, dim: int) -> torch.Tensor:
        """Where the square lies along `dim`; its centre is anywhere, so it may stick out."""
        side = round(x.shape[dim] * self.cutout)
        first = (u_B * x.shape[dim]).floor().view(-1, 1, 1, 1) - side // 2
        position = self._positions(x, dim)
        return (position >= first) & (position < first + side)

    @staticmethod
    def _positions(x: torch.Tensor, dim: int) -> torch.Tensor:
        """0, 1, 2, ... along `dim`, broadcastable to x."""
        return torch.arange(x.shape[dim], device=x.device).view([-1 if d == dim else 1 for d in range(4)])


def blur(images_B3HW: torch.Tensor, sigma: float) -> torch.Tensor:
    """Images under a Gaussian of standard deviation `sigma` pixels, borders mirrored; 0 changes nothing."""
    if sigma <= 0:
        return images_B3HW
    channels, height, width = images_B3HW.shape[1:]
    radius = min(math.ceil(3 * sigma), height - 1, width - 1)
    position = torch.arange(-radius, radius + 1, device=images_B3HW.device, dtype=images_B3HW.dtype)
    kernel = (-position.square() / (2 * sigma ** 2)).exp()
    kernel = (kernel / kernel.sum()).expand(channels, 1, 1, -1)
    padded = F.pad(images_B3HW, (radius, radius, radius, radius), mode='reflect')
    return F.conv2d(F.conv2d(padded, kernel, groups=channels), kernel.mT, groups=channels)


# ---------------------------------------------------------------------------------------------- PatchGAN
class PatchGAN(nn.Module):
    """Strided 4x4 convolutions; one logit per overlapping patch, (B, 1, h/8 - 2, w/8 - 2) with 3 layers.

    Args:
        width: channels of the first layer; they double up to 8 times that.
        num_layers: how often the sides are halved.
    Source: arXiv 1611.07004, Sec. 3.2.2; keys as in FoundationVision/LlamaGen.
    """

    def __init__(self, width: int = 64, num_layers: int = 3):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, num_layers + 1):
            last = channels
            channels = width * min(2 ** i, 8)
            layers += [nn.Conv2d(last, channels, 4, stride=2 if i < num_layers else 1, padding=1, bias=False),
                       GlobalBatchNorm(channels), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
            elif isinstance(layer, GlobalBatchNorm):
                nn.init.normal_(layer.weight, mean=1., std=0.02)

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return at_least_float32(self.main(images_B3HW))


# ---------------------------------------------------------------------------------------------- StyleGAN
class Smooth(nn.Module):
    """Every channel smoothed by [1, 2, 1] / 4 along both sides; the borders are mirrored."""

    def __init__(self):
        super().__init__()
        self.register_buffer('f', torch.tensor([1., 2., 1.]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = torch.outer(self.f, self.f).div(self.f.sum() ** 2).to(x.dtype)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode='reflect'), kernel.expand(x.shape[1], 1, 3, 3),
                        groups=x.shape[1])


class DownBlock(nn.Module):
    """Two 3x3 convolutions, blur and a strided convolution beside a strided 1x1 one; halves the sides."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, channels, 1, stride=2)
        self.net = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), nn.LeakyReLU(0.2),
                                 nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2))
        self.downsample = nn.Sequential(Smooth(), nn.Conv2d(channels, channels, 3, stride=2, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


class StyleGAN(nn.Module):
    """Residual down-blocks to 4x4, then linear layers; one logit (B, 1) for an image of one fixed size.

    Args:
        image_size: side in pixels, a power of two in 8..1024.
    Source: arXiv 1912.04958; keys as in FoundationVision/LlamaGen.
    """

    def __init__(self, image_size: int):
        super().__init__()
        if image_size not in (8, 16, 32, 64, 128, 256, 512, 1024):
            raise ValueError(f'the StyleGAN discriminator needs a power of two in 8..1024 as image size, '
                             f'got {image_size}: use another size, or PatchGAN')
        self.image_size = image_size

        def width(side: int) -> int:
            return min(512, 2 ** 14 // side)

        self.blocks = nn.Sequential(nn.Conv2d(3, width(image_size), 3, padding=1), nn.LeakyReLU(0.2))
        while image_size > 4:
            self.blocks.append(DownBlock(width(image_size), width(image_size // 2)))
            image_size //= 2
        self.final_conv = nn.Sequential(nn.Conv2d(512, 512, 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(nn.Linear(512 * 4 * 4, 512), nn.LeakyReLU(0.2), nn.Linear(512, 1))

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        if images_B3HW.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f'this StyleGAN discriminator sees images of {self.image_size} pixels, got '
                             f'{tuple(images_B3HW.shape[-2:])}: resize them, or use PatchGAN')
        return at_least_float32(self.final_linear(self.final_conv(self.blocks(images_B3HW)).flatten(1)))


# ---------------------------------------------------------------------------------------------- DINO
class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)))
        self.num_heads = num_heads

    def forward(self, x_BlC: torch.Tensor) -> torch.Tensor:
        qkv_Bl3Hd = self.attn.qkv(self.norm1(x_BlC)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv_Bl3Hd.unbind(2)
        x_BlC = x_BlC + self.attn.proj(attend(q, k, v, backend='sdpa').flatten(2))
        return x_BlC + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x_BlC))))


class VisionTransformer(Frozen):
    """Frozen trunk; the defaults are ViT-S/16.

    Args:
        image_size: side of its input in pixels. patch: side of a token in pixels.
    Source: arXiv 2010.11929; keys as in facebookresearch/dino and timm.
    """

    def __init__(self, image_size: int = 224, patch: int = 16, width: int = 384, depth: int = 12,
                 num_heads: int = 6):
        super().__init__()
        self.image_size = image_size
        self.width = width
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (image_size // patch) ** 2, width) * 0.02)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, width, patch, stride=patch)))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.freeze()

    def forward(self, images_B3HW: torch.Tensor) -> list[torch.Tensor]:
        """Tokens (B, 1 + l, C) of the embedding and after every block, the class token first."""
        x_BlC = self.patch_embed.proj(images_B3HW).flatten(2).transpose(1, 2)
        x_BlC = torch.cat([self.cls_token.expand(len(x_BlC), -1, -1), x_BlC], 1) + self.pos_embed
        outputs = [x_BlC]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return outputs


class Residual(nn.Module):
    """(f(u) + u) / sqrt(2)."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return (self.body(u) + u) / math.sqrt(2)


class DINODiscriminator(nn.Module):
    """Light heads on five token maps of a frozen DINO transformer; logits (B, 5 * tokens).

    Images of any size are resized to the trunk's; of larger ones, half of the calls see a random crop.
    The trunk is no part of parameters() and state_dict(): call `load_trunk` after the constructor.

    Args:
        norm: of the heads, 'group' (32 groups) or 'batch' (over all ranks; for 8 or more images per rank).
        trunk: None builds ViT-S/16.
        taps: blocks whose output gets a head, beside the embedding.
    Source: arXiv 2301.09515, Sec. 3.2; FoundationVision/vaex.
    """

    def __init__(self, norm: str = 'group', trunk: VisionTransformer | None = None,
                 taps: Sequence[int] = (2, 5, 8, 11)):
        super().__init__()
        if norm not in ('group', 'batch'):
            raise ValueError(f"norm of the discriminator's heads must be 'group' or 'batch', got {norm!r}")
        self.trunk = trunk or VisionTransformer()
        self.taps = [0, *(block + 1 for block in taps)]  # in the list the trunk returns
        self.register_buffer('mean', torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        width = self.trunk.width

        def conv(out_channels: int, kernel: int) -> nn.Module:
            layer = nn.Conv1d(width, out_channels, kernel, padding=kernel // 2, padding_mode='circular')
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
            return spectral_norm(layer)

        def body(kernel: int) -> nn.Module:
            return nn.Sequential(conv(width, kernel),
                                 nn.GroupNorm(32, width) if norm == 'group' else GlobalBatchNorm(width),
                                 nn.LeakyReLU(0.2))

        self.heads = nn.ModuleList(nn.Sequential(body(1), Residual(body(9)), conv(1, 1)) for _ in self.taps)

    def load_trunk(self, state: dict[str, Any], source: str) -> None:
        """Take the weights of a DINO ViT-S/16 in the original layout or timm's, nested and prefixed or not.

        The key part of every qkv bias becomes 0: softmax cancels it, rounding in half precision does not.

        Raises:
            ValueError: `state` holds another network.
        """
        layers = ('teacher', 'state_dict', 'model')
        while nested := [state[key] for key in layers if isinstance(state.get(key), dict)]:
            state = nested[0]
        weights = {re.sub(r'^(module\.|backbone\.)+', '', key): value for key, value in state.items()}
        self.trunk.load(weights, 'expected a DINO ViT-S/16 for 224 pixels (dino_deitsmall16_pretrain.pth or '
                                 f'timm vit_small_patch16_224.dino), got other weights in {source}')
        for block in self.trunk.blocks:
            block.attn.qkv.bias.view(3, -1)[1].zero_()

    def _resized(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """At the trunk's size; by chance the same for the whole batch, so equal on all ranks."""
        size = self.trunk.image_size
        height, width = images_B3HW.shape[-2:]
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
        outputs = self.trunk(((self._resized(images_B3HW) + 1) / 2 - self.mean) / self.std)
        with torch.autocast(images_B3HW.device.type, enabled=False):
            logits = []
            for tap, head in zip(self.taps, self.heads, strict=True):
                tokens_BlC = at_least_float32(outputs[tap])
                logits.append(head((tokens_BlC[:, 1:] + tokens_BlC[:, :1]).transpose(1, 2)).flatten(1))
            return torch.cat(logits, 1)
