"""FlexVAE: an image as a complete map of codes at any size, the tokenizer of FlexVAR.

Letters: B batch, l tokens of one map, Z code channels, h w map, 3HW image.
Source: arXiv 2502.20313, under the names of its weights.
"""
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from models.scales import ScaleLayout, Side, as_sizes, scale_name
from models.tokenizers.vq_model import Losses, VQModel, area_resize

logger = logging.getLogger(__name__)


class FlexVAE(VQModel):
    """A VQ-16 whose codebook serves maps of every size; the tokens are a list of `idx_Bl`, coarse to fine.

    Each map, p codes wide, is a complete image of stride * p pixels, and none is a residual of another.

    Args:
        codebook_size: published weights have 8912 codes, not 8192.
        num_sides: code maps per training step, the native one and smaller ones drawn at random.
        min_side: smallest side that may be drawn.
        kwargs: of `VQModel`.
    """

    def __init__(self, codebook_size: int = 8912, codebook_embed_dim: int = 32, num_sides: int = 5,
                 min_side: int = 1, **kwargs: Any):
        super().__init__(codebook_size, codebook_embed_dim, **kwargs)
        self.num_sides = num_sides
        self.min_side = min_side
        if codebook_size == 8192:
            logger.warning('FlexVAE with 8192 codes: the published weights have 8912 and will not load')

    def config_state(self, progress: float) -> dict[str, Any]:
        return super().config_state(progress) | dict(min_side=self.min_side)

    # ------------------------------------------------------------------------------ sizes
    def eval_sizes(self, native: tuple[int, int]) -> list[tuple[int, int]]:
        """Powers of two below the longer native side, from `min_side` on; then the native size."""
        powers = [2 ** i for i in range((max(native) - 1).bit_length())]
        return self._proportional([side for side in powers if side >= self.min_side], native)

    def training_sizes(self, native: tuple[int, int]) -> list[tuple[int, int]]:
        """In training `num_sides` distinct sides, equal on ranks that seed alike; else `eval_sizes`."""
        if not self.training:
            return self.eval_sizes(native)
        num_smaller = max(max(native) - self.min_side, 0)
        sides = torch.randperm(num_smaller)[:self.num_sides - 1] + self.min_side
        return self._proportional(sorted(sides.tolist()), native)

    @staticmethod
    def _proportional(sides: list[int], native: tuple[int, int]) -> list[tuple[int, int]]:
        """Sizes whose longer side is each of `sides`, and the native one."""
        longer = max(native)
        sizes = []
        for side in (*sides, longer):
            rows = max(1, round(side * native[0] / longer))
            columns = max(1, round(side * native[1] / longer))
            sizes.append((rows, columns))
        return sizes

    # ------------------------------------------------------------------------------ inference
    def encode(self, images_B3HW: torch.Tensor,
               patch_nums: Sequence[Side] | None = None) -> list[torch.Tensor]:
        """Codes (B, h * w) int64 of images in [-1, 1] at every size of `patch_nums`, row by row.

        Args:
            patch_nums: sides, or (rows, columns), of the code maps; None means `eval_sizes`. Stored codes
                need a list of sides.
        """
        return super().encode(images_B3HW, patch_nums)

    def _encode(self, images_B3HW: torch.Tensor, patch_nums: Sequence[Side] | None) -> list[torch.Tensor]:
        f_BZhw = self.features(images_B3HW)
        sizes = as_sizes(patch_nums) if patch_nums else self.eval_sizes(self.native_size(images_B3HW))
        return [self.quantize.codes(area_resize(f_BZhw, size)) for size in sizes]

    def precompute(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """The codes (B, L) of square images at every side from 1 to the native one, so that any pyramid of
        squares is a part of them."""
        # At 256 pixels these are 1^2 + 2^2 + ... + 16^2 = 1,496 codes of two bytes, 3 kB. The feature map,
        # from which any pyramid follows as well, takes 32 x 16 x 16 float32 numbers, 33 kB.
        side, _ = self.native_size(images_B3HW)
        return torch.cat(self.encode(images_B3HW, range(1, side + 1)), dim=1)

    def _unpack(self, idx_BL: torch.Tensor, patch_nums: Sequence[int]) -> list[torch.Tensor]:
        every_side = ScaleLayout(tuple(range(1, max(patch_nums) + 1)))
        assert every_side.total <= idx_BL.shape[1], f'{max(patch_nums)=} is beyond the stored sides'
        spans = [every_side.spans[side - 1] for side in patch_nums]
        return [idx_BL[:, begin:end] for begin, end in spans]

    def decode(self, tokens: list[torch.Tensor], size: tuple[int, int] | None = None) -> torch.Tensor:
        """Images in [-1, 1] of the last map of codes; arguments as for `VQModel.decode`."""
        return super().decode(tokens[-1], size)

    @torch.no_grad()
    def img_to_reconstructed_multi_scale_img(
            self, x: torch.Tensor, v_patch_nums: Sequence[Side] | None = None) -> list[torch.Tensor]:
        """Reconstructions of every scale, not clamped, resized to the last one's; None is the native size."""
        sizes = as_sizes(v_patch_nums) if v_patch_nums else [self.native_size(x)]
        rows, columns = sizes[-1]
        full = (rows * self.stride, columns * self.stride)
        f_BZhw = self.features(x)
        images = []
        for size in sizes:
            idx_Bl = self.quantize.codes(area_resize(f_BZhw, size))
            image_B3hw = self.pixels(self.quantize.embed(idx_Bl, size))
            images.append(F.interpolate(image_B3hw, size=full, mode='bicubic'))
        return images

    def progressive(self, images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes = self.eval_sizes(self.native_size(images_B3HW))
        images = self.img_to_reconstructed_multi_scale_img(images_B3HW, sizes)
        return {scale_name(size): image.clamp(-1, 1) for size, image in zip(sizes, images, strict=True)}

    # ------------------------------------------------------------------------------ training
    def multi_scale_encode(self, x: torch.Tensor, v_patch_nums: Sequence[Side],
                           ) -> tuple[list[torch.Tensor], list[Losses]]:
        """Quantised features (B, Z, h, w) with gradients, and losses with usage, of every scale."""
        f_BZhw = self.features(x)
        quants = []
        losses = []
        for size in as_sizes(v_patch_nums):
            out = self.quantize(area_resize(f_BZhw, size))
            quants.append(out.quant_BZhw)
            losses.append(self.losses(out))
        return quants, losses

    def forward(self, x: torch.Tensor, v_patch_nums: Sequence[Side] | None = None,
                ) -> tuple[torch.Tensor, Losses] | tuple[list[torch.Tensor], list[Losses]]:
        """As `VQModel.forward`; with `v_patch_nums` a list of reconstructions, each at its own size."""
        if v_patch_nums is None:
            return super().forward(x)
        quants, losses = self.multi_scale_encode(x, v_patch_nums)
        return [self.pixels(quant_BZhw) for quant_BZhw in quants], losses

    def warm_start(self, state: dict[str, torch.Tensor], source: str) -> None:
        """Take all weights of a FlexVAE, or encoder and decoder of a VQ-16, whose codes have another width.

        Args:
            source: where the weights come from, for the error message.
        Raises:
            ValueError: encoder and decoder are of another network.
        """
        own = self.state_dict()
        wanted = {key for key in own if key.startswith(('encoder.', 'decoder.'))}
        fitting = {key: t for key, t in state.items() if key in own and own[key].shape == t.shape}
        if not wanted <= fitting.keys():
            num_fitting = len(wanted & fitting.keys())
            raise ValueError(f'{source} fits only {num_fitting} of the {len(wanted)} tensors of encoder and '
                             'decoder: pass a VQ-16 or FlexVAE of the same widths')
        if len(fitting) < len(own):
            fitting = {key: fitting[key] for key in wanted}
        self.load_state_dict(fitting, strict=False)
