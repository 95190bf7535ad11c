"""Stored curves of the recipes: a training with the settings of one of them is compared with its band.

recipes/reference_curves.json holds, for the trainings of the demos, between which bounds their measures lie
after every epoch. `python -m bench.reference_curves` writes it from finished runs. A training that differs in
anything but its output folder, its seed and what is `free` is another one, and compared with nothing.
"""
from pathlib import Path
from typing import Any, NamedTuple

from configs import CONFIGS, TrainConfig
from configs.options import REPO, marked_fields
from utils.files import read_json
from utils.log import read_json_lines
from utils.token_cache import MANIFEST, read_description

STORED_CURVES = REPO / 'recipes' / 'reference_curves.json'
TOKEN_FOLDERS = ('cached_path', 'cached_val_path')  # settings that say where stored tokens lie
OF_TOKENS = ('count', 'crop_range', 'images')       # what of their description decides how a training goes


class Band(NamedTuple):
    """Bounds of one measure of a training, by optimizer step."""
    steps: list[int]
    low: list[float]
    high: list[float]

    def at(self, step: int) -> tuple[float, float] | None:
        """The bounds after `step` steps; None where nothing is stored for that step."""
        if step not in self.steps:
            return None
        place = self.steps.index(step)
        return self.low[place], self.high[place]


class Reference(NamedTuple):
    """The stored curves of one training of a recipe."""
    name: str               # folders of the recipe and of the training, such as demo_npp/plain
    recipe: str             # the script, relative to the repository
    bands: dict[str, Band]  # by measure; those of held-out images begin with v, as in log.txt

    def departure(self, step: int, scores: dict[str, float]) -> str:
        """A line about the scores that lie outside their band; '' where none does.

        Args:
            step: optimizer steps that are done.
            scores: of an evaluation, by the name of their measure.
        """
        outside = []
        for name, value in scores.items():
            band = self.bands.get(f'v{name}')
            bounds = band.at(step) if band else None
            # Written so that nan lies outside, too.
            if bounds and not bounds[0] <= value <= bounds[1]:
                outside.append(f'{name} {value:.4g} is not in {bounds[0]:.4g} to {bounds[1]:.4g}')
        if not outside:
            return ''
        return (f'after {step} steps, {"; ".join(outside)} of held-out images, the band of {self.recipe}: '
                f'see {self.name} in recipes/{STORED_CURVES.name}')


def find_reference(config: TrainConfig) -> Reference | None:
    """The stored curves of the training that a config describes; None where there are none.

    Raises:
        ValueError: the file of the curves is damaged.
    """
    for name, entry in stored_entries().items():
        if is_same_training(config, entry):
            bands = {measure: Band(**band) for measure, band in entry['curves'].items()}
            return Reference(name, entry['recipe'], bands)
    return None


def stored_entries() -> dict[str, dict[str, Any]]:
    """What is stored of every training, by its name; {} where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return read_json(STORED_CURVES)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f'expected curves in {str(STORED_CURVES)!r}, cannot read it ({error}): restore the '
                         'file, or remove it to train without a comparison') from None


def is_same_training(config: TrainConfig, entry: dict[str, Any]) -> bool:
    """Whether a config is that of a stored training, on the same data and with a tokenizer like its own.

    Args:
        config: of a run.
        entry: of `stored_entries`.
    """
    # Weights to begin with are a free setting, and change everything that follows.
    if config.model != entry['settings']['model'] or config.init_from:
        return False
    try:
        stored = CONFIGS[config.model](**entry['settings'])
    except (TypeError, ValueError):  # of another version, which had other settings
        return False
    if compared_settings(config) != compared_settings(stored):
        return False
    if describe_tokens(config) != entry['tokens']:
        return False
    return not entry['tokenizer'] or trained_in(Path(config.vae_ckpt).parent) == entry['tokenizer']


def compared_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide how a training goes, whatever machine it runs on."""
    left_out = {*marked_fields(config, 'free'), *TOKEN_FOLDERS, *config.DERIVED}
    if config.steps:
        left_out.add('epochs')  # they follow from the steps
    return {name: value for name, value in vars(config).items() if name not in left_out}


def describe_tokens(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """What decides how a training on stored tokens goes, by the setting that names their folder."""
    described = {}
    for name in TOKEN_FOLDERS:
        folder = getattr(config, name, '')
        if folder:
            manifest = read_description(Path(folder) / MANIFEST)
            described[name] = {key: manifest.get(key) for key in OF_TOKENS}
    return described


def trained_in(folder: Path) -> str:
    """The name of the stored training that was run in a folder, '' if it was another one."""
    config = settings_of(folder)
    reference = find_reference(config) if config else None
    return reference.name if reference else ''


def settings_of(run: Path) -> TrainConfig | None:
    """The settings in the first line of the log of a run; None where there are none that this version knows.

    Args:
        run: output folder of a training, or its log.txt.
    """
    path = run / 'log.txt' if run.is_dir() else run
    header = next(iter(read_json_lines(path)), {})
    try:
        return CONFIGS[header['args']['model']](**header['args'])
    except (KeyError, TypeError, ValueError):
        return None
