"""A folder of a trained model: weights as safetensors, what they do not tell as JSON, and a card.

    config.json             family, settings that the weights do not tell, classes, digests, the training
    model.safetensors       the generator; absent in the folder of a tokenizer
    tokenizer.safetensors   the tokenizer
    README.md               the model card, which its owner completes

Each file is written whole or not at all, config.json last. It holds the digests of the other two, so that
weights of another model, or damaged ones, are never taken for those that it describes.
"""
import json
import re
from pathlib import Path
from typing import Any

import torch

from utils.files import read_json, write_text
from utils.markdown import table_of
from utils.tensor_files import UnusableFile, save_safetensors

CONFIG = 'config.json'
MODEL = 'model.safetensors'
TOKENIZER = 'tokenizer.safetensors'
CARD = 'README.md'
FILES = (CONFIG, MODEL, TOKENIZER, CARD)
FORMAT = 1  # of config.json

State = dict[str, torch.Tensor]


# ---------------------------------------------------------------------------------------------- writing
def write_model_folder(folder: str | Path, config: dict[str, Any], weights: dict[str, State],
                       card: str) -> None:
    """Write the folder of a model, in place of the one that is there.

    A card that is there stays, since its owner may have completed it.

    Args:
        config: content of config.json, but for the entries `format` and `sha256`.
        weights: flat weights by the name of their file.
        card: content of README.md.
    Raises:
        OSError: the disk is full or not writable.
        ValueError: the folder has a config.json of another program, or `config` holds what JSON has not.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists() and not _is_ours(folder):
        raise ValueError(f'{str(folder)!r} has a {CONFIG} of another program: pass another folder')
    folder.mkdir(parents=True, exist_ok=True)
    digests = {name: save_safetensors(state, folder / name) for name, state in weights.items()}
    for name in {MODEL, TOKENIZER} - weights.keys():
        (folder / name).unlink(missing_ok=True)
    if not (folder / CARD).exists():
        write_text(folder / CARD, card)
    content = dict(format=FORMAT, **config, sha256=digests)
    write_text(folder / CONFIG, json.dumps(content, indent=2, allow_nan=False) + '\n')


def _is_ours(folder: Path) -> bool:
    try:
        return read_json(folder / CONFIG).get('format') == FORMAT
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------- reading
def read_model_config(folder: str | Path) -> dict[str, Any]:
    """The content of config.json, with every entry of the kind that it must have.

    Raises:
        UnusableFile: the folder is no folder of a model, or of a later version.
    """
    path = Path(folder) / CONFIG
    try:
        config = read_json(path)
    except FileNotFoundError:
        checkpoints = sorted(file.name for file in Path(folder).glob('*-ckpt-*.pth'))
        found = f'a checkpoint in it, such as {checkpoints[0]}' if checkpoints else 'the path of a checkpoint'
        raise UnusableFile(f'{str(folder)!r} is no folder of a model, since it has no {CONFIG}: '
                           f'pass {found}') from None
    except ValueError as error:
        reason = ' '.join(str(error).split())
        raise UnusableFile(f'{str(path)!r} cannot be read ({reason}): copy or download it again') from None
    if 'format' not in config:
        raise UnusableFile(f'{str(path)!r} was written by another program, since it has no entry "format": '
                           'pass a folder that this project has written, or a file of weights')
    if config['format'] != FORMAT:
        raise UnusableFile(f'{str(path)!r} has format {config["format"]!r}, this version of the code reads '
                           f'{FORMAT}: take the version that wrote it')
    kinds = dict(model=str | None, config=dict, tokenizer=dict, classes=list, sampling=dict, training=dict,
                 weights=str, sha256=dict)
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind):
            raise UnusableFile(f'{str(path)!r} is damaged, since its entry "{name}" is missing or of another '
                               'kind: copy or download it again')
    needed = [TOKENIZER] if config['model'] is None else [MODEL, TOKENIZER]
    for name in needed:
        if not re.fullmatch(r'[0-9a-f]{64}', str(config['sha256'].get(name))):
            raise UnusableFile(f'{str(path)!r} is damaged, since it has no digest of {name}: '
                               'copy or download it again')
        if not (Path(folder) / name).is_file():
            raise UnusableFile(f'{str(folder)!r} lacks its file {name}: copy or download it again')
    return config


def check_digest(path: str | Path, found: str, config: dict[str, Any]) -> None:
    """Make sure that a file of weights is the one that config.json describes.

    Args:
        found: the SHA-256 of the file.
    Raises:
        UnusableFile: it is another file, or it is damaged.
    """
    expected = config['sha256'][Path(path).name]
    if found != expected:
        raise UnusableFile(f'{str(path)!r} has SHA-256 {found[:16]}..., its {CONFIG} says '
                           f'{expected[:16]}...: it is damaged or of another model, so copy or download the '
                           'folder again')


# ---------------------------------------------------------------------------------------------- the card
CARD_TEXT = '''---
# license: the owner of these weights names their licence here, such as mit
library_name: pytorch
{pipeline_tag}tags:
- next-scale
- {tag}
---

# {title}

{what}

```python
from pipeline import load

{example}
```

{sections}
'''


def model_card(name: str, config: dict[str, Any], facts: dict[str, str]) -> str:
    """The model card, in the Markdown of the hub; its licence is left to the owner.

    Args:
        name: of the repository or folder, as `load` takes it.
        config: content of config.json, but for the entries `format` and `sha256`.
        facts: what is worth a line of its own, by name.
    """
    is_generator = config['model'] is not None
    tag = config['model'] if is_generator else config['tokenizer']['model']
    title = Path(name).name
    if is_generator:
        what = f'A class-conditional image generator of the family `{tag}`, with its tokenizer.'
        count = config['num_classes']
        example = f'pipe = load({name!r})\nimages = pipe(range({min(count, 4)}), seed=0)'
    else:
        what = f'An image tokenizer of the family `{tag}`.'
        example = f'tokenizer = load({name!r}).model'
    facts = facts | dict(weights=weights_in_words(config['weights']))
    sections = [_section('Facts', facts)]
    if config['sampling']:
        sections.append(_section('Sampling', config['sampling']))
    if config['classes']:
        listed = ', '.join(f'{i} {one}' for i, one in enumerate(config['classes']))
        sections.append(f'## Classes\n\n{listed}')
    training = {key: value for key, value in config['training'].items() if not isinstance(value, dict)}
    settings = config['training'].get('settings', {})
    if training or settings:
        sections.append(_section('Training', training | settings))
    return CARD_TEXT.format(
        pipeline_tag='pipeline_tag: unconditional-image-generation\n' if is_generator else '',
        tag=tag, title=title, what=what, example=example, sections='\n\n'.join(sections))


def weights_in_words(weights: str) -> str:
    """The kind of weights, as people call it."""
    return 'of the last step' if weights == 'raw' else f'averaged ({weights})'


def _section(title: str, rows: dict[str, Any]) -> str:
    """A heading and a table of names and values."""
    return f'## {title}\n\n{table_of(rows)}'
