"""Sampling filters, guidance, label dropout, drop path; all that is random takes or names its generator.

Letters: B batch, l tokens of one scale, V vocabulary.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


# ---------------------------------------------------------------------------------------------- noise
class ImageNoise:
    """Noise that is a function of (seed, image index, draw, element) and of nothing else.

    Every image owns a SplitMix64 stream per draw (Steele et al., OOPSLA 2014), evaluated at all its counters
    at once: image i gets the same noise in any batch, rank and device. Pass it where a generator is taken.

    Args:
        seed: of the whole sampling job.
        index_B: number of each image of the batch in the job.
    """

    def __init__(self, seed: int, index_B: list[int]):
        self.seed = seed
        self.index_B = list(index_B)
        self.num_draws = 0

    def exponential_like(self, t: torch.Tensor) -> torch.Tensor:
        """Fresh float32 noise of t's shape and device; dim 0 is the image."""
        return self.uniform_like(t).log_().neg_()

    def normal_like(self, t: torch.Tensor) -> torch.Tensor:
        """As `exponential_like`, N(0, 1), by the inverse of its distribution function."""
        return self.uniform_like(t).mul_(2).sub_(1).erfinv_().mul_(2 ** 0.5)

    def uniform_like(self, t: torch.Tensor) -> torch.Tensor:
        """As `exponential_like`, uniform in (0, 1)."""
        keys = [np.random.SeedSequence([self.seed, i, self.num_draws]).generate_state(1, np.uint64)[0]
                for i in self.index_B]
        self.num_draws += 1
        key_B1 = torch.from_numpy(np.array(keys).view(np.int64)).to(t.device)[:, None]
        x = torch.arange(t[0].numel(), device=t.device).mul_(-0x61C8864680B583EB)[None] + key_B1
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            x.bitwise_xor_((x >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
        x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))
        # 23 high bits: adding 0.5 stays exact, so never 0 or 1; noise 0 would let removed codes win the draw
        return (x >> 41).bitwise_and_((1 << 23) - 1).float().add_(0.5).mul_(2. ** -23).view_as(t)


Rng = torch.Generator | ImageNoise | None


def exponential_like(t: torch.Tensor, rng: Rng) -> torch.Tensor:
    """Exponential(1) noise of t's shape from `rng`; None is torch's global generator."""
    if isinstance(rng, ImageNoise):
        return rng.exponential_like(t)
    return torch.empty_like(t, memory_format=torch.legacy_contiguous_format).exponential_(generator=rng)


def normal_like(t: torch.Tensor, rng: Rng) -> torch.Tensor:
    """N(0, 1) noise of t's shape from `rng`; None is torch's global generator."""
    if isinstance(rng, ImageNoise):
        return rng.normal_like(t)
    return torch.empty_like(t).normal_(generator=rng)


# (first row of this batch, rows) of the global batch; rows None: as many as here. The first row is a tensor,
# so that compiled code serves every micro-step
_rows = (torch.tensor(0, device='cpu'), None)


@contextmanager
def global_rows(start: int, total: int) -> Iterator[None]:
    """Inside, the batch is rows [start, start + B) of a global batch of `total` images.

    Per-image draws of training are then made for the whole global batch and cut, so that equal seeds on every
    rank give every image the same draws for any number of ranks and accumulation steps.
    """
    global _rows
    outer = _rows
    _rows = (torch.tensor(start, device='cpu'), total)
    try:
        yield
    finally:
        _rows = outer


def draw_rows(batch: int, device: torch.device, fill: Callable[[torch.Tensor], torch.Tensor],
              shape: tuple[int, ...] = ()) -> torch.Tensor:
    """(batch, *shape) numbers of this rank; `fill` draws them for the global batch into an empty tensor."""
    start, total = _rows
    drawn = fill(torch.empty(total or batch, *shape, device=device))
    return drawn if total is None else drawn[start + torch.arange(batch, device=device)]


def reseed_per_rank() -> None:
    """Inside `global_rows`: from here on torch's generators differ between ranks and micro-steps.

    For dropout: masks of a global batch would be too large to draw, and equal ones would average badly.
    """
    start, total = _rows
    if total is not None:
        torch.manual_seed(torch.randint(2 ** 62, (), device='cpu').item() + start.item())


# ---------------------------------------------------------------------------------------------- sampling
def filter_top_k_top_p_(logits_BlV: torch.Tensor, top_k: int = 0, top_p: float = 0.) -> torch.Tensor:
    """Set the logits outside the top-k and then outside the top-p nucleus to -inf, in place.

    Args:
        top_k: 0 is off; entries tied with the k-th largest stay.
        top_p: 0 (or >= 1) is off; the largest entry always stays.
    Raises:
        ValueError: top_k exceeds the vocabulary or is negative.
    """
    vocab_size = logits_BlV.shape[-1]
    if not 0 <= top_k <= vocab_size:
        raise ValueError(f'top_k must lie in 0..{vocab_size}, the size of the vocabulary, got {top_k}: '
                         'pass a smaller top_k, or 0 to switch it off')
    if top_k > 0:
        smallest_kept = logits_BlV.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        logits_BlV.masked_fill_(logits_BlV < smallest_kept, -torch.inf)
    if top_p > 0:
        ascending, order = logits_BlV.sort(dim=-1, descending=False)
        remove = ascending.softmax(-1).cumsum_(-1) <= 1 - top_p
        remove[..., -1] = False
        logits_BlV.masked_fill_(remove.scatter(-1, order, remove), -torch.inf)
    return logits_BlV


def filter_top_k_top_p(logits_BlV: torch.Tensor, top_k: int = 0, top_p: float = 0.) -> torch.Tensor:
    """`filter_top_k_top_p_` on a copy."""
    return filter_top_k_top_p_(logits_BlV.clone(), top_k, top_p)


def sample_with_top_k_top_p_(logits_BlV: torch.Tensor, top_k: int = 0, top_p: float = 0., rng: Rng = None,
                             num_samples: int = 1) -> torch.Tensor:
    """Filter the logits in place and draw codes.

    Args:
        num_samples: draws per token, with replacement; a negative number draws |num_samples| without.
    Returns:
        (B, l, |num_samples|) int64.
    """
    probs_BlV = filter_top_k_top_p_(logits_BlV, top_k, top_p).softmax(-1)
    if isinstance(rng, ImageNoise):
        if num_samples != 1:
            raise ValueError('noise keyed by the image index draws one code per token, '
                             f'got num_samples={num_samples}')
        return probs_BlV.div_(rng.exponential_like(probs_BlV)).argmax(-1, keepdim=True)
    B, l, V = probs_BlV.shape
    idx = torch.multinomial(probs_BlV.view(-1, V), abs(num_samples), replacement=num_samples >= 0,
                            generator=rng)
    return idx.view(B, l, abs(num_samples))


def gumbel_softmax_with_rng(logits: torch.Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10,
                            dim: int = -1, rng: Rng = None) -> torch.Tensor:
    """Gumbel softmax (arXiv 1611.01144) with a generator; `hard` gives a straight-through one-hot.

    `eps` is accepted and unused, as in torch's own `gumbel_softmax`, which runs when `rng` is None.
    """
    if rng is None:
        return F.gumbel_softmax(logits, tau=tau, hard=hard, eps=eps, dim=dim)
    gumbels = -exponential_like(logits, rng).log()
    soft = ((logits + gumbels) / tau).softmax(dim)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.)
    return one_hot - soft.detach() + soft


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance: uncond + scale * (cond - uncond); scale 1 is the conditional alone."""
    return scale * cond - (scale - 1) * uncond


# ---------------------------------------------------------------------------------------------- training
def drop_labels(labels_B: torch.Tensor, null_label: int, p: float) -> torch.Tensor:
    """Replace each label by `null_label` with probability p; even p = 0 draws from the global generator."""
    dropped_B = draw_rows(len(labels_B), labels_B.device, lambda t: t.uniform_()) < p
    return labels_B.masked_fill(dropped_B, null_label)


class DropPath(nn.Module):
    """Drops a residual branch per image with probability `drop_prob`, rescales the rest; off in eval mode."""

    def __init__(self, drop_prob: float = 0.):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0. or not self.training:
            return x
        keep = 1 - self.drop_prob
        kept_B = draw_rows(len(x), x.device, lambda t: t.to(x.dtype).bernoulli_(keep).div_(keep))
        return x * kept_B.view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:g}'
