"""The formula of `bench.memory_model` gives what training steps of small models really allocate."""
from contextlib import nullcontext

import pytest
import torch

from bench.cost import build_on_meta, published_config, typical_pyramid
from bench.counter import cost_of
from bench.memory_model import gathered_bytes, memory_of, norms_in_float32, step_bytes
from configs import parse_training
from models import NPP, VAR, VQVAE, FlexVAE, FlexVAR, VQModel
from models.flexvar import FixedSchedule
from models.recompute import set_recompute
from trainer import GeneratorTrainer
from training.build import build_optimizer, count_parameters
from utils.amp_sc import autocast

SIDE = 48  # pixels; the tokenizers below have a stride of 8
PATCH_NUMS = (1, 2, 3, 4, 6)
SIZES = dict(num_classes=4, embed_dim=64, num_heads=2, patch_nums=PATCH_NUMS, attn_l2_norm=True,
             drop_path_rate=0.1)


def frozen(model):
    model.tokenizer.eval().requires_grad_(False)
    return model


MODELS = dict(  # a model of these depths, and depths to measure
    var=(lambda depth: frozen(VAR(VQVAE(32, 8, net='tiny', v_patch_nums=PATCH_NUMS), depth=depth, **SIZES)),
         (6,)),
    flexvar=(lambda depth: frozen(FlexVAR(FlexVAE(32, 8, z_channels=16, net='tiny'), depth=depth, **SIZES)),
             (6,)),
    npp=(lambda depth: frozen(NPP(VQModel(32, 8, z_channels=16, net='tiny'), dim=64, n_layer=depth, n_head=2,
                                  grid=6)), (6,)),
)


def measured_bytes(model, batch, recompute, precision):
    """(tensors between two steps with gradients, what a further step allocates) of a real training."""
    set_recompute(model, recompute)
    if isinstance(model, FlexVAR):
        model.schedule = FixedSchedule(typical_pyramid(model.patch_nums))
    optimizer = build_optimizer(parse_training(['--model=var']), model, model.no_weight_decay())
    trainer = GeneratorTrainer(model, optimizer, ema_decay=0.9)
    optimizer.step_ctx = autocast('cpu', precision)
    images_B3HW = torch.rand(batch, 3, SIDE, SIDE) * 2 - 1
    label_B = torch.arange(batch) % 4
    trainer.train_step(images_B3HW, label_B, 1.)                  # makes the moments
    trainer.train_step(images_B3HW, label_B, 1., stepping=False)  # makes gradients, as DDP has them always
    parameters = list(model.parameters())
    moments = [value for values in optimizer.optimizer.state.values() for value in values.values()]
    tensors = [*parameters, *(parameter.grad for parameter in parameters), *moments,
               *(trainer.ema.weights[name] for name, _ in model.named_parameters()),
               *model.tokenizer.parameters()]
    step = cost_of(lambda: trainer.train_step(images_B3HW, label_B, 1., stepping=False))
    return sum(t.nbytes for t in tensors), step.peak_bytes


CASES = [(name, recompute, precision) for name in MODELS for recompute in ('none', 'attention', 'block')
         for precision in (0, 2)]
FAST = [('npp', 'none', 0), ('npp', 'block', 0)]


@pytest.mark.parametrize(('name', 'recompute', 'precision'), [
    case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES])
def test_formula_gives_what_is_measured(name, recompute, precision):
    make, depths = MODELS[name]
    batch = 5

    def on_meta(*shallow):
        with torch.device('meta'):
            return make(*shallow)

    step = step_bytes(on_meta, depths, batch, SIDE, recompute, precision)
    formula = memory_of(on_meta(*depths), step, has_average=True)
    with norms_in_float32() if precision else nullcontext():
        between, peak = measured_bytes(make(*depths), batch, recompute, precision)
    assert formula.total - formula.step == pytest.approx(between, rel=0.01)
    assert formula.step == pytest.approx(peak, rel=0.1)


def test_a_rank_gathers_two_blocks_and_all_else():
    """And the shards of it get smaller with the number of ranks, while what it gathers stays."""
    model = build_on_meta(published_config('var_d16'))
    block = count_parameters(model.blocks[0])
    rest = count_parameters(model) - 16 * block
    assert gathered_bytes(model) == 4 * (2 * rest + 4 * block)
    one, eight, many = (memory_of(model, 0, True, ranks) for ranks in (1, 8, 64))
    assert one.gathered == 0 and eight.gathered == many.gathered > 0
    assert one.moments == 8 * eight.moments == 64 * many.moments
    assert one.tokenizer == many.tokenizer
