"""The settings of a sampling job as controls of a page, and what was entered as values and as a command.

A family needs nothing here: its settings are those of its class in `configs`.
"""
import dataclasses
import math
import shlex
import typing
from typing import Any, NamedTuple

from configs import SAMPLE_CONFIGS
from configs.options import flag_of
from configs.sampling import SampleConfig

LONGEST_TEXT = 200  # letters of a value
MOST_VALUES = 5     # of a comparison
SWITCH = {'true': True, '1': True, 'on': True, 'false': False, '0': False, 'off': False}


class Control(NamedTuple):
    """A setting that somebody may change."""
    name: str     # of the setting
    flag: str     # of sample.py
    help: str
    kind: type    # bool, int, float or str
    value: Any    # to begin with
    choices: tuple[Any, ...] | None


def controls_of(family: str, start: dict[str, Any]) -> list[Control]:
    """The settings that decide how a family draws: guidance, and its own ones.

    Args:
        start: values to begin with, by name; the others are those of sample.py.
    """
    cls = SAMPLE_CONFIGS[family]
    shared = {field.name for field in dataclasses.fields(SampleConfig)} - {'cfg'}
    hints = typing.get_type_hints(cls)
    controls = []
    for field in dataclasses.fields(cls):
        if field.name in shared or field.name in cls.CHANGE_NOTHING:
            continue
        controls.append(Control(
            name=field.name,
            flag=flag_of(cls, field.name),
            help=field.metadata['help'],
            kind=hints[field.name],
            value=start.get(field.name, field.default),
            choices=field.metadata['choices'],
        ))
    return controls


def value_of(control: Control, entered: Any) -> Any:
    """What was entered for a setting, as its own type.

    Raises:
        ValueError: it is no such value.
    """
    text = '' if entered is None else str(entered).strip()
    if control.kind is bool:
        if text.lower() not in SWITCH:
            raise ValueError(f'{control.flag} must be 1 or 0, got {text[:LONGEST_TEXT] or "nothing"}: enter '
                             'one of them')
        return SWITCH[text.lower()]
    if control.kind is str:
        if len(text) > LONGEST_TEXT:
            raise ValueError(f'{control.flag} must have at most {LONGEST_TEXT} letters, got {len(text)}: '
                             'shorten it')
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # A page writes 900 as 900.0, too.
    is_whole = math.isfinite(number) and number == int(number)
    if not math.isfinite(number) or (control.kind is int and not is_whole):
        kind = 'a whole number' if control.kind is int else 'a number'
        raise ValueError(f'{control.flag} must be {kind}, got {text[:LONGEST_TEXT] or "nothing"}: enter one')
    return control.kind(number)


def values_of(control: Control, text: str) -> list[Any]:
    """The values of a setting that are compared, of a text that joins them by spaces or commas.

    Raises:
        ValueError: there are too few or too many, or one is no value of this setting.
    """
    words = text.replace(',', ' ').split()
    if not 2 <= len(words) <= MOST_VALUES:
        raise ValueError(f'expected 2 to {MOST_VALUES} values of {control.flag}, joined by spaces, got '
                         f'{len(words)}: enter so many')
    return [value_of(control, word) for word in words]


def command_of(job: SampleConfig) -> str:
    """The command line that draws the images of a job: all settings that differ from those of sample.py."""
    words = ['python', 'sample.py', f'--model={job.model}']
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if field.name == 'model' or value == field.default:
            continue
        if isinstance(value, bool):
            value = int(value)
        words.append(f'--{flag_of(job, field.name)}={value}')
    return shlex.join(words)
