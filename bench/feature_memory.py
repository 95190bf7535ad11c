"""Memory that scores of single images need beside the features themselves, on this machine.

    python -m bench.feature_memory --images=50000 --out=bench/results

Features are random numbers in mapped files, as evaluate.py keeps them: 2,048 an image for Inception, 768 for
CMMD's CLIP. Each score runs in a process of its own, whose private memory is watched; mapped files do not
belong to that. A score that takes longer than --seconds is stopped there: it goes on in blocks like the first
ones. Letters: N images, F features.
"""
import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.beyond_fid import private_megabytes
from bench.common import report_header, write_report
from configs.options import REPO
from evaluation.beyond_fid import METRICS, SET_NAMES, Comparison, Training
from evaluation.feature_store import SetFeatures
from evaluation.settings import ScoreSettings

NUM_FEATURES = dict(inception=2048, clip336=768)
POLL = 0.02              # seconds between two looks at a process
WRITTEN_AT_ONCE = 1000   # rows


def write_rows(path: Path, count: int, num_features: int, seed: int) -> None:
    """Write random features (N, F) of unit length, float32, without having all of them in memory."""
    rng = np.random.default_rng(seed)
    rows_NF = np.lib.format.open_memmap(path, 'w+', np.float32, (count, num_features))
    for begin in range(0, count, WRITTEN_AT_ONCE):
        part_nF = rng.standard_normal((min(WRITTEN_AT_ONCE, count - begin), num_features), np.float32)
        rows_NF[begin:begin + len(part_nF)] = part_nF / np.linalg.norm(part_nF, axis=1, keepdims=True)


def comparison(folder: Path, encoder: str) -> Comparison:
    """What `evaluate.py` gives a score: features of all sets, and statistics of the training images."""
    features = {}
    for of in SET_NAMES:
        rows_NF = torch.from_numpy(np.load(folder / f'{of}_{encoder}.npy', mmap_mode='c'))
        features[of] = {encoder: SetFeatures(len(rows_NF), {}, rows_NF, None, [])}
    num_features = NUM_FEATURES[encoder]
    statistics = (torch.zeros(num_features).double(), torch.eye(num_features).double())
    return Comparison(
        settings=ScoreSettings(ref='real', sample='sample', features='inception', device='cpu'),
        encoders={encoder: SimpleNamespace(name=encoder, dtype='float32')},
        features=features,
        training={encoder: Training(statistics, False, 0, {})},
        side=256,
    )


def compute(folder: Path, name: str, threads: int, begins: Any) -> None:
    """Compute one score, once everything it takes from elsewhere is loaded."""
    torch.set_num_threads(threads)
    encoder = 'clip336' if name == 'cmmd' else 'inception'
    given = comparison(folder, encoder)
    begins.set()
    METRICS[name].score(given)


def watch(folder: Path, name: str, seconds: float) -> dict[str, Any]:
    """Peak of the private memory of one score above what its process had before it."""
    context = multiprocessing.get_context('spawn')
    begins = context.Event()
    process = context.Process(target=compute, args=(folder, name, torch.get_num_threads(), begins))
    process.start()
    begins.wait()
    before = peak = private_megabytes(process.pid)
    begin = time.perf_counter()
    while process.is_alive() and time.perf_counter() - begin < seconds:
        time.sleep(POLL)
        peak = max(peak, private_megabytes(process.pid))
    is_whole = not process.is_alive()
    process.kill()
    process.join()
    assert not is_whole or process.exitcode == 0, f'{name} failed'
    return dict(
        peak_mb=round(peak - before),
        seconds=round(time.perf_counter() - begin, 1),
        is_whole=is_whole,
    )


def main() -> None:
    """Watch every score of single images, and write feature_memory.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=50_000)
    parser.add_argument('--seconds', type=float, default=60., help='after which a score is stopped')
    parser.add_argument('--out', type=Path, default=REPO / 'bench' / 'results')
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, of in enumerate(SET_NAMES):
            for encoder, num_features in NUM_FEATURES.items():
                write_rows(folder / f'{of}_{encoder}.npy', args.images, num_features, seed)
        for metric in (name for name, metric in METRICS.items() if metric.rows):
            results[metric] = watch(folder, metric, args.seconds)
            print(metric, results[metric], flush=True)
    report = report_header('feature_memory', torch.device('cpu')) | dict(images=args.images, results=results)
    write_report(report, args.out / 'feature_memory.json')


if __name__ == '__main__':
    main()
