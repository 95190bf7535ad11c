"""Commands of `evaluate.py`: the settings of each, and its command line.

Torch is not imported here, so that wrong flags and missing files are answered at once.
"""
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from configs.options import INF, REPO, check_values, check_weights, expand_paths, ints, make_parser, opt
from configs.tokenizers import CONFIGS as TOKENIZERS
from configs.training import VAL_SPLIT_HELP, VAL_SPLIT_LIMITS
from utils.console import require_data, require_weights
from utils.files import SUFFIXES
from utils.machine import automatic_workers

NETWORKS = ('inception', 'digits')
STANDARD_COUNT = 50_000
SCORES = {'is': 'Inception Score', 'fid': 'FID', 'sfid': 'sFID', 'precision': 'Precision',
          'recall': 'Recall'}  # in the original's order and words
TOKENIZER_SCORES = ('psnr', 'ssim', 'lpips', 'rfid', 'usage')
ENCODERS = ('inception', 'convnext', 'dinov2', 'mae', 'siglip', 'clip', 'dinov2_dgm', 'dinov2_edm2',
            'clip336', 'digits')  # keys of `evaluation.encoders.ENCODERS`
ADM = 'adm'  # in --metrics: all of SCORES that the files allow
BEYOND = {  # scores beyond those of ADM, see `evaluation.beyond_fid`
    'fdr6': 'Frechet distances of six encoders, divided by those of the validation images of ImageNet',
    'fd_dinov2': 'FD-DINOv2 as EDM2 computes it',
    'fd_dinov2_dgm': 'FD-DINOv2 as dgm-eval computes it',
    'kid': 'Kernel Inception Distance',
    'cmmd': 'CMMD, the distance of CLIP embeddings',
    'prdc': 'density, coverage, and precision and recall with a strict comparison',
    'mind': 'distance along random directions',
    'vendi': 'Vendi score, the number of different images',
    'fd_inf': 'Frechet distance for infinitely many images, from 15 numbers of images',
    'memory': 'distances to the nearest training images of --bank, a diagnostic',
}
SSIM_KINDS = ('gauss11', 'uniform7', 'llamagen')
VARIABLE = 'INCEPTION_WEIGHTS'  # environment variable that names the file of the Inception network
ENCODER_VARIABLE = 'ENCODER_WEIGHTS'  # that names the folder of the other encoders' weights


@dataclass(frozen=True)
class DeviceSettings:
    """Where a command runs."""

    batch_size: int = opt(64, 'images per batch and rank', 'bs', limits=(1, INF))
    device: str = opt('', 'cpu or cuda; empty takes cuda where there is one', choices=('', 'cpu', 'cuda'))

    def __post_init__(self):
        expand_paths(self)
        check_values(self)

    def require_files(self) -> None:
        """Make sure that the files to read are there; what they hold is looked at later.

        Raises:
            ValueError: one is not.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FeatureSettings(DeviceSettings):
    """The feature network of a command, and how it runs."""

    features: str = opt('inception', 'network: inception, or digits, which needs no file, for digits alone',
                        choices=NETWORKS)
    inception_weights: str = opt('', 'its published weights; empty searches $INCEPTION_WEIGHTS, the cache, '
                                     "torch's hub folder, then downloads", path=True)
    allow_unverified_weights: bool = opt(False, 'accept other weights: the scores compare with nothing')
    offline: bool = opt(False, 'never download')
    cache: str = opt(str(REPO / 'local_output' / 'cache'), 'folder for weights, and for features of sets',
                     path=True)
    dtype: str = opt('float32', 'of Inception: float32 or float64', choices=('float32', 'float64'))
    encoder_weights: str = opt('', 'folder with <identifier of timm>.safetensors of the other encoders; '
                                   'empty searches $ENCODER_WEIGHTS, the cache, that of the hub, then '
                                   'downloads', path=True)
    encoder_dtype: str = opt('', 'of these encoders: bfloat16 or float32; empty is that of the published '
                                 'numbers', choices=('', 'bfloat16', 'float32'))


@dataclass(frozen=True)
class ScoreSettings(FeatureSettings):
    """Settings of `evaluate.py REF SAMPLE`."""

    ref: str = opt('', 'reference: npz or folder of PNG files', positional=True, path=True)
    sample: str = opt('', 'images to score: npz or folder of PNG files', positional=True, path=True)
    metrics: str = opt('', f'{",".join(SCORES)}, {ADM} for all of these that the files allow, which is what '
                           f'empty takes; and {", ".join(BEYOND)}')
    pr_mode: str = opt('adm', 'precision and recall: adm (float16 as the original) or fp32',
                       choices=('adm', 'fp32'))
    fd_method: str = opt('eigh', 'Frechet distance: eigh, or scipy (sqrtm as the original)',
                         choices=('eigh', 'scipy'))
    split_size: int = opt(5000, 'images per chunk of the Inception Score', limits=(1, INF))
    expected_count: int = opt(STANDARD_COUNT, 'number of images that the sample must hold', limits=(1, INF))
    allow_any_count: bool = opt(False, 'score any number of images')
    statistics: str = opt('', 'folder with statistics of the training images by other encoders than '
                              '--features', path=True)
    real: str = opt('', 'images to compare with in place of those of REF, such as validation images',
                    path=True)
    bank: str = opt('', 'memory: training images', path=True)
    pairs: str = opt('', 'memory: PNG file for the nearest samples, above the training images', path=True)
    prdc_encoder: str = opt('', 'of prdc, vendi, fd_inf and memory; empty is that of --features',
                            choices=('', *ENCODERS))
    prdc_k: int = opt(5, 'prdc: which neighbour the radius of a ball reaches', limits=(1, INF))
    prdc_count: int = opt(10_000, 'prdc: images of each side', limits=(2, INF))
    mind_count: int = opt(5000, 'mind: images of each side', limits=(2, INF))
    json: str = opt('', 'file for scores, settings, hashes and versions', path=True)

    def __post_init__(self):
        super().__post_init__()
        for value, what in ((self.ref, 'reference'), (self.sample, 'sample')):
            if not value:
                raise ValueError(f'expected REF and SAMPLE, got no {what}: evaluate.py REF.npz SAMPLE.npz, '
                                 'or one of the commands that --help lists')
        known = (*SCORES, ADM, *BEYOND)
        unknown = [name for name in self.named if name not in known]
        if unknown:
            nearest = difflib.get_close_matches(unknown[0].lower(), known, n=1, cutoff=0.)[0]
            raise ValueError(f'--metrics must be of {", ".join(known)}, got {", ".join(unknown)}: '
                             f'the nearest is {nearest}')
        if self.json:
            refuse_overwriting(self.json, *filter(None, (self.ref, self.sample, self.real, self.bank)))
        if self.pairs:
            refuse_overwriting(self.pairs, *filter(None, (self.ref, self.sample, self.real, self.bank)))
        if 'memory' in self.named and not (self.bank and self.real):
            raise ValueError('memory compares with training images: pass --bank=IMAGES, and '
                             '--real=IMAGES with images that nobody trained on')
        if self.features == 'digits' and 'sfid' in self.named:
            raise ValueError('--metrics asks for sfid, but the digits network has no spatial features: '
                             'leave it out')

    @property
    def named(self) -> tuple[str, ...]:
        """What --metrics lists, as it was typed; nothing for all that the files allow."""
        return tuple(self.metrics.replace(' ', '').split(',')) if self.metrics else ()

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the metrics of ADM that were asked for."""
        if not self.metrics or ADM in self.named:
            return tuple(SCORES)
        return tuple(name for name in self.named if name in SCORES)

    @property
    def beyond(self) -> tuple[str, ...]:
        """Names of the scores beyond those of ADM that were asked for, in the order of the table."""
        return tuple(name for name in BEYOND if name in self.named)

    def require_files(self) -> None:
        for path in (self.ref, self.sample, self.real, self.bank):
            if path:
                require_images(path)
        if self.statistics and not Path(self.statistics).is_dir():
            raise ValueError(f'expected a folder of statistics, found none at {self.statistics}: pass the '
                             'folder that holds the npz files; a .pkl can run code and is never read')


@dataclass(frozen=True)
class StatsSettings(FeatureSettings):
    """Settings of `evaluate.py stats`."""

    images: str = opt('', 'npz or folder of PNG files', positional=True, path=True)
    output: str = opt('', 'npz to write', positional=True, path=True)
    keep_images: bool = opt(False, 'store the images, too, as precision and recall need')
    encoder: str = opt('', 'network whose statistics are written; empty is that of --features',
                       choices=('', *ENCODERS))

    def __post_init__(self):
        super().__post_init__()
        if not (self.images and self.output):
            raise ValueError('expected INPUT and OUTPUT: evaluate.py stats FOLDER_OR_NPZ OUT.npz')
        refuse_overwriting(self.output, self.images)

    def require_files(self) -> None:
        require_images(self.images)


@dataclass(frozen=True)
class PackSettings:
    """Settings of `evaluate.py pack`."""

    folder: str = opt('', 'PNG files and, where known, labels.npy; or, with --image_size, a data set',
                      positional=True, path=True)
    output: str = opt('', 'npz to write', positional=True, path=True)
    count: int | None = opt(None, 'number of images that the folder must hold; None takes what is there',
                            limits=(1, INF))
    seed: int = opt(0, 'of the order', limits=(0, 2 ** 63 - 1))
    no_shuffle: bool = opt(False, 'keep the order of names; the Inception Score needs a mixed one')
    allow_jpeg: bool = opt(False, 'accept JPEG files, whose losses change FID')
    image_size: int | None = opt(None, 'FOLDER is a data set of train.py, its images are cropped to squares '
                                       'of this side as the references of ADM', limits=(1, INF))
    split: str = opt('val', 'of the data set: val or train', choices=('val', 'train'))
    val_split: float = opt(0.0, 'of the data set, as for train.py: ' + VAL_SPLIT_HELP,
                           limits=VAL_SPLIT_LIMITS)
    exif: bool = opt(True, 'turn the images of a data set as their EXIF orientation says, as in training')

    def __post_init__(self):
        expand_paths(self)
        if not (self.folder and self.output):
            raise ValueError('expected FOLDER and OUTPUT: evaluate.py pack FOLDER OUT.npz')
        check_values(self)
        if self.seed >= 2 ** 32:
            raise ValueError(f'--seed must be below 2**32, got {self.seed}')
        # FOLDER.npz is where the images of FOLDER belong; anything else must not be in the way.
        if Path(self.output).resolve() != Path(f'{self.folder}.npz').resolve():
            refuse_overwriting(self.output, self.folder)

    def require_files(self) -> None:
        """As of the other commands; a data set may be an embedded one, which needs no folder."""
        if self.image_size:
            require_data(self.folder, flag='')
        else:
            require_images(self.folder)


@dataclass(frozen=True)
class ClassifierSettings(DeviceSettings):
    """The classifier of a command, and how it runs."""

    classifier: str = opt('', 'classification model of torchvision, such as convnext_base or swin_v2_b; '
                              'or digits, which needs no file, for digits alone')
    classifier_weights: str = opt('', "its weights; empty takes the published ones from torch's hub folder",
                                  path=True)
    download: bool = opt(False, 'fetch the published weights if they are not there')
    labels: str = opt('', 'class of every image: .npy, or .txt with one per line; empty takes those beside '
                            'the images', path=True)

    def __post_init__(self):
        super().__post_init__()
        if not self.classifier:
            raise ValueError('expected a classifier: pass --classifier=NAME, such as convnext_base')


@dataclass(frozen=True)
class ClassifySettings(ClassifierSettings):
    """Settings of `evaluate.py classify-eval`."""

    sample: str = opt('', 'images: npz or folder of PNG files', positional=True, path=True)
    json: str = opt('', 'file for scores, those of each class, hashes and versions', path=True)

    def __post_init__(self):
        super().__post_init__()
        if not self.sample:
            raise ValueError('expected SAMPLE: evaluate.py classify-eval FOLDER_OR_NPZ --classifier=NAME')
        if self.json:
            inputs = [self.sample, self.labels] if self.labels else [self.sample]
            refuse_overwriting(self.json, *inputs)

    def require_files(self) -> None:
        require_images(self.sample)


@dataclass(frozen=True)
class RejectSettings(ClassifierSettings):
    """Settings of `evaluate.py reject`."""

    images: str = opt('', 'candidates: npz or folder of PNG files', positional=True, path=True)
    output: str = opt('', 'npz to write; its manifest lies beside it', positional=True, path=True)
    n_keep: int = opt(50, 'images to keep of each class')
    ratio: int = opt(2, 'candidates per kept image, the first ones of each class; 0 takes all')
    threshold: float | None = opt(None, 'keep the first candidates with log p(y|x) of at least this, in '
                                        'place of the best; those after the last kept one do not count')
    seed: int = opt(0, 'of the order of what is kept', limits=(0, 2 ** 63 - 1))
    no_shuffle: bool = opt(False, 'keep the order of the candidates; the Inception Score needs a mixed one')

    def __post_init__(self):
        super().__post_init__()
        if not (self.images and self.output):
            raise ValueError('expected IN and OUT: evaluate.py reject FOLDER_OR_NPZ OUT.npz '
                             '--classifier=NAME')
        if self.classifier == 'inception_v3':
            raise ValueError('the classifier must not be the network of the scores, got inception_v3: '
                             'pass another one, such as convnext_base')
        source = str(Path(self.images).resolve())
        target = str(Path(self.output).resolve())
        if not target.endswith('.npz') or target.removesuffix('.npz') == source.removesuffix('.npz'):
            raise ValueError(f'expected an npz of another name than {self.images}, got {self.output}: '
                             'pass another OUT.npz')
        if self.n_keep < 1:
            raise ValueError(f'--n_keep must be at least 1, got {self.n_keep}')
        if self.ratio < 0:
            raise ValueError(f'--ratio must be at least 0, got {self.ratio}')
        if self.threshold is not None and not self.threshold <= 0:
            raise ValueError(f'--threshold is a log-probability, at most 0, got {self.threshold:g}')
        if self.seed >= 2 ** 32:
            raise ValueError(f'--seed must be below 2**32, got {self.seed}')

    def require_files(self) -> None:
        require_images(self.images)


@dataclass(frozen=True)
class TokenizerSettings:
    """Settings of `evaluate.py tokenizer`."""

    ckpt: str = opt('', 'weights: a checkpoint of train.py, a released file, or a published name', path=True)
    model: str = opt('', f'{", ".join(TOKENIZERS)}; empty recognises the weights, but a released flexvae, '
                         'whose keys are those of a vq16', choices=('', *TOKENIZERS))
    weights: str = opt('ema', 'ema: averaged weights where the file has them; raw: those of the last step; '
                              'ema_0.9999: those of that decay, after the first one of several')
    pn: str = opt('', 'sides of the code maps of a vqvae, as in training; empty takes what the file says')
    data_path: str = opt('', 'root with <split>/<class>/<image>, or "digits" or "toy"', path=True)
    split: str = opt('val', 'val or train', choices=('val', 'train'))
    val_split: float = opt(0.0, 'as for train.py, ' + VAL_SPLIT_HELP, limits=VAL_SPLIT_LIMITS)
    exif: bool = opt(True, 'turn images as their EXIF orientation says, as in training')
    num_images: int | None = opt(None, 'images, evenly spread over the split; None takes all',
                                 limits=(1, INF))
    image_size: int | None = opt(None, 'side of the centre crops; None takes what the pyramid fixes, 32 for '
                                       'digits and toy, else 256', limits=(1, INF))
    metrics: str = opt('', f'{", ".join(TOKENIZER_SCORES)} joined by ","; empty takes all that is possible '
                           'here')
    ssim: str = opt('gauss11', 'definition of SSIM: ' + ', '.join(SSIM_KINDS), choices=SSIM_KINDS)
    lpips_net: str = opt('vgg', 'network of LPIPS: vgg or alex', choices=('vgg', 'alex'))
    lpips_vgg: str = opt('', "LPIPS: torchvision's weights of the network", path=True)
    lpips_lin: str = opt('', 'LPIPS: linear heads, version 0.1', path=True)
    lpips_path: str = opt('', 'LPIPS: both in one file, in place of lpips_vgg and lpips_lin', path=True)
    allow_download: bool = opt(False, 'LPIPS: fetch missing files')
    inception_weights: str = opt('', f'rFID: its weights; empty tries ${VARIABLE}, --cache and the hub cache',
                                 path=True)
    cache: str = opt(FeatureSettings.cache, 'rFID: folder for its weights', path=True)
    allow_unverified_weights: bool = opt(False, 'rFID: accept other weights than the published ones')
    reference: str = opt('', 'rFID: also against these statistics, an npz with mu and sigma', path=True)
    precision: int = opt(0, 'of the tokenizer: 0 float32, 1 float16, 2 bfloat16', 'fp16', limits=(0, 2))
    tf32: bool = opt(False, 'allow TF32 products in the tokenizer on CUDA')
    batch_size: int = opt(32, 'images per batch and rank', 'bs', limits=(1, INF))
    workers: int = opt(-1, 'loader processes per rank; -1 is automatic, up to 4; 0 loads in the main '
                           'process', limits=(-1, INF))
    json: str = opt('', 'file for every value with its definition, the settings, versions and hashes',
                    path=True)
    pictures: str = opt('', 'folder for reconstructions.png and code_usage.png', path=True)

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        check_weights(self.weights, 'weights')
        if self.workers < 0:
            batch_bytes = self.batch_size * 3 * (self.image_size or 256) ** 2 * 4
            object.__setattr__(self, 'workers', automatic_workers(4, batch_bytes))
        if not self.ckpt:
            raise ValueError('expected the weights of a tokenizer: pass --ckpt=FILE')
        if not self.data_path:
            raise ValueError('expected images: pass --data_path=ROOT with ROOT/val, or digits, or toy')
        unknown = sorted(set(self.wanted) - set(TOKENIZER_SCORES))
        if unknown:
            raise ValueError(f'--metrics must be of {", ".join(TOKENIZER_SCORES)}, got {", ".join(unknown)}')
        if self.pn:
            ints(self.pn)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the metrics that were asked for."""
        if not self.metrics:
            return TOKENIZER_SCORES
        return tuple(self.metrics.replace(' ', '').split(','))

    def insists_on(self, metric: str) -> bool:
        """Whether the user asked for a metric by its name or by its files, so that it may not be skipped."""
        files = dict(lpips=(self.lpips_vgg, self.lpips_lin, self.lpips_path),
                     rfid=(self.inception_weights, self.reference))
        return bool(self.metrics) or any(files[metric])

    def require_files(self) -> None:
        """As of the other commands."""
        require_weights(self.ckpt)
        require_data(self.data_path)


@dataclass(frozen=True)
class ScalingSettings:
    """Settings of `evaluate.py scaling`."""

    runs: str = opt('', 'folder with an output folder of train.py for each training', positional=True,
                    path=True)
    draws: int = opt(1000, 'bootstrap draws for the intervals', limits=(1, 100_000))
    seed: int = opt(0, 'of these draws', limits=(0, 2 ** 63 - 1))
    json: str = opt('', 'file for trainings, laws and intervals', path=True)
    plot: str = opt('', 'PNG file for the plot', path=True)

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        if not self.runs:
            raise ValueError('expected FOLDER: evaluate.py scaling FOLDER, where FOLDER/*/log.txt are the '
                             'logs of trainings of several depths')

    def require_files(self) -> None:
        """As of the other commands."""
        if not Path(self.runs).is_dir():
            raise ValueError(f'expected a folder of trainings, found none at {self.runs}: check the path')


@dataclass(frozen=True)
class TableSettings:
    """Settings of `evaluate.py table`."""

    files: str = opt('', 'reports of evaluate.py, lists of reported scores', positional=True, path=True,
                     several=True)
    output: str = opt('', 'Markdown file to write, too', path=True)

    def __post_init__(self):
        expand_paths(self)
        if not self.files:
            raise ValueError('expected files of scores: evaluate.py table docs/scores.json')
        if self.output:
            refuse_overwriting(self.output, *self.files.split(','))

    def require_files(self) -> None:
        require_files(self.files)


@dataclass(frozen=True)
class SummarySettings:
    """Settings of `evaluate.py summary`."""

    files: str = opt('', 'reports of evaluate.py for samples of several seeds', positional=True, path=True,
                     several=True)

    def __post_init__(self):
        expand_paths(self)
        if not self.files:
            raise ValueError('expected reports: evaluate.py summary A.json B.json C.json')

    def require_files(self) -> None:
        require_files(self.files)


@dataclass(frozen=True)
class EncodersSettings:
    """Settings of `evaluate.py encoders`."""

    encoder_weights: str = opt('', 'folder with <identifier of timm>.safetensors, as for scores', path=True)
    statistics: str = opt('', 'folder with statistics of training images, as for scores', path=True)
    cache: str = opt(FeatureSettings.cache, 'another folder for weights', path=True)

    def __post_init__(self):
        expand_paths(self)
        check_values(self)

    def require_files(self) -> None:
        """As of the other commands; what is missing is what this one tells."""


class Command(NamedTuple):
    """A command of `evaluate.py`."""
    settings: type    # dataclass of its flags
    description: str  # for --help


SCORE = Command(ScoreSettings, 'Score images against a reference, as the evaluator of ADM.')
TOKENIZER = Command(TokenizerSettings, 'Rate the reconstructions of a tokenizer, and how it uses its codes.')
COMMANDS = {
    'stats': Command(StatsSettings, 'Write the statistics of images, as a reference.'),
    'pack': Command(PackSettings, 'Pack a folder of images into one npz.'),
    'classify-eval': Command(ClassifySettings, 'Rate images by a classifier.'),
    'reject': Command(RejectSettings, 'Rejection sampling by a classifier.'),
    'encoders': Command(EncodersSettings, 'List encoders, and which of their files are on this machine.'),
    'scaling': Command(ScalingSettings, 'Fit scaling laws to trainings of several depths.'),
    'table': Command(TableSettings, 'Table of reported and measured scores, as Markdown.'),
    'summary': Command(SummarySettings, 'Mean and standard deviation of reports over seeds.'),
    'tokenizer': TOKENIZER,
    'reconstruct-eval': TOKENIZER,
}


def parse_evaluation(argv: list[str], text: str) -> Any:
    """The settings of a command line, of the class of its command; without a command's name, score images.

    Args:
        text: for --help: a summary and, after an empty line, all commands.
    """
    if not argv or argv[0] in ('-h', '--help'):
        summary, commands = text.split('\n\n', 1)
        make_parser(ScoreSettings, 'evaluate.py', summary).print_help()
        sys.stdout.write(f'\n{commands}\n')
        sys.exit(0 if argv else 2)
    name = argv[0] if argv[0] in COMMANDS else ''
    command = COMMANDS.get(name, SCORE)
    parser = make_parser(command.settings, f'evaluate.py {name}'.strip(), command.description)

    # A misspelt command would be taken for the path of a reference.
    meant = difflib.get_close_matches(argv[0], COMMANDS, n=1, cutoff=0.7)
    if not name and meant and not Path(argv[0]).exists():
        parser.error(f'expected REF or a command, got {argv[0]!r}: the nearest command is {meant[0]}')
    try:
        values = parser.parse(argv[1:] if name else argv)
        return command.settings(**values)
    except ValueError as error:
        parser.error(str(error))


# ---------------------------------------------------------------------------------------------- files
def require_images(path: str) -> None:
    """Make sure that a file or folder of images is there.

    Raises:
        ValueError: it is not.
    """
    if not Path(path).exists():
        raise ValueError(f'expected an npz file or a folder of images, found nothing at {path}: '
                         'check the path')


def require_files(paths: str) -> None:
    """Make sure that files, whose paths are joined by commas, are there.

    Raises:
        ValueError: one is not.
    """
    for path in paths.split(','):
        if not Path(path).is_file():
            raise ValueError(f'expected a file of scores, found none at {path}: check the path')


def manifest_of(path: Path) -> Path:
    """Where sample.py describes a file or folder of images."""
    path = path.absolute()
    return path.with_name(f'{path.name.removesuffix(".npz")}.json')


def refuse_overwriting(output: str, *inputs: str) -> None:
    """Make sure that writing a result destroys neither an input, nor a file of an input folder or manifest.

    Raises:
        ValueError: the result would be written over one of them.
    """
    target = Path(output).resolve()
    for path in map(Path, inputs):
        is_image = target.parent == path.resolve() and target.suffix.lower() in (*SUFFIXES, '.npy')
        manifest = manifest_of(path)
        described_npz = manifest.with_suffix('.npz')
        taken = (path.resolve(), manifest.resolve(), described_npz.resolve())
        if is_image or target in taken:
            raise ValueError(f'expected a file of its own for the result, got {output}, which is or '
                             f'describes {path}: pass another name')
