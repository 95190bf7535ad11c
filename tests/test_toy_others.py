"""KL-16, VQ-16 and FlexVAE trained on the toy set by train.py; bars as in test_toy.py."""
import pytest
import torch

from tests.runs import read

SCALES = ('1x1', '2x2', '3x3', '4x4')


@pytest.mark.slow
@pytest.mark.parametrize(('steps', 'bar'), [(50, 15.2), (400, 21.)])
def test_kl(toy, steps, bar):
    """Measured: 15.7 dB, 22.2 dB."""
    run = toy('kl16', f'--steps={steps}')
    assert run.scores['psnr'] >= bar
    config = read(run.folder, 'vae-ckpt-last.pth')['trainer']['config']
    assert torch.load(run.folder / 'vae-export.pth', weights_only=True)['config'] == config
    assert len(config['latent_std']) == 4 and min(config['latent_std']) > 0
    assert run.steps[-1]['alarm_collapse'] == 0 and run.steps[-1]['kl'] > 0


@pytest.mark.slow
def test_vq(toy):
    """Measured: 20.9 dB, 485 codes, perplexity 346."""
    run = toy('vq16', '--steps=400')
    assert run.scores['psnr'] >= 19.8
    assert run.scores['distinct_4x4'] >= 450 and run.scores['perplexity_4x4'] >= 200


@pytest.mark.slow
def test_flexvae(toy):
    """Every size of map learns from the first steps. Measured: 0.40 to 0.43 of the first loss."""
    run = toy('flexvae', '--steps=90', '--num_sides=4')
    for scale in SCALES:
        first, last = run.mean(f'l2_{scale}', 0, 40), run.mean(f'l2_{scale}', 50, 90)
        assert last <= 0.6 * first, (scale, first, last)


@pytest.mark.slow
def test_flexvae_with_drawn_sides(toy):
    """Measured: 0.35 to 0.40 of the first loss."""
    run = toy('flexvae', '--steps=200')
    for scale in SCALES:  # smaller sides are drawn in two of three steps
        first, last = run.mean(f'l2_{scale}', 20, 60), run.mean(f'l2_{scale}', 160, 200)
        assert last <= 0.6 * first, (scale, first, last)
