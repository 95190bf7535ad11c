"""One setting: its default, help, flags and limits; and how settings are read from a command line.

Only the standard library is needed here, and PyYAML for `--config`.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import json
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent

INF = float('inf')
COMPILE_MODES = {1: 'reduce-overhead', 2: 'max-autotune', 3: 'default'}  # of `torch.compile`
GROUPS = (  # headings of `--help`, in this order
    'most used',
    'data',
    'model',
    'codebook',
    'reconstruction',
    'discriminator',
    'optimisation',
    'objective',
    'run',
    'sweep',
    'numerics',
)


def opt(
    default: Any,
    text: str,
    flag: str = '',
    positional: bool = False,
    words: dict[str, Any] | None = None,
    path: bool = False,
    several: bool = False,
    limits: tuple[float, float] | None = None,
    choices: tuple[Any, ...] | None = None,
    free: bool = False,
    per_node: bool = False,
    group: str = '',
) -> Any:
    """A field of a dataclass that is also a flag of a command line.

    Args:
        text: for `--help`.
        flag: its published flags, joined by spaces, where they differ from the field's name.
        positional: the command line takes it by its place, without a flag.
        words: values by name, such as {'none': 0}; the name '' stands for the flag without a value.
        path: the value is a file or folder, in which `expand_paths` replaces `~`.
        several: of a path: there may be several, joined by commas; by their place, as words of their own.
        limits: smallest and largest sensible value, also of each number of a list; `check_values` compares.
        choices: all values that are allowed; `check_values` compares.
        free: it may differ between two starts of one job.
        per_node: it may differ between the nodes of one job, as it says where things lie on each.
        group: heading in `--help`, one of `GROUPS`; a field that replaces that of a base class keeps it.
    """
    return field(
        default=default,
        metadata=dict(
            help=text,
            flag=flag,
            positional=positional,
            words=words or {},
            path=path,
            several=several,
            limits=limits,
            choices=choices,
            free=free,
            per_node=per_node,
            group=group,
        ),
    )


class Other(typing.NamedTuple):
    """What `settings` changes of an inherited field."""

    default: Any
    changes: dict[str, Any]


def other(default: Any, **changes: Any) -> Other:
    """Another default for an inherited field, and other arguments of its `opt`, for `settings`."""
    return Other(default, changes)


def settings(**defaults: Any) -> Callable[[type], type]:
    """Make a class a frozen dataclass of `opt` fields, with other defaults for those that it inherits.

    `@settings(epochs=400, clip=other(3.0, flag='grad_clip'))` changes the default of two fields, and the
    published flag of one; all else that is known about them stays as the base class says. Where the class has
    a table IMPLIED, the default of a field may also follow from the value of another one.
    """

    def decorate(cls: type) -> type:
        for name, default in defaults.items():
            inherited = cls.__dataclass_fields__[name]
            value, changes = default if isinstance(default, Other) else (default, {})
            if 'text' in changes:
                changes = {**changes, 'help': changes['text']}
                del changes['text']
            unknown = changes.keys() - inherited.metadata.keys()
            assert not unknown, f'{sorted(unknown)} of {name} are no arguments of opt()'
            cls.__annotations__[name] = inherited.type
            setattr(cls, name, field(default=value, metadata={**inherited.metadata, **changes}))
        return _with_implied(dataclasses.dataclass(frozen=True)(cls))

    return decorate


def _with_implied(cls: type) -> type:
    """The class, whose constructor takes what it is not given from the table IMPLIED, where that has it."""
    implied = getattr(cls, 'IMPLIED', {})
    if not implied:
        return cls
    plain_init = cls.__init__

    @functools.wraps(plain_init)
    def __init__(self, *args: Any, **given: Any) -> None:
        for name, defaults_of in implied.items():
            value = given.get(name, getattr(cls, name))
            given = defaults_of.get(value, {}) | given
        plain_init(self, *args, **given)

    cls.__init__ = __init__
    return cls


def marked_fields(settings: Any, mark: str) -> tuple[str, ...]:
    """Names of the fields with a mark of `opt`, such as 'free'."""
    return tuple(f.name for f in dataclasses.fields(settings) if f.metadata[mark])


def expand_paths(settings: Any) -> None:
    """Replace `~` and `~user` by home folders in every path among the settings.

    A shell does this only where the path begins a word: `--output=~/x` reaches a program as it was typed,
    which would then make a folder that is named `~`. Call it first in `__post_init__`, so that flags, presets
    and settings from Python are treated alike.
    """
    for f in dataclasses.fields(settings):
        text = getattr(settings, f.name)
        if not (f.metadata['path'] and isinstance(text, str) and '~' in text):
            continue
        parts = text.split(',') if f.metadata['several'] else [text]
        object.__setattr__(settings, f.name, ','.join(os.path.expanduser(part) for part in parts))


def ints(text: str) -> tuple[int, ...]:
    """'1_2_3' or '1-2-3' -> (1, 2, 3).

    Raises:
        ValueError: not a list of positive integers.
    """
    parts = text.replace('-', '_').split('_')
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f'expected positive integers joined by "_", such as 1_2_3, got {text!r}')
    return tuple(map(int, parts))


def numbers_of(value: float | str) -> tuple[float, ...]:
    """'0.05,0.1' -> (0.05, 0.1); a single number is a list of one, '' an empty one.

    Raises:
        ValueError: not a list of numbers.
    """
    if value == '':
        return ()
    if not isinstance(value, str):
        return (value,)
    try:
        return tuple(map(float, value.split(',')))
    except ValueError:
        raise ValueError(f'expected numbers joined by ",", such as 0.05,0.1, got {value!r}') from None


def number_or_list(text: str) -> float | str:
    """A number where the text is one; a list of numbers stays as it was written, for `numbers_of`."""
    try:
        return float(text)
    except ValueError:
        return text


def check_values(settings: Any) -> None:
    """Compare every setting with its limits and choices.

    Raises:
        ValueError: one is another value than allowed.
    """
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        limits = f.metadata['limits']
        choices = f.metadata['choices']
        if limits and value is not None:
            low, high = limits
            bounds = f'at least {low:g}' if high == INF else f'in [{low:g}, {high:g}]'
            for number in _numbers_of_field(settings, f.name):
                if low <= number == INF:
                    raise ValueError(f'--{flag_of(settings, f.name)} must be finite, got {number:g}')
                if not low <= number <= high:
                    raise ValueError(f'--{flag_of(settings, f.name)} must be {bounds}, got {number:g}')
        if choices and value not in choices:
            names = [str(choice) for choice in choices if choice != '']
            allowed = ' or '.join(names) if len(names) < 3 else f'one of {", ".join(names)}'
            raise ValueError(f'--{flag_of(settings, f.name)} must be {allowed}, got {value!r}')


def check_weights(name: str, flag: str) -> None:
    """Make sure that this names weights of a checkpoint: ema, raw, or one of several averages.

    Raises:
        ValueError: it does not.
    """
    if not re.fullmatch(r'ema|raw|ema_\d[-.\de]*', name):
        raise ValueError(
            f'--{flag} must be ema or raw, or name one of several averages by its decay, such as ema_0.9999, '
            f'got {name!r}'
        )


def _numbers_of_field(settings: Any, name: str) -> tuple[float, ...]:
    """The numbers of a field, see `numbers_of`; an error names its flag."""
    try:
        return numbers_of(getattr(settings, name))
    except ValueError as error:
        raise ValueError(f'--{flag_of(settings, name)}: {error}') from None


def config_text(settings: Any, title: str, **drawn: Any) -> str:
    """All settings under their flags as YAML, which `read_config` reads.

    Args:
        title: the comment in the first line.
        drawn: values that the run has drawn where none was given, by field.
    """
    values = {
        flag_of(settings, name): value
        for name, value in {**vars(settings), **drawn}.items()
        if name not in settings.DERIVED
    }
    lines = [f'{flag}: {json.dumps(value)}' for flag, value in values.items()]
    return '\n'.join([f'# {ascii(title)[1:-1]}', *lines, ''])


def read_config(path: str) -> dict[str, str]:
    """Settings by flag in a file of YAML, as texts, which the command line understands as it does flags.

    Those without a value, or with null, are left out.

    Raises:
        ValueError: it cannot be read, or holds anything but names with plain values.
    """
    import yaml

    try:
        with open(os.path.expanduser(path), encoding='utf-8') as file:
            # The base loader keeps texts as they stand: 1_2_3 would be the number 123 to YAML.
            content = yaml.load(file, yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = ' '.join(str(getattr(error, 'strerror', None) or error).split())[:200]
        raise ValueError(
            f'expected settings in {path!r}, cannot read it ({reason}): pass the config.yaml of a run'
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f'expected "name: value" in the lines of {path!r}, got {type(content).__name__}: '
            'pass the config.yaml of a run'
        )
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise ValueError(
                f'expected a number or a text as {name!r} in {path!r}, got {value!r}: write "name: value"'
            )
    given = {name: value for name, value in content.items() if value not in ('null', '~')}
    return {name.replace('-', '_'): _with_pairs_joined(value) for name, value in given.items()}


def _with_pairs_joined(text: str) -> str:
    """A text with its surrogate pairs joined: JSON writes some characters as two, and YAML keeps both."""
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'surrogatepass')


def flag_of(config: Any, name: str) -> str:
    """The published flag of a field, or its own name."""
    by_name = {f.name: f.metadata['flag'] or f.name for f in dataclasses.fields(config)}
    return by_name[name].split()[0]


def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered and ('true'.startswith(lowered) or lowered == '1'):
        return True
    if lowered and ('false'.startswith(lowered) or lowered == '0'):
        return False
    raise argparse.ArgumentTypeError(f'expected true, false, 1 or 0, got {text!r}')


def make_parser(cls: type, prog: str, description: str) -> 'OneLineParser':
    """A parser: one flag per field of a dataclass of `opt` fields, a second spelling where published.

    Flags are spelt with hyphens or underscores alike.
    """
    has_places = any(f.metadata['positional'] for f in dataclasses.fields(cls))
    usage = None if has_places else f'{prog} [--flag=value ...]'
    parser = OneLineParser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    groups = {_group_of(cls, f.name) for f in dataclasses.fields(cls)}
    if groups == {'model'}:  # a small command without headings
        parser.groups = {'model': parser.add_argument_group('settings')}
    else:
        parser.groups = {name: parser.add_argument_group(name) for name in GROUPS if name in groups}
    hints = typing.get_type_hints(cls)
    published = {flag for f in dataclasses.fields(cls) for flag in f.metadata['flag'].split()}
    for f in dataclasses.fields(cls):
        group = parser.groups[_group_of(cls, f.name)]
        if f.metadata['positional']:
            several = dict(nargs='*', action=_Joined) if f.metadata['several'] else dict(nargs='?')
            group.add_argument(
                f.name, default=argparse.SUPPRESS, help=f.metadata['help'], metavar=f.name.upper(), **several
            )
            continue
        # Where the flag of one field is the name of another, only the former answers to it.
        name = '' if f.name in published else f.name
        spellings = [f'--{s}' for s in dict.fromkeys([*f.metadata['flag'].split(), name]) if s]
        kind = _kind_of(hints[f.name])
        words = f.metadata['words']
        if kind is bool:
            reading = dict(type=_boolean, nargs='?', const=True, metavar='BOOL')
        else:
            reading = dict(type=_with_words(kind, words), metavar=kind.__name__.upper())
            if '' in words:
                reading |= dict(nargs='?', const=words[''])
        help_text = f.metadata['help'].replace('%', '%%') + f' (default: {f.default})'
        group.add_argument(*spellings, dest=f.name, default=argparse.SUPPRESS, help=help_text, **reading)
    parser.ignored = getattr(cls, 'IGNORED', {})
    parser.refused = getattr(cls, 'REFUSED', {})
    for name in parser.ignored:
        parser.add_argument(f'--{name}', nargs='?', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _group_of(cls: type, name: str) -> str:
    """The heading of a field in `--help`: its own, or that of the field that it replaces."""
    for base in cls.__mro__:
        if name in inspect.get_annotations(base):
            group = base.__dataclass_fields__[name].metadata['group']
            if group:
                return group
    return 'model'


def _kind_of(hint: Any) -> Callable[[str], Any]:
    """What reads a field's values: of `int | None` it is int."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    return number_or_list if kinds == [float, str] else kinds[0]


def _with_words(kind: type, words: dict[str, Any]) -> Callable[[str], Any]:
    """`kind`, which understands these words, too."""

    def read(text: str) -> Any:
        return words[text] if text in words else kind(text)

    read.__name__ = kind.__name__  # argparse names it in its errors
    return read


def _with_underscores(arg: str) -> str:
    """An argument whose flag, if it begins with one, is spelt with underscores; its value stays as it is."""
    return re.sub(r'^--[\w-]+', lambda flag: '--' + flag[0][2:].replace('-', '_'), arg)


class _Joined(argparse.Action):
    """Several words of a command line as one text, joined by commas."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, ','.join(values))


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2; an unknown flag names the nearest one."""

    source = ''  # the file that is being read, for errors
    ignored: dict[str, str] = {}  # flags that are accepted with a warning, and why they have no effect
    refused: dict[str, str] = {}  # flags of other families, and why they are not for this one

    def error(self, message: str) -> typing.NoReturn:
        place = f' (in {self.source!r})' if self.source else ''
        self.exit(2, f'{self.prog}: {message}{place}\n')

    def parse(self, argv: list[str], source: str = '') -> dict[str, Any]:
        """The given flags by field name.

        Args:
            source: the file that they stand in, for errors; empty is the command line.
        """
        underscored = [_with_underscores(arg) for arg in argv]
        as_typed = dict(zip(underscored, argv, strict=True))  # for the message about an unknown flag
        self.source = source
        values, unknown = self.parse_known_args(underscored)
        if unknown:
            flag = unknown[0].split('=')[0]
            if flag[2:] in self.refused:
                self.error(f'{flag} is not for this model: {self.refused[flag[2:]]}')
            near = difflib.get_close_matches(flag, list(self._option_string_actions), n=1, cutoff=0.0)
            self.error(
                f'unknown argument {as_typed[unknown[0]]!r}: the nearest flag is {near[0]}; --help lists all'
            )
        self.source = ''
        for name in sorted(self.ignored.keys() & vars(values).keys()):
            self._print_message(f'{self.prog}: --{name} is ignored: {self.ignored[name]}\n', sys.stderr)
            delattr(values, name)
        return vars(values)


def parse_settings(cls: type, argv: list[str], prog: str, description: str) -> Any:
    """The settings of a command line, an object of a dataclass of `opt` fields.

    Wrong flags and values end the program in one line, with exit code 2.
    """
    parser = make_parser(cls, prog, description)
    values = parser.parse(argv)
    try:
        return cls(**values)
    except ValueError as error:
        parser.error(str(error))


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
