"""Post-training on the embedded digits, judged: each method against a training of equal cost without it.

    python -m bench.post_training neon --base=local_output/demo/var/ar-ckpt-last.pth --seeds=0,1,2

Methods: neon, cca, ddo, ssg, scale_weights, which trains from nothing on the codes of the base, and sar,
whose base is the FlexVAR of `make demo-flexvar`. The competitor of a method goes on from the same weights
with the likelihood alone, for as many steps more as the method costs (docs/post_training.md). Both sides
choose their settings on images of one noise, and are scored on images of another. Everything continues after
an interruption; results are in OUT/METHOD.json.

Scores: the Frechet distance of the digits features to all embedded digits, and the class accuracy.
Letter: N images.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import DIGITS, FrechetJudge, report_header, stack, write_json
from evaluation.metrics import frechet_distance
from models import ARModel
from models.noise import ImageNoise
from sample import load_generator
from utils.data import EMBEDDED_SIZE, build_dataset
from utils.hub import sha256_of
from utils.provenance import git_commit

BATCH = 250            # images drawn at once
NUM_CHOOSING = 1000    # images by which settings are chosen
NUM_DRAWN = 1000       # images of its own that Neon is trained on
DRAWN_CFG = 1.5        # guidance of these
CFGS = (0., 0.5, 1., 1.5, 2.)
SAR_CFGS = (0., 1.)
SIX_SCALES = (1, 2, 3, 4, 5, 6)
NEON_WS = (0.5, 1., 1.5)
RATES = (1e-4, 3e-4)   # of the training that goes on as before
METHOD_RATE = 1e-4     # of a method
IMAGES_PER_STEP = 64
BETA = 0.45            # by the rule 0.02 * 680 / L, for 30 codes
CHOOSING_NOISE = 1000  # seeds of the images by which settings are chosen begin here,
FINAL_NOISE = 2000     # and of those that are scored here
TRAINING = (
    '--data_path=digits',
    '--mid_reso=1.07',
    '--patch_size=8',
    '--depth=3',
    f'--bs={IMAGES_PER_STEP}',
    '--workers=0',
    '--tb=0',
    '--eval_every=1000',
)
# what the demos train their generators with
OF_FAMILY = dict(
    var=('--model=var', '--pn=1_2_3_4'),
    flexvar=('--model=flexvar', '--pn=1_2_3_4_6', '--crop=resize', '--hflip=0'),
)
IMAGE_SIDE = dict(var=EMBEDDED_SIZE, flexvar=48)
# as it goes on: one rate for all steps, and no weight decay, as the methods have none
CONTINUED = ('--twd=0', '--twde=0', '--drop_path=0', '--sche=flat', '--wp0=1', '--wpe=1')


@dataclass(frozen=True)
class Candidate:
    """Weights and how to sample them.

    Attributes:
        ckpt: the checkpoint of a generator.
        options: of its `sample`, but `cfg` in place of the guidance.
        neon_from, neon_w: see `sample.load_generator`.
    """
    ckpt: Path
    options: tuple[tuple[str, Any], ...] = ()
    neon_from: str = ''
    neon_w: float = 1.

    def describe(self) -> dict[str, Any]:
        """Settings that tell candidates of one checkpoint apart."""
        return dict(self.options) | (dict(neon_w=self.neon_w) if self.neon_from else {})


@dataclass(frozen=True)
class Side:
    """One side of a comparison: what its best settings are chosen from, and the side it is compared with."""
    candidates: list[Candidate]
    rival: str = ''


class Judge(FrechetJudge):
    """Scores of candidates, kept in a file, so that none is computed twice; distances are to all digits."""

    def __init__(self, kept: Path, family: str):
        super().__init__()
        real = [stack(split)[0] for split in build_dataset('digits', IMAGE_SIDE[family], mid_reso=1.)[1:]]
        self.statistics = self.statistics_of(torch.cat(real))
        self.family = family
        self.kept = kept
        self.scores = json.loads(kept.read_text()) if kept.exists() else {}
        self.loaded: tuple[Any, ARModel | None] = (None, None)

    def score(self, candidate: Candidate, num_images: int, noise: int) -> dict[str, float]:
        """Distance and class accuracy of that many images, drawn with the noise of a seed."""
        key = ' '.join(map(str, (candidate, num_images, noise)))
        if key not in self.scores:
            images, wanted_N = draw(self.generator(candidate), num_images, noise, dict(candidate.options))
            self.scores[key] = dict(
                distance=frechet_distance(*self.statistics_of(images), *self.statistics),
                accuracy=self.accuracy(images, wanted_N),
            )
            write_json(self.scores, self.kept)
        return self.scores[key]

    def generator(self, candidate: Candidate) -> ARModel:
        """The generator of a candidate; that of the last one is kept."""
        wanted = (candidate.ckpt, candidate.neon_from, candidate.neon_w)
        if self.loaded[0] != wanted:
            model, _ = load_generator(
                self.family,
                str(candidate.ckpt),
                vae_ckpt='',
                weights='raw',
                device=torch.device('cpu'),
                neon_from=candidate.neon_from,
                neon_w=candidate.neon_w,
            )
            self.loaded = (wanted, model)
        return self.loaded[1]

    def best(self, candidates: list[Candidate], noise: int) -> Candidate:
        """The candidate with the lowest distance."""
        return min(candidates, key=lambda one: self.score(one, NUM_CHOOSING, noise)['distance'])


@torch.no_grad()
def draw(model: ARModel, num_images: int, seed: int,
         options: dict[str, Any]) -> tuple[torch.Tensor, np.ndarray]:
    """Images (N, 3, H, W) in [-1, 1], the classes in turn, and these (N,)."""
    wanted_N = DIGITS[np.arange(num_images) % len(DIGITS)]
    images = []
    for first in range(0, num_images, BATCH):
        labels = wanted_N[first:first + BATCH]
        rng = ImageNoise(seed, range(first, first + len(labels)))
        cfg = options.get('cfg', 0.)
        rest = {name: value for name, value in options.items() if name != 'cfg'}
        images.append(model.sample(torch.from_numpy(labels), guidance=1 + cfg, rng=rng, **rest))
    return torch.cat(images).mul(2).sub(1), wanted_N


# ---------------------------------------------------------------------------------------------- trainings
def run(*command: object) -> None:
    """Run a command of this project; what it prints is shown if it fails."""
    env = os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()))
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'{" ".join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}')


def train(folder: Path, start: Path, *flags: str, family: str = 'var') -> Path:
    """The checkpoint of a training that goes on from the weights of `start`, or that is done already."""
    run(
        'train.py',
        *TRAINING,
        *OF_FAMILY[family],
        *CONTINUED,
        f'--init_from={start}',
        f'--vae_ckpt={start}',
        f'--output_dir={folder}',
        *flags,
    )
    return folder / 'ar-ckpt-last.pth'


def flag_of_rate(rate: float) -> str:
    """The flag of a learning rate: train.py takes it for 256 images."""
    return f'--tblr={rate * 256 / IMAGES_PER_STEP:g}'


def continued(out: Path, base: Path, steps: int, seed: int, family: str = 'var',
              rates: tuple[float, ...] = RATES) -> list[Path]:
    """Checkpoints of trainings that go on as before, one for each rate."""
    return [train(out / f'mle_{steps}_{rate:g}_s{seed}', base, f'--steps={steps}', flag_of_rate(rate),
                  f'--seed={seed}', family=family)
            for rate in rates]


def guided(*ckpts: Path, cfgs: tuple[float, ...] = CFGS, **neon: Any) -> list[Candidate]:
    """Each checkpoint with each guidance."""
    return [Candidate(ckpt, (('cfg', cfg),), **neon) for ckpt in ckpts for cfg in cfgs]


# ---------------------------------------------------------------------------------------------- methods
def neon(judge: Judge, out: Path, base: Path, seed: int, num_images: int) -> dict[str, Any]:
    """Neon, 30 steps on 1,000 images of the base, against 46 more steps on digits: both at their best."""
    drawn = out / f'drawn_s{seed}'
    run(
        'sample.py',
        f'--ckpt={base}',
        f'--output={drawn}',
        f'--num_images={NUM_DRAWN}',
        f'--cfg={DRAWN_CFG}',
        f'--bs={BATCH}',
        f'--seed={CHOOSING_NOISE + 500 + seed}',
    )
    # Drawing an image and encoding it costs as much as training on one: 1,000 of them are 16 steps of 64.
    tuned = train(out / f'tuned_s{seed}', base, f'--data_path={drawn}.npz', '--val_path=digits', '--steps=30',
                  flag_of_rate(METHOD_RATE), f'--seed={seed}')
    of_method = [candidate for w in NEON_WS
                 for candidate in guided(base, neon_from=str(tuned), neon_w=w)]
    of_rival = guided(*continued(out, base, 46, seed))
    sides = dict(
        base=Side(guided(base), 'continued'),
        continued=Side(of_rival),
        neon=Side(of_method, 'continued'),
    )
    return compare(judge, sides, seed, num_images)


def cca(judge: Judge, out: Path, base: Path, seed: int, num_images: int) -> dict[str, Any]:
    """CCA, 40 steps, against 92 more steps of likelihood; neither is guided."""
    ckpt = train(out / f'cca_s{seed}', base, '--objective=cca', f'--contrast_beta={BETA}', '--cca_lambda=2',
                 '--steps=40', flag_of_rate(METHOD_RATE), f'--seed={seed}')
    of_rival = [Candidate(path) for path in continued(out, base, 92, seed)]
    sides = dict(
        base=Side([Candidate(base)], 'continued'),
        continued=Side(of_rival),
        cca=Side([Candidate(ckpt)], 'continued'),
    )
    return compare(judge, sides, seed, num_images)


def ddo(judge: Judge, out: Path, base: Path, seed: int, num_images: int) -> dict[str, Any]:
    """DDO, 12 steps and a second round of as many, against 3.1 times the steps; neither is guided."""
    flags = ('--objective=ddo', f'--contrast_beta={BETA}', '--ddo_alpha=2', '--steps=12',
             flag_of_rate(METHOD_RATE))
    first = train(out / f'ddo1_s{seed}', base, *flags, f'--seed={seed}')
    second = train(out / f'ddo2_s{seed}', first, *flags, f'--seed={CHOOSING_NOISE + seed}')
    of_rival = [Candidate(path) for steps in (37, 74) for path in continued(out, base, steps, seed)]
    sides = dict(
        base=Side([Candidate(base)], 'continued'),
        continued=Side(of_rival),
        ddo=Side([Candidate(first)], 'continued'),
        ddo_second_round=Side([Candidate(second)], 'continued'),
    )
    return compare(judge, sides, seed, num_images)


def ssg(judge: Judge, out: Path, base: Path, seed: int, num_images: int) -> dict[str, Any]:
    """SSG with the strength and the prior that suit it best, against none, at the same guidance."""
    sides = {}
    for cfg in (0., 1.5):
        of_method = [
            Candidate(base, (('cfg', cfg), ('ssg', strength), ('ssg_prior', prior)))
            for prior in ('fused', 'zero_pad', 'bilinear')
            for strength in (0.05, 0.1, 0.2, 0.4)
        ]
        sides[f'cfg {cfg}'] = Side([Candidate(base, (('cfg', cfg),))])
        sides[f'cfg {cfg}, ssg'] = Side(of_method, f'cfg {cfg}')
    return compare(judge, sides, seed, num_images)


def scale_weights(judge: Judge, out: Path, base: Path, seed: int, num_images: int) -> dict[str, Any]:
    """A VAR from nothing, 12 epochs, with each weighting of the scales: each at its best guidance."""
    sides = {}
    for weighting in ('uniform', 'equal', 'lognorm'):
        folder = out / f'{weighting}_s{seed}'
        run(
            'train.py',
            *TRAINING,
            *OF_FAMILY['var'],
            f'--scale_weights={weighting}',
            f'--vae_ckpt={base}',
            f'--output_dir={folder}',
            '--ep=12',
            '--tblr=6e-3',
            '--alng=1e-2',
            '--wp=1',
            f'--seed={seed}',
        )
        rival = '' if weighting == 'uniform' else 'uniform'
        sides[weighting] = Side(guided(folder / 'ar-ckpt-last.pth'), rival)
    return compare(judge, sides, seed, num_images)


def sar(judge: Judge, out: Path, base: Path, seed: int, num_images: int) -> dict[str, Any]:
    """SAR, 50 steps for the last scale or for all of them, against likelihood alone.

    That has 90 steps at two rates, which cost as much as 50 for all scales, or 50 at the same rate. Settings
    are chosen for the five scales of training, and serve for six scales, too.
    """
    as_dear = continued(out, base, 90, seed, 'flexvar')
    as_long = continued(out, base, 50, seed, 'flexvar', rates=(METHOD_RATE,))
    sides = {
        'base': Side(guided(base, cfgs=SAR_CFGS), 'continued'),
        'continued': Side(guided(*as_dear, cfgs=SAR_CFGS)),
        'as many steps': Side(guided(*as_long, cfgs=SAR_CFGS), 'continued'),
    }
    for scope in ('last', 'all'):
        of_method = []
        for sigma in (0.01, 0.1):
            ckpt = train(
                out / f'sar_{scope}_{sigma}_s{seed}',
                base,
                '--objective=sar',
                f'--sar_scope={scope}',
                f'--sar_sigma={sigma}',
                '--steps=50',
                flag_of_rate(METHOD_RATE),
                f'--seed={seed}',
                family='flexvar',
            )
            of_method.append(ckpt)
        sides[f'sar {scope}'] = Side(guided(*of_method, cfgs=SAR_CFGS), 'continued')

    # The judge keeps the scores of this choice, so that `compare` makes it again for nothing.
    for name, side in tuple(sides.items()):
        best = judge.best(side.candidates, CHOOSING_NOISE + seed)
        with_six = replace(best, options=(*best.options, ('infer_patch_nums', SIX_SCALES)))
        sides[f'{name}, 6 scales'] = Side([with_six], side.rival and f'{side.rival}, 6 scales')
    return compare(judge, sides, seed, num_images)


METHODS = dict(neon=neon, cca=cca, ddo=ddo, ssg=ssg, scale_weights=scale_weights, sar=sar)
FAMILY = dict(sar='flexvar')  # of the base, where it is not VAR
BASE = dict(
    var='local_output/demo/var/ar-ckpt-last.pth',
    flexvar='local_output/demo_flexvar/flexvar/ar-ckpt-last.pth',
)


# ---------------------------------------------------------------------------------------------- report
def compare(judge: Judge, sides: dict[str, Side], seed: int, num_images: int) -> dict[str, Any]:
    """Scores of each side with the settings that suit it best."""
    rows = {}
    for name, side in sides.items():
        candidates = side.candidates
        best = judge.best(candidates, CHOOSING_NOISE + seed) if len(candidates) > 1 else candidates[0]
        scores = judge.score(best, num_images, FINAL_NOISE + seed)
        rows[name] = dict(
            compared_with=side.rival,
            run=best.ckpt.parent.name,
            settings=best.describe(),
            tried=len(candidates),
            **scores,
        )
        print(f'seed {seed}, {name}: distance {scores["distance"]:.3f}, accuracy {scores["accuracy"]:.4f}, '
              f'{best.ckpt.parent.name} {best.describe()}', flush=True)
    return rows


def summary(rows_by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds: of every side, and of its difference to its rival, with the error of that."""
    runs = list(rows_by_seed.values())
    return {name: summary_of_side(name, runs) for name in runs[0]}


def summary_of_side(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of `summary` of one side; `runs` has the rows of each seed."""
    rival = runs[0][name]['compared_with']
    entry = dict(compared_with=rival)
    for score in ('distance', 'accuracy'):
        entry[score] = statistics.mean(rows[name][score] for rows in runs)
        if not rival:
            continue
        differences = [rows[name][score] - rows[rival][score] for rows in runs]
        entry[f'{score}_difference'] = statistics.mean(differences)
        if len(differences) > 1:
            entry[f'{score}_difference_error'] = statistics.stdev(differences) / math.sqrt(len(differences))
    return entry


def main() -> None:
    """Run the experiment that the command line names, and write its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('method', choices=METHODS)
    parser.add_argument('--base', type=Path,
                        help='the generator of make demo, or of make demo-flexvar for sar')
    parser.add_argument('--out', type=Path, default=Path('local_output/post_training'))
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--images', type=int, default=5000, help='images that a score counts')
    args = parser.parse_args()
    family = FAMILY.get(args.method, 'var')
    base = args.base or Path(BASE[family])

    # Results are of this very base: another file at the same place begins anew.
    digest = sha256_of(base)
    out = args.out / args.method / digest[:8]
    judge = Judge(out / 'scores.json', family)
    rows_by_seed = {}
    for seed in map(int, args.seeds.split(',')):
        rows_by_seed[seed] = METHODS[args.method](judge, out, base, seed, args.images)
    report = report_header('post_training', torch.device('cpu')) | dict(
        commit=git_commit(),
        base_sha256=digest,
        images=args.images,
        summary=summary(rows_by_seed),
        seeds=rows_by_seed,
    )
    print(json.dumps(report['summary'], indent=2))
    write_json(report, args.out / f'{args.method}.json')


if __name__ == '__main__':
    main()
