"""Peak memory of training steps and of sampling, of the product and of the published way.

`python -m bench.memory`: what a call allocates at its peak, beside weights, gradients and moments that were
there before. On CUDA the allocator tells it, on the CPU it is counted (see `bench.counter`), so that it is
exact and repeats.
"""
from collections.abc import Callable

import torch

from bench import reference
from bench.common import (
    default_device,
    four_digits,
    peak_bytes_of,
    report_header,
    to_device,
    write_report,
)
from bench.counter import cost_of
from bench.sampling import TOP_K, TOP_P, make_var
from bench.train_step import both_ways, cases, parser_of_cases
from models.noise import ImageNoise


def row_of(name: str, product: Callable[[], object], published: Callable[[], object] | None,
           device: torch.device) -> dict[str, float | str]:
    """Peaks of both ways, and how many times less the product takes."""
    row = dict(name=name, peak_mib=four_digits(peak_bytes_of(product, device, cost_of(product)) / 2 ** 20))
    if published:
        peak = peak_bytes_of(published, device, cost_of(published)) / 2 ** 20
        row |= dict(published_peak_mib=four_digits(peak), ratio=round(peak / row['peak_mib'], 3))
    print(row, flush=True)
    return row


def main() -> None:
    """Measure all families and write the report."""
    device = default_device()
    args = parser_of_cases(__doc__, device.type == 'cuda').parse_args()
    torch.manual_seed(0)
    rows = []
    for case in cases(device, args.depth, args.batch):
        product, published = both_ways(case, args.precision)
        rows.append(row_of(f'{case.name}, training step, batch {args.batch}', product, published, device))

    model = to_device(make_var(args.depth), device)
    label_B = torch.arange(args.batch, device=device)
    noise = ImageNoise(0, list(range(args.batch)))
    rows.append(row_of(
        f'VAR depth {args.depth}, sampling, batch {args.batch}',
        lambda: model.sample(label_B, guidance=2.5, top_k=TOP_K, top_p=TOP_P, rng=noise),
        lambda: reference.sample_var(model, label_B, 1.5, TOP_K, TOP_P, noise),
        device,
    ))
    write_report(report_header('memory', device) | dict(rows=rows), args.out)


if __name__ == '__main__':
    main()
