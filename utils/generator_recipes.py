"""Recipes of generators: settings of their training, and presets by published run.

Only the standard library is needed here.
"""
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from utils.recipe import (
    CROPS,
    GPT_SIZES,
    PATCH_NUMS,
    REPO,
    CachedRecipe,
    GeneratorRecipe,
    PyramidRecipe,
    Recipe,
    flag_of,
    opt,
)


@dataclass(frozen=True)
class AdaLNRecipe(PyramidRecipe, GeneratorRecipe):
    """What VAR and FlexVAR have in common."""

    IGNORED: ClassVar[dict[str, str]] = {
        'data_name': 'classes and images are those of --data_path',
        'dbg_nan': 'steps that are not finite are always looked for, see --max_skipped_steps',
        'local_debug': 'a run without torchrun is local',
    }

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

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        drop_path = self.drop_path if self.drop_path >= 0 else 0.1 * self.depth / 24
        return dict(depth=self.depth, embed_dim=64 * self.depth, num_heads=self.depth,
                    drop_path_rate=drop_path, shared_aln=self.shared_aln, attn_l2_norm=self.attn_l2_norm,
                    patch_nums=self.patch_nums, flash_if_available=self.flash, label_smooth=self.label_smooth)

    def init_kwargs(self) -> dict[str, Any]:
        return dict(init_adaln=self.init_adaln, init_adaln_gamma=self.init_adaln_gamma,
                    init_head=self.init_head, init_std=self.init_std)

    def derived(self, world_size: int) -> dict[str, Any]:
        kwargs, std = self.model_kwargs(1, 1), (1 / (3 * 64 * self.depth)) ** 0.5
        return super().derived(world_size) | dict(
            drop_path_rate=kwargs['drop_path_rate'], init_std=self.init_std if self.init_std >= 0 else std)


@dataclass(frozen=True)
class VARRecipe(AdaLNRecipe):
    """VAR on the codes of a frozen VQVAE."""

    vae_ckpt: str = opt('vae_ch160v4096z32.pth', 'tokenizer weights: a file of any kind, or a published name',
                        path=True)
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
        progressive = dict(total=total_steps, warmup=self.warmup_epochs * steps_per_epoch,
                           until=self.progressive_until, first_stage=self.progressive_first,
                           stage_warmup=self.progressive_warmup_epochs * steps_per_epoch)
        return super().model_kwargs(total_steps, steps_per_epoch) | dict(
            progressive=progressive if self.progressive_until > 0 else None)

    def tokenizer_kwargs(self) -> dict[str, Any]:
        return dict(v_patch_nums=self.patch_nums)

    def derived(self, world_size: int) -> dict[str, Any]:
        return super().derived(world_size) | dict(pgwp=self.progressive_warmup_epochs)


@dataclass(frozen=True)
class FlexVARRecipe(AdaLNRecipe):
    """FlexVAR on the code maps of a frozen FlexVAE."""

    model: str = opt('flexvar', 'what is trained')
    vae_ckpt: str = opt('pretrained/FlexVAE.pth', 'tokenizer weights: a file of any kind', path=True)
    depth: int = opt(20, 'transformer blocks; heads = depth, width = 64 * depth')
    pn: str = opt(PATCH_NUMS['256'], 'sides of the code maps of validation, joined by _ or -; training draws '
                                     'others up to the last one; 256, 512, 1024 are the published lists')
    final_reso: int = opt(0, 'pixels per side of the training images; 0 means where --pn ends; larger ones '
                             'give the same sides, averaged')
    keep_last: bool = opt(False, 'end every drawn pyramid at the last side of --pn; published: two thirds do')
    crop: str = opt('adm', CROPS)
    mid_reso: float = opt(1 / 0.88, 'crop adm: the shorter side is drawn from 1 to this multiple of the crop')
    hflip: bool = opt(True, 'random horizontal flip')
    output_dir: str = opt(str(REPO / 'local_output/flexvar'), 'logs and checkpoints', 'local_out_dir_path',
                          path=True)

    def __post_init__(self):
        super().__post_init__()
        sides = list(self.patch_nums)
        if sides[0] != 1 or len(sides) < 2 or sides != sorted(set(sides)):
            raise ValueError(f'--pn of FlexVAR must rise from 1, such as 1_2_4, got {self.pn}')
        if self.image_size < super().image_size or self.image_size % self.patch_size:
            raise ValueError(
                f'--final_reso must be a multiple of the stride {self.patch_size} and at least where --pn '
                f'ends, {self.patch_nums[-1]} codes or {super().image_size} pixels, got {self.final_reso}')

    @property
    def image_size(self) -> int:
        return self.final_reso or super().image_size

    def _model_tag(self) -> str:
        return f'FlexVARd{self.depth}__pn{self.pn_list}'

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        return super().model_kwargs(total_steps, steps_per_epoch) | dict(keep_last=self.keep_last)

    def derived(self, world_size: int) -> dict[str, Any]:
        return super().derived(world_size) | dict(final_reso=self.image_size)


@dataclass(frozen=True)
class FlowARRecipe(CachedRecipe):
    """FlowAR on the latents of a frozen KL-16. Flags are those of the published script."""

    IGNORED: ClassVar[dict[str, str]] = {
        'vae_embed_dim': 'the file of the tokenizer tells it', 'log_dir': 'logs lie in --output_dir',
        'save_last_freq': 'every epoch has a checkpoint',
        'start_epoch': 'a run continues by itself from --output_dir',
        **dict.fromkeys(('pin_mem', 'no_pin_mem'), 'memory is pinned where there is CUDA'),
        **dict.fromkeys(('device', 'world_size', 'dist_on_itp', 'dist_url'), 'torchrun tells it'),
        **dict.fromkeys(('online_eval', 'eval_bsz', 'num_images', 'num_step', 'guidance', 'cfg'),
                        'while training, --fid_images samples; after it, sample.py'),
    }

    model: str = opt('flowar', 'what is trained')
    vae_ckpt: str = opt('pretrained_models/vae/kl16.ckpt', 'tokenizer weights, any file', 'vae_path',
                        path=True)
    size: str = opt('large', 'trunk: small, large or huge (published as flowar_small, ...)')
    diffloss_d: int = opt(12, 'blocks of the flow head')
    diffloss_w: int = opt(1536, 'width of the flow head, a multiple of 64')
    depth: int | None = opt(None, 'blocks of each stack of the trunk; None is that of the size')
    width: int | None = opt(None, 'width of the trunk, in heads of 64; None is that of the size')
    img_size: int = opt(256, 'pixels per side of the training images', 'img_size image_size')
    patch_size: int = opt(16, 'pixels per side of a latent, the stride of the tokenizer', 'vae_stride')
    label_drop_prob: float = opt(0.1, 'share of labels replaced by the null class')
    attn_dropout: float = opt(0.1, 'dropout of attention weights in the trunk')
    proj_dropout: float = opt(0.1, 'dropout after attention and in the MLP of the trunk')
    use_checkpoint: bool | None = opt(None, 'recompute the blocks of the trunk in the backward pass, which '
                                            'saves memory; None does so for huge')
    resume: str = opt('', 'accepted if it is the output folder, from which a run continues by itself',
                      path=True)
    eval_every: int = opt(10, 'epochs between evaluations; the last epoch always has one',
                          'eval_freq eval_every')
    loss_weighting: str = opt('uniform', 'of times: uniform, or debiased, 6 t (1 - t) (arXiv 2310.08442)')
    latent_patch: int = opt(1, 'accepted; only 1 works', 'patch_size')
    buffer_size: int = opt(0, 'accepted; only 0 works')
    temperature: float = opt(1., 'accepted; only 1 works')
    cfg_schedule: str = opt('linear', 'accepted; only linear works')
    batch_size: int = opt(2048, 'images per optimizer step, all ranks and accumulation steps together', 'bs')
    batch_per_process: int = opt(0, 'the same per process and micro-step, as published; 0 follows --bs',
                                 'batch_size')
    epochs: int = opt(400, 'epochs', 'ep')
    base_lr: float = opt(1e-4, 'learning rate per 256 images', 'blr')
    lr: float | None = opt(None, 'peak learning rate in place of blr')
    min_lr: float = opt(1e-5, 'learning rate at the end of the cosine')
    schedule: str = opt('cosine', 'cosine or constant, after the warm-up', 'lr_schedule')
    warmup: float = opt(100., 'epochs of learning rate warm-up', 'warmup_epochs')
    warmup_start: float = opt(0., 'learning rate ratio at the first step', 'wp0')
    weight_decay: float = opt(0.02, 'weight decay', 'twd')
    clip: float = opt(3., 'clip of the gradient norm; <= 0 is off', 'grad_clip')
    ema: float = opt(0.9999, 'decay of averaged weights; 0 keeps none', 'ema_rate')
    ema_warmup: bool = opt(False, 'let the average begin fast')
    crop: str = opt('resize', CROPS)
    hflip: bool = opt(True, 'random horizontal flip')
    output_dir: str = opt(str(REPO / 'local_output/flowar'), 'logs and checkpoints', 'local_out_dir_path',
                          path=True)

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (('size', ('small', 'large', 'huge')), ('schedule', ('cosine', 'constant')),
                              ('loss_weighting', ('uniform', 'debiased')), ('latent_patch', (1,)),
                              ('buffer_size', (0,)), ('temperature', (1,)), ('cfg_schedule', ('linear',))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'--{flag_of(self, name)} must be {" or ".join(map(str, allowed))}, '
                                 f'got {getattr(self, name)}')
        if self.lr_end != Recipe.lr_end:
            raise ValueError('--wpe is of other models: pass --min_lr')
        if self.resume and Path(self.resume).resolve() != Path(self.output_dir).resolve():
            raise ValueError(f'a run continues by itself from its output folder, {self.output_dir}, got '
                             f'--resume={self.resume}: pass that one as --output_dir')
        if len(self.scales) < 2 or self.scales[-1] * self.patch_size != self.img_size:
            raise ValueError(f'--img_size must be --vae_stride={self.patch_size} times 2, 4, 8, ..., '
                             f'got {self.img_size}')
        if self.diffloss_w % 64 or (self.width or 0) % 64:
            raise ValueError(f'--diffloss_w and --width must be multiples of 64, got {self.diffloss_w} and '
                             f'{self.width}')

    @property
    def image_size(self) -> int:
        return self.img_size

    @property
    def recomputes(self) -> bool:
        return self.size == 'huge' if self.use_checkpoint is None else self.use_checkpoint

    def derived(self, world_size: int) -> dict[str, Any]:
        return super().derived(world_size) | dict(use_checkpoint=self.recomputes)

    @property
    def scales(self) -> tuple[int, ...]:
        """Sides of the scales: powers of two up to that of the latent."""
        return tuple(2 ** k for k in range((self.img_size // self.patch_size).bit_length()))

    def check_batch(self, world_size: int) -> None:
        if not self.batch_per_process:
            super().check_batch(world_size)

    @property
    def warmup_epochs(self) -> float:
        return self.warmup

    def local_batch(self, world_size: int) -> int:
        return self.batch_per_process or super().local_batch(world_size)

    def peak_lr(self, world_size: int) -> float:
        return super().peak_lr(world_size) if self.lr is None else self.lr

    def final_lr_ratio(self, world_size: int) -> float:
        peak = self.peak_lr(world_size)
        return peak and self.min_lr / peak

    def _model_tag(self) -> str:
        return f'FlowAR-{self.size}__d{self.diffloss_d}w{self.diffloss_w}'

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        width, depth, heads, cross = dict(small=(768, 6, 12, False), large=(1024, 8, 16, True),
                                          huge=(1536, 15, 16, True))[self.size]
        heads = heads if self.width is None else self.width // 64
        width, depth = self.width or width, self.depth or depth
        stack = dict(embed_dim=width, depth=depth, num_heads=heads)
        both = {f'{part}_{name}': value for part in ('encoder', 'decoder') for name, value in stack.items()}
        return dict(**both, cross=cross, diffloss_d=self.diffloss_d, diffloss_w=self.diffloss_w,
                    scale=self.scales, label_drop_prob=self.label_drop_prob, attn_dropout=self.attn_dropout,
                    proj_dropout=self.proj_dropout, use_checkpoint=self.recomputes,
                    loss_weighting=self.loss_weighting)


@dataclass(frozen=True)
class NPPRecipe(CachedRecipe):
    """NPP on the codes of a frozen VQ-16. Flags are those of the published script."""

    IGNORED: ClassVar[dict[str, str]] = {
        'cloud_save_path': 'checkpoints lie in --results_dir', 'no_local_save': 'checkpoints lie there',
        'gradient_accumulation_steps': 'it is not read in the published script; --ac accumulates',
        'no_compile': '--tfast compiles', 'dataset': '--code_path is read',
        **dict.fromkeys(('vocab_size', 'vq_model'), 'the file of the tokenizer tells it'),
        **dict.fromkeys(('gpt_type', 'cls_token_num'), 'there is one class token'),
    }

    model: str = opt('npp', 'what is trained')
    vae_ckpt: str = opt('pretrained_models/vq_ds16_c2i.pt', 'tokenizer weights, any file', 'vq_ckpt',
                        path=True)
    gpt_model: str = opt('GPT-B', 'size: ' + ', '.join(GPT_SIZES))
    depth: int | None = opt(None, 'blocks; None is that of the size')
    width: int | None = opt(None, 'width, in heads of 64; None is that of the size')
    img_size: int = opt(256, 'pixels per side of the training images', 'image_size img_size')
    patch_size: int = opt(16, 'pixels per side of a code, the stride of the tokenizer', 'downsample_size')
    init_from: str = opt('', 'weights to begin with in place of random ones; checkpoints in the output '
                             'folder come first', 'gpt_ckpt init_from', path=True)
    patch_level: int = opt(2, 'phases: 1 is plain next-token training; 2, 3, 4 begin with patches of 2x2, '
                              '4x4, 8x8 codes')
    epoch_rate: float = opt(0.5, 'share of the epochs before the last phase; of that, before the last but '
                                 'one; and so on')
    scheduler: bool = opt(False, 'in every phase warm up, hold, and fall linearly; off is a constant rate')
    decay_ratio: float = opt(0.2, 'scheduler: share of a phase in which the rate falls')
    end_lr: float = opt(1e-5, 'scheduler: learning rate at the end of a phase')
    warmup: float = opt(1., 'scheduler: epochs of warm-up in every phase; the paper has 5', 'warmup_epochs')
    warmup_start: float = opt(0., 'learning rate ratio at the first step', 'wp0')
    dropout_p: float = opt(0.1, 'dropout after attention and feed-forward networks')
    token_dropout_p: float = opt(0.1, 'dropout of the input')
    drop_path_rate: float = opt(0., 'drop path of the last block, replaces dropout_p')
    batch_size: int = opt(256, 'images per optimizer step, all ranks and accumulation steps together',
                          'global_batch_size bs')
    epochs: int = opt(300, 'epochs', 'epochs ep')
    base_lr: float = opt(1e-4, 'peak learning rate, for any batch', 'lr')
    clip: float = opt(1., 'clip of the gradient norm; <= 0 is off', 'max_grad_norm')
    weight_decay: float = opt(0.05, 'weight decay at the start', 'weight_decay twd')
    seed: int | None = opt(None, 'None draws one, kept in the checkpoint; given, cudnn is deterministic too',
                           'global_seed seed')
    save_every: str = opt('', 'checkpoint also every N optimizer steps ("500") or minutes ("20m")',
                          'ckpt_every save_every')
    precision: int = opt(2, 'none, fp16 with loss scaling, or bf16', 'mixed_precision fp16',
                         words=dict(none=0, fp16=1, bf16=2))
    ema: float = opt(0., 'decay of averaged weights; alone it is 0.9999; 0 keeps none', words={'': 0.9999})
    ema_warmup: bool = opt(False, 'let the average begin fast')
    crop: str = opt('adm', CROPS)
    mid_reso: float = opt(1.1, 'crop adm: the shorter side is drawn from 1 to this multiple of the crop')
    hflip: bool = opt(True, 'random horizontal flip')
    output_dir: str = opt(str(REPO / 'local_output/npp'), 'logs and checkpoints',
                          'results_dir local_out_dir_path', path=True)

    def __post_init__(self):
        super().__post_init__()
        if (self.schedule, self.lr_end) != (Recipe.schedule, Recipe.lr_end):
            raise ValueError('--sche and --wpe are of other models: pass --scheduler and --end_lr')
        if self.gpt_model not in GPT_SIZES:
            raise ValueError(f'--gpt_model must be one of {", ".join(GPT_SIZES)}, got {self.gpt_model!r}')
        if self.width and self.width % 64:
            raise ValueError(f'--width must be a multiple of 64, got {self.width}')
        largest = self.phases[0][1]
        if self.img_size < 1 or self.img_size % (self.patch_size * largest):
            raise ValueError(f'--image_size must be a multiple of --downsample_size={self.patch_size} times '
                             f'the largest patch, {largest} codes, got {self.img_size}: choose another size '
                             'or --patch_level')
        ends = [end for end, _ in self.phases]
        if ends != sorted({*ends}) or ends[0] < 1:
            raise ValueError(f'--epoch_rate={self.epoch_rate:g} and --patch_level={self.patch_level} make '
                             f'phases of {self.epochs} epochs that end at {ends}, each must last one at '
                             'least: pass more epochs, another rate or fewer levels')
        if self.scheduler and self.end_lr > self.base_lr:
            raise ValueError(f'--end_lr must be at most --lr={self.base_lr:g}, got {self.end_lr:g}')
        longest = (1 - self.decay_ratio) * min(end - begin for begin, end in itertools.pairwise([0, *ends]))
        if self.scheduler and self.warmup > longest:
            raise ValueError(f'--warmup_epochs={self.warmup:g} does not fit into the shortest phase beside '
                             f'the decay: pass at most {longest:g}')

    @property
    def image_size(self) -> int:
        return self.img_size

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """(epoch at which it ends, side of a patch) of every phase."""
        return tuple((int(self.epochs * self.epoch_rate ** i), 2 ** i)
                     for i in reversed(range(self.patch_level)))

    @property
    def lr_schedule(self) -> str:
        return f'tail{self.decay_ratio:g}' if self.scheduler else 'constant'

    @property
    def warmup_epochs(self) -> float:
        return self.warmup if self.scheduler else 0.

    def peak_lr(self, world_size: int) -> float:
        return self.base_lr

    def final_lr_ratio(self, world_size: int) -> float:
        return self.base_lr and self.end_lr / self.base_lr

    def lr_phase(self, step: int, total_steps: int, steps_per_epoch: int) -> tuple[int, int]:
        bounds = itertools.pairwise([0, *self._phase_ends(total_steps, steps_per_epoch)])
        return next((step - begin, end - begin) for begin, end in bounds if step < end)

    def _phase_ends(self, total_steps: int, steps_per_epoch: int) -> list[int]:
        """Optimizer steps after which each phase is over; `--steps` may cut the last one short."""
        return [*(end * steps_per_epoch for end, _ in self.phases[:-1]), total_steps]

    def _model_tag(self) -> str:
        size = f'd{self.depth}w{self.width}' if self.depth or self.width else self.gpt_model
        return f'{size}__p{"_".join(str(p) for _, p in self.phases)}'

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        depth, heads, width = GPT_SIZES[self.gpt_model]
        ends = self._phase_ends(total_steps, steps_per_epoch)
        phases = tuple((end / total_steps, p) for end, (_, p) in zip(ends, self.phases, strict=True))
        return dict(dim=self.width or width, n_layer=self.depth or depth,
                    n_head=self.width // 64 if self.width else heads, grid=self.img_size // self.patch_size,
                    phases=phases, token_dropout_p=self.token_dropout_p, resid_dropout_p=self.dropout_p,
                    ffn_dropout_p=self.dropout_p, drop_path_rate=self.drop_path_rate)

    def derived(self, world_size: int) -> dict[str, Any]:
        return super().derived(world_size) | dict(
            patch_sides=[p for _, p in self.phases], phase_ends=[end for end, _ in self.phases])


GENERATOR_RECIPES: dict[str, type[Recipe]] = {
    'var': VARRecipe, 'flexvar': FlexVARRecipe, 'flowar': FlowARRecipe, 'npp': NPPRecipe}

_FLOWAR = dict(batch_size=2048, epochs=400, warmup=100., base_lr=5e-5)

# Published runs by model (READMEs of VAR, FlexVAR, FlowAR and NPP; a script of FlexVAR says depth 20 for d16
# by mistake; the curriculum of larger NPPs is not published); `recipes/*.sh` holds the same as commands.
GENERATOR_PRESETS: dict[str, dict[str, dict[str, Any]]] = {'var': {
    'var_d16': dict(depth=16, batch_size=768, epochs=200, precision=1, init_adaln_gamma=1e-3, lr_end=0.1),
    'var_d20': dict(depth=20, batch_size=768, epochs=250, precision=1, init_adaln_gamma=1e-3, lr_end=0.1),
    'var_d24': dict(depth=24, batch_size=768, epochs=350, base_lr=8e-5, precision=1, init_adaln_gamma=1e-4,
                    lr_end=0.01),
    'var_d30': dict(depth=30, batch_size=1024, epochs=350, base_lr=8e-5, precision=1, init_adaln_gamma=1e-5,
                    lr_end=0.01, weight_decay_end=0.08),
    'var_d36_512': dict(depth=36, shared_aln=True, pn='512', batch_size=768, epochs=350, base_lr=8e-5,
                        precision=1, init_adaln_gamma=5e-6, lr_end=0.01, weight_decay_end=0.08),
}, 'flexvar': {
    'flexvar_d16': dict(depth=16, batch_size=768, epochs=180, precision=1, init_adaln_gamma=1e-3,
                        lr_end=0.1),
    'flexvar_d20': dict(depth=20, batch_size=768, epochs=250, precision=1, init_adaln_gamma=1e-3,
                        lr_end=0.1),
    'flexvar_d24': dict(depth=24, batch_size=768, epochs=350, base_lr=8e-5, precision=1,
                        init_adaln_gamma=1e-4, lr_end=0.01),
}, 'flowar': {
    'flowar_s': _FLOWAR | dict(size='small', diffloss_d=2, diffloss_w=1024),
    'flowar_l': _FLOWAR | dict(size='large', diffloss_d=12, diffloss_w=1024, use_checkpoint=True),
    'flowar_h': _FLOWAR | dict(size='huge', diffloss_d=12, diffloss_w=1536, use_checkpoint=True),
}, 'npp': {
    'npp_b': dict(gpt_model='GPT-B', epoch_rate=0.5, patch_level=2, scheduler=True),
}}
