"""Files of the averages of `--ema_profiles` at several times, of which `utils.posthoc_ema` makes any width.

They lie in `snapshots/` of the output folder, one for each average and time, and `index.jsonl` lists them
with their digests. As with the logs, a start removes what is later than the checkpoint that it
continues from, since it repeats those steps and writes the same files again.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dist
from utils.checkpoint import save_file
from utils.ema import SNAPSHOT_INDEX, SNAPSHOTS, PowerEMA
from utils.hub import sha256_of
from utils.log import append_json_line, keep_json_lines, read_json_lines
from utils.sharding import whole_state


def store_snapshots(folder: Path, profiles: Sequence[PowerEMA], steps_done: int) -> None:
    """Write the averages as they are now; every rank calls it, the first one writes.

    Args:
        folder: the output folder.
        profiles: the averages.
        steps_done: optimizer steps so far, those included that were left out.
    """
    # Where weights are sharded, the first rank gets them from all ranks.
    weights = [whole_state(profile.averaged_weights()) for profile in profiles]

    def write() -> None:
        place = folder / SNAPSHOTS
        place.mkdir(exist_ok=True)
        for profile, averaged in zip(profiles, weights, strict=True):
            path = place / f'{steps_done:08d}-{profile.width}.pth'
            save_file(dict(model=averaged), path)
            # A file counts from its line on, so the line comes last.
            line = dict(step=steps_done, updates=profile.num_updates, width=profile.width, file=path.name,
                        sha256=sha256_of(path))
            append_json_line(place / SNAPSHOT_INDEX, line)
    dist.from_master(write)


def rewind_snapshots(folder: Path, steps_done: int) -> None:
    """Remove the files that are later than a checkpoint, and those that a kill has left without a line.

    Args:
        folder: the output folder.
        steps_done: optimizer steps that are done in the checkpoint.
    """
    place = folder / SNAPSHOTS
    if not place.is_dir():
        return

    def is_kept(line: dict[str, Any]) -> bool:
        return line['step'] <= steps_done

    keep_json_lines(place / SNAPSHOT_INDEX, is_kept)
    listed = {line['file'] for line in read_json_lines(place / SNAPSHOT_INDEX)}
    # Files with other names are not ours.
    for path in [*place.glob('[0-9]*-*.pth'), *place.glob('.[0-9]*-*.tmp')]:
        if path.name not in listed:
            path.unlink()
