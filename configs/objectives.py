"""What a training of a generator may minimise: for which families, why not for others, its settings.

`objectives.OBJECTIVES` holds the same names, with the code of each. Only the standard library is needed here.
"""

import dataclasses
from typing import Any, NamedTuple

from configs.options import flag_of

NO_LIKELIHOOD = 'it gives no likelihood of an image, only velocities: train on with --objective=mle'
NO_RASTER = 'it replaces codes that are read one by one, and there are none'


class Terms(NamedTuple):
    """Where an objective is defined, and what it needs."""

    families: tuple[str, ...]  # that it is for; () is all of them
    refusals: dict[str, str]  # why it is not for another family, and what helps there
    settings: tuple[str, ...]  # that mean nothing without it
    needs_reference: bool  # whether it compares the model with frozen weights


CONTRAST = ('ref_from', 'contrast_beta', 'uncond_ratio')
OBJECTIVES: dict[str, Terms] = dict(
    mle=Terms((), {}, (), needs_reference=False),
    ddo=Terms(
        ('var', 'flexvar', 'npp'),
        dict(flowar=NO_LIKELIHOOD),
        (*CONTRAST, 'ddo_alpha', 'ddo_null_weight', 'ddo_codes'),
        needs_reference=True,
    ),
    cca=Terms(
        ('var', 'flexvar', 'npp'),
        dict(flowar=NO_LIKELIHOOD),
        (*CONTRAST, 'cca_lambda'),
        needs_reference=True,
    ),
    sar=Terms(
        ('flexvar',),
        dict(
            var='once a scale was drawn wrongly the right next residual is another one, so neither the real '
            "codes nor the teacher's argmax is a consistent target: pass --model=flexvar, or --objective=mle",
            npp='it has no scales whose predictions the next one could see: pass --objective=ddo or cca',
            flowar='it predicts velocities, of which no next scale could be made in one pass: train on with '
            '--objective=mle',
        ),
        (
            'sar_sigma',
            'sar_scope',
            'sar_target',
            'sar_sample',
            'sar_cfg',
            'sar_top_k',
            'sar_top_p',
        ),
        needs_reference=False,
    ),
    rear=Terms(
        ('npp',),
        dict(
            var=f'{NO_RASTER}: pass --objective=cca or ddo',
            flexvar=f'{NO_RASTER}: pass --objective=sar, which shows the model its own errors',
            flowar=f'{NO_RASTER}: train on with --objective=mle',
        ),
        ('rear', 'rear_noise'),
        needs_reference=False,
    ),
)


def check_objective(config: Any) -> None:
    """Make sure that the objective of a training exists and is for its family, and that its settings fit.

    Raises:
        ValueError: it is not, or one does not.
    """
    name = config.objective
    if name not in OBJECTIVES:
        raise ValueError(f'--objective must be one of {", ".join(OBJECTIVES)}, got {name!r}')
    terms = OBJECTIVES[name]
    if terms.families and config.model not in terms.families:
        reason = terms.refusals.get(config.model, f'it is for {", ".join(terms.families)}')
        raise ValueError(f'--objective={name} is not for --model={config.model}: {reason}')

    # Settings of another objective would silently do nothing.
    for field in dataclasses.fields(config):
        owners = [other for other, its in OBJECTIVES.items() if field.name in its.settings]
        is_given = getattr(config, field.name) != field.default
        if owners and is_given and name not in owners:
            raise ValueError(
                f'--{field.name} is for --objective={" or ".join(owners)}, got --objective={name}: '
                'pass both, or leave it out'
            )
    if not terms.needs_reference:
        return
    init_from = flag_of(config, 'init_from')
    if not config.reference:
        raise ValueError(
            f'--objective={name} compares the model with the weights that it begins with: pass '
            f'--{init_from}=FILE, and --ref_from=FILE where the reference is another one'
        )
    if config.reset:
        raise ValueError(
            f'--objective={name} begins where the reference is, and --reset={config.reset} does not: train '
            f'with --objective=mle first, then pass the result as --{init_from}'
        )
