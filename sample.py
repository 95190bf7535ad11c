"""Sample class-balanced images: `torchrun --nproc_per_node=8 sample.py --ckpt=FILE --preset=fid`.

Runs without torchrun, too. Writes one PNG per image, then `<output>.npz` (arr_0, uint8 NHWC, for any FID
evaluator) and `<output>.json`, the manifest. Image i depends on the settings, the seed and i alone: not on
ranks, batches or restarts.
"""
import json
import logging
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image

import dist
from models import ARModel, build_generator
from models.helpers import ImageNoise
from utils.arg_util import SampleRecipe, parse_sample_recipe
from utils.checkpoint import atomic_path, load_file, model_weights, tokenizer_weights
from utils.hub import fetch, sha256_of
from utils.log import one_line_errors, setup_logging
from utils.misc import allow_tf32, create_npz_from_sample_folder

logger = logging.getLogger(__name__)
AUTOCAST = {1: torch.float16, 2: torch.bfloat16}
FREE_SETTINGS = ('num_images', 'batch_size', 'output', 'pack')  # they do not decide the images


def load_generator(recipe: SampleRecipe, device: torch.device) -> tuple[ARModel, list[Path]]:
    """The model of a recipe, and the files it came from."""
    paths = [fetch(name) for name in (recipe.ckpt, recipe.vae_ckpt) if name]
    files = [load_file(path) for path in paths]
    tokenizer_state, config = tokenizer_weights(files[-1])
    model = build_generator(recipe.model, model_weights(files[0]), tokenizer_state, str(paths[0]), device,
                            config)
    return model, paths


def describe(recipe: SampleRecipe, paths: list[Path], class_ids: list[int]) -> dict[str, Any]:
    """What decides the images, as the manifest keeps it: reads the weights' files for their SHA-256."""
    hashes = {path.name: sha256_of(path) for path in paths}
    settings = {name: value for name, value in vars(recipe).items() if name not in FREE_SETTINGS}
    return dict(settings=settings, sha256=hashes, label_of_image_i='class_ids[i % len(class_ids)]',
                class_ids=class_ids)


def claim_folder(folder: Path, description: dict[str, Any]) -> None:
    """Create the folder, or make sure that it holds images of the same settings.

    Raises:
        ValueError: the folder was begun with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / 'settings.json'
    text = json.dumps(description, indent=2)
    if note.exists() and note.read_text() != text:
        raise ValueError(f'{folder} was begun with other settings or weights (see {note}): '
                         'pass another --output, or remove the folder')
    with atomic_path(note) as temporary:
        temporary.write_text(text)


def save_png(image_chw: torch.Tensor, path: Path) -> None:
    """An image in [0, 1], rounded to 8 bits."""
    array = image_chw.float().mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(array).save(temporary, format='PNG')


def sample(recipe: SampleRecipe) -> None:
    device, rank, world_size = dist.get_device(), dist.get_rank(), dist.get_world_size()
    allow_tf32(recipe.tf32)
    model, paths = load_generator(recipe, device)
    class_ids = list(recipe.class_ids or range(model.num_classes))
    folder = Path(recipe.output)
    if dist.is_master():
        description = describe(recipe, paths, class_ids)
        claim_folder(folder, description)
    dist.barrier()

    begin, num_drawn = time.time(), 0
    batches = range(0, recipe.num_images, recipe.batch_size)
    for number, first in enumerate(batches):
        index_B = range(first, min(first + recipe.batch_size, recipe.num_images))
        pngs = [folder / f'{i:06d}.png' for i in index_B]
        if number % world_size != rank or all(path.exists() for path in pngs):
            continue
        labels = [class_ids[i % len(class_ids)] for i in index_B]
        with torch.autocast(device.type, dtype=AUTOCAST.get(recipe.precision), enabled=recipe.precision > 0):
            images_B3HW = model.sample(labels, rng=ImageNoise(recipe.seed, index_B), **recipe.sample_kwargs())
        for image_chw, path in zip(images_B3HW.cpu(), pngs, strict=True):
            save_png(image_chw, path)
        num_drawn += len(pngs)
        logger.info('batch %d of %d, %.1f images/s on this rank', number + 1, len(batches),
                    num_drawn / (time.time() - begin))
    dist.barrier()

    if dist.is_master() and recipe.pack:
        npz = create_npz_from_sample_folder(str(folder), recipe.num_images)
        versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                        torchvision=torchvision.__version__)
        manifest = description | dict(versions=versions, npz=Path(npz).name, npz_sha256=sha256_of(npz),
                                      device=torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu')
        with atomic_path(folder.with_name(f'{folder.name}.json')) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + '\n')
        logger.info('packed %d images into %s', recipe.num_images, npz)


def main() -> None:
    recipe = parse_sample_recipe(sys.argv[1:])
    dist.initialize()
    setup_logging(None, dist.is_master())
    sample(recipe)
    dist.finalize()


if __name__ == '__main__':
    with one_line_errors('sample.py'):
        main()
