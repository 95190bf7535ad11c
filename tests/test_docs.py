"""README and docs: small, their links lead somewhere, and their commands are understood."""
import importlib
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from configs import parse_sampling, parse_training
from configs.extraction import parse_extraction
from configs.options import parse_settings
from evaluation.settings import parse_evaluation
from export import ExportSettings
from tests.runs import REPO
from web.settings import parse_app

PAGES = [REPO / 'README.md', *sorted((REPO / 'docs').glob('*.md'))]
MOST_BYTES = 9 * 1024  # of README
LINK = re.compile(r'\]\(([^)\s]+)\)')
BLOCK = re.compile(r'```bash\n(.*?)```', re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(REPO))


def anchors_of(page: Path) -> set[str]:
    """The anchors of its headings, as they are made by hosts of code."""
    headings = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def commands_of(page: Path) -> list[list[str]]:
    """The commands in its blocks of shell, as lists of words."""
    commands = []
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            if words:
                commands.append(words)
    return commands


COMMANDS = [pytest.param(words, id=f'{name_of(page)}-{i}')
            for page in PAGES for i, words in enumerate(commands_of(page))]


def parse_export(argv: list[str]) -> None:
    parse_settings(ExportSettings, argv, 'export.py', '')


PARSERS = {'train.py': parse_training, 'sample.py': parse_sampling, 'extract.py': parse_extraction,
           'evaluate.py': partial(parse_evaluation, text=''), 'export.py': parse_export, 'app.py': parse_app}


def test_readme_is_short():
    assert PAGES[0].stat().st_size <= MOST_BYTES


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith('http')]
    for link in links:
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_every_page_is_named_in_readme():
    readme = PAGES[0].read_text()
    assert [page.name for page in PAGES[1:] if f'(docs/{page.name})' not in readme] == []


@pytest.mark.parametrize('words', COMMANDS)
def test_commands_are_understood(words):
    """Flags and values of the entry scripts, targets of make, and modules exist."""
    script = next((word for word in words if word in PARSERS), None)
    if script:
        PARSERS[script](words[words.index(script) + 1:])
    elif words[0] == 'make':
        targets = re.search(r'^\.PHONY:(.*)$', (REPO / 'Makefile').read_text(), re.MULTILINE)[1].split()
        assert words[1] in targets
    elif words[:2] == ['python', '-m']:
        assert importlib.util.find_spec(words[2])
    else:
        assert words[:3] == ['pip', 'install', '-r'] and (REPO / words[3]).is_file()
