"""Trained models by one call: `load` reads weights of any kind, and a `Pipeline` draws images with them.

    from pipeline import load

    pipe = load('var_d16')                           # or a checkpoint, a folder, 'owner/name' of the hub
    images = pipe([207, 88], num_images=4, seed=0)   # a list of PIL images

`models` knows no files and `utils` knows no models, so what needs both stands here. Read it from `load`:
files are read, models are built, and a `Pipeline` holds what was built.
Letters: N images of a call, B images of a batch.
"""
import dataclasses
import difflib
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import dist
from configs import CONFIGS, SAMPLE_CONFIGS, SAMPLE_PRESETS
from configs.options import check_weights
from models import (
    FAMILIES,
    ARModel,
    Tokenizer,
    Trainable,
    build_generator,
    build_tokenizer,
    differing_parameters,
    families_of,
    name_of,
)
from models.loading import read_kwargs
from models.noise import ImageNoise
from utils.amp_sc import DTYPES, autocast
from utils.checkpoint import kind_of_weights, load_on_all_ranks, model_weights, tokenizer_weights
from utils.hub import PUBLISHED, locate, upload
from utils.log import progress_bar
from utils.model_folder import (
    CARD,
    MODEL,
    TOKENIZER,
    check_digest,
    model_card,
    read_model_config,
    write_model_folder,
)

logger = logging.getLogger(__name__)

State = dict[str, torch.Tensor]
OUTPUTS = ('pil', 'pt', 'np')


# ---------------------------------------------------------------------------------------------- loading
def load(
    source: str | Path,
    weights: str = 'ema',
    device: torch.device | str = 'cpu',
    dtype: torch.dtype | None = None,
    *,
    model: str = '',
    tokenizer: 'str | Path | Tokenizer | Pretrained | None' = None,
    revision: str = '',
) -> 'Pretrained':
    """A trained model from weights of any kind; in a program of several processes, all of them call it.

    Args:
        source: a checkpoint of train.py or of the published code, a released file, a folder that
            `save_pretrained` has written, the name of a published file or its short name ('var_d16'), a
            repository of the hub ('owner/name'), or a file in one ('owner/name:FILE').
        weights: 'ema' for averaged weights, where a file has them, 'raw' for those of the last step, or one
            of several averages, such as 'ema_0.9999'.
        device: where the model is built.
        dtype: of the generator's weights, and of the products of sampling; None is float32, whatever the
            file has. Buffers and the tokenizer stay in float32.
        model: the family, where the file does not tell it: a released FlexVAE has the keys of a VQ-16. With
            the family of a tokenizer, the tokenizer in the checkpoint of a generator is loaded.
        tokenizer: of a generator: a file, a folder, a name, or the tokenizer itself. None takes the one
            inside the file, or else the published one that belongs to a published generator.
        revision: branch, tag or commit of a repository of the hub; empty is the newest one.
    Returns:
        A `Pipeline` of a generator; a `Pretrained` of a tokenizer. `.model` is what was built, in eval mode.
    Raises:
        ValueError: there is no such file, it cannot be used, or parts do not belong together; on all ranks.
    """
    check_weights(weights, 'weights')
    if dtype not in (None, *DTYPES):
        raise ValueError(f'dtype must be torch.float32, float16 or bfloat16, got {dtype}: pass one of them')
    if isinstance(tokenizer, Pretrained):
        tokenizer = tokenizer.model
    contents = read(source, model, tokenizer, weights, revision)
    built = build(contents, device)
    if dtype is not None:
        _cast(built, dtype)
    about = dict(classes=contents.classes, weights=contents.weights, training=contents.training,
                 digests=contents.digests)
    if isinstance(built, Tokenizer):
        return Pretrained(built, **about)
    return Pipeline(built, **about, sampling=contents.sampling)


def _cast(model: Trainable, dtype: torch.dtype) -> None:
    """Give the parameters of a generator another type."""
    if isinstance(model, Tokenizer):
        if dtype != torch.float32:
            raise ValueError('a tokenizer stays in float32, since its codes would change, got '
                             f'dtype={dtype}: leave it out')
        return
    for parameter in model.parameters():
        # Buffers hold masks and tables of positions, whose numbers must stay exact.
        parameter.data = parameter.data.to(dtype)


class Part(NamedTuple):
    """One model of a file, before it is built."""
    family: str
    state: State
    config: dict[str, Any]  # what the weights do not tell, see `config_state`
    source: str             # the file, for messages


class Contents(NamedTuple):
    """What files hold of a model, before it is built."""
    generator: Part | None       # None: a tokenizer alone
    tokenizer: Part | Tokenizer
    weights: str                 # kind of the weights that were found, such as 'ema' or 'raw'
    digests: dict[str, str]      # SHA-256 of the files that were read, by the flag of sample.py
    classes: tuple[str, ...]     # names of all classes, or () if they are unknown
    sampling: dict[str, Any]     # options of `sample` that suit the generator
    training: dict[str, Any]     # where the weights come from, for config.json and the card
    trained_with: State = {}     # weights of the tokenizer in the generator's own file, if it has one


def read(source: str | Path, model: str = '', tokenizer: str | Path | Tokenizer | None = None,
         weights: str = 'ema', revision: str = '') -> Contents:
    """What `load` builds a model of; every rank calls it, and all of them read the same files.

    Args:
        source, model, tokenizer, weights, revision: see `load`.
    Raises:
        ValueError: see `load`.
    """
    if model and model not in FAMILIES:
        raise ValueError(f'expected a family, one of {", ".join(FAMILIES)}, got model={model!r}: pass one')
    # One process of a node downloads; the other ones then find the file.
    path = dist.first_of_node_first(partial(locate, source, revision))
    contents = _read_folder(path, model) if path.is_dir() else _read_file(path, model, weights)
    if contents.generator is None:
        if tokenizer is not None:
            raise ValueError(f'{str(path)!r} holds a tokenizer, which needs no other one: '
                             'leave out the tokenizer')
        return contents
    return _with_tokenizer(contents, path, tokenizer)


def build(contents: Contents, device: torch.device | str) -> Trainable:
    """The model of some files in eval mode: a generator with its tokenizer, or a tokenizer.

    Raises:
        ValueError: the weights are of another model, or generator and tokenizer do not belong together.
    """
    generator, tokenizer = contents.generator, contents.tokenizer
    if generator is None:
        cls = FAMILIES[tokenizer.family].model
        _require_pyramid(tokenizer)
        return build_tokenizer(cls, tokenizer.state, tokenizer.source, device, **tokenizer.config)
    if isinstance(tokenizer, Tokenizer):
        tokenizer = Part('', tokenizer.to(device), {}, 'the tokenizer')
    built = build_generator(generator.family, generator.state, tokenizer.state, generator.source, device,
                            tokenizer.config, generator.config)
    check_same_codes(built, contents.trained_with, generator.source, tokenizer.source)
    return built


def check_same_codes(generator: ARModel, trained_with: State, source: str, tokenizer_source: str) -> None:
    """Make sure that the generator predicts codes, or latents, of the tokenizer that it was trained with.

    A different decoder is fine: the decoder may have been trained further for the same codes.

    Args:
        trained_with: weights of the tokenizer in the generator's own file; {} if that file has none.
        source: the file of the generator, for the error.
        tokenizer_source: the file of the tokenizer, for the error.
    Raises:
        ValueError: the encoder or the codebook differs.
    """
    for name in differing_parameters(generator.tokenizer, trained_with):
        if name.startswith(('encoder.', 'quant_conv.', 'quantize.')):
            raise ValueError(f'{source!r} was trained on the codes of another tokenizer than '
                             f'{tokenizer_source!r} ({name} differs): pass the tokenizer of its training, or '
                             '--vae_ckpt= without a value for the one inside that file')


def _require_pyramid(tokenizer: Part) -> None:
    """A VQVAE of a released file does not tell the sides of its code maps, but how many there are."""
    counters = tokenizer.state.get('quantize.ema_vocab_hit_SV')
    published = 10
    if counters is not None and 'v_patch_nums' not in tokenizer.config and len(counters) != published:
        raise ValueError(f'{tokenizer.source!r} does not tell the sides of its {len(counters)} code maps: '
                         'pass the folder or a checkpoint of its training')


# ---------------------------------------------------------------------------------------------- files
def _read_file(path: Path, model: str, weights: str) -> Contents:
    """The contents of a file of weights, of which a generator lacks its tokenizer still."""
    checkpoint, digest = load_on_all_ranks(path)
    family = _family_in(checkpoint, path, model)
    trainer = checkpoint.get('trainer', {})
    is_generator = FAMILIES[family].tokenizer is not None
    about = dict(
        weights=kind_of_weights(checkpoint, weights, is_generator),
        digests=dict(ckpt=digest),
        training=training_of(checkpoint) | dict(file=path.name, file_sha256=digest),
    )
    if not is_generator:
        state, config = tokenizer_weights(checkpoint, weights)
        return Contents(None, Part(family, state, config, str(path)), classes=(), sampling={}, **about)

    config = trainer.get('config')
    state = model_weights(checkpoint, weights)
    read_kwargs(FAMILIES[family].model, state, str(path))  # refuses weights of another family
    generator = Part(family, state, config if isinstance(config, dict) else {}, str(path))

    # The tokenizer is the one that training used, which `weights` says nothing about.
    own_state, own_config = tokenizer_weights(checkpoint)
    tokenizer = Part(_tokenizer_family(family), own_state, trainer.get('vae_config', {}) | own_config,
                     str(path))
    published = PUBLISHED.get(path.name)
    preset = published.preset if published and published.family == family else ''
    return Contents(
        generator,
        tokenizer,
        classes=class_names(checkpoint),
        sampling=default_sampling(family, preset),
        trained_with=trainer.get('vae_local', {}),
        **about,
    )


def _family_in(checkpoint: dict[str, Any], path: Path, model: str) -> str:
    """The family of a file: as the caller, the file, its published name, or the keys of its weights say."""
    args = checkpoint.get('args')
    trained = args.get('model') if isinstance(args, dict) else None
    if model or trained in FAMILIES:
        return model or trained
    if path.name in PUBLISHED:
        return PUBLISHED[path.name].family
    generators = [name for name, family in FAMILIES.items() if family.tokenizer]
    tokenizers = [name for name in FAMILIES if name not in generators]
    found = (families_of(model_weights(checkpoint), generators)
             or families_of(tokenizer_weights(checkpoint)[0], tokenizers))
    if not found:
        raise ValueError(f'{str(path)!r} holds weights of no known model ({", ".join(FAMILIES)}): '
                         'pass a checkpoint of one of them')
    others = [name for name in found if FAMILIES[name].model is not FAMILIES[found[0]].model]
    if others and found[0] in tokenizers:
        logger.warning('%r is taken for a %s: pass model=%r if it is one, whose keys are the same', str(path),
                       found[0], others[0])
    return found[0]


def _tokenizer_family(family: str) -> str:
    """The name of the tokenizer that the generators of a family are built on."""
    cls = FAMILIES[family].tokenizer
    return next(name for name, one in FAMILIES.items() if one.model is cls)


def _with_tokenizer(contents: Contents, path: Path,
                    tokenizer: str | Path | Tokenizer | None) -> Contents:
    """The contents of a generator's file, with the tokenizer that is given, or else found."""
    if isinstance(tokenizer, Tokenizer):
        return contents._replace(tokenizer=tokenizer)
    own = contents.tokenizer
    published = PUBLISHED.get(path.name)
    if tokenizer is None:
        if families_of(own.state, [own.family]):
            return contents
        if not (published and published.tokenizer):
            raise ValueError(f'{str(path)!r} holds a generator without its tokenizer: pass the file of the '
                             f'{own.family} that it was trained with')
        beside = path.with_name(published.tokenizer)
        tokenizer = beside if beside.is_file() else published.tokenizer

    given_path = dist.first_of_node_first(partial(locate, tokenizer, ''))
    if given_path.is_dir():
        given = _read_folder(given_path, own.family)
        return contents._replace(tokenizer=given.tokenizer,
                                 digests=contents.digests | dict(vae_ckpt=given.digests['vae_ckpt']))
    content, digest = load_on_all_ranks(given_path)
    state, config = tokenizer_weights(content)
    # A bare file of its weights does not hold its settings, so the generator's checkpoint fills them in.
    inside = contents.tokenizer.config if contents.trained_with else {}
    part = Part(own.family, state, inside | config, str(given_path))
    return contents._replace(tokenizer=part, digests=contents.digests | dict(vae_ckpt=digest))


def class_names(checkpoint: dict[str, Any]) -> tuple[str, ...]:
    """The names of all classes in the order of their ids; () if the checkpoint does not have them."""
    names = checkpoint.get('classes')
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def training_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of ours says of its training; {} for other files.

    Settings that may differ between two starts, and paths, are left out: they say nothing of the weights.
    """
    training = {name: checkpoint[name] for name in ('git_commit', 'versions', 'epoch', 'iter', 'neon')
                if name in checkpoint and 'git_commit' in checkpoint}
    args = checkpoint.get('args')
    settings = args if isinstance(args, dict) else {}
    config = CONFIGS.get(settings.get('model'))
    if config is None:
        return training
    kept = [f.name for f in dataclasses.fields(config) if not (f.metadata['free'] or f.metadata['path'])]
    return training | dict(settings={name: settings[name] for name in kept if name in settings})


# ---------------------------------------------------------------------------------------------- folders
def _read_folder(folder: Path, model: str) -> Contents:
    """The contents of a folder that `save_pretrained` has written, or of its tokenizer alone.

    Args:
        model: the family that is asked for; '' takes what is there.
    """
    config = read_model_config(folder)
    family = config['model']
    tokenizer_family = config['tokenizer'].get('model')
    for name in (family, tokenizer_family):
        if name not in (None, *FAMILIES):
            raise ValueError(f'{str(folder)!r} holds a model of the family {name!r}, known are '
                             f'{", ".join(FAMILIES)}: take the version of the code that wrote it')
    if model and FAMILIES[model].model not in _classes(family, tokenizer_family):
        raise ValueError(f'{str(folder)!r} holds a {family or tokenizer_family}, got {model!r}: pass another '
                         'folder, or leave out the family')

    state, digest = _read_weights(folder / TOKENIZER, config)
    tokenizer = Part(tokenizer_family, state, config['tokenizer'].get('config', {}), str(folder))
    about = dict(weights=config['weights'], training=config['training'])
    if family is None or (model and FAMILIES[model].tokenizer is None):
        return Contents(None, tokenizer, digests=dict(vae_ckpt=digest), classes=(), sampling={}, **about)
    generator_state, generator_digest = _read_weights(folder / MODEL, config)
    generator = Part(family, generator_state, config['config'], str(folder))
    digests = dict(ckpt=generator_digest, vae_ckpt=digest)
    return Contents(generator, tokenizer, digests=digests, classes=tuple(config['classes']),
                    sampling=default_sampling(family) | config['sampling'], **about)


def _classes(*families: str | None) -> list[type[Trainable]]:
    return [FAMILIES[name].model for name in families if name is not None]


def _read_weights(path: Path, config: dict[str, Any]) -> tuple[State, str]:
    """Flat weights of a file of a folder, and their digest, which must be that of config.json."""
    state, digest = load_on_all_ranks(path)
    check_digest(path, digest, config)
    return state, digest


# ---------------------------------------------------------------------------------------------- saving
class Pretrained:
    """A trained model with what is known of it: it saves itself as a folder, and uploads it to the hub.

    Args:
        model: a generator with its tokenizer, or a tokenizer.
        classes: names of all classes, or () if they are unknown.
        weights: 'ema' if they are averaged, else 'raw'.
        sampling: options of `sample` that suit a generator; None takes the defaults of its family.
        training: where the weights come from, for config.json and the card.
        digests: SHA-256 of the files of weights, by the flag of sample.py that names them.
    Raises:
        ValueError: the model is of no family, or there are names of other than all classes.
    """

    def __init__(self, model: Trainable, *, classes: Sequence[str] = (), weights: str = 'raw',
                 sampling: dict[str, Any] | None = None, training: dict[str, Any] | None = None,
                 digests: dict[str, str] | None = None):
        self.model = model
        self.family = name_of(model)
        self.classes = tuple(classes)
        self.weights = weights
        self.sampling = sampling or {}
        self.training = training or {}
        self.digests = digests or {}

    @staticmethod
    def from_pretrained(source: str | Path, revision: str = '', **kwargs: Any) -> 'Pretrained':
        """`load`, under the name that the field has for it."""
        return load(source, revision=revision, **kwargs)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a generator, or the model itself if it is one."""
        return self.model if isinstance(self.model, Tokenizer) else self.model.tokenizer

    def to(self, device: torch.device | str) -> 'Pretrained':
        """Move the model and its tokenizer to a device; this object is returned."""
        self.model.to(device)
        self.tokenizer.to(device)
        return self

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folder that `load` reads; one process calls it.

        Args:
            dtype: of the generator's weights in the file; None keeps what they are.
        Raises:
            OSError: the disk is full or not writable.
            ValueError: the folder has a config.json of another program.
        """
        self._write(str(folder), dtype, Path(folder))

    def push_to_hub(self, repo: str, dtype: torch.dtype | None = None, private: bool = False) -> str:
        """Upload the folder to a repository of the hub, whose card stays if it has one.

        Args:
            repo: 'owner/name'; it is made if it does not exist.
            dtype: see `save_pretrained`.
            private: of a repository that is made.
        Returns:
            The address of the commit.
        Raises:
            ValueError: the hub refuses, or it cannot be reached.
        """
        write = partial(self._write, repo, dtype)
        return upload(repo, write, private, keep=(CARD,), message=f'Upload {self.family} weights')

    def _write(self, name: str, dtype: torch.dtype | None, folder: Path) -> None:
        config = self._config()
        weights = {TOKENIZER: self.tokenizer.state_dict()}
        if self.model is not self.tokenizer:
            weights[MODEL] = self._weights_in(dtype)
        card = model_card(name, config, self.facts())
        write_model_folder(folder, config, weights, card)

    def _weights_in(self, dtype: torch.dtype | None) -> State:
        """The generator's weights with its parameters in this type."""
        state = self.model.state_dict()
        if dtype is not None:
            state |= {name: state[name].to(dtype) for name, _ in self.model.named_parameters()}
        return state

    def _config(self) -> dict[str, Any]:
        """The content of config.json, but for the entries that `write_model_folder` adds."""
        tokenizer = self.tokenizer
        of_tokenizer = dict(model=name_of(tokenizer), config=tokenizer.config_state(1.))
        config = dict(model=None, config={}, tokenizer=of_tokenizer)
        if tokenizer is not self.model:
            config.update(model=self.family, config=self.model.config_state(1.),
                          num_classes=self.model.num_classes)
        return config | dict(classes=list(self.classes), weights=self.weights, sampling=self.sampling,
                             training=self.training)

    def facts(self) -> dict[str, str]:
        """Sizes of the model and its tokenizer, by name, as the card tells them."""
        facts = {}
        if self.model is not self.tokenizer:
            facts = {'generator': _size_of(self.model), 'classes': str(self.model.num_classes)}
        return facts | {'tokenizer': f'{name_of(self.tokenizer)}, {_size_of(self.tokenizer)}'}


def _size_of(model: Trainable) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return f'{count / 1e6:.1f} M parameters'


# ---------------------------------------------------------------------------------------------- sampling
def default_sampling(family: str, preset: str = '') -> dict[str, Any]:
    """Options of `sample` that sample.py has for a family, or for one of its presets."""
    if family not in SAMPLE_CONFIGS:
        return {}
    presets = {'': {}} | SAMPLE_PRESETS[family]
    values = dict(model=family, ckpt='in memory') | presets[preset]
    return SAMPLE_CONFIGS[family](**values).sample_kwargs()


class Pipeline(Pretrained):
    """A generator that draws images by a call; see `Pretrained` for its arguments.

    Image i of a call is a function of (seed, i) and the settings: it is image i of a job of sample.py with
    the same settings, to the last bit where the batches are cut alike, else but for rounding.
    """

    model: ARModel

    def __init__(self, model: ARModel, *, classes: Sequence[str] = (),
                 sampling: dict[str, Any] | None = None, **about: Any):
        # Names of another data set would point to the wrong classes.
        if len(classes) != model.num_classes:
            classes = ()
        super().__init__(model, classes=classes, **about)
        defaults = default_sampling(self.family)
        self.sampling = defaults | self._checked(sampling or {}, defaults)

    def __call__(
        self,
        labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        num_images: int | None = None,
        *,
        guidance: float | None = None,
        seed: int = 0,
        output: str = 'pil',
        batch_size: int = 64,
        progress: bool = False,
        **options: Any,
    ) -> list[Image.Image] | torch.Tensor | np.ndarray:
        """Draw images.

        Args:
            labels: class ids, or names of classes where the checkpoint knows them; image i has the one at
                place i, and after the last one the first one follows. The id after the last class means no
                class. None takes all classes in turn.
            num_images: how many; None draws one image for each label.
            guidance: scale s of classifier-free guidance, 1 is off; None, like every further option that is
                left out, takes the value in `sampling`.
            seed: the noise of image i is a function of (seed, i).
            output: 'pil' for a list of PIL images, 'np' for uint8 (N, H, W, 3), 'pt' for float32 (N, 3, H, W)
                in [0, 1].
            batch_size: images that are drawn at a time.
            progress: whether a bar shows how far it is.
            options: of the family's `sample`, such as top_k and top_p; `sampling` names them all.
        Returns:
            N images, of the kind that `output` names.
        Raises:
            ValueError: a label is no class, an option is unknown or out of its limits, or pixels are not
                finite.
        """
        if output not in OUTPUTS:
            raise ValueError(f'output must be one of {", ".join(OUTPUTS)}, got {output!r}: pass one of them')
        _require_integer('batch_size', batch_size, 1)
        _require_integer('seed', seed, 0)
        label_N = self.label_ids(labels, num_images)
        if guidance is not None:
            options['guidance'] = guidance
        options = self.sampling | self._checked(options, self.sampling)
        batches = self._batches(label_N, seed, batch_size, progress, options)
        if output == 'pt':
            return torch.cat([images_B3HW.float().cpu() for images_B3HW in batches])
        images_NHW3 = np.concatenate([to_bytes(images_B3HW) for images_B3HW in batches])
        if output == 'np':
            return images_NHW3
        return [Image.fromarray(image_HW3) for image_HW3 in images_NHW3]

    def label_ids(self, labels: Any, num_images: int | None = None) -> list[int]:
        """The class of every image; arguments as for a call.

        Raises:
            ValueError: there are no labels or images, or a label is no class.
        """
        num_classes = self.model.num_classes
        if labels is None:
            labels = range(num_classes)
        if isinstance(labels, torch.Tensor | np.ndarray):
            labels = labels.tolist()
        if isinstance(labels, int | str):
            labels = [labels]
        ids = [self._label_id(label) for label in labels]
        if num_images is None:
            num_images = len(ids) or 1
        _require_integer('num_images', num_images, 1)
        if not ids:
            raise ValueError('expected at least one label, got none: pass class ids, or None for all '
                             'classes')
        return [ids[i % len(ids)] for i in range(num_images)]

    def _label_id(self, label: Any) -> int:
        num_classes = self.model.num_classes
        if isinstance(label, str):
            if not self.classes:
                raise ValueError(f'the weights do not tell the names of the classes, got {label!r}: '
                                 f'pass ids in 0..{num_classes - 1}')
            if label not in self.classes:
                near = difflib.get_close_matches(label, self.classes, n=3, cutoff=0.)
                raise ValueError(f'{label!r} is no class of this model: the nearest ones are '
                                 f'{", ".join(near)}')
            return self.classes.index(label)
        is_integer = isinstance(label, int | np.integer) and not isinstance(label, bool)
        if not is_integer or not 0 <= label <= num_classes:
            raise ValueError(f'labels must be class ids in 0..{num_classes - 1}, or {num_classes} for no '
                             f'class, got {label!r}: correct it')
        return int(label)

    def _batches(self, label_N: list[int], seed: int, batch_size: int, progress: bool,
                 options: dict[str, Any]) -> Iterator[torch.Tensor]:
        """The images, batch by batch, cut as sample.py cuts them."""
        precision = DTYPES.index(next(self.model.parameters()).dtype)
        count = len(label_N)
        with progress_bar(count, self.family) as bar:
            bar.disable |= not progress
            for first in range(0, count, batch_size):
                index_B = range(first, min(first + batch_size, count))
                label_B = label_N[first:index_B.stop]
                yield draw(self.model, seed, index_B, label_B, precision, options)
                bar.update(len(index_B))

    def _checked(self, options: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
        """The same options.

        Raises:
            ValueError: one is unknown, or outside the limits that sample.py has for it.
        """
        for name, value in options.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.)
                raise ValueError(f'unknown option {name!r} of {self.family}: the nearest one is '
                                 f'{", ".join(near)}; there are {", ".join(known)}')
            if isinstance(known[name], int | float) and not _is_finite_number(value):
                raise ValueError(f'{name} must be a finite number, got {value!r}: pass one')
            if isinstance(known[name], int) and not isinstance(value, int):
                raise ValueError(f'{name} must be an integer, got {value!r}: pass one')
        # What sample.py calls by another name or understands otherwise, the model checks itself.
        cls = SAMPLE_CONFIGS[self.family]
        same = {f.name for f in dataclasses.fields(cls)} - {'guidance'}
        numbers = {name: value for name, value in options.items()
                   if name in same and _is_finite_number(value)}
        cls(model=self.family, ckpt='in memory', **numbers)
        return options


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _require_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}: pass one')


@torch.inference_mode()
def draw(model: ARModel, seed: int, index_B: range, label_B: Sequence[int], precision: int,
         options: dict[str, Any]) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] of these numbers in the job of a seed.

    Args:
        label_B: their classes; there may be more than images, which fill up the batch and are not returned.
        precision: of products, 0 float32, 1 float16, 2 bfloat16.
        options: of the model's `sample`.
    Raises:
        ValueError: an image has pixels that are not finite.
    """
    # The noise of an image is a function of (seed, index), so it is the same in any batch on any rank.
    noise = ImageNoise(seed, range(index_B.start, index_B.start + len(label_B)))
    with autocast(model.device.type, precision):
        images_B3HW = model.sample(label_B, rng=noise, **options)[:len(index_B)]

    # Rounding to 8 bits would turn nan into some colour.
    is_finite_B = images_B3HW.isfinite().flatten(1).all(1)
    if not is_finite_B.all():
        bad = index_B[is_finite_B.int().argmin().item()]
        raise ValueError(f'expected finite pixels, image {bad} has nan or infinite ones: the weights are '
                         'damaged, or float16 overflows (take float32 or bfloat16, --fp16=0 or 2)')
    return images_B3HW


def to_bytes(images_B3HW: torch.Tensor) -> np.ndarray:
    """Images in [0, 1] as uint8 (B, H, W, 3), rounded as torchvision's save_image does it."""
    images_u8 = images_B3HW.float().mul(255).add(0.5).floor().clamp(0, 255).byte()
    images_BHW3 = images_u8.permute(0, 2, 3, 1).contiguous()
    return images_BHW3.cpu().numpy()
