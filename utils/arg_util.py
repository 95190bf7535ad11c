"""Recipes: every setting of a training run, by preset or command line, and all that follows from them.

A recipe is a frozen dataclass. Field names are English; the flag published with VAR, where there is one, is
given beside each field and parses as well (`--tblr` and `--base_lr` are the same).
Only the standard library is needed here.
"""
import argparse
import dataclasses
import difflib
import re
import shlex
import typing
from dataclasses import dataclass
from typing import Any

from utils.recipe import (
    CROPS,
    PATCH_NUMS,
    REPO,
    GeneratorRecipe,
    PyramidRecipe,
    Recipe,
    check_limits,
    flag_of,
    ints,
    opt,
)
from utils.sample_recipes import SAMPLE_PRESETS, SAMPLE_RECIPES, SampleRecipe
from utils.tokenizer_recipes import TOKENIZER_PRESETS, TOKENIZER_RECIPES

__all__ = ['PATCH_NUMS', 'PRESETS', 'RECIPES', 'SAMPLE_PRESETS', 'SAMPLE_RECIPES', 'GeneratorRecipe',
           'Recipe', 'SampleRecipe', 'check_limits', 'flag_of', 'ints', 'make_parser', 'opt', 'parse_flags',
           'parse_recipe', 'parse_sample_recipe']


@dataclass(frozen=True)
class AdaLNRecipe(PyramidRecipe, GeneratorRecipe):
    """What VAR and FlexVAR have in common."""

    depth: int = opt(16, 'transformer blocks; heads = depth, width = 64 * depth')
    shared_aln: bool = opt(False, 'one AdaLN projection for all blocks', 'saln')
    attn_l2_norm: bool = opt(True, 'unit queries and keys with a learnt scale', 'anorm')
    flash: bool = opt(True, 'use flash-attn or xformers where installed and suitable', 'fuse')
    drop_path: float = opt(-1., 'drop path of the last block; negative means 0.1 * depth / 24')
    init_std: float = opt(-1., 'std of the weights; negative means sqrt(1 / (3 width))', 'ini')
    init_head: float = opt(0.02, 'multiplier of the head weights', 'hd')
    init_adaln: float = opt(0.5, 'multiplier of the AdaLN weights', 'aln')
    init_adaln_gamma: float = opt(1e-5, 'multiplier of the AdaLN gamma weights', 'alng')
    label_smooth: float = opt(0., 'label smoothing', 'ls')

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        drop_path = self.drop_path if self.drop_path >= 0 else 0.1 * self.depth / 24
        return dict(depth=self.depth, embed_dim=64 * self.depth, num_heads=self.depth,
                    drop_path_rate=drop_path, shared_aln=self.shared_aln, attn_l2_norm=self.attn_l2_norm,
                    patch_nums=self.patch_nums, flash_if_available=self.flash, label_smooth=self.label_smooth)

    def init_kwargs(self) -> dict[str, Any]:
        return dict(init_adaln=self.init_adaln, init_adaln_gamma=self.init_adaln_gamma,
                    init_head=self.init_head, init_std=self.init_std)

    def derived(self, world_size: int) -> dict[str, Any]:
        kwargs, std = self.model_kwargs(1, 1), (1 / (3 * 64 * self.depth)) ** 0.5
        return super().derived(world_size) | dict(
            drop_path_rate=kwargs['drop_path_rate'], init_std=self.init_std if self.init_std >= 0 else std)


@dataclass(frozen=True)
class VARRecipe(AdaLNRecipe):
    """VAR on the codes of a frozen VQVAE."""

    vae_ckpt: str = opt('vae_ch160v4096z32.pth', 'tokenizer weights: a file of any kind, or a published name')
    progressive_until: float = opt(0., 'progressive training until this share of the run; 0 is off', 'pg')
    progressive_first: int = opt(4, 'first progressive stage (scale index)', 'pg0')
    progressive_warmup: float = opt(0., 'warm-up epochs per progressive stage; 0 means epochs / 300', 'pgwp')

    def __post_init__(self):
        super().__post_init__()
        last = len(self.patch_nums) - 1
        if self.progressive_until and not 0 <= self.progressive_first <= last:
            raise ValueError(f'--pg0 must be a scale index in 0..{last}, got {self.progressive_first}')

    @property
    def lr_schedule(self) -> str:
        """Progressive training brings its own schedule, as published."""
        return f'lin{self.progressive_until:g}' if self.progressive_until > 0 else self.schedule

    @property
    def progressive_warmup_epochs(self) -> float:
        return self.progressive_warmup or self.epochs / 300

    def _model_tag(self) -> str:
        return f'VARd{self.depth}__pn{self.pn_list}'

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        progressive = dict(total=total_steps, warmup=self.warmup_epochs * steps_per_epoch,
                           until=self.progressive_until, first_stage=self.progressive_first,
                           stage_warmup=self.progressive_warmup_epochs * steps_per_epoch)
        return super().model_kwargs(total_steps, steps_per_epoch) | dict(
            progressive=progressive if self.progressive_until > 0 else None)

    def tokenizer_kwargs(self) -> dict[str, Any]:
        return dict(v_patch_nums=self.patch_nums)

    def derived(self, world_size: int) -> dict[str, Any]:
        return super().derived(world_size) | dict(pgwp=self.progressive_warmup_epochs)


@dataclass(frozen=True)
class FlexVARRecipe(AdaLNRecipe):
    """FlexVAR on the code maps of a frozen FlexVAE."""

    model: str = opt('flexvar', 'what is trained')
    vae_ckpt: str = opt('pretrained/FlexVAE.pth', 'tokenizer weights: a file of any kind')
    depth: int = opt(20, 'transformer blocks; heads = depth, width = 64 * depth')
    pn: str = opt(PATCH_NUMS['256'], 'sides of the code maps of validation, joined by _ or -; training draws '
                                     'others up to the last one; 256, 512, 1024 are the published lists')
    final_reso: int = opt(0, 'pixels per side of the training images; 0 means where --pn ends; larger ones '
                             'give the same sides, averaged')
    keep_last: bool = opt(False, 'end every drawn pyramid at the last side of --pn; published: two thirds do')
    crop: str = opt('adm', CROPS)
    mid_reso: float = opt(1 / 0.88, 'crop adm: the shorter side is drawn from 1 to this multiple of the crop')
    hflip: bool = opt(True, 'random horizontal flip')
    output_dir: str = opt(str(REPO / 'local_output/flexvar'), 'logs and checkpoints', 'local_out_dir_path')

    def __post_init__(self):
        super().__post_init__()
        sides = list(self.patch_nums)
        if sides[0] != 1 or len(sides) < 2 or sides != sorted(set(sides)):
            raise ValueError(f'--pn of FlexVAR must rise from 1, such as 1_2_4, got {self.pn}')
        if self.image_size < super().image_size or self.image_size % self.patch_size:
            raise ValueError(
                f'--final_reso must be a multiple of the stride {self.patch_size} and at least where --pn '
                f'ends, {self.patch_nums[-1]} codes or {super().image_size} pixels, got {self.final_reso}')

    @property
    def image_size(self) -> int:
        return self.final_reso or super().image_size

    def _model_tag(self) -> str:
        return f'FlexVARd{self.depth}__pn{self.pn_list}'

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        return super().model_kwargs(total_steps, steps_per_epoch) | dict(keep_last=self.keep_last)

    def derived(self, world_size: int) -> dict[str, Any]:
        return super().derived(world_size) | dict(final_reso=self.image_size)


RECIPES: dict[str, type[Recipe]] = {'var': VARRecipe, 'flexvar': FlexVARRecipe} | TOKENIZER_RECIPES

# Published runs by model (READMEs of VAR and FlexVAR; a script of the latter says depth 20 for d16 by
# mistake); `recipes/*.sh` holds the same as commands.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {'var': {
    'var_d16': dict(depth=16, batch_size=768, epochs=200, precision=1, init_adaln_gamma=1e-3, lr_end=0.1),
    'var_d20': dict(depth=20, batch_size=768, epochs=250, precision=1, init_adaln_gamma=1e-3, lr_end=0.1),
    'var_d24': dict(depth=24, batch_size=768, epochs=350, base_lr=8e-5, precision=1, init_adaln_gamma=1e-4,
                    lr_end=0.01),
    'var_d30': dict(depth=30, batch_size=1024, epochs=350, base_lr=8e-5, precision=1, init_adaln_gamma=1e-5,
                    lr_end=0.01, weight_decay_end=0.08),
    'var_d36_512': dict(depth=36, shared_aln=True, pn='512', batch_size=768, epochs=350, base_lr=8e-5,
                        precision=1, init_adaln_gamma=5e-6, lr_end=0.01, weight_decay_end=0.08),
}, 'flexvar': {
    'flexvar_d16': dict(depth=16, batch_size=768, epochs=180, precision=1, init_adaln_gamma=1e-3,
                        lr_end=0.1),
    'flexvar_d20': dict(depth=20, batch_size=768, epochs=250, precision=1, init_adaln_gamma=1e-3,
                        lr_end=0.1),
    'flexvar_d24': dict(depth=24, batch_size=768, epochs=350, base_lr=8e-5, precision=1,
                        init_adaln_gamma=1e-4, lr_end=0.01),
}} | TOKENIZER_PRESETS


# ---------------------------------------------------------------------------------------------- command line
def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered and ('true'.startswith(lowered) or lowered == '1'):
        return True
    if lowered and ('false'.startswith(lowered) or lowered == '0'):
        return False
    raise argparse.ArgumentTypeError(f'expected true, false, 1 or 0, got {text!r}')


def make_parser(cls: type, prog: str, description: str) -> argparse.ArgumentParser:
    """A parser: one flag per field of a dataclass of `opt` fields, a second spelling where published.

    Flags are spelt with hyphens or underscores alike.
    """
    parser = _OneLineParser(prog=prog, description=description, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = next(t for t in (typing.get_args(hints[f.name]) or (hints[f.name],)) if t is not type(None))
        spellings = [f'--{s}' for s in (f.metadata['flag'], f.name) if s]
        help_text = f.metadata['help'].replace('%', '%%') + f' (default: {f.default})'
        if f.metadata['positional']:
            parser.add_argument(f.name, nargs='?', default=argparse.SUPPRESS, help=f.metadata['help'],
                                metavar=f.name.upper())
        elif kind is bool:
            parser.add_argument(*spellings, dest=f.name, type=_boolean, nargs='?', const=True,
                                default=argparse.SUPPRESS, help=help_text, metavar='BOOL')
        else:
            parser.add_argument(*spellings, dest=f.name, type=kind, default=argparse.SUPPRESS, help=help_text,
                                metavar=kind.__name__.upper())
    return parser


class _OneLineParser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2; an unknown flag names the nearest one."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f'{self.prog}: {message}\n')

    def parse(self, argv: list[str]) -> dict[str, Any]:
        """The given flags by field name."""
        argv = [re.sub(r'^--[\w-]+', lambda flag: '--' + flag[0][2:].replace('-', '_'), arg) for arg in argv]
        values, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split('=')[0]
            near = difflib.get_close_matches(flag, list(self._option_string_actions), n=1, cutoff=0.)
            self.error(f'unknown argument {unknown[0]!r}: the nearest flag is {near[0]}; --help lists all')
        return vars(values)


def parse_flags(cls: type, name: str, text: str) -> dict[str, Any]:
    """Flags of a command that are themselves the value of the flag `name`, by field.

    Raises:
        ValueError: they are no flags of `cls`.
    """
    try:
        argv = shlex.split(text)
    except ValueError as error:
        raise ValueError(f'expected flags as the value of {name}, got {text!r}: {error}') from None
    if {'-h', '--help'} & set(argv):
        raise ValueError(f'expected flags as the value of {name}, got {text!r}: ask the command for help')
    return make_parser(cls, name, '').parse(argv)


def _parse(argv: list[str], prog: str, recipes: dict[str, type], all_presets: dict, what: str) -> Any:
    """The recipe of a command line: `--model` chooses the class, `--preset` its values, flags come on top."""
    first = _OneLineParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument('--model', default=next(iter(recipes)), choices=list(recipes))
    first.add_argument('--preset', default='')
    chosen, rest = first.parse_known_args(argv)
    cls, presets = recipes[chosen.model], {'': {}} | all_presets[chosen.model]
    names = ', '.join(filter(None, presets)) or 'none'
    parser = make_parser(cls, prog, f'{what} --model is one of: {", ".join(recipes)}; '
                                    f'--preset of {chosen.model} is one of: {names}.')
    values = parser.parse(rest)
    if chosen.preset not in presets:
        others = [f'; pass --model={model} for that one' for model in all_presets
                  if chosen.preset in all_presets[model]]
        parser.error(f'unknown --preset={chosen.preset} of --model={chosen.model}: it has {names}'
                     + ''.join(others[:1]))
    try:
        return cls(**{**presets[chosen.preset], **values, 'model': chosen.model})
    except ValueError as error:
        parser.error(str(error))


def parse_recipe(argv: list[str], prog: str = 'train.py') -> Recipe:
    """The training recipe of a command line; the `--local-rank` flag of old launchers is dropped."""
    argv = [arg for arg in argv if not re.match(r'--local[-_]rank(=|$)', arg)]
    return _parse(argv, prog, RECIPES, PRESETS, 'Train a model.')


def parse_sample_recipe(argv: list[str], prog: str = 'sample.py') -> SampleRecipe:
    """The sampling recipe of a command line."""
    return _parse(argv, prog, SAMPLE_RECIPES, SAMPLE_PRESETS, 'Sample images from a trained generator.')
