"""How the scales share the training loss: published weights, any pyramid, and nothing new by default."""
import math

import pytest
import torch

from configs import parse_training
from models.flexvar import FixedSchedule
from models.scales import ProgressiveSchedule, ScaleLayout, scale_metrics, scale_shares, token_weights
from tests.test_flexvar import small
from tests.vectors import (
    assert_within,
    load_json,
    load_tensors,
    pixels,
    tiny_var,
    uniform_images,
)

LISTS = load_json('post_training/scale_weights')['lists']
CPU = torch.device('cpu')


# ------------------------------------------------------------ weights
@pytest.mark.parametrize('stored', LISTS, ids=lambda stored: str(stored['patch_nums'][-1]))
def test_published_weights(stored):
    layout = ScaleLayout(tuple(stored['patch_nums']))
    shares = scale_shares(layout, 'lognorm')
    assert shares == pytest.approx(stored['per_scale'], rel=0, abs=1e-12)
    per_token = [share / length for share, length in zip(shares, layout.lengths, strict=True)]
    assert per_token == pytest.approx(stored['per_token'], rel=0, abs=1e-12)
    weight_L = token_weights(layout, 'lognorm', CPU)
    for (begin, end), expected in zip(layout.spans, stored['per_token'], strict=True):
        assert_within(weight_L[begin:end], torch.full((end - begin,), expected), 1e-8)


@pytest.mark.parametrize('weighting', ['uniform', 'equal', 'lognorm'])
@pytest.mark.parametrize('sizes', [(1,), (1, 2), (3, 3), (1, 2, 3, 5), ((1, 1), (2, 3), (4, 6)), (2, 2, 2)])
def test_they_add_up_to_one(sizes, weighting):
    layout = ScaleLayout(sizes)
    assert math.fsum(scale_shares(layout, weighting)) == pytest.approx(1, abs=1e-12)
    weight_L = token_weights(layout, weighting, CPU)
    assert weight_L.shape == (layout.total,) and weight_L.dtype == torch.float32
    assert weight_L.sum().item() == pytest.approx(1, abs=1e-6)


def test_known_shares():
    layout = ScaleLayout((1, 2, 4))
    assert scale_shares(layout, 'uniform') == pytest.approx([1 / 21, 4 / 21, 16 / 21])
    assert scale_shares(layout, 'equal') == pytest.approx([1 / 3] * 3)
    assert scale_shares(layout, (1., 0., 3.)) == [0.25, 0., 0.75]
    # Two sides deviate from their mean by as much; of equal sides, or one, none deviates.
    for sizes in ((1, 2), (3, 3), (4, 4, 4), (5,)):
        shares = scale_shares(ScaleLayout(sizes), 'lognorm')
        assert shares == pytest.approx([1 / len(sizes)] * len(sizes))
    # An oblong map counts as a square of its area.
    oblong = scale_shares(ScaleLayout(((1, 1), (2, 8), (3, 12))), 'lognorm')
    assert oblong == pytest.approx(scale_shares(ScaleLayout((1, 4, 6)), 'lognorm'))


# ------------------------------------------------------------ losses
def var_loss(weighting, progress=1., **settings):
    var = tiny_var('sep_l2', scale_weights=weighting, **settings)
    images_B3HW = pixels(load_tensors('var/vqvae')['images_u8'])
    with torch.no_grad():
        return *var.training_loss(images_B3HW, torch.arange(len(images_B3HW)), progress), var


@pytest.mark.parametrize('weighting', ['equal', 'lognorm', (1., 2., 0., 3.)])
def test_loss_of_a_var(weighting):
    loss, aux, var = var_loss(weighting)
    weight_L = token_weights(var.layout, weighting, CPU)
    expected = (aux['losses'].plain_BL.double() * weight_L.double()).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    _, plain, _ = var_loss('uniform')
    for name, value in var.metrics(plain).items():
        assert torch.equal(var.metrics(aux)[name], value), f'{name} is weighted'


def test_uniform_weights_are_the_published_loss_to_the_last_bit():
    loss, aux, var = var_loss('uniform')
    loss_BL = aux['losses'].loss_BL
    weight_L = torch.full((loss_BL.shape[1],), 1 / var.L)
    assert torch.equal(loss, (loss_BL * weight_L).sum(1).mean())
    assert torch.equal(tiny_var('sep_l2').training_loss(
        pixels(load_tensors('var/vqvae')['images_u8']), torch.arange(len(loss_BL)))[0], loss)


def test_stages_cut_the_weights_of_all_scales():
    settings = dict(total=100, warmup=10., until=0.8, first_stage=1, stage_warmup=20.)
    schedule = ProgressiveSchedule(num_scales=4, **settings)
    for progress in (0.05, 0.35, 0.9):
        stage, newest_weight = schedule.at(progress)
        loss, aux, var = var_loss('lognorm', progress, progressive=settings)
        begin, end = var.layout.spans[stage]
        weight_L = token_weights(var.layout, 'lognorm', CPU)[:end]
        weight_L[begin:] *= newest_weight
        expected = (aux['losses'].plain_BL * weight_L).sum(1).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize('weighting', ['uniform', 'equal', 'lognorm', (1., 2., 0., 3.)])
def test_loss_of_a_flexvar(weighting):
    """Weights are those of the pyramid that the step has drawn; a number belongs to the nearest side."""
    model = small(scale_weights=weighting)
    images_B3HW = uniform_images(0, (2, 3, 32, 32))
    for sides in ((1, 2, 3, 4), (1, 2, 4), (1, 3)):
        model.train().schedule = FixedSchedule(sides)
        with torch.no_grad():
            loss, aux = model.training_loss(images_B3HW, torch.tensor([0, 1]))
        assert aux['patch_nums'] == sides
        loss_BL = aux['losses'].loss_BL
        layout = ScaleLayout(sides)
        if weighting == 'uniform':
            assert torch.equal(loss, loss_BL.mean())
            continue
        numbers = weighting
        if not isinstance(weighting, str):
            numbers = tuple(weighting[side - 1] for side in sides)
        weight_L = token_weights(layout, numbers, CPU)
        assert loss.item() == pytest.approx((loss_BL * weight_L).sum(1).mean().item(), rel=1e-6)
        plain = scale_metrics(aux['losses'].plain_BL, aux['losses'].predicted_BL, aux['target_BL'], layout,
                              model.tokenizer.stride, model.V)
        for name, value in model.metrics(aux).items():
            assert torch.equal(value, plain[name])


# ------------------------------------------------------------ flags
@pytest.mark.parametrize('model', ['var', 'flexvar'])
def test_flags(model, capsys):
    def weighting(text):
        config = parse_training([f'--model={model}', '--pn=1_2_3_4', f'--scale_weights={text}'])
        return config.model_kwargs(1, 1)['scale_weights']
    assert weighting('uniform') == 'uniform' and weighting('lognorm') == 'lognorm'
    assert weighting('1,2,0,3.5') == (1., 2., 0., 3.5)
    for text in ('even', '1,2,3', '1,2,3,4,5', '0,0,0,0', '1,-1,1,1', '1,nan,1,1', '1,inf,1,1', ''):
        with pytest.raises(SystemExit):
            weighting(text)
        error = capsys.readouterr().err
        assert 'uniform, equal, lognorm, or 4 numbers' in error and error.count('\n') == 1
