"""reAR: NPP reads contexts with wrong codes, and two of its layers point towards the vectors of the codes.

In sampling the context holds codes that the model has drawn wrongly, in plain training it never does. The
heads that compare hidden layers with the tokenizer's vectors are trained beside the model, and no part of it.
Letters: B batch, N codes of an image, M of them that are read, C width, Z channels of a code, 3HW image.
Source: arXiv 2510.04450.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from configs import GeneratorConfig
from models import NPP
from models.helpers import drop_labels, in_chunks
from models.noise import GlobalBatch
from objectives.base import Objective

HEAD_WIDTH = 2048
DECODE_AT = 0.75  # share of the blocks before the hidden layer that predicts: block 18 of 24, as published


def make_head(width: int, channels: int) -> nn.Sequential:
    """From a hidden layer to the vector of a code."""
    return nn.Sequential(
        nn.Linear(width, HEAD_WIDTH),
        nn.SiLU(),
        nn.Linear(HEAD_WIDTH, HEAD_WIDTH),
        nn.SiLU(),
        nn.Linear(HEAD_WIDTH, channels),
    )


def alignment_loss(encoded_BMZ: torch.Tensor, decoded_BNZ: torch.Tensor, code_BNZ: torch.Tensor,
                   is_replaced_BN: torch.Tensor) -> torch.Tensor:
    """- mean cos(encoded, code) - mean cos(decoded, code), both over all N codes.

    Args:
        encoded_BMZ: of the tokens that read the first M codes; one that read another code than the true one
            counts as 0, and so does one that is not read.
        decoded_BNZ: of the tokens that predict the codes.
        code_BNZ: vectors of the true codes.
        is_replaced_BN: where the code that is read is another one.
    """
    num_codes = code_BNZ.shape[1]
    num_read = encoded_BMZ.shape[1]
    read_BM = F.cosine_similarity(encoded_BMZ.float(), code_BNZ[:, :num_read].float(), dim=-1)
    read_BM = read_BM.masked_fill(is_replaced_BN[:, :num_read], 0.)
    predicted_BN = F.cosine_similarity(decoded_BNZ.float(), code_BNZ.float(), dim=-1)
    return -(read_BM.sum(1).mean() / num_codes + predicted_BN.mean())


@contextmanager
def outputs_of(*blocks: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside, what these blocks return is collected, in the order in which they are called."""
    outputs: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


class REAR(Objective):
    """`--objective=rear`: cross-entropy after noisy contexts, plus the alignment of two hidden layers.

    Phases whose patches are larger than one code train as ever.

    Args:
        noise_until: share of the training in which the noise falls to nothing.
    """

    headline = {'La': 'L_align'}
    legend = 'La is minus the cosines between two hidden layers and the vectors of the codes, from 2 to -2'

    def __init__(self, noise_until: float = 0.75):
        super().__init__()
        self.noise_until = noise_until

    @classmethod
    def from_config(cls, config: GeneratorConfig) -> 'REAR':
        return cls(config.rear_noise)

    def prepare(self, model: NPP, read_reference: Callable[[], NPP]) -> None:
        width = model.tok_embeddings.embedding_dim
        channels = model.tokenizer.channels
        heads = dict(encode=make_head(width, channels), decode=make_head(width, channels))
        self.heads = nn.ModuleDict(heads).to(model.device)

    def loss(self, model: NPP, images_B3HW: torch.Tensor, label_B: torch.Tensor,
             progress: float) -> tuple[torch.Tensor, dict[str, Any]]:
        if model.patch_side(progress) > 1:
            loss, aux = model.training_loss(images_B3HW, label_B, progress)
            # Ranks exchange gradients of all parameters, so the heads have one, which is 0.
            unused = sum(parameter.sum() for parameter in self.heads.parameters())
            return loss + 0. * unused, aux | dict(alignment=torch.zeros_like(aux['loss']))

        # 1. Labels and codes are replaced by the place of an image among those of all ranks; dropout follows,
        #    whose masks must differ between ranks.
        idx_BN = model.tokenizer.encode(images_B3HW)
        label_B = drop_labels(label_B, model.num_classes, model.class_dropout_prob)
        noisy_BN = self.with_noise(idx_BN, model.vocab_size, progress)
        GlobalBatch.current.reseed_per_rank()

        # 2. What is read is noisy, what is predicted is not.
        last = max(round(DECODE_AT * len(model.layers)), 1)
        with outputs_of(model.layers[0], model.layers[last - 1]) as outputs:
            x_BNC = model.before_head(label_B, noisy_BN)
        idx_NM = idx_BN.reshape(-1, 1)
        loss_NM, predicted_N = in_chunks(model.losses, model.vocab_size, x_BNC.flatten(0, 1), idx_NM)
        loss = loss_NM.mean()

        # 3. The first token is the class: a code is read one token later than it is predicted, and the last
        #    one is not read at all.
        first_BNC, late_BNC = outputs
        alignment = alignment_loss(
            self.heads['encode'](first_BNC[:, 1:]),
            self.heads['decode'](late_BNC),
            model.tokenizer.quantize.get_codebook_entry(idx_BN),
            noisy_BN != idx_BN,
        )
        hit_NM = predicted_N[:, None] == idx_NM
        aux = dict(loss=loss.detach(), hit=hit_NM, p=1, num_tokens=idx_BN.shape[1],
                   alignment=alignment.detach())
        return loss + alignment, aux

    def with_noise(self, idx_BN: torch.Tensor, vocab_size: int, progress: float) -> torch.Tensor:
        """The codes, of which some are random ones: of each image a share that is drawn for it.

        This share is uniform between 0 and a limit that falls from 1 to 0, linearly with the steps.
        """
        B, N = idx_BN.shape
        limit = max(1 - progress / self.noise_until, 0.) if self.noise_until else 0.
        drawn = GlobalBatch.current.per_image(B, idx_BN.device, lambda t: t.uniform_(), (1 + 2 * N,))
        share_B1, place_BN, code_BN = drawn.split([1, N, N], dim=1)
        random_BN = (code_BN * vocab_size).long().clamp_(max=vocab_size - 1)
        return torch.where(place_BN < limit * share_B1, random_BN, idx_BN)

    def metrics(self, model: NPP, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        return model.metrics(aux) | dict(L_align=aux['alignment'])

    def flops(self, flops_of_image: Callable[[int], int], aux: dict[str, Any]) -> int:
        """The heads too, where they are used."""
        num_codes = aux['num_tokens'] if aux['p'] == 1 else 0
        num_weights = sum(parameter.numel() for parameter in self.heads.parameters())
        return super().flops(flops_of_image, aux) + 6 * num_weights * num_codes
