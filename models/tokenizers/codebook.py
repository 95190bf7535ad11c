"""Codebook learned by moving averages, with restart of dead codes: the two measures that stop collapse.

Letters: V vocabulary, Z code channels, N queries of a scale, K scales.
Source: EMA codebook of arXiv 1711.00937 App. A.1; restart candidates are drawn equally from every scale,
since in a pyramid 1 token of 680 is the 1x1 one and a uniform pool would serve the finest scale only.
"""
import math

import torch
from torch import nn

import dist

GAMMA = 0.99           # decay of the averages per step
CHECK_EVERY = 20       # steps between two looks for dead codes
MAX_REPLACED = 0.1     # share of the codebook replaced per look
MIN_PATIENCE = 30      # steps without a hit after which a code is dead, at least ...
PATIENCE_TOKENS = 56   # ... and until this many tokens per code have been seen
STOP_AT = 0.8          # no restart in the last fifth of training
EPS = 1e-7             # a code with a smaller average count keeps its vector


class CodebookEMA:
    """Moves `embedding.weight` to the running mean of the queries that chose each code.

    It is no module: nothing of it is part of the exported weights. Every rank holds the same state.
    """

    def __init__(self, embedding: nn.Embedding):
        self.embedding = embedding
        embedding.weight.requires_grad_(False)
        self.count_V = self.sum_VZ = self.age_V = None  # running counts and sums; steps since the last hit
        self.step = 0
        self.num_restarts = 0
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._queries: list[torch.Tensor] = []

    def _ensure_state(self) -> None:
        if self.count_V is None:
            weight = self.embedding.weight
            self.count_V, self.sum_VZ = weight.new_ones(len(weight)), weight.detach().clone()
            self.age_V = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)

    def observe(self, queries: list[torch.Tensor], codes: list[torch.Tensor]) -> None:
        """Note one micro-batch: per scale the queries (N, Z) and the codes (N,) they chose."""
        self._pending.append((torch.cat(queries), torch.cat(codes)))
        self._queries = queries

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """Apply all that was observed since the last call; once per optimizer step, on every rank.

        Args:
            progress: share of the training done, in [0, 1]; restarts end at `STOP_AT`.
        """
        if not self._pending:
            return
        self._ensure_state()
        weight = self.embedding.weight
        stats = torch.zeros(len(weight), weight.shape[1] + 1, device=weight.device)  # (V, Z sums + 1 count)
        for query_NZ, code_N in self._pending:
            stats.index_add_(0, code_N, torch.cat([query_NZ, torch.ones_like(query_NZ[:, :1])], dim=1))
        self._pending.clear()
        dist.allreduce(stats)
        sum_VZ, count_V = stats[:, :-1], stats[:, -1]
        self.count_V.mul_(GAMMA).add_(count_V, alpha=1 - GAMMA)
        self.sum_VZ.mul_(GAMMA).add_(sum_VZ, alpha=1 - GAMMA)
        alive = self.count_V > EPS
        weight[alive] = self.sum_VZ[alive] / self.count_V[alive, None]
        self.age_V = torch.where(count_V > 0, 0, self.age_V + 1)
        self.step += 1
        if self.step % CHECK_EVERY == 0 and progress < STOP_AT:
            self._restart_dead(tokens_per_step=count_V.sum().item())

    def _restart_dead(self, tokens_per_step: float) -> None:
        """Put queries of the current batch in the place of codes that nothing chose for a long time."""
        vocab_size = len(self.embedding.weight)
        patience = max(MIN_PATIENCE, math.ceil(PATIENCE_TOKENS * vocab_size / tokens_per_step))
        dead = (self.age_V >= patience).nonzero().flatten()
        dead = dead[self.age_V[dead].argsort(descending=True, stable=True)]
        dead = dead[:max(1, int(MAX_REPLACED * vocab_size))]
        if len(dead) == 0:
            return
        candidates = self._balanced_candidates(len(dead))
        dead = dead[:len(candidates)]
        self.count_V[dead] = self.count_V.mean()
        self.sum_VZ[dead] = candidates * self.count_V[dead, None]
        self.embedding.weight[dead] = candidates
        self.age_V[dead] = 0
        self.num_restarts += len(dead)

    def _balanced_candidates(self, count: int) -> torch.Tensor:
        """(<= count, Z) queries of the global batch, equally many from every scale, the same on every rank.

        All ranks draw the same positions from the global generator, each adds the rows it owns, and a sum
        collects them; so the choice does not depend on the number of ranks.
        """
        share, extra = divmod(count, len(self._queries))
        chosen, rank = [], dist.get_rank()
        for k, query_NZ in enumerate(self._queries):
            num_local = len(query_NZ)
            pick = torch.randperm(num_local * dist.get_world_size())[:share + (k < extra)] - rank * num_local
            rows = query_NZ.new_zeros(len(pick), query_NZ.shape[1])
            mine = (pick >= 0) & (pick < num_local)
            rows[mine.to(rows.device)] = query_NZ[pick[mine].to(rows.device)]
            chosen.append(rows)
        candidates = torch.cat(chosen)
        dist.allreduce(candidates)
        return candidates

    def state_dict(self) -> dict:
        self._ensure_state()
        return {name: getattr(self, name) for name in ('count_V', 'sum_VZ', 'age_V', 'step', 'num_restarts')}

    def load_state_dict(self, state: dict) -> None:
        device = self.embedding.weight.device
        for name, value in state.items():
            setattr(self, name, value.to(device) if isinstance(value, torch.Tensor) else value)
