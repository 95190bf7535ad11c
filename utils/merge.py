"""Neon: weights on the far side of a generator, away from the same one tuned on its own samples.

`python -m utils.merge REFERENCE TUNED OUT --w=1` writes theta_r + w (theta_r - theta_s): theta_r is the
reference, theta_s the same model after a short training on images that the reference has drawn. Samplers
favour what is likely, so that such a training leads away from the data, and its opposite leads towards them
(arXiv 2510.03597). The result is a file for sample.py and `pipeline.load`; `sample.py --neon_from=TUNED` does
the same on the fly.
"""
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.options import check_values, check_weights, expand_paths, opt, parse_settings
from models import ARModel, read_kwargs
from pipeline import Contents, Part, build, check_same_codes, read
from utils.checkpoint import save_file
from utils.console import one_line_errors
from utils.log import setup_logging
from utils.provenance import git_commit, versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeSettings:
    """Which weights to extrapolate, and how far."""

    reference: str = opt('', 'weights of the generator that has drawn the samples', positional=True,
                         path=True)
    tuned: str = opt('', 'checkpoint of its training on them', positional=True, path=True)
    out: str = opt('', 'file to write', positional=True, path=True)
    w: float = opt(1., 'how far to go: 0 is the reference, -1 the tuned model', limits=(-1000, 1000))
    vae_ckpt: str = opt('', 'tokenizer weights; empty takes those inside the files', path=True)
    weights: str = opt('ema', 'of the reference: ema, raw, or the name of one of several averages; of the '
                       'tuned model those of the last step are taken')

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        check_weights(self.weights, 'weights')
        if not (self.reference and self.tuned and self.out):
            raise ValueError('expected three files: pass REFERENCE TUNED OUT --w=1')
        for source in (self.reference, self.tuned, self.vae_ckpt):
            if source and Path(self.out).resolve() == Path(source).resolve():
                raise ValueError(f'expected a file of its own for the result, got {self.out!r}, which would '
                                 'be overwritten: pass another name as OUT')


# ---------------------------------------------------------------------------------------------- weights
@torch.no_grad()
def extrapolated(reference: torch.Tensor, tuned: torch.Tensor, w: float) -> torch.Tensor:
    """reference + w (reference - tuned) in float32, in the published order of operations.

    0 and -1 give either one to the last bit, which that sum may miss by its rounding.
    """
    reference = reference.float()
    tuned = tuned.to(reference)
    if w == 0:
        return reference
    if w == -1:
        return tuned
    return reference + w * (reference - tuned)


@torch.no_grad()
def extrapolate(model: ARModel, reference: Contents, tuned: Contents, w: float) -> None:
    """Extrapolate the weights of a generator in place. Buffers, such as masks, stay as they are.

    Args:
        model: what `pipeline.build` makes of the reference.
        reference: what its files hold.
        tuned: what those of the tuned model hold, see `read_tuned`.
        w: see `extrapolated`.
    Raises:
        ValueError: the two are no trainings of one model.
    """
    check_alike(model, reference, tuned)
    for name, parameter in model.named_parameters():
        parameter.copy_(extrapolated(parameter, tuned.generator.state[name], w))


def read_tuned(source: str, tokenizer: str) -> Contents:
    """What the file of a tuned model holds, with the weights of its last step.

    An average over so few steps would lie nearer to the reference, which makes w smaller and says nothing.

    Args:
        tokenizer: file of its tokenizer; empty takes the one inside.
    Raises:
        ValueError: the file cannot be read, or holds no generator.
    """
    tuned = read(source, tokenizer=tokenizer or None, weights='raw')
    if tuned.generator is None:
        raise ValueError(f'{source!r} holds a tokenizer: pass a checkpoint of the tuned generator')
    return tuned


def check_alike(model: ARModel, reference: Contents, tuned: Contents) -> None:
    """Make sure that two generators differ in the values of their weights alone.

    Args:
        model: what `pipeline.build` makes of the reference.
    Raises:
        ValueError: they are of other families or sizes, or know other classes or another tokenizer.
    """
    ours = reference.generator
    theirs = tuned.generator
    if theirs.family != ours.family:
        raise ValueError(f'{theirs.source!r} holds a model of the family {theirs.family}, {ours.source!r} '
                         f'one of {ours.family}: pass two trainings of one model')

    # What the shapes say of both tells more than a list of tensors that do not fit.
    our_kwargs = described(model, ours)
    their_kwargs = described(model, theirs)
    differing = [f'{name}={their_kwargs[name]} (there {value})' for name, value in our_kwargs.items()
                 if their_kwargs.get(name, value) != value]
    if differing:
        raise ValueError(f'{theirs.source!r} differs from {ours.source!r} in {", ".join(differing)}: pass '
                         'two trainings of one model')
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    known = {*ours.state, *model.state_dict()}
    odd = [name for name, shape in shapes.items()
           if name not in theirs.state or theirs.state[name].shape != shape]
    odd += [name for name in theirs.state if name not in known]
    if odd:
        raise ValueError(f'{theirs.source!r} differs from {ours.source!r} in the weight {odd[0]} ({len(odd)} '
                         'in all), which one of them lacks or has in another shape: pass two trainings of '
                         'one model')

    # Rows of the class embedding and of the codebook must mean the same.
    if reference.classes and tuned.classes and reference.classes != tuned.classes:
        raise ValueError(f'{theirs.source!r} was trained on other classes than {ours.source!r}, or on the '
                         f'same in another order (it has {", ".join(tuned.classes[:3])}, ...; there '
                         f'{", ".join(reference.classes[:3])}, ...): tune on the classes of the reference')
    inside = tuned.tokenizer.state if isinstance(tuned.tokenizer, Part) else {}
    check_same_codes(model, tuned.trained_with or inside, theirs.source, ours.source)


def described(model: ARModel, part: Part) -> dict[str, Any]:
    """What weights and settings of a file tell of the constructor."""
    cls = type(model)
    return read_kwargs(cls, part.state, part.source) | cls.kwargs_from_config(part.config)


# ---------------------------------------------------------------------------------------------- files
def merge(settings: MergeSettings) -> None:
    """Write the extrapolated generator with its tokenizer, and of which files it was made.

    Raises:
        ValueError: a file cannot be used, or the two models do not fit.
        OSError: the disk is full or not writable; what was at `out` before is intact.
    """
    reference = read(settings.reference, tokenizer=settings.vae_ckpt or None, weights=settings.weights)
    if reference.generator is None:
        raise ValueError(f'{settings.reference!r} holds a tokenizer: pass the weights of a generator')
    model = build(reference, 'cpu')
    tuned = read_tuned(settings.tuned, settings.vae_ckpt)
    extrapolate(model, reference, tuned, settings.w)

    made_of = dict(
        w=settings.w,
        reference=Path(settings.reference).name,
        reference_sha256=reference.digests['ckpt'],
        reference_weights=reference.weights,
        tuned=Path(settings.tuned).name,
        tuned_sha256=tuned.digests['ckpt'],
    )
    trainer = dict(
        var_wo_ddp=model.state_dict(),
        config=model.config_state(1.),
        vae_local=model.tokenizer.state_dict(),
        vae_config=model.tokenizer.config_state(1.),
    )
    args = reference.training.get('settings', {}) | dict(model=reference.generator.family)
    save_file(dict(trainer=trainer, classes=list(reference.classes), args=args, neon=made_of,
                   git_commit=git_commit(), versions=versions()), settings.out)
    logger.info('%s: %g times the way from %s to %s, backwards from the first', settings.out, settings.w,
                settings.reference, settings.tuned)


def main() -> None:
    """Merge what the command line names."""
    settings = parse_settings(MergeSettings, sys.argv[1:], 'merge', __doc__.splitlines()[0])
    setup_logging(None, is_master=True)
    merge(settings)


if __name__ == '__main__':
    with one_line_errors('merge'):
        main()
