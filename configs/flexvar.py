"""FlexVAR: settings of its training and sampling, and the published runs."""

import logging
import re
import typing
from typing import Any

from configs.options import INF, REPO, ints, opt, other, settings
from configs.sampling import PyramidSampleConfig
from configs.training import PATCH_NUMS, AdaLNConfig

logger = logging.getLogger(__name__)


@settings(
    model='flexvar',
    depth=20,
    pn=other(
        PATCH_NUMS['256'],
        text='sides of the code maps of validation, joined by _ or -; training draws '
        'others up to the last one; 256, 512, 1024 are the published lists',
    ),
    crop='adm',
    mid_reso=other(1 / 0.88, text='crop adm: the shorter side is drawn from 1 to this multiple of the crop'),
    hflip=True,
    output_dir=str(REPO / 'local_output/flexvar'),
)
class FlexVARConfig(AdaLNConfig):
    """FlexVAR on the code maps of a frozen FlexVAE."""

    vae_ckpt: str = opt(
        'pretrained/FlexVAE.pth',
        'tokenizer weights: a file of any kind',
        path=True,
        free=True,
        per_node=True,
        group='most used',
    )
    final_reso: int = opt(
        0,
        'pixels per side of the training images; 0 means where --pn ends; larger ones '
        'give the same sides, averaged',
        limits=(0, INF),
    )
    keep_last: bool = opt(False, 'end every drawn pyramid at the last side of --pn; published: two thirds do')
    objective: str = opt(
        'mle',
        'what is minimised: mle, the loss of the paper; ddo, real images against samples; cca, right labels '
        'against wrong ones; sar, a second pass that sees predictions',
    )
    sar_sigma: float = opt(0.01, 'sar: weight of the second pass', limits=(0, INF), group='objective')
    sar_scope: str = opt(
        'last',
        'sar: scales that the second pass predicts, last as published, or all but the first',
        choices=('last', 'all'),
        group='objective',
    )
    sar_target: str = opt(
        'teacher',
        'sar: what the second pass is to predict, the predictions of the teacher or the real codes',
        choices=('teacher', 'real'),
        group='objective',
    )
    sar_sample: bool = opt(
        False, 'sar: draw the predictions, in place of the likeliest codes', group='objective'
    )
    sar_cfg: float = opt(2.5, 'sar_sample: guidance at the last scale', limits=(0, INF), group='objective')
    sar_top_k: int = opt(
        900, 'sar_sample: draw from the k most likely codes; 0 is off', limits=(0, INF), group='objective'
    )
    sar_top_p: float = opt(
        0.96,
        'sar_sample: draw from the smallest set of codes with this probability; 0 is off',
        limits=(0, 1),
        group='objective',
    )

    def __post_init__(self):
        super().__post_init__()
        sides = list(self.patch_nums)
        if sides[0] != 1 or len(sides) < 2 or sides != sorted(set(sides)):
            raise ValueError(f'--pn of FlexVAR must rise from 1, such as 1_2_4, got {self.pn}')
        if self.image_size < super().image_size or self.image_size % self.stride:
            raise ValueError(
                f'--final_reso must be a multiple of the stride {self.stride} and at least where --pn '
                f'ends, {self.patch_nums[-1]} codes or {super().image_size} pixels, got {self.final_reso}'
            )
        for name in ('sar_cfg', 'sar_top_k', 'sar_top_p'):
            if getattr(self, name) != getattr(type(self), name) and not self.sar_sample:
                raise ValueError(
                    f'--{name} is of drawn predictions: pass --sar_sample=1, too, or leave it out'
                )

    @property
    def image_size(self) -> int:
        return self.final_reso or super().image_size

    def _model_tag(self) -> str:
        return f'FlexVARd{self.depth}__pn{self.pn_list}'

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        return super().model_kwargs(total_steps, steps_per_epoch) | dict(keep_last=self.keep_last)

    def derived(self, world_size: int) -> dict[str, Any]:
        return super().derived(world_size) | dict(final_reso=self.image_size)


@settings(
    model='flexvar',
    ckpt=other('', text='generator weights: a checkpoint of train.py or a released file', flag='var_ckpt'),
    cfg=2.5,
)
class FlexVARSampleConfig(PyramidSampleConfig):
    """Sampling from FlexVAR."""

    CKPT_HINT: typing.ClassVar[str] = (
        ', one of your own or a published one, which --preset=flexvar_d16, flexvar_d20 and flexvar_d24 name'
    )
    CHANGE_NOTHING: typing.ClassVar[tuple[str, ...]] = ('depth',)

    depth: int | None = opt(
        None, 'blocks of the generator, for a check; None takes those of the file', limits=(1, INF), free=True
    )
    infer_patch_nums: str = opt('', 'sides of the code maps, joined by _ or -; empty takes those of training')
    size: str = opt(
        '',
        'rows x columns in pixels, such as 384x256, or one number for squares, to which the '
        'sides are stretched; empty ends where they end',
        'size image_size img_size',
    )
    maxpn: int = opt(
        16, 'longer code maps take the most likely codes, with constant guidance', limits=(0, INF)
    )
    greedy_unseen: bool = opt(
        True,
        'take the most likely codes at sides other than 1-6, 8, 10, 13, 16, 23, 24, 32, too, as published',
    )
    pos_mode: str = opt(
        'stretch',
        'positions of oblong maps: stretch, or crop, which keeps their aspect',
        choices=('stretch', 'crop'),
    )
    used_llamagen_cfg: bool = opt(False, 'the same guidance at every scale; 1 is then off')
    top_k: int = opt(0, 'draw from the k most likely codes; 0 is off; published: 900', limits=(0, INF))
    top_p: float = opt(
        0.95, 'draw from the smallest set of codes with this probability; 0 is off', limits=(0, 1)
    )

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, 'infer_patch_nums', self.infer_patch_nums.replace('-', '_'))
        if not re.fullmatch(r'|[1-9]\d*(x[1-9]\d*)?', self.size):
            raise ValueError(
                '--size must be rows x columns in pixels, such as 384x256, or one number for '
                f'squares, got {self.size!r}'
            )
        if self.size and 'x' not in self.size:
            object.__setattr__(self, 'size', f'{self.size}x{self.size}')
        if self.sides and (self.sides[0] != 1 or list(self.sides) != sorted(self.sides)):
            raise ValueError(
                '--infer_patch_nums must begin with 1 and go from coarse to fine, '
                f'got {self.infer_patch_nums}'
            )

    @property
    def sides(self) -> tuple[int, ...] | None:
        """Sides of the code maps; None means those of training."""
        try:
            return ints(self.infer_patch_nums) if self.infer_patch_nums else None
        except ValueError as error:
            raise ValueError(f'--infer_patch_nums: {error}') from None

    def check_model(self, model: Any) -> None:
        if self.depth not in (None, model.depth):
            raise ValueError(
                f'--depth={self.depth}, but {self.ckpt} has {model.depth} blocks: '
                'pass the file of that depth, or leave out --depth'
            )
        if self.sides and self.sides[-1] > model.patch_nums[-1]:
            logger.warning(
                '--infer_patch_nums ends at %d, the model was trained up to %d: these images are '
                'larger than in training',
                self.sides[-1],
                model.patch_nums[-1],
            )

    def sample_kwargs(self) -> dict[str, Any]:
        size = tuple(map(int, self.size.split('x'))) if self.size else None
        return super().sample_kwargs() | dict(
            guidance=self.cfg if self.used_llamagen_cfg else self.cfg + 1,
            top_k=self.top_k,
            top_p=self.top_p,
            max_pn=self.maxpn,
            infer_patch_nums=self.sides,
            image_size=size,
            pos_mode=self.pos_mode,
            greedy_unseen=self.greedy_unseen,
            used_llamagen_cfg=self.used_llamagen_cfg,
        )


# Published runs (README of FlexVAR; a script says depth 20 for d16 by mistake).
PRESETS: dict[str, dict[str, Any]] = {
    'flexvar_d16': dict(
        depth=16, images_per_step=768, epochs=180, precision=1, init_adaln_gamma=1e-3, lr_end=0.1
    ),
    'flexvar_d20': dict(
        depth=20, images_per_step=768, epochs=250, precision=1, init_adaln_gamma=1e-3, lr_end=0.1
    ),
    'flexvar_d24': dict(
        depth=24,
        images_per_step=768,
        epochs=350,
        base_lr=8e-5,
        precision=1,
        init_adaln_gamma=1e-4,
        lr_end=0.01,
    ),
}

_FLEXVAR = dict(
    num_images=50_000,
    fixed_batch=64,
    cfg=2.5,
    top_k=900,
    top_p=0.95,
    maxpn=16,  # with the sides of training
    source='README of FlexVAR, 256 px',
)

_13_STEPS = dict(infer_patch_nums='1_2_3_4_5_6_7_8_9_10_12_14_16', source='README of FlexVAR, 13 steps')

_512 = dict(
    infer_patch_nums='1_2_3_4_5_6_7_8_9_10_12_14_16_23_32',
    cfg=3.0,
    source='README of FlexVAR, 512 px zero-shot',
)

SAMPLE_PRESETS: dict[str, dict[str, Any]] = {
    'fid': _FLEXVAR,
    'steps_13': _FLEXVAR | _13_STEPS,
    '512': _FLEXVAR | _512,
    **{
        f'flexvar_d{depth}': _FLEXVAR
        | dict(depth=depth, ckpt=f'FlexVARd{depth}-epo{last_epoch}.pth', vae_ckpt='FlexVAE.pth')
        for depth, last_epoch in ((16, 179), (20, 249), (24, 349))
    },
}

TRAINING = FlexVARConfig
SAMPLING = FlexVARSampleConfig
