"""Your own photos in one command: `python -m recipes.photos FOLDER`.

It looks at the photos, measures this machine, says what it will train and how long that takes, trains a
tokenizer and a VAR by train.py, and draws new pictures by sample.py. Folders in FOLDER are the classes, and
photos that lie directly in it have none. Nothing in FOLDER is changed: training reads small copies. The same
command goes on where an earlier one was stopped or killed.

Exit codes are those of train.py: 0 done, 1 an error that the last line names, 2 wrong flags, 75 stopped.
Read it from `main`. Torch is imported by the commands that it runs, not here.
"""
import dataclasses
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from configs.options import INF, REPO, check_values, expand_paths, ints, opt, parse_settings
from configs.training import SMALL_PYRAMIDS
from utils.console import one_line_errors
from utils.files import atomic_path, lock_folder, read_json, write_text
from utils.images import ImageError, files_below, read_image
from utils.machine import available_cpus
from utils.stop import Stopped, StopRequest

PHOTO_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')  # of photos
STRIDE = 8             # pixels per side of a code
SIZES = tuple(STRIDE * side for side in SMALL_PYRAMIDS)
MARGIN = 1.125         # shorter side of a copy over the side of the crops that training takes of it
VAL_SPLIT = 0.1        # of the photos of a class, for validation
MOST_NAMED = 20        # photos that cannot be read
MOST_CACHED = 20_000   # photos whose copies training keeps in memory
TRIAL_PHOTOS = 16      # by which this machine is measured
TRIAL_STEPS = 10       # of either stage
TOKENIZER_SHARE = 0.4  # of the time
FEWEST_STEPS = 500     # of either stage: where there is no time for them, pictures are smaller
GOOD_STEPS = 1500      # of the VAR: where there is time for more, it is deeper
MOST_PASSES = 300      # of the VAR over the photos: later it would know them by heart
PEAK_RATE = 1e-3       # learning rate of a VAR of depth 4 or less
NUM_PARTS = 3          # of a training, each of which ends with pictures
NUM_PICTURES = 64      # of the last sheet
# What a stage leaves last, in its folder.
MARKS = dict(tokenizer='vae-export.pth', generator='model/config.json')


@dataclass(frozen=True)
class Settings:
    """Settings of `python -m recipes.photos`."""

    folder: str = opt('', 'photos, directly or in a folder for each class', positional=True, path=True)
    size: int = opt(0, 'pixels per side of the pictures; 0 takes what suits photos, machine and time',
                    choices=(0, *SIZES))
    minutes: float = opt(15., 'time for the training of both stages, at most', limits=(0.1, INF))
    out: str = opt('', 'output folder; empty is local_output/photos/<name of FOLDER>', path=True)
    dry_run: bool = opt(False, 'say what would be trained, and end')

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        if not self.folder:
            raise ValueError('expected a folder of photos: python -m recipes.photos FOLDER')
        if not Path(self.folder).is_dir():
            raise ValueError(f'expected a folder of photos, found none at {self.folder!r}: correct the path')
        if self.photos_folder in (self.output, *self.output.parents):
            raise ValueError(f'the output folder {str(self.output)!r} lies among the photos: pass another '
                             '--out')

    @property
    def photos_folder(self) -> Path:
        return Path(self.folder).resolve()

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.out or REPO / 'local_output' / 'photos' / self.photos_folder.name).resolve()


@dataclass(frozen=True)
class Plan:
    """What is trained on the photos of a folder; the output folder keeps it as plan.json."""

    folder: str
    num_photos: int
    size: int       # pixels per side
    depth: int      # of the VAR, whose width is 64 times its depth
    batch: int      # photos per step
    precision: int  # of the VAR, as --fp16
    tokenizer_steps: int = TRIAL_STEPS
    generator_steps: int = TRIAL_STEPS

    @property
    def pn(self) -> str:
        """Sides of the code maps, as --pn."""
        return SMALL_PYRAMIDS[self.size // STRIDE]

    @property
    def num_codes(self) -> int:
        """Codes of an image, in all maps together."""
        return sum(side ** 2 for side in ints(self.pn))


# ---------------------------------------------------------------------------------------------- the command
def main() -> None:
    """Do what the command line asks for."""
    began = time.time()
    settings = parse_settings(Settings, sys.argv[1:], 'recipes.photos', __doc__)
    photos = find_photos(settings.photos_folder)
    say(describe(photos))
    if settings.dry_run:
        propose(settings, photos)
        return
    out = settings.output
    with lock_folder(out):
        plan = earlier_plan(settings)
        if plan:
            say(f'going on with what was begun in {shown(out)}')
        else:
            plan = propose(settings, photos)
            write_text(out / 'plan.json', json.dumps(dataclasses.asdict(plan), indent=2))
        copy_photos(photos, out, plan.size)
        train('tokenizer', tokenizer_command(plan, out), out)
        train('generator', generator_command(plan, out), out)
        say(f'drawing {NUM_PICTURES} pictures')
        run(program(
            'sample.py',
            *sampling_flags(),
            f'--ckpt={weights_in(out)}',
            f'--num_images={NUM_PICTURES}',
            f'--output={out / "samples"}',
        ))
    minutes = (time.time() - began) / 60
    say(f'done after {minutes:.1f} minutes, the pictures are in {shown(out / "samples.png")}')
    say(f'for more of them: {shlex.join(command_for_more(photos, out))}')


def say(text: str) -> None:
    """Print a line at once, also into a file."""
    print(text, flush=True)


def shown(path: Path) -> str:
    """A path as a person would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def earlier_plan(settings: Settings) -> Plan | None:
    """The plan that an earlier command has made here, if there is one.

    Raises:
        ValueError: it is one for other photos or another size, or cannot be read.
    """
    path = settings.output / 'plan.json'
    try:
        plan = Plan(**read_json(path))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f'cannot read {str(path)!r} ({error}): pass another --out') from None
    if plan.folder != str(settings.photos_folder):
        raise ValueError(f'{str(settings.output)!r} is for the photos in {plan.folder!r}: pass another --out')
    if settings.size not in (0, plan.size):
        raise ValueError(f'{str(settings.output)!r} was begun with --size={plan.size}, got {settings.size}: '
                         'pass the same, or another --out')
    return plan


# ---------------------------------------------------------------------------------------------- the photos
class Photos(NamedTuple):
    """What a folder holds."""

    folder: Path
    classes: dict[str, list[Path]]  # paths of the photos below the folder, by class; '' where there is none
    others: Counter[str]            # number of files that are no images, by suffix
    left_out: int                   # images beside the folders of the classes

    @property
    def count(self) -> int:
        return sum(map(len, self.classes.values()))

    def paths(self) -> list[Path]:
        """Paths of all photos below the folder."""
        return [path for paths in self.classes.values() for path in paths]


def find_photos(folder: Path) -> Photos:
    """Find the images of a folder by their names.

    Raises:
        ValueError: there are none, or too few, or the folder is a data set for train.py.
    """
    for name in ('train', 'val'):
        if (folder / name).is_dir():
            raise ValueError(f'{str(folder)!r} holds {name}/, as data sets for train.py do: pass '
                             f'{str(folder / "train")!r}, of which a tenth is held out')
    others: Counter[str] = Counter()
    classes: dict[str, list[Path]] = {}
    paths = [Path(parent, name) for parent, names in files_below(str(folder)) for name in names]
    for path in sorted(paths):
        if path.suffix.lower() not in PHOTO_SUFFIXES:
            others[path.suffix.lower() or 'without suffix'] += 1
            continue
        below = path.relative_to(folder)
        name = below.parts[0] if len(below.parts) > 1 else ''
        classes.setdefault(name, []).append(below)
    loose = classes.pop('', [])
    if not classes:
        classes = {'': loose}
        loose = []
    photos = Photos(folder, classes, others, len(loose))
    if max(map(len, classes.values())) < 2:
        found = ', '.join(f'{count} {suffix}' for suffix, count in others.most_common(5))
        raise ValueError(f'expected at least 2 photos of a class in {str(folder)!r}, found {photos.count}'
                         f'{f" and {found}" if found else ""}: images end with {", ".join(PHOTO_SUFFIXES)}')
    return photos


def describe(photos: Photos) -> str:
    """What was found, in a few lines."""
    listing = [f'{name} {len(paths)}' for name, paths in photos.classes.items()]
    more = f' and {len(listing) - 10} others' if len(listing) > 10 else ''
    lines = [f'{photos.count} photos without classes']
    if '' not in photos.classes:
        number = f'{len(listing)} classes' if len(listing) > 1 else '1 class'
        lines = [f'{photos.count} photos of {number}: {", ".join(listing[:10])}{more}']
    if photos.left_out:
        lines.append(f'left out, since they lie beside the folders of the classes: {photos.left_out} images')
    if photos.others:
        kinds = ', '.join(f'{count} {suffix}' for suffix, count in photos.others.most_common(8))
        lines.append(f'left out, since they are no images: {kinds}')
    if photos.others['.heic']:
        lines.append('photos in HEIC must be saved as JPEG first')
    return '\n'.join(lines)


def short_side(path: Path) -> int:
    """Pixels of the shorter side of an image, from the head of its file; 0 if that cannot be read."""
    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception:  # damaged heads make Pillow's readers raise anything; `copy_photos` names the file
        return 0


def copy_photos(photos: Photos, out: Path, size: int) -> None:
    """Write small, upright copies into photos/train of the output folder; those that are there stay.

    Args:
        size: pixels per side of the crops that training takes of them.
    Raises:
        ValueError: no photo can be read, or a single one.
    """
    say('making small copies of the photos')
    sources = [photos.folder / path for path in photos.paths()]
    copies = [out / 'photos' / 'train' / path.with_name(f'{path.name}.png') for path in photos.paths()]
    with ThreadPoolExecutor(available_cpus()) as threads:
        results = list(threads.map(partial(copy_small, side=round(MARGIN * size)), sources, copies))
    problems = [problem for problem in results if problem]
    for problem in problems[:MOST_NAMED]:
        say(f'left out: {problem}')
    if len(problems) > MOST_NAMED:
        say(f'left out: {len(problems) - MOST_NAMED} others that cannot be read')
    if len(copies) - len(problems) < 2:
        raise ValueError(f'expected at least 2 photos that can be read in {str(photos.folder)!r}: add some')


def copy_small(source: Path, target: Path, side: int) -> str:
    """Write an image with a shorter side of at most `side` pixels; '', or why the image cannot be read."""
    if target.exists():
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
        image.save(temporary, format='PNG')
    return ''


# ---------------------------------------------------------------------------------------------- the proposal
class Machine(NamedTuple):
    """What suits a kind of machine."""

    name: str
    size: int                # pixels per side, at most
    depths: tuple[int, ...]  # of the VAR; the first one is measured
    batch: int
    precision: int


CPU = Machine('CPU', 64, (3, 4, 5, 6), 16, 0)
GPU = Machine('GPU', 128, (8, 10, 12), 64, 2)


@dataclass(frozen=True)
class Speed:
    """How fast a machine is: seconds of a few steps of a plan, from which those of other plans follow."""

    plan: Plan
    tokenizer: float  # of a step
    generator: float  # of a step
    start: float      # of the program of a stage, until its first step and after its last one

    def tokenizer_step(self, plan: Plan) -> float:
        """Seconds of a step of the tokenizer of a plan, which are those of its pixels."""
        return self.tokenizer * (plan.size / self.plan.size) ** 2

    def generator_step(self, plan: Plan) -> float:
        """Seconds of a step of the VAR of a plan: they grow with its codes, its width and its depth.

        This is rather too long for a deeper VAR, as some of the work does not grow that fast.
        """
        return self.generator * plan.num_codes / self.plan.num_codes * (plan.depth / self.plan.depth) ** 3

    def minutes(self, plan: Plan) -> float:
        """Minutes that a plan takes, with the pictures in between, which share the CPU with a training."""
        starts = 2 * (1 + NUM_PARTS) * self.start
        steps = (plan.tokenizer_steps * self.tokenizer_step(plan)
                 + plan.generator_steps * self.generator_step(plan))
        return (starts + steps) / 60


def propose(settings: Settings, photos: Photos) -> Plan:
    """Measure this machine, and say what will be trained."""
    machine = GPU if has_gpu() else CPU
    say(f'measuring a few steps on this machine ({available_cpus()} CPUs'
        f'{", and a GPU" if machine is GPU else ""})')
    speed = measure(machine, photos)
    sides = [short_side(photos.folder / path) for path in photos.paths()]
    plan = plan_for(settings, machine, int(statistics.median(sides)), speed)
    say(f'the plan, for about {speed.minutes(plan):.0f} minutes:\n'
        f'  pictures of {plan.size}x{plan.size} pixels, in maps of {plan.pn.replace("_", ", ")} codes '
        'a side\n'
        f'  a tokenizer: {plan.tokenizer_steps} steps of {plan.batch} photos, '
        f'{speed.tokenizer_step(plan):.2f} s each\n'
        f'  a VAR of depth {plan.depth}: {plan.generator_steps} steps of {plan.batch} photos, '
        f'{speed.generator_step(plan):.2f} s each')
    return plan


def has_gpu() -> bool:
    """Whether torch finds a GPU; it is asked in a process of its own."""
    code = 'import torch; print(torch.cuda.is_available())'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    return done.stdout.strip() == 'True'


def measure(machine: Machine, photos: Photos) -> Speed:
    """How fast both stages are, by a few steps of the very commands that train them, on a few photos."""
    plan = Plan(
        folder=str(photos.folder),
        num_photos=photos.count,
        size=machine.size,
        depth=machine.depths[0],
        batch=machine.batch,
        precision=machine.precision,
    )
    few = [photos.folder / path for path in photos.paths()[::math.ceil(photos.count / TRIAL_PHOTOS)]]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        for i, path in enumerate(few):
            copy_small(path, out / 'photos' / 'train' / f'{i}.png', round(MARGIN * plan.size))
        trial = dataclasses.replace(plan, num_photos=len(few))
        began = time.time()
        tokenizer = seconds_per_step(tokenizer_command(trial, out), out / 'tokenizer')
        generator = seconds_per_step(generator_command(trial, out), out / 'generator')
        starts = time.time() - began - TRIAL_STEPS * (tokenizer + generator)
    return Speed(plan, tokenizer, generator, max(starts, 0.) / 2)


def seconds_per_step(command: list[str], folder: Path) -> float:
    """Run a training of a few steps, and see in the logs in its folder how long a step has taken."""
    run([*command, '--after_save='])
    seconds = [float(text) for text in re.findall(r'  time: ([\d.]+)', (folder / 'stdout.txt').read_text())]
    # The first steps also warm up.
    return statistics.median(seconds[len(seconds) // 2:])


def plan_for(settings: Settings, machine: Machine, short_side: int, speed: Speed) -> Plan:
    """What a machine can train on these photos in the time that there is.

    That is the largest size at which both stages make `FEWEST_STEPS`, and then the largest depth at which
    the VAR makes `GOOD_STEPS`.

    Args:
        short_side: pixels of the shorter side of a typical photo, than which no picture is larger.
        speed: of this machine, with a plan for the same photos.
    """
    sizes = [settings.size]
    if not settings.size:
        sizes = [size for size in SIZES if size <= min(machine.size, short_side)] or [SIZES[0]]
    for size in reversed(sizes):
        plan = with_steps(dataclasses.replace(speed.plan, size=size), settings.minutes, speed)
        if min(plan.tokenizer_steps, plan.generator_steps) >= FEWEST_STEPS:
            break
    for depth in machine.depths[1:]:
        deeper = with_steps(dataclasses.replace(plan, depth=depth), settings.minutes, speed)
        if deeper.generator_steps >= GOOD_STEPS:
            plan = deeper
    return plan


def with_steps(plan: Plan, minutes: float, speed: Speed) -> Plan:
    """The same plan with the numbers of steps that fit into a time, but some steps in any case."""
    no_steps = dataclasses.replace(plan, tokenizer_steps=0, generator_steps=0)
    seconds = 60 * (minutes - speed.minutes(no_steps))
    tokenizer_steps = int(TOKENIZER_SHARE * seconds / speed.tokenizer_step(plan))
    generator_steps = int((1 - TOKENIZER_SHARE) * seconds / speed.generator_step(plan))

    # Of few photos there is no more to learn after some hundred passes. A tokenizer may see them more often:
    # what it learns of pixels does not become memory of photos.
    most = max(MOST_PASSES * plan.num_photos // plan.batch, GOOD_STEPS)
    return dataclasses.replace(
        plan,
        tokenizer_steps=min(max(tokenizer_steps, TRIAL_STEPS), 4 * most),
        generator_steps=min(max(generator_steps, TRIAL_STEPS), most),
    )


# ---------------------------------------------------------------------------------------------- the commands
def tokenizer_command(plan: Plan, out: Path) -> list[str]:
    """The training of the tokenizer, with pictures of held-out photos and what it keeps of them."""
    picture = program(
        'evaluate.py',
        'tokenizer',
        *data_flags(out),
        '--num_images=8',
        '--metrics=psnr',
        '--workers=0',
        f'--pictures={out / "pictures"}',
    )
    return program(
        'train.py',
        '--model=vqvae',
        '--preset=tiny',
        '--lpips=pyramid',
        '--lpips_min=32',
        *common_flags(plan, plan.tokenizer_steps, out, picture),
        f'--output_dir={out / "tokenizer"}',
    )


def generator_command(plan: Plan, out: Path) -> list[str]:
    """The training of the VAR, with some of its pictures."""
    picture = program(
        'sample.py',
        *sampling_flags(),
        '--num_images=32',
        '--overwrite',
        '--pack=0',
        f'--output={out / "pictures" / "samples"}',
    )
    # A small VAR learns fast; --tblr is the rate for 256 photos.
    rate = PEAK_RATE * min(4 / plan.depth, 1) * 256 / plan.batch
    return program(
        'train.py',
        f'--depth={plan.depth}',
        f'--fp16={plan.precision}',
        f'--tblr={rate:g}',
        '--alng=1e-2',
        '--ema=0.99',
        '--export=1',
        *common_flags(plan, plan.generator_steps, out, picture),
        f'--vae_ckpt={out / "tokenizer" / "vae-ckpt-last.pth"}',
        f'--output_dir={out / "generator"}',
    )


def common_flags(plan: Plan, num_steps: int, out: Path, picture: list[str]) -> list[str]:
    """Flags of both trainings.

    Args:
        picture: the command that draws pictures of a checkpoint.
    """
    # A training has three parts, after each of which it is validated, saved and looked at.
    num_train = (1 - VAL_SPLIT) * plan.num_photos
    repeat = math.ceil(num_steps * plan.batch / (NUM_PARTS * num_train))
    draw = f'{shlex.join(picture)} --ckpt="$CHECKPOINT" >/dev/null 2>&1'
    flags = [
        *data_flags(out),
        f'--repeat={repeat}',
        f'--mid_reso={MARGIN}',
        '--hflip=1',
        f'--image_size={plan.size}',
        f'--pn={plan.pn}',
        f'--patch_size={STRIDE}',
        f'--bs={plan.batch}',
        f'--steps={num_steps}',
        '--workers=-1',
        '--seed=0',
        '--eval_every=1',
        '--save_every=5m',
        f'--after_save={draw}',
    ]
    if plan.num_photos <= MOST_CACHED:
        flags.append('--cache=memory')
    return flags


def data_flags(out: Path) -> list[str]:
    """Where the small copies are; a tenth of each class is held out for validation."""
    return [f'--data_path={out / "photos"}', f'--val_split={VAL_SPLIT}']


def weights_in(out: Path) -> Path:
    """The checkpoint that pictures are drawn with."""
    return out / 'generator' / 'ar-ckpt-last.pth'


def sampling_flags() -> list[str]:
    return ['--cfg=1.5', '--top_p=0.95']


def program(script: str, *flags: str) -> list[str]:
    """The command line of an entry script."""
    return [sys.executable, str(REPO / script), *flags]


def command_for_more(photos: Photos, out: Path) -> list[str]:
    """The command that draws more pictures, as a person would type it here."""
    words = [
        'python',
        shown(REPO / 'sample.py'),
        f'--ckpt={shown(weights_in(out))}',
        *sampling_flags(),
        '--num_images=100',
        '--seed=1',
        f'--output={shown(out / "more")}',
    ]
    if len(photos.classes) > 1:
        # A name that is a number would be read as the number of another class.
        first = next(iter(photos.classes))
        words.append(f'--classes={first if first.isalpha() else 0}')
    return words


# ---------------------------------------------------------------------------------------------- running them
def train(stage: str, command: list[str], out: Path) -> None:
    """Run the training of a stage, unless it is done, and say how far it is now and then."""
    folder = out / stage
    if (folder / MARKS[stage]).exists():
        return
    say(f'training the {stage}; its log is {shown(folder / "stdout.txt")}, pictures are in '
        f'{shown(out / "pictures")}')
    run(command, Progress(stage, folder))


class Progress:
    """Says how far a training is, by its heartbeat.

    Args:
        stage: what is trained.
        folder: of the training.
    """

    def __init__(self, stage: str, folder: Path):
        self.stage = stage
        self.path = folder / 'heartbeat.json'
        self.began = time.time()
        self.first_step: int | None = None  # of this start; what was in the folder before is of another one
        self.last_step = 0

    def show(self) -> None:
        """Say it, if the training has come further since the last call."""
        try:
            beat = read_json(self.path)
            step = beat['step']
            steps_left = beat['total_steps'] - step
        except (FileNotFoundError, ValueError, KeyError):
            return
        if self.first_step is None:
            self.first_step = self.last_step = step
        if step <= self.last_step:
            return
        self.last_step = step
        seconds_per_step = (time.time() - self.began) / (step - self.first_step)
        say(f'{self.stage}: {step} of {step + steps_left} steps, '
            f'about {seconds_per_step * steps_left / 60:.0f} minutes left')


def run(command: list[str], progress: Progress | None = None) -> None:
    """Run a program of this project to its end; a signal to this one ends both in order.

    Raises:
        ValueError: it has failed; the message is the last line of its errors.
        Stopped: a signal came.
    """
    script = Path(command[1]).name
    with tempfile.TemporaryFile() as errors, StopRequest() as stop:
        process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=errors)
        is_told = False
        try:
            while process.poll() is None:
                if stop and not is_told:
                    process.terminate()
                    is_told = True
                if progress:
                    progress.show()
                time.sleep(0.2)
        finally:
            # An error here, such as a closed terminal, must not leave the training alone.
            if process.poll() is None:
                process.terminate()
                process.wait()
        errors.seek(0)
        lines = errors.read().decode(errors='replace').strip().splitlines()
    if stop:
        raise Stopped(f'stopped by {stop.signal_name}; run the same command again to go on')
    if process.returncode:
        raise ValueError(lines[-1] if lines else f'{script} has ended with exit code {process.returncode}')


if __name__ == '__main__':
    with one_line_errors('recipes.photos'):
        main()
