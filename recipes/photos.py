"""Your own photos in one command: `python -m recipes.photos FOLDER`.

Looks at the photos, proposes settings for this machine and the time there is, trains a tokenizer and a VAR by
train.py, and draws new pictures by sample.py. Folders inside FOLDER are the classes; images that lie directly
in it are one class. Nothing in FOLDER is changed: training reads small copies in the output folder. The same
command goes on where an earlier one was stopped.

Read it from `main`. Torch is imported by the commands that it runs, not here.

Exit codes are those of train.py: 0 done, 1 an error that the last line names, 2 wrong flags, 75 stopped.
"""
import argparse
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from configs.options import REPO, OneLineParser
from configs.training import SMALL_PYRAMIDS
from utils.console import one_line_errors
from utils.files import atomic_path, lock_folder, read_json, write_text
from utils.images import ImageError, is_data, read_image
from utils.machine import available_cpus
from utils.stop import Stopped, StopRequest

IMAGES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
STRIDE = 8             # of the tokenizer, in pixels
MARGIN = 1.5           # the shorter side of a copy over the side of the training images
MOST_HELD_OUT = 200    # photos for validation, in all classes together
STEPS_PER_EPOCH = 100  # at least: a checkpoint and an evaluation follow every epoch
MOST_PASSES = 300      # of a generator over the photos: after that it knows them by heart
TRIAL_STEPS = 8
FEWEST_STEPS = 300     # of either stage; with fewer, smaller pictures are proposed
GOOD_STEPS = 1000      # of a generator; with more, a deeper one is proposed
TOKENIZER_SHARE = 0.4  # of the time for both stages
PICTURE_SECONDS = 180  # between two pictures of a training
REPORT_SECONDS = 20    # between two lines of a training
NUM_SAMPLES = 64       # of the last picture


@dataclass(frozen=True)
class Shape:
    """What is trained at a size."""
    size: int             # pixels per side
    depth: int            # of the VAR, whose width is 64 * depth
    tokenizer_batch: int  # images per step
    generator_batch: int

    @property
    def pn(self) -> str:
        """Sides of the code maps."""
        return SMALL_PYRAMIDS[self.size // STRIDE]


# With the depth whose steps are measured first.
ON_CPU = [Shape(32, 4, 32, 64), Shape(48, 4, 32, 32), Shape(64, 4, 32, 32), Shape(96, 4, 16, 16),
          Shape(128, 4, 16, 16)]
ON_GPU = [Shape(32, 8, 64, 128), Shape(48, 8, 64, 128), Shape(64, 8, 64, 128), Shape(96, 8, 64, 64),
          Shape(128, 8, 64, 64)]
DEPTHS = (3, 4, 5, 6, 8, 10, 12)
USUAL_SIZE = {False: 64, True: 128}  # by whether there is a GPU
USUAL_MINUTES = 30.
SIZES = [shape.size for shape in ON_CPU]


class Speed(NamedTuple):
    """What a trial has measured of a stage, in seconds."""
    step: float
    start: float  # of the program, until its first step


@dataclass
class Plan:
    """What an output folder is for, and how far it is; kept there as photos.json."""
    folder: str
    minutes: float
    on_gpu: bool
    classes: list[str]
    tokenizer_steps: int
    generator_steps: int
    size: int             # this and the next ones are those of `Shape`
    depth: int
    tokenizer_batch: int
    generator_batch: int
    done: list[str] = field(default_factory=list)  # steps that have ended

    @property
    def shape(self) -> Shape:
        return Shape(self.size, self.depth, self.tokenizer_batch, self.generator_batch)


# ---------------------------------------------------------------------------------------------- the command
def main() -> None:
    """Run the command of the command line."""
    began = time.time()
    options = parse(sys.argv[1:])
    folder = Path(options.folder).resolve()
    out = Path(options.out or REPO / 'local_output' / folder.name).resolve()
    if folder in (out, *out.parents):
        raise ValueError(f'the output folder {str(out)!r} lies inside the photos: pass another --out')
    with lock_folder(out):
        plan = earlier_plan(out, options)
        if plan:
            say(f'going on with what was begun in {shown(out)}')
        else:
            with StopRequest() as stop:
                plan = propose(options, out, began, stop)
            if not options.yes and sys.stdin.isatty() and not is_agreed():
                say('nothing was trained; --size=N and --minutes=N ask for something else')
                return
            write_plan(plan, out)
        with StopRequest() as stop:
            train_both(plan, out, stop)
            show(plan, out, began, stop)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; what cannot be right ends the program."""
    usage = 'python -m recipes.photos FOLDER [--size=N] [--minutes=N] [--out=FOLDER] [--yes]'
    parser = OneLineParser(prog='recipes.photos', usage=usage, description=__doc__.partition('\n')[0])
    parser.add_argument('folder', help='photos, directly or in a folder for each class')
    parser.add_argument('--size', type=int, choices=SIZES,
                        help='pixels per side of the pictures (default: what fits photos, machine and time)')
    parser.add_argument('--minutes', type=float, help='time for all of it (default: 30)')
    parser.add_argument('--out', help='output folder (default: local_output/<name of FOLDER>)')
    parser.add_argument('--yes', action='store_true', help='begin without asking')
    options = parser.parse_args(argv)
    if not Path(options.folder).is_dir():
        parser.error(f'expected a folder of photos, found none at {options.folder!r}: check the path')
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        parser.error(f'--minutes must be above 0, got {options.minutes:g}')
    return options


def say(text: str) -> None:
    print(text, flush=True)


def shown(path: Path) -> str:
    """A path as a person would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def earlier_plan(out: Path, options: argparse.Namespace) -> Plan | None:
    """The plan that an earlier command has begun here, if there is one.

    Raises:
        ValueError: it is one for other photos, another size or another time.
    """
    try:
        plan = Plan(**read_json(out / 'photos.json'))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f'cannot read {out / "photos.json"} ({error}): pass another --out') from None
    asked = dict(FOLDER=(str(Path(options.folder).resolve()), plan.folder), size=(options.size, plan.size),
                 minutes=(options.minutes, plan.minutes))
    for name, (value, before) in asked.items():
        if value not in (None, before):
            raise ValueError(f'{str(out)!r} was begun with {name}={before}, got {value}: pass the same, or '
                             'another --out')
    return plan


def write_plan(plan: Plan, out: Path) -> None:
    write_text(out / 'photos.json', json.dumps(asdict(plan), indent=2))


def propose(options: argparse.Namespace, out: Path, began: float, stop: StopRequest) -> Plan:
    """Look at the photos, make copies, measure this machine, and say what will be trained.

    Args:
        began: time of the start of this program, from which the minutes count.
    """
    minutes = options.minutes or USUAL_MINUTES
    photos = look_at(Path(options.folder).resolve())
    say(describe(photos))
    on_gpu = has_gpu()
    size = options.size or first_size(photos.short_sides, minutes, on_gpu)
    copies = copy_photos(photos, out, size, stop)
    say(f'copied {sum(map(len, copies.values()))} photos, made smaller, into {shown(out / "data")}')

    # A shorter time than the size needs makes the size smaller, unless somebody asked for it.
    num_train = arrange(copies, out / 'data', ON_GPU if on_gpu else ON_CPU)
    while True:
        shape = shape_of(size, on_gpu)
        speeds = try_out(shape, on_gpu, out, stop)
        seconds_left = 60 * minutes - (time.time() - began)
        shape, speeds = with_depth(shape, *speeds, seconds_left, num_train)
        tokenizer_steps, generator_steps = steps_within(shape, *speeds, seconds_left, num_train)
        fewest = min(tokenizer_steps, generator_steps)
        if options.size or fewest >= FEWEST_STEPS or size == SIZES[0]:
            break
        say(f'in this time, {size}x{size} pixels would get {fewest} steps, which is too few')
        size = SIZES[SIZES.index(size) - 1]
    plan = Plan(
        folder=str(photos.folder),
        minutes=minutes,
        on_gpu=on_gpu,
        classes=list(copies),
        tokenizer_steps=tokenizer_steps,
        generator_steps=generator_steps,
        **asdict(shape),
    )
    say(proposal(plan, *speeds))
    return plan


def is_agreed() -> bool:
    try:
        return input('begin? [Y/n] ').strip().lower() in ('', 'y', 'yes')
    except EOFError:
        return False


# ---------------------------------------------------------------------------------------------- the photos
class Photos(NamedTuple):
    """What a folder holds."""
    folder: Path
    classes: dict[str, list[Path]]  # files that seem to be images, by the name of their class, relative to
    folders: dict[str, Path]        # the folder of that class
    short_sides: list[int]          # pixels, of those whose size can be read
    others: Counter[str]            # number of files of other kinds, by suffix
    left_out: int                   # images beside the class folders


def look_at(folder: Path) -> Photos:
    """Find the images of a folder, by their names, and their sizes.

    Raises:
        ValueError: there are none.
    """
    # A data set for train.py has its photos in train/.
    root = folder / 'train' if (folder / 'train').is_dir() else folder
    others: Counter[str] = Counter()
    loose: list[Path] = []
    classes: dict[str, list[Path]] = {}
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and is_data(entry.name):
            files = [path.relative_to(entry) for path in images_below(entry, others)]
            if files:
                classes[entry.name] = files
        elif is_data(entry.name):
            loose += [path.relative_to(root) for path in keep_image(entry, others)]
    folders = {name: root / name for name in classes}
    if loose and not classes:
        classes[folder.name] = loose
        folders[folder.name] = root
        loose = []
    if sum(map(len, classes.values())) < 2:
        listing = ', '.join(f'{count} {suffix}' for suffix, count in others.most_common(5)) or 'nothing'
        raise ValueError(f'expected at least 2 photos in {str(folder)!r}, found {listing}: images end with '
                         f'{", ".join(IMAGES)}')
    paths = [folders[name] / path for name, files in classes.items() for path in files]
    sides = [side for side in map(short_side, paths) if side]
    return Photos(folder, classes, folders, sides, others, len(loose))


def images_below(folder: Path, others: Counter[str]) -> Iterator[Path]:
    """Images of a folder and of all folders in it, sorted; files of other kinds are counted."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if is_data(name))
        for name in sorted(names):
            if is_data(name):
                yield from keep_image(Path(parent) / name, others)


def keep_image(path: Path, others: Counter[str]) -> list[Path]:
    """The file, if its name is that of an image; else it is counted."""
    if path.suffix.lower() in IMAGES:
        return [path]
    others[path.suffix.lower() or 'without suffix'] += 1
    return []


def short_side(path: Path) -> int:
    """Pixels of the shorter side, from the head of the file alone; 0 if that cannot be read."""
    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception:  # damaged headers make Pillow's readers raise anything; copying names the file
        return 0


def describe(photos: Photos) -> str:
    """What was found, in a few lines."""
    counts = {name: len(files) for name, files in photos.classes.items()}
    listing = ', '.join(f'{name} {count}' for name, count in list(counts.items())[:10])
    more = f' and {len(counts) - 10} others' if len(counts) > 10 else ''
    what = f'{len(counts)} classes ({listing}{more})' if len(counts) > 1 else 'one class'
    lines = [f'found {sum(counts.values())} photos of {what}']
    if photos.short_sides:
        sides = sorted(photos.short_sides)
        lines[0] += f'; their shorter sides have {sides[0]} to {sides[-1]} pixels'
    if photos.others:
        kinds = ', '.join(f'{count} {suffix}' for suffix, count in photos.others.most_common(8))
        lines.append(f'left out, since they are no images: {kinds}')
        if photos.others['.heic']:
            lines.append('photos in HEIC must be saved as JPEG first')
    if photos.left_out:
        lines.append(f'left out: {photos.left_out} images beside the class folders')
    return '\n'.join(lines)


def copy_photos(photos: Photos, out: Path, size: int, stop: StopRequest) -> dict[str, list[Path]]:
    """Copies of all photos that can be read, upright and small, which take no time to load; by class.

    Copies that an earlier command has made are kept.
    """
    side = math.ceil(MARGIN * size)
    folder = out / 'data' / f'copies_{side}'
    copies: dict[str, list[Path]] = {}
    unreadable = []
    with ThreadPoolExecutor(available_cpus()) as threads:
        for name, files in photos.classes.items():
            sources = [photos.folders[name] / path for path in files]
            targets = [folder / name / path.with_name(f'{path.name}.jpg') for path in files]
            problems = list(threads.map(partial(copy_small, side=side, stop=stop), sources, targets))
            unreadable += [problem for problem in problems if problem]
            copies[name] = [target for target, problem in zip(targets, problems, strict=True) if not problem]
    stop_if_asked(stop, out)
    if unreadable:
        say(f'left out, since they cannot be read ({len(unreadable)}):')
        for problem in unreadable[:20]:
            say(f'  {problem}')
    copies = {name: files for name, files in copies.items() if files}
    if sum(map(len, copies.values())) < 2:
        raise ValueError('expected at least 2 photos that can be read: add some')
    return copies


def copy_small(source: Path, target: Path, side: int, stop: StopRequest) -> str:
    """Write an image with a shorter side of at most `side` pixels; '', or why the image cannot be read."""
    if stop or target.exists():
        return ''
    try:
        image = read_image(source)
    except ImageError as error:
        return str(error)
    scale = side / min(image.size)
    if scale < 1:
        width, height = (max(round(scale * pixels), side) for pixels in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        image.save(temporary, format='JPEG', quality=95, subsampling=0)
    return ''


def arrange(copies: dict[str, list[Path]], folder: Path, shapes: list[Shape]) -> int:
    """Make train/<class>/ and val/<class>/ of the copies, as names of the same files.

    Every training photo has several names there, so that an epoch, after which there is a checkpoint, takes
    more than a moment.

    Returns:
        Number of training photos.
    """
    held_out, trained = split(copies)
    num_train = sum(map(len, trained.values()))
    batch = max(shape.generator_batch for shape in shapes)
    repeats = math.ceil(STEPS_PER_EPOCH * batch / num_train)
    for name in ('train', 'val'):
        shutil.rmtree(folder / name, ignore_errors=True)
    for part, files_of, times in (('val', held_out, 1), ('train', trained, repeats)):
        for name, files in files_of.items():
            target = folder / part / name
            target.mkdir(parents=True)
            for i, path in enumerate(files):
                for copy in range(times):
                    link(path, target / f'{i:06d}_{copy:04d}.jpg')
    return num_train


def link(source: Path, target: Path) -> None:
    """Give a file a second name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def split(copies: dict[str, list[Path]]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """(held out for validation, trained) of every class: a tenth, but at least one photo, is held out.

    A single photo is both.
    """
    most = max(MOST_HELD_OUT // len(copies), 1)
    held_out = {}
    trained = {}
    for name, files in copies.items():
        count = min(max(len(files) // 10, 1), most)
        chosen = range(0, len(files), len(files) // count)[:count]
        held_out[name] = [files[i] for i in chosen]
        rest = [path for i, path in enumerate(files) if i not in chosen]
        trained[name] = rest or files
    return held_out, trained


# ---------------------------------------------------------------------------------------------- the proposal
def has_gpu() -> bool:
    """Whether torch finds a GPU; it is asked in a process of its own, which gives the GPU back."""
    code = 'import torch; print(torch.cuda.is_available())'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    return 'True' in done.stdout


def first_size(short_sides: list[int], minutes: float, on_gpu: bool) -> int:
    """The largest sensible size: no larger than most photos, and smaller where there is little time."""
    size = USUAL_SIZE[on_gpu]
    if minutes < 5 and not on_gpu:
        size = SIZES[0]
    typical = statistics.median(short_sides or [size])
    return max([side for side in SIZES if side <= min(size, typical)] or SIZES[:1])


def shape_of(size: int, on_gpu: bool) -> Shape:
    """What is trained at a size."""
    return next(shape for shape in (ON_GPU if on_gpu else ON_CPU) if shape.size == size)


def with_depth(shape: Shape, tokenizer: Speed, generator: Speed, seconds: float,
               num_train: int) -> tuple[Shape, tuple[Speed, Speed]]:
    """The shape with the largest depth that still gets many steps, and its speeds.

    Args:
        generator: measured at the depth of `shape`; the time of a step grows with the cube of the depth, as
            the width does with the depth.
        seconds, num_train: see `steps_within`.
    """
    found = []
    for depth in DEPTHS:
        other = replace(shape, depth=depth)
        slower = generator._replace(step=generator.step * (depth / shape.depth) ** 3)
        _, steps = steps_within(other, tokenizer, slower, seconds, num_train)
        found.append((other, (tokenizer, slower), steps))
    good = [(other, speeds) for other, speeds, steps in found if steps >= min(GOOD_STEPS, found[0][2])]
    return good[-1]


def steps_within(shape: Shape, tokenizer: Speed, generator: Speed, seconds: float,
                 num_train: int) -> tuple[int, int]:
    """(tokenizer, generator) steps that fit into a time, drawing included; at least a few in any case.

    Args:
        num_train: photos; of few of them, a generator needs no more than some hundred passes.
    """
    starts = tokenizer.start + 2 * generator.start
    seconds = max(0.95 * (seconds - starts), 0.)
    most = max(MOST_PASSES * num_train // shape.generator_batch, 2 * FEWEST_STEPS)
    fewest = TRIAL_STEPS
    generator_steps = int((1 - TOKENIZER_SHARE) * seconds / generator.step)
    generator_steps = min(max(generator_steps, fewest), most)

    # A tokenizer may see the photos more often: what it learns of pixels does not become memory of photos.
    tokenizer_steps = int(TOKENIZER_SHARE * seconds / tokenizer.step)
    most_for_tokenizer = 4 * most * shape.generator_batch // shape.tokenizer_batch
    return min(max(tokenizer_steps, fewest), most_for_tokenizer), generator_steps


def proposal(plan: Plan, tokenizer: Speed, generator: Speed) -> str:
    """What will be trained, for how long."""
    machine = 'its GPU' if plan.on_gpu else f'{available_cpus()} CPU cores'
    seconds = plan.tokenizer_steps * tokenizer.step + plan.generator_steps * generator.step
    minutes = (seconds + tokenizer.start + 2 * generator.start) / 60
    return (f'plan for this machine ({machine}): pictures of {plan.size}x{plan.size} pixels, in maps of '
            f'{plan.shape.pn.replace("_", ", ")} codes per side\n'
            f'  tokenizer: {plan.tokenizer_steps} steps of {plan.tokenizer_batch} photos, '
            f'{tokenizer.step:.2f} s each\n'
            f'  VAR of depth {plan.depth}: {plan.generator_steps} steps of {plan.generator_batch} photos, '
            f'{generator.step:.2f} s each\n'
            f'  about {minutes:.0f} minutes in all')


def try_out(shape: Shape, on_gpu: bool, out: Path, stop: StopRequest) -> tuple[Speed, Speed]:
    """Measure a few steps of both stages, by the very commands that follow."""
    trial = out / 'trial'
    shutil.rmtree(trial, ignore_errors=True)
    say(f'measuring a few steps at {shape.size}x{shape.size} pixels ...')
    speeds = []
    for command in (tokenizer_command(shape, out, trial, TRIAL_STEPS),
                    generator_command(shape, on_gpu, out, trial, TRIAL_STEPS)):
        began = time.time()
        run(command, stop, out)
        seconds = time.time() - began
        folder = Path(command[-1].partition('=')[2])
        # The first line of an epoch is that of its first step, which includes the start of the loaders.
        lines = re.findall(r'\[ *(\d+)/\d+\]  eta.*  time: ([\d.]+)', (folder / 'stdout.txt').read_text())
        times = [float(text) for number, text in lines if number != '0']
        step = statistics.median(times)
        speeds.append(Speed(step, max(seconds - TRIAL_STEPS * step, 0.)))
    shutil.rmtree(trial, ignore_errors=True)
    return tuple(speeds)


# ---------------------------------------------------------------------------------------------- the training
def tokenizer_command(shape: Shape, out: Path, folder: Path, steps: int) -> list[str]:
    """Of the first stage, into `folder`/tokenizer."""
    return entry('train.py', '--model=vqvae', '--preset=tiny', *common_flags(shape, out, steps),
                 f'--bs={shape.tokenizer_batch}', '--lpips=pyramid', '--lpips_min=32',
                 f'--output_dir={folder / "tokenizer"}')


def generator_command(shape: Shape, on_gpu: bool, out: Path, folder: Path, steps: int) -> list[str]:
    """Of the second stage, into `folder`/generator."""
    # The peak learning rate is 1.5e-3 for narrow models and 64 photos; --tblr is meant for 256 photos.
    peak = 1.5e-3 * min(4 / shape.depth, 1) * (shape.generator_batch / 64) ** 0.5
    rate = peak * 256 / shape.generator_batch
    return entry('train.py', *common_flags(shape, out, steps), f'--bs={shape.generator_batch}',
                 f'--depth={shape.depth}', f'--tblr={rate:g}', '--alng=1e-2', '--ema=0.99',
                 f'--fp16={2 if on_gpu else 0}', f'--vae_ckpt={folder / "tokenizer" / "vae-ckpt-last.pth"}',
                 f'--output_dir={folder / "generator"}')


def common_flags(shape: Shape, out: Path, steps: int) -> list[str]:
    return [f'--data_path={out / "data"}', f'--image_size={shape.size}', f'--pn={shape.pn}',
            f'--patch_size={STRIDE}', '--hflip=1', '--mid_reso=1.125', '--seed=0', f'--steps={steps}',
            '--eval_every=1', '--save_every=2m', '--workers=-1']


def entry(script: str, *flags: str) -> list[str]:
    return [sys.executable, str(REPO / script), *flags]


def train_both(plan: Plan, out: Path, stop: StopRequest) -> None:
    """Both stages, each unless it is done."""
    stages = {
        'tokenizer': (tokenizer_command(plan.shape, out, out, plan.tokenizer_steps), plan.tokenizer_steps),
        'generator': (generator_command(plan.shape, plan.on_gpu, out, out, plan.generator_steps),
                      plan.generator_steps),
    }
    for name, (command, steps) in stages.items():
        if name in plan.done:
            continue
        say(f'training the {name}, {steps} steps; its log is {shown(out / name / "stdout.txt")}')
        run(command, stop, out, Watch(plan, out, name, steps))
        plan.done.append(name)
        write_plan(plan, out)


class Watch:
    """Lines about a training that runs, and a picture now and then, made beside it."""

    def __init__(self, plan: Plan, out: Path, name: str, steps: int):
        self.plan = plan
        self.out = out
        self.name = name
        self.steps = steps
        self.last_report = time.time()
        self.last_picture = time.time()
        self.shown_step = -1
        self.began: tuple[float, int] | None = None  # (time, step) of the first line of this start
        self.drawing: subprocess.Popen | None = None

    def look(self) -> None:
        """Called every moment while the training runs."""
        if time.time() - self.last_report >= REPORT_SECONDS:
            self.last_report = time.time()
            self.report()
        checkpoint = self.checkpoint()
        is_drawing = self.drawing is not None and self.drawing.poll() is None
        is_due = time.time() - self.last_picture >= PICTURE_SECONDS
        if is_due and not is_drawing and checkpoint.exists():
            self.last_picture = time.time()
            self.drawing = subprocess.Popen(picture_command(self.plan, self.out, self.name),
                                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def checkpoint(self) -> Path:
        prefix = 'vae' if self.name == 'tokenizer' else 'ar'
        return self.out / self.name / f'{prefix}-ckpt-last.pth'

    def report(self) -> None:
        """Say how far the training is."""
        line = last_line(self.out / self.name / 'steps.jsonl')
        step = line.get('step', -1) + 1
        if step <= self.shown_step or not step:
            return
        self.shown_step = step
        now = time.time()
        if self.began is None:
            self.began = now, step
        since, first = self.began
        left = ''
        if step > first:
            left = f', {clock((now - since) / (step - first) * (self.steps - step))} left'
        if 'psnr' in line:
            score = f'PSNR of the copies {line["psnr"]:.1f} dB'
        else:
            score = f'loss {line["L_mean"]:.2f}, {line["acc_mean"]:.0f} % of the codes right'
        say(f'{self.name}: step {step} of {self.steps}{left}; {score}')

    def end(self) -> None:
        """Wait for a picture that is being made."""
        if self.drawing is not None:
            self.drawing.wait()


def picture_command(plan: Plan, out: Path, name: str) -> list[str]:
    """What shows how good a stage is by now: reconstructions of held-out photos, or a few new pictures."""
    if name == 'tokenizer':
        return entry('evaluate.py', 'tokenizer', f'--ckpt={out / name / "vae-ckpt-last.pth"}',
                     f'--data_path={out / "data"}', '--num_images=8', '--metrics=psnr', '--workers=0',
                     f'--pictures={out / "pictures"}')
    return sample_command(plan, out, out / 'pictures' / 'samples', 32)


def sample_command(plan: Plan, out: Path, output: Path, num_images: int) -> list[str]:
    """New pictures, with guidance towards the class where there are several."""
    cfg = 1.5 if len(plan.classes) > 1 else 0
    return entry('sample.py', f'--ckpt={out / "generator" / "ar-ckpt-last.pth"}',
                 f'--num_images={num_images}', f'--cfg={cfg:g}', '--top_p=0.95', '--overwrite',
                 f'--output={output}')


def last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a log of JSON lines; {} without one."""
    try:
        with path.open('rb') as file:
            file.seek(max(path.stat().st_size - 20_000, 0))
            lines = file.read().decode(errors='replace').splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return {}


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


# ---------------------------------------------------------------------------------------------- processes
def run(command: list[str], stop: StopRequest, out: Path, watch: Watch | None = None) -> None:
    """Run a command of this project to its end; a signal to this program ends both in order.

    Raises:
        ValueError: it has failed; the message is the last line that it wrote about that.
        Stopped: a signal came.
    """
    errors = out / 'errors.txt'
    with errors.open('wb') as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, cwd=REPO)
        is_told = False
        while process.poll() is None:
            if stop and not is_told:
                is_told = True
                process.terminate()
            if watch and not stop:
                watch.look()
            time.sleep(0.2)
    if watch:
        watch.end()
    stop_if_asked(stop, out)
    lines = errors.read_text(errors='replace').strip().splitlines()
    if process.returncode:
        raise ValueError(lines[-1] if lines else f'{Path(command[1]).name} ended with {process.returncode}')
    errors.unlink()


def stop_if_asked(stop: StopRequest, out: Path) -> None:
    """End this program if a signal came.

    Raises:
        Stopped: one has.
    """
    if stop:
        raise Stopped(f'stopped by {stop.signal_name}; everything is saved in {out}, run the same command '
                      'again to go on')


def show(plan: Plan, out: Path, began: float, stop: StopRequest) -> None:
    """Draw the last pictures, and say how to draw more."""
    if 'samples' not in plan.done:
        say(f'drawing {NUM_SAMPLES} pictures ...')
        run(sample_command(plan, out, out / 'samples', NUM_SAMPLES), stop, out)
        run(picture_command(plan, out, 'tokenizer'), stop, out)
        plan.done.append('samples')
        write_plan(plan, out)
    more = sample_command(plan, out, out / 'more', 100)
    more[:2] = ['python', shown(REPO / 'sample.py')]
    if len(plan.classes) > 1:
        more.append(f'--classes={plan.classes[0]}')
    say(f'done after {clock(time.time() - began)}: look at {shown(out / "samples.png")}\n'
        f'held-out photos, as the tokenizer keeps them: {shown(out / "pictures" / "reconstructions.png")}\n'
        f'more pictures: {shlex.join(more)}')


if __name__ == '__main__':
    with one_line_errors('recipes.photos'):
        main()
