"""How evenly the codes of a codebook are used: exact counts per scale, over all ranks.

Letters: B batch, l tokens of one scale, V vocabulary.
"""
import torch

import dist


class CodeUsage:
    """Counts of codes by the name of their scale, and what follows from them.

    Args:
        vocab_size: V.
    Attributes:
        counts: (V,) int64 by name, on the device of the codes.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.counts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, codes: dict[str, torch.Tensor]) -> None:
        """Count codes (B, l), int64 in [0, V), by the name of their scale, such as '16x16'."""
        for name, idx_Bl in codes.items():
            hits_V = torch.bincount(idx_Bl.flatten(), minlength=self.vocab_size)
            if name in self.counts:
                hits_V += self.counts[name].to(hits_V.device)
            self.counts[name] = hits_V

    def reduce(self) -> None:
        """Replace the counts of every rank by their sum; every rank calls it, once before the next `clear`.

        Ranks may have seen different scales, or none; names are put in natural order ('8x8' before '16x16').
        """
        names = set().union(*dist.allgather_object(list(self.counts)))
        names = sorted(names, key=lambda name: (len(name), name))
        if not names:
            return
        device = dist.get_device()
        unseen_V = torch.zeros(self.vocab_size, dtype=torch.int64)
        total_KV = torch.stack([self.counts.get(name, unseen_V).to(device) for name in names])
        dist.allreduce(total_KV)
        self.counts = dict(zip(names, total_KV, strict=True))

    def clear(self) -> None:
        """Forget all counts."""
        self.counts = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.counts)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.counts = dict(state)

    def metrics(self) -> dict[str, float]:
        """Figures of every scale, with its name appended ('usage_16x16'), and of all scales together.

        Returns:
            distinct: codes seen at least once; dead: the others of V;
            usage: distinct / reachable, where reachable = min(V, tokens counted);
            perplexity: exp of the entropy of the code distribution, in [1, V];
            top10: share of the tokens that lie on the 10 most used codes (per scale only).
        """
        metrics = {}
        for name, count_V in self.counts.items():
            count_V = count_V.cpu()
            figures = self._figures(count_V)
            most_used = count_V.topk(min(10, self.vocab_size)).values
            figures['top10'] = most_used.sum().item() / count_V.sum().item()
            metrics |= {f'{key}_{name}': value for key, value in figures.items()}
        if self.counts:
            metrics |= self._figures(sum(count_V.cpu() for count_V in self.counts.values()))
        return metrics

    def _figures(self, count_V: torch.Tensor) -> dict[str, float]:
        tokens = count_V.sum().item()
        distinct = count_V.count_nonzero().item()
        p_V = count_V[count_V > 0].double() / tokens
        return dict(usage=distinct / min(self.vocab_size, tokens),
                    perplexity=p_V.log().mul(-p_V).sum().exp().item(),
                    distinct=float(distinct), dead=float(self.vocab_size - distinct))
