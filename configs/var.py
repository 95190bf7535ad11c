"""VAR: settings of its training and sampling, and the published runs."""

import typing
from dataclasses import dataclass
from typing import Any

from configs.options import INF, opt, settings
from configs.sampling import PyramidSampleConfig
from configs.training import AdaLNConfig


@settings(model='var')
class VARConfig(AdaLNConfig):
    """VAR on the codes of a frozen VQVAE."""

    vae_ckpt: str = opt(
        'vae_ch160v4096z32.pth',
        'tokenizer weights: a file of any kind, or a published name',
        path=True,
        free=True,
        per_node=True,
        group='most used',
    )
    progressive_until: float = opt(
        0.0, 'progressive training until this share of the run; 0 is off', 'pg', limits=(0, 1)
    )
    progressive_first: int = opt(4, 'first progressive stage (scale index)', 'pg0')
    progressive_warmup: float = opt(0.0, 'warm-up epochs per progressive stage; 0 means epochs / 300', 'pgwp')

    def __post_init__(self):
        super().__post_init__()
        last = len(self.patch_nums) - 1
        if self.progressive_until and not 0 <= self.progressive_first <= last:
            raise ValueError(f'--pg0 must be a scale index in 0..{last}, got {self.progressive_first}')
        if self.progressive_until and self.objective != 'mle':
            raise ValueError(
                f'--objective={self.objective} sees all scales from the first step on, and --pg does not: '
                'leave out --pg'
            )

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
        progressive = dict(
            total=total_steps,
            warmup=self.warmup_epochs * steps_per_epoch,
            until=self.progressive_until,
            first_stage=self.progressive_first,
            stage_warmup=self.progressive_warmup_epochs * steps_per_epoch,
        )
        return super().model_kwargs(total_steps, steps_per_epoch) | dict(
            progressive=progressive if self.progressive_until > 0 else None
        )

    def tokenizer_kwargs(self) -> dict[str, Any]:
        return dict(v_patch_nums=self.patch_nums)

    def derived(self, world_size: int) -> dict[str, Any]:
        return super().derived(world_size) | dict(pgwp=self.progressive_warmup_epochs)


@dataclass(frozen=True)
class VARSampleConfig(PyramidSampleConfig):
    """Sampling from VAR."""

    IGNORED: typing.ClassVar[dict[str, str]] = dict.fromkeys(
        ('image_size', 'img_size'), 'a VAR draws the size that it was trained for: it is read from its file'
    )
    CKPT_HINT: typing.ClassVar[str] = (
        ', one of your own or a published one, which --preset=var_d16, '
        'var_d20, var_d24, var_d30 and var_d36_512 name'
    )

    top_k: int = opt(0, 'draw from the k most likely codes; 0 is off', limits=(0, INF))
    top_p: float = opt(
        0.0, 'draw from the smallest set of codes with this probability; 0 is off', limits=(0, 1)
    )
    more_smooth: bool = opt(False, 'mix code embeddings: smoother pictures, worse scores')

    def sample_kwargs(self) -> dict[str, Any]:
        return super().sample_kwargs() | dict(
            guidance=1 + self.cfg, top_k=self.top_k, top_p=self.top_p, more_smooth=self.more_smooth
        )


# Published runs (README of VAR); `recipes/*.sh` holds the same as commands.
PRESETS: dict[str, dict[str, Any]] = {
    'var_d16': dict(
        depth=16, images_per_step=768, epochs=200, precision=1, init_adaln_gamma=1e-3, lr_end=0.1
    ),
    'var_d20': dict(
        depth=20, images_per_step=768, epochs=250, precision=1, init_adaln_gamma=1e-3, lr_end=0.1
    ),
    'var_d24': dict(
        depth=24,
        images_per_step=768,
        epochs=350,
        base_lr=8e-5,
        precision=1,
        init_adaln_gamma=1e-4,
        lr_end=0.01,
    ),
    'var_d30': dict(
        depth=30,
        images_per_step=1024,
        epochs=350,
        base_lr=8e-5,
        precision=1,
        init_adaln_gamma=1e-5,
        lr_end=0.01,
        weight_decay_end=0.08,
    ),
    'var_d36_512': dict(
        depth=36,
        shared_aln=True,
        pn='512',
        images_per_step=768,
        epochs=350,
        base_lr=8e-5,
        precision=1,
        init_adaln_gamma=5e-6,
        lr_end=0.01,
        weight_decay_end=0.08,
    ),
}

# Settings of published figures. README and paper of VAR differ; the paper's FIDs are of its later versions.
_README = dict(
    num_images=50_000,
    fixed_batch=64,
    cfg=1.5,
    top_k=900,
    top_p=0.96,
    more_smooth=False,
    source='README of VAR',
)

_PAPER = dict(
    num_images=50_000,
    fixed_batch=64,
    cfg=2.0,
    top_k=600,
    top_p=0.0,
    more_smooth=False,
    source='arXiv 2404.02905, table 3; it names no top-p',
)

_SIZES = ('d16', 'd20', 'd24', 'd30')


def _files(size: str) -> dict[str, str]:
    return dict(ckpt=f'var_{size}.pth', vae_ckpt='vae_ch160v4096z32.pth')


SAMPLE_PRESETS: dict[str, dict[str, Any]] = {
    'fid': _README,
    'paper': _PAPER,
    'no_cfg': _PAPER | dict(cfg=0.0, source='arXiv 2404.02905, table 3, row without guidance'),
    **{f'var_{size}': _README | _files(size) for size in _SIZES},
    **{f'var_{size}_paper': _PAPER | _files(size) for size in _SIZES},
    'var_d36_512': _README | _files('d36'),
    # candidates for evaluate.py reject: the authors publish neither ratio nor classifier
    'var_d30_re': _README
    | _files('d30')
    | dict(num_images=100_000, source='README of VAR; ratio 2 is ours, none is published'),
}

TRAINING = VARConfig
SAMPLING = VARSampleConfig
