"""TokenizerTrainer: two optimizers, ranks, accumulation, averaged weights, decoder-only training."""
import pytest
import torch

import dist
from models import VQVAE, AutoencoderKL, VQModel, build_loss
from models.noise import GlobalBatch
from tests.runs import on_two_ranks
from trainer import TokenizerTrainer
from utils.amp_sc import AmpOptimizer
from utils.ema import WeightEMA
from utils.misc import mix_seed, seed_everything

TINY = dict(vocab_size=64, z_channels=8, v_patch_nums=(1, 2, 4), net='tiny', test_mode=False)
GAN = dict(weight=0.5, start=0.25, ramp=0.25, kind='hinge', half=True, adaptive=True, adaptive_min=0.015,
           adaptive_max=1e4, adaptive_eps=1e-6, augment=True, consistency=1., lecam=0.1, blur=0.2)
STEPS = 40


def make_trainer(model, gan=None, width=8, accumulate=1, ema=0.99, lr=1e-3):
    criterion = build_loss(l1_weight=0.2, l2_weight=1., perceptual='pyramid', lpips_files=None,
                           discriminator='patchgan' if gan else 'none', dino_files=None, image_size=32,
                           width=width, gan=gan or {})
    criterion.to(next(model.parameters()))

    def optimize(module):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        adam = torch.optim.AdamW([p for _, p in named], lr=lr, weight_decay=0.)
        return AmpOptimizer(0, adam, *map(list, zip(*named, strict=True)), 1., accumulate)
    return TokenizerTrainer(model, optimize(model), criterion,
                            optimize(criterion.discriminator) if gan else None, [ema])


def images_of(step, count=32):
    rng = torch.Generator().manual_seed(step)
    coarse = torch.rand(count, 3, 4, 4, dtype=torch.float64, generator=rng)
    return torch.nn.functional.interpolate(coarse, scale_factor=8, mode='bicubic').mul(2).sub(1)


def run(trainer, steps, rank=0, world_size=1, accumulate=1, dtype=torch.float32, count=32, total=STEPS):
    """Steps of a training whose random numbers depend on (step, image) alone; yields every StepInfo."""
    micro = count // world_size // accumulate
    for step in steps:
        batch = images_of(step, count).to(dtype)
        for j in range(accumulate):
            start = rank * (count // world_size) + j * micro
            seed_everything(mix_seed(0, step))
            with GlobalBatch(start, count):
                info = trainer.train_step(batch[start:start + micro], torch.zeros(micro, dtype=torch.int64),
                                          step / total, stepping=j + 1 == accumulate)
        yield step, info


def exact_trainer(gan, accumulate):
    """float64; deferral, k-means, restarts, scale dropout and the start of the GAN fall into ten steps."""
    seed_everything(0)
    model = VQVAE(**TINY, measures=dict(ema=True, restart=True, defer_steps=3, scale_drop=0.3)).double()
    return make_trainer(model, gan, accumulate=accumulate)


def summary(trainer, infos):
    upkeep = trainer.model.quantize.measures.upkeeps[0]
    losses = torch.stack([info.loss for _, info in infos])
    dist.allreduce(losses)  # of this rank's images
    return dict(loss=losses / dist.get_world_size(), codebook=trainer.model.quantize.embedding.weight.data,
                count=upkeep.count_V, sums=upkeep.sum_VZ, age=upkeep.age_V,
                restarts=torch.tensor(upkeep.num_restarts), **{f'window {name}': count for name, count
                                                               in upkeep.window.counts.items()},
                **{f'ema {name}': value for name, value in trainer.ema.weights.items()
                   if 'ema_vocab_hit' not in name},
                **({f'D {name}': p for name, p in trainer.criterion.state_dict().items()}))


def patch_upkeep():
    """Restarts within ten steps; returns what undoes it."""
    from models.tokenizers import codebook
    old = {name: getattr(codebook, name) for name in ('CHECK_EVERY', 'MIN_PATIENCE', 'PATIENCE_TOKENS')}
    codebook.CHECK_EVERY, codebook.MIN_PATIENCE, codebook.PATIENCE_TOKENS = 2, 1, 0
    return lambda: vars(codebook).update(old)


def ten_steps(rank, world_size, accumulate=1, gan=None):
    restore = patch_upkeep()
    try:
        trainer = exact_trainer(gan, accumulate)
        infos = list(run(trainer, range(10), rank, world_size, accumulate, torch.float64))
        return summary(trainer, infos)
    finally:
        restore()


def rank_main(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank,
                                         world_size=2)
    torch.save([ten_steps(rank, 2), ten_steps(rank, 2, gan=GAN)], f'{folder}/{rank}.pt')
    dist.finalize()


def assert_close(actual, expected, skip=()):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if not name.startswith(skip):
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-11,
                                       msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    on_two_ranks(rank_main, str(tmp_path))
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    for case, gan in enumerate((None, GAN)):
        single = ten_steps(0, 1, gan=gan)
        assert single['restarts'] > 0
        assert_close(first[case], single)
        for name, value in first[case].items():  # bit for bit between ranks
            assert torch.equal(value, second[case][name]), name


@pytest.mark.slow
def test_accumulation_equals_the_large_batch():
    """Losses aside, which are those of the last micro-batch."""
    assert_close(ten_steps(0, 1, accumulate=4), ten_steps(0, 1), skip=('loss',))


# ---------------------------------------------------------------------------------------------- discriminator
@pytest.mark.slow
def test_gan_schedule_and_who_moves_when():
    seed_everything(0)
    trainer = make_trainer(VQModel(codebook_size=64, z_channels=16, net='tiny', upkeep={'ema': False}), GAN)
    generator, criterion, weights, means = trainer.optimizer, trainer.criterion, [], []
    critic = criterion.discriminator
    snapshots = {}

    def watch(amp, name, others):
        step = amp.backward_clip_step

        def watched(stepping, loss):
            before = [p.grad for p in others]
            result = step(stepping, loss)
            snapshots.setdefault(name, []).append(all(grad is None for grad in before)
                                                  and all(p.grad is None for p in others))
            return result
        amp.backward_clip_step = watched
    watch(generator, 'generator', list(critic.parameters()))
    watch(trainer.disc_optimizer, 'discriminator', list(trainer.model.parameters()))

    first = {name: value.clone() for name, value in critic.state_dict().items()}
    for step, info in run(trainer, range(STEPS)):
        weights.append(float(info.aux['gan_weight']) / max(float(info.aux['lambda']), 1e-9) / GAN['weight'])
        means.append(criterion.lecam.m_r.item())
        if step < 10:
            assert 'disc_loss' not in info.aux and info.aux['gen_loss'] == 0
            assert all(torch.equal(value, first[name]) for name, value in critic.state_dict().items())
        else:
            assert GAN['adaptive_min'] <= float(info.aux['lambda']) <= GAN['adaptive_max']
            assert torch.isfinite(info.aux['disc_loss']) and 0 <= info.aux['acc_real'] <= 1
    assert weights[:11] == [0.] * 11
    assert torch.allclose(torch.tensor(weights[10:21]), torch.arange(11) / 10, atol=1e-5)
    assert all(abs(weight - 1) < 1e-5 for weight in weights[20:])
    assert set(means[:10]) == {0.} and len(set(means[9:])) == STEPS - 9
    assert all(snapshots['generator']) and len(snapshots['generator']) == STEPS
    assert all(snapshots['discriminator']) and len(snapshots['discriminator']) == STEPS - 10


# ---------------------------------------------------------------------------------------------- average
def test_average_equals_the_closed_form_and_copies_codes():
    model = VQModel(codebook_size=8, z_channels=16, net='tiny', upkeep={'ema': False})
    ema = WeightEMA(model, 0.9, model.not_averaged)
    name, codes = 'encoder.conv_out.weight', 'quantize.embedding.weight'
    expected = model.state_dict()[name].clone()
    for t in range(30):
        torch.manual_seed(t)
        for p in model.parameters():
            p.data.normal_()
        decay = min(0.9, (t // 2 + 1) / (t // 2 + 10))
        expected = decay * expected + (1 - decay) * model.state_dict()[name]
        ema.update()
    torch.testing.assert_close(ema.weights[name], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(ema.weights[codes], model.state_dict()[codes])


def test_model_and_average_change_places_and_are_put_back():
    """There is no third copy of the weights, also after an error inside."""
    model = VQModel(codebook_size=8, z_channels=16, net='tiny')
    ema = WeightEMA(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    average = {name: value.clone() for name, value in ema.weights.items()}
    places = {value.data_ptr() for value in (*model.state_dict().values(), *ema.weights.values())}
    with pytest.raises(RuntimeError, match='stop'), ema.applied():
        assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
        assert {value.data_ptr() for value in model.state_dict().values()} <= places
        raise RuntimeError('stop')
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in ema.weights.items())


def test_evaluation_uses_the_average_and_counts_every_image():
    seed_everything(0)
    trainer = make_trainer(VQVAE(**TINY, measures={}), ema=0.999)
    for _ in run(trainer, range(5)):
        pass
    batches = [(images_of(7, 8).float(), torch.zeros(8)), (images_of(8, 3).float(), torch.zeros(3))]
    values = trainer.eval_epoch(batches)
    with trainer.averaged(), torch.no_grad():
        trainer.model.eval()
        images = torch.cat([batch for batch, _ in batches])
        rec = trainer.model.reconstruct(images)
    l1 = (rec.views[0][1] - images).abs().mean()
    assert abs(values['l1'] - l1) < 1e-5 and values['count'] == 11
    assert values['rec_score'] == values['l1'] + values['lp']
    assert values['distinct_4x4'] == len(rec.codes['4x4'].unique())
    assert values['usage_2x2'] == len(rec.codes['2x2'].unique()) / min(64, 11 * 4)


# ---------------------------------------------------------------------------------------------- parts
def test_training_the_decoder_alone_keeps_every_code():
    seed_everything(0)
    pairs = [VQVAE(**TINY, measures={}), VQModel(codebook_size=64, z_channels=16, net='tiny', upkeep={}),
             AutoencoderKL(embed_dim=4, net='tiny')]
    for model in pairs:
        model.freeze_codes()
        for upkeep in getattr(model, 'upkeeps', []):
            upkeep.ema = upkeep.restart = False
        if isinstance(model, VQModel):
            model.upkeep.ema = model.upkeep.restart = False
        trainer, images = make_trainer(model), images_of(99).float()

        def codes(model=model, images=images):
            encode = model.encode_mode if isinstance(model, AutoencoderKL) else model.encode
            model.eval()
            return encode(images)
        before, pixels = codes(), model.decode(codes())
        for _ in run(trainer, range(5)):
            pass
        after = codes()
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a, b), type(model).__name__
        assert not torch.allclose(model.decode(after), pixels, atol=1e-3)


