"""Settings of `extract.py`, which encodes a data set once."""

from dataclasses import dataclass
from typing import Any, ClassVar

from configs import CONFIGS
from configs import FAMILIES as GENERATORS
from configs.options import INF, check_values, expand_paths, ints, opt, parse_settings
from configs.training import CROP_KINDS, CROPS, PATCH_NUMS, VAL_SPLIT_HELP, VAL_SPLIT_LIMITS
from utils.console import require_data, require_weights
from utils.machine import automatic_workers


@dataclass(frozen=True)
class ExtractSettings:
    """Settings of an extraction. Flags are those of the published scripts."""

    IGNORED: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ('vq_model', 'vae_embed_dim', 'codebook_size', 'codebook_embed_dim'),
            'it is read from the file of the tokenizer',
        ),
        'global_seed': 'nothing here is random but the crops of --views, which follow from --seed',
        **dict.fromkeys(('dataset', 'debug'), '--data_path is read, with torchrun or without'),
    }

    model: str = opt(
        'flowar', f'generator that the tokens are for: {", ".join(GENERATORS)}', choices=GENERATORS
    )
    vae_ckpt: str = opt('', 'tokenizer weights, any file', 'vae_path vq_ckpt', path=True)
    data_path: str = opt('/path/to/imagenet', 'data set, as for train.py', path=True)
    cached_path: str = opt('', 'folder of the tokens', 'cached_path code_path', path=True)
    split: str = opt('train', 'train or val', choices=('train', 'val'))
    val_split: float = opt(0.0, 'as for train.py, ' + VAL_SPLIT_HELP, limits=VAL_SPLIT_LIMITS)
    exif: bool = opt(True, 'turn images as their EXIF orientation says, as in training')
    image_size: int = opt(256, 'side of the crops in pixels', 'img_size image_size', limits=(1, INF))
    pn: str = opt(
        '',
        'var: sides of the code maps as for train.py; empty takes those in the file of the '
        'tokenizer, or else the published ones',
    )
    views: int = opt(
        0,
        'random crops of every image, as training takes them, in place of the centre crop of its validation',
        limits=(0, INF),
    )
    seed: int = opt(0, 'views: of the random crops', limits=(0, 2**63 - 1))
    crop: str = opt(
        '',
        f'as for train.py, {CROPS}; empty is that of the training, but vae for centre crops of flowar',
        choices=('', *CROP_KINDS),
    )
    mid_reso: float | None = opt(None, 'as for train.py; None is that of the training', limits=(1, INF))
    ten_crop: bool = opt(False, 'corners and centre of a larger centre crop, instead of the centre alone')
    crop_range: float = opt(
        1.1, 'ten_crop: how much larger; published: 1.1, then 1.05 into another folder', limits=(1, INF)
    )
    layout: str = opt(
        'packed',
        'packed: one array; files: one npz per image, as published with MAR',
        choices=('packed', 'files'),
    )
    import_codes: str = opt('', 'pack the codes in this folder: one file per image, as published', path=True)
    batch_size: int = opt(128, 'views per batch', limits=(1, INF))
    workers: int = opt(
        -1,
        'loader processes per rank; -1 is automatic, up to the published 10; 0 loads in the main process',
        'num_workers',
        limits=(-1, INF),
    )
    tf32: bool = opt(True, 'allow TF32 products on CUDA')

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        training = CONFIGS[self.model]
        if not self.crop:
            # The published cache of FlowAR has the centre crops of ADM, though training resizes as VAR does.
            is_published = self.model == 'flowar' and not self.views
            object.__setattr__(self, 'crop', 'vae' if is_published else training.crop)
        if self.mid_reso is None:
            object.__setattr__(self, 'mid_reso', training.mid_reso)
        if self.workers < 0:
            batch_bytes = self.batch_size * 3 * self.image_size**2 * 4
            object.__setattr__(self, 'workers', automatic_workers(10, batch_bytes))
        if not self.cached_path:
            raise ValueError('expected a folder for the tokens: pass --cached_path=FOLDER')
        if self.layout == 'files' and (self.model != 'flowar' or self.ten_crop or self.views):
            raise ValueError('--layout=files is of latents of the centre crop alone: leave it out')
        if self.import_codes and self.model != 'npp':
            raise ValueError('--import_codes is of published codes of NPP: pass --model=npp')
        if self.pn and self.model != 'var':
            raise ValueError(f'--pn is of VAR, a cache of {self.model} needs none: leave it out')
        if list(self.patch_nums) != sorted(self.patch_nums):
            raise ValueError(f'--pn must go from coarse to fine, got {self.pn}')
        if self.views and self.ten_crop:
            raise ValueError('--views and --ten_crop are two kinds of crops: pass one of them')
        if self.views and self.split == 'val':
            raise ValueError('validation sees the centre crop alone: leave out --views')
        if not (self.vae_ckpt or self.import_codes):
            raise ValueError('expected the weights of a tokenizer: pass --vae_path=FILE')

    def require_files(self) -> None:
        """Make sure that what is read is there; what it holds is looked at later.

        Raises:
            ValueError: it is not.
        """
        require_weights(self.vae_ckpt)
        if not self.import_codes:
            require_data(self.data_path)

    @property
    def num_views(self) -> int:
        """Number of views of every image: its crops and their mirror images."""
        return 10 if self.ten_crop else 2 * max(self.views, 1)

    @property
    def patch_nums(self) -> tuple[int, ...]:
        """Sides of the code maps; () takes those in the file of the tokenizer."""
        return ints(PATCH_NUMS.get(self.pn, self.pn)) if self.pn else ()

    def describe_crops(self) -> dict[str, Any]:
        """What decides the views, for the manifest; None where a setting changes nothing."""
        if self.views:
            return dict(views=self.views, crop=self.crop, mid_reso=self.mid_reso, seed=self.seed)
        if not self.ten_crop and self.crop == 'resize':
            return dict(views=0, crop='resize', mid_reso=self.mid_reso, seed=None)
        return dict(views=0, crop='adm', mid_reso=None, seed=None)


def parse_extraction(argv: list[str], prog: str = 'extract.py') -> ExtractSettings:
    """The settings of a command line."""
    return parse_settings(ExtractSettings, argv, prog, 'Encode a data set once.')
