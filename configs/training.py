"""Settings that several kinds of trainings share."""

import importlib.util
import re
import typing
from dataclasses import dataclass, replace
from typing import Any

from configs.objectives import OBJECTIVES, check_objective
from configs.options import INF, REPO, check_values, expand_paths, flag_of, ints, numbers_of, opt
from utils.console import require_data, require_weights
from utils.machine import automatic_workers, workers_note

PATCH_NUMS = {
    '256': '1_2_3_4_5_6_8_10_13_16',
    '512': '1_2_3_4_6_9_13_18_24_32',
    '1024': '1_2_3_4_5_7_9_12_16_21_27_36_48_64',
}

SMALL_PYRAMIDS = {  # side of the finest code map -> sides that work well for small images
    4: '1_2_3_4',
    6: '1_2_3_4_6',
    8: '1_2_3_4_6_8',
    12: '1_2_3_4_6_8_12',
    16: PATCH_NUMS['256'],
}

SCHEDULES = 'cos, lin, lin0, lin00, lin<number>, exp, flat or flat<share before a cosine>'

CROP_KINDS = ('resize', 'adm', 'vae')
CROPS = 'resize: as VAR; adm: random crop of ADM; vae: as resize, evaluated as adm'

WEIGHTINGS = ('uniform', 'equal', 'lognorm')  # of the scales in the loss

LARGEST_WIDTH = 0.288  # of an average of weights: 12 ** -0.5 is a plain mean of all steps
RECOMPUTED = ('none', 'attention', 'block')

MOST_WORKERS = 16  # loader processes per rank that are started unasked

VAL_SPLIT_HELP = (
    'of data without val/: share of each class that is held out for validation, by the names of the files; '
    'the folder itself may hold the classes, or the images; 0 expects val/'
)
VAL_SPLIT_LIMITS = (0, 0.9)

# Stored tokens take no more per code of the finest map: 16 means and 16 log-variances in float32, or in int64
# the codes of maps of every side up to 48x48.
TOKEN_BYTES = 128


@dataclass(frozen=True)
class TrainConfig:
    """Settings of any training, generator or tokenizer. Derived values are properties and never stored."""

    model: str = opt('var', 'what is trained', group='most used')
    # data
    data_path: str = opt(
        '/path/to/imagenet',
        'root with train/ and val/ class folders, the same packed by utils.pack_data, "digits", or an npz '
        'of sample.py, see --val_path',
        path=True,
        per_node=True,
        group='most used',
    )
    val_path: str = opt(
        '',
        'data set of the validation images where --data_path is an npz, which holds images for training '
        'alone; the labels of the npz count its classes',
        path=True,
        per_node=True,
        group='data',
    )
    num_classes: int = opt(
        0,
        'classes; 0 takes the number of folders, any other number must agree with it',
        'num_classes class_num',
        limits=(0, INF),
        group='data',
    )
    mid_reso: float = opt(
        1.125,
        'images are resized to this multiple of the crop before cropping',
        limits=(1, INF),
        group='data',
    )
    hflip: bool = opt(False, 'random horizontal flip', group='data')
    crop: str = opt('resize', CROPS, choices=CROP_KINDS, group='data')
    exif: bool = opt(
        True,
        'turn images as their EXIF orientation says, as viewers do; 0 reads the pixels as '
        'they are stored, as the published code does',
        group='data',
    )
    val_split: float = opt(0.0, VAL_SPLIT_HELP, limits=VAL_SPLIT_LIMITS, group='data')
    cache: str = opt(
        '',
        'memory: decode all images once, into memory that the processes of a node share; empty is off',
        choices=('', 'memory'),
        free=True,
        group='data',
    )
    repeat: int = opt(
        1,
        'passes over the training images that make an epoch: of a few hundred images one takes a moment, and '
        'every epoch ends with a checkpoint',
        limits=(1, INF),
        group='data',
    )
    max_bad_images: int = opt(
        100,
        'training images that may be unreadable: each is replaced by another one and named; more end the run',
        limits=(0, INF),
        free=True,
        group='data',
    )
    workers: int = opt(
        -1,
        'loader processes per rank; -1 is automatic, 0 loads in the main process (the '
        'comment in the published code of VAR says the opposite)',
        'workers num_workers',
        limits=(-1, INF),
        free=True,
        per_node=True,
        group='data',
    )
    loader_timeout: float = opt(
        10.0,
        'minutes to wait for a batch, also for the first one; then the loader processes are ended and '
        'started again at the same batch, as after a death; 0 waits forever',
        limits=(0, INF),
        free=True,
        group='data',
    )
    # run
    exp_name: str = opt('text', 'name written to the log header', free=True, per_node=True, group='run')
    output_dir: str = opt(
        str(REPO / 'local_output'),
        'logs and checkpoints',
        'local_out_dir_path',
        path=True,
        free=True,
        per_node=True,
        group='most used',
    )
    seed: int | None = opt(
        None,
        'None draws one, kept in the checkpoint; given, cudnn is deterministic too',
        limits=(0, 2**63 - 1),
        free=True,
        group='most used',
    )
    same_seed_for_all_ranks: int = opt(0, 'offset of the data order seed', group='run')
    save_every: str = opt(
        '20m',
        'checkpoint also every N optimizer steps ("500") or minutes ("20m"); empty '
        'is off, and then there is one per epoch',
        free=True,
        group='run',
    )
    background_save: bool = opt(
        True,
        'write checkpoints while the training goes on, from a copy of the state in host memory',
        free=True,
        group='run',
    )
    keep_newest: int = opt(
        2,
        'so many of the newest checkpoints are kept, as -last, -prev, -prev2 and so on',
        limits=(1, INF),
        free=True,
        group='run',
    )
    keep_every: int = opt(
        0,
        'save at every multiple of so many optimizer steps and keep that checkpoint for good, as '
        '-step<number>; 0 keeps none',
        limits=(0, INF),
        free=True,
        group='run',
    )
    after_save: str = opt(
        '',
        'shell command that is started after every save, with the file in $CHECKPOINT and the number of '
        'steps in $STEP: to upload it, say; the training does not wait for it',
        free=True,
        per_node=True,
        group='run',
    )
    export: bool = opt(
        False,
        'at the end, write the folder "model" beside the checkpoints, which pipeline.load and the hub read',
        free=True,
        group='run',
    )
    max_skipped_steps: int = opt(
        10,
        'after so many steps in a row whose loss or gradient is not finite, which leave the weights as they '
        'are, the last checkpoint is restored; 0 never does that',
        limits=(0, INF),
        free=True,
        group='run',
    )
    max_restores: int = opt(
        3,
        'so many times the last checkpoint may be restored, to go on without the steps that were not finite '
        'and as many before them; after that such steps end the run',
        limits=(0, INF),
        free=True,
        group='run',
    )
    eval_every: int = opt(
        10,
        'epochs between evaluations; the last epoch always has one',
        limits=(1, INF),
        free=True,
        group='run',
    )
    log_every: int = opt(
        500, 'optimizer steps between TensorBoard points', limits=(1, INF), free=True, group='run'
    )
    tb: bool = opt(True, 'write TensorBoard files', free=True, group='run')
    wandb: str = opt(
        '', 'project of Weights & Biases that gets what TensorBoard gets', free=True, group='run'
    )
    dry_run: bool = opt(False, 'print every derived value as JSON and exit', group='run')
    check: bool = opt(
        False,
        'run every part of the training once, report speed, memory and hours, and exit without a trace',
        free=True,
        group='run',
    )
    timeout: int = opt(
        30,
        'minutes that ranks wait for each other in a collective before the run ends',
        limits=(1, INF),
        free=True,
        group='run',
    )
    watchdog: float = opt(
        0.0,
        'minutes without a step or a batch of an evaluation, after which every rank writes what its threads '
        'do to stacks_rank_NNN.txt and ends with exit code 70; 0 is off',
        limits=(0, INF),
        free=True,
        group='run',
    )
    rank_logs: bool = opt(
        False, 'write what each rank says to rank_NNN.txt in the output folder', free=True, group='run'
    )
    allow_round: bool = opt(
        False, 'accept a batch size that the ranks cannot share evenly, and round it', group='run'
    )
    # optimisation
    base_lr: float = opt(1e-4, 'learning rate per 256 images', 'tblr', limits=(0, INF), group='most used')
    tlr: float | None = opt(
        None, 'accepted, always replaced by what follows from base_lr', group='optimisation'
    )
    weight_decay: float = opt(0.05, 'weight decay at the start', 'twd', limits=(0, INF), group='optimisation')
    weight_decay_end: float = opt(
        0.0, 'weight decay at the end; 0 keeps the start', 'twde', limits=(0, INF), group='optimisation'
    )
    clip: float = opt(2.0, 'clip of the gradient norm; <= 0 is off', 'tclip', group='optimisation')
    images_per_step: int = opt(
        768,
        'images per optimizer step, all ranks and accumulation steps together',
        'bs batch_size',
        limits=(1, INF),
        group='most used',
    )
    accumulate: int = opt(1, 'micro-steps per optimizer step', 'ac', limits=(1, INF), group='optimisation')
    epochs: int = opt(250, 'epochs', 'ep', limits=(1, INF), group='most used')
    steps: int = opt(0, 'optimizer steps in place of epochs; 0 is off', limits=(0, INF), group='optimisation')
    warmup: float = opt(
        0.0,
        'epochs of learning rate warm-up; 0 means epochs / 50',
        'wp',
        limits=(0, INF),
        group='optimisation',
    )
    warmup_start: float = opt(
        0.005, 'learning rate ratio at the first step', 'wp0', limits=(0, 1), group='optimisation'
    )
    lr_end: float = opt(
        0.01, 'learning rate ratio at the last step', 'wpe', limits=(0, 1), group='optimisation'
    )
    schedule: str = opt('lin0', SCHEDULES, 'sche', group='optimisation')
    optimizer: str = opt('adamw', 'adam and adamw both mean AdamW', 'opt', group='optimisation')
    fused: bool = opt(True, 'fused AdamW kernel', 'afuse', group='optimisation')
    beta1: float = opt(0.9, 'first moment decay of AdamW', limits=(0, 1), group='optimisation')
    beta2: float = opt(0.95, 'second moment decay of AdamW', limits=(0, 1), group='optimisation')
    # numerics
    precision: int = opt(
        0, '0 float32, 1 float16 with loss scaling, 2 bfloat16', 'fp16', limits=(0, 2), group='most used'
    )
    tf32: bool = opt(True, 'allow TF32 products on CUDA', group='numerics')
    compile_tokenizer: int = opt(
        0,
        'torch.compile: 0 off, 1 reduce-overhead, 2 max-autotune, 3 default',
        'vfast',
        limits=(0, 3),
        group='numerics',
    )
    compile_model: int = opt(0, 'as vfast, for the model', 'tfast', limits=(0, 3), group='numerics')
    recompute: str = opt(
        'none',
        'activations that the backward pass computes again, which saves memory: none, attention (all before '
        'its output), or block (all of each block)',
        'act_ckpt',
        choices=RECOMPUTED,
        free=True,
        group='numerics',
    )

    # fields that follow from others, so that config.yaml leaves them out
    DERIVED: typing.ClassVar[tuple[str, ...]] = ('use_cached',)
    # Settings that some kinds of models have; those without them behave as if they were off.
    shard = False
    auto_batch = False
    picture_every = 0
    tb_samples = 0
    fid_images = 0
    vae_bf16 = 0.0
    cached_path = ''
    freeze = ''
    ema = 0.0
    ema_snapshot = 0
    train_only = ''
    init_from = ''
    objective = 'mle'

    CHECKPOINT_PREFIX: typing.ClassVar[str] = 'ar-ckpt'
    IGNORED: typing.ClassVar[dict[str, str]] = {}  # published flags that have no effect here, and why
    # Other defaults, by a setting and its value: what flags or a constructor say comes on top.
    IMPLIED: typing.ClassVar[dict[str, dict[str, dict[str, Any]]]] = {}

    def __post_init__(self):
        expand_paths(self)
        check_values(self)
        if not re.fullmatch(
            r'cos|lin|lin00|lin\d*\.?\d+|exp|flat|flat0?\.\d+|cosine|constant|tail0?\.?\d+',
            self.schedule.strip(),
        ):
            raise ValueError(f'--sche must be {SCHEDULES}, got {self.schedule!r}')
        if self.optimizer.lower().strip() not in ('adam', 'adamw'):
            raise ValueError(f'--opt must be adam or adamw, got {self.optimizer!r}')
        if not re.fullmatch(r'|[1-9]\d*m?', self.save_every):
            raise ValueError(
                f'--save_every must be a number of steps ("500") or minutes ("20m"), got {self.save_every!r}'
            )
        is_npz = self.data_path.endswith('.npz')
        if is_npz and not self.val_path:
            raise ValueError(
                f'--data_path={self.data_path} holds images for training alone: pass --val_path=ROOT, the '
                'data set that their generator was trained on, for validation'
            )
        if self.val_path and not is_npz:
            raise ValueError(
                '--val_path goes with an npz as --data_path, and other data sets hold validation images '
                'themselves: leave it out'
            )
        if self.cache and is_npz:
            raise ValueError('--cache is for files of images, and an npz holds pixels already: leave it out')
        if self.wandb and not self.tb:
            raise ValueError('--wandb sends what TensorBoard gets, and --tb=0 writes nothing: leave out one')
        if self.wandb and importlib.util.find_spec('wandb') is None:
            raise ValueError('--wandb needs a package: pip install wandb')
        if len({*self.ema_decays}) < len(self.ema_decays) or 0 in self.ema_decays:
            raise ValueError(
                f'--{flag_of(self, "ema")} must be one decay, or several that differ and are not 0, '
                f'got {self.ema}'
            )

    def require_files(self) -> None:
        """Make sure that folders and files to read are there; what they hold is looked at later.

        Raises:
            ValueError: one is not.
        """
        if not self.dry_run:
            if not self.cached_path:
                require_data(self.data_path)
            if self.val_path:
                require_data(self.val_path, '--val_path=')
            require_weights(self.init_from)

    # ------------------------------------------------------------------------------ what follows
    local_out_dir_path = property(lambda self: self.output_dir)

    @property
    def image_size(self) -> int:
        """Side of the training images in pixels."""
        raise NotImplementedError

    def local_batch(self, world_size: int) -> int:
        """Images per rank and micro-step."""
        return round(self.images_per_step / self.accumulate / world_size)

    def micro_batch(self, world_size: int) -> int:
        """Images of all ranks per micro-step (published: glb_batch_size)."""
        return self.local_batch(world_size) * world_size

    def in_micro_steps(self, accumulate: int, world_size: int) -> 'TrainConfig':
        """The same images per optimizer step, split into another number of micro-steps.

        Args:
            accumulate: a divisor of the images per rank and optimizer step.
        """
        images_per_step = self.micro_batch(world_size) * self.accumulate
        return replace(self, accumulate=accumulate, images_per_step=images_per_step)

    def check_batch(self, world_size: int) -> None:
        """Make sure that the batch can be shared.

        Raises:
            ValueError: ranks and accumulation steps cannot share the batch evenly.
        """
        share = self.accumulate * world_size
        if self.local_batch(world_size) < 1 or (self.images_per_step % share and not self.allow_round):
            fitting = max(share, self.images_per_step // share * share)
            raise ValueError(
                f'--bs={self.images_per_step} cannot be shared by {world_size} ranks x '
                f'--ac={self.accumulate}: pass --bs={fitting}, or --allow_round=1 to round it'
            )

    def peak_lr(self, world_size: int) -> float:
        return self.accumulate * self.base_lr * self.micro_batch(world_size) / 256

    def peaks(self, world_size: int) -> list[tuple[float, float, float]]:
        """(highest learning rate, first weight decay, last one) of every optimizer, the model's own first."""
        return [(self.peak_lr(world_size), self.weight_decay, self.final_weight_decay)]

    def lr_phase(self, step: int, total_steps: int, steps_per_epoch: int) -> tuple[int, int]:
        """(step within its phase, steps of that phase): the learning rate begins anew with every phase."""
        return step, total_steps

    def final_lr_ratio(self, world_size: int) -> float:
        """Learning rate at the last step over the peak."""
        return self.lr_end

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """Decays of the averages of the weights; () where none is kept."""
        return numbers_of(self.ema) if self.ema else ()

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
        """Loader processes per rank: as asked, but no more than a batch has images.

        Where nobody asked, the CPUs of this process divided by the ranks of the machine, less one, up to 16,
        and only as many as the shared memory has room for.
        """
        local_batch = self.local_batch(world_size)
        if self.workers >= 0:
            return min(self.workers, local_batch)
        return automatic_workers(min(MOST_WORKERS, local_batch), self.batch_bytes(world_size), num_cpus)

    def workers_note(self, world_size: int, num_cpus: int | None = None) -> str:
        """One line where little shared memory makes the automatic number of loader processes smaller."""
        if self.workers >= 0:
            return ''
        most = min(MOST_WORKERS, self.local_batch(world_size))
        return workers_note(most, self.batch_bytes(world_size), num_cpus)

    def batch_bytes(self, world_size: int) -> int:
        """Bytes of the batch that a loader process makes: float32 images of all micro-steps of one rank."""
        return self.local_batch(world_size) * self.accumulate * 3 * self.image_size**2 * 4

    @property
    def save_steps_minutes(self) -> tuple[int, float]:
        """(optimizer steps, minutes) between extra checkpoints; 0 is off."""
        if self.save_every.endswith('m'):
            return 0, float(self.save_every[:-1])
        return int(self.save_every or 0), 0.0

    def run_name(self, world_size: int) -> str:
        """Name of the TensorBoard folder."""
        name = (
            f'tb-{self._model_tag()}__b{self.micro_batch(world_size)}ep{self.epochs}'
            f'{self.optimizer[:4]}lr{self.base_lr:g}wd{self.weight_decay:g}'
        )
        return re.sub(r'[^\w\-+,.]', '_', name)

    def _model_tag(self) -> str:
        return self.model

    def model_size(self) -> dict[str, Any]:
        """What names the size of the model: arguments of its `kwargs_from_size`."""
        return {}

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        """Constructor arguments of the model, beside its size, the number of classes and the tokenizer.

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
        note = self.workers_note(world_size)
        return dict(
            batch_size=self.local_batch(world_size),
            glb_batch_size=self.micro_batch(world_size),
            bs=self.micro_batch(world_size),
            tlr=self.peak_lr(world_size),
            twde=self.final_weight_decay,
            wp=self.warmup_epochs,
            sche=self.lr_schedule,
            workers=self.num_workers(world_size),
            data_load_reso=self.image_size,
            tb_dir_name=self.run_name(world_size),
            world_size=world_size,
            **(dict(workers_note=note) if note else {}),
        )


@dataclass(frozen=True)
class GeneratorConfig(TrainConfig):
    """What all generators have in common."""

    init_from: str = opt(
        '',
        'weights to begin with in place of random ones; checkpoints in the output folder come first',
        path=True,
        free=True,
        per_node=True,
        group='run',
    )
    reset: str = opt(
        '',
        'parts of --init_from that stay as initialised, joined by commas: head, class_emb, pos, trunk, or '
        'patterns of names of parameters, such as "blocks.0.*"',
        free=True,
        group='run',
    )
    freeze: str = opt(
        '',
        'parts that are not trained, named as for --reset; keep the flag when a run is continued',
        group='optimisation',
    )
    vae_bf16: float = opt(
        0.0,
        'encode in bfloat16 if that changes no larger share of the codes than this, such as 0.1; '
        '0 encodes in float32',
        limits=(0, 1),
        group='numerics',
    )
    auto_batch: bool = opt(
        False,
        'find by trial steps how many images fit into memory at a time, and take the fewest micro-steps: '
        '--ac follows, and the images per optimizer step stay',
        free=True,
        group='optimisation',
    )
    shard: bool = opt(
        False,
        'spread weights, gradients, moments and averages over the ranks (FSDP2), in place of a copy on each',
        free=True,
        group='run',
    )
    shard_group: int = opt(
        0,
        'ranks that share one copy with --shard, such as those of a node; 0 is all of them',
        limits=(0, INF),
        free=True,
        group='run',
    )
    ema: float | str = opt(
        0.0,
        'decay of averaged weights, for evaluation and sampling; 0 keeps none; of several joined by commas '
        'the first one is used, and sample.py --weights names any',
        limits=(0, 0.999999),
        group='optimisation',
    )
    ema_warmup: bool = opt(
        True,
        'average over few steps at the beginning, so that it follows the start fast',
        group='optimisation',
    )
    ema_profiles: str = opt(
        '',
        'widths of averages as shares of the training, such as 0.05,0.1, that --ema_snapshot stores now and '
        'then: utils.posthoc_ema makes those of any other width of them',
        limits=(0.005, LARGEST_WIDTH),
        group='optimisation',
    )
    ema_snapshot: int = opt(
        0,
        'optimizer steps from one storing of the averages of --ema_profiles to the next',
        limits=(0, INF),
        free=True,
        group='optimisation',
    )
    ema_device: str = opt(
        '',
        'cpu keeps the averaged weights in the memory of the host; empty on the device of the weights',
        choices=('', 'cpu'),
        free=True,
        group='optimisation',
    )
    tb_samples: int = opt(
        8,
        'samples of fixed noise in TensorBoard at every evaluation',
        limits=(0, 64),
        free=True,
        group='run',
    )
    fid_images: int = opt(
        0,
        'images to draw at every evaluation, logged as fid_<n>k; 0 is off',
        limits=(0, 1_000_000),
        free=True,
        group='run',
    )
    fid_ref: str = opt(
        '',
        'npz with mu and sigma to compare them with; empty takes the validation images',
        path=True,
        free=True,
        per_node=True,
        group='run',
    )
    fid_flags: str = opt(
        '', 'flags of sample.py for them, such as "--cfg=1.5 --top_k=900"', free=True, group='run'
    )
    fid_features: str = opt('inception', 'feature network: inception, or digits', free=True, group='run')
    inception_weights: str = opt(
        '',
        'its weights; empty searches as evaluate.py, and never downloads',
        path=True,
        free=True,
        per_node=True,
        group='run',
    )
    objective: str = opt('mle', 'what is minimised: mle, the loss of the paper', group='objective')

    def __post_init__(self):
        super().__post_init__()
        check_objective(self)
        if self.shard_group and not self.shard:
            raise ValueError('--shard_group goes with --shard=1: pass both, or neither')
        if self.export and self.shard:
            raise ValueError(
                '--export=1 writes whole weights, which no card has with --shard=1: leave it out, and run '
                'python export.py CKPT FOLDER afterwards'
            )
        if self.ema_device and self.shard:
            raise ValueError(
                '--ema_device=cpu keeps the averages off the cards, --shard spreads them over the '
                'cards: leave out one'
            )
        if self.fid_images == 1:
            raise ValueError('--fid_images must be 0 or at least 2, got 1: draw some thousand')
        if bool(self.ema_profiles) != bool(self.ema_snapshot):
            raise ValueError(
                '--ema_profiles and --ema_snapshot go together: pass both, such as '
                '--ema_profiles=0.05,0.1 --ema_snapshot=1000'
            )
        if len({*self.profile_widths}) < len(self.profile_widths):
            raise ValueError(f'--ema_profiles must be widths that differ, got {self.ema_profiles}')
        if self.reset and not self.init_from:
            flag = flag_of(self, 'init_from')
            raise ValueError(f'--reset is about the weights of --{flag}: pass both, or leave out --reset')

    @property
    def reference(self) -> str:
        """File of the frozen weights with which the objective compares the model; '' where it does not."""
        return ''

    @property
    def profile_widths(self) -> tuple[float, ...]:
        """Widths of the averages that are stored now and then."""
        return numbers_of(self.ema_profiles)

    def require_files(self) -> None:
        super().require_files()
        if not self.dry_run:
            require_weights(self.vae_ckpt)


@dataclass(frozen=True)
class CachedConfig(GeneratorConfig):
    """A generator that can train on the tokens that `extract.py` stored."""

    use_cached: bool = opt(False, 'train on stored tokens; follows from --cached_path', group='data')
    cached_path: str = opt(
        '',
        'folder of the tokens that extract.py wrote, or several joined by commas, of '
        'which every access picks one',
        'cached_path code_path',
        path=True,
        several=True,
        per_node=True,
        group='data',
    )
    cached_val_path: str = opt(
        '',
        'the same of the validation images; empty reads those of --data_path',
        path=True,
        several=True,
        per_node=True,
        group='data',
    )

    def __post_init__(self):
        super().__post_init__()
        if self.use_cached and not self.cached_path:
            raise ValueError('--use_cached needs the folder of the tokens: pass --cached_path=FOLDER')
        if self.vae_bf16 and self.cached_path:
            raise ValueError('--vae_bf16 is for images, and --cached_path holds codes already: leave out one')
        if self.cache and self.cached_path:
            raise ValueError('--cache is for images, and --cached_path holds tokens already: leave out one')
        if self.cached_val_path and not self.cached_path:
            raise ValueError('--cached_val_path goes with --cached_path: pass both')
        object.__setattr__(self, 'use_cached', bool(self.cached_path))

    def batch_bytes(self, world_size: int) -> int:
        if not self.cached_path:
            return super().batch_bytes(world_size)
        num_codes = (self.image_size // self.stride) ** 2
        return self.local_batch(world_size) * self.accumulate * num_codes * TOKEN_BYTES


@dataclass(frozen=True)
class ContrastConfig(GeneratorConfig):
    """A generator whose likelihood of an image can be compared with that of frozen weights."""

    objective: str = opt(
        'mle',
        'what is minimised: mle, the loss of the paper; ddo, real images against samples; cca, right labels '
        'against wrong ones',
    )
    ref_from: str = opt(
        '',
        'ddo, cca: weights of the frozen reference; empty takes those of --init_from',
        path=True,
        free=True,
        per_node=True,
        group='objective',
    )
    contrast_beta: float = opt(
        0.02,
        'ddo, cca: factor of the log-likelihood ratio; published for about 680 codes, it goes with one over '
        'their number',
        limits=(0, INF),
        group='objective',
    )
    uncond_ratio: float = opt(
        0.1, 'ddo, cca: share of labels replaced by the null class', limits=(0, 1), group='objective'
    )
    ddo_alpha: float = opt(10.0, 'ddo: weight of samples', limits=(0, INF), group='objective')
    ddo_null_weight: str = opt(
        '1',
        'ddo: weight of real images of the null class, 1 as the published code has it, or alpha as it means',
        choices=('1', 'alpha'),
        group='objective',
    )
    ddo_codes: str = opt(
        'reencoded',
        'ddo: codes of samples, reencoded from their pixels as real ones are, or drawn, which is faster and '
        'easier to tell from real ones',
        choices=('reencoded', 'drawn'),
        group='objective',
    )
    cca_lambda: float = opt(50.0, 'cca: weight of wrong labels', limits=(0, INF), group='objective')

    @property
    def reference(self) -> str:
        return (self.ref_from or self.init_from) if OBJECTIVES[self.objective].needs_reference else ''

    def require_files(self) -> None:
        super().require_files()
        if not self.dry_run:
            require_weights(self.ref_from)


def advice_on_size(size: int, stride: int) -> str:
    """Which `--pn` and `--patch_size` fit images of `size` pixels per side.

    Args:
        stride: the one that was asked for, which is kept where the size is a multiple of it.
    """
    published = {int(name): pn for name, pn in PATCH_NUMS.items()}
    if size in published:
        return f'pass --pn={size} --patch_size=16'
    for patch_size in dict.fromkeys((stride, 16, 8, 4)):
        if size % patch_size == 0 and size // patch_size in SMALL_PYRAMIDS:
            return f'pass --pn={SMALL_PYRAMIDS[size // patch_size]} --patch_size={patch_size}'
    return f'pass a --pn that ends with {size}/N and --patch_size=N, where N is the stride of the tokenizer'


@dataclass(frozen=True)
class PyramidConfig(TrainConfig):
    """A run over a pyramid of code maps."""

    pn: str = opt(
        PATCH_NUMS['256'],
        'sides of the code maps, joined by _ or -; 256, 512, 1024 are the published lists',
        group='most used',
    )
    stride: int = opt(
        16,
        'pixels per side of the finest code, the stride of the tokenizer',
        'patch_size',
        limits=(1, INF),
    )
    img_size: int = opt(
        0,
        'pixels per side of the training images, where they are to be checked: they '
        'follow from the last side of --pn and from --patch_size',
        'image_size img_size',
        limits=(0, INF),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.img_size not in (0, self.image_size):
            raise ValueError(
                f'--img_size={self.img_size} is not what --pn and '
                f'--patch_size={self.stride} give, {self.image_size}: '
                f'{advice_on_size(self.img_size, self.stride)}'
            )
        object.__setattr__(self, 'img_size', 0)  # it was a check alone: a resumed run may leave the flag out
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
        return tuple(pn * self.stride for pn in self.patch_nums)

    @property
    def image_size(self) -> int:
        return max(self.resolutions)

    def derived(self, world_size: int) -> dict[str, Any]:
        return super().derived(world_size) | dict(
            pn=self.pn_list, patch_nums=self.patch_nums, resos=self.resolutions
        )


def is_weighting(text: str, num_scales: int) -> bool:
    """Whether a text says how so many scales share the loss: by name, or by a number for each."""
    if text in WEIGHTINGS:
        return True
    try:
        numbers = numbers_of(text)
    except ValueError:
        return False
    return len(numbers) == num_scales and min(numbers) >= 0 and 0 < sum(numbers) < INF


@dataclass(frozen=True)
class AdaLNConfig(PyramidConfig, CachedConfig, ContrastConfig):
    """What VAR and FlexVAR have in common."""

    IGNORED: typing.ClassVar[dict[str, str]] = {
        'data_name': 'classes and images are those of --data_path',
        'dbg_nan': 'steps that are not finite are always looked for, see --max_skipped_steps',
        'local_debug': 'a run without torchrun is local',
    }
    # Model and reference are compared as they are evaluated.
    IMPLIED: typing.ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        'objective': {name: dict(drop_path=0.0) for name in ('ddo', 'cca')}
    }

    depth: int = opt(
        16, 'transformer blocks; heads = depth, width = 64 * depth', limits=(1, INF), group='most used'
    )
    width: int = opt(
        0, 'another width than 64 * depth, a multiple of the depth; 0 is the published one', limits=(0, INF)
    )
    shared_aln: bool = opt(False, 'one AdaLN projection for all blocks', 'saln')
    attn_l2_norm: bool = opt(True, 'unit queries and keys with a learnt scale', 'anorm')
    flash: bool = opt(True, 'use flash-attn or xformers where installed and suitable', 'fuse')
    drop_path: float = opt(
        -1.0, 'drop path of the last block; negative means 0.1 * depth / 24', limits=(-1, 0.999)
    )
    init_std: float = opt(-1.0, 'std of the weights; negative means sqrt(1 / (3 width))', 'ini')
    init_head: float = opt(0.02, 'multiplier of the head weights', 'hd')
    init_adaln: float = opt(0.5, 'multiplier of the AdaLN weights', 'aln')
    init_adaln_gamma: float = opt(1e-5, 'multiplier of the AdaLN gamma weights', 'alng')
    label_smooth: float = opt(0.0, 'label smoothing', 'ls', limits=(0, 0.999))
    scale_weights: str = opt(
        'uniform',
        'share of each scale in the loss: uniform, as its tokens; equal; lognorm, most to middle scales; or '
        'numbers joined by commas, one per side of --pn',
    )

    def __post_init__(self):
        super().__post_init__()
        if not is_weighting(self.scale_weights, len(self.patch_nums)):
            raise ValueError(
                f'--scale_weights must be {", ".join(WEIGHTINGS)}, or {len(self.patch_nums)} numbers of at '
                f'least 0 joined by commas, one per side of --pn, got {self.scale_weights!r}'
            )
        if self.width % self.depth:
            raise ValueError(
                f'--width must be a multiple of --depth={self.depth}, the number of heads, got {self.width}: '
                f'pass --width={max(self.width // self.depth, 1) * self.depth}'
            )
        if self.label_smooth and OBJECTIVES[self.objective].needs_reference:
            raise ValueError(
                f'--ls smooths a loss that --objective={self.objective} does not have: leave out one'
            )
        if self.scale_weights != 'uniform' and OBJECTIVES[self.objective].needs_reference:
            raise ValueError(
                f'--scale_weights weighs a loss that --objective={self.objective} does not have, since a '
                f'likelihood is the sum over all codes, got {self.scale_weights!r}: leave it out'
            )
        if self.width and not self.attn_l2_norm:
            raise ValueError(
                '--width needs --anorm=1, since weights without it do not tell their number of heads: '
                'leave out one of them'
            )

    @property
    def weighting(self) -> str | tuple[float, ...]:
        """How the scales share the loss: by name, or by a number for each."""
        return self.scale_weights if self.scale_weights in WEIGHTINGS else numbers_of(self.scale_weights)

    def model_size(self) -> dict[str, Any]:
        return dict(depth=self.depth, width=self.width)

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        return dict(
            drop_path_rate=self.drop_path if self.drop_path >= 0 else 0.1 * self.depth / 24,
            shared_aln=self.shared_aln,
            attn_l2_norm=self.attn_l2_norm,
            patch_nums=self.patch_nums,
            flash_if_available=self.flash,
            label_smooth=self.label_smooth,
            scale_weights=self.weighting,
        )

    def init_kwargs(self) -> dict[str, Any]:
        return dict(
            init_adaln=self.init_adaln,
            init_adaln_gamma=self.init_adaln_gamma,
            init_head=self.init_head,
            init_std=self.init_std,
        )

    def derived(self, world_size: int) -> dict[str, Any]:
        kwargs = self.model_kwargs(1, 1)
        std = (1 / (3 * (self.width or 64 * self.depth))) ** 0.5
        return super().derived(world_size) | dict(
            drop_path_rate=kwargs['drop_path_rate'], init_std=self.init_std if self.init_std >= 0 else std
        )
