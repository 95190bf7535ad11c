"""What runs leave behind, as an outline that can be stored: 30 steps of every model on the embedded digits.

`python -m tests.pinned` writes those of the present code to tests/data/pinned, test_pinned.py compares.
Loss curves, weights and samples depend on the machine to the last bit, so each outline names its own.
"""
import contextlib
import hashlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import sample
import train
from configs import FAMILIES, PRESETS, SAMPLE_PRESETS
from tests.runs import REPO, kept_logging

FOLDER = Path(__file__).parent / 'data' / 'pinned'
STEPS = 30
ANY_RUN = ['--data_path=digits', '--mid_reso=1.07', '--hflip=0', '--workers=0', '--seed=0', '--log_every=1',
           '--eval_every=1', '--save_every=20', f'--steps={STEPS}']
TOKENIZER = ['--preset=tiny', '--bs=16', '--picture_every=15']
ADALN = ['--pn=1_2_3_4', '--patch_size=8', '--depth=2', '--bs=64', '--tblr=6e-3', '--alng=1e-2', '--ema=0.9']
RUNS = {  # model -> its flags; `{name}` is the export of the tokenizer that was trained before
    'vqvae': [*TOKENIZER, '--vocab_size=256', '--ema=0.9'],
    'vq16': [*TOKENIZER, '--vocab_size=256', '--disc=patchgan', '--disc_width=8', '--disc_start=0.5'],
    'flexvae': [*TOKENIZER, '--vocab_size=256'],
    'kl16': [*TOKENIZER, '--lpips=pyramid'],
    'var': [*ADALN, '--vae_ckpt={vqvae}', '--pg=0.5', '--pg0=2'],
    'flexvar': [*ADALN, '--vae_ckpt={flexvae}', '--crop=resize', '--ac=2'],
    'npp': ['--vq_ckpt={vq16}', '--image_size=32', '--downsample_size=8', '--mixed_precision=none',
            '--depth=2', '--width=64', '--bs=64', '--lr=2e-3', '--patch_level=2', '--epoch_rate=0.5',
            '--epochs=2'],
    'flowar': ['--vae_path={kl16}', '--img_size=32', '--vae_stride=8', '--size=small', '--depth=1',
               '--width=64', '--diffloss_d=1', '--diffloss_w=64', '--bs=64', '--epochs=2',
               '--warmup_epochs=1', '--blr=2e-3'],
}
TIMES = ('remain_time', 'finish_time')


def machine():
    """What the last bit of a result depends on beside the code."""
    return dict(torch=torch.__version__.split('+')[0], cpu=torch.backends.cpu.get_cpu_capability())


def run(script, *argv):
    """An entry point in this process; what it prints."""
    printed = io.StringIO()
    with mock.patch.object(sys, 'argv', [script.__file__, *map(str, argv)]), \
            contextlib.redirect_stdout(printed), kept_logging():
        script.main()
    return printed.getvalue()


# ---------------------------------------------------------------------------------------------- outlines
def outline_of_training(model, folder):
    """The outline of a finished run, split into what any machine gives and what only this one does."""
    prefix = 'ar-ckpt' if model in FAMILIES else 'vae-ckpt'
    checkpoint = torch.load(folder / f'{prefix}-last.pth', weights_only=True)
    steps = [json.loads(line) for line in (folder / 'steps.jsonl').read_text().splitlines()]
    epochs = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    exact = dict(
        loss=[next(line[key] for key in ('Lm', 'L_mean', 'loss', 'rec_loss', 'l1') if key in line)
              for line in steps],
        grad_norm=[line['grad_norm'] for line in steps],
        epochs=[{key: value for key, value in line.items() if key not in TIMES} for line in epochs[1:]],
        weights=digest_of_tensors(checkpoint['trainer']))
    shared = dict(
        files=sorted(path.name for path in folder.iterdir()),
        keys_of_steps=[list(keys) for keys in dict.fromkeys(tuple(line) for line in steps)],
        keys_of_log=[list(line) for line in epochs],
        tags=tags_of(next(folder.glob('tb-*'))),
        checkpoint={name: sorted(part) if isinstance(part, dict) else str(part)
                    for name, part in checkpoint.items() if name not in ('git_commit', 'versions')},
        trainer={name: digest_of_keys(part) for name, part in sorted(checkpoint['trainer'].items())})
    export = folder / 'vae-export.pth'
    if export.exists():
        shared['export'] = {name: digest_of_keys(part)
                            for name, part in torch.load(export, weights_only=True).items()}
    return shared, exact


def outline_of_samples(npz):
    """The same for the files of a sampling job."""
    manifest = json.loads(npz.with_suffix('.json').read_text())
    nested = {name: list(part) if isinstance(part, dict) else type(part).__name__
              for name, part in manifest.items()}
    return nested, hashlib.sha256(npz.read_bytes()).hexdigest()


def tags_of(folder):
    """TensorBoard tag -> its steps."""
    found = {}
    for path in sorted(folder.iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return {tag: outline_of_steps(sorted(found[tag])) for tag in sorted(found)}


def outline_of_steps(steps):
    """Their number, the first and the last ones."""
    return f'{len(steps)}: {", ".join(map(str, steps[:3]))} ... {steps[-1]}'


def leaves(tree, name=''):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f'{name}.{key}')
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from leaves(value, f'{name}.{i}')
    else:
        yield name, tree


def digest_of_keys(part):
    """Number of leaves and a digest of their names, kinds and shapes, in order."""
    lines = [f'{name} {value.dtype} {tuple(value.shape)}' if isinstance(value, torch.Tensor)
             else f'{name} {type(value).__name__}' for name, value in leaves(part)]
    return f'{len(lines)} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}'


def digest_of_tensors(tree):
    digest = hashlib.sha256()
    for name, value in sorted(leaves(tree), key=lambda leaf: leaf[0]):
        if isinstance(value, torch.Tensor) and value.numel():
            digest.update(name.encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def outline_of(model, root):
    """Train `model` below `root`, after its tokenizer if that is not there yet; sample from generators."""
    exports = {name: root / name / 'vae-export.pth' for name in RUNS}
    flags = [flag.format(**exports) for flag in RUNS[model]]
    for name, path in exports.items():
        if f'{{{name}}}' in ' '.join(RUNS[model]) and not path.exists():
            outline_of(name, root)
    folder = root / model
    run(train, f'--model={model}', *ANY_RUN, f'--output_dir={folder}', *flags)
    shared, exact = outline_of_training(model, folder)
    if model in FAMILIES:
        run(sample, f'--model={model}', f'--ckpt={folder}/ar-ckpt-last.pth', f'--output={folder}/samples',
            '--num_images=8', '--bs=4', '--cfg=1.5')
        shared['manifest'], exact['npz'] = outline_of_samples(folder / 'samples.npz')
    return dict(shared=shared, machine=machine(), exact=exact)


def settings_of_presets():
    """What --dry_run prints without a preset, what of it every preset changes, and the same of sample.py."""
    found = {}
    for model, presets in PRESETS.items():
        for preset in ('', *presets):
            printed = run(train, f'--model={model}', f'--preset={preset}', '--dry_run', '--workers=2')
            values = json.loads(printed)
            default = found.get(f'train {model} ', {})
            found[f'train {model} {preset}'] = {name: value for name, value in values.items()
                                                if name not in default or default[name] != value}
    for model, presets in SAMPLE_PRESETS.items():
        for preset in ('', *presets):
            config = sample.parse_sampling([f'--model={model}', f'--preset={preset}', '--ckpt=FILE'])
            values = {**vars(config), 'kwargs': config.sample_kwargs()}
            default = found.get(f'sample {model} ', {})
            found[f'sample {model} {preset}'] = {name: value for name, value in values.items()
                                                 if name not in default or default[name] != value}
    text = json.dumps(found, default=list)
    return json.loads(text.replace(str(REPO), 'REPO'))


def main():
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        for model in RUNS:
            content = outline_of(model, Path(root))
            store(model, content)
    store('presets', settings_of_presets())


def store(name, content):
    """As JSON, with short lists on one line."""
    text = re.sub(r'\[\s+([^][{}]*?)\s+\]', lambda match: f'[{" ".join(match[1].split())}]',
                  json.dumps(content, indent=1))
    (FOLDER / f'{name}.json').write_text(text + '\n')


if __name__ == '__main__':
    main()
