"""What to run: the settings of every training and sampling job, by family, and the command line.

A recipe is a frozen dataclass of settings. Field names are English; the published flag, where there is one,
is given beside each field and parses as well (`--tblr` and `--base_lr` are the same).
Only the standard library and `utils.machine` are needed here.
"""

import argparse
from typing import Any

from configs import flexvar, flowar, npp, tokenizers, var
from configs.flexvar import FlexVARRecipe, FlexVARSampleRecipe
from configs.flowar import FlowARRecipe, FlowARSampleRecipe
from configs.npp import NPPRecipe, NPPSampleRecipe
from configs.options import OneLineParser, make_parser
from configs.sampling import SampleRecipe
from configs.tokenizers import TokenizerRecipe
from configs.training import GeneratorRecipe, Recipe
from configs.var import VARRecipe, VARSampleRecipe

__all__ = [
    'PRESETS',
    'RECIPES',
    'SAMPLE_PRESETS',
    'SAMPLE_RECIPES',
    'FlexVARRecipe',
    'FlowARRecipe',
    'GeneratorRecipe',
    'NPPRecipe',
    'Recipe',
    'SampleRecipe',
    'TokenizerRecipe',
    'VARRecipe',
    'parse_recipe',
    'parse_sample_recipe',
]

# what --model is in published commands: our model, and the settings that the name stands for
PUBLISHED_NAMES = {f'flowar_{size}': ('flowar', dict(size=size)) for size in ('small', 'large', 'huge')}

RECIPES: dict[str, type[Recipe]] = {
    'var': VARRecipe,
    'flexvar': FlexVARRecipe,
    'flowar': FlowARRecipe,
    'npp': NPPRecipe,
    **tokenizers.RECIPES,
}
SAMPLE_RECIPES: dict[str, type[SampleRecipe]] = {
    'var': VARSampleRecipe,
    'flexvar': FlexVARSampleRecipe,
    'flowar': FlowARSampleRecipe,
    'npp': NPPSampleRecipe,
}
FAMILIES = dict(var=var, flexvar=flexvar, flowar=flowar, npp=npp)
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    **{name: family.PRESETS for name, family in FAMILIES.items()},
    **tokenizers.PRESETS,
}
SAMPLE_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    name: family.SAMPLE_PRESETS for name, family in FAMILIES.items()
}


def _parse(argv: list[str], prog: str, recipes: dict[str, type], all_presets: dict, what: str) -> Any:
    """The recipe of a command line: `--model` chooses the class, `--preset` its values, flags come on top."""
    first = OneLineParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument('--model', default=next(iter(recipes)), choices=[*recipes, *PUBLISHED_NAMES])
    first.add_argument('--preset', default='')
    first.add_argument('--local-rank', '--local_rank')  # of old launchers, dropped
    chosen, rest = first.parse_known_args(argv)
    chosen.model, implied = PUBLISHED_NAMES.get(chosen.model, (chosen.model, {}))
    cls, presets = recipes[chosen.model], {'': {}} | all_presets[chosen.model]
    names = ', '.join(filter(None, presets)) or 'none'
    parser = make_parser(
        cls,
        prog,
        f'{what} --model is one of: {", ".join(recipes)}; --preset of {chosen.model} is one of: {names}.',
    )
    # both are taken above, and stand here for --help and for the search of the nearest flag
    parser.groups['most used'].add_argument(
        '--preset',
        metavar='NAME',
        default=argparse.SUPPRESS,
        help=f'settings to begin with, other flags come on top: {names}',
    )
    parser._option_string_actions['--model'].help = f'one of: {", ".join(recipes)} (here: {chosen.model})'
    values = {name: value for name, value in implied.items() if hasattr(cls, name)} | parser.parse(rest)
    if chosen.preset not in presets:
        others = [
            f'; pass --model={model} for that one'
            for model in all_presets
            if chosen.preset in all_presets[model]
        ]
        parser.error(
            f'unknown --preset={chosen.preset} of --model={chosen.model}: it has {names}'
            + ''.join(others[:1])
        )
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
