"""Learning rate and weight decay as pure functions of the step, and the parameter groups they act on."""
import math
from collections.abc import Iterable

import torch
from torch import nn


def lr_ratio(schedule: str, step: int, warmup: int, total: int, start: float, end: float) -> float:
    """Share of the peak learning rate at a step.

    Args:
        schedule: cos; lin, lin0 (flat for 15 or 5 %, then linear); lin00 (linear at once); lin<T> (gently
            falling until share T, then steeper); exp; flat or constant; flat<T> (constant until share T, then
            as cos); cosine (as cos, but reaching `end` one step after the last); tail<T> (constant, then
            linear over the last share T of all steps, reaching `end` one step after the last).
        step, warmup, total: in micro-steps. start, end: ratio at the first and last step.
    Raises:
        NotImplementedError: unknown schedule.
    """
    if step < warmup:
        return start + (1 - start) * step / warmup
    p = (step - warmup) / max(total - (schedule != 'cosine') - warmup, 1)
    rest = 1 - p
    if schedule in ('cos', 'cosine'):
        return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * p))
    if schedule in ('lin', 'lin0'):
        flat = 0.15 if schedule == 'lin' else 0.05
        return 1. if p < flat else end + (1 - end) * rest / (1 - flat)
    if schedule == 'lin00':
        return end + (1 - end) * rest
    if schedule == 'exp':
        flat = 0.15
        return 1. if p < flat else math.exp((p - flat) / (1 - flat) * math.log(end))
    if schedule == 'constant':
        return 1.
    if schedule.startswith('tail'):
        tail = float(schedule[4:]) * total
        return end + (1 - end) * min(1., (total - step) / tail) if tail else 1.
    if schedule.startswith('flat'):
        knee = float(schedule[4:] or 1)
        return 1. if p < knee or knee == 1 else \
            end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * (p - knee) / (1 - knee)))
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
    """Set learning rate and weight decay of every group for micro-step `cur_it`.

    Returns:
        (lowest lr, highest lr, lowest wd, highest wd); the lowest wd is of decayed groups, -1 without any.
    """
    lr = peak_lr * lr_ratio(sche_type.strip(), cur_it, round(wp_it), max_it, wp0, wpe)
    decay = wd_end + (wd - wd_end) * (0.5 + 0.5 * math.cos(math.pi * cur_it / max(max_it - 1, 1)))
    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('lr_sc', 1)
        group['weight_decay'] = decay * group.get('wd_sc', 1)
    lrs = [group['lr'] for group in optimizer.param_groups]
    decays = [group['weight_decay'] for group in optimizer.param_groups]
    return min(lrs), max(lrs), min((d for d in decays if d > 0), default=-1.), max(decays)


def filter_params(model: nn.Module,
                  nowd_keys: Iterable[str] = ()) -> tuple[list[str], list[nn.Parameter], list[dict]]:
    """Trainable parameters in two groups, with weight decay and without (vectors, biases, names with a key).

    Returns:
        (names, parameters, groups); groups, in order of first appearance, hold params, wd_sc (0 or 1), lr_sc.
    """
    groups: dict[float, dict] = {}
    names = []
    params = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        decayed = param.ndim > 1 and not name.endswith('bias') and not any(key in name for key in nowd_keys)
        group = groups.setdefault(float(decayed), dict(params=[], wd_sc=float(decayed), lr_sc=1.))
        group['params'].append(param)
        names.append(name)
        params.append(param)
    return names, params, list(groups.values())
