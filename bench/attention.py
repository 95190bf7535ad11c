"""Attention of teacher forcing: a call for every scale against one call under a dense mask, forward and back.

`python -m bench.attention`: VAR at 256 px (680 tokens) and at 512 px (2,240 tokens). Both must agree before
anything is timed. On CUDA, FlexAttention with a block mask of the same pyramid is a third way.
"""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.common import compare, default_device, report_header, require_equal, write_report
from configs.options import ints
from configs.training import PATCH_NUMS
from models.attention import attend
from models.scales import ScaleLayout, block_causal

SIZES = (256, 512)  # in pixels
TOLERANCE = 1e-4
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def by_flex_attention(layout: ScaleLayout, device: torch.device) -> Attention:
    """FlexAttention, compiled, with a block mask of these scales."""
    level_L = layout.level_L(device)
    mask = create_block_mask(lambda b, h, q, k: level_L[q] >= level_L[k], None, None, layout.total,
                             layout.total, device=device)
    compiled = torch.compile(flex_attention)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out_BHLd = compiled(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask)
        return out_BHLd.transpose(1, 2)

    return attention


def forward_and_back(attention: Attention, inputs: list[torch.Tensor], weights: torch.Tensor,
                     ) -> tuple[torch.Tensor, ...]:
    """The gradients of a weighted sum of what attention gives."""
    return torch.autograd.grad((attention(*inputs) * weights).sum(), inputs)


def rows_of(pixels: int, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Each way at this size against the dense mask.

    Raises:
        SystemExit: two ways differ.
    """
    layout = ScaleLayout(ints(PATCH_NUMS[str(pixels)]))
    dtype = torch.bfloat16 if device.type == 'cuda' else torch.float32
    shape = (args.batch, layout.total, args.heads, 64)
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    weights = torch.randn(shape, device=device, dtype=dtype)
    dense = partial(attend, bias=layout.causal_bias(device)[None, None].to(dtype))
    ways = {'by scale': partial(attend, bias=block_causal(layout, device).to(dtype))}
    if device.type == 'cuda':
        ways['FlexAttention'] = by_flex_attention(layout, device)

    rows = []
    expected = forward_and_back(dense, inputs, weights)
    for name, way in ways.items():
        # In bfloat16 the ways agree to its precision alone.
        tolerance = TOLERANCE if dtype == torch.float32 else 0.1
        for grad, other in zip(forward_and_back(way, inputs, weights), expected, strict=True):
            require_equal(name, grad, other, tolerance)
        rows.append(compare(f'{name}, {layout.total} tokens, batch {args.batch}, {args.heads} heads, {dtype}',
                            partial(forward_and_back, way, inputs, weights),
                            partial(forward_and_back, dense, inputs, weights), args.repeats, device))
    return rows


def main() -> None:
    """Compare all ways at both sizes and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--heads', type=int, default=8)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    device = default_device()
    torch.manual_seed(0)
    rows = []
    for pixels in SIZES:
        rows += rows_of(pixels, args, device)
    write_report(report_header('attention', device) | dict(rows=rows), args.out)


if __name__ == '__main__':
    main()
