"""The command line: any recipe by preset and flags, and the tables of all recipes and presets.

A recipe is a frozen dataclass of settings. Field names are English; the published flag, where there is one,
is given beside each field and parses as well (`--tblr` and `--base_lr` are the same).
Only the standard library is needed here.
"""
import argparse
import dataclasses
import difflib
import re
import shlex
import sys
import typing
from collections.abc import Callable
from typing import Any

from utils.generator_recipes import (
    GENERATOR_PRESETS,
    GENERATOR_RECIPES,
    FlexVARRecipe,
    FlowARRecipe,
    VARRecipe,
)
from utils.recipe import PATCH_NUMS, GeneratorRecipe, Recipe, check_limits, expand_paths, flag_of, ints, opt
from utils.sample_recipes import SAMPLE_PRESETS, SAMPLE_RECIPES, SampleRecipe
from utils.tokenizer_recipes import TOKENIZER_PRESETS, TOKENIZER_RECIPES

__all__ = ['PATCH_NUMS', 'PRESETS', 'RECIPES', 'SAMPLE_PRESETS', 'SAMPLE_RECIPES', 'FlexVARRecipe',
           'FlowARRecipe', 'GeneratorRecipe', 'Recipe', 'SampleRecipe', 'VARRecipe', 'check_limits',
           'expand_paths', 'flag_of', 'ints', 'make_parser', 'opt', 'parse_flags', 'parse_recipe',
           'parse_sample_recipe']


# what --model is in published commands: our model, and the settings that the name stands for
PUBLISHED_NAMES = {f'flowar_{size}': ('flowar', dict(size=size)) for size in ('small', 'large', 'huge')}
RECIPES: dict[str, type[Recipe]] = GENERATOR_RECIPES | TOKENIZER_RECIPES
PRESETS: dict[str, dict[str, dict[str, Any]]] = GENERATOR_PRESETS | TOKENIZER_PRESETS


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
    hints, published = typing.get_type_hints(cls), {flag for f in dataclasses.fields(cls)
                                                  for flag in f.metadata['flag'].split()}
    for f in dataclasses.fields(cls):
        kind = next(t for t in (typing.get_args(hints[f.name]) or (hints[f.name],)) if t is not type(None))
        name = f.name if f.name not in published else ''  # one field's flag may be another one's name
        spellings = [f'--{s}' for s in dict.fromkeys([*f.metadata['flag'].split(), name]) if s]
        help_text = f.metadata['help'].replace('%', '%%') + f' (default: {f.default})'
        if f.metadata['positional']:
            parser.add_argument(f.name, nargs='?', default=argparse.SUPPRESS, help=f.metadata['help'],
                                metavar=f.name.upper())
        elif kind is bool:
            parser.add_argument(*spellings, dest=f.name, type=_boolean, nargs='?', const=True,
                                default=argparse.SUPPRESS, help=help_text, metavar='BOOL')
        else:
            words = f.metadata['words']
            alone = dict(nargs='?', const=words['']) if '' in words else {}
            parser.add_argument(*spellings, dest=f.name, type=_with_words(kind, words), help=help_text,
                                default=argparse.SUPPRESS, metavar=kind.__name__.upper(), **alone)
    parser.ignored = getattr(cls, 'IGNORED', {})
    for name in parser.ignored:
        parser.add_argument(f'--{name}', nargs='?', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _with_words(kind: type, words: dict[str, Any]) -> Callable[[str], Any]:
    """`kind`, which understands these words, too."""
    def read(text: str) -> Any:
        return words[text] if text in words else kind(text)
    read.__name__ = kind.__name__  # argparse names it in its errors
    return read


def _with_underscores(arg: str) -> str:
    """An argument whose flag, if it begins with one, is spelt with underscores; its value stays as it is."""
    return re.sub(r'^--[\w-]+', lambda flag: '--' + flag[0][2:].replace('-', '_'), arg)


class _OneLineParser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2; an unknown flag names the nearest one."""

    ignored: dict[str, str] = {}  # flags that are accepted with a warning, and why they have no effect

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f'{self.prog}: {message}\n')

    def parse(self, argv: list[str]) -> dict[str, Any]:
        """The given flags by field name."""
        underscored = [_with_underscores(arg) for arg in argv]
        as_typed = dict(zip(underscored, argv, strict=True))  # for the message about an unknown flag
        values, unknown = self.parse_known_args(underscored)
        if unknown:
            flag = unknown[0].split('=')[0]
            near = difflib.get_close_matches(flag, list(self._option_string_actions), n=1, cutoff=0.)
            self.error(f'unknown argument {as_typed[unknown[0]]!r}: the nearest flag is {near[0]}; --help '
                       'lists all')
        for name in sorted(self.ignored.keys() & vars(values).keys()):
            self._print_message(f'{self.prog}: --{name} is ignored: {self.ignored[name]}\n', sys.stderr)
            delattr(values, name)
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
    first.add_argument('--model', default=next(iter(recipes)), choices=[*recipes, *PUBLISHED_NAMES])
    first.add_argument('--preset', default='')
    first.add_argument('--local-rank', '--local_rank')  # of old launchers, dropped
    chosen, rest = first.parse_known_args(argv)
    chosen.model, implied = PUBLISHED_NAMES.get(chosen.model, (chosen.model, {}))
    cls, presets = recipes[chosen.model], {'': {}} | all_presets[chosen.model]
    names = ', '.join(filter(None, presets)) or 'none'
    parser = make_parser(cls, prog, f'{what} --model is one of: {", ".join(recipes)}; '
                                    f'--preset of {chosen.model} is one of: {names}.')
    # both are taken above, and stand here for --help and for the search of the nearest flag
    parser.add_argument('--preset', metavar='NAME', default=argparse.SUPPRESS,
                        help=f'settings to begin with, other flags come on top: {names}')
    parser._option_string_actions['--model'].help = f'one of: {", ".join(recipes)} (here: {chosen.model})'
    values = {name: value for name, value in implied.items() if hasattr(cls, name)} | parser.parse(rest)
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
    """The training recipe of a command line."""
    return _parse(argv, prog, RECIPES, PRESETS, 'Train a model.')


def parse_sample_recipe(argv: list[str], prog: str = 'sample.py') -> SampleRecipe:
    """The sampling recipe of a command line."""
    return _parse(argv, prog, SAMPLE_RECIPES, SAMPLE_PRESETS, 'Sample images from a trained generator.')
