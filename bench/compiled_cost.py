"""What fusing kernels saves: launches and bytes of a VAR's forward and backward pass, eager and compiled.

`python -m bench.compiled_cost` takes Inductor's own counts. It needs a C++ compiler and some minutes, and no
GPU: what Inductor fuses for the CPU is close to what it fuses for CUDA. Two depths are compiled, and deeper
stacks follow from them. Times that are made of the counts are a model, not a measurement.
"""
import argparse
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._inductor import metrics
from torch._inductor.scheduler import NopKernelSchedulerNode

from bench.common import report_header, write_json
from bench.cost import build_on_meta, describe, published_config, published_depths, times
from bench.counter import Cost, cost_of, extrapolated
from configs import TrainConfig
from models import VAR

METRICS_LOG = 'torch._inductor.compile_fx.__inductor_metrics'


def transformer(config: TrainConfig, depth: int) -> VAR:
    """A VAR of published width in float32; its weights are random."""
    model = build_on_meta(config, (depth,)).to_empty(device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        model.lvl_1L.copy_(model.layout.level_L())
        model.attn_bias_for_masking.copy_(model.layout.causal_bias())
    return model


def both_passes(model: VAR, batch: int) -> Callable[[], None]:
    """A call of the forward and the backward pass."""
    label_B = torch.zeros(batch, dtype=torch.int64)
    teacher_BLZ = torch.zeros(batch, model.L - 1, model.Cvae)

    def run() -> None:
        model(label_B, teacher_BLZ).sum().backward()
        model.zero_grad()

    return run


def eager_cost(config: TrainConfig, batch: int, depth: int) -> Cost:
    """What both passes cost in eager code."""
    return cost_of(both_passes(transformer(config, depth), batch))


def compiled_cost(config: TrainConfig, batch: int, depth: int) -> Cost:
    """What both passes cost after `model.compile()`; the FLOPs of products are those of eager code."""
    model = transformer(config, depth)
    run = both_passes(model, batch)
    flops = cost_of(run).flops

    # Inductor adds up bytes only where this log is on; what it prints is of no use.
    torch._dynamo.reset()
    metrics.reset()
    log = logging.getLogger(METRICS_LOG)
    log.setLevel(logging.INFO)
    log.addHandler(logging.NullHandler())
    log.propagate = False
    with torch._inductor.config.patch(force_disable_caches=True):
        model.compile()
        run()
    kernels = [node for node, _ in metrics.node_runtimes if launches_kernel(node)]
    return Cost(launches=len(kernels), bytes=metrics.num_bytes_accessed, flops=flops, full_flops=flops)


def launches_kernel(node: Any) -> bool:
    """Whether a node of Inductor's schedule is a kernel, and not just one of several results of another."""
    is_result = type(node.node).__name__ == 'MultiOutput'
    return not is_result and not isinstance(node, NopKernelSchedulerNode)


def main() -> None:
    """Count both, print them and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--preset', default='var_d16', help='a published VAR')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    config = published_config(args.preset)
    rows = []
    for name, count in (('eager', eager_cost), ('compiled', compiled_cost)):
        cost = extrapolated(partial(count, config, args.batch), published_depths(config))
        row = dict(name=name) | describe(cost, args.batch)
        print(row, flush=True)
        rows.append(row | dict(model=times(cost, args.batch)))
    if args.out:
        write_json(report_header('compiled_cost', torch.device('cpu')) | dict(rows=rows), args.out)


if __name__ == '__main__':
    main()
