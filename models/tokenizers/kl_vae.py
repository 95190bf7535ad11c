"""AutoencoderKL (KL-16): an image as a continuous latent of nearly unit variance.

The encoder predicts a normal distribution for every value of the latent, the decoder sees a sample of it, and
a weak pull towards the unit normal keeps the latents small (arXiv 1312.6114).
Letters: B batch, Z latent channels, h w feature map, 3HW image.
Source: KL-f16 of arXiv 2112.10752, as changed and published with arXiv 2406.11838 (MAR).
"""
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

import dist
from models.base import Reconstruction, Tokenizer, at_least_float32
from models.loading import load_weights
from models.noise import GlobalBatch
from models.tokenizers.conv import (
    KL_LAYOUT,
    build_encoder_decoder,
    in_float32,
    init_convolutions,
    read_encoder_decoder,
    start_as_identity,
)

logger = logging.getLogger(__name__)

DEAD_CHANNEL = 0.01      # nats per position: a channel whose divergence is lower carries no information
FIRST_LOGVAR = -4.       # log-variance of the posterior before training
ALARM_AFTER = 0.05       # fraction of the training before which no channel is called dead


class Posterior:
    """q(z | x): an independent normal distribution for every value of the latent.

    Args:
        mean_BZhw: float32.
        logvar_BZhw: logarithm of the variance, float32, clamped to [-30, 20] as published. None makes every
            value a single point without variance.
    """

    def __init__(self, mean_BZhw: torch.Tensor, logvar_BZhw: torch.Tensor | None = None):
        self.mean = mean_BZhw
        self.logvar = None
        if logvar_BZhw is not None:
            self.logvar = logvar_BZhw.clamp(-30, 20)

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation (B, Z, h, w); 0 for a single point."""
        if self.logvar is None:
            return torch.zeros_like(self.mean)
        return self.logvar.mul(0.5).exp()

    def sample(self, noise_BZhw: torch.Tensor | None = None) -> torch.Tensor:
        """mean + std * noise (B, Z, h, w), the reparametrisation of arXiv 1312.6114, Sec. 2.4.

        Args:
            noise_BZhw: standard normal noise. None takes it from the global generator, by the place of each
                image in the global batch.
        """
        if self.logvar is None:
            return self.mean
        if noise_BZhw is None:
            noise_BZhw = GlobalBatch.current.per_image(
                len(self.mean), self.mean.device, lambda t: t.normal_(), self.mean.shape[1:])
        return self.mean + self.std * noise_BZhw

    def mode(self) -> torch.Tensor:
        """The most likely latent (B, Z, h, w), which is the mean."""
        return self.mean

    def elementwise_kl(self) -> torch.Tensor:
        """Divergence (B, Z, h, w) from N(0, 1) in nats; 0 for a single point. arXiv 1312.6114, App. B."""
        if self.logvar is None:
            return torch.zeros_like(self.mean)
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)

    def kl(self) -> torch.Tensor:
        """Divergence (B,) from the unit normal in nats, summed over all values of a latent."""
        return self.elementwise_kl().flatten(1).sum(1)


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """State dict stored in a file of `torch.save`, on the CPU.

    Published files hold it under the key 'model'; a bare state dict is read as well.

    Raises:
        ValueError: the file cannot be read, or holds anything but tensors by name.
    """
    wanted = f'expected a file of weights of torch, cannot read {path!r}'
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:  # a missing or unreadable file has a short reason of its own
        raise ValueError(f'{wanted} ({error.strerror or error}): check the path') from None
    except Exception as error:  # foreign bytes make the unpickler raise anything
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f'{wanted} ({reason}): download it again, or pass another file') from None

    # The content comes from outside, so nothing about its type is known yet.
    state = content
    if isinstance(content, dict):
        state = content.get('model', content)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f'{wanted}: it holds something else than tensors by name; pass the file of the '
                         'weights alone')
    return state


class AutoencoderKL(Tokenizer):
    """Encoder, normal posterior, decoder; the tokens are `latent_BZhw`, a scaled sample of the posterior.

    Args:
        embed_dim: Z.
        ch_mult: width of each level as a multiple of `ch`; the stride is 2 ** (levels - 1).
        use_variational: False gives a plain autoencoder, without noise and without a divergence.
        ckpt_path: file of published weights to load, see `read_weights`.
        ch: width of the first level, a multiple of 32.
        num_res_blocks: residual blocks per encoder level; each decoder level has one more.
        decoder_attn: attention at the decoder's deepest level; the published weights have none there.
        scaling_factor: samples of the posterior are multiplied by it to give latents; see `calibrate`.
        kl_weight: weight of one nat of divergence in a loss that sums over all pixels.
        net: 'published' or 'tiny', see `build_encoder_decoder`.
        latent_mean, latent_std: mean and standard deviation of each of the Z channels of unscaled samples;
            `calibrate` measures them, None means that it has not been called.
        test_mode: eval mode with every parameter frozen, as a generator uses it.
    Raises:
        ValueError: the file at `ckpt_path` cannot be read or holds another architecture.
    """

    measured_settings = ('scaling_factor',)
    headline = {'rec': 'rec_loss', 'lat': 'latent_loss', 'psnr': 'psnr', 'kl': 'kl'}
    legend = ('rec is the loss of the reconstruction, lat the weighted KL divergence, psnr the PSNR of '
              'the reconstruction in dB, kl the KL divergence of an image in nats')
    vocab_size = None
    needs_calibration = True

    def __init__(
        self,
        embed_dim: int = 16,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        use_variational: bool = True,
        ckpt_path: str | None = None,
        ch: int = 128,
        num_res_blocks: int = 2,
        decoder_attn: bool = False,
        scaling_factor: float = 0.2325,
        kl_weight: float = 1e-6,
        net: str = 'published',
        latent_mean: Sequence[float] | None = None,
        latent_std: Sequence[float] | None = None,
        test_mode: bool = False,
    ):
        super().__init__()
        self.channels = embed_dim
        self.use_variational = use_variational
        self.kl_weight = kl_weight
        self.scaling_factor = scaling_factor
        self.latent_mean = latent_mean
        self.latent_std = latent_std
        # divergence of each channel at the last step, in nats; None while the alarm is off
        self.kl_Z: torch.Tensor | None = None
        self.dead_channels: list[int] = []

        # The encoder emits the moments of the posterior: Z means, then Z log-variances.
        num_moments = embed_dim
        if use_variational:
            num_moments = 2 * embed_dim
        self.encoder, self.decoder = build_encoder_decoder(
            net,
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            z_channels=embed_dim,
            encoder_channels=num_moments,
            decoder_attn=decoder_attn,
            layout=KL_LAYOUT,
        )
        self.stride = self.encoder.stride
        self.quant_conv = nn.Conv2d(num_moments, num_moments, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)

        self.init_weights()
        if ckpt_path is not None:
            load_weights(self, read_weights(ckpt_path), repr(ckpt_path))
        if test_mode:
            self.eval().requires_grad_(False)

    def init_weights(self) -> None:
        """Set all weights, since a caller may have switched off the layers' own `reset_parameters`.

        The posterior starts narrow: at unit width its noise would drown the small first latents.
        """
        init_convolutions(self)
        start_as_identity(self.quant_conv, self.post_quant_conv)
        if self.use_variational:
            nn.init.constant_(self.encoder.conv_out.bias[self.channels:], FIRST_LOGVAR)

    # ------------------------------------------------------------------------------ inference
    def moments(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Means and log-variances (B, 2 Z, h, w) of the unscaled latent, in float32 under any autocast."""
        h = self.encoder(images_B3HW)                                                      # (B, 2 Z, h, w)
        return in_float32(self.quant_conv, h)                                              # (B, 2 Z, h, w)

    @torch.no_grad()
    def precompute(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """The moments (B, 2 Z, h, w): from them, `encode` draws a new latent at every call."""
        self.check_size(images_B3HW)
        return self.moments(images_B3HW)

    def posterior(self, images_B3HW: torch.Tensor) -> Posterior:
        """Distribution of the unscaled latent of images (B, 3, H, W) in [-1, 1]."""
        return self._posterior_of_moments(self.moments(images_B3HW))

    def _posterior_of_moments(self, moments: torch.Tensor) -> Posterior:
        if not self.use_variational:
            return Posterior(moments)
        mean_BZhw, logvar_BZhw = moments.chunk(2, dim=1)
        return Posterior(mean_BZhw, logvar_BZhw)

    def encode(self, images_B3HW: torch.Tensor, *args) -> torch.Tensor:
        """As `Tokenizer.encode`; what `precompute` returned is accepted in place of images."""
        # Moments are told from images by their number of channels.
        if images_B3HW.shape[1] == self.quant_conv.out_channels:
            posterior = self._posterior_of_moments(images_B3HW.float())
            return self.scaling_factor * posterior.sample()
        return super().encode(images_B3HW, *args)

    def _encode(self, images_B3HW: torch.Tensor, mode: bool = False) -> torch.Tensor:
        """Scaled latent (B, Z, h, w): a sample of the posterior, or its mean if `mode`."""
        posterior = self.posterior(images_B3HW)
        z_BZhw = posterior.mode() if mode else posterior.sample()
        return self.scaling_factor * z_BZhw

    def encode_mode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """As `encode`, but the scaled mean of the posterior (B, Z, h, w) in place of a sample."""
        return self.encode(images_B3HW, True)

    def pixels(self, z_BZhw: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) of unscaled latents, in float32 and not clamped."""
        h_BZhw = in_float32(self.post_quant_conv, z_BZhw)
        return at_least_float32(self.decoder(h_BZhw))                                      # (B, 3, H, W)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] of scaled latents (B, Z, h, w)."""
        z_BZhw = tokens / self.scaling_factor
        return self.pixels(z_BZhw).clamp_(-1, 1)

    def progressive(self, images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        latent_BZhw = self.encode_mode(images_B3HW)
        h, w = latent_BZhw.shape[2:]
        return {f'{h}x{w}': self.decode(latent_BZhw)}

    # ------------------------------------------------------------------------------ training
    def reconstruct(self, images_B3HW: torch.Tensor, progress: float = 1.) -> Reconstruction:
        """As `Tokenizer.reconstruct`; the latent loss is the divergence times kl_weight / (3 H W)."""
        self.check_size(images_B3HW)

        # Training decodes a sample of the posterior, evaluation its mean: a validation without noise.
        posterior = self.posterior(images_B3HW)
        z_BZhw = posterior.sample() if self.training else posterior.mode()                 # (B, Z, h, w)
        rec_B3HW = self.pixels(z_BZhw)

        # The published loss sums the error over all values of an image and adds kl_weight * divergence. The
        # pixel losses here are means over these values, so the divergence is divided by their number, too.
        kl = posterior.kl().mean()
        latent_loss = self.kl_weight / images_B3HW[0].numel() * kl

        with torch.no_grad():
            # Too strong a pull towards the unit normal shows in channels whose divergence drops to zero. At
            # the start of training all channels are still near it, so nobody is alarmed then.
            kl_Z = posterior.elementwise_kl().mean((0, 2, 3))
            alarm = torch.zeros((), device=kl_Z.device)
            self.kl_Z = None
            if self.use_variational and progress > ALARM_AFTER:
                self.kl_Z = kl_Z
                alarm = (kl_Z.min() < DEAD_CHANNEL).float()
            parts = dict(kl=kl.detach(), posterior_std=posterior.std.mean(), alarm_collapse=alarm)
            for c in range(self.channels):
                parts[f'kl_channel_{c}'] = kl_Z[c]
        return Reconstruction([(images_B3HW, rec_B3HW)], latent_loss, parts, {})

    @torch.no_grad()
    def calibrate(self, batches: Iterable[torch.Tensor]) -> None:
        """Set scaling_factor = 1 / std of samples, and latent_mean and latent_std, from training images.

        A generator then learns latents of nearly unit variance (arXiv 2112.10752, App. G). No sample is
        drawn: E[z] = mean and E[z^2] = mean^2 + std^2 are known for every value of the posterior.

        Args:
            batches: images (B, 3, H, W) in [-1, 1] of this rank. Every rank calls this method, and the images
                of all ranks count.
        Raises:
            ValueError: no rank has an image.
        """
        # Number of values, sum of E[z] and sum of E[z^2] of each channel. float64, because the variance below
        # is a difference of large sums.
        device = self.quant_conv.weight.device
        sums_3Z = torch.zeros(3, self.channels, dtype=torch.float64, device=device)
        with torch.autocast(device.type, enabled=False):
            for images_B3HW in batches:
                posterior = self.posterior(at_least_float32(images_B3HW.to(device)))
                mean_BZhw = posterior.mean.double()
                var_BZhw = posterior.std.double().square()
                square_BZhw = mean_BZhw.square() + var_BZhw
                values_3BZhw = torch.stack([torch.ones_like(mean_BZhw), mean_BZhw, square_BZhw])
                sums_3Z += values_3BZhw.sum((1, 3, 4))
        dist.allreduce(sums_3Z)
        if not sums_3Z[0].all():
            raise ValueError('calibration needs at least one image, got none: pass training images')
        count_Z, sum_Z, square_Z = sums_3Z

        # Mean and standard deviation of each channel, which a checkpoint records for its reader.
        mean_Z = sum_Z / count_Z
        var_Z = square_Z / count_Z - mean_Z.square()
        self.latent_mean = mean_Z.tolist()
        self.latent_std = var_Z.sqrt().tolist()

        # One factor for all channels, from the variance of all their values together, as published.
        mean = sum_Z.sum() / count_Z.sum()
        square = square_Z.sum() / count_Z.sum()
        self.scaling_factor = (square - mean.square()).rsqrt().item()

    def code_metrics(self) -> dict[str, float]:
        """Nothing beyond the parts of a reconstruction; logs a warning when further channels have died."""
        dead = []
        if self.kl_Z is not None:
            dead = (self.kl_Z < DEAD_CHANNEL).nonzero().flatten().tolist()
        has_newly_died = bool(set(dead) - set(self.dead_channels))
        if has_newly_died and dist.is_master():
            logger.warning('latent channels %s carry nothing: their divergence is below %g nats', dead,
                           DEAD_CHANNEL)
        self.dead_channels = dead
        return {}

    def training_state(self) -> dict[str, Any]:
        return dict(
            scaling_factor=self.scaling_factor,
            latent_mean=self.latent_mean,
            latent_std=self.latent_std,
        )

    def load_training_state(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    # ------------------------------------------------------------------------------ weights
    def config_state(self, progress: float) -> dict[str, Any]:
        """Constructor arguments that leave no trace in the state dict."""
        return self.training_state() | dict(kl_weight=self.kl_weight)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As in torch; weights of a loss network, which published files may hold, are left out.

        The dictionary that is passed in does not change.
        """
        weights = {key: value for key, value in state_dict.items() if not key.startswith('loss.')}
        return super().load_state_dict(weights, strict=strict, assign=assign)

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """All constructor arguments that shape the network; the rest is in `config_state`.

        Raises:
            ValueError: these are weights of a tokenizer with a codebook.
        """
        if 'quantize.embedding.weight' in state:
            raise ValueError('they have a codebook')
        embed_dim = state['post_quant_conv.weight'].shape[0]
        num_moments = state['quant_conv.weight'].shape[0]
        decoder_attn = any(key.startswith('decoder.up.') and '.attn.' in key for key in state)
        return dict(
            embed_dim=embed_dim,
            use_variational=num_moments == 2 * embed_dim,
            decoder_attn=decoder_attn,
            **read_encoder_decoder(state),
        )
