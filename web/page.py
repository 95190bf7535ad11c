"""The page of app.py: tabs, what they show, and which function of the studio a button calls.

Everything that is drawn is drawn in web.studio; here are widgets and the wires between them.
"""
import functools
import html
import inspect
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from utils.console import one_line
from web.about import about
from web.controls import LONGEST_TEXT, MOST_VALUES, Control, command_of
from web.studio import LONGEST_SIDE, MOST_IMAGES, Drawn, Studio, painted

logger = logging.getLogger(__name__)

SHOWN_SIDE = 384    # pixels per side to which small images are enlarged for painting and comparing
SMALL_SIDE = 128    # images up to this side show their pixels as squares
MOST_PER_ROW = 8    # images of a value of a comparison
LARGEST_DICE = 10 ** 6
PAINT = 'rgba(255, 140, 0, 0.6)'
FONTS = ['system-ui', 'sans-serif']
FIXED_FONTS = ['ui-monospace', 'monospace']
STYLE = '''
.squares img { image-rendering: pixelated; }
.grid-wrap { min-height: 0 !important; }
footer { display: none; }
'''


# ---------------------------------------------------------------------------------------------- errors
def in_one_sentence(handler: Callable) -> Callable:
    """A function of the page whose errors are one sentence there; what nobody expected is in the log."""
    if inspect.isgeneratorfunction(handler):
        @functools.wraps(handler)
        def guarded(*args: Any) -> Iterator[Any]:
            try:
                yield from handler(*args)
            except Exception as error:
                raise _as_shown(error) from None
    else:
        @functools.wraps(handler)
        def guarded(*args: Any) -> Any:
            try:
                return handler(*args)
            except Exception as error:
                raise _as_shown(error) from None
    return guarded


def _as_shown(error: Exception) -> gr.Error:
    """The error that the page shows for an error of a handler."""
    if isinstance(error, torch.OutOfMemoryError):
        text = 'The memory of the device is full: draw fewer or smaller images.'
    elif isinstance(error, ValueError | OSError):
        text = one_line(error)
        text = f'{text[0].upper()}{text[1:]}.'
    else:
        logger.error('a job of the page failed', exc_info=error)
        text = f'The job failed ({type(error).__name__}): the terminal of app.py says more.'
    # The page would take what somebody has entered for HTML.
    return gr.Error(html.escape(text, quote=False), title='Not drawn', print_exception=False)


# ---------------------------------------------------------------------------------------------- the page
class Page:
    """The widgets of a page, and what happens when somebody uses them.

    Args:
        studio: what draws.
    """

    def __init__(self, studio: Studio):
        self.studio = studio
        self.zoom = max(SHOWN_SIDE // studio.side, 1)
        self.look = 'squares' if studio.side <= SMALL_SIDE else 'smooth'

    def build(self) -> gr.Blocks:
        """The page, ready to be launched."""
        studio = self.studio
        with gr.Blocks(title='Next-scale images', analytics_enabled=False, delete_cache=(3600, 3600),
                       fill_width=True) as blocks:
            gr.Markdown(f'## {studio.title}')
            # What every tab may show: the picture that somebody has chosen, of the size that is drawn.
            self.picture = gr.State(None)
            self.views: list[gr.Image | gr.ImageEditor] = []
            # Buttons, and what each of them shows in every tab.
            self.continue_with: list[tuple[gr.Button, gr.State]] = []
            with gr.Row():
                if studio.is_generator:
                    with gr.Column(scale=1, min_width=260):
                        self.build_settings()
                with gr.Column(scale=4), gr.Tabs() as self.tabs:
                    self.build_tabs()
            self.wire_pictures()
        return blocks.queue(max_size=16, default_concurrency_limit=1)

    def build_tabs(self) -> None:
        """A tab for everything that the model can do."""
        studio = self.studio
        if studio.is_generator:
            with gr.Tab('Sample', id='sample'):
                self.build_sample()
            with gr.Tab('Compare', id='compare'):
                self.build_compare()
        if studio.can_edit:
            with gr.Tab('Edit', id='edit') as self.edit_tab:
                self.build_edit()
        if studio.is_flexible:
            with gr.Tab('Refine', id='refine'):
                self.build_refine()
            with gr.Tab('Expand', id='expand'):
                self.build_expand()
        with gr.Tab('Reconstruct', id='reconstruct'):
            self.build_reconstruct()
        with gr.Tab('About', id='about'):
            gr.Markdown(about(studio))

    def on(self, event: Callable, handler: Callable, inputs: Any, outputs: Any, name: str = '') -> Any:
        """Let an event call a function of this page; one of them runs at a time.

        Args:
            name: under which programs may call it, too; '' is for this page alone.
        """
        return event(in_one_sentence(handler), inputs, outputs, api_name=name or None,
                     api_visibility='public' if name else 'private', concurrency_id='model',
                     concurrency_limit=1, show_progress='minimal')

    # ------------------------------------------------------------------------------ settings
    def build_settings(self) -> None:
        """The settings that all tabs share: seed, guidance, and those of the family."""
        with gr.Row():
            self.seed = gr.Number(0, label='seed', precision=0, minimum=0, scale=2, min_width=120)
            dice = gr.Button('Another', scale=1, min_width=90)
        self.entries = [_widget(control) for control in self.studio.controls]
        dice.click(lambda: random.randrange(LARGEST_DICE), None, self.seed, api_visibility='private',
                   show_progress='hidden')

    def class_menu(self, label: str, several: bool = False) -> gr.Dropdown:
        """A menu of all classes, which can be searched."""
        choices = self.studio.choices
        value = [] if several else choices[-1][1]
        return gr.Dropdown(choices, value=value, multiselect=several, label=label, filterable=True,
                           max_choices=MOST_IMAGES if several else None)

    # ------------------------------------------------------------------------------ sample
    def build_sample(self) -> None:
        """Classes, a gallery that grows scale by scale, and the command line that draws the same."""
        with gr.Row():
            self.classes = self.class_menu('classes, in turn; none are all', several=True)
            self.num_images = gr.Slider(1, MOST_IMAGES, 8, step=1, label='images')
        with gr.Row():
            button = gr.Button('Draw', variant='primary')
            stop = gr.Button('Stop')
        status = gr.Markdown('')
        gallery = gr.Gallery(label='images', columns=4, object_fit='contain', format='png', interactive=False,
                             height='auto', elem_classes=self.look, buttons=['download', 'fullscreen'])
        command = gr.Code(label='the same on the command line', language='shell', interactive=False,
                          wrap_lines=True, lines=1)

        self.drawn = gr.State([])
        self.chosen = gr.State(0)
        if self.studio.can_edit:
            self.take = gr.Button('Edit the chosen image')
        event = self.on(button.click, self.sample, [self.classes, self.num_images, self.seed, *self.entries],
                        [gallery, self.drawn, status, command], 'sample')
        stop.click(None, cancels=[event], api_visibility='private')

        def choose(event: gr.SelectData) -> int:
            return event.index

        gallery.select(choose, None, self.chosen, api_visibility='private', show_progress='hidden')

    def sample(self, classes: list[int], num_images: float, seed: float, *entered: Any) -> Iterator[tuple]:
        """Draw images; the gallery is shown anew after each scale."""
        job = self.studio.job(entered, seed, classes or (), num_images)
        for drawn in self.studio.sample(job):
            yield drawn.images, drawn.images, self.status(drawn), command_of(job)

    def status(self, drawn: Drawn) -> str:
        """How far a job is, or how long it took."""
        if not drawn.is_whole:
            return f'scale {drawn.num_scales} is drawn ...'
        count = len(drawn.images)
        return (f'{count} images in {drawn.seconds:.2f} s, {drawn.seconds / count:.3f} s per image with a '
                f'picture of each scale, on {self.studio.device}')

    # ------------------------------------------------------------------------------ compare
    def build_compare(self) -> None:
        """One setting with several values, a row of images for each, all from the same noise."""
        with gr.Row():
            flags = [(control.flag, i) for i, control in enumerate(self.studio.controls)]
            setting = gr.Dropdown(flags, value=0, label='setting')
            values = gr.Textbox('0 1.5 4', label=f'values, at most {MOST_VALUES}',
                                max_length=LONGEST_TEXT)
        with gr.Row():
            classes = self.class_menu('classes, in turn; none are all', several=True)
            num_images = gr.Slider(1, MOST_PER_ROW, 4, step=1, label='images of each')
        button = gr.Button('Compare', variant='primary')
        rows = []
        for _ in range(MOST_VALUES):
            rows.append(gr.Gallery(visible=False, columns=MOST_PER_ROW, fit_columns=False,
                                   object_fit='contain', format='png', interactive=False, height='auto',
                                   elem_classes=self.look, buttons=['download', 'fullscreen']))
        command = gr.Code(label='the same on the command line', language='shell', interactive=False,
                          wrap_lines=True, lines=1)
        self.on(button.click, self.compare,
                [setting, values, classes, num_images, self.seed, *self.entries], [*rows, command], 'compare')

    def compare(self, setting: int, values: str, classes: list[int], num_images: float, seed: float,
                *entered: Any) -> Iterator[list]:
        """A row of images for each value of a setting; a row is shown as soon as it is drawn."""
        job = self.studio.job(entered, seed, classes or (), num_images)
        control = self.studio.controls[setting]
        rows = []
        commands = []
        for row in self.studio.compare(job, control, values):
            rows.append(gr.Gallery(row.images, label=row.title, visible=True))
            commands.append(command_of(row.job))
            hidden = [gr.Gallery(visible=False)] * (MOST_VALUES - len(rows))
            yield [*rows, *hidden, '\n'.join(commands)]

    # ------------------------------------------------------------------------------ edit
    def build_edit(self) -> None:
        """An image to paint on; what is painted is drawn again."""
        side = self.studio.side * self.zoom
        with gr.Row():
            with gr.Column():
                self.editor = gr.ImageEditor(
                    label='paint over what is to be drawn again',
                    type='pil',
                    sources=('upload', 'clipboard'),
                    canvas_size=(side, side),
                    fixed_canvas=True,
                    height=side + 120,
                    layers=False,
                    transforms=(),
                    brush=gr.Brush(default_size=side // 10, colors=[PAINT], color_mode='fixed'),
                    format='png',
                    buttons=['fullscreen'],
                )
                self.views.append(without_addresses(self.editor))
            with gr.Column():
                slider = gr.ImageSlider(label='before and after', interactive=False, format='png',
                                        height=side + 120, buttons=['download', 'fullscreen'])
        with gr.Row():
            label = self.class_menu('class of what is drawn')
            paste = gr.Checkbox(True, label='paste', info='put pixels that are not painted over the result')
        with gr.Row():
            button = gr.Button('Draw again', variant='primary')
            go_on = gr.Button('Go on with the result')
        self.edited = gr.State(None)
        self.on(button.click, self.edit, [self.picture, self.editor, label, paste, self.seed, *self.entries],
                [slider, self.edited], 'edit')
        self.continue_with.append((go_on, self.edited))

    def edit(self, picture: np.ndarray | None, editor: dict[str, Any], label: int, paste: bool, seed: float,
             *entered: Any) -> tuple:
        """Draw the painted part of the picture again; before and after are shown."""
        picture = self.require_picture(picture)
        redrawn_HW = painted(editor['layers'], self.studio.side)
        edited = self.studio.edit(picture, redrawn_HW, self.studio.job(entered, seed), label, paste)
        return (self.enlarged(picture), self.enlarged(edited)), edited

    # ------------------------------------------------------------------------------ refine, expand
    def build_refine(self) -> None:
        """Coarse scales of an image stay, fine ones are drawn again, also at another size."""
        sides = self.studio.model.patch_nums
        with gr.Row():
            self.views.append(self.picture_view())
            result = gr.Image(label='refined', format='png', interactive=False, elem_classes=self.look,
                              buttons=['download', 'fullscreen'])
        with gr.Row():
            label = self.class_menu('class')
            start = gr.Dropdown(list(sides[:-1]), value=sides[(len(sides) - 1) // 2],
                                label='scales up to this side stay')
            size = gr.Number(self.studio.side, label='pixels per side of the result', precision=0,
                             minimum=1, maximum=LONGEST_SIDE)
        button = gr.Button('Refine', variant='primary')
        self.on(button.click, self.refine, [self.picture, label, start, size, self.seed, *self.entries],
                result, 'refine')

    def refine(self, picture: np.ndarray | None, label: int, start: int, size: int, seed: float,
               *entered: Any) -> np.ndarray:
        """Draw the fine scales of the picture again."""
        picture = self.require_picture(picture)
        job = self.studio.job(entered, seed)
        return self.enlarged(self.studio.refine(picture, job, label, int(start), int(size or 0)))

    def build_expand(self) -> None:
        """A larger canvas around an image is drawn."""
        with gr.Row():
            self.views.append(self.picture_view())
            result = gr.Image(label='expanded', format='png', interactive=False, elem_classes=self.look,
                              buttons=['download', 'fullscreen'])
        stride = self.studio.loaded.tokenizer.stride
        larger = round(1.5 * self.studio.side / stride) * stride
        with gr.Row():
            label = self.class_menu('class')
            height = gr.Number(self.studio.side, label='height in pixels', precision=0, minimum=1,
                               maximum=LONGEST_SIDE)
            width = gr.Number(larger, label='width in pixels', precision=0, minimum=1, maximum=LONGEST_SIDE)
            paste = gr.Checkbox(True, label='paste', info='put the pixels of the image over the result')
        button = gr.Button('Expand', variant='primary')
        self.on(button.click, self.expand,
                [self.picture, label, height, width, paste, self.seed, *self.entries], result, 'expand')

    def expand(self, picture: np.ndarray | None, label: int, height: int, width: int, paste: bool,
               seed: float, *entered: Any) -> np.ndarray:
        """Draw around the picture."""
        picture = self.require_picture(picture)
        job = self.studio.job(entered, seed)
        expanded = self.studio.expand(picture, job, label, int(height or 0), int(width or 0), paste)
        return self.enlarged(expanded)

    # ------------------------------------------------------------------------------ reconstruct
    def build_reconstruct(self) -> None:
        """What the tokenizer makes of an image, scale by scale."""
        with gr.Row():
            with gr.Column(scale=1, min_width=200):
                self.views.append(self.picture_view())
                button = gr.Button('Reconstruct', variant='primary')
            with gr.Column(scale=3):
                gallery = gr.Gallery(label='with the scales up to', columns=5, object_fit='contain',
                                     format='png', interactive=False, height='auto',
                                     elem_classes=self.look, buttons=['download', 'fullscreen'])
                table = gr.Markdown('')
        self.on(button.click, self.reconstruct, self.picture, [gallery, table], 'reconstruct')

    def reconstruct(self, picture: np.ndarray | None) -> tuple:
        """Reconstructions with PSNR and codes."""
        rows = self.studio.reconstruct(self.require_picture(picture))
        images = [(row.image, f'{row.scale}: {row.psnr:.1f} dB') for row in rows]
        lines = ['| scales up to | PSNR | codes of this scale | different ones |', '|---|---|---|---|']
        for row in rows:
            codes = f'{row.num_codes} | {row.num_distinct}' if row.num_codes else 'continuous | -'
            lines.append(f'| {row.scale} | {row.psnr:.2f} dB | {codes} |')
        return images, '\n'.join(lines)

    # ------------------------------------------------------------------------------ pictures
    def picture_view(self) -> gr.Image:
        """Where the chosen picture is shown, and another one can be put."""
        view = gr.Image(label='image', type='filepath', sources=['upload', 'clipboard'], format='png',
                        elem_classes=self.look, buttons=['fullscreen'])
        return without_addresses(view)

    def wire_pictures(self) -> None:
        """A picture that is chosen anywhere is shown in every tab."""
        shown = [self.picture, *self.views]
        for view in self.views:
            self.on(view.upload, self.upload, view, shown)
        if self.studio.can_edit:
            # An editor takes no image while its tab is hidden.
            self.on(self.edit_tab.select, self.show_editor, self.picture, self.editor)
            self.on(self.take.click, self.take_drawn, [self.drawn, self.chosen], [*shown, self.tabs])
        for button, image in self.continue_with:
            self.on(button.click, self.show, image, shown)

    def upload(self, given: Any) -> tuple:
        """Show an image that somebody has uploaded, in an editor or as a file."""
        if isinstance(given, dict):
            painted_on = given['background'].convert('RGBA')
            ground = Image.new('RGBA', painted_on.size, 'white')
            return self.show(self.studio.fitted(Image.alpha_composite(ground, painted_on).convert('RGB')))
        return self.show(self.studio.open(given))

    def take_drawn(self, drawn: list[np.ndarray], chosen: int) -> tuple:
        """Show one of the images that were drawn, in the tab where it can be edited."""
        if not drawn:
            raise ValueError('expected an image, none is drawn yet: press Draw first')
        picture = self.studio.fitted(Image.fromarray(drawn[min(chosen, len(drawn) - 1)]))
        return *self.show(picture), gr.Tabs(selected='edit')

    def show(self, picture: np.ndarray | None) -> tuple:
        """The picture, and what each view shows of it."""
        picture = self.require_picture(picture)
        views = []
        for view in self.views:
            if isinstance(view, gr.ImageEditor):
                views.append(self.show_editor(picture))
            else:
                views.append(self.enlarged(picture))
        return picture, *views

    def show_editor(self, picture: np.ndarray | None) -> dict[str, Any] | None:
        """The picture in the editor, without paint."""
        if picture is None:
            return None
        return dict(background=self.enlarged(picture), layers=[], composite=None)

    @staticmethod
    def require_picture(picture: np.ndarray | None) -> np.ndarray:
        """The picture.

        Raises:
            ValueError: there is none.
        """
        if picture is None:
            raise ValueError('expected an image, got none: upload one, or choose one in the tab Sample')
        return picture

    def enlarged(self, image_HW3: np.ndarray) -> np.ndarray:
        """An image whose pixels are squares, so that a small one is large enough to look at."""
        zoom = max(SHOWN_SIDE // max(image_HW3.shape[:2]), 1)
        return image_HW3.repeat(zoom, 0).repeat(zoom, 1)


def without_addresses(view: gr.components.Component) -> gr.components.Component:
    """The same view, which takes uploaded files alone: gradio would fetch any address that is sent to it."""
    move = view.async_move_resource_to_block_cache

    async def move_file(path: Any) -> str | None:
        if str(path).lower().startswith(('http:', 'https:')):
            raise ValueError('expected an uploaded image, got an address: upload the image')
        return await move(path)

    view.async_move_resource_to_block_cache = move_file
    return view


def _widget(control: Control) -> gr.components.Component:
    """What a setting is changed with."""
    shared = dict(value=control.value, label=control.flag, info=control.help)
    if control.kind is bool:
        return gr.Checkbox(**shared)
    if control.choices:
        return gr.Dropdown(list(control.choices), **shared)
    if control.kind is str:
        return gr.Textbox(max_length=LONGEST_TEXT, **shared)
    return gr.Number(precision=0 if control.kind is int else None, **shared)


def theme() -> gr.themes.Base:
    """Colours and fonts; the fonts are those of the reader's machine, so that none is fetched."""
    return gr.themes.Default(font=FONTS, font_mono=FIXED_FONTS)
