"""NPP: settings of its training and sampling, and the published runs."""

import itertools
import typing
from typing import Any, ClassVar

from configs.options import INF, REPO, opt, other, settings
from configs.sampling import SampleConfig
from configs.training import CachedConfig, ContrastConfig, TrainConfig

GPT_SIZES = (
    'GPT-B',
    'GPT-L',
    'GPT-XL',
    'GPT-XXL',
    'GPT-XXXL',
    'GPT-1B',
    'GPT-3B',
    'GPT-7B',
)  # of `NPP.SIZES`


@settings(
    model='npp',
    init_from=other('', flag='gpt_ckpt init_from'),
    warmup=other(
        1.0, text='scheduler: epochs of warm-up in every phase; the paper has 5', flag='warmup_epochs'
    ),
    warmup_start=0.0,
    images_per_step=other(256, flag='global_batch_size bs batch_size'),
    epochs=other(300, flag='epochs ep'),
    base_lr=other(1e-4, text='peak learning rate, for any batch', flag='lr'),
    clip=other(1.0, flag='max_grad_norm'),
    weight_decay=other(0.05, flag='weight_decay twd'),
    seed=other(None, flag='global_seed seed'),
    save_every=other('', flag='ckpt_every save_every'),
    precision=other(
        2,
        text='none, fp16 with loss scaling, or bf16',
        flag='mixed_precision fp16',
        words=dict(none=0, fp16=1, bf16=2),
    ),
    ema=other(0.0, text='decay of averaged weights; alone it is 0.9999; 0 keeps none', words={'': 0.9999}),
    ema_warmup=False,
    crop='adm',
    mid_reso=other(1.1, text='crop adm: the shorter side is drawn from 1 to this multiple of the crop'),
    hflip=True,
    output_dir=other(str(REPO / 'local_output/npp'), flag='results_dir local_out_dir_path'),
)
class NPPConfig(CachedConfig, ContrastConfig):
    """NPP on the codes of a frozen VQ-16. Flags are those of the published script."""

    IGNORED: ClassVar[dict[str, str]] = {
        'cloud_save_path': 'checkpoints lie in --results_dir',
        'no_local_save': 'checkpoints lie there',
        'gradient_accumulation_steps': 'it is not read in the published script; --ac accumulates',
        'no_compile': '--tfast compiles',
        'dataset': '--code_path is read',
        **dict.fromkeys(('vocab_size', 'vq_model'), 'it is read from the file of the tokenizer'),
        **dict.fromkeys(('gpt_type', 'cls_token_num'), 'there is one class token'),
    }
    # Model and reference are compared as they are evaluated.
    IMPLIED: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        'objective': {name: dict(dropout_p=0.0, token_dropout_p=0.0) for name in ('ddo', 'cca')}
    }

    vae_ckpt: str = opt(
        'pretrained_models/vq_ds16_c2i.pt',
        'tokenizer weights, any file',
        'vq_ckpt',
        path=True,
        free=True,
        per_node=True,
        group='most used',
    )
    gpt_model: str = opt('GPT-B', 'size: ' + ', '.join(GPT_SIZES), choices=GPT_SIZES, group='most used')
    depth: int | None = opt(None, 'blocks; None is that of the size', limits=(1, INF), group='most used')
    width: int | None = opt(None, 'width, in heads of 64; None is that of the size', limits=(64, INF))
    img_size: int = opt(256, 'pixels per side of the training images', 'image_size img_size', limits=(0, INF))
    stride: int = opt(
        16,
        'pixels per side of a code, the stride of the tokenizer',
        'downsample_size patch_size',
        limits=(1, INF),
    )
    patch_level: int = opt(
        2,
        'phases: 1 is plain next-token training; 2, 3, 4 begin with patches of 2x2, 4x4, 8x8 codes',
        limits=(1, 4),
    )
    epoch_rate: float = opt(
        0.5,
        'share of the epochs before the last phase; of that, before the last but one; and so on',
        limits=(0, 1),
    )
    scheduler: bool = opt(False, 'in every phase warm up, hold, and fall linearly; off is a constant rate')
    decay_ratio: float = opt(0.2, 'scheduler: share of a phase in which the rate falls', limits=(0, 1))
    end_lr: float = opt(1e-5, 'scheduler: learning rate at the end of a phase', limits=(0, INF))
    dropout_p: float = opt(0.1, 'dropout after attention and feed-forward networks', limits=(0, 0.999))
    token_dropout_p: float = opt(0.1, 'dropout of the input', limits=(0, 0.999))
    drop_path_rate: float = opt(0.0, 'drop path of the last block, replaces dropout_p', limits=(0, 0.999))

    objective: str = opt(
        'mle',
        'what is minimised: mle, the loss of the paper; ddo, real images against samples; cca, right labels '
        'against wrong ones; rear, codes after contexts with wrong codes',
    )
    rear: bool = opt(False, 'the same as --objective=rear', group='objective')
    rear_noise: float = opt(
        0.75,
        'rear: part of the training after which no code is replaced any more; the limit falls to there',
        limits=(0, 1),
        group='objective',
    )

    def __post_init__(self):
        if self.rear and self.objective == 'mle':
            object.__setattr__(self, 'objective', 'rear')
        super().__post_init__()
        object.__setattr__(self, 'rear', self.objective == 'rear')
        if (self.schedule, self.lr_end) != (TrainConfig.schedule, TrainConfig.lr_end):
            raise ValueError('NPP does not use --sche and --wpe: pass --scheduler and --end_lr')
        if self.patch_level > 1 and self.objective not in ('mle', 'rear'):
            raise ValueError(
                f'--objective={self.objective} needs the likelihood of single codes, got '
                f'--patch_level={self.patch_level}: pass --patch_level=1'
            )
        if self.objective == 'rear' and self.shard:
            raise ValueError(
                '--objective=rear trains heads beside the model, which --shard does not spread: '
                'leave out --shard'
            )
        if self.width and self.width % 64:
            raise ValueError(f'--width must be a multiple of 64, got {self.width}')
        largest = self.phases[0][1]
        if self.img_size < 1 or self.img_size % (self.stride * largest):
            raise ValueError(
                f'--image_size must be a multiple of --downsample_size={self.stride} times '
                f'the largest patch, {largest} codes, got {self.img_size}: choose another size '
                'or --patch_level'
            )
        ends = [end for end, _ in self.phases]
        if ends != sorted({*ends}) or ends[0] < 1:
            raise ValueError(
                f'--epoch_rate={self.epoch_rate:g} and --patch_level={self.patch_level} make '
                f'phases of {self.epochs} epochs that end at {ends}, each must last one at '
                'least: pass more epochs, another rate or fewer levels'
            )
        if self.scheduler and self.end_lr > self.base_lr:
            raise ValueError(f'--end_lr must be at most --lr={self.base_lr:g}, got {self.end_lr:g}')
        longest = (1 - self.decay_ratio) * min(end - begin for begin, end in itertools.pairwise([0, *ends]))
        if self.scheduler and self.warmup > longest:
            raise ValueError(
                f'--warmup_epochs={self.warmup:g} does not fit into the shortest phase beside '
                f'the decay: pass at most {longest:g}'
            )

    @property
    def image_size(self) -> int:
        return self.img_size

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """(epoch at which it ends, side of a patch) of every phase."""
        return tuple((int(self.epochs * self.epoch_rate**i), 2**i) for i in reversed(range(self.patch_level)))

    @property
    def lr_schedule(self) -> str:
        return f'tail{self.decay_ratio:g}' if self.scheduler else 'constant'

    @property
    def warmup_epochs(self) -> float:
        return self.warmup if self.scheduler else 0.0

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

    def model_size(self) -> dict[str, Any]:
        return dict(size=self.gpt_model, depth=self.depth, width=self.width)

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        ends = self._phase_ends(total_steps, steps_per_epoch)
        phases = tuple((end / total_steps, p) for end, (_, p) in zip(ends, self.phases, strict=True))
        return dict(
            grid=self.img_size // self.stride,
            phases=phases,
            token_dropout_p=self.token_dropout_p,
            resid_dropout_p=self.dropout_p,
            ffn_dropout_p=self.dropout_p,
            drop_path_rate=self.drop_path_rate,
        )

    def derived(self, world_size: int) -> dict[str, Any]:
        return super().derived(world_size) | dict(
            patch_sides=[p for _, p in self.phases], phase_ends=[end for end, _ in self.phases]
        )


@settings(
    model='npp',
    ckpt=other(
        '', text='generator weights: a checkpoint of train.py or a released file', flag='gpt_ckpt ckpt'
    ),
    vae_ckpt=other(
        '', text='tokenizer weights; empty takes those inside the checkpoint', flag='vq_ckpt vae_ckpt'
    ),
    weights=other(
        'ema',
        text='ema: averaged weights where the file has them; model: those of the last step',
        flag='ckpt_key weights',
        words=dict(model='raw'),
    ),
    batch_size=other(32, flag='per_proc_batch_size bs'),
    num_images=other(50_000, flag='num_fid_samples num_images'),
    seed=other(0, flag='global_seed seed'),
    output=other(str(REPO / 'local_output' / 'samples'), flag='sample_dir output'),
    precision=other(0, text='none, fp16 or bf16', flag='precision fp16', words=dict(none=0, fp16=1, bf16=2)),
    cfg=other(1.5, text='classifier-free guidance scale; 1 is off', flag='cfg_scale cfg'),
)
class NPPSampleConfig(SampleConfig):
    """Sampling from NPP. Flags are those of the published script."""

    IGNORED: typing.ClassVar[dict[str, str]] = {
        **dict.fromkeys(('gpt_type', 'cls_token_num'), 'there is one class token'),
        'no_compile': 'only --compile compiles',
        **dict.fromkeys(
            (
                'from_fsdp',
                'vq_model',
                'codebook_size',
                'codebook_embed_dim',
                'downsample_size',
                'num_classes',
            ),
            'it is read from the files of weights',
        ),
    }
    REFUSED: typing.ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ('ssg', 'ssg_prior', 'ssg_schedule'),
            'SSG compares a scale with the one before, and NPP has no scales; guide by --cfg_scale',
        ),
        **dict.fromkeys(('cfg_from', 'cfg_to'), 'NPP has no scales; pass --cfg_interval, in codes'),
    }
    CHANGE_NOTHING: typing.ClassVar[tuple[str, ...]] = ('gpt_model',)

    gpt_model: str = opt(
        '', 'size of the generator, for a check; empty takes that of the file', choices=('', *GPT_SIZES)
    )
    img_size: int = opt(
        0,
        'pixels per side of what is drawn; 0 takes those of training, or 256 where the file does not tell',
        'image_size',
        limits=(0, INF),
    )
    image_size_eval: int = opt(
        0, 'pixels per side to which the images are resized; 0 leaves them', limits=(0, INF)
    )
    cfg_interval: int = opt(-1, 'codes 0 to this plus one are guided; -1 guides all', limits=(-1, INF))
    temperature: float = opt(1.0, 'divides the logits')
    top_k: int = opt(0, 'draw from the k most likely codes; 0 is off', limits=(0, INF))
    top_p: float = opt(
        1.0, 'draw from the smallest set of codes with this probability; 1 is off', limits=(0, 1)
    )

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f'--temperature must be above 0, got {self.temperature:g}')

    def check_model(self, model: Any) -> None:
        if not self.gpt_model:
            return
        wanted = model.kwargs_from_size(self.gpt_model)
        depth = len(model.layers)
        width = model.tok_embeddings.embedding_dim
        if (depth, width) != (wanted['n_layer'], wanted['dim']):
            raise ValueError(
                f'--gpt_model={self.gpt_model} has {wanted["n_layer"]} blocks of width {wanted["dim"]}, '
                f'{self.ckpt} {depth} of {width}: pass the file of that size, or leave out --gpt_model'
            )

    def sample_kwargs(self) -> dict[str, Any]:
        return dict(
            guidance=self.cfg,
            cfg_interval=self.cfg_interval,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            image_size=self.img_size or None,
            image_size_eval=self.image_size_eval or None,
        )


# Published runs (README of NPP); the curriculum of the larger ones is not published.
PRESETS: dict[str, dict[str, Any]] = {
    'npp_b': dict(gpt_model='GPT-B', epoch_rate=0.5, patch_level=2, scheduler=True),
}
SAMPLE_PRESETS: dict[str, dict[str, Any]] = {
    f'npp_{size}': dict(
        gpt_model=f'GPT-{size.upper()}',
        num_images=50_000,
        fixed_batch=32,
        cfg=cfg,
        img_size=256,
        source=f'README of NPP, {size.upper()}',
    )
    for size, cfg in (('b', 2.0), ('l', 1.75), ('xl', 1.7), ('xxl', 1.65))
}

TRAINING = NPPConfig
SAMPLING = NPPSampleConfig
