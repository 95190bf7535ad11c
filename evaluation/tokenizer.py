"""Scores of a tokenizer: `python evaluate.py tokenizer --ckpt=FILE --data_path=ROOT`.

It rates reconstructions of the validation images, cropped as in the evaluation of ADM: PSNR, SSIM, LPIPS,
rFID, and how codes or latents are used, all from pixels rounded to 8 bits. Prints a table; `--json=FILE` also
writes every value with the settings that decided it, `--pictures=DIR` draws reconstructions and code usage.
Read it from `evaluate_tokenizer`.
"""
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

import dist
from configs.options import ints
from configs.training import PATCH_NUMS
from evaluation.inception import NUM_FEATURES, InceptionFeatures
from evaluation.metrics import SSIM_DEFINITIONS, read_statistics, to_uint8
from evaluation.pairs import PairScores
from evaluation.pictures import reconstruction_rows, save_png, usage_heat_map
from evaluation.score import write_json
from evaluation.settings import TokenizerSettings
from models import FAMILIES, LPIPS, VQVAE, CodeUsage, Tokenizer, build_tokenizer, families_of
from utils.amp_sc import autocast
from utils.checkpoint import kind_of_weights, load_on_all_ranks, tokenizer_weights
from utils.data import EMBEDDED, EMBEDDED_SIZE, build_transforms, open_split
from utils.data_sampler import EvalDistributedSampler
from utils.hub import fetch, lpips_state
from utils.misc import allow_tf32
from utils.provenance import device_name, versions

logger = logging.getLogger(__name__)
TOKENIZERS = {name: family.model for name, family in FAMILIES.items() if family.tokenizer is None}
NUM_PICTURES = 8

Network = Callable[..., torch.Tensor]
Statistics = tuple[torch.Tensor, torch.Tensor]  # mean and covariance of features


# ---------------------------------------------------------------------------------------------- the command
def evaluate_tokenizer(settings: TokenizerSettings) -> str | None:
    """`evaluate.py tokenizer`: the table for the reader on the master, None on the other ranks.

    Raises:
        ValueError: a file cannot be read, does not fit, or a reconstruction is not finite.
    """
    begin = time.time()
    device = dist.get_device()
    allow_tf32(False)

    # Whatever can fail is made or read first: folders, weights, images, the networks of the metrics.
    for folder in (settings.pictures, settings.json and Path(settings.json).parent):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer, source = load_tokenizer(settings, device)
    images, size = load_images(settings, tokenizer)
    networks, skipped = load_networks(settings, device)
    references = {}
    if settings.reference and 'rfid' in networks:
        references[Path(settings.reference).name] = read_statistics(settings.reference, NUM_FEATURES)

    # Every rank rates its own images; sums and values per image are gathered at the end.
    scores = TokenizerScores(settings, tokenizer, networks, device)
    loader = DataLoader(
        images,
        settings.batch_size,
        num_workers=settings.workers,
        sampler=EvalDistributedSampler(images, dist.get_world_size(), dist.get_rank()),
        pin_memory=torch.cuda.is_available(),
    )
    log_every = max(len(loader) // 10, 1)
    for number, (batch, _) in enumerate(loader, start=1):
        scores.add(batch.to(device, non_blocking=True))
        if number % log_every == 0:
            logger.info('batch %d of %d on this rank, %.1f s', number, len(loader), time.time() - begin)
    scores.reduce()

    # Calibration changes the tokenizer, so it comes after the scores.
    latents = {}
    if tokenizer.needs_calibration and 'usage' in settings.wanted:
        latents = latent_scores(tokenizer, (batch for batch, _ in loader))

    text = None
    if dist.is_master():
        if 'rfid' in networks and len(images) <= NUM_FEATURES:
            logger.warning('rFID of %d images has a rank-deficient covariance and a strong bias: '
                           '50,000 images are standard', len(images))
        values = scores.scores(references) | latents
        report = dict(
            command='tokenizer',
            scores=values,
            skipped=skipped,
            definitions=definitions(settings, values),
            checkpoint=source,
            images=f'{settings.data_path}/{settings.split}',
            num_images=len(images),
            image_size=size,
            pixels='ADM centre crop; 8 bits, 127.5 x + 127.5 rounded half up',
            settings=dataclasses.asdict(settings),
            versions=versions(),
            device=device_name(device),
            world_size=dist.get_world_size(),
            seconds=time.time() - begin,
        )
        if settings.json:
            write_json(settings.json, report)
        if settings.pictures:
            write_pictures(Path(settings.pictures), tokenizer, images, scores.usage, device)
        scales = list(scores.usage.counts) if scores.usage else []
        text = table(report, scales)
    dist.barrier()
    return text


# ---------------------------------------------------------------------------------------------- what is rated
def recognise(model: str, checkpoint: dict[str, Any], state: dict[str, torch.Tensor],
              source: str) -> type[Tokenizer]:
    """The class of the tokenizer that has the weights `state`.

    It is the one that the user or the checkpoint names; without a name, the first one whose weights have
    such keys and shapes.

    Args:
        model: the name that the user gave, or ''.
        source: where the weights come from, for errors.
    Raises:
        ValueError: the weights belong to no known tokenizer, or the user names another one than was trained.
    """
    trained = (checkpoint.get('args') or {}).get('model')
    name = model or trained
    if trained in TOKENIZERS and name != trained:
        raise ValueError(f'{source} was trained with --model={trained}, got --model={model}: leave it out')
    if name in TOKENIZERS:
        return TOKENIZERS[name]
    found = families_of(state, TOKENIZERS)
    if found:
        return TOKENIZERS[found[0]]
    raise ValueError(f'{source} holds weights of no known tokenizer ({", ".join(TOKENIZERS)}): '
                     'pass the checkpoint of a tokenizer or of a generator trained here')


def load_tokenizer(settings: TokenizerSettings, device: torch.device) -> tuple[Tokenizer, dict[str, Any]]:
    """The frozen tokenizer; every rank calls it, and all of them get the same weights.

    Returns:
        The tokenizer, and where it comes from: its file, class, kind of weights and SHA-256.
    Raises:
        ValueError: the file cannot be read, or the sides of the code maps are missing or superfluous.
    """
    path = fetch(settings.ckpt)
    checkpoint, digest = load_on_all_ranks(path)
    state, config = tokenizer_weights(checkpoint, settings.weights)
    cls = recognise(settings.model, checkpoint, state, str(path))

    # Released files have no settings, so a pyramid may have to come from --pn.
    if settings.pn:
        if cls is not VQVAE:
            raise ValueError(f'--pn is for a vqvae, {path} holds a {cls.__name__}: leave it out')
        config = config | dict(v_patch_nums=ints(PATCH_NUMS.get(settings.pn, settings.pn)))
    tokenizer = build_tokenizer(cls, state, str(path), device, **config)
    counters = state.get('quantize.ema_vocab_hit_SV')  # has a row per scale, and so tells how many there are
    if counters is not None and not settings.pn and len(counters) != len(tokenizer.quantize.v_patch_nums):
        raise ValueError(f'{path} does not tell the sides of its {len(counters)} code maps: pass --pn')

    source = dict(
        file=str(path),
        model=cls.__name__,
        weights=kind_of_weights(checkpoint, settings.weights, is_generator=False),
        sha256=digest,
    )
    return tokenizer, source


def load_images(settings: TokenizerSettings, tokenizer: Tokenizer) -> tuple[Dataset, int]:
    """The centre crops of the images to rate, and the side of these crops in pixels.

    Raises:
        ValueError: the tokenizer has no codes for this size.
    """
    # A pyramid of code maps fixes the size of the images; other tokenizers are convolutional and take any.
    fixed = tokenizer.fixed_image_size
    default = EMBEDDED_SIZE if settings.data_path in EMBEDDED else 256
    size = settings.image_size or fixed or default
    if fixed and size != fixed:
        raise ValueError(f'the pyramid {tokenizer.quantize.v_patch_nums} at stride {tokenizer.stride} is for '
                         f'images of {fixed} pixels, got --image_size={size}: pass the --pn of this size')
    tokenizer.map_size(size, size)  # raises where the size is no multiple of the stride

    # Spread over the split, since its images are sorted by class.
    _, transform = build_transforms(size, crop='adm')
    images = open_split(settings.data_path, settings.split, transform, settings.exif, settings.val_split)
    count = min(settings.num_images or len(images), len(images))
    index = np.linspace(0, len(images), count, endpoint=False, dtype=int)
    return Subset(images, index.tolist()), size


def load_networks(settings: TokenizerSettings,
                  device: torch.device) -> tuple[dict[str, Network], dict[str, str]]:
    """The networks of the wanted metrics; a network that is missing on one rank is left out on all of them.

    Every rank calls it.

    Returns:
        The networks by metric, and the reasons why the other metrics are skipped, by metric.
    Raises:
        ValueError: a network is missing whose metric the settings insist on.
    """
    def load_lpips() -> Network:
        files = (settings.lpips_vgg, settings.lpips_lin, settings.lpips_path)
        lpips = LPIPS(settings.lpips_net)
        lpips.load_published(*lpips_state(*files, settings.allow_download, settings.lpips_net))
        return lpips.to(device)

    def load_inception() -> Network:
        return InceptionFeatures(settings.inception_weights, device, settings.allow_unverified_weights,
                                 settings.cache)

    networks = {}
    skipped = {}
    for metric, load in (('lpips', load_lpips), ('rfid', load_inception)):
        if metric not in settings.wanted:
            continue
        try:
            # One process of a node downloads, the others then find the file.
            networks[metric] = dist.first_of_node_first(lambda _, load=load: load())
        except ValueError as error:
            if settings.insists_on(metric):
                raise
            skipped[metric] = str(error)
    return networks, skipped


# ---------------------------------------------------------------------------------------------- scores
class TokenizerScores:
    """Reconstructs batches and rates them: `add` on every rank, `reduce` once, read `scores`.

    Args:
        networks: by metric, 'lpips' and 'rfid' or neither; see `distances` and `features` of `PairScores`.
    """

    def __init__(self, settings: TokenizerSettings, tokenizer: Tokenizer, networks: dict[str, Network],
                 device: torch.device):
        self.settings = settings
        self.tokenizer = tokenizer
        distances = {}
        if 'lpips' in networks:
            distances[f'lpips_{settings.lpips_net}'] = networks['lpips']
        self.pairs = PairScores(
            with_psnr='psnr' in settings.wanted,
            ssim_definition=settings.ssim if 'ssim' in settings.wanted else '',
            distances=distances,
            features=networks.get('rfid'),
            num_features=NUM_FEATURES,
            device=device,
        )
        self.usage = CodeUsage(tokenizer.vocab_size) if tokenizer.vocab_size else None

    @torch.no_grad()
    def add(self, images_B3HW: torch.Tensor) -> None:
        """Reconstruct and rate images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: a reconstruction is not finite.
        """
        # TF32 is for the tokenizer alone: the networks of the metrics stay as exact as published scores.
        allow_tf32(self.settings.tf32)
        with autocast(images_B3HW.device.type, self.settings.precision):
            out = self.tokenizer.reconstruct(images_B3HW)
        allow_tf32(False)

        # A tokenizer of several sizes also reconstructs smaller copies of the images; their scores get the
        # size of the token map as a suffix.
        for target, reconstruction in out.views:
            if not reconstruction.isfinite().all():
                raise ValueError('a reconstruction holds nan or infinite pixels: the weights are damaged, '
                                 'or float16 overflows (pass --fp16=0)')
            suffix = ''
            if target.shape != images_B3HW.shape:
                rows = target.shape[-2] // self.tokenizer.stride
                columns = target.shape[-1] // self.tokenizer.stride
                suffix = f'_{rows}x{columns}'
            self.pairs.add(to_uint8(target), to_uint8(reconstruction), suffix)
        if self.usage is not None:
            self.usage.add(out.codes)

    def reduce(self) -> None:
        """Gather what all ranks have seen; every rank calls it, once."""
        self.pairs.reduce()
        if self.usage is not None:
            self.usage.reduce()

    def scores(self, references: dict[str, Statistics]) -> dict[str, float | int | None]:
        """Every score by name; None where it is not defined.

        Args:
            references: (mean, covariance) of features by name, for distances beside that to the originals.
        """
        scores = self.pairs.scores()
        if self.pairs.features is not None:
            scores[f'rfid_{self.settings.split}'] = self.pairs.frechet_distance()
            for name, statistics in references.items():
                scores[f'rfid_{name}'] = self.pairs.frechet_distance(statistics)
        if self.usage is not None and 'usage' in self.settings.wanted:
            scores |= self.usage.metrics()
        return scores


def latent_scores(tokenizer: Tokenizer, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """Spread of continuous latents over the images of all ranks; every rank calls it.

    Args:
        batches: images (B, 3, H, W) in [-1, 1]; the tokenizer is calibrated on them, which changes it.
    """
    factor_in_file = tokenizer.scaling_factor
    tokenizer.calibrate(batches)
    scores = dict(scaling_factor=factor_in_file, scaling_factor_here=tokenizer.scaling_factor)
    for channel, std in enumerate(tokenizer.latent_std):
        scores[f'latent_std_{channel}'] = std
    return scores


def definitions(settings: TokenizerSettings, scores: Iterable[str]) -> dict[str, str]:
    """What the names of these scores mean; the name of a score of one scale begins with its key here."""
    fid = 'Frechet distance of Inception pool features'
    meanings = {
        'psnr': 'dB, 10 log10(255^2 / MSE) per image, mean over all that are not identical',
        'psnr_of_mean_mse': 'dB, of the squared error averaged over the images',
        'identical_images': 'reconstructed without any error, not in psnr',
        f'ssim_{settings.ssim}': SSIM_DEFINITIONS[settings.ssim].text,
        f'lpips_{settings.lpips_net}': f'LPIPS 0.1 with {settings.lpips_net}, mean over images',
        f'rfid_{settings.split}': f'{fid}, reference: the same crops of the originals',
        f'rfid_{Path(settings.reference).name}': f'{fid}, reference: {settings.reference}',
        'usage': 'distinct / reachable codes, reachable = min(vocabulary, tokens)',
        'perplexity': 'exp(entropy) of the codes',
        'distinct': 'codes used at least once',
        'dead': 'codes never used',
        'top10': 'share of the tokens on the 10 most used codes',
        'scaling_factor': 'what the file multiplies samples of the latent with',
        'scaling_factor_here': '1 / standard deviation of samples on these images',
        'latent_std': 'standard deviation of samples before scaling, by channel',
    }
    found = {}
    for name, text in meanings.items():
        if any(score == name or score.startswith(f'{name}_') for score in scores):
            found[name] = text
    return found


# ---------------------------------------------------------------------------------------------- output
def table(report: dict[str, Any], scales: list[str]) -> str:
    """The report for a reader: a line per score, a row per scale, a line per metric that was skipped.

    Args:
        scales: names of the scales that have scores of their own.
    """
    def number(value: float | int | None) -> str:
        if value is None:
            return '-'
        is_whole = value == int(value)
        return f'{value:.0f}' if is_whole else f'{value:.4f}'

    source = report['checkpoint']
    scores = report['scores']
    meaning = report['definitions']
    endings = tuple(f'_{scale}' for scale in scales)
    per_scale = [name for name in scores if name.endswith(endings)]
    overall = [name for name in scores if name not in per_scale]

    lines = [f'{Path(source["file"]).name}: {source["model"]}, {source["weights"]} weights, '
             f'{report["num_images"]} images of {report["images"]} at {report["image_size"]} pixels']
    width = max(map(len, overall), default=0)
    for name in overall:
        line = f'{name:{width}} {number(scores[name]):>12}  {meaning.get(name, "")}'
        lines.append(line.rstrip())

    # Scores of single scales are named <score>_<scale>, and shown as a table of these two.
    columns = dict.fromkeys(name.rpartition('_')[0] for name in per_scale)
    if columns:
        lines.append(f'{"scale":>8}' + ''.join(f'{column:>14}' for column in columns))
        for scale in scales:
            values = [number(scores.get(f'{column}_{scale}')) for column in columns]
            lines.append(f'{scale:>8}' + ''.join(f'{value:>14}' for value in values))
    lines += [f'skipped: {name}: {why}' for name, why in report['skipped'].items()]
    return '\n'.join(lines)


def write_pictures(folder: Path, tokenizer: Tokenizer, images: Dataset, usage: CodeUsage | None,
                   device: torch.device) -> None:
    """Write reconstructions.png, of images spread over the data set, and for codes code_usage.png."""
    count = min(NUM_PICTURES, len(images))
    chosen = np.linspace(0, len(images) - 1, count, dtype=int)
    batch = torch.stack([images[i][0] for i in chosen.tolist()]).to(device)
    with torch.no_grad():
        rows = reconstruction_rows(batch, tokenizer.progressive(batch))
    save_png(folder / 'reconstructions.png', rows)
    if usage is not None and usage.counts:
        save_png(folder / 'code_usage.png', usage_heat_map(usage.counts))
