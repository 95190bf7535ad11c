"""The tokenizers: what all of them share, one class each, and their presets.

Sources of the defaults: FoundationVision/vaex for the VQVAE; FoundationVision/LlamaGen for VQ-16 and,
adapted, for FlexVAE; the KL-f16 configuration of CompVis/latent-diffusion for KL-16.
"""

import typing
from dataclasses import dataclass
from typing import Any

from configs.options import INF, REPO, ints, opt, other, settings
from configs.training import PyramidConfig, TrainConfig

MID_RESO_HELP = 'images are resized to this multiple of the crop before cropping (adm: at most to it)'

MAX_DEFER_FRACTION = 1 / 8  # of a short run, which an automatic deferral may take


def as_fraction(value: float, total_steps: int) -> float:
    """A moment of a run as a fraction of it: `value` itself below 1, else that many optimizer steps."""
    return value if value < 1 else value / total_steps


@settings(
    output_dir=other('', text='logs and checkpoints; empty is local_output/<model>'),
    log_every=50,
    hflip=True,
    crop='adm',
    mid_reso=other(1.25, text=MID_RESO_HELP),
    base_lr=other(1e-4, text='learning rate'),
    warmup=other(0.0, text='epochs of learning rate warm-up; 0 is none, for vqvae epochs / 100'),
    weight_decay=0.0,
    clip=other(1.0, text='clip of both gradient norms; <= 0 is off'),
    images_per_step=128,
    epochs=40,
    lr_end=0.1,
    schedule='flat',
    recompute=other(
        'none',
        text='activations that the backward pass computes again, which saves memory: none, or those of each '
        'block of encoder and decoder',
        choices=('none', 'block'),
    ),
)
class TokenizerConfig(TrainConfig):
    """Losses, discriminator and codebook of any tokenizer; the defaults are those of VQ-16."""

    picture_every: int = opt(
        1000, 'optimizer steps between pictures in TensorBoard', limits=(1, INF), free=True, group='run'
    )
    init_from: str = opt(
        '',
        'weights to start from: a checkpoint or a released file',
        path=True,
        free=True,
        per_node=True,
        group='run',
    )
    train_only: str = opt(
        '', '"decoder" trains the decoder alone: codes stay exactly as they are', choices=('', 'decoder')
    )
    net: str = opt(
        'published',
        'published network, or tiny: three levels for 32x32 images on one CPU core',
        choices=('published', 'tiny'),
    )
    ch: int = opt(128, 'width of the first level, a multiple of 32')
    ch_mult: str = opt('1_1_2_2_4', 'width multiples per level; the stride is 2 ** (levels - 1)')
    num_res_blocks: int = opt(2, 'residual blocks per encoder level', limits=(1, INF))
    # optimisation
    ema: float | str = opt(
        0.9999,
        'decay of the moving average of the weights; 0 is off; of several joined by commas the first one is '
        'used for evaluation and export',
        limits=(0, 0.999999),
        group='optimisation',
    )
    # reconstruction
    l1_weight: float = opt(0.0, 'weight of the mean absolute error', limits=(0, INF), group='reconstruction')
    l2_weight: float = opt(1.0, 'weight of the mean squared error', limits=(0, INF), group='reconstruction')
    lpips: str = opt(
        'vgg',
        'perceptual loss: vgg (LPIPS, needs its files), pyramid (needs none) or none',
        choices=('vgg', 'pyramid', 'none'),
        group='reconstruction',
    )
    lpips_weight: float = opt(1.0, 'weight of the perceptual loss', limits=(0, INF), group='reconstruction')
    lpips_min: int = opt(
        48,
        'pixels per side below which an image has no perceptual loss',
        limits=(16, INF),
        group='reconstruction',
    )
    lpips_vgg: str = opt(
        'vgg16-397923af.pth',
        'LPIPS: VGG16 weights of torchvision',
        path=True,
        free=True,
        per_node=True,
        group='reconstruction',
    )
    lpips_lin: str = opt(
        'vgg.pth',
        'LPIPS: linear heads, version 0.1',
        path=True,
        free=True,
        per_node=True,
        group='reconstruction',
    )
    lpips_path: str = opt(
        '',
        'LPIPS: both in one file, in place of lpips_vgg and lpips_lin',
        path=True,
        free=True,
        per_node=True,
        group='reconstruction',
    )
    allow_download: bool = opt(
        False, 'fetch missing LPIPS files', free=True, per_node=True, group='reconstruction'
    )
    # discriminator
    disc: str = opt(
        'patchgan',
        'patchgan, stylegan, dino (needs --dino_path) or none',
        choices=('patchgan', 'stylegan', 'dino', 'none'),
        group='discriminator',
    )
    dino_path: str = opt(
        '',
        'weights of DINO ViT-S/16, original or timm keys',
        path=True,
        free=True,
        per_node=True,
        group='discriminator',
    )
    disc_start: float = opt(
        20_000,
        'first discriminator step; below 1 a share of all steps',
        limits=(0, INF),
        group='discriminator',
    )
    disc_ramp: float = opt(
        1000,
        'steps over which its loss fades in; below 1 a share of all steps',
        limits=(0, INF),
        group='discriminator',
    )
    disc_blur: float = opt(
        0.0,
        'steps over which the blur of its input fades out; below 1 a share; 0 is off',
        limits=(0, INF),
        group='discriminator',
    )
    disc_weight: float = opt(0.5, 'weight of its loss', limits=(0, INF), group='discriminator')
    disc_loss: str = opt(
        'hinge',
        'hinge, vanilla or non-saturating',
        choices=('hinge', 'vanilla', 'non-saturating'),
        group='discriminator',
    )
    disc_lr: float = opt(
        0.0, 'its highest learning rate; 0 is that of the tokenizer', limits=(0, INF), group='discriminator'
    )
    disc_weight_decay: float = opt(0.0, 'its weight decay', limits=(0, INF), group='discriminator')
    disc_width: int = opt(
        64, 'channels of the first layer of patchgan', limits=(1, INF), group='discriminator'
    )
    adaptive: bool = opt(
        False, 'scale the loss by the ratio of gradients at the last layer', group='discriminator'
    )
    diffaug: bool = opt(False, 'differentiable augmentation of what it sees', group='discriminator')
    consistency: float = opt(
        0.0, 'weight of balanced consistency, needs diffaug', limits=(0, INF), group='discriminator'
    )
    lecam: float = opt(0.0, 'weight of LeCAM regularisation', limits=(0, INF), group='discriminator')

    CHECKPOINT_PREFIX: typing.ClassVar[str] = 'vae-ckpt'
    GAN_EXTRAS: typing.ClassVar[dict[str, Any]] = dict(half=True, adaptive_min=0.0, adaptive_eps=1e-4)

    def __post_init__(self):
        if not self.output_dir:
            object.__setattr__(self, 'output_dir', str(REPO / 'local_output' / self.model))
        super().__post_init__()
        if self.ch % 32:
            raise ValueError(f'--ch must be a multiple of 32 (GroupNorm), got {self.ch}')
        if self.precision == 1:
            raise ValueError('a tokenizer cannot be trained in float16: pass --fp16=2 for bfloat16')
        if self.consistency and not self.diffaug:
            raise ValueError('--consistency compares two augmentations: pass --diffaug=1 as well')
        if self.train_only and not self.init_from:
            raise ValueError('--train_only=decoder needs trained codes: pass --init_from=FILE')

    @property
    def net_stride(self) -> int:
        """Pixels per side of a code."""
        return 8 if self.net == 'tiny' else 2 ** (len(ints(self.ch_mult)) - 1)

    def peak_lr(self, world_size: int) -> float:
        return self.base_lr

    @property
    def warmup_epochs(self) -> float:
        return self.warmup

    def peaks(self, world_size: int) -> list[tuple[float, float, float]]:
        of_discriminator = (
            self.disc_lr or self.peak_lr(world_size),
            self.disc_weight_decay,
            self.disc_weight_decay,
        )
        return [*super().peaks(world_size), of_discriminator]

    def gan_kwargs(self, total_steps: int) -> dict[str, Any]:
        """Fields of `GANSettings`; moments are shares of the run."""
        return dict(
            weight=self.disc_weight,
            start=as_fraction(self.disc_start, total_steps),
            ramp=as_fraction(self.disc_ramp, total_steps),
            kind=self.disc_loss,
            adaptive=self.adaptive,
            adaptive_max=1e4,
            augment=self.diffaug,
            consistency=self.consistency,
            lecam=self.lecam,
            blur=as_fraction(self.disc_blur, total_steps),
            **self.GAN_EXTRAS,
        )


@settings(
    model='vqvae',
    ch=160,
    hflip=False,
    crop='vae',
    mid_reso=1.125,
    base_lr=other(3e-4, text='learning rate at 768 images, scaled by sqrt(batch / 768)'),
    weight_decay=0.005,
    clip=10.0,
    images_per_step=768,
    epochs=250,
    lr_end=0.3,
    schedule='cos',
    beta1=0.5,
    beta2=0.9,
    l1_weight=0.2,
    disc='dino',
    disc_start=0.2,
    disc_ramp=0.02,
    disc_blur=0.04,
    disc_weight=0.4,
    disc_weight_decay=0.0005,
    adaptive=True,
    diffaug=True,
    consistency=8.0,
)
class VQVAEConfig(TokenizerConfig, PyramidConfig):
    """The multi-scale residual tokenizer of VAR."""

    vocab_size: int = opt(4096, 'codes in the codebook', limits=(2, INF))
    z_channels: int = opt(32, 'width of a code', limits=(1, INF))
    dropout: float = opt(0.05, 'dropout inside residual blocks', limits=(0, 0.999))
    # codebook
    beta: float = opt(0.25, 'weight of the commitment term', limits=(0, INF), group='codebook')
    codebook: str = opt(
        'ema',
        'ema: moving averages; grad: by gradient, as published',
        choices=('ema', 'grad'),
        group='codebook',
    )
    codebook_init: str = opt(
        'uniform',
        'uniform in +-1/(36 sqrt z_channels), inv_v in +-1/V, or normal',
        choices=('uniform', 'inv_v', 'normal'),
        group='codebook',
    )
    restart: bool = opt(
        True, 'restart codes that nothing chooses, candidates equally from every scale', group='codebook'
    )
    defer: int = opt(
        -1,
        'steps before quantisation starts, by k-means; -1: 1 % of the run, at least 1000, at most 1/8 of it',
        limits=(-1, INF),
        group='codebook',
    )
    scale_drop: float = opt(
        0.1,
        'share of the images that keep a random number of leading scales',
        limits=(0, 1),
        group='codebook',
    )
    lookup: str = opt(
        'euclidean',
        'euclidean or cosine distance to the codes',
        choices=('euclidean', 'cosine'),
        group='codebook',
    )
    entropy: float = opt(
        0.0, 'weight of the entropy loss of the assignments', limits=(0, INF), group='codebook'
    )
    rotation: bool = opt(False, 'rotate and rescale the gradient at the quantizer', group='codebook')
    unshared: bool = opt(
        False, 'a codebook for every scale; such weights fit no published model', group='codebook'
    )
    # optimisation

    GAN_EXTRAS: typing.ClassVar[dict[str, Any]] = dict(half=False, adaptive_min=0.015, adaptive_eps=1e-6)

    def __post_init__(self):
        super().__post_init__()
        if self.net_stride != self.stride:
            raise ValueError(
                f'--net={self.net} --ch_mult={self.ch_mult} has stride {self.net_stride}, '
                f'but --patch_size={self.stride}: pass --patch_size={self.net_stride}'
            )

    def peak_lr(self, world_size: int) -> float:
        return self.base_lr * (self.accumulate * self.micro_batch(world_size) / 768) ** 0.5

    @property
    def warmup_epochs(self) -> float:
        return self.warmup or self.epochs / 100

    def defer_steps(self, total_steps: int) -> int:
        """Optimizer steps before quantisation starts."""
        if self.train_only or self.init_from:
            return 0
        return (
            self.defer
            if self.defer >= 0
            else min(max(1000, total_steps // 100), int(total_steps * MAX_DEFER_FRACTION))
        )

    def _model_tag(self) -> str:
        return f'vqvae-ch{self.ch}v{self.vocab_size}z{self.z_channels}__pn{self.pn_list}'

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        moving = not self.train_only
        measures = dict(
            ema=self.codebook == 'ema' and moving,
            restart=self.restart and moving,
            scale_drop=self.scale_drop if moving else 0.0,
            defer_steps=self.defer_steps(total_steps),
            entropy=self.entropy,
            rotation=self.rotation,
        )
        kwargs = dict(
            vocab_size=self.vocab_size,
            z_channels=self.z_channels,
            ch=self.ch,
            ch_mult=ints(self.ch_mult),
            num_res_blocks=self.num_res_blocks,
            dropout=self.dropout if moving else 0.0,
            beta=self.beta,
            v_patch_nums=self.patch_nums,
            net=self.net,
            unshared=self.unshared,
            measures=measures,
            test_mode=False,
        )
        return kwargs | (dict(using_znorm=True) if self.lookup == 'cosine' else {})

    def init_kwargs(self) -> dict[str, Any]:
        return dict(codebook_init=self.codebook_init)


@dataclass(frozen=True)
class SquareConfig(TokenizerConfig):
    """A tokenizer of square images of any side."""

    side: int = opt(256, 'pixels per side of the training images', 'image_size img_size', group='most used')

    @property
    def stride(self) -> int:
        return self.net_stride

    def __post_init__(self):
        super().__post_init__()
        if self.side % self.net_stride or not self.side:
            raise ValueError(
                f'--image_size must be a multiple of the stride {self.net_stride}, got {self.side}: '
                f'pass --image_size={max(1, round(self.side / self.net_stride)) * self.net_stride}'
            )

    @property
    def image_size(self) -> int:
        return self.side

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        return dict(ch=self.ch, num_res_blocks=self.num_res_blocks, net=self.net)


@settings(
    model='vq16',
)
class VQConfig(SquareConfig):
    """VQ-16 of LlamaGen: one map of unit codes of few dimensions."""

    vocab_size: int = opt(16384, 'codes in the codebook', limits=(2, INF))
    z_channels: int = opt(8, 'width of a code', limits=(1, INF))
    dropout: float = opt(0.0, 'dropout inside residual blocks', limits=(0, 0.999))
    beta: float = opt(0.25, 'weight of the commitment term', limits=(0, INF), group='codebook')
    entropy: float = opt(
        0.0, 'weight of the entropy loss of the assignments', limits=(0, INF), group='codebook'
    )
    restart: bool = opt(True, 'restart codes that nothing chooses', group='codebook')

    def _model_tag(self) -> str:
        return f'{self.model}-ch{self.ch}v{self.vocab_size}z{self.z_channels}__{self.side}'

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        mult = ints(self.ch_mult)
        return super().model_kwargs(total_steps, steps_per_epoch) | dict(
            codebook_size=self.vocab_size,
            codebook_embed_dim=self.z_channels,
            encoder_ch_mult=mult,
            decoder_ch_mult=mult,
            commit_loss_beta=self.beta,
            entropy_loss_ratio=self.entropy,
            dropout_p=0.0 if self.train_only else self.dropout,
            z_channels=64 if self.net == 'tiny' else 256,
            upkeep=dict(ema=False, restart=self.restart and not self.train_only),
        )


@settings(
    model='vq8',
    ch_mult='1_2_2_4',
)
class VQ8Config(VQConfig):
    """VQ-8 of LlamaGen."""


@settings(
    model='flexvae',
    vocab_size=other(8912, text='codes in the codebook; the published weights have 8912, not 8192'),
    z_channels=32,
    images_per_step=256,
    schedule='flat0.8',
    lpips_min=16,
    disc=other('patchgan', text='patchgan or none', choices=('patchgan', 'none')),
)
class FlexVAEConfig(VQConfig):
    """FlexVAE of FlexVAR: the VQ-16 network, trained to decode its latent at any size."""

    num_sides: int = opt(5, 'code maps per step: the native one and distinct smaller ones', limits=(1, INF))
    min_side: int = opt(1, 'smallest side of a code map in training', limits=(1, INF))
    flex_gan: str = opt(
        'all',
        'all: the discriminator sees every size from 32 px, full: the native one only',
        choices=('all', 'full'),
    )

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        return super().model_kwargs(total_steps, steps_per_epoch) | dict(
            num_sides=self.num_sides, min_side=self.min_side
        )

    def gan_kwargs(self, total_steps: int) -> dict[str, Any]:
        return super().gan_kwargs(total_steps) | dict(full_size_only=self.flex_gan == 'full')


@settings(
    model='kl16',
    crop='vae',
    mid_reso=1.0,
    images_per_step=256,
    epochs=50,
    beta1=0.5,
    beta2=0.9,
    l1_weight=1.0,
    l2_weight=0.0,
    disc_start=50_001,
    adaptive=True,
)
class KLConfig(SquareConfig):
    """KL-16 of MAR and FlowAR: a continuous latent."""

    z_channels: int = opt(16, 'channels of the latent', limits=(1, INF))
    kl_weight: float = opt(
        1e-6, 'weight of the KL divergence, summed over the latent, per pixel value', limits=(0, INF)
    )

    def _model_tag(self) -> str:
        return f'kl16-ch{self.ch}z{self.z_channels}__{self.side}'

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        return super().model_kwargs(total_steps, steps_per_epoch) | dict(
            embed_dim=self.z_channels, ch_mult=ints(self.ch_mult), kl_weight=self.kl_weight
        )


CONFIGS: dict[str, type[TokenizerConfig]] = {
    'vqvae': VQVAEConfig,
    'vq16': VQConfig,
    'vq8': VQ8Config,
    'flexvae': FlexVAEConfig,
    'kl16': KLConfig,
}

# 32x32 images on one CPU core, a minute or two; no files needed
_TINY = dict(
    data_path='toy',
    net='tiny',
    images_per_step=32,
    steps=800,
    base_lr=5e-4,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.0,
    warmup=0.2,
    schedule='flat0.6',
    lr_end=0.1,
    clip=1.0,
    ema=0.0,
    hflip=True,
    crop='vae',
    mid_reso=1.0,
    lpips='none',
    disc='none',
    workers=0,
)

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    'vqvae': {
        'paper': dict(images_per_step=768, epochs=250),  # lengths and rates of vaex, network of VAR
        'practical': dict(images_per_step=256, epochs=60),  # one node; the rate follows the batch, 1.7e-4
        'tiny': _TINY
        | dict(
            pn='1_2_3_4', stride=8, vocab_size=512, z_channels=16, dropout=0.0, base_lr=5e-4 * 24**0.5
        ),  # 5e-4 at 32 images
    },
    'vq16': {
        'paper': dict(images_per_step=128, epochs=40),  # LlamaGen
        'practical': dict(images_per_step=256, epochs=20, base_lr=1.4e-4),
        'tiny': _TINY | dict(side=32, vocab_size=512, steps=400),
    },
    'flexvae': {
        'paper': dict(images_per_step=128, epochs=20),  # lengths as in the paper's supplement
        'practical': dict(images_per_step=256, epochs=20, base_lr=1.4e-4),
        'tiny': _TINY | dict(side=32, vocab_size=512, z_channels=8, num_sides=3, steps=400),
    },
    'kl16': {
        'paper': dict(images_per_step=256, epochs=50),  # MAR's authors, on the configuration of LDM
        'practical': dict(images_per_step=256, epochs=20),
        'tiny': _TINY | dict(side=32, z_channels=4, steps=400),
    },
}
PRESETS['vq8'] = {name: PRESETS['vq16'][name] for name in ('paper', 'practical', 'tiny')}
