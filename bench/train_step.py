"""Training steps of the product against the published way, with the same weights and optimizer, in one run.

`python -m bench.train_step`: tokenizer, forward, backward, clipping and AdamW. VAR and FlexVAR are compared
with the dense mask and the eager blocks of the published code, NPP with logits that are repeated for every
code of a patch. FlowAR trains as published, so there is no other way to compare it with. Before anything is
timed, both ways must give the same loss.
"""
import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench import reference
from bench.common import (
    compare,
    counted,
    default_device,
    report_header,
    require_equal,
    to_device,
    write_report,
)
from bench.cost import encode_flops
from bench.sampling import PATCH_NUMS, make_flexvar, make_flowar, make_npp, make_var
from models import ARModel
from models.flexvar import FixedSchedule
from models.helpers import DropPath
from trainer import GeneratorTrainer
from utils.amp_sc import DTYPES, AmpOptimizer
from utils.lr_control import filter_params

SIDE = 256  # pixels


class Case(NamedTuple):
    """A training step that can be made in two ways.

    Attributes:
        inputs: images, or codes, and labels of the step.
        published: the published loss of these, None where it is the product's own.
        progress: share of the training done, on which the patches of NPP depend.
        flops: of the frozen tokenizer for an image.
    """
    name: str
    model: ARModel
    inputs: tuple[torch.Tensor, torch.Tensor]
    published: Callable[..., torch.Tensor] | None
    progress: float
    flops: float


def cases(device: torch.device, depth: int, batch: int) -> Iterator[Case]:
    """All training steps, each with a model that is built when its turn comes.

    Args:
        depth: of VAR and FlexVAR. batch: images of a step.
    """
    images_B3HW = torch.rand(batch, 3, SIDE, SIDE, device=device) * 2 - 1
    label_B = torch.arange(batch, device=device)
    inputs = (images_B3HW, label_B)

    model = to_device(make_var(depth), device)
    yield Case(f'VAR depth {depth}', model, inputs, partial(reference.loss_var, model), 1.,
               encode_flops(model.tokenizer, SIDE))

    model = to_device(make_flexvar(depth), device)
    model.schedule = FixedSchedule(PATCH_NUMS)
    yield Case(f'FlexVAR depth {depth}', model, inputs,
               partial(reference.loss_flexvar, model, patch_nums=PATCH_NUMS), 1.,
               encode_flops(model.tokenizer, SIDE, PATCH_NUMS))

    model = to_device(make_npp(), device)
    model.phases = ((0.5, 2), (1., 1))
    idx_BN = torch.randint(model.vocab_size, (batch, model.grid ** 2), device=device)
    for p, progress in ((1, 1.), (2, 0.)):
        yield Case(f'NPP 8 x 512, patches of {p} x {p}', model, (idx_BN, label_B),
                   partial(reference.loss_npp, model, p=p), progress, 0.)

    model = to_device(make_flowar(), device)
    yield Case('FlowAR', model, inputs, None, 1., encode_flops(model.tokenizer, SIDE))


def make_trainer(model: ARModel, precision: int) -> GeneratorTrainer:
    """The trainer of a model, with a learning rate that changes next to nothing and without drop path."""
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.
    names, params, groups = filter_params(model, model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=1e-9, betas=(0.9, 0.95), fused=True)
    return GeneratorTrainer(model, AmpOptimizer(precision, optimizer, names, params, grad_clip=2.))


def both_ways(case: Case, precision: int) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """Calls that make a step of the product, and one of the published way.

    Raises:
        SystemExit: both ways give another loss.
    """
    trainer = make_trainer(case.model, precision)
    if case.published:
        case.model.eval()
        with torch.no_grad():
            loss, _ = case.model.training_loss(*case.inputs, case.progress)
            require_equal(case.name, loss, case.published(*case.inputs), 1e-4)

    def product() -> None:
        trainer.train_step(*case.inputs, case.progress)

    def published() -> None:
        case.model.train()
        with trainer.optimizer.amp_ctx:
            loss = case.published(*case.inputs)
        trainer.optimizer.backward_clip_step(True, loss)

    product()  # allocates the moments of the optimizer
    return product, published if case.published else None


def formula_of(case: Case) -> float:
    """FLOPs of the products of a step, see `ARModel.training_flops`."""
    case.model.eval()
    with torch.no_grad():
        _, aux = case.model.training_loss(*case.inputs, case.progress)
    batch = len(case.inputs[1])
    return batch * (case.model.training_flops(aux['num_tokens']) + case.flops)


def parser_of_cases(description: str, on_gpu: bool) -> argparse.ArgumentParser:
    """Flags of what `cases` builds and `both_ways` runs, and of where the report goes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--depth', type=int, default=16 if on_gpu else 4, help='of VAR and FlexVAR')
    parser.add_argument('--batch', type=int, default=32 if on_gpu else 2)
    parser.add_argument('--precision', type=int, choices=(0, 1, 2), default=2 if on_gpu else 0,
                        help='of training steps: 0 float32, 1 float16, 2 bfloat16')
    parser.add_argument('--out', type=Path)
    return parser


def main() -> None:
    """Compare all families and write the report."""
    device = default_device()
    on_gpu = device.type == 'cuda'
    parser = parser_of_cases(__doc__, on_gpu)
    parser.add_argument('--repeats', type=int, default=11 if on_gpu else 5)
    parser.add_argument('--only', default='', help='first word of the cases to run, such as VAR')
    parser.add_argument('--compile', action='store_true', help='compile the product')
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = DTYPES[args.precision]
    rows = []
    for case in cases(device, args.depth, args.batch):
        if args.only not in ('', case.name.split()[0]):
            continue
        flops = formula_of(case)
        product, published = both_ways(case, args.precision)
        cost = counted(case.name, product, flops)
        name = f'{case.name}, batch {args.batch}, {str(dtype).removeprefix("torch.")}'
        if args.compile:
            name += ', compiled'
            for part in case.model.compiled_parts():
                part.compile()
        rows.append(compare(name, product, published, args.repeats, device, dtype, cost))
    write_report(report_header('train_step', device) | dict(rows=rows), args.out)


if __name__ == '__main__':
    main()
