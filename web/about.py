"""What the page says about the weights it draws with, as a table."""
import re
from pathlib import Path

from models import Tokenizer
from utils.hub import PUBLISHED
from utils.markdown import table_of
from utils.model_folder import CARD, weights_in_words
from utils.provenance import versions
from web.studio import Studio

LICENCE_LINE = re.compile(r'^license: *(\S+)', re.MULTILINE)  # of a model card


def about(studio: Studio) -> str:
    """Files with their digests, sizes, training, settings to begin with and licences, in Markdown."""
    return table_of(facts_of(studio))


def facts_of(studio: Studio) -> dict[str, str]:
    """What is known of the weights and of this program, by name."""
    loaded = studio.loaded
    facts = {'weights': f'`{studio.source}`', 'family': loaded.family}
    for flag, digest in loaded.digests.items():
        facts[f'SHA-256 of {flag}'] = f'`{digest}`'
    facts |= loaded.facts()
    facts['kind of weights'] = weights_in_words(loaded.weights)
    facts['pixels'] = f'{studio.side}x{studio.side}'
    if not isinstance(studio.model, Tokenizer):
        facts['settings to begin with'] = ', '.join(f'{one.flag} {one.value}' for one in studio.controls)
    training = loaded.training
    for name in ('epoch', 'git_commit'):
        if name in training:
            facts[f'{name.replace("_", " ")} of the training'] = str(training[name])
    facts['runs on'] = studio.device
    facts['versions'] = ', '.join(f'{name} {version}' for name, version in versions().items() if version)
    facts['licence of the program'] = 'MIT'
    facts['licence of the weights'] = licence_of(studio.path)
    return facts


def licence_of(path: Path) -> str:
    """The licence of weights, as far as their files tell it.

    Args:
        path: file or folder of the weights.
    """
    card = path / CARD
    if card.is_file():
        named = LICENCE_LINE.search(card.read_text(encoding='utf-8', errors='replace'))
        return named[1] if named else 'its model card names none: ask its owner'
    published = PUBLISHED.get(path.name)
    if published:
        named = published.licence or 'none is known here: ask their authors'
        return f'{named} (hub repository {published.repo})' if published.repo else named
    return 'the file names none: it belongs to whoever trained it, and its data may have terms of their own'
