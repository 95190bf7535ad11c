"""What every row of `models.FAMILIES` promises to the trainers and the entry scripts, on tiny models.

A new family or tokenizer adds a line to GENERATORS or TOKENIZERS. The two of tests/extension.py are here as
well, so that what docs/code.md describes keeps these promises. What is special to one model is tested in its
own file.
"""
import io
from typing import NamedTuple

import pytest
import torch
from torch import nn

from models import (
    FAMILIES,
    NPP,
    VAR,
    VQ_8,
    VQVAE,
    AutoencoderKL,
    Family,
    FlexVAE,
    FlexVAR,
    FlowAR,
    VQModel,
    build_generator,
    build_tokenizer,
    load_weights,
)
from models.helpers import ImageNoise
from tests.extension import Histogram, Patches
from tests.runs import assert_equal
from tests.vectors import assert_within, fill, flowar_rule, npp_rule
from utils.checkpoint import tokenizer_weights
from utils.misc import seed_everything

SIDE = 32  # pixels; the tokenizers below have maps of 4x4 codes
NUM_CLASSES = 5


# ---------------------------------------------------------------------------------------------- tokenizers
def tiny_vqvae(**overrides):
    return VQVAE(24, 8, **dict(net='tiny', v_patch_nums=(1, 2, 4), test_mode=False) | overrides)


def tiny_vq(**overrides):
    return VQModel(24, 8, z_channels=16, net='tiny', codebook_l2_norm=False, **overrides)


def tiny_vq8(**overrides):
    return VQ_8(codebook_size=24, z_channels=16, ch=32, num_res_blocks=1, **overrides)


def tiny_flexvae(**overrides):
    return FlexVAE(24, 8, z_channels=16, net='tiny', **overrides)


def tiny_kl(**overrides):
    return AutoencoderKL(4, net='tiny', **overrides)


TOKENIZERS = dict(vqvae=tiny_vqvae, vq16=tiny_vq, vq8=tiny_vq8, flexvae=tiny_flexvae, kl16=tiny_kl,
                  patches=Patches)
PUBLISHED_TOKENIZERS = [name for name in TOKENIZERS if name != 'patches']


def frozen(make):
    return make().eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- generators
def tiny_var(**overrides):
    sizes = dict(num_classes=NUM_CLASSES, depth=2, embed_dim=32, num_heads=2, attn_l2_norm=True,
                 patch_nums=(1, 2, 4))
    var = VAR(frozen(tiny_vqvae), **sizes | overrides)
    var.init_weights(init_head=1., init_adaln_gamma=0.5, init_std=-1)
    return var


def tiny_flexvar(**overrides):
    sizes = dict(num_classes=NUM_CLASSES, depth=2, embed_dim=32, num_heads=2, attn_l2_norm=True,
                 patch_nums=(1, 2, 4))
    flexvar = FlexVAR(frozen(tiny_flexvae), **sizes | overrides)
    flexvar.init_weights(init_head=1., init_adaln_gamma=0.5, init_std=-1)
    return flexvar


def tiny_npp(**overrides):
    sizes = dict(num_classes=NUM_CLASSES, dim=32, n_layer=2, n_head=4, ffn_dim=48, grid=4,
                 phases=((0.5, 2), (1., 1)))
    return fill(NPP(frozen(tiny_vq), **sizes | overrides), npp_rule)


def tiny_flowar(**overrides):
    sizes = dict(num_classes=NUM_CLASSES, encoder_embed_dim=32, encoder_depth=2, encoder_num_heads=2,
                 decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4, diffloss_d=2, diffloss_w=64,
                 scale=(1, 2, 4))
    return fill(FlowAR(frozen(tiny_kl), **sizes | overrides), flowar_rule(7))


def tiny_histogram(**overrides):
    model = Histogram(frozen(tiny_vq), **dict(num_classes=NUM_CLASSES, grid=4) | overrides)
    nn.init.normal_(model.class_emb.weight)
    return model


class Generator(NamedTuple):
    """How a tiny model of a family is made, drawn from, trained with dropout, and given other sizes."""
    make: callable
    options: dict        # of `sample`, every one that takes part in drawing
    dropout: dict        # constructor arguments under which a training mode that leaks is seen
    architectures: list  # constructor arguments that weights and `config_state` must tell


GENERATORS = dict(
    var=Generator(
        tiny_var,
        options=dict(guidance=3., top_k=20, top_p=0.9),
        dropout=dict(drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.5, cond_drop_rate=0.9),
        architectures=[dict(shared_aln=True),  # without unit queries, heads are taken to be 64 wide
                       dict(embed_dim=128, attn_l2_norm=False),
                       dict(embed_dim=128, shared_aln=True, attn_l2_norm=False),
                       dict(depth=3, embed_dim=192, num_heads=3, mlp_ratio=2., num_classes=3)]),
    flexvar=Generator(
        tiny_flexvar,
        options=dict(guidance=3., top_k=20, top_p=0.9, infer_patch_nums=((1, 1), (1, 2), (3, 2), (4, 4))),
        dropout=dict(drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.5, token_dropout_p=0.5),
        architectures=[dict(embed_dim=128, shared_aln=shared_aln, attn_l2_norm=attn_l2_norm)
                       for shared_aln in (False, True) for attn_l2_norm in (False, True)]
        + [dict(patch_nums=(1, 2, 3, 4))]),
    npp=Generator(
        tiny_npp,
        options=dict(guidance=3., cfg_interval=5, top_k=20, top_p=0.9),
        dropout=dict(token_dropout_p=0.5, attn_dropout_p=0.5, resid_dropout_p=0.5, ffn_dropout_p=0.5),
        architectures=[dict(n_kv_head=2), dict(dim=24, n_head=3, grid=6), dict(dim=40, n_head=5, n_kv_head=1),
                       dict(phases=((1., 1),)),
                       dict(dim=48, n_head=6, n_kv_head=3, n_layer=11, num_classes=2)]),
    flowar=Generator(
        tiny_flowar,
        options=dict(guidance=3., num_steps=4, lower_steps=3),
        dropout=dict(attn_dropout=0.5, proj_dropout=0.5),
        architectures=[dict(cross=True, diffloss_d=3, diffloss_w=128), dict(mlp_ratio=2.),
                       dict(mlp_ratio=3.3), dict(scale=(1,)), dict(scale=(1, 2, 8), num_classes=3),
                       dict(encoder_embed_dim=48, decoder_embed_dim=48, encoder_num_heads=3,
                            decoder_num_heads=2)]),
    histogram=Generator(tiny_histogram, options=dict(guidance=3.), dropout={}, architectures=[dict(grid=2)]),
)

# a constructor argument makes other parts of some models
VARIANTS = [(name, {}) for name in GENERATORS] + [
    ('var', dict(attn_l2_norm=False)), ('var', dict(shared_aln=True)),
    ('var', dict(shared_aln=True, attn_l2_norm=False)), ('flexvar', dict(shared_aln=True)),
    ('npp', dict(n_kv_head=2)), ('flowar', dict(cross=True))]
PROGRESS = (0., 0.3, 1.)


@pytest.fixture(autouse=True)
def rows_of_the_extension(monkeypatch):
    monkeypatch.setitem(FAMILIES, 'histogram', Family(Histogram, VQModel))
    monkeypatch.setitem(FAMILIES, 'patches', Family(Patches, None))


@pytest.fixture(params=VARIANTS, ids=str)
def generator(request):
    """(name, model in eval mode)."""
    name, overrides = request.param
    return name, GENERATORS[name].make(**overrides).eval()


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    """In training mode."""
    return TOKENIZERS[request.param]()


def images_of(count=3, height=SIDE, width=SIDE):
    return torch.rand(count, 3, height, width) * 2 - 1


def draw(name, model, labels, images, seed=1, noise=ImageNoise):
    """Images of these indices in the job `seed`."""
    return model.sample(labels, rng=noise(seed, images), **GENERATORS[name].options)


def test_every_family_is_in_a_table():
    assert {*GENERATORS, *TOKENIZERS} == set(FAMILIES)
    for name, row in GENERATORS.items():
        model = row.make()
        assert type(model) is FAMILIES[name].model and isinstance(model.tokenizer, FAMILIES[name].tokenizer)
    for name, make in TOKENIZERS.items():
        assert type(make()) is FAMILIES[name].model and FAMILIES[name].tokenizer is None


# ---------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize('name', GENERATORS)
def test_stored_tokens_take_the_place_of_images(name):
    """In training, whatever the pyramid of the step, and in validation: loss and metrics to the last bit."""
    model = GENERATORS[name].make()
    images = images_of()
    stored = model.tokenizer.precompute(images)
    assert stored.shape[1:] == model.tokenizer.shape_of_stored(SIDE)
    for seed, training in ((0, False), (1, True), (2, True), (3, True)):
        model.train(training)
        found = []
        for batch in (images, stored):
            seed_everything(seed)
            loss, aux = model.training_loss(batch, torch.tensor([0, 1, 4]), 0.3)
            found.append(dict(loss=loss, **model.metrics(aux)))
        assert_equal(*found)


@pytest.mark.parametrize('progress', PROGRESS)
@pytest.mark.parametrize('training', [False, True])
def test_loss_is_finite(generator, progress, training):
    _, model = generator
    loss, aux = model.train(training).training_loss(images_of(), torch.tensor([0, 1, 4]), progress)
    assert loss.shape == () and loss.isfinite() and loss.requires_grad
    metrics = model.metrics(aux)
    assert {*model.headline.values(), model.selection} <= set(metrics)
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize('training', [False, True])
def test_loss_of_a_tokenizer_is_finite(tokenizer, training):
    images = images_of()
    out = tokenizer.train(training).reconstruct(images)
    assert out.latent_loss.shape == () and out.latent_loss.isfinite()
    assert out.views[-1][0] is images or torch.equal(out.views[-1][0], images)
    for target, rec in out.views:
        assert target.shape == rec.shape and rec.isfinite().all()
    assert all(not value.requires_grad and value.isfinite() for value in out.parts.values())


@pytest.mark.parametrize('progress', [0.3, 1.])
def test_gradient_reaches_every_parameter_of_a_generator(generator, progress):
    """Over a few steps: pyramids and dropped labels are drawn anew in each."""
    _, model = generator
    model.train()
    for _ in range(3):
        loss, _ = model.training_loss(images_of(4), torch.tensor([0, 1, 2, 4]), progress)
        loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradient_reaches_every_trained_parameter_of_a_tokenizer(tokenizer):
    out = tokenizer.reconstruct(images_of())
    loss = sum((rec - target).square().mean() for target, rec in out.views)
    (loss + out.latent_loss).backward()
    trained = {name: p for name, p in tokenizer.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []


# ---------------------------------------------------------------------------------------------- sampling
def test_samples_are_images(generator):
    name, model = generator
    images = draw(name, model, [1, 4, 0], [0, 1, 2])
    assert images.shape == (3, 3, SIDE, SIDE) and images.dtype == torch.float32 and not images.requires_grad
    assert 0 <= images.min() < images.max() <= 1


def test_samples_have_the_native_side(generator):
    _, model = generator
    assert model.sample([1], guidance=1., rng=ImageNoise(0, [0])).shape[2:] == (model.native_side,) * 2


def test_samples_repeat_with_their_generator(generator):
    name, model = generator

    def draw_with(seed):
        return model.sample([1, 4], rng=torch.Generator().manual_seed(seed), **GENERATORS[name].options)
    assert torch.equal(draw_with(7), draw_with(7))
    assert not torch.equal(draw_with(7), draw_with(8))


def test_samples_follow_the_image_index_and_not_the_batch(generator):
    name, model = generator
    together = draw(name, model, [1, 4, 0], [4, 5, 6])
    for row, label in enumerate([1, 4, 0]):
        alone = draw(name, model, [label], [4 + row])
        assert_within(alone[0], together[row], 1e-5)
    other = draw(name, model, [1, 4, 0], [4, 5, 7])
    assert_within(other[:2], together[:2], 1e-5)
    assert (other[2] - together[2]).abs().max() > 1e-3


def caches_of(model):
    return [module.cache for module in model.modules() if hasattr(module, 'cache')]


class FailingNoise(ImageNoise):
    """Runs out of memory in the middle of sampling, after it has noted which caches are filled."""

    def __init__(self, model):
        super().__init__(0, [0, 1])
        self.model = model
        self.caches = None

    def _uniform_at(self, counter_Bn):
        if self.num_draws == 2:
            self.caches = caches_of(self.model)
            raise RuntimeError('out of memory')
        return super()._uniform_at(counter_Bn)


def assert_untouched(model, training, expected, name):
    """No cache is left, the mode is the old one, and the next images are those of a fresh model."""
    assert all(cache is None for cache in caches_of(model))
    assert all(module.training == training for module in model.modules())
    assert torch.equal(draw(name, model, [1, 4], [0, 1]), expected)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', GENERATORS)
def test_sampling_is_in_eval_mode_and_restores_the_mode(name, training):
    row = GENERATORS[name]
    model = row.make(**row.dropout).eval()
    expected = draw(name, model, [1, 4], [0, 1])
    assert_untouched(model.train(training), training, expected, name)
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', ['var', 'flexvar', 'npp', 'flowar'])  # those that keep a cache
def test_an_error_while_sampling_leaves_no_trace(name, training):
    row = GENERATORS[name]
    model = row.make(**row.dropout).eval()
    expected = draw(name, model, [1, 4], [0, 1])
    noise = FailingNoise(model.train(training))
    with pytest.raises(RuntimeError, match='out of memory'):
        model.sample([1, 4], rng=noise, **row.options)
    assert any(cache is not None for cache in noise.caches)
    assert_untouched(model, training, expected, name)


def test_growing_ends_at_the_sample(generator):
    """Bit for bit; images before are in [0, 1], too, and one that is left in the middle leaves no trace."""
    name, model = generator
    options = GENERATORS[name].options
    expected = draw(name, model, [1, 4], [0, 1])
    *before, last = model.growing([1, 4], rng=ImageNoise(1, [0, 1]), **options)
    assert torch.equal(last, expected)
    assert all(len(images) == 2 and 0 <= images.min() < images.max() <= 1 for images in before)
    begun = model.growing([1, 4], rng=ImageNoise(1, [0, 1]), **options)
    next(begun)
    begun.close()
    assert_untouched(model, False, expected, name)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', ['var', 'flexvar', 'flowar'])
def test_abandoned_sampling_leaves_no_trace(name, training):
    """A caller may stop after any scale."""
    row = GENERATORS[name]
    model = row.make(**row.dropout).eval()
    expected = draw(name, model, [1, 4], [0, 1])
    steps = model.train(training).sample_scales(torch.tensor([1, 4]), rng=ImageNoise(0, [0, 1]))
    next(steps)
    assert not model.training
    assert any(cache is not None and cache.length > 0 for cache in caches_of(model))
    steps.close()
    assert_untouched(model, training, expected, name)


# ---------------------------------------------------------------------------------------------- weights
def moved(model):
    """`model` with parameters and floating-point buffers other than those of its constructor."""
    for t in model.state_dict().values():
        if t.is_floating_point() and t.isfinite().all():
            t.add_(0.01 * torch.randn_like(t))
    return model


@pytest.mark.parametrize('name', [*GENERATORS, *TOKENIZERS])
def test_state_dict_round_trip(name):
    make = TOKENIZERS.get(name) or GENERATORS[name].make
    source = moved(make())
    copy = make()
    load_weights(copy, source.state_dict(), 'a file')
    assert_equal(dict(copy.state_dict()), dict(source.state_dict()))
    assert not any(key.startswith(('tokenizer', 'vae')) for key in source.state_dict())


@pytest.mark.parametrize(('name', 'overrides'), [
    (name, overrides) for name, row in GENERATORS.items() for overrides in ({}, *row.architectures)], ids=str)
def test_files_tell_the_architecture_of_a_generator(name, overrides):
    """Weights and `config_state` together; what is built from them draws the same images."""
    source = GENERATORS[name].make(**overrides).eval()
    rebuilt = build_generator(name, source.state_dict(), source.tokenizer.state_dict(), 'a file', 'cpu',
                              source.tokenizer.config_state(1.), source.config_state(1.))
    assert not rebuilt.training and not rebuilt.tokenizer.training
    assert torch.equal(draw(name, rebuilt, [0, 1], [0, 1]), draw(name, source, [0, 1], [0, 1]))


PUBLISHED_VQVAE = dict(ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, quant_conv_ks=3, net='published',
                       unshared=False)
VQ_ARCHITECTURES = [
    dict(), dict(encoder_ch_mult=(1, 2, 2, 4), decoder_ch_mult=(1, 2, 2, 4)),
    dict(ch=32, encoder_ch_mult=(1, 2, 4), decoder_ch_mult=(2, 1, 2), num_res_blocks=1, codebook_size=40,
         codebook_embed_dim=4, z_channels=12, codebook_l2_norm=False, entropy_loss_ratio=0.1,
         commit_loss_beta=0.5),
    dict(codebook_size=64, codebook_embed_dim=8, z_channels=16, net='tiny')]
TOKENIZER_ARCHITECTURES = [
    *[(VQVAE, PUBLISHED_VQVAE | config) for config in (
        dict(vocab_size=4096, z_channels=32, ch=160, share_quant_resi=4),
        dict(vocab_size=96, z_channels=16, ch=32, share_quant_resi=1, quant_conv_ks=1),
        dict(vocab_size=64, z_channels=8, ch=64, share_quant_resi=0, ch_mult=(1, 2, 4), num_res_blocks=1),
        dict(vocab_size=64, z_channels=8, ch=32, share_quant_resi=2, ch_mult=(1, 2), num_res_blocks=3),
        dict(vocab_size=64, z_channels=8, ch=32, share_quant_resi=0, ch_mult=(2, 2)),
        dict(vocab_size=64, z_channels=8, ch=32, share_quant_resi=4, unshared=True),
        dict(vocab_size=64, z_channels=8, ch=24, ch_mult=(1, 2, 2), num_res_blocks=1, share_quant_resi=4,
             net='tiny'))],
    *[(cls, config) for cls in (VQModel, FlexVAE) for config in VQ_ARCHITECTURES],
    *[(AutoencoderKL, config) for config in (
        dict(), dict(embed_dim=4, net='tiny'),
        dict(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, embed_dim=8, decoder_attn=True),
        dict(use_variational=False, kl_weight=1e-4, scaling_factor=0.5))],
    (Patches, dict(channels=6)),
]


@pytest.mark.parametrize(('cls', 'config'), TOKENIZER_ARCHITECTURES, ids=str)
def test_files_tell_the_architecture_of_a_tokenizer(cls, config):
    """Weights and `config_state` together; sizes that were given are read back as they were."""
    with torch.device('meta'):
        model = cls(**config)
        kwargs = cls.kwargs_from_state_dict(model.state_dict())
        rebuilt = cls(**kwargs | model.config_state(1.))
    assert {key: t.shape for key, t in rebuilt.state_dict().items()} \
        == {key: t.shape for key, t in model.state_dict().items()}
    assert rebuilt.config_state(1.) == model.config_state(1.)
    assert rebuilt.stride == model.stride
    read_back = [name for name in config if name in kwargs]
    assert [kwargs[name] for name in read_back] == [config[name] for name in read_back]
    assert cls is not VQVAE or kwargs == config


def test_exported_file_holds_the_tokenizer(tokenizer):
    """What it says beside the weights counts; the published layout of VQVAE says nothing."""
    moved(tokenizer).calibrate([images_of(8)])
    tokenizer.eval()
    state, config = tokenizer_weights(tokenizer.exported(tokenizer.state_dict()))
    rebuilt = build_tokenizer(type(tokenizer), state, 'a file', 'cpu', **tokenizer.config_state(1.) | config)
    assert not rebuilt.training and not any(p.requires_grad for p in rebuilt.parameters())
    assert rebuilt.config_state(1.) == tokenizer.config_state(1.)
    images = images_of()
    tokens = seeded(tokenizer.encode, images)
    assert_equal(seeded(rebuilt.encode, images), tokens)
    assert torch.equal(rebuilt.decode(tokens), tokenizer.decode(tokens))


MEASURES = dict(vqvae=dict(measures=dict(defer_steps=2, scale_drop=0.3)), vq16=dict(upkeep={}),
                vq8=dict(upkeep={}), flexvae=dict(upkeep={}), kl16={}, patches={})


@pytest.mark.parametrize('name', TOKENIZERS)
def test_training_state_round_trip(name):
    """Through a file of plain content, as a restart of the program reads it."""
    model = TOKENIZERS[name](**MEASURES[name])
    for step in range(6):
        model.reconstruct(images_of())
        model.after_step(step / 6)
    model.calibrate([images_of(8)])
    file = io.BytesIO()
    torch.save((model.state_dict(), model.training_state()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = TOKENIZERS[name](**MEASURES[name])
    other.load_state_dict(weights)
    other.load_training_state(state)
    assert_equal(other.training_state(), model.training_state())
    assert other.config_state(1.) == model.config_state(1.)
    assert bool(state) == (name != 'patches')


@pytest.mark.parametrize('name', ['var', 'flexvar', 'npp', 'flowar', *PUBLISHED_TOKENIZERS])
def test_weights_are_sane_without_reset_parameters(name, monkeypatch):
    """Scripts of the published code switch it off; NaN stands for the memory that is found then."""
    def poison(module):
        for p in module.parameters(recurse=False):
            p.data.fill_(float('nan'))
    for cls in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding):
        monkeypatch.setattr(cls, 'reset_parameters', poison)
    model = (TOKENIZERS.get(name) or GENERATORS[name].make)()
    for key, p in model.named_parameters():
        assert p.isfinite().all(), key
        is_constant = 'norm' in key or key.endswith('quant_conv.bias') or name in GENERATORS
        assert p.std() > 0 or is_constant, key


# ---------------------------------------------------------------------------------------------- coding
def seeded(function, *args):
    """Its result with the noise of one seed: the latents of KL-16 are drawn."""
    torch.manual_seed(5)
    return function(*args)


def test_shapes_and_range_of_codes(tokenizer):
    images = images_of()
    tokens = tokenizer.eval().encode(images)
    maps = tokens if isinstance(tokens, list) else [tokens]
    assert maps[-1].shape in ((3, 16), (3, tokenizer.channels, 4, 4))
    assert tokenizer.stride == SIDE // 4
    for t in maps:
        assert len(t) == 3 and not t.requires_grad
        if tokenizer.vocab_size is None:
            assert t.dtype == torch.float32 and t.isfinite().all()
        else:
            assert t.dtype == torch.int64
            assert t.min() >= 0 and t.max() < tokenizer.vocab_size
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1


def test_progressive_pictures_end_with_the_decoded_codes(tokenizer):
    images = images_of()
    pictures = tokenizer.eval().progressive(images)
    assert all(p.shape == images.shape and p.abs().max() <= 1 for p in pictures.values())
    codes = getattr(tokenizer, 'encode_mode', tokenizer.encode)
    assert_within(list(pictures.values())[-1], tokenizer.decode(codes(images)), 1e-5)


@pytest.mark.parametrize('size', [(32, 36), (4, 32), (0, 32)])
@pytest.mark.parametrize(('name', 'method'), [
    *((name, 'encode') for name in PUBLISHED_TOKENIZERS), ('kl16', 'encode_mode'),
    *((name, 'reconstruct') for name in PUBLISHED_TOKENIZERS if name != 'vqvae')])
def test_images_must_divide_into_codes(name, method, size):
    model = TOKENIZERS[name]()
    with pytest.raises(ValueError, match=f'multiples of the stride 8, got {size[0]}x{size[1]}'):
        getattr(model, method)(images_of(1, *size))


def test_codes_ignore_autocast(tokenizer):
    images = images_of()
    expected = seeded(tokenizer.eval().encode, images)
    with torch.autocast('cpu', torch.bfloat16):
        assert_equal(seeded(tokenizer.encode, images), expected)


@pytest.mark.parametrize('name', PUBLISHED_TOKENIZERS)
def test_only_the_towers_run_in_half_precision(name):
    model = TOKENIZERS[name]()
    dtypes = {}
    for part in ('encoder', 'quant_conv', 'post_quant_conv', 'decoder'):
        getattr(model, part).register_forward_hook(
            lambda module, args, out, part=part: dtypes.update({part: (args[0].dtype, out.dtype)}))
    with torch.autocast('cpu', torch.bfloat16):
        out = model.reconstruct(images_of())
    assert dtypes['encoder'][1] == dtypes['decoder'][1] == torch.bfloat16
    assert dtypes['quant_conv'] == dtypes['post_quant_conv'] == (torch.float32, torch.float32)
    assert {t.dtype for t in (*out.views[0], out.latent_loss, *out.parts.values())} == {torch.float32}


# ---------------------------------------------------------------------------------------------- compiling
@pytest.mark.slow
@pytest.mark.parametrize(('name', 'num_shapes'), [
    ('var', 2 * 3),             # two parts of a block at every scale
    ('flexvar', 2 * 4),
    ('npp', 2 * 2),             # with guidance and without
    ('flowar', 2 * 3 + 2 * 3),  # the head with guidance and without, too
])
def test_compiled_sampling_equals_eager(name, num_shapes):
    """It is compiled in the first call alone, once per shape at most, and keys of weights stay."""
    model = GENERATORS[name].make().eval()
    keys = list(model.state_dict())
    expected = draw(name, model, [1, 4, 0], [0, 1, 2])
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model.compile_sampling()
    assert_within(draw(name, model, [1, 4, 0], [0, 1, 2]), expected, 1e-4)
    num_graphs = counters['stats']['unique_graphs']
    assert 0 < num_graphs <= num_shapes
    draw(name, model, [2, 2, 3], [3, 4, 5])
    assert counters['stats']['unique_graphs'] == num_graphs
    assert list(model.state_dict()) == keys


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'options'), [
    ('var', dict(progressive=dict(total=100, warmup=0., until=0.7, first_stage=0))),
    ('flexvar', {}),
    # dropout draws other numbers in compiled code
    ('npp', dict(token_dropout_p=0., resid_dropout_p=0., ffn_dropout_p=0.)),
    ('flowar', {}),
])
def test_compiled_training_equals_eager_and_has_all_its_graphs_after_the_first_pass(name, options):
    """Progressive training of VAR, the pyramids of FlexVAR and the patches of NPP add none later."""
    model = GENERATORS[name].make(**options).train()
    images_B3HW = images_of()
    label_B = torch.arange(len(images_B3HW)) % NUM_CLASSES

    def losses():
        found = []
        for progress in (0., 0.3, 0.6, 1.):
            loss, _ = seeded(model.training_loss, images_B3HW, label_B, progress)
            loss.backward()
            found.append(loss.item())
        return found

    expected = losses()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model.compile()
    assert losses() == pytest.approx(expected, rel=1e-4)
    num_graphs = counters['stats']['unique_graphs']
    losses()
    assert 0 < counters['stats']['unique_graphs'] == num_graphs
