"""Sample class-balanced images: `torchrun --nproc_per_node=8 sample.py --preset=var_d16`.

Runs without torchrun, too. Writes one PNG per image (or raw pieces), then `<output>.npz` (arr_0 uint8 NHWC in
random order, arr_1 labels; any FID evaluator reads it) and `<output>.json`, the manifest. Image i depends on
the settings, the seed and i alone: not on ranks or restarts, nor on batches but for rounding. A killed job
continues by the same command. `--sweep` does this for every combination of some settings and scores each.
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

import numpy as np
import torch

import dist
from configs import SampleRecipe, parse_sample_recipe
from configs.options import marked_fields, parse_flags
from evaluation.features import load_network
from evaluation.score import ScoreSettings, open_set, score_images, write_json
from evaluation.sweep import ScoreTable
from models import ARModel, build_generator, differing_parameters
from models.noise import ImageNoise
from utils.amp_sc import autocast
from utils.batches import read_labels, shuffled, write_npz
from utils.checkpoint import atomic_path, load_on_all_ranks, lock_folder, model_weights, tokenizer_weights
from utils.files import read_json
from utils.hub import fetch, sha256_of
from utils.image_store import STORES, ImageStore
from utils.log import one_line_errors, progress_bar, setup_logging
from utils.misc import allow_tf32
from utils.provenance import device_name, git_commit, versions

logger = logging.getLogger(__name__)
RULES = dict(  # what the manifest says of how the images follow from the settings
    noise_of_image_i='models.helpers.ImageNoise(seed, [i])',
    pixels='255 x + 0.5, rounded down, of x in [0, 1]',
    order='row r of the npz is image utils.batches.shuffled(num_images, shuffle)[r]; -1: image r')


# ---------------------------------------------------------------------------------------------- what is drawn
@lru_cache(maxsize=1)  # a sweep draws from the same weights again and again
def load_generator(model: str, ckpt: str, vae_ckpt: str, weights: str,
                   device: torch.device) -> tuple[ARModel, dict[str, Any]]:
    """The generator, and its origin; every rank calls it, and all of them get the same weights.

    Args:
        model: its family. ckpt, vae_ckpt: files; the latter may be empty if the former holds the tokenizer.
        weights: 'ema', where there are any, or 'raw'.
    Returns:
        (generator in eval mode, its origin: `weights`, the kind of weights; `weights_sha256`, the digests by
        flag of the very files that were loaded; `classes`, the names of all classes, or () if unknown).
    Raises:
        ValueError: a file cannot be read, or holds no such weights.
    """
    paths = {flag: fetch(name) for flag, name in (('ckpt', ckpt), ('vae_ckpt', vae_ckpt)) if name}
    prefer_ema = weights == 'ema'
    files = []
    digests = {}
    for flag, path in paths.items():
        content, digests[flag] = load_on_all_ranks(path)
        files.append(content)
    tokenizer_state, config = tokenizer_weights(files[-1])  # as in training, whatever --weights says
    trainer = files[0].get('trainer', {})
    config = trainer.get('vae_config', {}) | config  # a bare file of the same tokenizer does not tell it
    generator = build_generator(model, model_weights(files[0], prefer_ema), tokenizer_state,
                                str(paths['ckpt']), device, config, trainer.get('config'))
    check_same_codes(generator, trainer.get('vae_local', {}), ckpt, vae_ckpt)
    return generator, dict(
        weights='ema' if prefer_ema and {'var_ema', 'model_ema', 'ema'} & {*trainer, *files[0]} else 'raw',
        weights_sha256=digests, classes=class_names(files[0], generator.num_classes))


def check_same_codes(generator: ARModel, trained_with: dict[str, Any], ckpt: str, vae_ckpt: str) -> None:
    """Make sure that the generator draws the codes, or latents, of the tokenizer that it was trained with.

    Another decoder is fine: it may have been trained further for the same codes.

    Args:
        trained_with: weights of the tokenizer in the generator's own file; {} where it does not hold them.
    Raises:
        ValueError: encoder or codebook differ.
    """
    for name in differing_parameters(generator.tokenizer, trained_with):
        if name.startswith(('encoder.', 'quant_conv.', 'quantize.')):
            raise ValueError(f'{ckpt!r} was trained on the codes of another tokenizer than {vae_ckpt!r} '
                             f'({name} differs): pass the tokenizer of its training, or --vae_ckpt= without '
                             'a value for the one inside that file')


def class_names(checkpoint: dict[str, Any], num_classes: int) -> tuple[str, ...]:
    """The names of all classes in the order of their ids; () where the checkpoint does not tell."""
    names = checkpoint.get('classes')
    if not isinstance(names, list | tuple) or len(names) != num_classes:
        return ()
    return tuple(map(str, names))


def image_labels(recipe: SampleRecipe, num_classes: int) -> np.ndarray:
    """(N,) int64 class of every image: as listed, at random, or the classes in turn.

    Raises:
        ValueError: the list cannot be read, has another length, or names no class.
    """
    if recipe.labels == 'random':
        labels_N = np.random.RandomState(recipe.seed % 2 ** 32).randint(num_classes, size=recipe.num_images)
    elif not recipe.labels:
        class_ids = np.array(recipe.class_ids or range(num_classes), dtype=np.int64)
        labels_N = class_ids[np.arange(recipe.num_images) % len(class_ids)]
    else:
        labels_N = read_labels(recipe.labels, recipe.num_images)
    if labels_N.min() < 0 or labels_N.max() > num_classes:
        raise ValueError(f'labels must be classes 0..{num_classes - 1}, or {num_classes} for none, got '
                         f'{labels_N.min()}..{labels_N.max()}: correct --classes or --labels')
    return labels_N


def describe(recipe: SampleRecipe, origin: dict[str, Any], labels_N: np.ndarray) -> dict[str, Any]:
    """What decides the images; two jobs of equal description draw the same ones.

    Names of classes are left out: they decide nothing.

    Args:
        origin: of the weights, see `load_generator`.
    """
    by_content = ('ckpt', 'vae_ckpt', 'weights')  # wherever these files lie
    left_out = marked_fields(recipe, 'free') + by_content
    settings = {name: value for name, value in vars(recipe).items() if name not in left_out}
    if recipe.labels:
        settings['labels'] = labels_N.tolist()
    return dict(settings=settings, weights=origin['weights'], weights_sha256=origin['weights_sha256'],
                rules=RULES)


def names_of(labels_N: np.ndarray, classes: Sequence[str]) -> dict[str, dict[int, str]]:
    """The manifest's entry `classes`: the names of the classes that were drawn, by id; none if unknown."""
    if not classes:
        return {}
    drawn = [label for label in np.unique(labels_N).tolist() if label < len(classes)]  # the last: no class
    return dict(classes={label: classes[label] for label in drawn})


def claim(note: Path, description: dict[str, Any], is_empty: bool) -> None:
    """Make sure that what lies beside `note` was made with these settings, and keep them there.

    Args:
        is_empty: whether nothing lies there yet.
    Raises:
        ValueError: it was made with others, or nobody knows with which.
    """
    try:
        same = is_empty or read_json(note) == description
    except FileNotFoundError:
        raise ValueError(f'{str(note.parent)!r} holds images of unknown settings, since {note.name} is '
                         'missing: pass another --output, or remove the folder') from None
    except ValueError as error:
        raise ValueError(f'{str(note.parent)!r} holds images of unknown settings (cannot read {note.name}: '
                         f'{error}): pass another --output, or remove the folder') from None
    if not same:
        raise ValueError(f'{str(note.parent)!r} was begun with other settings or weights (see {note.name} '
                         'there): pass another --output, or remove the folder')
    write_json(note, description)


# ---------------------------------------------------------------------------------------------- drawing
@torch.inference_mode()
def draw(model: ARModel, recipe: SampleRecipe, index_B: range, label_B: np.ndarray) -> np.ndarray:
    """Images of these indices, uint8 (B, H, W, 3).

    Raises:
        ValueError: one is not finite.
    """
    with autocast(model.device.type, recipe.precision):
        images_B3HW = model.sample(label_B.tolist(), rng=ImageNoise(recipe.seed, index_B),
                                   **recipe.sample_kwargs())
    finite_B = images_B3HW.isfinite().flatten(1).all(1)
    if not finite_B.all():
        bad = index_B[finite_B.int().argmin().item()]
        raise ValueError(f'expected finite pixels, image {bad} has nan or infinite ones: '
                         'the weights are damaged, or float16 overflows (pass --fp16=0 or 2)')
    images_u8 = images_B3HW.float().mul(255).add(0.5).floor().clamp(0, 255).byte()
    return images_u8.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def draw_missing(model: ARModel, recipe: SampleRecipe, store: ImageStore, labels_N: np.ndarray) -> None:
    """Draw what the store lacks, the batches shared among the ranks.

    A batch is drawn whole even if a kill left some of its images: kernels may round in another way in another
    batch. Images that are there are never written again.
    """
    count = recipe.num_images
    size = recipe.batch_size
    world_size = dist.get_world_size()
    stored_N = store.stored(count)
    dist.barrier()  # every rank has seen the same files
    pending = [first for first in range(0, count, size) if not stored_N[first:first + size].all()]
    with store, progress_bar(count, recipe.output) as bar:
        bar.update(int(stored_N.sum()))
        for first in pending[dist.get_rank()::world_size]:
            index_B = range(first, min(first + size, count))
            images = draw(model, recipe, index_B, labels_N[first:index_B.stop])
            new_B = ~stored_N[first:index_B.stop]
            store.put(np.array(index_B)[new_B], images[new_B])
            bar.update(min(int(new_B.sum()) * world_size, count - bar.n))  # the others are about as far
    dist.barrier()


def pack(recipe: SampleRecipe, store: ImageStore, labels_N: np.ndarray, target: Path) -> None:
    """All images in random order as one npz, streamed."""
    if not store.stored(recipe.num_images).all():
        raise ValueError(f'{store.folder} lacks images that other ranks have drawn: pass an --output that '
                         'all nodes share, and run the same command again')
    count = recipe.num_images
    order = np.arange(count) if recipe.shuffle < 0 else shuffled(count, recipe.shuffle)
    height, width, _ = store.get(0).shape
    write_npz(target, store.read(order), count, height, width, labels_N[order])


def sample(recipe: SampleRecipe) -> Path:
    """Draw, pack and describe the images of a recipe, as far as that is not done; the path of the npz."""
    begin = time.time()
    device = dist.get_device()
    folder = Path(recipe.output)
    allow_tf32(recipe.tf32)

    # The model, and the class of every image of the job.
    model, origin = load_generator(recipe.model, recipe.ckpt, recipe.vae_ckpt, recipe.weights, device)
    recipe.check_model(model)
    labels_N = image_labels(recipe, model.num_classes)
    target, manifest_path = (folder.with_name(f'{folder.name}{suffix}') for suffix in ('.npz', '.json'))
    description = describe(recipe, origin, labels_N)
    extent = dict(num_images=recipe.num_images, shuffle=recipe.shuffle)
    with lock_folder(folder) if dist.is_master() else nullcontext():
        store = STORES[recipe.format](folder, recipe.writers)

        # The folder belongs to these settings alone, so that images of two jobs never mix.
        if dist.is_master():
            stored_N = store.stored(recipe.num_images)
            claim(folder / 'settings.json', description, is_empty=not (stored_N.any() or target.exists()))
            with atomic_path(folder / 'labels.npy') as temporary, temporary.open('wb') as file:
                np.save(file, labels_N)

        # The same command after a finished job does nothing.
        complete = dist.is_master() and is_complete(manifest_path, target, description | extent) and (
            recipe.format == 'npz' or stored_N.all())
        if dist.allgather_object(bool(complete))[0]:
            if dist.is_master():
                store.discard()  # a kill may have come in between
            logger.info('%s is complete', target)
            return target

        # Draw, then pack; the manifest is written last and says what repeats the file.
        draw_missing(model, recipe, store, labels_N)
        if dist.is_master() and recipe.pack:
            pack(recipe, store, labels_N, target)
            write_json(manifest_path, description | extent | dict(
                **names_of(labels_N, origin['classes']),
                source=recipe.source, ckpt=recipe.ckpt, vae_ckpt=recipe.vae_ckpt,
                batch_size=recipe.batch_size, npz=target.name, npz_sha256=sha256_of(target),
                git_commit=git_commit(), versions=versions(), device=device_name(device),
                world_size=dist.get_world_size(), seconds=round(time.time() - begin, 1)))
            store.discard()
            logger.info('packed %d images into %s', recipe.num_images, target)
        elif dist.is_master():
            logger.info('%d images are in %s', recipe.num_images, folder)
        dist.barrier()
    return target


def is_complete(manifest_path: Path, target: Path, expected: dict[str, Any]) -> bool:
    """Whether the npz of such a job is there, and still what its manifest says."""
    try:
        manifest = read_json(manifest_path)
    except (FileNotFoundError, ValueError):
        return False
    return {name: manifest.get(name) for name in expected} == expected and target.is_file() \
        and sha256_of(target) == manifest.get('npz_sha256')


# ---------------------------------------------------------------------------------------------- sweeps
def score_settings(recipe: SampleRecipe, npz: str) -> ScoreSettings:
    """Settings of evaluate.py for one setting of a sweep.

    Raises:
        ValueError: `--score` holds wrong flags, or some that the sweep sets itself.
    """
    flags = parse_flags(ScoreSettings, '--score', recipe.score)
    own = sorted(flags.keys() & {'ref', 'sample', 'json', 'device'})
    if own:
        raise ValueError(f'--score takes flags of evaluate.py, but for {", ".join(own)}: leave it out')
    return ScoreSettings(**dict(allow_any_count=True) | flags, ref=recipe.ref, sample=npz)


def load_for(job: SampleRecipe, hashes: dict[str, str] | None = None) -> tuple[ARModel, dict[str, Any]]:
    """`load_generator` for one setting of a sweep.

    Args:
        hashes: SHA-256 that files must have, by flag.
    Raises:
        ValueError: a file has been replaced since the sweep began.
    """
    model, origin = load_generator(job.model, job.ckpt, job.vae_ckpt, job.weights, dist.get_device())
    for flag, digest in (hashes or {}).items():
        if origin['weights_sha256'].get(flag) != digest:
            raise ValueError(f'{getattr(job, flag)!r} was replaced during the sweep: restore the '
                             'file, or copy the new one, and pass the copy with another --output')
    return model, origin


def sweep(recipe: SampleRecipe) -> None:
    """Sample and score every combination; `<output>.csv` and `<output>.png` grow row by row.

    Raises:
        MissingWeights: of the feature network.
        ValueError: the reference cannot be read; both are known before anything is drawn.
    """
    combinations = recipe.combinations()
    folder = Path(recipe.output)
    swept = list(combinations[0])
    settings = score_settings(recipe, recipe.output)
    reference = open_set(recipe.ref, needs_images=False)
    network = load_network(settings)
    _, origin = load_for(recipe.at(combinations[0]))
    hashes = {flag: digest for flag, digest in origin['weights_sha256'].items() if flag not in swept}
    hash_of_labels = {}
    if recipe.labels and 'labels' not in swept:
        hash_of_labels = dict(labels=sha256_of(recipe.labels))
    with lock_folder(folder) if dist.is_master() else nullcontext():
        table = ScoreTable(folder, swept)
        if dist.is_master():
            fixed = {name: value for name, value in vars(recipe).items() if name not in swept and name not in
                     {*marked_fields(recipe, 'free'), 'ckpt', 'vae_ckpt'} - {'num_images', 'score'}}
            claim(folder / 'sweep.json', dict(
                swept=swept, settings=fixed, sha256=hashes | hash_of_labels, network=network.digest,
                reference_sha256=reference.describe()['sha256']), is_empty=not table.rows)
        for combination in combinations:  # every setting is tried before hours of drawing
            job = recipe.at(combination)
            model, _ = load_for(job, hashes)
            draw(model, job, range(1), image_labels(job, model.num_classes)[:1])
        for combination in combinations:
            if dist.allgather_object(table.has(combination))[0]:
                continue
            job = recipe.at(combination)
            load_for(job, hashes)  # `sample` takes the same weights from the cache
            npz = sample(job)
            report = score_images(dataclasses.replace(settings, sample=str(npz)), network)
            if report:
                table.add(combination | report['scores'])
                logger.info('%s: %s', npz, ', '.join(f'{k} {v:.5g}' for k, v in report['scores'].items()))
                if not recipe.keep:
                    npz.unlink()
            dist.barrier()
        if dist.is_master():
            table.draw()
            logger.info('all scores are in %s', table.csv)


def main() -> None:
    recipe = parse_sample_recipe(sys.argv[1:])
    dist.initialize()
    setup_logging(None, dist.is_master())
    sweep(recipe) if recipe.sweep else sample(recipe)
    dist.finalize()


if __name__ == '__main__':
    with one_line_errors('sample.py'):
        main()
