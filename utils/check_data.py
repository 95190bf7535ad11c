"""Read every image of a data set: `python -m utils.check_data FOLDER`, or a folder of `utils.pack_data`.

Lists the files that cannot be read and those that are left out, counts the reasons, and compares the classes
of the splits. Exit codes: 0 all is well, 1 a file cannot be read or a split cannot be used, 2 wrong flags.

An entry point: unlike the rest of utils it knows the command lines of `configs`.
"""
import json
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from torch.utils.data import DataLoader, Dataset

from configs.options import INF, check_values, expand_paths, opt, parse_settings
from configs.training import VAL_SPLIT_HELP, VAL_SPLIT_LIMITS
from utils.console import one_line_errors
from utils.data import ListedImages, open_split
from utils.files import write_text
from utils.images import ImageError, files_below
from utils.loading import without_child_signal
from utils.log import progress_bar, setup_logging
from utils.machine import available_cpus

IMAGES_PER_BATCH = 32  # of a loader process, which then reports them


@dataclass(frozen=True)
class CheckSettings:
    """Settings of `python -m utils.check_data`."""

    folder: str = opt('', 'data set, as for train.py', positional=True, path=True)
    workers: int = opt(-1, 'loader processes; -1 is one per CPU, 0 loads in the main process',
                       limits=(-1, INF))
    report: str = opt('', 'file for all that is found, as JSON', path=True)
    val_split: float = opt(0.0, VAL_SPLIT_HELP, limits=VAL_SPLIT_LIMITS)

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        if not self.folder:
            raise ValueError('expected FOLDER: python -m utils.check_data FOLDER')
        if self.workers < 0:
            object.__setattr__(self, 'workers', available_cpus())


@dataclass
class Findings:
    """What is found in a data set.

    Attributes:
        images: number of images, by split.
        unusable: why a split cannot be used, by split.
        unreadable: a line for every image that cannot be read.
        reasons: how many images cannot be read for each reason; numbers in the reasons are left out.
        left_out: paths of the files that are no images of the data set.
        classes_of_one_split: names of the classes that the other split does not have, by split.
    """
    images: dict[str, int] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    classes_of_one_split: dict[str, list[str]] = field(default_factory=dict)

    @property
    def are_good(self) -> bool:
        """Whether a training can use the data set, and reads each of its images."""
        return not (self.unusable or self.unreadable or any(self.classes_of_one_split.values()))

    def lines(self) -> list[str]:
        """All of it for the reader."""
        lines = [*self.unusable.values(), *self.unreadable]
        lines += [f'left out: {path}' for path in self.left_out]
        for split, names in self.classes_of_one_split.items():
            lines += [f'class {name!r} is in {split} alone' for name in names]
        counts = ', '.join(f'{count} of {split}' for split, count in self.images.items())
        lines.append(f'{counts or "no images"}: {len(self.unreadable)} cannot be read, {len(self.left_out)} '
                     'other files are left out')
        lines += [f'{count:7d} {reason}' for reason, count in self.reasons.most_common()]
        return lines


class Readings(Dataset):
    """Why an image cannot be read, as (message, reason); two empty texts for one that can.

    Args:
        images: items are (PIL image, class id).
    """

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, str]:
        try:
            self.images[index]
        except ImageError as error:
            return str(error), error.reason
        return '', ''


def check(settings: CheckSettings) -> Findings:
    """Read every image of both splits.

    Raises:
        ValueError: loader processes die again and again.
    """
    found = Findings()
    splits = {}
    for split in ('train', 'val'):
        try:
            splits[split] = open_split(settings.folder, split, val_split=settings.val_split)
        except ValueError as error:
            found.unusable[split] = str(error)
    if len(splits) == 2:
        for split, other in (('train', 'val'), ('val', 'train')):
            names = set(splits[split].classes) - set(splits[other].classes)
            found.classes_of_one_split[split] = sorted(names)
    # With --val_split both splits leave out the same files.
    paths = [path for images in splits.values() for path in left_out(images)]
    found.left_out = list(dict.fromkeys(paths))
    for split, images in splits.items():
        found.images[split] = len(images)
        read_all(images, split, settings.workers, found)
    return found


def read_all(images: Dataset, split: str, workers: int, found: Findings) -> None:
    """Read all images of a split, and note those that cannot be read."""
    loader = DataLoader(Readings(images), IMAGES_PER_BATCH, num_workers=workers, collate_fn=list)
    with progress_bar(len(images), split) as bar:
        for batch in without_child_signal(loader):
            for message, reason in batch:
                if message:
                    found.unreadable.append(message)
                    found.reasons[re.sub(r'\d+', 'N', reason)] += 1
            bar.update(len(batch))


def left_out(images: Dataset) -> list[str]:
    """Paths of the files beside the images of a split that do not belong to it."""
    if not isinstance(images, ListedImages):
        return getattr(images, 'left_out', [])
    listed = set(images.paths)
    paths = [f'{folder}/{name}' for folder, names in files_below(images.root) for name in names]
    return sorted(path for path in paths if path not in listed)


def main() -> None:
    """Check the data set of the command line."""
    settings = parse_settings(CheckSettings, sys.argv[1:], 'check_data', 'Read every image of a data set.')
    setup_logging(None, is_master=True)
    begin = time.time()
    found = check(settings)
    seconds = time.time() - begin
    num_images = sum(found.images.values())
    print('\n'.join(found.lines()))  # noqa: T201
    print(f'{num_images} images in {seconds:.1f} s: {num_images / seconds:.1f} images/s')  # noqa: T201
    if settings.report:
        write_text(settings.report, json.dumps(vars(found), indent=1) + '\n')
    sys.exit(0 if found.are_good else 1)


if __name__ == '__main__':
    with one_line_errors('check_data'):
        main()
