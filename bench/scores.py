"""Time and memory of scoring at full size on this machine.

    python -m bench.scores --out=bench/results

10,000 x 50,000 random features of width 2,048, in float32 on the host as evaluate.py keeps them: streamed
statistics, precision and recall in both modes, Frechet distance in both ways. Then images/s of the Inception
network; its weights are random, which cost as much as the published ones do. Peaks are those of this process
and include the features.
Letters: N images, F features.
"""
import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.common import default_device, report_header
from configs.options import REPO
from evaluation.inception import InceptionFeatures
from evaluation.metrics import FeatureStatistics, frechet_distance
from evaluation.precision_recall import precision_recall
from tests.seeded_inception import seeded_inception
from utils.files import write_text

WIDTH = 2048


def random_features(count: int, seed: int) -> torch.Tensor:
    """(count, WIDTH) numbers of an exponential distribution, as little symmetric as real features."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count, WIDTH).exponential_(3., generator=generator)


def statistics(rows_NF: torch.Tensor, device: torch.device) -> FeatureStatistics:
    """Streamed mean and covariance of features, in batches of 64 as they come from a network."""
    streamed = FeatureStatistics(WIDTH, device)
    for batch in rows_NF.split(64):
        streamed.add(batch.to(device))
    return streamed


def images_per_second(count: int, device: torch.device) -> float:
    """Speed of the Inception network on that many images of 256x256 pixels."""
    with tempfile.NamedTemporaryFile(suffix='.pth') as file:
        torch.save(seeded_inception(0), file.name)
        network = InceptionFeatures(file.name, device, allow_unverified=True)
    images_u8 = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8)
    network.outputs(images_u8[:2].to(device))  # warm-up
    begin = time.perf_counter()
    for batch in images_u8.split(16):
        network.outputs(batch.to(device)).pool.cpu()
    return count / (time.perf_counter() - begin)


class Stopwatch:
    """Notes the seconds and the peak memory of named calls.

    Attributes:
        results: `seconds` and `peak_gb` (GiB of this process so far) by name.
    """

    def __init__(self):
        self.results: dict[str, Any] = {}

    def measure(self, name: str, function: Callable, *inputs: Any, **options: Any) -> Any:
        """What the function returns for these arguments."""
        begin = time.perf_counter()
        value = function(*inputs, **options)
        seconds = time.perf_counter() - begin
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.results[name] = dict(seconds=round(seconds, 1), peak_gb=round(peak_kib / 2 ** 20, 2))
        print(name, self.results[name], flush=True)
        return value


def main() -> None:
    """Measure everything and write scores_cpu.json or scores_cuda.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=REPO / 'bench' / 'results')
    parser.add_argument('--images', type=int, default=32, help='for images/s')
    args = parser.parse_args()
    device = default_device()
    reference = random_features(10_000, 0)
    sample = random_features(50_000, 1)

    watch = Stopwatch()
    watch.measure('loaded', lambda: None)  # the memory of the features alone
    a = watch.measure(f'statistics_{len(reference)}', statistics, reference, device)
    b = watch.measure(f'statistics_{len(sample)}', statistics, sample, device)
    for mode in ('adm', 'fp32'):
        watch.measure(f'precision_recall_{mode}', precision_recall, reference, sample, mode, device=device)
    for method in ('eigh', 'scipy'):
        watch.measure(f'distance_{method}', frechet_distance, a.mean, a.covariance(), b.mean,
                      b.covariance(), method)
    results = watch.results
    results['images_per_second'] = round(images_per_second(args.images, device), 2)

    report = report_header('scores', device) | dict(results=results)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / f'scores_{device.type}.json', json.dumps(report, indent=2) + '\n')
    print(json.dumps(results, indent=2))


if __name__ == '__main__':
    main()
