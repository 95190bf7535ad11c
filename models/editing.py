"""Editing of images: parts of them are kept, and the rest is drawn to fit. True in a mask means: keep.

Letters: B batch, K scales, l tokens of one scale, H W image or canvas in pixels, h w code map.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from models.base import ARModel
from models.noise import Rng
from models.scales import as_sizes, scale_name

# per scale, coarse to fine: codes (B, l) int64, and which of them replace the drawn ones, (B or 1, l) bool;
# scales beyond its end are drawn freely
Keep = Sequence[tuple[torch.Tensor, torch.Tensor]]


def box_mask(size: tuple[int, int], top: float, left: float, bottom: float, right: float,
             device: torch.device | str | None = None) -> torch.Tensor:
    """(rows, columns) bool, True inside a box whose borders are shares of height and width, in [0, 1].

    To redraw the box (in-painting) keep `~box_mask(...)`; to draw around it (out-painting) keep the mask.

    Raises:
        ValueError: a border lies outside [0, 1], or a pair is in the wrong order.
    """
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError('expected 0 <= top < bottom <= 1 and 0 <= left < right <= 1, shares of height and '
                         f'width, got {top}, {left}, {bottom}, {right}: divide pixels by the size')
    mask_HW = torch.zeros(size, dtype=torch.bool, device=device)
    mask_HW[round(top * size[0]):round(bottom * size[0]), round(left * size[1]):round(right * size[1])] = True
    return mask_HW


def place(images_B3HW: torch.Tensor, size: tuple[int, int], corner: tuple[int, int],
          ) -> tuple[torch.Tensor, torch.Tensor]:
    """Images on a larger canvas, their edges repeated outwards, and the mask (H, W) of where they are.

    Args:
        size: rows and columns of the canvas in pixels.
        corner: row and column of the image's upper left corner on it.
    Raises:
        ValueError: the image does not fit there.
    """
    height, width = images_B3HW.shape[-2:]
    top, left = corner
    bottom = size[0] - top - height
    right = size[1] - left - width
    if min(top, left, bottom, right) < 0:
        raise ValueError(f'an image of {height}x{width} pixels at row {top}, column {left} does not fit on a '
                         f'canvas of {size[0]}x{size[1]}: pass a larger size or another corner')
    canvas = F.pad(images_B3HW, (left, right, top, bottom), mode='replicate')
    mask_HW = torch.zeros(size, dtype=torch.bool, device=images_B3HW.device)
    mask_HW[top:top + height, left:left + width] = True
    return canvas, mask_HW


def as_mask(keep: torch.Tensor, images_B3HW: torch.Tensor) -> torch.Tensor:
    """(B or 1, 1, H, W) float of a mask (H, W) or (B, H, W), of booleans or of numbers in [0, 1].

    Raises:
        ValueError: it has another shape than the images, or other values.
    """
    B, _, height, width = images_B3HW.shape
    keep = torch.as_tensor(keep, device=images_B3HW.device)
    if keep.shape not in ((height, width), (1, height, width), (B, height, width)):
        raise ValueError(f'expected a mask of {height}x{width} pixels, one for all or one for each of {B} '
                         f'images, got shape {tuple(keep.shape)}: make it as large as the images')
    if keep.dtype != torch.bool and not ((keep >= 0) & (keep <= 1)).all():
        raise ValueError('expected a mask of booleans or of numbers in [0, 1], got '
                         f'{keep.min().item():g}..{keep.max().item():g}: compare it with a threshold first')
    return keep.float().view(-1, 1, height, width)


def mostly_kept(mask_B1HW: torch.Tensor, size: tuple[int, int], share: float = 0.5) -> torch.Tensor:
    """(B, l) bool: the cells of a code map that lie inside the mask by at least this share of their area."""
    return (F.interpolate(mask_B1HW, size=size, mode='area') >= share - 1e-6).flatten(1)


def keep_of_scale(keep: Keep | None, k: int, idx_Bl: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (B, l) of scale k with the kept ones in place, and which these are, (B or 1, l) bool.

    Raises:
        ValueError: the codes or the mask of this scale have another shape.
    """
    if keep is None or k >= len(keep):
        return idx_Bl, torch.zeros_like(idx_Bl, dtype=torch.bool)
    given_Bl, kept_Bl = keep[k]
    if given_Bl.shape != idx_Bl.shape or kept_Bl.shape not in (idx_Bl.shape, idx_Bl[:1].shape):
        raise ValueError(f'expected codes to keep, and their mask, of shape {tuple(idx_Bl.shape)} at scale '
                         f'{k}, got {tuple(given_Bl.shape)} and {tuple(kept_Bl.shape)}: '
                         'encode the images with the sides that are drawn')
    return torch.where(kept_Bl, given_Bl, idx_Bl), kept_Bl


@torch.no_grad()
def edit(model: ARModel, images_B3HW: torch.Tensor, keep: torch.Tensor,
         labels: int | Sequence[int] | torch.Tensor, *, guidance: float, rng: Rng = None, paste: bool = False,
         keep_share: float = 0.5, **options: Any) -> torch.Tensor:
    """Draw again what a mask does not keep: in-painting, out-painting, class-conditional editing.

    Codes of the kept parts replace drawn ones at every scale, so that the rest is drawn to fit them. A mask
    that keeps nothing is plain sampling.

    Args:
        model: a VAR or FlexVAR, with `patch_nums`, the sides that it draws by default, and `keep_masks`,
            which says what codes of a scale stay.
        images_B3HW: in [-1, 1], of the size that the finest scale decodes to.
        keep: True where pixels stay: (H, W) for all images, or (B, H, W); see `as_mask`.
        labels: as for `sample`; a negative int is the null class, which leaves guidance without effect.
        paste: put the kept pixels themselves over the result.
        keep_share: of the area of a code, or more, that must be kept for the code to stay.
        options: as for `sample`.
    Returns:
        (B, 3, H, W) in [0, 1].
    Raises:
        ValueError: the images or the mask have another size, or the pixels are not in [-1, 1].
    """
    if not (images_B3HW.is_floating_point() and (images_B3HW.abs() <= 1.5).all()):  # bicubic overshoots 1
        raise ValueError('expected images in [-1, 1], got '
                         f'{images_B3HW.min().item():g}..{images_B3HW.max().item():g}: scale them')
    if 'image_size' in options:
        raise ValueError('edited images keep their size, got image_size: resize them first')
    sizes = as_sizes(options.get('infer_patch_nums', model.patch_nums))
    height, width = (side * model.tokenizer.stride for side in sizes[-1])
    if images_B3HW.shape[-2:] != (height, width):
        given = scale_name(images_B3HW.shape[-2:])
        raise ValueError('the sides of the code maps must end at the image size: they end at '
                         f'{height}x{width} pixels, got images of {given}: '
                         'resize the images, or pass other sides where the model takes them')

    # The codes of the images at every scale, and which of them the mask keeps.
    mask_B1HW = as_mask(keep, images_B3HW)
    idx_kBl = model.tokenizer.encode(images_B3HW, sizes)
    mask_kBl = model.keep_masks(mask_B1HW, sizes, keep_share)
    kept = list(zip(idx_kBl, mask_kBl, strict=True))

    # Sampling as ever, but for the codes that are given.
    label_B = model.as_labels(labels, len(images_B3HW), rng)
    edited_B3HW = model.sample(label_B, guidance=guidance, rng=rng, keep=kept, **options)
    if not paste:
        return edited_B3HW
    return torch.where(mask_B1HW > 0.5, images_B3HW.add(1).mul(0.5), edited_B3HW)
