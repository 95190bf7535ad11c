"""What all families need to sample and to train: filters of logits, guidance, label dropout and drop path.

Letters: B batch, L sequence, l tokens of one scale, N rows (B * L), C width, V vocabulary.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.noise import GlobalBatch, ImageNoise, Rng, exponential_like

SOFTMAX_BLOCK = 128       # terms that a softmax on the CPU adds at a time
LOGITS_AT_ONCE = 2 ** 26  # of a training loss: 256 MiB in float32


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
    # With both limits the nucleus lies within the top k, so that sorting those is enough.
    if top_k > 0 and top_p > 0:
        candidates = top_candidates(logits_BlV, top_k, top_p)
        if candidates is not None:
            return logits_BlV.fill_(-torch.inf).scatter_(-1, candidates.index_Blk, candidates.logits_Blk)
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


class Candidates(NamedTuple):
    """The codes that a draw may choose from."""
    logits_Blk: torch.Tensor  # -inf outside the nucleus
    index_Blk: torch.Tensor   # numbers of the codes, int64


def top_candidates(logits_BlV: torch.Tensor, top_k: int, top_p: float = 0.) -> Candidates | None:
    """The top k codes of each token, and among them the nucleus; see `filter_top_k_top_p_`.

    Returns:
        None where a code outside the top k is as likely as the last one inside, for which all of these count.
    """
    # Ascending, as the nucleus is cut from its lower end.
    logits_Blk, index_Blk = (t.flip(-1) for t in logits_BlV.topk(top_k))
    smallest_kept = logits_Blk[..., :1]
    if ((logits_BlV >= smallest_kept).sum(-1) > top_k).any():
        return None
    if top_p > 0:
        # A softmax over the whole vocabulary adds its terms block by block. Padding gives these terms the
        # same places within the blocks, and so the sum that a sort of all codes would give, to the last bit.
        num_before = (logits_BlV.shape[-1] - top_k) % SOFTMAX_BLOCK
        padded_Blk = F.pad(logits_Blk, (num_before, 0), value=-torch.inf)
        remove_Blk = padded_Blk.softmax(-1).cumsum_(-1)[..., num_before:] <= 1 - top_p
        remove_Blk[..., -1] = False
        logits_Blk = logits_Blk.masked_fill(remove_Blk, -torch.inf)
    return Candidates(logits_Blk, index_Blk)


def draw_codes(logits_BlV: torch.Tensor, top_k: int = 0, top_p: float = 0., rng: Rng = None) -> torch.Tensor:
    """(B, l) int64, a code for each token, drawn from the filtered logits, which stay as they are.

    They are the codes that `sample_with_top_k_top_p_` draws. With a top k and `ImageNoise`, only the noise of
    those that may be chosen is made.
    """
    B, l, V = logits_BlV.shape
    is_limited = 0 < top_k < V and isinstance(rng, ImageNoise)
    candidates = top_candidates(logits_BlV, top_k, top_p) if is_limited else None
    if candidates is None:
        return sample_with_top_k_top_p_(logits_BlV.clone(), top_k, top_p, rng)[:, :, 0]

    # The largest ratio of probability to exponential noise is a draw from the distribution.
    probs_Blk = candidates.logits_Blk.softmax(-1)
    place_Blk = candidates.index_Blk + torch.arange(l, device=logits_BlV.device)[:, None] * V
    noise_Blk = rng.exponential_at(place_Blk.view(B, -1)).view_as(probs_Blk)
    choice_Bl1 = probs_Blk.div_(noise_Blk).argmax(-1, keepdim=True)
    return candidates.index_Blk.gather(-1, choice_Bl1)[:, :, 0]


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
def in_chunks(losses: Callable[..., tuple[torch.Tensor, ...]], logits_per_row: int,
              *inputs_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`losses` of all rows, so that their logits never exist all at once.

    The logits of a large batch are the largest tensors of a training step. They are made chunk by chunk, and
    once more in the backward pass, which costs a product with the head: about one percent of a step.

    Args:
        losses: from rows of the inputs to tensors with an entry (or more) per row.
        logits_per_row: that it makes.
        inputs_N: tensors of equal length N.
    """
    num_rows = max(1, LOGITS_AT_ONCE // logits_per_row)
    if len(inputs_N[0]) <= num_rows:
        return losses(*inputs_N)
    results = []
    for chunks in zip(*(t.split(num_rows) for t in inputs_N), strict=True):
        results.append(checkpoint(losses, *chunks, use_reentrant=False, preserve_rng_state=False))
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


class TokenLosses(NamedTuple):
    """What a training minimises and logs of every token."""
    loss_BL: torch.Tensor       # cross-entropy, smoothed where that is asked for
    plain_BL: torch.Tensor      # without smoothing and without gradient
    predicted_BL: torch.Tensor  # the likeliest code, int64


def token_losses(head: nn.Module, h_BLC: torch.Tensor, target_BL: torch.Tensor,
                 label_smoothing: float = 0.) -> TokenLosses:
    """Cross-entropy of the codes under the logits that `head` makes of the tokens before it.

    Torch's own `linear_cross_entropy` does not make whole logits either, but it does not tell the likeliest
    code, for which the product would be made twice.
    """
    def losses(h_NC: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits_NV = head(h_NC).float()
        loss_N = F.cross_entropy(logits_NV, target_N, label_smoothing=label_smoothing, reduction='none')
        with torch.no_grad():
            predicted_N = logits_NV.argmax(-1)
            plain_N = loss_N.detach()
            if label_smoothing:
                plain_N = F.cross_entropy(logits_NV, target_N, reduction='none')
        return loss_N, plain_N, predicted_N

    results = in_chunks(losses, head.out_features, h_BLC.flatten(0, 1), target_BL.flatten())
    return TokenLosses(*(t_N.view_as(target_BL) for t_N in results))


def drop_labels(labels_B: torch.Tensor, null_label: int, p: float) -> torch.Tensor:
    """Replace each label by `null_label` with probability p; even p = 0 draws from the global generator."""
    u_B = GlobalBatch.current.per_image(len(labels_B), labels_B.device, lambda t: t.uniform_())
    return labels_B.masked_fill(u_B < p, null_label)


class DropPath(nn.Module):
    """Drops a residual branch per image with probability `drop_prob`, rescales the rest; off in eval mode."""

    def __init__(self, drop_prob: float = 0.):
        super().__init__()
        self.drop_prob = drop_prob

    def weights(self, x: torch.Tensor) -> torch.Tensor | None:
        """(B, 1, ...) of the dimensions of x: 0 for images whose branch is dropped; None where it is off."""
        if self.drop_prob == 0. or not self.training:
            return None
        # A branch that survives is scaled up, so that its mean over many steps is that of evaluation.
        keep_prob = 1 - self.drop_prob
        weight_B = GlobalBatch.current.per_image(
            len(x), x.device, lambda t: t.to(x.dtype).bernoulli_(keep_prob).div_(keep_prob))
        return weight_B.view(-1, *[1] * (x.dim() - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return weighted(x, self.weights(x))

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:g}'


def weighted(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """x times the weights, where there are any."""
    return x if weights is None else x * weights
