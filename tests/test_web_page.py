"""The web page in a headless Chromium, as its users see it. Needs gradio, playwright and chromium:

    pip install -r requirements-web.txt playwright, and Debian's package chromium
    python -m pytest tests/test_web_page.py -m slow -n 0

WEB_PICTURES names a folder for pictures of the page.
"""
import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runs import REPO, environment, kill_tree
from tests.test_pipeline import made, write_checkpoint

gradio = pytest.importorskip('gradio', reason='the page needs requirements-web.txt')
page = pytest.importorskip('web.page')
playwright = pytest.importorskip('playwright.sync_api', reason='the browser is driven by playwright')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason='the page is looked at in chromium')]
PATIENCE = 60_000  # milliseconds, on a busy machine


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def served(*flags):
    """A server with these flags, once it answers: (process, address)."""
    port = free_port()
    process = subprocess.Popen([sys.executable, str(REPO / 'app.py'), f'--port={port}', *map(str, flags)],
                               env=environment())
    address = f'http://127.0.0.1:{port}'
    for _ in range(600):
        try:
            urllib.request.urlopen(address)
            return process, address
        except OSError:
            assert process.poll() is None, 'app.py has ended'
            time.sleep(0.2)
    raise AssertionError('app.py does not answer')


@pytest.fixture(scope='module')
def checkpoint_of(tmp_path_factory):
    """The file of a tiny generator."""
    def get(name):
        return write_checkpoint(made(name), tmp_path_factory.mktemp(name) / f'{name}.pth')
    return get


@pytest.fixture(scope='module')
def address_of(checkpoint_of):
    """Where the page of a family is served."""
    servers = {}

    def get(name):
        if name not in servers:
            servers[name] = served(f'--ckpt={checkpoint_of(name)}')
        return servers[name][1]
    yield get
    for process, _ in servers.values():
        kill_tree(process.pid)


class Visit:
    """A page in a browser, with all that it has asked for and complained about."""

    def __init__(self, browser, address):
        self.address = address
        self.asked = []
        self.complaints = []
        self.page = browser.new_page(viewport=dict(width=1360, height=1000))
        self.page.set_default_timeout(PATIENCE)
        self.page.on('request', lambda request: self.asked.append(request.url))
        self.page.on('pageerror', lambda error: self.complaints.append(str(error)))
        self.page.goto(address)
        self.page.get_by_role('tab', name='About').wait_for()

    def tab(self, name):
        self.page.get_by_role('tab', name=name, exact=True).click()

    def press(self, name):
        self.page.get_by_role('button', name=name, exact=True).locator('visible=true').click()

    def keep(self, name):
        folder = os.environ.get('WEB_PICTURES')
        if folder:
            self.page.screenshot(path=Path(folder) / f'{name}.png')


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address_of):
    """Opens the page of a family; at the end, nothing was asked of another host, and no script has failed."""
    visits = []

    def go(name):
        visits.append(Visit(browser, address_of(name)))
        return visits[-1]
    yield go
    for one in visits:
        outside = [url for url in one.asked if not url.startswith((one.address, 'data:', 'blob:'))]
        assert outside == [] and len(one.asked) > 5
        assert one.complaints == []
        one.page.close()


# ---------------------------------------------------------------------------------------------- the tabs
WATCH = """() => {
    window.seen = new Set();
    new MutationObserver(() => {
        for (const image of document.querySelectorAll('.grid-wrap img')) window.seen.add(image.src);
    }).observe(document.body, { subtree: true, childList: true, attributes: true });
}"""


def draw(there):
    there.press('Draw')
    there.page.get_by_text('s per image').wait_for()


def test_images_grow_scale_by_scale(visit):
    """Every scale is shown; the command line has the settings that were entered."""
    there = visit('var')
    page = there.page
    page.get_by_label('seed').fill('7')
    page.get_by_label('cfg').fill('3')
    page.evaluate(WATCH)
    draw(there)
    assert page.locator('.grid-wrap img').count() == 8
    assert page.evaluate('window.seen.size') > 8
    command = page.locator('.cm-content').locator('visible=true').inner_text()
    assert command.startswith('python sample.py --model=var')
    for flag in ('--seed=7', '--cfg=3.0', '--num_images=8'):
        assert flag in command
    there.keep('sample')


def test_wrong_input_gets_one_sentence(visit):
    there = visit('var')
    there.page.get_by_label('top_p').fill('2')
    there.press('Draw')
    there.page.get_by_text('--top_p must be in [0, 1], got 2.').wait_for()
    there.tab('Reconstruct')
    there.press('Reconstruct')
    there.page.get_by_text('Expected an image, got none').wait_for()
    there.keep('wrong')


def test_a_painted_part_is_drawn_again(visit):
    """An image of the first tab is painted on; without paint, a sentence says what is missing."""
    there = visit('var')
    page = there.page
    draw(there)
    there.press('Edit the chosen image')
    canvas = page.locator('canvas').locator('visible=true').first
    canvas.wait_for()
    page.wait_for_timeout(3000)  # the editor shows its image when its tab is open
    there.press('Draw again')
    page.get_by_text('Expected a painted part').wait_for()
    pictures = page.locator('img[src*="/file="]').locator('visible=true')
    assert pictures.count() == 0

    box = canvas.bounding_box()
    x = box['x'] + box['width'] / 2
    y = box['y'] + box['height'] / 2
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    for step in range(30):
        page.mouse.move(x - 60 + 4 * step, y - 60 + 4 * step)
    page.mouse.up()
    page.wait_for_timeout(1500)
    there.press('Draw again')
    pictures.first.wait_for()
    there.keep('edit')


def test_an_uploaded_image_is_reconstructed(visit, tmp_path):
    there = visit('var')
    pixels = np.random.RandomState(0).randint(0, 256, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'mine.png')
    there.tab('Reconstruct')
    there.page.locator('input[type=file]').last.set_input_files(tmp_path / 'mine.png')
    there.page.wait_for_timeout(3000)
    there.press('Reconstruct')
    there.page.get_by_text('different ones').wait_for()
    assert there.page.locator('.grid-wrap img').locator('visible=true').count() == 3
    there.keep('reconstruct')


def test_flexvar_refines_and_expands(visit):
    there = visit('flexvar')
    draw(there)
    there.press('Edit the chosen image')
    there.page.wait_for_timeout(3000)
    for name in ('Refine', 'Expand'):
        there.tab(name)
        there.press(name)
        # The picture itself is one, the result another.
        there.page.locator('img[src*="/file="]').locator('visible=true').nth(1).wait_for()
        there.keep(name)


def test_views_take_no_addresses():
    """Gradio itself would fetch one, for anybody who reaches the page."""
    view = page.without_addresses(gradio.Image(type='filepath'))
    with gradio.Blocks():
        for address in ('http://127.0.0.1:9/a.png', 'HTTPS://example.org/a.png'):
            moved = view.async_move_resource_to_block_cache(address)
            # The browser's driver keeps the loop of this thread.
            with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match='got an address'):
                pool.submit(asyncio.run, moved).result()
