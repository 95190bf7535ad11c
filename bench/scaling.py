"""How the time of a training step and of a sample grows with depth, resolution and batch, as one plot.

`python -m bench.scaling --plot=scaling.png`: forward and backward pass of VAR's transformer, and the codes of
a sampled image, without tokenizer and optimizer. The dashed lines are what their FLOPs alone let expect of
the first point.
"""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt

from bench.common import (
    compare,
    counted,
    default_device,
    report_header,
    save_figure,
    to_device,
    write_report,
)
from bench.cost import decoder_flops, sampling_flops
from configs.options import ints
from configs.training import PATCH_NUMS
from models import VAR, VQVAE
from models.noise import ImageNoise
from utils.amp_sc import DTYPES, autocast

TITLES = dict(depth='depth', resolution='pixels per side', batch='batch')


def make_model(depth: int, width: int, resolution: int, device: torch.device) -> VAR:
    """A VAR on a narrow tokenizer, for images of 256, 512 or 1024 pixels per side."""
    patch_nums = ints(PATCH_NUMS[str(resolution)])
    vae = VQVAE(ch=32, v_patch_nums=patch_nums)
    model = VAR(vae, attn_l2_norm=True, depth=depth, embed_dim=width, num_heads=width // 64,
                patch_nums=patch_nums)
    model.init_weights(init_std=-1)
    return to_device(model, device)


def both_passes(model: VAR, batch: int, precision: int) -> None:
    """Forward and backward pass."""
    label_B = torch.zeros(batch, dtype=torch.int64, device=model.device)
    teacher_BLZ = torch.zeros(batch, model.L - 1, model.Cvae, device=model.device)
    model.train()
    with autocast(model.device.type, precision):
        logits_BLV = model(label_B, teacher_BLZ)
        loss = logits_BLV.logsumexp(-1).mean()
    loss.backward()
    model.zero_grad()


def sampled_codes(model: VAR, batch: int, precision: int) -> None:
    """All codes of sampled images."""
    label_B = torch.zeros(batch, dtype=torch.int64, device=model.device)
    noise = ImageNoise(0, list(range(batch)))
    with autocast(model.device.type, precision):
        for _ in model.sample_scales(label_B, top_k=900, top_p=0.96, rng=noise):
            pass


def rows_of(axis: str, value: int, sizes: dict[str, int], args: argparse.Namespace,
            device: torch.device) -> list[dict[str, Any]]:
    """A training step and a sample at one point of an axis.

    Args:
        sizes: depth, resolution and batch.
    """
    model = make_model(sizes['depth'], args.width, sizes['resolution'], device)
    batch = sizes['batch']
    dtype = DTYPES[args.precision]
    drawn = sampling_flops(model, {}) - decoder_flops(model.tokenizer.decoder, model.patch_nums[-1])
    runs: dict[str, tuple[Callable[[], None], float]] = dict(
        train=(partial(both_passes, model, batch, args.precision), model.training_flops(model.L)),
        sample=(partial(sampled_codes, model, batch, args.precision), drawn),
    )
    rows = []
    for what, (run, flops) in runs.items():
        name = f'VAR {what}, {axis} {value}'
        cost = counted(name, run, batch * flops)
        row = compare(name, run, None, args.repeats, device, dtype, cost)
        rows.append(row | dict(axis=axis, what=what, value=value))
    return rows


def draw_scaling(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """One plot of all rows: seconds of a call over depth, resolution and batch."""
    figure, axes = plt.subplots(1, len(TITLES), figsize=(12, 3.6), dpi=120)
    for panel, (axis, label) in zip(axes, TITLES.items(), strict=True):
        for what, color in (('train', 'tab:blue'), ('sample', 'tab:orange')):
            chosen = [row for row in rows if row['axis'] == axis and row['what'] == what]
            values = [row['value'] for row in chosen]
            seconds = [row['product_seconds'] for row in chosen]
            expected = [seconds[0] * row['tflop'] / chosen[0]['tflop'] for row in chosen]
            panel.loglog(values, seconds, 'o-', color=color, label=what)
            panel.loglog(values, expected, '--', color=color, alpha=0.5)
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel('seconds')
    axes[0].legend()
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def main() -> None:
    """Measure all points, write the report and draw the plot."""
    device = default_device()
    on_gpu = device.type == 'cuda'
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--width', type=int, default=1024 if on_gpu else 128, help='a multiple of 64')
    parser.add_argument('--depths', type=int, nargs='+', default=[8, 16, 32] if on_gpu else [2, 4, 8],
                        help='the first one is that of the other panels, too')
    parser.add_argument('--resolutions', type=int, nargs='+', default=[256, 512, 1024])
    parser.add_argument('--batches', type=int, nargs='+', default=[1, 4, 16, 64] if on_gpu else [1, 2, 4])
    parser.add_argument('--repeats', type=int, default=11 if on_gpu else 2)
    parser.add_argument('--precision', type=int, choices=(0, 1, 2), default=2 if on_gpu else 0,
                        help='0 float32, 1 float16, 2 bfloat16')
    parser.add_argument('--plot', type=Path)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    points = dict(depth=args.depths, resolution=args.resolutions, batch=args.batches)
    first = {axis: values[0] for axis, values in points.items()}
    rows = []
    for axis, values in points.items():
        for value in values:
            rows += rows_of(axis, value, first | {axis: value}, args, device)
    report = report_header('scaling', device)
    if args.plot:
        title = f'VAR of width {args.width} on {report["device"]}; dashed: as the FLOPs'
        draw_scaling(rows, args.plot, title)
    write_report(report | dict(rows=rows), args.out)


if __name__ == '__main__':
    main()
