"""Sample class-balanced images: `torchrun --nproc_per_node=8 sample.py --preset=var_d16`.

Runs without torchrun, too. Writes one PNG per image (or raw pieces), then `<output>.npz` (arr_0 uint8 NHWC in
random order, arr_1 labels; any FID evaluator reads it), `<output>.png`, which shows the first images of each
class, and `<output>.json`, the manifest. Image i depends on
the settings, the seed and i alone: not on ranks or restarts, nor on batches but for rounding, which
`--fixed_bs` makes the same, too. A killed job continues by the same command. `--sweep` does this for every
combination of some settings and scores each.

Read it from `sample`, which is one job from the weights to the npz; its steps follow in the same order.
Letters: N images of the job, B images of a batch.
"""
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs import SampleConfig, parse_sampling
from configs.options import COMPILE_MODES, flag_of, marked_fields, parse_flags
from configs.sampling import WEIGHTS
from utils.console import announce, one_line_errors

if __name__ == '__main__':
    # Wrong flags and missing files are answered now: the imports below take seconds.
    with one_line_errors('sample.py'):
        command = parse_sampling(sys.argv[1:])
        command.require_files()
    announce('sample.py', 'loading torch and the weights')

import numpy as np
import torch

import dist
from evaluation.pictures import save_contact_sheet
from evaluation.score import ScoreSettings, check_scoring, score_images, write_json
from evaluation.score_table import flat
from evaluation.sweep import ScoreTable
from models import ARModel
from pipeline import build, draw, read, to_bytes
from utils.amp_sc import note_on_bfloat16
from utils.checkpoint import atomic_path, lock_folder
from utils.files import read_json
from utils.hub import sha256_of
from utils.image_sets import open_images, read_labels, shuffled, write_npz
from utils.image_store import STORES, ImageStore
from utils.log import progress_bar, setup_logging
from utils.merge import extrapolate, read_tuned
from utils.misc import allow_tf32
from utils.provenance import device_name, git_commit, versions

logger = logging.getLogger(__name__)
MAX_NAMES = 100     # of classes, in a message
SHEET_ROWS = 16     # classes in the picture of the first images
SHEET_COLUMNS = 16  # images of each of them
# What the manifest says about how the images follow from the settings. A folder is continued only if it says
# the same, so the text keeps the name that utils.image_sets had in earlier versions.
RULES = dict(
    noise_of_image_i='models.helpers.ImageNoise(seed, [i])',
    pixels='255 x + 0.5, rounded down, of x in [0, 1]',
    order='row r of the npz is image utils.batches.shuffled(num_images, shuffle)[r]; -1: image r',
)


# ---------------------------------------------------------------------------------------------- the job
def sample(config: SampleConfig) -> Path:
    """Run one job, as far as it has not been done before: sample the images, pack them, write the manifest.

    Every rank calls it.

    Returns:
        The path of the npz.
    Raises:
        ValueError: a file cannot be used, or the output folder belongs to other settings.
    """
    begin = time.time()
    device = dist.get_device()
    allow_tf32(config.tf32)

    # The model comes first, since the classes to sample are those that it knows.
    model, origin = load_generator(config.model, config.ckpt, config.vae_ckpt, config.weights, device,
                                   config.compiled, config.neon_from, config.neon_w)
    config.check_model(model)
    note = note_on_bfloat16(device.type, config.precision, flag_of(config, 'precision'))
    if note and dist.is_master():
        logger.warning('%s', note)
    if config.fixed_batch not in (0, config.batch_size):
        logger.info('--bs=%d is not used, since --fixed_bs=%d decides the batch: pass a smaller --fixed_bs '
                    'if memory is short, or a larger one for speed', config.batch_size, config.fixed_batch)
    labels_N = image_labels(config, model.num_classes, origin['classes'])
    description = describe(config, origin, labels_N)
    extent = dict(num_images=config.num_images, shuffle=config.shuffle)
    folder = Path(config.output)
    npz_path = folder.with_name(f'{folder.name}.npz')
    manifest_path = folder.with_name(f'{folder.name}.json')

    # The lock of the master keeps a second job out of the folder until this one has ended.
    with lock_folder(folder) if dist.is_master() else nullcontext():
        store = STORES[config.format](folder, config.writers)
        is_complete = False
        if dist.is_master():
            # The folder belongs to these settings alone, so that images of two jobs never mix.
            if config.overwrite:
                remove_other_job(folder, description)
            stored_N = store.stored(config.num_images)
            is_empty = not (stored_N.any() or npz_path.exists())
            begin_or_continue(folder / 'settings.json', description, is_empty)
            with atomic_path(folder / 'labels.npy') as temporary, temporary.open('wb') as file:
                np.save(file, labels_N)

            # After a finished job the same command does nothing. PNG files are kept, so all must be there.
            needs_images = config.format == 'png' and not stored_N.all()
            if not needs_images:
                is_complete = is_packed(npz_path, manifest_path, description | extent)
        if dist.allgather_object(is_complete)[0]:
            if dist.is_master():
                store.discard()  # the run that packed them may have been killed before it did this
            logger.info('%s is complete', npz_path)
            return npz_path

        # All ranks sample; then the master packs. The manifest is written last, as the mark of a whole npz.
        sample_missing(model, config, store, labels_N)
        if dist.is_master() and config.sheet:
            draw_sheet(config, store, labels_N, origin['classes'])
        if dist.is_master() and config.pack:
            pack(config, store, labels_N, npz_path)
            manifest = description | extent | dict(
                **class_names_of(labels_N, origin['classes']),
                source=config.source,
                ckpt=config.ckpt,
                vae_ckpt=config.vae_ckpt,
                **(dict(neon_from=config.neon_from) if config.neon_from else {}),
                batch_size=config.images_per_batch,
                npz=npz_path.name,
                npz_sha256=sha256_of(npz_path),
                **digest_of_folder(config),
                git_commit=git_commit(),
                versions=versions(),
                device=device_name(device),
                world_size=dist.get_world_size(),
                seconds=round(time.time() - begin, 1),
            )
            write_json(manifest_path, manifest)
            store.discard()
            logger.info('packed %d images into %s', config.num_images, npz_path)
        elif dist.is_master():
            logger.info('%d images are in %s', config.num_images, folder)
        dist.barrier()
    return npz_path


# ---------------------------------------------------------------------------------------------- set-up
@lru_cache(maxsize=1)  # the jobs of a sweep use the same weights again and again
def load_generator(
    model: str,
    ckpt: str,
    vae_ckpt: str,
    weights: str,
    device: torch.device,
    compiled: int = 0,
    neon_from: str = '',
    neon_w: float = 1.,
) -> tuple[ARModel, dict[str, Any]]:
    """The generator and where it comes from; every rank calls it, and all of them get the same weights.

    Args:
        model: the family of the generator.
        ckpt: its file, or a published name.
        vae_ckpt: the file of its tokenizer; may be empty if `ckpt` holds the tokenizer, too.
        weights: 'ema' for the averaged weights, where the file has them, 'raw' for those of the last step, or
            the name of one of several averages, such as 'ema_0.9999'.
        compiled: a key of `COMPILE_MODES`; 0 compiles nothing.
        neon_from: the file of the same generator after a training on its own samples; '' leaves the weights
            as they are.
        neon_w: how far the weights go away from that, see `utils.merge`.
    Returns:
        The generator in eval mode, and its origin: `weights`, the kind of weights that were loaded;
        `weights_sha256`, the digest of each file that was read, by flag; `classes`, the names of all classes,
        or () if they are unknown.
    Raises:
        ValueError: a file cannot be read, or does not hold such weights.
    """
    contents = read(ckpt, model, vae_ckpt or None, weights)
    if contents.generator is None:
        raise ValueError(f'{ckpt!r} holds a tokenizer: pass the weights of a generator')
    generator = build(contents, device)
    digests = contents.digests
    if neon_from:
        tuned = read_tuned(neon_from, vae_ckpt)
        extrapolate(generator, contents, tuned, neon_w)
        digests = digests | dict(neon_from=tuned.digests['ckpt'])
    if compiled:
        generator.compile_sampling(mode=COMPILE_MODES[compiled])
    has_names = len(contents.classes) == generator.num_classes
    origin = dict(
        weights=contents.weights,
        weights_sha256=digests,
        classes=contents.classes if has_names else (),
    )
    return generator, origin


def image_labels(config: SampleConfig, num_classes: int, names: Sequence[str] = ()) -> np.ndarray:
    """(N,) int64 class of every image: from a file, at random, or the classes in turn.

    Args:
        names: of all classes, if they are known.
    Raises:
        ValueError: the file cannot be read, has another number of labels, or has one that is no class; or a
            class is unknown.
    """
    if config.labels == 'random':
        generator = np.random.RandomState(config.seed % 2 ** 32)  # numpy takes seeds of 32 bits
        labels_N = generator.randint(num_classes, size=config.num_images)
    elif config.labels:
        labels_N = read_labels(config.labels, config.num_images)
    else:
        # In turn, so that every class has as many images as every other one, or one more.
        if config.classes and not config.class_ids:
            chosen = ids_of_names(config.classes, names)
        else:
            chosen = config.class_ids or range(num_classes)
        class_ids = np.array(chosen, dtype=np.int64)
        labels_N = class_ids[np.arange(config.num_images) % len(class_ids)]
    if labels_N.min() < 0 or labels_N.max() > num_classes:
        raise ValueError(f'labels must be classes 0..{num_classes - 1}, or {num_classes} for none, got '
                         f'{labels_N.min()}..{labels_N.max()}: correct --classes or --labels')
    return labels_N


def ids_of_names(text: str, names: Sequence[str]) -> list[int]:
    """Ids of the classes whose names stand in a text, joined by "_", which a name may hold itself.

    Args:
        names: of all classes; () if they are unknown.
    Raises:
        ValueError: a name is unknown.
    """
    if not names:
        raise ValueError(f'--classes={text} gives names, and the checkpoint holds none: pass class ids, such '
                         'as --classes=0_7')
    ids = []
    words = text.split('_')
    while words:
        # The longest name that the text goes on with: of "red_cat" and "red", the first.
        for length in range(len(words), 0, -1):
            name = '_'.join(words[:length])
            if name in names:
                break
        else:
            known = ', '.join(names[:MAX_NAMES]) + (', ...' if len(names) > MAX_NAMES else '')
            raise ValueError(f'--classes={text}: expected names of classes, got {"_".join(words)!r}; the '
                             f'checkpoint knows {known}')
        ids.append(names.index(name))
        words = words[length:]
    return ids


def describe(config: SampleConfig, origin: dict[str, Any], labels_N: np.ndarray) -> dict[str, Any]:
    """Everything that decides the images; two jobs with the same description sample the same images.

    The names of the classes are left out, since they decide nothing.

    Args:
        origin: where the weights come from, see `load_generator`.
    """
    # Files of weights count by their digests, wherever they lie.
    left_out = {*marked_fields(config, 'free'), *WEIGHTS, 'weights'}
    settings = config.without(left_out)
    if config.labels:
        settings['labels'] = labels_N.tolist()
    description = dict(
        settings=settings,
        weights=origin['weights'],
        weights_sha256=origin['weights_sha256'],
        rules=RULES,
    )
    # On a CPU the last bit depends on how many threads share the work, too.
    if config.fixed_batch and dist.get_device().type == 'cpu':
        description['OMP_NUM_THREADS'] = torch.get_num_threads()
    return description


def begin_or_continue(path: Path, description: dict[str, Any], is_empty: bool) -> None:
    """Make sure that a folder holds results of these settings alone, and write the settings down there.

    Args:
        path: the JSON file in that folder which says what its results were made with.
        is_empty: whether the folder has no results yet.
    Raises:
        ValueError: the results there were made with other settings, or the file does not say with which.
    """
    folder = str(path.parent)
    if not is_empty:
        try:
            begun_with = read_json(path)
        except FileNotFoundError:
            raise ValueError(f'{folder!r} holds images of unknown settings, since {path.name} is missing: '
                             'pass another --output, or remove the folder') from None
        except ValueError as error:
            raise ValueError(f'{folder!r} holds images of unknown settings (cannot read {path.name}: '
                             f'{error}): pass another --output, or remove the folder') from None
        if begun_with != description:
            names = ', '.join(differing_names(begun_with, description))
            raise ValueError(f'{folder!r} was begun with other settings or weights ({names}; see {path.name} '
                             'there): pass another --output, or remove the folder')
    write_json(path, description)


def remove_other_job(folder: Path, description: dict[str, Any]) -> None:
    """Remove images, npz, picture and manifest of a job with other settings; of these settings, keep all.

    Files that no job has left are not touched.
    """
    try:
        if read_json(folder / 'settings.json') == description:
            return
    except (FileNotFoundError, ValueError):
        return  # nobody knows whose images these are
    beside = [folder.with_name(f'{folder.name}{suffix}') for suffix in ('.json', '.npz', '.png')]
    for path in (*beside, folder / 'labels.npy'):
        path.unlink(missing_ok=True)
    for store in STORES.values():
        store(folder).clear()
    # It goes last: after a kill in between, the rest is still known to be of that job.
    (folder / 'settings.json').unlink()
    logger.info('removed what an earlier job with other settings had left in %s', folder)


def differing_names(begun_with: dict[str, Any], description: dict[str, Any]) -> list[str]:
    """What differs between two descriptions: names of settings, and of what stands beside the settings."""
    before = with_settings_beside(begun_with)
    now = with_settings_beside(description)
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def with_settings_beside(description: dict[str, Any]) -> dict[str, Any]:
    """A description whose settings stand beside its other entries."""
    settings = description.get('settings')
    if not isinstance(settings, dict):
        settings = {}
    return {**description, 'settings': None, **settings}


# ---------------------------------------------------------------------------------------------- the loop
def sample_missing(model: ARModel, config: SampleConfig, store: ImageStore, labels_N: np.ndarray) -> None:
    """Sample the images that the store does not have yet; the ranks take the batches in turn.

    A batch is sampled as a whole even if some of its images are stored: in a smaller batch, or at another
    place in it, kernels may round an image differently. Stored images are never written again.
    """
    count = config.num_images
    world_size = dist.get_world_size()

    # No rank may write before every rank has looked, or the ranks would not agree on what is missing.
    stored_N = store.stored(count)
    dist.barrier()
    batches = []
    size = config.images_per_batch
    for first in range(0, count, size):
        index_B = range(first, min(first + size, count))
        if not stored_N[first:index_B.stop].all():
            batches.append(index_B)

    # Threads of the store write one batch while the next one is sampled; leaving it waits for all of them.
    with store, progress_bar(count, config.output) as bar:
        bar.update(int(stored_N.sum()))
        for index_B in batches[dist.get_rank()::world_size]:
            rows = slice(index_B.start, index_B.stop)
            images = sample_batch(model, config, index_B, labels_N[rows])
            is_new_B = ~stored_N[rows]
            store.put(np.array(index_B)[is_new_B], images[is_new_B])

            # Only the master has a bar; the other ranks are about as far, and the last batches may be fewer.
            num_new = int(is_new_B.sum()) * world_size
            bar.update(min(num_new, count - bar.n))

    # The master packs the images of all ranks next.
    dist.barrier()


def sample_batch(model: ARModel, config: SampleConfig, index_B: range, label_B: np.ndarray) -> np.ndarray:
    """The images of these indices, uint8 (B, H, W, 3).

    Args:
        label_B: (B,) integers, their classes.
    Raises:
        ValueError: an image has pixels that are not finite.
    """
    # Kernels round an image alike only in batches of one shape, in which it has one place. So --fixed_bs
    # fills up a last batch that is smaller, with images that nobody keeps.
    num_more = max(config.fixed_batch - len(index_B), 0)
    labels = [*label_B.tolist(), *[0] * num_more]

    images_B3HW = draw(model, config.seed, index_B, labels, config.precision, config.sample_kwargs())
    return to_bytes(images_B3HW)


# ---------------------------------------------------------------------------------------------- the npz
def pack(config: SampleConfig, store: ImageStore, labels_N: np.ndarray, npz_path: Path) -> None:
    """Write all images as one npz, one image at a time in memory.

    Raises:
        ValueError: this node does not see all images.
    """
    count = config.num_images
    if not store.stored(count).all():
        raise ValueError(f'{store.folder} lacks images that other ranks have drawn: pass an --output that '
                         'all nodes share, and run the same command again')

    # In random order, since the Inception Score is a mean over chunks of the file and each needs all classes.
    order = np.arange(count) if config.shuffle < 0 else shuffled(count, config.shuffle)
    height, width, _ = store.get(0).shape
    write_npz(npz_path, store.read(order), count, height, width, labels_N[order])


def draw_sheet(config: SampleConfig, store: ImageStore, labels_N: np.ndarray, names: Sequence[str]) -> None:
    """Write `<output>.png`: the first images of each class, or of some classes if there are many."""
    stored_N = store.stored(config.num_images)
    labels = np.unique(labels_N[stored_N])
    if not len(labels):
        return  # on a folder that only other nodes see
    if len(labels) > SHEET_ROWS:
        labels = labels[np.linspace(0, len(labels) - 1, SHEET_ROWS, dtype=int)]

    # Few classes have several rows each.
    rows = []
    rows_per_class = max(SHEET_ROWS // 2 // len(labels), 1)
    for label in labels:
        index_N = np.flatnonzero(stored_N & (labels_N == label))
        for row in range(rows_per_class):
            first = row * SHEET_COLUMNS
            rows.append([store.get(i) for i in index_N[first:first + SHEET_COLUMNS]])
    path = Path(config.output).with_name(f'{Path(config.output).name}.png')
    save_contact_sheet(path, [row for row in rows if row])
    shown = [names[label] if label < len(names) else str(label) for label in labels.tolist()]
    logger.info('%s shows the first images of each class, from top to bottom: %s', path, ', '.join(shown))


def class_names_of(labels_N: np.ndarray, classes: Sequence[str]) -> dict[str, dict[int, str]]:
    """The manifest's entry `classes`, the names of the sampled classes by id; {} if the names are unknown."""
    if not classes:
        return {}
    label_ids = np.unique(labels_N).tolist()
    # The label after the last class means "no class" and has no name.
    names = {label: classes[label] for label in label_ids if label < len(classes)}
    return dict(classes=names)


def digest_of_folder(config: SampleConfig) -> dict[str, str]:
    """The manifest's entry `folder_sha256`, by which evaluate.py knows the PNG files; {} if none are kept."""
    if config.format != 'png':
        return {}
    try:
        return dict(folder_sha256=open_images(config.output).sha256())
    except ValueError:
        return {}  # beside them lies an image of another size, with which nobody can score the folder


def is_packed(npz_path: Path, manifest_path: Path, expected: dict[str, Any]) -> bool:
    """Whether the npz of a job is there, and is still the file that its manifest describes.

    Args:
        expected: entries that the manifest must have.
    """
    try:
        manifest = read_json(manifest_path)
    except (FileNotFoundError, ValueError):
        return False
    found = {name: manifest.get(name) for name in expected}
    if found != expected or not npz_path.is_file():
        return False
    return sha256_of(npz_path) == manifest.get('npz_sha256')


# ---------------------------------------------------------------------------------------------- sweeps
def sweep(config: SampleConfig) -> None:
    """Sample and score every combination of settings; `<output>.csv` grows by a row for each.

    `<output>.png`, a plot of the table, is drawn at the end. Every rank calls it.

    Raises:
        MissingWeights: a network that the scores need has no weights.
        ValueError: a file that the scores need cannot be used, or a setting cannot be sampled. All of this is
            found before the first job, but for a `neon_w` so large that images are not finite, which its own
            job finds.
    """
    combinations = config.combinations()
    swept = list(combinations[0])
    folder = Path(config.output)

    # Whatever can fail is read now, and not after hours of sampling.
    settings = score_settings(config, config.output)
    network, reference_sha256 = check_scoring(settings, config.num_images)
    _, origin = load_for(config.at(combinations[0]))
    hashes = {flag: digest for flag, digest in origin['weights_sha256'].items() if flag not in swept}
    hash_of_labels = {}
    if config.labels and 'labels' not in swept:
        hash_of_labels = dict(labels=sha256_of(config.labels))

    with lock_folder(folder) if dist.is_master() else nullcontext():
        table = ScoreTable(folder, swept)
        if dist.is_master():
            # Rows of one table must be comparable: same weights, same reference, same other settings.
            may_differ = {*marked_fields(config, 'free'), *WEIGHTS} - {'num_images', 'score'}
            fixed = {}
            for combination in combinations:
                # A setting may act in some of them alone.
                tried = dataclasses.replace(config, **combination, sweep='')
                fixed |= tried.without(may_differ | set(swept))
            description = dict(
                swept=swept,
                settings=fixed,
                sha256=hashes | hash_of_labels,
                network=None if network is None else network.digest,
                reference_sha256=reference_sha256,
            )
            begin_or_continue(folder / 'sweep.json', description, is_empty=not table.rows)

        # One image of every combination, without --fixed_bs, shows what the model refuses, before hours of
        # sampling. No setting is refused for --neon_w, so that the first one stands for all of them, and
        # weights are merged once for each.
        first_w = combinations[0].get('neon_w')
        for combination in combinations:
            if combination.get('neon_w') != first_w:
                continue
            job = dataclasses.replace(config.at(combination), fixed_batch=0)
            model, origin = load_for(job, hashes)
            labels_N = image_labels(job, model.num_classes, origin['classes'])
            sample_batch(model, job, range(1), labels_N[:1])

        for combination in combinations:
            if dist.allgather_object(table.has(combination))[0]:
                continue  # an earlier run has scored it
            job = config.at(combination)
            load_for(job, hashes)  # `sample` takes these very weights from the cache
            npz_path = sample(job)
            report = score_images(dataclasses.replace(settings, sample=str(npz_path)), network)
            if report:
                scores = flat(report['scores'])
                table.add(combination | scores)
                line = ', '.join(f'{name} {score:.5g}' for name, score in scores.items())
                logger.info('%s: %s', npz_path, line)
                if not config.keep:
                    npz_path.unlink()
            dist.barrier()

        if dist.is_master():
            table.plot()
            logger.info('all scores are in %s', table.csv)


def score_settings(config: SampleConfig, npz: str) -> ScoreSettings:
    """The settings of evaluate.py that score the images of one job of a sweep.

    Raises:
        ValueError: `--score` has a wrong flag, or one that the sweep sets itself.
    """
    flags = parse_flags(ScoreSettings, '--score', config.score)
    set_here = sorted(flags.keys() & {'ref', 'sample', 'json', 'device'})
    if set_here:
        raise ValueError(f'--score takes flags of evaluate.py, but for {", ".join(set_here)}: leave it out')
    values = dict(allow_any_count=True) | flags
    return ScoreSettings(**values, ref=config.ref, sample=npz)


def load_for(job: SampleConfig, hashes: dict[str, str] | None = None) -> tuple[ARModel, dict[str, Any]]:
    """`load_generator` for one job of a sweep.

    Args:
        hashes: the SHA-256 that files must have, by flag.
    Raises:
        ValueError: a file was replaced after the sweep had begun.
    """
    model, origin = load_generator(job.model, job.ckpt, job.vae_ckpt, job.weights, dist.get_device(),
                                   job.compiled, job.neon_from, job.neon_w)
    for flag, digest in (hashes or {}).items():
        if origin['weights_sha256'].get(flag) != digest:
            raise ValueError(f'{getattr(job, flag)!r} was replaced during the sweep: restore the '
                             'file, or copy the new one, and pass the copy with another --output')
    return model, origin


def main(config: SampleConfig | None = None) -> None:
    """Run a job or a sweep; None takes that of the command line."""
    config = config or parse_sampling(sys.argv[1:])
    dist.initialize()
    setup_logging(None, dist.is_master())
    if config.sweep:
        sweep(config)
    else:
        sample(config)
    dist.finalize()


if __name__ == '__main__':
    with one_line_errors('sample.py'):
        main(command)
