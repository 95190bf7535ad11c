"""A whole run of evaluate.py with scores beyond FID, killed in the middle and continued, on this machine.

    python -m bench.beyond_fid --images=5000 --out=bench/results

Images are tiles of four embedded digits, 64x64; two encoders of the table look at them, as small replicas
with seeded weights, and the network of the digits. One run goes to the end; another one is killed once half
of its passes over images are on disk, and is started again; the last one finds all features there. Memory is
the private one of the process, which mapped files do not add to.
"""
import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import evaluate
from bench.common import default_device, report_header, write_report
from configs.options import REPO
from tests.replicas import small_table, write_replicas
from utils.data import open_split
from utils.image_sets import write_npz

METRICS = 'adm,kid,mind,fd_dinov2,prdc,fd_inf'
ENCODERS = ('dinov2_edm2', 'mae')
NUM_PASSES = 2 * (1 + len(ENCODERS))  # over both sets, by each encoder and by the network of the digits
POLL = 0.05                           # seconds between two looks at a process


def write_tiles(path: Path, split: str, count: int, seed: int) -> None:
    """Write images of two by two digits of a split, drawn at random."""
    digits = np.stack([np.asarray(image) for image, _ in open_split('digits', split)])
    rng = np.random.RandomState(seed)

    def tiled() -> Iterator[np.ndarray]:
        for _ in range(count):
            top_left, top_right, bottom_left, bottom_right = digits[rng.randint(len(digits), size=4)]
            top = np.concatenate([top_left, top_right], axis=1)
            bottom = np.concatenate([bottom_left, bottom_right], axis=1)
            yield np.concatenate([top, bottom])

    side = 2 * digits.shape[1]
    write_npz(path, tiled(), count, side, side)


def private_megabytes(pid: int) -> float:
    """Memory of a process that no file stands behind, in MB; 0 once it has ended."""
    try:
        lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    except OSError:
        return 0.
    values = [line.split()[1] for line in lines if line.startswith('RssAnon')]
    return int(values[0]) / 1024 if values else 0.


def passes_on_disk(cache: Path) -> int:
    """Number of finished passes over images."""
    return len(list(cache.glob('set-*.npz')))


def run(folder: Path, cache: Path, kill_after: int = 0) -> dict[str, Any]:
    """Score in a process of its own.

    Args:
        kill_after: kill the process when so many passes are on disk; 0 lets it finish.
    Returns:
        Seconds, the peak of its private memory, and its scores if it has finished.
    """
    report = folder / 'report.json'
    report.unlink(missing_ok=True)
    command = [
        sys.executable, '-m', 'bench.beyond_fid', '--score', str(folder / 'real.npz'),
        str(folder / 'sample.npz'), f'--metrics={METRICS}', '--features=digits', '--prdc_encoder=mae',
        f'--real={folder / "real.npz"}', f'--encoder_weights={folder / "encoders"}',
        '--encoder_dtype=float32', f'--cache={cache}', '--offline', '--allow_any_count', f'--json={report}']
    begin = time.perf_counter()
    peak = 0.
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(POLL)
            peak = max(peak, private_megabytes(process.pid))
            if kill_after and passes_on_disk(cache) >= kill_after:
                process.send_signal(signal.SIGKILL)
        assert kill_after or process.returncode == 0, process.returncode
    found = dict(
        seconds=round(time.perf_counter() - begin, 1),
        peak_private_mb=round(peak),
        passes_on_disk=passes_on_disk(cache),
    )
    if report.exists():
        found['scores'] = json.loads(report.read_text())['scores']
    return found


def main() -> None:
    """Measure everything and write beyond_fid_cpu.json or beyond_fid_cuda.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=5000)
    parser.add_argument('--out', type=Path, default=REPO / 'bench' / 'results')
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiles(folder / 'sample.npz', 'train', args.images, seed=0)
        write_tiles(folder / 'real.npz', 'val', args.images, seed=1)
        write_replicas(folder / 'encoders', ENCODERS)
        results['whole'] = run(folder, folder / 'one')
        results['killed'] = run(folder, folder / 'two', kill_after=NUM_PASSES // 2)
        results['continued'] = run(folder, folder / 'two')
        results['all_on_disk'] = run(folder, folder / 'two')
    scores = [results[name].pop('scores') for name in ('whole', 'continued', 'all_on_disk')]
    assert 'scores' not in results['killed'] and scores[1] == scores[0] == scores[2]

    device = default_device()
    report = report_header('beyond_fid', device) | dict(images=args.images, results=results, scores=scores[0])
    write_report(report, args.out / f'beyond_fid_{device.type}.json')


def score(argv: list[str]) -> None:
    """evaluate.py with these arguments, and small replicas in its table of encoders."""
    with small_table():
        evaluate.main(evaluate.parse_evaluation(argv, evaluate.__doc__))


if __name__ == '__main__':
    if '--score' in sys.argv[1:2]:
        score(sys.argv[2:])
    else:
        main()
