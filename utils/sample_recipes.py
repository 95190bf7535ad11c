"""Recipes of sampling jobs, their presets by published model, and sweeps over settings.

Only the standard library is needed here.
"""
import dataclasses
import itertools
import logging
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.recipe import GPT_SIZES, REPO, check_limits, expand_paths, ints, opt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleRecipe:
    """Settings of a sampling job. All but `FREE` decide the images; all are in the manifest."""

    model: str = opt('var', 'family of the generator')
    ckpt: str = opt('', 'generator weights: a checkpoint of train.py, a released file, or a published name',
                    path=True)
    vae_ckpt: str = opt('', 'tokenizer weights; empty takes those inside a checkpoint of train.py', path=True)
    weights: str = opt('ema', 'ema: averaged weights where the file has them; raw: those of the last step')
    source: str = opt('', 'where these settings come from, for the manifest; presets say it')
    output: str = opt(str(REPO / 'local_output' / 'samples'), 'folder of the images; the npz lies beside it',
                      path=True)
    num_images: int = opt(50_000, 'images, spread evenly over the classes')
    classes: str = opt('', 'class ids joined by "_"; empty takes all')
    labels: str = opt('', 'class of every image: .npy, or .txt with one per line, or random', path=True)
    seed: int = opt(0, 'the noise of image i is a function of (seed, i)')
    cfg: float = opt(1.5, 'classifier-free guidance in the unit of the paper')
    precision: int = opt(0, '0 float32, 1 float16, 2 bfloat16', 'fp16')
    tf32: bool = opt(True, 'allow TF32 products on CUDA')
    batch_size: int = opt(64, 'images per batch; batches are cut by image index', 'bs')
    format: str = opt('png', 'png: keep a PNG file of every image; npz: the packed file alone')
    pack: bool = opt(True, 'pack the images into an npz with a manifest')
    shuffle: int = opt(0, 'seed of the order in the npz; -1 packs by image index')
    writers: int = opt(4, 'threads per rank that write images')
    sweep: str = opt('', 'settings to try, such as "cfg=1.25,1.5,2.0 top_k=600,900": one job each, scored '
                         'into <output>.csv and <output>.png')
    ref: str = opt('', 'sweep: reference of the scores, see evaluate.py', path=True)
    score: str = opt('', 'sweep: further flags of evaluate.py, such as "--metrics=fid,is"')
    keep: bool = opt(True, 'sweep: keep the npz of every setting after it was scored')

    IGNORED: typing.ClassVar[dict[str, str]] = {}  # published flags that have no effect here, and why
    CKPT_HINT: typing.ClassVar[str] = ''  # where such a file is to be had
    FREE: typing.ClassVar[tuple[str, ...]] = (  # these do not decide the pixels of an image
        'num_images', 'batch_size', 'output', 'pack', 'format', 'shuffle', 'writers', 'sweep', 'ref', 'score',
        'keep', 'source', 'depth')

    def __post_init__(self):
        expand_paths(self)
        if not self.ckpt:
            raise ValueError(f'expected the weights of a generator: pass --ckpt=FILE{self.CKPT_HINT}')
        check_limits(self)
        if not Path(self.output).name:
            raise ValueError(f'--output must name a folder, got {self.output!r}: pass one')
        if not re.fullmatch(r'|[0-9]{1,9}(_[0-9]{1,9})*', self.classes):
            raise ValueError(f'--classes must be class ids joined by "_", such as 0_7, got {self.classes!r}')
        if self.num_images > 1_000_000:
            raise ValueError(f'--num_images must be at most 1,000,000 per job, got {self.num_images:,}: '
                             'sample several jobs with other seeds')
        if self.classes and self.labels:
            raise ValueError('expected --classes or --labels, got both: leave one out')
        for name, allowed in (('format', ('png', 'npz')), ('weights', ('ema', 'raw'))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'--{name} must be {" or ".join(allowed)}, got {getattr(self, name)!r}')
        if self.format == 'npz' and not self.pack:
            raise ValueError('--format=npz writes the packed file alone: leave out --pack=0')
        if self.sweep:
            if not self.ref:
                raise ValueError('--sweep scores every setting: pass --ref=REFERENCE.npz')
            if not self.pack:
                raise ValueError('--sweep scores packed images: leave out --pack=0')
            for combination in self.combinations():
                self.at(combination)  # checks its values

    @property
    def class_ids(self) -> tuple[int, ...]:
        return tuple(map(int, self.classes.split('_'))) if self.classes else ()

    def sample_kwargs(self) -> dict[str, Any]:
        """Arguments of the model's `sample`, beside labels and rng."""
        raise NotImplementedError

    def check_model(self, model: Any) -> None:
        """Make sure that the settings suit the generator.

        Raises:
            ValueError: they do not.
        """

    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of the sweep, the last name changing fastest.

        Raises:
            ValueError: it is no list of settings that decide the images.
        """
        kinds = typing.get_type_hints(type(self))
        by_flag = {flag: f.name for f in dataclasses.fields(self) for flag in f.metadata['flag'].split()}
        axes: list[list[tuple[str, Any]]] = []
        for axis in self.sweep.split():
            name, _, values = axis.partition('=')
            name = by_flag.get(name.replace('-', '_'), name.replace('-', '_'))
            if any(name == known for (known, _), *_ in axes):
                raise ValueError(f'--sweep expects every name once, got {name} again: join its values by ","')
            if name not in kinds or name in (*self.FREE, 'FREE', 'model'):
                names = [f.name for f in dataclasses.fields(self) if f.name not in (*self.FREE, 'model')]
                raise ValueError(f'--sweep expects name=value,value with a name of {", ".join(names)}, '
                                 f'got {axis!r}')
            if kinds[name] is bool:
                raise ValueError(f'--sweep takes numbers and texts, {name} is a switch: sample twice')
            try:
                axes.append([(name, kinds[name](value)) for value in values.split(',')])
            except ValueError:
                raise ValueError(f'--sweep expects values of type {kinds[name].__name__} for {name}, '
                                 f'got {values!r}') from None
        if not axes:
            raise ValueError(f'--sweep expects name=value,value, got {self.sweep!r}: name a setting')
        return [dict(combination) for combination in itertools.product(*axes)]

    def at(self, combination: dict[str, Any]) -> 'SampleRecipe':
        """The job of one combination, in a folder of its own inside `output`."""
        name = '_'.join(f'{name}={value}' for name, value in combination.items())
        return dataclasses.replace(self, **combination, sweep='', ref='', score='',
                                   output=f'{self.output}/{re.sub(r"[^-+=.,a-zA-Z0-9_]", "-", name)}')


@dataclass(frozen=True)
class VARSampleRecipe(SampleRecipe):
    """Sampling from VAR."""

    IGNORED: typing.ClassVar[dict[str, str]] = dict.fromkeys(
        ('image_size', 'img_size'), 'a VAR draws the size that it was trained for, the files tell it')
    CKPT_HINT: typing.ClassVar[str] = (', one of your own or a published one, which --preset=var_d16, '
                                       'var_d20, var_d24, var_d30 and var_d36_512 name')

    top_k: int = opt(0, 'draw from the k most likely codes; 0 is off')
    top_p: float = opt(0., 'draw from the smallest set of codes with this probability; 0 is off')
    more_smooth: bool = opt(False, 'mix code embeddings: smoother pictures, worse scores')

    def sample_kwargs(self) -> dict[str, Any]:
        return dict(guidance=1 + self.cfg, top_k=self.top_k, top_p=self.top_p, more_smooth=self.more_smooth)


@dataclass(frozen=True)
class FlexVARSampleRecipe(SampleRecipe):
    """Sampling from FlexVAR."""

    CKPT_HINT: typing.ClassVar[str] = (', one of your own or a published one, which --preset=flexvar_d16, '
                                       'flexvar_d20 and flexvar_d24 name')

    model: str = opt('flexvar', 'family of the generator')
    ckpt: str = opt('', 'generator weights: a checkpoint of train.py or a released file', 'var_ckpt',
                    path=True)
    depth: int | None = opt(None, 'blocks of the generator, for a check; None takes those of the file')
    infer_patch_nums: str = opt('', 'sides of the code maps, joined by _ or -; empty takes those of training')
    size: str = opt('', 'rows x columns in pixels, such as 384x256, or one number for squares, to which the '
                        'sides are stretched; empty ends where they end', 'size image_size img_size')
    maxpn: int = opt(16, 'longer code maps take the most likely codes, with constant guidance')
    greedy_unseen: bool = opt(True, 'take the most likely codes at sides other than 1-6, 8, 10, 13, 16, 23, '
                                    '24, 32, too, as published')
    pos_mode: str = opt('stretch', 'positions of oblong maps: stretch, or crop, which keeps their aspect')
    used_llamagen_cfg: bool = opt(False, 'the same guidance at every scale; 1 is then off')
    cfg: float = opt(2.5, 'classifier-free guidance in the unit of the paper')
    top_k: int = opt(0, 'draw from the k most likely codes; 0 is off; published: 900')
    top_p: float = opt(0.95, 'draw from the smallest set of codes with this probability; 0 is off')

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, 'infer_patch_nums', self.infer_patch_nums.replace('-', '_'))
        if self.pos_mode not in ('stretch', 'crop'):
            raise ValueError(f'--pos_mode must be stretch or crop, got {self.pos_mode!r}')
        if not re.fullmatch(r'|[1-9]\d*(x[1-9]\d*)?', self.size):
            raise ValueError('--size must be rows x columns in pixels, such as 384x256, or one number for '
                             f'squares, got {self.size!r}')
        if self.size and 'x' not in self.size:
            object.__setattr__(self, 'size', f'{self.size}x{self.size}')
        if self.sides and (self.sides[0] != 1 or list(self.sides) != sorted(self.sides)):
            raise ValueError('--infer_patch_nums must begin with 1 and go from coarse to fine, '
                             f'got {self.infer_patch_nums}')

    @property
    def sides(self) -> tuple[int, ...] | None:
        """Sides of the code maps; None means those of training."""
        try:
            return ints(self.infer_patch_nums) if self.infer_patch_nums else None
        except ValueError as error:
            raise ValueError(f'--infer_patch_nums: {error}') from None

    def check_model(self, model: Any) -> None:
        if self.depth not in (None, model.depth):
            raise ValueError(f'--depth={self.depth}, but {self.ckpt} has {model.depth} blocks: '
                             'pass the file of that depth, or leave out --depth')
        if self.sides and self.sides[-1] > model.patch_nums[-1]:
            logger.warning('--infer_patch_nums ends at %d, the model was trained up to %d: these images are '
                           'larger than in training', self.sides[-1], model.patch_nums[-1])

    def sample_kwargs(self) -> dict[str, Any]:
        size = tuple(map(int, self.size.split('x'))) if self.size else None
        return dict(guidance=self.cfg + (not self.used_llamagen_cfg), top_k=self.top_k, top_p=self.top_p,
                    max_pn=self.maxpn, infer_patch_nums=self.sides, image_size=size, pos_mode=self.pos_mode,
                    greedy_unseen=self.greedy_unseen, used_llamagen_cfg=self.used_llamagen_cfg)


@dataclass(frozen=True)
class FlowARSampleRecipe(SampleRecipe):
    """Sampling from FlowAR. Flags are those of the published script."""

    IGNORED: typing.ClassVar[dict[str, str]] = {
        'evaluate': 'this command samples, evaluate.py scores', 'data_path': 'no images are read',
        **dict.fromkeys(('device', 'num_workers', 'log_dir', 'online_eval', 'eval_freq', 'save_last_freq',
                         'start_epoch', 'pin_mem', 'no_pin_mem'), 'it is of training'),
        **dict.fromkeys(('class_num', 'img_size', 'image_size', 'vae_embed_dim', 'vae_stride', 'patch_size',
                         'diffloss_d', 'diffloss_w'), 'the files tell it')}

    model: str = opt('flowar', 'family of the generator')
    ckpt: str = opt('', 'generator weights: a checkpoint of train.py or a released file', 'resume ckpt',
                    path=True)
    output: str = opt(str(REPO / 'local_output' / 'samples'), 'folder of the images; the npz lies beside it',
                      'output_dir output', path=True)
    vae_ckpt: str = opt('', 'tokenizer weights; empty takes those inside the checkpoint', 'vae_path',
                        path=True)
    batch_size: int = opt(64, 'images per batch; batches are cut by image index', 'eval_bsz bs')
    cfg: float = opt(1., 'classifier-free guidance at the last scale; 1 and less are off')
    guidance: float = opt(0.9, 'times from 0 to this one are guided: a limit, no strength')
    num_step: int = opt(25, 'steps of the flow head per scale; an odd number makes one less')
    flow_upper_steps: int = opt(0, 'in place of num_step: steps at the first scale, falling to (DiSA)')
    flow_lower_steps: int = opt(0, 'those at the last one; pass both')
    temperature: float = opt(1., 'accepted; only 1 works')
    cfg_schedule: str = opt('linear', 'accepted; only linear works')

    def __post_init__(self):
        super().__post_init__()
        if self.temperature != 1 or self.cfg_schedule != 'linear':
            raise ValueError('--temperature must be 1 and --cfg_schedule linear, as in the published sampler,'
                             f' got {self.temperature} and {self.cfg_schedule}: leave them out')
        if not 0 <= self.guidance <= 1:
            raise ValueError(f'--guidance is a time in [0, 1], got {self.guidance}: the strength is --cfg')
        if bool(self.flow_upper_steps) != bool(self.flow_lower_steps):
            raise ValueError('expected both --flow_upper_steps and --flow_lower_steps, or neither, got '
                             f'{self.flow_upper_steps} and {self.flow_lower_steps}: pass both')
        if min(self.upper_steps, self.lower_steps) < 2:
            raise ValueError('--num_step, --flow_upper_steps and --flow_lower_steps must be at least 2, got '
                             f'{self.upper_steps} to {self.lower_steps}')

    @property
    def upper_steps(self) -> int:
        return self.flow_upper_steps or self.num_step

    @property
    def lower_steps(self) -> int:
        return self.flow_lower_steps or self.num_step

    def sample_kwargs(self) -> dict[str, Any]:
        return dict(guidance=self.cfg, guidance_until=self.guidance, num_steps=self.upper_steps,
                    lower_steps=self.lower_steps)


@dataclass(frozen=True)
class NPPSampleRecipe(SampleRecipe):
    """Sampling from NPP. Flags are those of the published script."""

    IGNORED: typing.ClassVar[dict[str, str]] = {
        **dict.fromkeys(('gpt_type', 'cls_token_num'), 'there is one class token'),
        **dict.fromkeys(('compile', 'no_compile'), 'sampling is not compiled'),
        **dict.fromkeys(('from_fsdp', 'vq_model', 'codebook_size', 'codebook_embed_dim', 'downsample_size',
                         'num_classes'), 'the files tell it')}

    model: str = opt('npp', 'family of the generator')
    ckpt: str = opt('', 'generator weights: a checkpoint of train.py or a released file', 'gpt_ckpt ckpt',
                    path=True)
    vae_ckpt: str = opt('', 'tokenizer weights; empty takes those inside the checkpoint', 'vq_ckpt vae_ckpt',
                        path=True)
    weights: str = opt('ema', 'ema: averaged weights where the file has them; model: those of the last step',
                       'ckpt_key weights', words=dict(model='raw'))
    gpt_model: str = opt('', 'size of the generator, for a check; empty takes that of the file')
    img_size: int = opt(0, 'pixels per side of what is drawn; 0 takes those of training, or 256 where the '
                           'file does not tell', 'image_size')
    image_size_eval: int = opt(0, 'pixels per side to which the images are resized; 0 leaves them')
    batch_size: int = opt(32, 'images per batch; batches are cut by image index', 'per_proc_batch_size bs')
    num_images: int = opt(50_000, 'images, spread evenly over the classes', 'num_fid_samples num_images')
    seed: int = opt(0, 'the noise of image i is a function of (seed, i)', 'global_seed seed')
    output: str = opt(str(REPO / 'local_output' / 'samples'), 'folder of the images; the npz lies beside it',
                      'sample_dir output', path=True)
    precision: int = opt(0, 'none, fp16 or bf16', 'precision fp16', words=dict(none=0, fp16=1, bf16=2))
    cfg: float = opt(1.5, 'classifier-free guidance scale; 1 is off', 'cfg_scale cfg')
    cfg_interval: int = opt(-1, 'codes 0 to this plus one are guided; -1 guides all')
    temperature: float = opt(1., 'divides the logits')
    top_k: int = opt(0, 'draw from the k most likely codes; 0 is off')
    top_p: float = opt(1., 'draw from the smallest set of codes with this probability; 1 is off')

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f'--temperature must be above 0, got {self.temperature:g}')
        if self.gpt_model and self.gpt_model not in GPT_SIZES:
            raise ValueError(f'--gpt_model must be one of {", ".join(GPT_SIZES)}, got {self.gpt_model!r}')

    def check_model(self, model: Any) -> None:
        depth, _, width = GPT_SIZES.get(self.gpt_model, (0, 0, 0))
        if self.gpt_model and (len(model.layers), model.tok_embeddings.embedding_dim) != (depth, width):
            raise ValueError(f'--gpt_model={self.gpt_model} has {depth} blocks of width {width}, {self.ckpt} '
                             f'{len(model.layers)} of {model.tok_embeddings.embedding_dim}: pass the file of '
                             'that size, or leave out --gpt_model')

    def sample_kwargs(self) -> dict[str, Any]:
        return dict(guidance=self.cfg, cfg_interval=self.cfg_interval, temperature=self.temperature,
                    top_k=self.top_k, top_p=self.top_p, image_size=self.img_size or None,
                    image_size_eval=self.image_size_eval or None)


SAMPLE_RECIPES: dict[str, type[SampleRecipe]] = {
    'var': VARSampleRecipe, 'flexvar': FlexVARSampleRecipe, 'flowar': FlowARSampleRecipe,
    'npp': NPPSampleRecipe}

# Settings of published figures. README and paper of VAR differ; the paper's FIDs are of its later versions.
_README = dict(num_images=50_000, cfg=1.5, top_k=900, top_p=0.96, more_smooth=False, source='README of VAR')
_PAPER = dict(num_images=50_000, cfg=2., top_k=600, top_p=0., more_smooth=False,
              source='arXiv 2404.02905, table 3; it names no top-p')
_SIZES = ('d16', 'd20', 'd24', 'd30')


def _files(size: str) -> dict[str, str]:
    return dict(ckpt=f'var_{size}.pth', vae_ckpt='vae_ch160v4096z32.pth')


_FLEXVAR = dict(num_images=50_000, cfg=2.5, top_k=900, top_p=0.95, maxpn=16,  # with the sides of training
                source='README of FlexVAR, 256 px')
_13_STEPS = dict(infer_patch_nums='1_2_3_4_5_6_7_8_9_10_12_14_16', source='README of FlexVAR, 13 steps')
_512 = dict(infer_patch_nums='1_2_3_4_5_6_7_8_9_10_12_14_16_23_32', cfg=3.,
            source='README of FlexVAR, 512 px zero-shot')

SAMPLE_PRESETS: dict[str, dict[str, dict[str, Any]]] = {'var': {
    'fid': _README, 'paper': _PAPER,
    'no_cfg': _PAPER | dict(cfg=0., source='arXiv 2404.02905, table 3, row without guidance'),
    **{f'var_{size}': _README | _files(size) for size in _SIZES},
    **{f'var_{size}_paper': _PAPER | _files(size) for size in _SIZES},
    'var_d36_512': _README | _files('d36'),
    # candidates for evaluate.py reject: the authors publish neither ratio nor classifier
    'var_d30_re': _README | _files('d30') | dict(num_images=100_000,
                                                 source='README of VAR; ratio 2 is ours, none is published'),
}, 'flexvar': {
    'fid': _FLEXVAR, 'steps_13': _FLEXVAR | _13_STEPS, '512': _FLEXVAR | _512,
    **{f'flexvar_d{depth}': _FLEXVAR | dict(depth=depth, ckpt=f'FlexVARd{depth}-epo{last_epoch}.pth',
                                            vae_ckpt='FlexVAE.pth')
       for depth, last_epoch in ((16, 179), (20, 249), (24, 349))},
}, 'flowar': {
    'flowar_s': dict(num_images=50_000, num_step=25, cfg=4.3, guidance=0.9, source='README of FlowAR, S'),
    'flowar_l': dict(num_images=50_000, num_step=25, cfg=2.4, guidance=0.9, source='README of FlowAR, L'),
    'flowar_h': dict(num_images=50_000, num_step=50, cfg=2.4, guidance=0.7, source='README of FlowAR, H'),
}, 'npp': {
    f'npp_{size}': dict(gpt_model=f'GPT-{size.upper()}', num_images=50_000, cfg=cfg, img_size=256,
                        source=f'README of NPP, {size.upper()}')
    for size, cfg in (('b', 2.), ('l', 1.75), ('xl', 1.7), ('xxl', 1.65))
}}
