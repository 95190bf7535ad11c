"""What a checkpoint costs a training: written while the steps wait, and in the background.

`python -m bench.saving`: steps of a small VAR, one save among them, of a state that is padded to
`--gigabytes`; the three ways (no save, a save that the steps wait for, one in the background) take turns. It
then says which share of a run with `--save_every=20m` that is for the published VARs, at the speed that was
measured here. The pause is what the steps wait for. What is lost beyond it is the work of the thread, where
the steps need the same cores; those of a GPU do not.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.common import default_device, four_digits, report_header, synchronize, write_report
from bench.cost import build_on_meta, published_config
from bench.plan import checkpoint_bytes
from bench.train_step import both_ways, cases
from training.saving import CheckpointWriter

MINUTES = 20  # between two saves, the default of --save_every
STEPS = 16    # of which the second one is followed by the save


def seconds_of_steps(step: Any, state: dict[str, Any] | None, checkpoints: CheckpointWriter,
                     device: torch.device) -> tuple[float, float]:
    """Seconds of `STEPS` training steps, and of the wait in them for a checkpoint of `state`, if any.

    A save in the background that outlasts the steps is waited for by nobody, as in a training.
    """
    begin = time.perf_counter()
    waited = 0.
    for i in range(STEPS):
        step()
        if state is not None and i == 1:
            synchronize(device)
            paused = time.perf_counter()
            checkpoints.save(state, i)
            waited = time.perf_counter() - paused
    synchronize(device)
    return time.perf_counter() - begin, waited


def main() -> None:
    """Measure the three ways and write the report."""
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--gigabytes', type=float, default=1., help='size of the checkpoint')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--out', type=Path, default=None)
    args = parser.parse_args()
    torch.manual_seed(0)
    step, _ = both_ways(next(cases(device, 4, 2)), 0)  # the first case is a VAR
    padding = torch.randn(round(args.gigabytes * 1e9 / 4), device=device)
    state = dict(epoch=0, iter=0, trainer=dict(weights=padding))

    # Turn by turn, so that all ways meet the same machine.
    ways: dict[str, list[tuple[float, float]]] = dict(none=[], waiting=[], background=[])
    with tempfile.TemporaryDirectory() as folder:
        writers = {way: CheckpointWriter(Path(folder) / way, 'ar-ckpt', way == 'background') for way in ways}
        for way in ways:
            (Path(folder) / way).mkdir()
        step()
        for _ in range(1 + args.repeats):  # the first turn warms up, and takes the memory of the copy
            for way, runs in ways.items():
                runs.append(seconds_of_steps(step, None if way == 'none' else state, writers[way], device))
                writers[way].wait()
    rows = []
    plain = statistics.median(seconds for seconds, _ in ways['none'][1:])
    for way in ('waiting', 'background'):
        lost = statistics.median(seconds for seconds, _ in ways[way][1:]) - plain
        paused = statistics.median(waited for _, waited in ways[way][1:])
        rows.append(dict(name=f'a checkpoint of {args.gigabytes:g} GB, {way}', step_seconds=plain / STEPS,
                         pause_seconds=paused, pause_steps=paused * STEPS / plain, lost_seconds=lost,
                         lost_steps=lost * STEPS / plain))

    # What that means for the published sizes, whose checkpoints are larger.
    for name in ('var_d16', 'var_d20', 'var_d24', 'var_d30'):
        config = published_config(name)
        gigabytes = checkpoint_bytes(config, build_on_meta(config)) / 1e9
        for way, row in zip(('waiting', 'background'), rows[:2], strict=True):
            scale = gigabytes / args.gigabytes / (60 * MINUTES)
            rows.append(dict(name=f'{name}, {gigabytes:.1f} GB every {MINUTES} minutes, {way}',
                             pause_share=row['pause_seconds'] * scale,
                             lost_share=row['lost_seconds'] * scale))
    rows = [{key: value if key == 'name' else four_digits(value) for key, value in row.items()}
            for row in rows]
    write_report(report_header('saving', device) | dict(rows=rows), args.out)


if __name__ == '__main__':
    main()
