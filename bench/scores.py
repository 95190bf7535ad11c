"""Time and memory of scoring at full size on this machine.

    python -m bench.scores --out=bench/results

10,000 x 50,000 random features of width 2,048, float32 on the host as evaluate.py keeps them: precision and
recall in both modes, streamed statistics, Frechet distance by both routes; then images/s of the Inception
network with seeded weights, which cost what the published ones do. Peaks are of this process, with features.
"""
import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from configs.options import REPO
from evaluation.inception import InceptionFeatures
from evaluation.metrics import FeatureStatistics, frechet_distance
from evaluation.precision_recall import precision_recall
from tests.seeded_inception import seeded_inception
from utils.checkpoint import atomic_path
from utils.provenance import device_name, versions

WIDTH = 2048


def random_features(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count, WIDTH).exponential_(3., generator=generator)


def statistics(rows_NF: torch.Tensor, device: torch.device) -> FeatureStatistics:
    streamed = FeatureStatistics(WIDTH, device)
    for batch in rows_NF.split(64):
        streamed.add(batch.to(device))
    return streamed


def images_per_second(count: int, device: torch.device) -> float:
    with tempfile.NamedTemporaryFile(suffix='.pth') as file:
        torch.save(seeded_inception(0), file.name)
        network = InceptionFeatures(file.name, device, allow_unverified=True)
    images_u8 = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8)
    network.outputs(images_u8[:2].to(device))
    begin = time.perf_counter()
    for batch in images_u8.split(16):
        network.outputs(batch.to(device)).pool.cpu()
    return count / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=REPO / 'bench' / 'results')
    parser.add_argument('--images', type=int, default=32, help='for images/s')
    args = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    reference, sample = random_features(10_000, 0), random_features(50_000, 1)
    results = {}

    def measure(name: str, function, *inputs):
        begin = time.perf_counter()
        value = function(*inputs)
        results[name] = dict(seconds=round(time.perf_counter() - begin, 1),
                             peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 2))
        print(name, results[name], flush=True)
        return value
    measure('loaded', lambda: None)
    a, b = (measure(f'statistics_{len(rows)}', statistics, rows, device) for rows in (reference, sample))
    for mode in ('adm', 'fp32'):
        measure(f'precision_recall_{mode}', lambda mode=mode: precision_recall(reference, sample, mode,
                                                                              device=device))
    for method in ('eigh', 'scipy'):
        measure(f'distance_{method}', frechet_distance, a.mean, a.covariance(), b.mean, b.covariance(),
                method)
    results['images_per_second'] = round(images_per_second(args.images, device), 2)

    report = dict(command=' '.join(['python', *sys.argv]), device=device_name(device),
                  threads=torch.get_num_threads(), versions=versions(), results=results)
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(args.out / f'scores_{device.type}.json') as temporary:
        temporary.write_text(json.dumps(report, indent=2) + '\n')
    print(json.dumps(results, indent=2))


if __name__ == '__main__':
    main()
