"""How evenly the codes of a codebook are used: exact counts per scale, over all ranks.

Letters: B batch, K scales, l tokens of one scale, V vocabulary.
"""
import torch

import dist


class CodeUsage:
    """Counts how often each code was used at each scale, and tells how even that use was.

    Args:
        vocab_size: V.
    Attributes:
        counts: how often each code was used, (V,) int64 on the device of the codes, by the name of the scale.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.counts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, codes: dict[str, torch.Tensor]) -> None:
        """Count codes.

        Args:
            codes: codes (B, l), int64 in [0, V), by the name of their scale, such as '16x16'.
        """
        for name, idx_Bl in codes.items():
            hits_V = torch.bincount(idx_Bl.flatten(), minlength=self.vocab_size)
            if name in self.counts:
                hits_V += self.counts[name].to(hits_V.device)
            self.counts[name] = hits_V

    def reduce(self) -> None:
        """Replace the counts of every rank by their sum over ranks.

        Every rank calls it, once before the next `clear`. After it, scales are in natural order ('8x8' before
        '16x16').
        """
        # Ranks may have seen different scales, or none at all, so they agree on the names first.
        names_of_ranks = dist.allgather_object(list(self.counts))
        names = sorted(set().union(*names_of_ranks), key=lambda name: (len(name), name))
        if not names:
            return

        # One sum for all scales; a scale that this rank has not seen counts zero.
        device = dist.get_device()
        unseen_V = torch.zeros(self.vocab_size, dtype=torch.int64)
        total_KV = torch.stack([self.counts.get(name, unseen_V).to(device) for name in names])
        dist.allreduce(total_KV)
        self.counts = dict(zip(names, total_KV, strict=True))

    def clear(self) -> None:
        """Forget all counts."""
        self.counts = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The counts, by the name of their scale."""
        return dict(self.counts)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.counts = dict(state)

    def metrics(self) -> dict[str, float]:
        """Figures of every scale, with its name appended ('usage_16x16'), and of all scales together.

        Returns:
            distinct: number of codes that were used at least once.
            dead: number of codes that were never used, V - distinct.
            usage: distinct / min(V, number of tokens counted), in [0, 1].
            perplexity: exponential of the entropy of the code distribution, in [1, V].
            top10: fraction of the tokens that fall on the 10 most used codes (for each scale only).
        """
        metrics = {}
        for name, count_V in self.counts.items():
            count_V = count_V.cpu()
            figures = self._figures(count_V)
            most_used = count_V.topk(min(10, self.vocab_size)).values
            figures['top10'] = most_used.sum().item() / count_V.sum().item()
            for key, value in figures.items():
                metrics[f'{key}_{name}'] = value
        if self.counts:
            total_V = sum(count_V.cpu() for count_V in self.counts.values())
            metrics |= self._figures(total_V)
        return metrics

    def _figures(self, count_V: torch.Tensor) -> dict[str, float]:
        tokens = count_V.sum().item()
        distinct = count_V.count_nonzero().item()

        # A few tokens cannot use many codes, so usage is relative to what could have been reached.
        reachable = min(self.vocab_size, tokens)

        # Codes without a use contribute nothing to the entropy, and their logarithm does not exist.
        p_V = count_V[count_V > 0].double() / tokens
        entropy = p_V.log().mul(-p_V).sum()
        return dict(
            usage=distinct / reachable,
            perplexity=entropy.exp().item(),
            distinct=float(distinct),
            dead=float(self.vocab_size - distinct),
        )
