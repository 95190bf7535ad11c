"""What to run: the settings of every training and sampling job, by family, and the command line.

A config is a frozen dataclass of settings. Field names are English; the published flag, where there is one,
is given beside each field and parses as well (`--tblr` and `--base_lr` are the same).
Only the standard library and `utils.machine` are needed here, and PyYAML for `--config`.
"""

import argparse
from typing import Any

from configs import flexvar, flowar, npp, tokenizers, var
from configs.flexvar import FlexVARConfig
from configs.flowar import FlowARConfig
from configs.npp import NPPConfig
from configs.options import OneLineParser, make_parser, read_config
from configs.sampling import SampleConfig
from configs.tokenizers import TokenizerConfig
from configs.training import GeneratorConfig, TrainConfig
from configs.var import VARConfig

__all__ = [
    'CONFIGS',
    'PRESETS',
    'SAMPLE_CONFIGS',
    'SAMPLE_PRESETS',
    'FlexVARConfig',
    'FlowARConfig',
    'GeneratorConfig',
    'NPPConfig',
    'SampleConfig',
    'TokenizerConfig',
    'TrainConfig',
    'VARConfig',
    'parse_sampling',
    'parse_training',
]

# what --model is in published commands: our model, and the settings that the name stands for
PUBLISHED_NAMES = {f'flowar_{size}': ('flowar', dict(size=size)) for size in ('small', 'large', 'huge')}

FAMILIES = dict(var=var, flexvar=flexvar, flowar=flowar, npp=npp)  # of generators, a module each
CONFIGS: dict[str, type[TrainConfig]] = {
    **{name: family.TRAINING for name, family in FAMILIES.items()},
    **tokenizers.CONFIGS,
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    **{name: family.PRESETS for name, family in FAMILIES.items()},
    **tokenizers.PRESETS,
}
SAMPLE_CONFIGS: dict[str, type[SampleConfig]] = {name: family.SAMPLING for name, family in FAMILIES.items()}
SAMPLE_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    name: family.SAMPLE_PRESETS for name, family in FAMILIES.items()
}


def _parse(argv: list[str], prog: str, classes: dict[str, type], all_presets: dict, what: str) -> Any:
    """The config of a command line: `--model` chooses the class, `--preset` its values, then those of
    `--config` come on top, then all other flags."""
    first = OneLineParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument('--model', choices=[*classes, *PUBLISHED_NAMES])
    first.add_argument('--preset', default='')
    first.add_argument('--config', default='')
    first.add_argument('--local-rank', '--local_rank')  # of old launchers, dropped
    chosen, rest = first.parse_known_args(argv)
    given = {}
    if chosen.config:
        if chosen.preset:
            first.error('--config holds all settings of a run: leave out --preset')
        try:
            given = read_config(chosen.config)
        except ValueError as error:
            first.error(str(error))
    of_file = given.pop('model', '')
    name = chosen.model or of_file or next(iter(classes))
    if name not in (*classes, *PUBLISHED_NAMES):
        first.error(f'{chosen.config!r} names the model {name!r}, expected one of {", ".join(classes)}')
    model, implied = PUBLISHED_NAMES.get(name, (name, {}))
    if of_file and PUBLISHED_NAMES.get(of_file, (of_file,))[0] != model:
        first.error(f'{chosen.config!r} is of the model {of_file!r}, got --model={name}: leave it out')
    for flag in ('preset', 'config'):
        if flag in given:
            first.error(f'{chosen.config!r} holds {flag!r}, which is for the command line: take it out')

    cls = classes[model]
    presets = {'': {}} | all_presets[model]
    names = ', '.join(filter(None, presets)) or 'none'
    parser = make_parser(
        cls,
        prog,
        f'{what} --model is one of: {", ".join(classes)}; --preset of {model} is one of: {names}.',
    )
    # These are taken above, and stand here for --help and for the search of the nearest flag.
    for flag, text in (
        ('--preset', f'settings to begin with, other flags come on top: {names}'),
        ('--config', 'config.yaml of another run, flags come on top'),
    ):
        parser.groups['most used'].add_argument(flag, metavar='NAME', default=argparse.SUPPRESS, help=text)
    parser._option_string_actions['--model'].help = f'one of: {", ".join(classes)} (here: {model})'
    values = parser.parse([f'--{flag}={value}' for flag, value in given.items()], chosen.config)
    flags = {key: value for key, value in implied.items() if hasattr(cls, key)} | parser.parse(rest)
    if chosen.preset not in presets:
        others = [
            f'; pass --model={other} for that one'
            for other in all_presets
            if chosen.preset in all_presets[other]
        ]
        parser.error(
            f'unknown --preset={chosen.preset} of --model={model}: it has {names}' + ''.join(others[:1])
        )
    # Settings may follow from another one, see `configs.options.settings`. A preset and a file have chosen
    # them for their own value of this one, which says nothing about another value.
    values = presets[chosen.preset] | values
    for name, defaults_of in getattr(cls, 'IMPLIED', {}).items():
        value = flags.get(name, values.get(name))
        if value != values.get(name):
            values = values | defaults_of.get(value, {})
    try:
        return cls(**{**values, **flags, 'model': model})
    except ValueError as error:
        parser.error(str(error))


def parse_training(argv: list[str], prog: str = 'train.py') -> TrainConfig:
    """The training config of a command line."""
    return _parse(argv, prog, CONFIGS, PRESETS, 'Train a model.')


def parse_sampling(argv: list[str], prog: str = 'sample.py') -> SampleConfig:
    """The sampling config of a command line."""
    return _parse(argv, prog, SAMPLE_CONFIGS, SAMPLE_PRESETS, 'Sample images from a trained generator.')
