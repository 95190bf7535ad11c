"""A fifth family and a sixth tokenizer, as somebody would add them: all of each is in this file.

`Histogram` predicts every code from the class and its place alone. `Patches` is an autoencoder of two layers.
docs/code.md walks through it.
"""
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from configs import GeneratorConfig, SampleConfig
from configs.options import opt, settings
from configs.tokenizers import SquareConfig
from models import ARModel, Reconstruction, Tokenizer
from models.helpers import drop_labels, guide, sample_with_top_k_top_p_


# ---------------------------------------------------------------------------------------------- a family
class Histogram(ARModel):
    """Codes (B, L) of a VQ tokenizer, each drawn from a distribution of its class and its place."""

    headline = {'Lm': 'L_mean'}
    selection = 'L_mean'

    def __init__(self, tokenizer: Tokenizer, num_classes: int, grid: int):
        super().__init__(tokenizer)
        self.num_classes = num_classes
        self.grid = grid
        self.class_emb = nn.Embedding(num_classes + 1, grid ** 2 * tokenizer.vocab_size)

    def init_weights(self) -> None:
        nn.init.zeros_(self.class_emb.weight)

    def forward(self, label_B: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, V)."""
        return self.class_emb(label_B).view(len(label_B), self.grid ** 2, -1)

    def training_loss(self, images_B3HW, label_B, progress=1.):
        code_BL = self.tokenizer.encode(images_B3HW)
        if self.training:
            label_B = drop_labels(label_B, self.num_classes, 0.1)
        loss = F.cross_entropy(self(label_B).flatten(0, 1), code_BL.flatten())
        return loss, dict(loss=loss.detach())

    def metrics(self, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        return dict(L_mean=aux['loss'])

    @property
    def native_side(self) -> int:
        return self.grid * self.tokenizer.stride

    @torch.no_grad()
    def sample(self, labels: Any, *, guidance: float, rng: Any, **options) -> torch.Tensor:
        label_B = self.as_labels(labels, len(labels), rng)
        null_B = torch.full_like(label_B, self.num_classes)
        logits_BLV = guide(self(label_B), self(null_B), guidance)
        code_BL = sample_with_top_k_top_p_(logits_BLV, rng=rng)[..., 0]
        return self.tokenizer.decode(code_BL).add(1).div(2)

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        return dict(num_classes=len(state['class_emb.weight']) - 1)

    def config_state(self, progress: float) -> dict[str, Any]:
        return dict(grid=self.grid)

    @staticmethod
    def kwargs_from_config(config: dict[str, Any]) -> dict[str, Any]:
        return dict(grid=config['grid'])


@settings(model='histogram')
class HistogramConfig(GeneratorConfig):
    vae_ckpt: str = opt('', 'tokenizer weights', path=True)
    image_size: int = opt(32, 'pixels per side of the training images')
    stride: int = opt(8, 'pixels per side of a code')

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        return dict(grid=self.image_size // self.stride)


@settings(model='histogram')
class HistogramSampleConfig(SampleConfig):
    def sample_kwargs(self) -> dict[str, Any]:
        return dict(guidance=self.cfg)


TRAINING, SAMPLING = HistogramConfig, HistogramSampleConfig
PRESETS = {'fast': dict(images_per_step=256, base_lr=1.)}
SAMPLE_PRESETS = {}


# ---------------------------------------------------------------------------------------------- a tokenizer
class Decoder(nn.ConvTranspose2d):
    """A layer from codes to pixels; losses that balance gradients ask for `last_layer`."""

    @property
    def last_layer(self) -> nn.Parameter:
        return self.weight


class Patches(Tokenizer):
    """Latents (B, Z, h, w) of patches of 8x8 pixels, by one linear layer each way."""

    headline = {'rec': 'rec_loss'}
    vocab_size = None
    stride = 8

    def __init__(self, channels: int = 4):
        super().__init__()
        self.channels = channels
        self.encoder = nn.Conv2d(3, channels, self.stride, self.stride)
        self.decoder = Decoder(channels, 3, self.stride, self.stride)

    def init_weights(self) -> None:
        for layer in (self.encoder, self.decoder):
            nn.init.orthogonal_(layer.weight)

    def _encode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return self.encoder(images_B3HW)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder(tokens)

    def reconstruct(self, images_B3HW: torch.Tensor, progress: float = 1.) -> Reconstruction:
        image_B3HW = self.decoder(self.encoder(images_B3HW))
        return Reconstruction([(images_B3HW, image_B3HW)], image_B3HW.new_zeros(()), {}, {})

    def progressive(self, images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        return {'all': self.decode(self.encode(images_B3HW))}

    @staticmethod
    def kwargs_from_state_dict(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        return dict(channels=len(state['encoder.weight']))


@settings(model='patches', side=32, net='tiny')
class PatchesConfig(SquareConfig):
    z_channels: int = opt(4, 'width of a code')

    def model_kwargs(self, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
        return dict(channels=self.z_channels)
