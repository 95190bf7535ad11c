"""Recipes: every setting of a training run, by preset or command line, and all that follows from them.

A recipe is a frozen dataclass. Field names are English; the flag published with VAR, where there is one, is
given beside each field and parses as well (`--tblr` and `--base_lr` are the same).
Only the standard library is needed here.
"""
import argparse
import dataclasses
import difflib
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATCH_NUMS = {
    '256': '1_2_3_4_5_6_8_10_13_16',
    '512': '1_2_3_4_6_9_13_18_24_32',
    '1024': '1_2_3_4_5_7_9_12_16_21_27_36_48_64',
}
REPO = Path(__file__).resolve().parent.parent

INF = float('inf')
LIMITS = {  # smallest and largest sensible value of a field, of any recipe that has it
    'batch_size': (1, INF), 'accumulate': (1, INF), 'epochs': (1, INF), 'eval_every': (1, INF),
    'num_classes': (0, INF), 'workers': (-1, INF), 'mid_reso': (1, INF), 'seed': (0, 2 ** 63 - 1),
    'precision': (0, 2), 'compile_model': (0, 3), 'compile_tokenizer': (0, 3), 'base_lr': (0, INF),
    'warmup': (0, INF), 'warmup_start': (0, 1), 'lr_end': (0, 1), 'weight_decay': (0, INF),
    'weight_decay_end': (0, INF), 'beta1': (0, 1), 'beta2': (0, 1), 'patch_size': (1, INF), 'depth': (1, INF),
    'drop_path': (-1, 0.999), 'label_smooth': (0, 0.999), 'progressive_until': (0, 1), 'vocab_size': (2, INF),
    'z_channels': (1, INF), 'num_res_blocks': (1, INF), 'dropout': (0, 0.999), 'beta': (0, INF),
    'num_images': (1, INF), 'cfg': (-1000, 1000), 'top_k': (0, INF), 'top_p': (0, 1),
}


def opt(default: Any, text: str, flag: str = '') -> Any:
    """A field with its help text and, where it differs from the field's name, the published flag."""
    return field(default=default, metadata=dict(help=text, flag=flag))


def ints(text: str) -> tuple[int, ...]:
    """'1_2_3' or '1-2-3' -> (1, 2, 3).

    Raises:
        ValueError: not a list of positive integers.
    """
    parts = text.replace('-', '_').split('_')
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f'expected positive integers joined by "_", such as 1_2_3, got {text!r}')
    return tuple(map(int, parts))


def check_limits(recipe: 'Recipe | SampleRecipe') -> None:
    """Check every number of a recipe against `LIMITS`.

    Raises:
        ValueError: one lies outside.
    """
    for name, (low, high) in LIMITS.items():
        value = getattr(recipe, name, None)
        if value is not None and not low <= value <= high:
            bounds = f'at least {low:g}' if high == INF else f'in [{low:g}, {high:g}]'
            raise ValueError(f'--{flag_of(recipe, name)} must be {bounds}, got {value:g}')


@dataclass(frozen=True)
class Recipe:
    """Settings of any training, generator or tokenizer. Derived values are properties and never stored."""

    model: str = opt('var', 'what is trained: var, vqvae')
    # data
    data_path: str = opt('/path/to/imagenet', 'root with train/ and val/ class folders, or "digits"')
    num_classes: int = opt(0, 'classes; 0 takes the number of folders, any other number must agree with it')
    mid_reso: float = opt(1.125, 'images are resized to this multiple of the crop before cropping')
    hflip: bool = opt(False, 'random horizontal flip')
    workers: int = opt(-1, 'loader processes per rank; -1 is automatic, 0 loads in the main process')
    # run
    exp_name: str = opt('text', 'name written to the log header')
    output_dir: str = opt(str(REPO / 'local_output'), 'logs and checkpoints', 'local_out_dir_path')
    seed: int | None = opt(None, 'None draws one, kept in the checkpoint; given, cudnn is deterministic too')
    same_seed_for_all_ranks: int = opt(0, 'offset of the data order seed')
    save_every: str = opt('', 'checkpoint also every N optimizer steps ("500") or minutes ("20m")')
    eval_every: int = opt(10, 'epochs between evaluations; the last epoch always has one')
    dry_run: bool = opt(False, 'print every derived value as JSON and exit')
    allow_round: bool = opt(False, 'accept a batch size that the ranks cannot share evenly, and round it')
    # optimisation
    base_lr: float = opt(1e-4, 'learning rate per 256 images', 'tblr')
    tlr: float | None = opt(None, 'accepted, always replaced by base_lr * batch / 256')
    weight_decay: float = opt(0.05, 'weight decay at the start', 'twd')
    weight_decay_end: float = opt(0., 'weight decay at the end; 0 keeps the start', 'twde')
    clip: float = opt(2., 'clip of the gradient norm; <= 0 is off', 'tclip')
    batch_size: int = opt(768, 'images per optimizer step, all ranks and accumulation steps together', 'bs')
    accumulate: int = opt(1, 'micro-steps per optimizer step', 'ac')
    epochs: int = opt(250, 'epochs', 'ep')
    warmup: float = opt(0., 'epochs of learning rate warm-up; 0 means epochs / 50', 'wp')
    warmup_start: float = opt(0.005, 'learning rate ratio at the first step', 'wp0')
    lr_end: float = opt(0.01, 'learning rate ratio at the last step', 'wpe')
    schedule: str = opt('lin0', 'cos, lin, lin0, lin00, lin<number> or exp', 'sche')
    optimizer: str = opt('adamw', 'adam and adamw both mean AdamW', 'opt')
    fused: bool = opt(True, 'fused AdamW kernel', 'afuse')
    beta1: float = opt(0.9, 'first moment decay of AdamW')
    beta2: float = opt(0.95, 'second moment decay of AdamW')
    # numerics
    precision: int = opt(0, '0 float32, 1 float16 with loss scaling, 2 bfloat16', 'fp16')
    tf32: bool = opt(True, 'allow TF32 products on CUDA')
    compile_tokenizer: int = opt(0, 'torch.compile: 0 off, 1 reduce-overhead, 2 max-autotune, 3 default',
                                 'vfast')
    compile_model: int = opt(0, 'as vfast, for the model', 'tfast')

    CHECKPOINT_PREFIX: typing.ClassVar[str] = 'ar-ckpt'

    def __post_init__(self):
        check_limits(self)
        if not re.fullmatch(r'cos|lin|lin00|lin\d*\.?\d+|exp', self.schedule.strip()):
            raise ValueError('--sche must be cos, lin, lin0, lin00, lin<number> or exp, '
                             f'got {self.schedule!r}')
        if self.optimizer.lower().strip() not in ('adam', 'adamw'):
            raise ValueError(f'--opt must be adam or adamw, got {self.optimizer!r}')
        if not re.fullmatch(r'|[1-9]\d*m?', self.save_every):
            raise ValueError('--save_every must be a number of steps ("500") or minutes ("20m"), '
                             f'got {self.save_every!r}')

    # ------------------------------------------------------------------------------ what follows
    local_out_dir_path = property(lambda self: self.output_dir)

    @property
    def image_size(self) -> int:
        """Side of the training images in pixels."""
        raise NotImplementedError

    def local_batch(self, world_size: int) -> int:
        """Images per rank and micro-step."""
        return round(self.batch_size / self.accumulate / world_size)

    def micro_batch(self, world_size: int) -> int:
        """Images of all ranks per micro-step (published: glb_batch_size)."""
        return self.local_batch(world_size) * world_size

    def check_batch(self, world_size: int) -> None:
        """Make sure that the batch can be shared.

        Raises:
            ValueError: ranks and accumulation steps cannot share the batch evenly.
        """
        share = self.accumulate * world_size
        if self.local_batch(world_size) < 1 or (self.batch_size % share and not self.allow_round):
            fitting = max(share, self.batch_size // share * share)
            raise ValueError(f'--bs={self.batch_size} cannot be shared by {world_size} ranks x '
                             f'--ac={self.accumulate}: pass --bs={fitting}, or --allow_round=1 to round it')

    def peak_lr(self, world_size: int) -> float:
        return self.accumulate * self.base_lr * self.micro_batch(world_size) / 256

    @property
    def final_weight_decay(self) -> float:
        return self.weight_decay_end or self.weight_decay

    @property
    def warmup_epochs(self) -> float:
        return self.warmup or self.epochs / 50

    @property
    def lr_schedule(self) -> str:
        return self.schedule

    def num_workers(self, world_size: int, num_cpus: int | None = None) -> int:
        """Loader processes per rank: as asked, or the CPUs of this machine divided by its ranks, up to 16."""
        local_batch = self.local_batch(world_size)
        if self.workers >= 0:
            return min(self.workers, local_batch)
        local_ranks = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        return min(max((num_cpus or os.cpu_count() or 1) // local_ranks - 1, 0), 16, local_batch)

    @property
    def save_steps_minutes(self) -> tuple[int, float]:
        """(optimizer steps, minutes) between extra checkpoints; 0 is off."""
        if self.save_every.endswith('m'):
            return 0, float(self.save_every[:-1])
        return int(self.save_every or 0), 0.

    def run_name(self, world_size: int) -> str:
        """Name of the TensorBoard folder."""
        name = (f'tb-{self._model_tag()}__b{self.micro_batch(world_size)}ep{self.epochs}'
                f'{self.optimizer[:4]}lr{self.base_lr:g}wd{self.weight_decay:g}')
        return re.sub(r'[^\w\-+,.]', '_', name)

    def _model_tag(self) -> str:
        return self.model

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        """Constructor arguments of the model, beside the number of classes and the tokenizer.

        Args:
            total_steps, steps_per_epoch: optimizer steps, for curricula.
        """
        raise NotImplementedError

    def init_kwargs(self) -> dict[str, Any]:
        """Arguments of the model's `init_weights`."""
        return {}

    def tokenizer_kwargs(self) -> dict[str, Any]:
        """Constructor arguments of the tokenizer that its weights do not tell."""
        return {}

    def derived(self, world_size: int) -> dict[str, Any]:
        """Every derived value under its published name."""
        return dict(batch_size=self.local_batch(world_size), glb_batch_size=self.micro_batch(world_size),
                    bs=self.micro_batch(world_size), tlr=self.peak_lr(world_size),
                    twde=self.final_weight_decay, wp=self.warmup_epochs, sche=self.lr_schedule,
                    workers=self.num_workers(world_size), data_load_reso=self.image_size,
                    tb_dir_name=self.run_name(world_size), world_size=world_size)


@dataclass(frozen=True)
class PyramidRecipe(Recipe):
    """A run over a pyramid of code maps."""

    pn: str = opt(PATCH_NUMS['256'],
                  'sides of the code maps, joined by _ or -; 256, 512, 1024 are the published lists')
    patch_size: int = opt(16, 'pixels per side of the finest code, the stride of the tokenizer')

    def __post_init__(self):
        super().__post_init__()
        if list(self.patch_nums) != sorted(self.patch_nums):
            raise ValueError(f'--pn must go from coarse to fine, got {self.pn}')

    @property
    def pn_list(self) -> str:
        """`pn` with the published names written out."""
        return PATCH_NUMS.get(self.pn, self.pn)

    @property
    def patch_nums(self) -> tuple[int, ...]:
        return ints(self.pn_list)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Pixels per side of every scale."""
        return tuple(pn * self.patch_size for pn in self.patch_nums)

    @property
    def image_size(self) -> int:
        return max(self.resolutions)

    def derived(self, world_size: int) -> dict[str, Any]:
        return super().derived(world_size) | dict(pn=self.pn_list,
                                                  patch_nums=self.patch_nums, resos=self.resolutions)


@dataclass(frozen=True)
class VARRecipe(PyramidRecipe):
    """VAR on the codes of a frozen VQVAE."""

    vae_ckpt: str = opt('vae_ch160v4096z32.pth', 'tokenizer weights: a file of any kind, or a published name')
    depth: int = opt(16, 'transformer blocks; heads = depth, width = 64 * depth')
    shared_aln: bool = opt(False, 'one AdaLN projection for all blocks', 'saln')
    attn_l2_norm: bool = opt(True, 'unit queries and keys with a learnt scale', 'anorm')
    flash: bool = opt(True, 'use flash-attn or xformers where installed and suitable', 'fuse')
    drop_path: float = opt(-1., 'drop path of the last block; negative means 0.1 * depth / 24')
    init_std: float = opt(-1., 'std of the weights; negative means sqrt(1 / (3 width))', 'ini')
    init_head: float = opt(0.02, 'multiplier of the head weights', 'hd')
    init_adaln: float = opt(0.5, 'multiplier of the AdaLN weights', 'aln')
    init_adaln_gamma: float = opt(1e-5, 'multiplier of the AdaLN gamma weights', 'alng')
    label_smooth: float = opt(0., 'label smoothing', 'ls')
    progressive_until: float = opt(0., 'progressive training until this share of the run; 0 is off', 'pg')
    progressive_first: int = opt(4, 'first progressive stage (scale index)', 'pg0')
    progressive_warmup: float = opt(0., 'warm-up epochs per progressive stage; 0 means epochs / 300', 'pgwp')

    def __post_init__(self):
        super().__post_init__()
        last = len(self.patch_nums) - 1
        if self.progressive_until and not 0 <= self.progressive_first <= last:
            raise ValueError(f'--pg0 must be a scale index in 0..{last}, got {self.progressive_first}')

    @property
    def lr_schedule(self) -> str:
        """Progressive training brings its own schedule, as published."""
        return f'lin{self.progressive_until:g}' if self.progressive_until > 0 else self.schedule

    @property
    def progressive_warmup_epochs(self) -> float:
        return self.progressive_warmup or self.epochs / 300

    def _model_tag(self) -> str:
        return f'VARd{self.depth}__pn{self.pn_list}'

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        drop_path = self.drop_path if self.drop_path >= 0 else 0.1 * self.depth / 24
        progressive = dict(total=total_steps, warmup=self.warmup_epochs * steps_per_epoch,
                           until=self.progressive_until, first_stage=self.progressive_first,
                           stage_warmup=self.progressive_warmup_epochs * steps_per_epoch)
        return dict(depth=self.depth, embed_dim=64 * self.depth, num_heads=self.depth,
                    drop_path_rate=drop_path, shared_aln=self.shared_aln, attn_l2_norm=self.attn_l2_norm,
                    patch_nums=self.patch_nums, flash_if_available=self.flash, label_smooth=self.label_smooth,
                    progressive=progressive if self.progressive_until > 0 else None)

    def init_kwargs(self) -> dict[str, Any]:
        return dict(init_adaln=self.init_adaln, init_adaln_gamma=self.init_adaln_gamma,
                    init_head=self.init_head, init_std=self.init_std)

    def tokenizer_kwargs(self) -> dict[str, Any]:
        return dict(v_patch_nums=self.patch_nums)

    def derived(self, world_size: int) -> dict[str, Any]:
        kwargs, std = self.model_kwargs(1, 1), (1 / (3 * 64 * self.depth)) ** 0.5
        return super().derived(world_size) | dict(
            pgwp=self.progressive_warmup_epochs, drop_path_rate=kwargs['drop_path_rate'],
            init_std=self.init_std if self.init_std >= 0 else std)


@dataclass(frozen=True)
class VQVAERecipe(PyramidRecipe):
    """The multi-scale residual tokenizer of VAR, trained from scratch."""

    model: str = opt('vqvae', 'what is trained')
    output_dir: str = opt(str(REPO / 'local_output' / 'vqvae'), 'logs and checkpoints', 'local_out_dir_path')
    vocab_size: int = opt(4096, 'codes in the codebook')
    z_channels: int = opt(32, 'width of a code')
    ch: int = opt(160, 'width of the first level, a multiple of 32')
    ch_mult: str = opt('1_1_2_2_4', 'width multiples per level; the stride is 2 ** (levels - 1)')
    num_res_blocks: int = opt(2, 'residual blocks per encoder level')
    dropout: float = opt(0.05, 'dropout inside residual blocks')
    beta: float = opt(0.25, 'weight of the commitment term')
    codebook: str = opt('ema', 'ema: moving averages, restart of dead codes; grad: by gradient, as published')
    base_lr: float = opt(1e-4, 'learning rate per 256 images', 'tblr')
    weight_decay: float = opt(0.005, 'weight decay at the start', 'twd')
    clip: float = opt(10., 'clip of the gradient norm; <= 0 is off', 'tclip')
    lr_end: float = opt(0.3, 'learning rate ratio at the last step', 'wpe')
    schedule: str = opt('cos', 'cos, lin, lin0, lin00, lin<number> or exp', 'sche')
    beta1: float = opt(0.5, 'first moment decay of AdamW')
    beta2: float = opt(0.9, 'second moment decay of AdamW')

    CHECKPOINT_PREFIX: typing.ClassVar[str] = 'vae-ckpt'

    def __post_init__(self):
        super().__post_init__()
        stride = 2 ** (len(ints(self.ch_mult)) - 1)
        if stride != self.patch_size:
            raise ValueError(f'--ch_mult={self.ch_mult} has {len(ints(self.ch_mult))} levels and so stride '
                             f'{stride}, but --patch_size={self.patch_size}: pass --patch_size={stride}')
        if self.ch % 32:
            raise ValueError(f'--ch must be a multiple of 32 (GroupNorm), got {self.ch}')
        if self.codebook not in ('ema', 'grad'):
            raise ValueError(f'--codebook must be ema or grad, got {self.codebook!r}')
        if self.precision == 1:
            raise ValueError('a tokenizer cannot be trained in float16: pass --fp16=2 for bfloat16')

    def _model_tag(self) -> str:
        return f'vqvae-ch{self.ch}v{self.vocab_size}z{self.z_channels}__pn{self.pn_list}'

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        return dict(vocab_size=self.vocab_size, z_channels=self.z_channels, ch=self.ch,
                    ch_mult=ints(self.ch_mult), num_res_blocks=self.num_res_blocks, dropout=self.dropout,
                    beta=self.beta, codebook=self.codebook, v_patch_nums=self.patch_nums, test_mode=False)


RECIPES: dict[str, type[Recipe]] = {'var': VARRecipe, 'vqvae': VQVAERecipe}

# Published runs by model (README of VAR); `recipes/*.sh` holds the same as commands.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {'vqvae': {}, 'var': {
    'var_d16': dict(depth=16, batch_size=768, epochs=200, precision=1, init_adaln_gamma=1e-3, lr_end=0.1),
    'var_d20': dict(depth=20, batch_size=768, epochs=250, precision=1, init_adaln_gamma=1e-3, lr_end=0.1),
    'var_d24': dict(depth=24, batch_size=768, epochs=350, base_lr=8e-5, precision=1, init_adaln_gamma=1e-4,
                    lr_end=0.01),
    'var_d30': dict(depth=30, batch_size=1024, epochs=350, base_lr=8e-5, precision=1, init_adaln_gamma=1e-5,
                    lr_end=0.01, weight_decay_end=0.08),
    'var_d36_512': dict(depth=36, shared_aln=True, pn='512', batch_size=768, epochs=350, base_lr=8e-5,
                        precision=1, init_adaln_gamma=5e-6, lr_end=0.01, weight_decay_end=0.08),
}}


# ---------------------------------------------------------------------------------------------- sampling
@dataclass(frozen=True)
class SampleRecipe:
    """Settings of a sampling job. All but batch size and speed decide the images, and are in the manifest."""

    model: str = opt('var', 'family of the generator: var')
    ckpt: str = opt('', 'generator weights: a checkpoint of train.py, a released file, or a published name')
    vae_ckpt: str = opt('', 'tokenizer weights; empty takes those inside a checkpoint of train.py')
    output: str = opt(str(REPO / 'local_output' / 'samples'), 'folder of the PNGs; the npz lies beside it')
    num_images: int = opt(50_000, 'images, spread evenly over the classes')
    classes: str = opt('', 'class ids joined by "_"; empty takes all')
    seed: int = opt(0, 'the noise of image i is a function of (seed, i)')
    cfg: float = opt(1.5, 'classifier-free guidance in the unit of the paper')
    precision: int = opt(0, '0 float32, 1 float16, 2 bfloat16', 'fp16')
    tf32: bool = opt(True, 'allow TF32 products on CUDA')
    batch_size: int = opt(64, 'images per batch; batches are cut by image index', 'bs')
    pack: bool = opt(True, 'pack the images into an npz with a manifest')

    def __post_init__(self):
        if not self.ckpt:
            raise ValueError('expected the weights of a generator: pass --ckpt=FILE')
        check_limits(self)
        if not re.fullmatch(r'|\d+(_\d+)*', self.classes):
            raise ValueError(f'--classes must be class ids joined by "_", such as 0_7, got {self.classes!r}')

    @property
    def class_ids(self) -> tuple[int, ...]:
        return tuple(map(int, self.classes.split('_'))) if self.classes else ()

    def sample_kwargs(self) -> dict[str, Any]:
        """Arguments of the model's `sample`, beside labels and rng."""
        raise NotImplementedError


@dataclass(frozen=True)
class VARSampleRecipe(SampleRecipe):
    """Sampling from VAR."""

    top_k: int = opt(0, 'draw from the k most likely codes; 0 is off')
    top_p: float = opt(0., 'draw from the smallest set of codes with this probability; 0 is off')
    more_smooth: bool = opt(False, 'mix code embeddings: smoother pictures, worse scores')

    def sample_kwargs(self) -> dict[str, Any]:
        return dict(guidance=1 + self.cfg, top_k=self.top_k, top_p=self.top_p, more_smooth=self.more_smooth)


SAMPLE_RECIPES: dict[str, type[SampleRecipe]] = {'var': VARSampleRecipe}

SAMPLE_PRESETS: dict[str, dict[str, dict[str, Any]]] = {'var': {
    'fid': dict(num_images=50_000, cfg=1.5, top_k=900, top_p=0.96, more_smooth=False),  # README of VAR
}}


# ---------------------------------------------------------------------------------------------- command line
def flag_of(recipe: Recipe | type[Recipe], name: str) -> str:
    """The published flag of a field, or its own name."""
    by_name = {f.name: f.metadata['flag'] or f.name for f in dataclasses.fields(recipe)}
    return by_name[name]


def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered and ('true'.startswith(lowered) or lowered == '1'):
        return True
    if lowered and ('false'.startswith(lowered) or lowered == '0'):
        return False
    raise argparse.ArgumentTypeError(f'expected true, false, 1 or 0, got {text!r}')


def make_parser(cls: type, prog: str, description: str) -> argparse.ArgumentParser:
    """A parser: one flag per field of a dataclass of `opt` fields, a second spelling where published."""
    parser = _OneLineParser(prog=prog, description=description, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = next(t for t in (typing.get_args(hints[f.name]) or (hints[f.name],)) if t is not type(None))
        spellings = [f'--{s}' for s in (f.metadata['flag'], f.name) if s]
        help_text = f.metadata['help'].replace('%', '%%') + f' (default: {f.default})'
        if kind is bool:
            parser.add_argument(*spellings, dest=f.name, type=_boolean, nargs='?', const=True,
                                default=argparse.SUPPRESS, help=help_text, metavar='BOOL')
        else:
            parser.add_argument(*spellings, dest=f.name, type=kind, default=argparse.SUPPRESS, help=help_text,
                                metavar=kind.__name__.upper())
    return parser


class _OneLineParser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2; an unknown flag names the nearest one."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f'{self.prog}: {message}\n')

    def parse(self, argv: list[str]) -> dict[str, Any]:
        """The given flags by field name."""
        values, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split('=')[0]
            near = difflib.get_close_matches(flag, list(self._option_string_actions), n=1, cutoff=0.)
            self.error(f'unknown argument {unknown[0]!r}: the nearest flag is {near[0]}; --help lists all')
        return vars(values)


def _parse(argv: list[str], prog: str, recipes: dict[str, type], all_presets: dict, what: str) -> Any:
    """The recipe of a command line: `--model` chooses the class, `--preset` its values, flags come on top."""
    first = _OneLineParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument('--model', default=next(iter(recipes)), choices=list(recipes))
    first.add_argument('--preset', default='')
    chosen, rest = first.parse_known_args(argv)
    cls, presets = recipes[chosen.model], {'': {}} | all_presets[chosen.model]
    names = ', '.join(filter(None, presets)) or 'none'
    parser = make_parser(cls, prog, f'{what} --model is one of: {", ".join(recipes)}; '
                                    f'--preset of {chosen.model} is one of: {names}.')
    values = parser.parse(rest)
    if chosen.preset not in presets:
        parser.error(f'unknown --preset={chosen.preset} of --model={chosen.model}: it has {names}')
    try:
        return cls(**{**presets[chosen.preset], **values, 'model': chosen.model})
    except ValueError as error:
        parser.error(str(error))


def parse_recipe(argv: list[str], prog: str = 'train.py') -> Recipe:
    """The training recipe of a command line; the `--local-rank` flag of old launchers is dropped."""
    argv = [arg for arg in argv if not re.match(r'--local[-_]rank(=|$)', arg)]
    return _parse(argv, prog, RECIPES, PRESETS, 'Train a model.')


def parse_sample_recipe(argv: list[str], prog: str = 'sample.py') -> SampleRecipe:
    """The sampling recipe of a command line."""
    return _parse(argv, prog, SAMPLE_RECIPES, SAMPLE_PRESETS, 'Sample images from a trained generator.')
