"""How a training of a generator begins with the weights of another one, and what of it is not trained.

Weights are taken over as a whole, but for what the data of this training decide: the rows of the class
embedding follow the names of the classes, positions the sides of the code maps. `--reset` names parts that
begin anew, `--freeze` parts that stay as they are.
"""
import fnmatch
import logging
from collections.abc import Collection
from typing import Any

import torch

import dist
from models import ARModel, read_kwargs
from training.resume import first_difference
from utils.checkpoint import model_weights

logger = logging.getLogger(__name__)
NUM_NAMED = 3  # parameters that a line of the log names


def take_over(model: ARModel, checkpoint: dict[str, Any], source: str, classes: list[str] | None,
              reset: str) -> None:
    """Begin with the weights of a file, which may be of other classes and of another pyramid.

    Args:
        model: freshly initialised.
        checkpoint: the content of the file, in any layout that `model_weights` knows.
        source: the file, for messages.
        classes: names of the classes of this training, by label; None takes the rows of the class embedding
            as they are.
        reset: parts that stay as initialised, see `parameters_of`; '' for none.
    Raises:
        ValueError: the weights are of another model, or `reset` names no part of it.
    """
    state = model_weights(checkpoint)
    read_kwargs(type(model), state, source)  # weights of another family are refused as such
    fresh = model.state_dict()
    anew = parameters_of(model, reset, 'reset') if reset else []

    # Positions of another pyramid are resized, scale by scale.
    fitted, about_positions = model.fit_positions(state)
    learnt = {name for name, _ in model.named_parameters() if name in fitted}
    if learnt - set(anew):
        log_on_master('%s: %s', source, about_positions)
    state = state | fitted

    # The same class may have another number here, so rows of the class embedding are matched by name.
    table = model.class_table
    if table not in anew:
        saved_classes = checkpoint.get('classes')
        if saved_classes and classes and list(saved_classes) != classes:
            state = rows_by_class(state, table, list(saved_classes), classes, fresh[table], source)
        check_num_classes(len(state[table]) - 1, model.num_classes, source)

    # What begins anew takes the place of the weights in the file, whatever their shapes are.
    if anew:
        log_on_master('%s: %s stay as initialised', source, in_words(anew))
    model.warm_start(state | {name: fresh[name] for name in anew}, source)


def check_same_classes(checkpoint: dict[str, Any], source: str, classes: list[str]) -> None:
    """Make sure that labels which a generator has drawn for mean its own classes, in its own order.

    Args:
        checkpoint: the content of its file.
        source: the file, for the message.
        classes: names of the classes of this training, by label.
    Raises:
        ValueError: the file names other classes, or another order.
    """
    saved = checkpoint.get('classes')
    # Published checkpoints do not name their classes.
    if saved and list(saved) != list(classes):
        raise ValueError(f'{source!r} has {first_difference(saved, classes)}: images that it has drawn are '
                         'labelled by its classes, so pass the data set that it was trained on as --val_path')


def freeze(model: ARModel, patterns: str) -> None:
    """Leave parameters out of training: they get no gradient, no optimizer and no average.

    Args:
        patterns: see `parameters_of`.
    Raises:
        ValueError: a pattern matches no parameter, or nothing would be left to train.
    """
    names = parameters_of(model, patterns, 'freeze')
    parameters = dict(model.named_parameters())
    if len(names) == len(parameters):
        raise ValueError(f'--freeze={patterns} matches all {len(names)} parameters: leave some to train')
    for name in names:
        parameters[name].requires_grad_(False)
    num_frozen = sum(parameters[name].numel() for name in names)
    num_weights = sum(parameter.numel() for parameter in parameters.values())
    log_on_master('%s are frozen: %.2fM of %.2fM weights', in_words(names), num_frozen / 1e6,
                  num_weights / 1e6)


# ------------------------------------------------------------------------------ parts of a model
def parameters_of(model: ARModel, patterns: str, flag: str) -> list[str]:
    """Names of the parameters that a flag means, in the order of the model.

    Args:
        patterns: joined by commas; each is the name of a part of the model (see `ARModel.parts`), or a
            pattern of names of parameters, such as blocks.0.* or *.bias.
        flag: for the error.
    Raises:
        ValueError: one matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = set()
    for pattern in patterns.split(','):
        globs = model.parts.get(pattern, (pattern,))
        found = [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
        if not found:
            raise ValueError(f'--{flag} expects {", ".join(model.parts)}, or patterns of names of parameters '
                             f'such as {names[0]}, joined by commas, got {pattern!r}, which matches none of '
                             f'{type(model).__name__}: correct it')
        chosen.update(found)
    return [name for name in names if name in chosen]


def in_words(names: Collection[str]) -> str:
    """'12 parameters (head.weight, head.bias, ...)': how many there are, and the first ones."""
    first = list(names)[:NUM_NAMED]
    if len(names) > NUM_NAMED:
        first.append('...')
    return f'{len(names)} parameters ({", ".join(first)})'


# ------------------------------------------------------------------------------ classes
def rows_by_class(state: dict[str, torch.Tensor], key: str, theirs: list[str], ours: list[str],
                  fresh: torch.Tensor, source: str) -> dict[str, torch.Tensor]:
    """Weights whose class embedding has the rows of the same classes, by name, in the order of this training.

    Args:
        state: flat weights.
        key: name of the embedding in them, (classes + 1, width); its last row is the null class.
        theirs: names of the classes of the weights, by row.
        ours: names of the classes of this training, by label.
        fresh: the embedding of this training as initialised, for classes that the weights do not know.
        source: where the weights come from, for the log.
    Raises:
        ValueError: the weights know none of these classes.
    """
    table = state[key]
    if len(table) != len(theirs) + 1:
        raise ValueError(f'{source} names {len(theirs)} classes, but has rows for {len(table) - 1}: '
                         'the file is damaged or was edited')
    known = {name: row for row, name in enumerate(theirs)}
    shared = [name for name in ours if name in known]
    if not shared:
        raise ValueError(f'{source} knows none of these {len(ours)} classes (it has '
                         f'{", ".join(map(ascii, theirs[:3]))}, ...; here {", ".join(map(ascii, ours[:3]))}, '
                         '...): name the class folders as there, or pass --reset=class_emb to learn the '
                         'class embedding anew')

    # Classes that the weights know take their rows, new classes stay as initialised.
    rows = fresh.detach().to('cpu', table.dtype, copy=True)
    for row, name in enumerate(ours):
        if name in known:
            rows[row] = table[known[name]]
    rows[len(ours)] = table[len(theirs)]
    new = [ascii(name) for name in ours if name not in known]
    about_new = f'new: {", ".join(new[:10])}' if new else 'none is new'
    log_on_master('%s: the rows of %d of %d classes follow their names; %s', source, len(shared), len(ours),
                  about_new)
    return state | {key: rows}


def check_num_classes(theirs: int, ours: int, source: str) -> None:
    """Make sure that there is a row for every class of this training.

    Raises:
        ValueError: the weights have other classes, and do not tell which.
    """
    if theirs != ours:
        raise ValueError(f'{source} has {theirs} classes, these data have {ours}, and the file does not name '
                         'its classes: pass --reset=class_emb to learn the class embedding anew')


def log_on_master(*message: Any) -> None:
    """A line of the log, from the first rank alone."""
    if dist.is_master():
        logger.info(*message)
