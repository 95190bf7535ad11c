"""Pictures: what a tokenizer does, by rows of reconstructions and by the use of the codes; contact sheets.

Letters: B batch, V vocabulary, 3HW image. Pictures are uint8 (3, H, W).
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from evaluation.metrics import to_uint8
from utils.checkpoint import atomic_path

# The heat map of codes, in pixels.
COLUMNS = 1024   # at most
ROW_HEIGHT = 24  # of a scale
GAP = 2          # between two scales
SHEET_SIDE = 2048  # of a contact sheet, in pixels, at most
HEAT = ((13, 8, 60), (134, 20, 130), (233, 98, 60), (252, 240, 150))  # rare to frequent; unused is black


def reconstruction_rows(images_B3HW: torch.Tensor, named: dict[str, torch.Tensor]) -> torch.Tensor:
    """A column per image, from top to bottom: the input, every reconstruction, the error of the last one.

    Args:
        images_B3HW: inputs in [-1, 1].
        named: reconstructions in [-1, 1], coarse to fine; smaller ones are enlarged by repeating pixels.
    Returns:
        uint8 (3, (2 + reconstructions) * H, B * W); the last row is black where input and output agree and
        saturates where they differ by half the range.
    """
    images_B3HW = images_B3HW.float()
    size = images_B3HW.shape[-2:]
    rows = [F.interpolate(t.float(), size=size, mode='nearest') for t in named.values()]
    error = (images_B3HW - rows[-1]).abs() * 2 - 1
    grid_RB3HW = to_uint8(torch.stack([images_B3HW, *rows, error]))  # R rows of pictures

    # Pixel rows go below one another, pixel columns side by side.
    grid_3RHBW = grid_RB3HW.permute(2, 0, 3, 1, 4)
    return grid_3RHBW.flatten(3, 4).flatten(1, 2)


def usage_heat_map(counts: dict[str, torch.Tensor]) -> torch.Tensor:
    """A row per scale and a column per code, coloured by the logarithm of its count.

    Each row has colours of its own, from black (never used) to bright (the most used code of the scale).
    Neighbouring codes share a column, by their mean, where there are more than 1,024.

    Args:
        counts: (V,) number of uses of every code, by the name of the scale.
    Returns:
        uint8 (3, H, W).
    """
    count_KV = torch.stack([count_V.cpu() for count_V in counts.values()]).double()
    count_KV = F.adaptive_avg_pool1d(count_KV, min(count_KV.shape[1], COLUMNS))

    # Logarithms, as some codes are used a thousand times as often as others.
    log_KV = count_KV.log1p()
    level_KV = log_KV / log_KV.amax(1, keepdim=True).clamp_min(1e-9)
    stops = torch.tensor(HEAT, dtype=torch.float64)
    position = level_KV * (len(stops) - 1)
    lower = position.long().clamp_max(len(stops) - 2)
    rgb_KV3 = torch.lerp(stops[lower], stops[lower + 1], (position - lower)[..., None])
    rgb_KV3[count_KV == 0] = 0

    # Small vocabularies get wider columns; a white line parts the scales.
    rgb_3KV = rgb_KV3.round().byte().permute(2, 0, 1)
    rgb_3KV = rgb_3KV.repeat_interleave(COLUMNS // rgb_3KV.shape[2], 2)
    rows = rgb_3KV[:, :, None].expand(-1, -1, ROW_HEIGHT, -1)
    return F.pad(rows, (0, 0, 0, GAP), value=255).flatten(1, 2)[:, :-GAP]


def save_contact_sheet(path: str | Path, rows: list[list[np.ndarray]]) -> None:
    """Write rows of images of one size as a picture; they are made smaller where it would be very large.

    Args:
        rows: uint8 (H, W, 3) images; a row may be shorter than others.
    """
    height, width, _ = rows[0][0].shape
    num_columns = max(len(row) for row in rows)
    scale = min(1, SHEET_SIDE / (num_columns * width), SHEET_SIDE / (len(rows) * height))
    size = max(1, int(width * scale)), max(1, int(height * scale))
    step_x = size[0] + GAP
    step_y = size[1] + GAP
    sheet = Image.new('RGB', (num_columns * step_x - GAP, len(rows) * step_y - GAP), 'white')
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            tile = Image.fromarray(image)
            if scale < 1:
                tile = tile.resize(size, Image.Resampling.LANCZOS)
            sheet.paste(tile, (x * step_x, y * step_y))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format='PNG')


def save_png(path: str | Path, image_3HW: torch.Tensor) -> None:
    """Write a uint8 picture; a reader never sees half of it."""
    with atomic_path(path) as temporary:
        Image.fromarray(image_3HW.permute(1, 2, 0).cpu().numpy()).save(temporary, format='PNG')
