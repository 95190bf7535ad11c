"""Settings that all sampling jobs share, and sweeps over them."""

import dataclasses
import itertools
import re
import typing
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.options import (
    INF,
    REPO,
    check_values,
    check_weights,
    expand_paths,
    flag_of,
    marked_fields,
    opt,
)
from utils.console import require_weights

LATER = {  # settings that earlier versions did not have -> the one by whose default they are off
    'fixed_batch': 'fixed_batch',
    'compiled': 'compiled',
    'cfg_from': 'cfg_from',
    'cfg_to': 'cfg_to',
    'ssg': 'ssg',
    'ssg_prior': 'ssg',
    'ssg_schedule': 'ssg',
    'neon_from': 'neon_from',
    'neon_w': 'neon_from',
}
WEIGHTS = ('ckpt', 'vae_ckpt', 'neon_from')  # settings that are files, which count by their digests


@dataclass(frozen=True)
class SampleConfig:
    """Settings of a sampling job. All fields but those marked `free` decide the images."""

    model: str = opt('var', 'family of the generator', group='most used')
    ckpt: str = opt(
        '',
        'generator weights: a checkpoint of train.py, a released file, or a published name',
        path=True,
        group='most used',
    )
    vae_ckpt: str = opt(
        '',
        'tokenizer weights; empty takes those inside a checkpoint of train.py',
        path=True,
        group='most used',
    )
    weights: str = opt(
        'ema',
        'ema: averaged weights where the file has them; raw: those of the last step; ema_0.9999: those of '
        'that decay, after the first one of several',
        group='run',
    )
    neon_from: str = opt(
        '',
        'Neon: the generator after a short training on its own samples; the weights go away from it, see '
        '--neon_w',
        path=True,
        group='run',
    )
    neon_w: float = opt(
        1.0,
        'how far the weights go away from --neon_from: 0 leaves those of --ckpt as they are',
        limits=(-1000, 1000),
        group='run',
    )
    source: str = opt(
        '', 'where these settings come from, for the manifest; presets say it', free=True, group='run'
    )
    output: str = opt(
        str(REPO / 'local_output' / 'samples'),
        'folder of the images; the npz lies beside it',
        path=True,
        free=True,
        group='most used',
    )
    num_images: int = opt(
        50_000, 'images, spread evenly over the classes', limits=(1, INF), free=True, group='most used'
    )
    classes: str = opt(
        '',
        'class ids, or names of classes that the checkpoint knows, joined by "_"; empty takes all',
        group='most used',
    )
    labels: str = opt(
        '', 'class of every image: .npy, or .txt with one per line, or random', path=True, group='run'
    )
    seed: int = opt(
        0, 'the noise of image i is a function of (seed, i)', limits=(0, 2**63 - 1), group='most used'
    )
    cfg: float = opt(
        1.5, 'classifier-free guidance in the unit of the paper', limits=(-1000, 1000), group='most used'
    )
    precision: int = opt(0, '0 float32, 1 float16, 2 bfloat16', 'fp16', limits=(0, 2), group='numerics')
    tf32: bool = opt(True, 'allow TF32 products on CUDA', group='numerics')
    batch_size: int = opt(
        64,
        'images per batch; batches are cut by image index',
        'bs',
        limits=(1, INF),
        free=True,
        group='numerics',
    )
    fixed_batch: int = opt(
        0,
        'draw in batches of exactly this many images, whatever --bs and the number of ranks, so that the '
        'npz is the same to the last byte; 0 takes --bs, with which a pixel may change by one level',
        'fixed_bs',
        limits=(0, INF),
        group='numerics',
    )
    compiled: int = opt(
        0,
        'torch.compile: 0 off, 1 reduce-overhead, 2 max-autotune, 3 default; it takes minutes before the '
        'first image',
        'compile',
        words={'': 3},
        limits=(0, 3),
        group='numerics',
    )
    format: str = opt(
        'png',
        'png: keep a PNG file of every image; npz: the packed file alone',
        choices=('png', 'npz'),
        free=True,
        group='run',
    )
    pack: bool = opt(True, 'pack the images into an npz with a manifest', free=True, group='run')
    sheet: bool = opt(
        True, 'leave the first images of each class as one picture, <output>.png', free=True, group='run'
    )
    overwrite: bool = opt(
        False,
        'remove what a job with other settings has left in the output folder, in place of refusing it',
        free=True,
        group='most used',
    )
    shuffle: int = opt(
        0,
        'seed of the order in the npz; -1 packs by image index',
        limits=(-1, 2**32 - 1),
        free=True,
        group='run',
    )
    writers: int = opt(4, 'threads per rank that write images', limits=(1, 256), free=True, group='numerics')
    sweep: str = opt(
        '',
        'settings to try, such as "cfg=1.25,1.5,2.0 top_k=600,900": one job each, scored '
        'into <output>.csv and <output>.png',
        free=True,
        group='sweep',
    )
    ref: str = opt('', 'sweep: reference of the scores, see evaluate.py', path=True, free=True, group='sweep')
    score: str = opt(
        '', 'sweep: further flags of evaluate.py, such as "--metrics=fid,is"', free=True, group='sweep'
    )
    keep: bool = opt(
        True, 'sweep: keep the npz of every setting after it was scored', free=True, group='sweep'
    )

    IGNORED: typing.ClassVar[dict[str, str]] = {}  # published flags that have no effect here, and why
    REFUSED: typing.ClassVar[dict[str, str]] = {}  # flags of other families, and why this one lacks them
    CKPT_HINT: typing.ClassVar[str] = ''  # where such a file is to be had
    CHANGE_NOTHING: typing.ClassVar[tuple[str, ...]] = ()  # settings that change no image: for checks

    def __post_init__(self):
        expand_paths(self)
        if not self.ckpt:
            raise ValueError(f'expected the weights of a generator: pass --ckpt=FILE{self.CKPT_HINT}')
        check_values(self)
        check_weights(self.weights, flag_of(self, 'weights'))
        if not Path(self.output).name:
            raise ValueError(f'--output must name a folder, got {self.output!r}: pass one')
        if re.fullmatch(r'[0-9_]+', self.classes) and not self.class_ids:
            raise ValueError(f'--classes must be class ids joined by "_", such as 0_7, got {self.classes!r}')
        if self.num_images > 1_000_000:
            raise ValueError(
                f'--num_images must be at most 1,000,000 per job, got {self.num_images:,}: '
                'sample several jobs with other seeds'
            )
        if self.neon_w != 1 and not self.neon_from:
            raise ValueError('--neon_w says how far to go away from --neon_from: pass both')
        if self.classes and self.labels:
            raise ValueError('expected --classes or --labels, got both: leave one out')
        if self.format == 'npz' and not self.pack:
            raise ValueError('--format=npz writes the packed file alone: leave out --pack=0')
        if self.sweep:
            if not self.ref:
                raise ValueError('--sweep scores every setting: pass --ref=REFERENCE.npz')
            if not self.pack:
                raise ValueError('--sweep scores packed images: leave out --pack=0')
            for combination in self.combinations():
                self.at(combination)  # checks its values

    @property
    def class_ids(self) -> tuple[int, ...]:
        """Ids of the classes; () where none are given, or names in their place."""
        if not re.fullmatch(r'[0-9]{1,9}(_[0-9]{1,9})*', self.classes):
            return ()
        return tuple(map(int, self.classes.split('_')))

    @property
    def images_per_batch(self) -> int:
        """Images that are drawn at a time."""
        return self.fixed_batch or self.batch_size

    def without(self, names: Collection[str]) -> dict[str, Any]:
        """All settings but these, by name, for the manifest and for files that tell jobs apart.

        Those that earlier versions did not have are absent where they are off, as in the files of these.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        off = {name for name, switch in LATER.items() if vars(self).get(switch) == defaults.get(switch)}
        return {name: value for name, value in vars(self).items() if name not in {*names, *off}}

    def require_files(self) -> None:
        """Make sure that the files of weights are there, where they were given by their paths.

        Raises:
            ValueError: one is not.
        """
        if not self.sweep:  # which may be one over files
            require_weights(self.ckpt)
            require_weights(self.vae_ckpt)
            require_weights(self.neon_from)

    def sample_kwargs(self) -> dict[str, Any]:
        """Arguments of the model's `sample`, beside labels and rng."""
        raise NotImplementedError

    def check_model(self, model: Any) -> None:
        """Make sure that the settings suit the generator.

        Raises:
            ValueError: they do not.
        """

    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of the sweep, the last name changing fastest.

        Settings of Neon come first, so that all others are tried before weights are merged again.

        Raises:
            ValueError: it is no list of settings that decide the images.
        """
        kinds = typing.get_type_hints(type(self))
        by_flag = {flag: f.name for f in dataclasses.fields(self) for flag in f.metadata['flag'].split()}
        free = (*marked_fields(self, 'free'), 'model')
        names = [f.name for f in dataclasses.fields(self) if f.name not in free]
        axes: list[list[tuple[str, Any]]] = []
        for axis in self.sweep.split():
            name, _, values = axis.partition('=')
            name = by_flag.get(name.replace('-', '_'), name.replace('-', '_'))
            if any(name == known for (known, _), *_ in axes):
                raise ValueError(f'--sweep expects every name once, got {name} again: join its values by ","')
            if name not in names:
                raise ValueError(
                    f'--sweep expects name=value,value with a name of {", ".join(names)}, got {axis!r}'
                )
            if kinds[name] is bool:
                raise ValueError(f'--sweep takes numbers and texts, {name} is a switch: sample twice')
            try:
                axes.append([(name, kinds[name](value)) for value in values.split(',')])
            except ValueError:
                raise ValueError(
                    f'--sweep expects values of type {kinds[name].__name__} for {name}, got {values!r}'
                ) from None
        if not axes:
            raise ValueError(f'--sweep expects name=value,value, got {self.sweep!r}: name a setting')
        axes.sort(key=lambda axis: not axis[0][0].startswith('neon_'))
        return [dict(combination) for combination in itertools.product(*axes)]

    def at(self, combination: dict[str, Any]) -> 'SampleConfig':
        """The job of one combination, in a folder of its own inside `output`."""
        name = '_'.join(f'{name}={value}' for name, value in combination.items())
        return dataclasses.replace(
            self,
            **combination,
            sweep='',
            ref='',
            score='',
            output=f'{self.output}/{re.sub(r"[^-+=.,a-zA-Z0-9_]", "-", name)}',
        )


@dataclass(frozen=True)
class PyramidSampleConfig(SampleConfig):
    """Sampling scale by scale from logits, as VAR and FlexVAR do it."""

    cfg_from: int = opt(0, 'scales before this one are not guided; the coarsest is 0', limits=(0, INF))
    cfg_to: int = opt(
        -1,
        'scales after this one are not guided, and cost half; -1 is the finest',
        limits=(-1, INF),
    )
    ssg: float = opt(
        0.0,
        'SSG: logits of a scale move away from those of the scale before it, so many times their distance; '
        '0 is off',
        limits=(0, 1000),
    )
    ssg_prior: str = opt(
        'fused',
        'how SSG enlarges the logits of the scale before: zero_pad keeps their spectrum, bilinear '
        'interpolates, fused has the low frequencies of the one and the high ones of the other',
        choices=('fused', 'zero_pad', 'bilinear'),
    )
    ssg_schedule: str = opt(
        'constant',
        'SSG at every scale but the first, or linear: growing from the first scale to the last',
        choices=('constant', 'linear'),
    )

    def sample_kwargs(self) -> dict[str, Any]:
        names = ('cfg_from', 'cfg_to', 'ssg', 'ssg_prior', 'ssg_schedule')
        return {name: getattr(self, name) for name in names}
