"""FlowAR: settings of its training and sampling, and the published runs."""

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from configs.options import INF, REPO, opt, other, settings
from configs.sampling import SampleConfig
from configs.training import CachedConfig, TrainConfig

SIZES = ('small', 'large', 'huge')  # of `FlowAR.SIZES`


@settings(
    model='flowar',
    eval_every=other(10, flag='eval_freq eval_every'),
    images_per_step=other(2048, flag='bs'),
    epochs=400,
    base_lr=other(1e-4, flag='blr'),
    schedule=other(
        'cosine',
        text='cosine or constant, after the warm-up',
        flag='lr_schedule',
        choices=('cosine', 'constant'),
    ),
    warmup=other(100.0, text='epochs of learning rate warm-up', flag='warmup_epochs'),
    warmup_start=0.0,
    weight_decay=0.02,
    clip=other(3.0, flag='grad_clip'),
    ema=other(0.9999, flag='ema_rate'),
    ema_warmup=False,
    hflip=True,
    output_dir=str(REPO / 'local_output/flowar'),
)
class FlowARConfig(CachedConfig):
    """FlowAR on the latents of a frozen KL-16. Flags are those of the published script."""

    IGNORED: ClassVar[dict[str, str]] = {
        'vae_embed_dim': 'it is read from the file of the tokenizer',
        'log_dir': 'logs lie in --output_dir',
        'save_last_freq': 'every epoch has a checkpoint',
        'start_epoch': 'a run continues by itself from --output_dir',
        **dict.fromkeys(('pin_mem', 'no_pin_mem'), 'memory is pinned where there is CUDA'),
        **dict.fromkeys(('device', 'world_size', 'dist_on_itp', 'dist_url'), 'torchrun sets it'),
        **dict.fromkeys(
            ('online_eval', 'eval_bsz', 'num_images', 'num_step', 'guidance', 'cfg'),
            'while training, --fid_images samples; after it, sample.py',
        ),
    }

    vae_ckpt: str = opt(
        'pretrained_models/vae/kl16.ckpt',
        'tokenizer weights, any file',
        'vae_path',
        path=True,
        free=True,
        per_node=True,
        group='most used',
    )
    size: str = opt(
        'large',
        'trunk: small, large or huge (published as flowar_small, ...)',
        choices=SIZES,
        group='most used',
    )
    diffloss_d: int = opt(12, 'blocks of the flow head', limits=(1, INF))
    diffloss_w: int = opt(1536, 'width of the flow head, a multiple of 64', limits=(64, INF))
    depth: int | None = opt(
        None,
        'blocks of each stack of the trunk; None is that of the size',
        limits=(1, INF),
        group='most used',
    )
    width: int | None = opt(
        None, 'width of the trunk, in heads of 64; None is that of the size', limits=(64, INF)
    )
    img_size: int = opt(256, 'pixels per side of the training images', 'img_size image_size', limits=(0, INF))
    stride: int = opt(
        16, 'pixels per side of a latent, the stride of the tokenizer', 'vae_stride', limits=(1, INF)
    )
    label_drop_prob: float = opt(0.1, 'share of labels replaced by the null class', limits=(0, 1))
    attn_dropout: float = opt(0.1, 'dropout of attention weights in the trunk', limits=(0, 0.999))
    proj_dropout: float = opt(0.1, 'dropout after attention and in the MLP of the trunk', limits=(0, 0.999))
    use_checkpoint: bool | None = opt(
        None,
        'recompute the blocks of the trunk in the backward pass, which saves memory; None does so for huge; '
        '--act_ckpt=block recomputes those of the flow head, too',
        free=True,
    )
    resume: str = opt(
        '',
        'accepted if it is the output folder, from which a run continues by itself',
        path=True,
        free=True,
        per_node=True,
    )
    loss_weighting: str = opt(
        'uniform',
        'weight of the loss at time t: uniform, or debiased, 6 t (1 - t) (arXiv 2310.08442)',
        choices=('uniform', 'debiased'),
    )
    latent_patch: int = opt(1, 'accepted; only 1 works', 'patch_size', choices=(1,))
    buffer_size: int = opt(0, 'accepted; only 0 works', choices=(0,))
    temperature: float = opt(1.0, 'accepted; only 1 works', choices=(1,))
    cfg_schedule: str = opt('linear', 'accepted; only linear works', choices=('linear',))
    images_per_rank: int = opt(
        0,
        'images per rank and micro-step, as published; 0 follows --bs',
        'batch_size batch_per_process',
        limits=(0, INF),
        free=True,
    )
    lr: float | None = opt(None, 'peak learning rate in place of blr', limits=(0, INF))
    min_lr: float = opt(1e-5, 'learning rate at the end of the cosine', limits=(0, INF))

    def __post_init__(self):
        super().__post_init__()
        if self.lr_end != TrainConfig.lr_end:
            raise ValueError('FlowAR does not use --wpe: pass --min_lr')
        if self.resume and Path(self.resume).resolve() != Path(self.output_dir).resolve():
            raise ValueError(
                f'a run continues by itself from its output folder, {self.output_dir}, got '
                f'--resume={self.resume}: pass that one as --output_dir'
            )
        if len(self.scales) < 2 or self.scales[-1] * self.stride != self.img_size:
            raise ValueError(
                f'--img_size must be --vae_stride={self.stride} times 2, 4, 8, ..., got {self.img_size}'
            )
        if self.diffloss_w % 64 or (self.width or 0) % 64:
            raise ValueError(
                f'--diffloss_w and --width must be multiples of 64, got {self.diffloss_w} and {self.width}'
            )

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
        return tuple(2**k for k in range((self.img_size // self.stride).bit_length()))

    def check_batch(self, world_size: int) -> None:
        if not self.images_per_rank:
            super().check_batch(world_size)

    @property
    def warmup_epochs(self) -> float:
        return self.warmup

    def local_batch(self, world_size: int) -> int:
        return self.images_per_rank or super().local_batch(world_size)

    def in_micro_steps(self, accumulate: int, world_size: int) -> 'FlowARConfig':
        if not self.images_per_rank:
            return super().in_micro_steps(accumulate, world_size)
        images_per_rank = self.images_per_rank * self.accumulate // accumulate
        return replace(self, accumulate=accumulate, images_per_rank=images_per_rank)

    def peak_lr(self, world_size: int) -> float:
        return super().peak_lr(world_size) if self.lr is None else self.lr

    def final_lr_ratio(self, world_size: int) -> float:
        peak = self.peak_lr(world_size)
        return peak and self.min_lr / peak

    def _model_tag(self) -> str:
        return f'FlowAR-{self.size}__d{self.diffloss_d}w{self.diffloss_w}'

    def model_size(self) -> dict[str, Any]:
        return dict(size=self.size, depth=self.depth, width=self.width)

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        return dict(
            diffloss_d=self.diffloss_d,
            diffloss_w=self.diffloss_w,
            scale=self.scales,
            label_drop_prob=self.label_drop_prob,
            attn_dropout=self.attn_dropout,
            proj_dropout=self.proj_dropout,
            use_checkpoint=self.recomputes,
            loss_weighting=self.loss_weighting,
        )


@settings(
    model='flowar',
    ckpt=other('', text='generator weights: a checkpoint of train.py or a released file', flag='resume ckpt'),
    output=other(str(REPO / 'local_output' / 'samples'), flag='output_dir output'),
    vae_ckpt=other('', text='tokenizer weights; empty takes those inside the checkpoint', flag='vae_path'),
    batch_size=other(64, flag='eval_bsz bs'),
    cfg=other(1.0, text='classifier-free guidance at the last scale; 1 and less are off'),
)
class FlowARSampleConfig(SampleConfig):
    """Sampling from FlowAR. Flags are those of the published script."""

    IGNORED: typing.ClassVar[dict[str, str]] = {
        'evaluate': 'this command samples, evaluate.py scores',
        'data_path': 'no images are read',
        **dict.fromkeys(
            (
                'device',
                'num_workers',
                'log_dir',
                'online_eval',
                'eval_freq',
                'save_last_freq',
                'start_epoch',
                'pin_mem',
                'no_pin_mem',
            ),
            'only training uses it',
        ),
        **dict.fromkeys(
            (
                'class_num',
                'img_size',
                'image_size',
                'vae_embed_dim',
                'vae_stride',
                'patch_size',
                'diffloss_d',
                'diffloss_w',
            ),
            'it is read from the files of weights',
        ),
    }
    REFUSED: typing.ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ('ssg', 'ssg_prior', 'ssg_schedule'),
            'SSG is about logits of codes, and FlowAR has none; guide by --cfg',
        ),
        **dict.fromkeys(('cfg_from', 'cfg_to'), 'FlowAR guides by time; pass --guidance, a time in [0, 1]'),
    }
    CHANGE_NOTHING: typing.ClassVar[tuple[str, ...]] = ('temperature', 'cfg_schedule')

    guidance: float = opt(0.9, 'guide at times from 0 to this one; how strongly is --cfg')
    num_step: int = opt(25, 'steps of the flow head per scale; an odd number makes one less')
    flow_upper_steps: int = opt(
        0,
        'steps of the flow head at the first scale, in place of num_step (DiSA); needs --flow_lower_steps',
        limits=(0, INF),
    )
    flow_lower_steps: int = opt(
        0, 'steps of the flow head at the last scale (DiSA); needs --flow_upper_steps', limits=(0, INF)
    )
    temperature: float = opt(1.0, 'accepted; only 1 works')
    cfg_schedule: str = opt('linear', 'accepted; only linear works')

    def __post_init__(self):
        super().__post_init__()
        if self.temperature != 1 or self.cfg_schedule != 'linear':
            raise ValueError(
                '--temperature must be 1 and --cfg_schedule linear, as in the published sampler,'
                f' got {self.temperature} and {self.cfg_schedule}: leave them out'
            )
        if not 0 <= self.guidance <= 1:
            raise ValueError(f'--guidance is a time in [0, 1], got {self.guidance}: the strength is --cfg')
        if bool(self.flow_upper_steps) != bool(self.flow_lower_steps):
            raise ValueError(
                'expected both --flow_upper_steps and --flow_lower_steps, or neither, got '
                f'{self.flow_upper_steps} and {self.flow_lower_steps}: pass both'
            )
        if min(self.upper_steps, self.lower_steps) < 2:
            raise ValueError(
                '--num_step, --flow_upper_steps and --flow_lower_steps must be at least 2, got '
                f'{self.upper_steps} to {self.lower_steps}'
            )

    @property
    def upper_steps(self) -> int:
        return self.flow_upper_steps or self.num_step

    @property
    def lower_steps(self) -> int:
        return self.flow_lower_steps or self.num_step

    def sample_kwargs(self) -> dict[str, Any]:
        return dict(
            guidance=self.cfg,
            guidance_until=self.guidance,
            num_steps=self.upper_steps,
            lower_steps=self.flow_lower_steps or None,  # those of num_steps
        )


# Published runs (README of FlowAR).
_FLOWAR = dict(images_per_step=2048, epochs=400, warmup=100.0, base_lr=5e-5)
PRESETS: dict[str, dict[str, Any]] = {
    'flowar_s': _FLOWAR | dict(size='small', diffloss_d=2, diffloss_w=1024),
    'flowar_l': _FLOWAR | dict(size='large', diffloss_d=12, diffloss_w=1024, use_checkpoint=True),
    'flowar_h': _FLOWAR | dict(size='huge', diffloss_d=12, diffloss_w=1536, use_checkpoint=True),
}
_SCORED = dict(num_images=50_000, fixed_batch=64)
SAMPLE_PRESETS: dict[str, dict[str, Any]] = {
    'flowar_s': _SCORED | dict(num_step=25, cfg=4.3, guidance=0.9, source='README of FlowAR, S'),
    'flowar_l': _SCORED | dict(num_step=25, cfg=2.4, guidance=0.9, source='README of FlowAR, L'),
    'flowar_h': _SCORED | dict(num_step=50, cfg=2.4, guidance=0.7, source='README of FlowAR, H'),
}

TRAINING = FlowARConfig
SAMPLING = FlowARSampleConfig
