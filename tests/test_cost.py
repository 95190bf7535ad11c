"""Counts of what code costs: exact, equal to the formulas of the models, and no larger than they were."""
import contextlib
from functools import partial

import pytest
import torch

from bench import reference
from bench.all import table
from bench.common import compare, counted, require_flops
from bench.cost import (
    build_on_meta,
    decoder_flops,
    encoder_flops,
    published_config,
    published_depths,
    sampling_config,
    sampling_cost,
    sampling_flops,
    step_flops,
    training_cost,
)
from bench.counter import (
    CARDS,
    Cost,
    cost_of,
    extrapolated,
    fake_tensors,
    materialized,
    seconds_on,
    under_one_mask,
)
from bench.plan import checkpoints, exchange, phases_of, plan, preset_named
from configs import PRESETS, parse_training
from models import NPP, VAR, VQVAE, AutoencoderKL, FlexVAE, FlexVAR, FlowAR, VQModel
from models.attention import KVCache
from models.flexvar import FixedSchedule
from models.noise import ImageNoise
from trainer import GeneratorTrainer
from training.build import build_optimizer, count_parameters

PATCH_NUMS = (1, 2, 3)


def tiny_var(depth=2, **kwargs):
    vae = VQVAE(vocab_size=32, z_channels=8, net='tiny', v_patch_nums=PATCH_NUMS)
    return VAR(vae, num_classes=4, depth=depth, embed_dim=32, num_heads=2, patch_nums=PATCH_NUMS,
               attn_l2_norm=True, drop_path_rate=0.1, **kwargs)


def cost_of_tiny_step(depth=2):
    """A training step with AdamW, two images, float32, on real tensors."""
    model = tiny_var(depth)
    config = parse_training(['--model=var'])
    trainer = GeneratorTrainer(model, build_optimizer(config, model, model.no_weight_decay()))
    step = partial(trainer.train_step, torch.rand(2, 3, 24, 24), torch.tensor([0, 1]), 0.5)
    step()
    return cost_of(step)


def cost_of_tiny_sample(model):
    return cost_of(lambda: model.sample([0, 1], top_k=8, top_p=0.9, rng=ImageNoise(0, [0, 1])))


# ---------------------------------------------------------------------------------------------- the counter
def test_a_view_costs_nothing_and_an_operation_what_it_touches():
    a = torch.ones(4, 6)
    assert cost_of(lambda: a.view(24)[3:].reshape(3, 7).t()) == Cost()
    assert cost_of(lambda: torch.empty(5)) == Cost()
    total = cost_of(lambda: a + a[:1].expand(4, 6))
    assert (total.launches, total.bytes, total.peak_bytes) == (1, 4 * (24 + 6 + 24), 4 * 24)
    assert cost_of(lambda: a.zero_()).bytes == 4 * 24
    assert cost_of(lambda: a.mul_(2)).bytes == 4 * 2 * 24
    table = torch.ones(1000, 6)
    assert cost_of(lambda: table[torch.tensor([3, 5])]).bytes < 4 * 100


def test_products_count_two_flops_per_multiplication_and_attention_twice_backwards():
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    assert cost_of(lambda: a @ b).flops == 2 * 3 * 5 * 7
    q = torch.rand(2, 3, 11, 8, requires_grad=True)
    forward = 4 * 2 * 3 * 11 * 11 * 8

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    assert cost_of(attend).flops == forward
    assert cost_of(lambda: attend().sum().backward()).flops == 3 * forward


def test_memory_counts_while_it_is_alive():
    a = torch.ones(100)

    def one_by_one():
        b = a + 1
        b = b + 1
        return b + 1

    assert cost_of(one_by_one).peak_bytes == 2 * 400
    weight = torch.ones(100, requires_grad=True)
    assert cost_of(lambda: (weight * a).exp().exp().sum().backward()).peak_bytes >= 3 * 400


def test_fake_tensors_cost_what_real_ones_do():
    real = cost_of_tiny_sample(tiny_var().eval())
    with torch.device('meta'):
        model = tiny_var().eval()
    with fake_tensors():
        materialized(model.tokenizer)
        materialized(model)
        fake = cost_of_tiny_sample(model)
    assert (fake.flops, fake.reads) == (real.flops, real.reads)
    # Fake code takes the branch without ties among the codes, real code may not; a few launches more or less.
    assert fake.launches == pytest.approx(real.launches, rel=0.02)


def test_deep_stacks_follow_from_shallow_ones():
    whole = cost_of_tiny_step(5)
    from_two = extrapolated(cost_of_tiny_step, (5,))
    assert from_two.values()[:-1] == whole.values()[:-1]


def test_a_time_is_the_largest_of_three_limits():
    card = CARDS['H100-SXM']
    assert seconds_on(card, Cost(flops=989e12)).total == pytest.approx(1)
    assert seconds_on(card, Cost(flops=494e12, full_flops=494e12)).total == pytest.approx(1)
    assert seconds_on(card, Cost(flops=989e12, bytes=6.7e12)).limit == 'memory'
    assert seconds_on(card, Cost(launches=1e6)).total == pytest.approx(5)


# ---------------------------------------------------------------------------------------------- formulas
@pytest.fixture
def no_autocast(monkeypatch):
    """Autocast does not know the device 'meta'."""
    class Nothing(contextlib.nullcontext):
        def __init__(self, *args, **kwargs):
            super().__init__()

    monkeypatch.setattr(torch, 'autocast', Nothing)
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda *args: False)


@pytest.mark.parametrize('preset, train, sample', [
    ('var_d16', 0.93, 0.60), ('var_d20', 1.77, 1.14), ('var_d24', 3.00, 1.95), ('var_d30', 5.77, 3.77),
    ('var_d36_512', 36, 23)])
def test_formulas_give_what_is_known_of_published_models(preset, train, sample):
    model = build_on_meta(published_config(preset))
    decoder = decoder_flops(model.tokenizer.decoder, model.patch_nums[-1])
    assert model.training_flops(model.L) / 1e12 == pytest.approx(train, rel=0.01)
    assert (sampling_flops(model, {}) - decoder) / 1e12 == pytest.approx(sample, rel=0.02)


@pytest.mark.parametrize('preset', PRESETS['var'])
def test_published_transformers_multiply_what_the_formula_says(preset, no_autocast):
    """Under a mask over all tokens, as the formula has it; attention by scale multiplies less."""
    model = build_on_meta(published_config(preset), (2,))  # all blocks are equal
    teacher_BLZ = torch.empty(1, model.L - 1, model.Cvae, device='meta')
    label_B = torch.zeros(1, dtype=torch.int64, device='meta')
    by_scale = cost_of(lambda: model(label_B, teacher_BLZ).sum().backward())
    with under_one_mask():
        cost = cost_of(lambda: model(label_B, teacher_BLZ).sum().backward())
    assert model.training_flops(model.L) == pytest.approx(cost.flops, rel=0.01)
    assert by_scale.flops < 0.99 * cost.flops


SOLVER = dict(guidance=2., num_steps=6, lower_steps=4, guidance_until=0.9)
SMALL = {  # of each family: a model on a narrow tokenizer, and options of its sampling
    'var': (lambda: small_var(VAR, VQVAE(32, 8, ch=32, v_patch_nums=PATCH_NUMS)), {}),
    'flexvar': (lambda: small_var(FlexVAR, FlexVAE(32, 8, ch=32, z_channels=32, test_mode=True)), {}),
    'npp': (lambda: NPP(VQModel(32, 8, ch=32, z_channels=32, test_mode=True), dim=32, n_layer=2, n_head=2,
                        grid=3), dict(guidance=2.)),
    'flowar': (lambda: small_flowar(False), SOLVER),
    'flowar with cross-attention': (lambda: small_flowar(True), SOLVER),
}


def small_var(cls, tokenizer):
    return cls(tokenizer, num_classes=4, depth=2, embed_dim=32, num_heads=2, patch_nums=PATCH_NUMS)


def small_flowar(cross):
    sizes = dict(encoder_embed_dim=64, encoder_depth=1, encoder_num_heads=2, decoder_embed_dim=64,
                 decoder_depth=2, decoder_num_heads=2)
    return FlowAR(AutoencoderKL(4, ch=32, test_mode=True), num_classes=4, **sizes, diffloss_d=2,
                  diffloss_w=64, scale=(1, 2, 4), cross=cross)


@pytest.mark.parametrize('name', SMALL)
def test_training_multiplies_what_the_formula_says(name):
    make, _ = SMALL[name]
    model = make().train()
    side = 64 if name.startswith('flowar') else 48
    images_B3HW = torch.rand(1, 3, side, side)
    frozen = cost_of(lambda: model.tokenizer.encode(images_B3HW, *given_sides(model)))
    found = {}

    def step():
        loss, found['aux'] = model.training_loss(images_B3HW, torch.tensor([1]))
        loss.backward()

    flops = cost_of(step).flops - frozen.flops
    # A narrow model has matrices that meet the latent, whose gradient nobody needs.
    assert model.training_flops(found['aux']['num_tokens']) == pytest.approx(flops, rel=0.03)


def given_sides(model):
    """Sides that a FlexVAR encodes; it draws these alone here."""
    if not isinstance(model, FlexVAR):
        return ()
    model.schedule = FixedSchedule(PATCH_NUMS)
    return (PATCH_NUMS,)


@pytest.mark.parametrize('name', SMALL)
def test_sampling_multiplies_what_the_formula_says(name):
    make, options = SMALL[name]
    model = make().eval()
    cost = cost_of(lambda: model.sample([1], rng=ImageNoise(0, [0]), **options))
    assert sampling_flops(model, options) == pytest.approx(cost.flops, rel=0.01)


@pytest.mark.parametrize('make, encoder, decoder', [
    (partial(VQVAE, ch=160), 0.215, 0.394), (VQModel, None, None), (AutoencoderKL, None, None)])
def test_tokenizers_multiply_what_the_formula_says(make, encoder, decoder):
    with torch.device('meta'):
        tokenizer = make()
        images = torch.empty(1, 3, 256, 256)
        latent = torch.empty(1, tokenizer.post_quant_conv.out_channels, 16, 16)
        encoded = cost_of(lambda: tokenizer.encoder(images)).flops
        decoded = cost_of(lambda: tokenizer.decoder(latent)).flops
    assert encoder_flops(tokenizer.encoder, 256) == encoded
    assert decoder_flops(tokenizer.decoder, 16) == decoded
    if encoder:
        assert encoded / 1e12 == pytest.approx(encoder, rel=0.01)
        assert decoded / 1e12 == pytest.approx(decoder, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['var_d16', 'flexvar_d16', 'npp_b', 'flowar_s'])
def test_published_runs_cost_what_the_formulas_say(preset):
    config = published_config(preset)
    depths = (2,) * len(published_depths(config))
    kwargs = dict(use_checkpoint=False) if config.model == 'flowar' else {}
    model = build_on_meta(config, depths, **kwargs)
    options = sampling_config(preset).sample_kwargs()
    assert sampling_flops(model, options) == pytest.approx(sampling_cost(preset, 1, depths).flops, rel=0.01)
    with under_one_mask():
        cost = training_cost(config, 1, depths=depths, **kwargs)
    assert step_flops(config, model) == pytest.approx(cost.flops, rel=0.01)


# ---------------------------------------------------------------------------------------------- regressions
def test_a_training_step_launches_no_more_than_it_did():
    cost = cost_of_tiny_step()
    assert cost.flops == 23_145_472
    assert cost.reads == 1
    assert cost.launches <= 376


def test_a_sample_launches_no_more_than_it_did():
    cost = cost_of_tiny_sample(tiny_var().eval())
    assert cost.flops == 27_240_960
    assert cost.launches <= 433


def test_the_class_is_multiplied_once_per_block_and_sample():
    model = tiny_var().eval()
    calls = []
    for block in model.blocks:
        block.ada_lin.register_forward_hook(lambda *_: calls.append(1))
    model.sample([0, 1], rng=ImageNoise(0, [0, 1]))
    assert len(calls) == len(model.blocks)


def test_the_cache_has_no_room_for_the_last_scale(monkeypatch):
    caches = []
    make = KVCache.__init__

    def remember(cache, *args):
        caches.append(cache)
        make(cache, *args)

    monkeypatch.setattr(KVCache, '__init__', remember)
    model = tiny_var().eval()
    model.sample([0, 1], rng=ImageNoise(0, [0, 1]))
    num_bytes = sum(cache.storage.nbytes for cache in caches)
    # Keys and values of two images, with and without their class, of all scales but the last, in float32.
    assert num_bytes == model.depth * 2 * (2 * 2) * (1 + 4) * 32 * 4


# ---------------------------------------------------------------------------------------------- rows
def test_a_row_says_how_fast_how_large_and_how_well_used():
    a = torch.ones(64, 64)
    cost = counted('products', lambda: a @ a, 2 * 64 ** 3)
    row = compare('products', lambda: a @ a, lambda: a @ a @ a, 3, torch.device('cpu'), cost=cost)
    assert row['lowest_ratio'] <= row['ratio'] <= row['highest_ratio']
    assert row['tflop'] == pytest.approx(2 * 64 ** 3 / 1e12, rel=1e-3)
    assert row['peak_mib'] == pytest.approx(a.nbytes / 2 ** 20, rel=1e-3)
    assert row['mfu'] > 0 and row['bandwidth'] > 0
    assert f'{row["ratio"]:.4g}' in table(dict(products=dict(rows=[row])))


def test_a_formula_that_is_off_ends_a_benchmark():
    with pytest.raises(SystemExit, match='more than 1 %'):
        require_flops('products', counted=1000., formula=1011.)


def test_the_published_way_of_flexvar_gives_the_loss_and_the_samples_of_the_product():
    model = SMALL['flexvar'][0]().eval()
    images_B3HW = torch.rand(2, 3, 48, 48)
    label_B = torch.tensor([0, 3])
    loss, _ = model.training_loss(images_B3HW, label_B)
    assert reference.loss_flexvar(model, images_B3HW, label_B, PATCH_NUMS).item() == pytest.approx(
        loss.item(), rel=1e-5)
    published = reference.sample_flexvar(model, label_B, 2.5, 8, 0.9, ImageNoise(0, [0, 1]))
    ours = model.sample(label_B, guidance=3.5, top_k=8, top_p=0.9, rng=ImageNoise(0, [0, 1]))
    assert (ours - published).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------- plans
def test_a_ring_sends_every_gradient_nearly_twice():
    card = CARDS['H100-SXM']
    sent, seconds = exchange(1000, 4, 8, card, node_link=50e9)
    assert sent == pytest.approx(2 * 3 / 4 * 4000)
    assert seconds == pytest.approx(sent / card.link)
    _, between_nodes = exchange(1000, 16, 8, card, node_link=50e9)
    assert between_nodes == pytest.approx(2 * 15 / 16 * 4000 / 50e9)
    assert exchange(1000, 1, 8, card, node_link=50e9)[0] == 0


def test_phases_of_a_training_add_up():
    assert phases_of(published_config('var_d16')) == [(1., 1.)]
    config = published_config('npp_b')
    phases = phases_of(config)
    assert sum(share for share, _ in phases) == pytest.approx(1)
    model = build_on_meta(config, (1,))
    assert [model.patch_side(progress) for _, progress in phases] == [2, 1]


def test_a_checkpoint_holds_weights_moments_and_tokenizer():
    config = published_config('var_d16')
    model = build_on_meta(config, (1,))
    found = checkpoints(config, model, hours=10., disk=1e9)
    weights, frozen = count_parameters(model), count_parameters(model.tokenizer)
    assert found['gigabytes_each'] == pytest.approx(4 * (3 * weights + frozen) / 1e9, abs=0.01)
    assert found['number'] == config.epochs + 30  # one after every epoch, and one every 20 minutes


def test_a_preset_that_nobody_published_is_refused_with_the_names_that_there_are():
    assert preset_named('d30') == 'var_d30'
    with pytest.raises(ValueError, match=r"expected a published run, one of var_d16.*got 'd99'"):
        published_config(preset_named('d99'))


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['flexvar_d16', 'npp_b', 'flowar_l'])
def test_published_trainings_can_be_planned(preset):
    found = plan(preset, 8, 'H100-SXM', per_node=8, node_link=50e9, disk=1e9)
    assert 0 < found['hours'][0] <= found['hours'][1] < 10_000
    assert found['memory_gigabytes']['total'] <= 80
    assert found['memory_gigabytes']['peak_of_step'] > found['memory_gigabytes']['of_the_peak']['logits']


# ---------------------------------------------------------------------------------------------- the trainer
def test_the_trainer_adds_up_the_flops_of_its_steps():
    model = tiny_var()
    config = parse_training(['--model=var'])
    trainer = GeneratorTrainer(model, build_optimizer(config, model, model.no_weight_decay()))
    for _ in range(3):
        trainer.train_step(torch.rand(2, 3, 24, 24), torch.tensor([0, 1]), 0.5)
    assert trainer.take_flops() == 3 * 2 * model.training_flops(14)
    assert trainer.take_flops() == 0
