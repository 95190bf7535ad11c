"""Learning rate and weight decay as pure functions of the step, and the parameter groups they act on."""
import math
from collections.abc import Iterable

import torch
from torch import nn


def lr_ratio(schedule: str, step: int, warmup: int, total: int, start: float, end: float) -> float:
    """The learning rate at a step as a fraction of its peak.

    Args:
        schedule: cos; lin, lin0 (flat for 15 or 5 %, then linear); lin00 (linear at once); lin<T> (gently
            falling until the fraction T of the steps, then steeper); exp; flat or constant; flat<T> (constant
            until the fraction T, then as cos); cosine (as cos, but reaching `end` one step after the last);
            tail<T> (constant, then linear over the last fraction T of all steps, reaching `end` one step
            after the last).
        step: in micro-steps, as are the next two.
        warmup: steps in which the rate rises linearly from `start` to its peak.
        total: all steps, those of the warm-up included.
        start: fraction at the first step.
        end: fraction at the last step.
    Raises:
        NotImplementedError: the schedule is none of these.
    """
    if step < warmup:
        return start + (1 - start) * step / warmup

    # p runs from 0 after the warm-up to 1 at the last step, or one step after it.
    end_step = total if schedule == 'cosine' else total - 1
    p = (step - warmup) / max(end_step - warmup, 1)
    rest = 1 - p
    if schedule in ('cos', 'cosine'):
        return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * p))
    if schedule in ('lin', 'lin0'):
        flat = 0.15 if schedule == 'lin' else 0.05
        if p < flat:
            return 1.
        return end + (1 - end) * rest / (1 - flat)
    if schedule == 'lin00':
        return end + (1 - end) * rest
    if schedule == 'exp':
        flat = 0.15
        if p < flat:
            return 1.
        return math.exp((p - flat) / (1 - flat) * math.log(end))
    if schedule == 'constant':
        return 1.
    if schedule.startswith('tail'):
        tail = float(schedule[4:]) * total
        if not tail:
            return 1.
        return end + (1 - end) * min(1., (total - step) / tail)
    if schedule.startswith('flat'):
        knee = float(schedule[4:] or 1)
        if p < knee or knee == 1:
            return 1.
        return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * (p - knee) / (1 - knee)))
    if schedule.startswith('lin'):
        knee = float(schedule[3:])
        middle = (1 + end + (1 - end) * (1 - knee)) / 2
        if p < knee:
            return 1 + (middle - 1) * p / knee
        return end + (middle - end) * rest / max(1 - knee, 1e-9)
    raise NotImplementedError('schedule must be cos, lin, lin0, lin00, lin<number>, exp, flat or '
                              f'flat<share>, got {schedule!r}')


def lr_wd_annealing(sche_type: str, optimizer: torch.optim.Optimizer, peak_lr: float, wd: float,
                    wd_end: float, cur_it: int, wp_it: float, max_it: int, wp0: float = 0.005,
                    wpe: float = 0.001) -> tuple[float, float, float, float]:
    """Set learning rate and weight decay of every group for a micro-step.

    Args:
        sche_type: schedule of the rate, see `lr_ratio`.
        optimizer: its groups may have factors `lr_sc` and `wd_sc`.
        peak_lr: highest learning rate.
        wd: weight decay at the first step.
        wd_end: weight decay at the last step; it changes between them like half a cosine.
        cur_it: the micro-step, from 0 on.
        wp_it: micro-steps of the warm-up.
        max_it: micro-steps of the training.
        wp0: fraction of the peak at the first step.
        wpe: fraction of the peak at the last step.
    Returns:
        (lowest lr, highest lr, lowest wd, highest wd); the lowest wd is that of groups with weight decay, or
        -1 if there are none.
    """
    lr = peak_lr * lr_ratio(sche_type.strip(), cur_it, round(wp_it), max_it, wp0, wpe)
    decay = wd_end + (wd - wd_end) * (0.5 + 0.5 * math.cos(math.pi * cur_it / max(max_it - 1, 1)))
    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('lr_sc', 1)
        group['weight_decay'] = decay * group.get('wd_sc', 1)
    lrs = [group['lr'] for group in optimizer.param_groups]
    decays = [group['weight_decay'] for group in optimizer.param_groups]
    lowest_decay = min((decay for decay in decays if decay > 0), default=-1.)
    return min(lrs), max(lrs), lowest_decay, max(decays)


def filter_params(model: nn.Module,
                  nowd_keys: Iterable[str] = ()) -> tuple[list[str], list[nn.Parameter], list[dict]]:
    """Trainable parameters in two groups: with weight decay, and without it.

    Vectors and biases have no weight decay, nor have parameters that are named in `nowd_keys`.

    Args:
        nowd_keys: parts of names.
    Returns:
        (names, parameters, groups); a group has the entries params, wd_sc (0 or 1) and lr_sc (1). Groups are
        in the order of their first parameters.
    """
    groups: dict[float, dict] = {}
    names = []
    params = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        is_named = any(key in name for key in nowd_keys)
        has_decay = param.ndim > 1 and not name.endswith('bias') and not is_named
        factor = 1. if has_decay else 0.
        group = groups.setdefault(factor, dict(params=[], wd_sc=factor, lr_sc=1.))
        group['params'].append(param)
        names.append(name)
        params.append(param)
    return names, params, list(groups.values())
