"""All benchmarks one after the other: one table, one JSON file, one plot.

`make bench`, or `python -m bench.all`: a CPU gets sizes that end in minutes; where there is CUDA,
those of a GPU run. The results are bench/results/bench_<device>.json and scaling_<device>.png.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import default_device, report_header, write_json
from configs.options import REPO

RESULTS = REPO / 'bench' / 'results'
MODULES = ('train_step', 'sampling', 'attention', 'tokenizer', 'data', 'memory', 'scaling')
CPU_FLAGS = dict(sampling=['--batches=1', '--repeats=3'])  # less than when it is called by itself
COLUMNS = dict(  # key of a row -> heading and width
    product_seconds=('seconds', 10),
    published_seconds=('published', 10),
    ratio=('ratio', 8),
    lowest_ratio=('lowest', 8),
    highest_ratio=('highest', 8),
    tflop=('TFLOP', 10),
    mfu=('MFU', 8),
    bandwidth=('GB/s', 9),
    peak_mib=('MiB', 9),
)


def run(module: str, flags: list[str]) -> dict[str, Any]:
    """The report of one benchmark, from a process of its own, whose memory nobody else has used.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'report.json'
        command = [sys.executable, '-m', f'bench.{module}', f'--out={path}', *flags]
        done = subprocess.run(command, cwd=REPO, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise SystemExit(f'bench.{module} ended with {done.returncode}: run it by itself to see why')
        return json.loads(path.read_text())


def table(reports: dict[str, dict[str, Any]]) -> str:
    """All rows of all reports as text."""
    lines = []
    for module, report in reports.items():
        headings = ''.join(f'{heading:>{width}}' for heading, width in COLUMNS.values())
        lines.append(f'{module:60}{headings}')
        for row in report['rows']:
            cells = ''.join(f'{cell(row, key):>{width}}' for key, (_, width) in COLUMNS.items())
            lines.append(f'  {row["name"]:58}{cells}')
    return '\n'.join(lines)


def cell(row: dict[str, Any], key: str) -> str:
    """A figure of a row as text, or nothing where the row has none."""
    if key not in row:
        return ''
    return f'{row[key]:.1%}' if key == 'mfu' else f'{row[key]:.4g}'


def main() -> None:
    """Run everything, print the table, and write the JSON file and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--modules', nargs='+', choices=MODULES, default=MODULES)
    parser.add_argument('--results', type=Path, default=RESULTS)
    args = parser.parse_args()
    device = default_device()
    header = report_header('all', device)
    slug = re.sub(r'[^0-9A-Za-z]+', '-', header['device'])
    begin = time.time()
    reports = {}
    for module in args.modules:
        print(f'{time.time() - begin:5.0f} s  {module}', flush=True)
        flags = CPU_FLAGS.get(module, []) if device.type == 'cpu' else []
        if module == 'scaling':
            flags = [*flags, f'--plot={args.results / f"scaling_{slug}.png"}']
        reports[module] = run(module, flags)
        # After each one: what is measured is kept where a later one fails.
        seconds = round(time.time() - begin)
        write_json(header | dict(seconds=seconds, reports=reports), args.results / f'bench_{slug}.json')
    print(table(reports))
    print(f'{seconds} s, written to {args.results}')


if __name__ == '__main__':
    main()
