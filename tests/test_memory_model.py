"""The formula of `bench.memory_model` gives what training steps of small models really allocate."""
from contextlib import nullcontext

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.profiler._utils import traverse_dfs

import dist
from bench.cost import build_on_meta, published_config, typical_pyramid
from bench.memory_model import gathered_bytes, memory_of, norms_in_float32, step_bytes
from configs import parse_training
from models import NPP, VAR, VQVAE, AutoencoderKL, FlexVAE, FlexVAR, FlowAR, VQModel
from models.flexvar import FixedSchedule
from tests.runs import on_two_ranks
from training.build import build_trainer, count_parameters

SIDE = 48  # pixels; the tokenizers below have a stride of 8
BATCH = 5
TOLERANCE = 0.1
PATCH_NUMS = (1, 2, 3, 4, 6)
ADALN = dict(num_classes=4, embed_dim=64, num_heads=2, patch_nums=PATCH_NUMS, attn_l2_norm=True,
             drop_path_rate=0.1)
DEPTHS = {'var': (6,), 'flexvar': (6,), 'npp': (6,), 'flowar': (5, 4), 'flowar with cross-attention': (5, 4)}


def make(name, *depths):
    """A small model whose stacks have these depths."""
    if name == 'var':
        model = VAR(VQVAE(32, 8, net='tiny', v_patch_nums=PATCH_NUMS), depth=depths[0], **ADALN)
    elif name == 'flexvar':
        model = FlexVAR(FlexVAE(32, 8, z_channels=16, net='tiny'), depth=depths[0], **ADALN)
        model.schedule = FixedSchedule(typical_pyramid(model.patch_nums))
    elif name == 'npp':
        model = NPP(VQModel(32, 8, z_channels=16, net='tiny'), dim=64, n_layer=depths[0], n_head=2, grid=6)
    else:
        model = FlowAR(AutoencoderKL(4, net='tiny'), num_classes=4, encoder_embed_dim=64,
                       encoder_depth=depths[0], encoder_num_heads=2, decoder_embed_dim=64, decoder_depth=1,
                       decoder_num_heads=2, diffloss_d=depths[1], diffloss_w=64, scale=(1, 2, 3, 6),
                       cross=name != 'flowar')
    model.tokenizer.eval().requires_grad_(False)
    return model


def formula(name, recompute, precision, ranks=1):
    """Bytes of one rank."""
    def on_meta(*depths):
        with torch.device('meta'):
            return make(name, *depths)

    step = step_bytes(on_meta, DEPTHS[name], BATCH, SIDE, recompute, precision, keeps_casts=ranks == 1)
    return memory_of(on_meta(*DEPTHS[name]), step, num_averages=1, ranks=ranks).total


def measured(name, recompute, precision, shard=False, stepping=False):
    """Most bytes that torch's allocator had given out at a time in a micro-step of a real training.

    The optimizer has its moments by then, and there are the gradients of the micro-step before, if there is
    one.

    Args:
        stepping: whether each step has one micro-step alone.
    """
    config = parse_training([f'--model={name.split()[0]}', '--ema=0.9', f'--act_ckpt={recompute}',
                             f'--fp16={precision}', f'--shard={shard}'])
    images_B3HW = torch.rand(BATCH, 3, SIDE, SIDE) * 2 - 1
    label_B = torch.arange(BATCH) % 4
    as_on_cuda = norms_in_float32() if precision else nullcontext()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record, as_on_cuda:
        trainer = build_trainer(config, make(name, *DEPTHS[name]), total_steps=1)
        trainer.train_step(images_B3HW, label_B, 1.)
        trainer.train_step(images_B3HW, label_B, 1., stepping)
        with record_function('measured'):
            trainer.train_step(images_B3HW, label_B, 1., stepping)
    return peak_of(record)


def peak_of(record):
    """The largest sum of allocations since the region 'measured' began; all before it count, too.

    What threads of the network allocate is not in the record, but its end may be: such ends are left out.
    """
    events = [*traverse_dfs(record.profiler.kineto_results.experimental_event_tree())]
    live = {}
    peak = 0
    has_begun = False
    for event in sorted(events, key=lambda event: event.start_time_ns):
        has_begun = has_begun or event.name == 'measured'
        if event.tag == _EventType.Allocation and event.extra_fields.alloc_size > 0:
            live[event.extra_fields.ptr] = event.extra_fields.alloc_size
        elif event.tag == _EventType.Allocation:
            live.pop(event.extra_fields.ptr, None)
        if has_begun:
            peak = max(peak, sum(live.values()))
    return peak


FAST = [('var', 'attention', 0), ('npp', 'block', 0)]
CASES = [(name, recompute, precision) for name in DEPTHS for recompute in ('none', 'attention', 'block')
         for precision in (0, 2)]


@pytest.mark.parametrize(('name', 'recompute', 'precision'), [
    case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES])
def test_formula_gives_what_is_measured(name, recompute, precision):
    expected = measured(name, recompute, precision)
    assert formula(name, recompute, precision) == pytest.approx(expected, rel=TOLERANCE)


def rank_main(rank, folder, cases, shard):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank,
                                         world_size=2)
    peaks = [measured(*case, shard=shard, stepping=True) for case in cases]
    if rank == 0:
        torch.save(peaks, f'{folder}/peaks.pt')
    dist.finalize()


@pytest.mark.slow
@pytest.mark.parametrize('shard', [False, True])
def test_formula_gives_what_is_measured_on_two_ranks(tmp_path, shard):
    """With copies of the weights, and with weights that are spread over both.

    For a FlowAR that is spread and recomputed the formula is an upper limit, a fifth too high: gradients of
    its flow head come after the peak.
    """
    cases = [(name, recompute, 0) for name in DEPTHS for recompute in ('none', 'attention', 'block')
             if not (shard and name.startswith('flowar') and recompute == 'block')]
    on_two_ranks(rank_main, str(tmp_path), cases, shard)
    for case, expected in zip(cases, torch.load(tmp_path / 'peaks.pt'), strict=True):
        assert formula(*case, ranks=2 if shard else 1) == pytest.approx(expected, rel=TOLERANCE), case


def test_a_rank_gathers_a_block_and_all_else():
    """And the shards of it get smaller with the number of ranks, while what it gathers stays."""
    model = build_on_meta(published_config('var_d16'))
    block = count_parameters(model.blocks[0])
    rest = count_parameters(model) - 16 * block
    assert gathered_bytes(model) == 4 * 2 * (rest + block)
    one, eight, many = (memory_of(model, 0, num_averages=1, ranks=ranks) for ranks in (1, 8, 64))
    assert one.gathered == 0 and eight.gathered == many.gathered > 0
    assert one.moments == 8 * eight.moments == 64 * many.moments
    assert one.tokenizer == many.tokenizer
