"""Fine-tuning against training from nothing, on five of the ten digits: report into --dir.

    python -m bench.finetune --dir=local_output/finetune

A VAR that knows all ten digits is fine-tuned on five of them, with a new head and a new class embedding, in
a quarter of the steps of a training from nothing: once with all weights, and once with the trunk frozen. Each
seed has all three runs. Runs that are done are not repeated.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.common import conclude, seconds_since
from utils.checkpoint import load_file
from utils.data import Digits

CLASSES = (0, 2, 4, 6, 8)
BASE_EPOCHS = 60         # of all digits
STEPS = 440              # from nothing: 37 epochs of five digits
QUARTER = STEPS // 4
RATE = 6e-3              # per 256 images, that of the demo
SETTINGS = ['--mid_reso=1.07', '--workers=0', '--hflip=0']
PYRAMID = ['--pn=1_2_3_4', '--patch_size=8']
VAR = [*PYRAMID, '--depth=3', '--bs=64', '--alng=1e-2', '--wp=1', '--eval_every=1']
ANEW = ['--reset=head,class_emb', f'--steps={QUARTER}']
TUNED = {  # flags of each way of fine-tuning
    'fine_tuned': ANEW,
    'trunk_frozen': [*ANEW, '--freeze=trunk'],
}
# lowest acceptable value: nats a code by which the validation loss is lower than that from nothing
BARS = dict(fine_tuned_is_lower_by=0.)


def write_digits(root: Path) -> Path:
    """The images of five digits as folders of classes."""
    for split, is_train in (('train', True), ('val', False)):
        images = Digits(is_train)
        for i, digit in enumerate(images.targets.tolist()):
            folder = root / split / f'digit_{digit}'
            path = folder / f'{i:04d}.png'
            if digit in CLASSES and not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                images[i][0].save(path)
    return root


def train(folder: Path, *flags: str) -> Path:
    """Run train.py to its end; the checkpoint that it leaves."""
    subprocess.run([sys.executable, 'train.py', *SETTINGS, *flags, f'--output_dir={folder}'], check=True)
    return next(folder.glob('*-ckpt-last.pth'))


def validation(checkpoint: Path) -> dict[str, float]:
    """Loss in nats and accuracy in percent of a code of the held-out digits."""
    scores = load_file(checkpoint)['run']['validation']
    return dict(loss=scores['L_mean'], accuracy=scores['acc_mean'])


def steps_to(folder: Path, loss: float) -> int | None:
    """The step of the first validation at which a run was as good as `loss`; None if there is none."""
    for text in (folder / 'log.txt').read_text().splitlines():
        line = json.loads(text)
        if line.get('vL_mean', loss + 1) <= loss:
            return line['it']
    return None


def compare(root: Path, seed: int) -> dict[str, Any]:
    """All trainings of one seed: validation at the end, and the step from which on they are as good as from
    nothing."""
    # 1. What is given: a tokenizer, and a generator of all ten digits.
    digits_flags = ['--data_path=digits', '--seed=0']
    vae = train(root / 'vqvae', '--model=vqvae', '--preset=tiny', *digits_flags, '--vocab_size=256',
                '--steps=700', *PYRAMID)
    shared = [*VAR, f'--vae_ckpt={vae}', f'--tblr={RATE}']
    base = train(root / 'base', *shared, *digits_flags, f'--ep={BASE_EPOCHS}')

    # 2. Five digits from nothing.
    shared += [f'--data_path={write_digits(root / "digits")}', f'--seed={seed}']
    nothing = validation(train(root / f'from_nothing_{seed}', *shared, f'--steps={STEPS}'))
    row: dict[str, Any] = dict(from_nothing=nothing | dict(steps=STEPS))

    # 3. The same from the weights of the ten.
    for way, flags in TUNED.items():
        folder = root / f'{way}_{seed}'
        scores = validation(train(folder, *shared, *flags, f'--init_from={base}'))
        row[way] = scores | dict(steps=QUARTER, steps_to_loss_from_nothing=steps_to(folder, nothing['loss']))
    return row


def main() -> None:
    """Run every seed, write the report, and exit with an error if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--dir', type=Path, default=Path('local_output/finetune'))
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    began = time.time()
    rows = [compare(args.dir, seed) for seed in range(args.seeds)]
    report: dict[str, Any] = {}
    for way in TUNED:
        gains = [row['from_nothing']['loss'] - row[way]['loss'] for row in rows]
        report[f'{way}_is_lower_by'] = min(gains)
    report |= dict(seeds=rows, seconds=seconds_since(began))
    conclude(args.dir / 'report.json', report, BARS)


if __name__ == '__main__':
    main()
