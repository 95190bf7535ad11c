"""A web page that samples, compares, edits and reconstructs: `python app.py`.

It opens with the newest checkpoint below local_output, or with `--ckpt=`: a path, a published name, or
owner/name of the hub. Its images are those of sample.py with the same settings. It is served on this machine
alone; `--listen` serves it to others, who need a name and a password of `--auth`. It needs
requirements-web.txt.
"""
import os
import sys

from utils.console import announce, one_line_errors
from web.settings import AppSettings, parse_app

if __name__ == '__main__':
    # Wrong flags and missing files are answered now: the imports below take seconds.
    with one_line_errors('app.py'):
        command = parse_app(sys.argv[1:])
        command.require_files()
    announce('app.py', 'loading torch, gradio and the weights')

# Gradio reads these when it is imported: it reports nothing to its makers.
os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'

import torch
from starlette.middleware import Middleware

import dist
from pipeline import load
from utils.hub import locate
from utils.log import setup_logging
from utils.misc import allow_tf32
from web.guard import OwnFilesOnly
from web.page import STYLE, Page, theme
from web.studio import Studio


def open_studio(settings: AppSettings) -> Studio:
    """The model of these settings, on its device.

    Raises:
        ValueError: the weights cannot be used.
    """
    device = torch.device(settings.device) if settings.device else dist.get_device()
    allow_tf32(True)  # as sample.py does
    source = settings.source
    path = locate(source)
    loaded = load(path, settings.weights, device, model=settings.model, tokenizer=settings.vae_ckpt or None)
    return Studio(loaded, source, path, settings.vae_ckpt, settings.weights, settings.precision)


def serve(settings: AppSettings, studio: Studio, wait: bool = True) -> str:
    """Serve the page until the program is interrupted.

    Args:
        wait: False returns at once, and serves in the background.
    Returns:
        The address of the page on this machine.
    """
    page = Page(studio).build()
    _, url, _ = page.launch(
        server_name=settings.address,
        server_port=settings.port,
        auth=settings.logins(),
        share=False,
        strict_cors=True,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size='10mb',
        show_error=False,
        inbrowser=False,
        quiet=True,
        theme=theme(),
        css=STYLE,
        footer_links=[],
        app_kwargs=dict(middleware=[Middleware(OwnFilesOnly)], docs_url=None, redoc_url=None),
        prevent_thread_lock=True,
    )
    announce('app.py', f'{studio.title}: open {url}')
    if wait:
        page.block_thread()
    return url


def main() -> None:
    """Serve the page of the command line."""
    settings = parse_app(sys.argv[1:])
    setup_logging(None, is_master=True)
    serve(settings, open_studio(settings))


if __name__ == '__main__':
    with one_line_errors('app.py'):
        main()
