"""What keeps a codebook alive: moving averages, restart of dead codes, k-means start, usage and its alarm.

Letters: V vocabulary, Z code channels, B batch, l codes of a scale, N queries of a scale.
Source: EMA codebook of arXiv 1711.00937 App. A.1; restart candidates are drawn equally from every scale,
since in a pyramid 1 token of 680 is the 1x1 one and a uniform pool would serve the finest scale only.
"""
import copy
import logging
import math

import torch
from torch import nn

import dist
from models.precision import float32_matmul
from models.tokenizers.usage import CodeUsage

logger = logging.getLogger(__name__)

GAMMA = 0.99              # decay of the averages per step
CHECK_EVERY = 20          # steps between two looks for dead codes
MAX_REPLACED = 0.1        # share of the codebook replaced per look
MIN_PATIENCE = 30         # steps without a hit after which a code is dead, at least ...
PATIENCE_TOKENS = 56      # ... and until this many tokens per code have been seen
STOP_AT = 0.8             # no restart in the last fifth of training
EPS = 1e-7                # a code with a smaller average count keeps its vector
WINDOW = 100              # steps per usage figure
ALARM_AFTER = 500         # steps of quantised training before the first alarm
# lowest perplexity / reachable codes of a scale
HEALTHY = 0.1
HEALTHY_1X1 = 0.05
POINTS_PER_CENTRE = 256   # k-means needs no more
PART = 2 ** 16            # queries compared with all centres at once
CHECKSUM_EVERY = 1000     # steps between two comparisons of the codebook over ranks


class CodebookUpkeep:
    """Counts how the codes are used, and moves those that a gradient does not.

    It is no module: nothing of it is part of the exported weights. Every rank holds the same state.

    Args:
        embedding: the codebook.
        ema: move every code to the running mean of the queries that chose it; it then gets no gradient.
        restart: put queries in the place of codes that nothing has chosen for a long time.
        rows: the part of `embedding` that this codebook is.
    """

    def __init__(self, embedding: nn.Embedding, ema: bool = True, restart: bool = True,
                 rows: slice = slice(None)):
        self.embedding = embedding
        self.ema = ema
        self.restart = restart
        self.rows = rows
        if ema:
            embedding.weight.requires_grad_(False)
        self.vocab_size = len(embedding.weight[rows])
        self.count_V: torch.Tensor | None = None  # running count of hits
        self.sum_VZ: torch.Tensor | None = None   # running sum of the queries of each code
        self.age_V: torch.Tensor | None = None    # steps since the last hit
        self.hit_KV: torch.Tensor | None = None   # hits of the last step, of all ranks
        self.step = 0
        self.num_restarts = 0
        self.window = CodeUsage(self.vocab_size)
        self.last_window = CodeUsage(self.vocab_size)
        self.best_share: dict[str, float] = {}  # highest perplexity / reachable codes of each scale so far
        self.collapsed: list[str] = []          # scales that the last window found collapsed
        self._codes: list[dict[str, torch.Tensor]] = []
        self._queries: list[dict[str, torch.Tensor]] = []

    @property
    def weight_VZ(self) -> torch.Tensor:
        """The codes, to be written in place."""
        return self.embedding.weight.data[self.rows]

    def begin(self) -> None:
        """Start the averages from the codes as they are."""
        weight_VZ = self.weight_VZ
        self.count_V = weight_VZ.new_ones(self.vocab_size)
        self.sum_VZ = weight_VZ.clone()
        self.age_V = torch.zeros(self.vocab_size, dtype=torch.int64, device=weight_VZ.device)

    def observe(self, codes: dict[str, torch.Tensor], queries: dict[str, torch.Tensor]) -> None:
        """Record one micro-batch for the next `update`.

        Args:
            codes: by the name of the scale, (B, l) int64.
            queries: what was quantised, (B * l, Z) in the order of the codes.
        """
        self._codes.append(codes)
        self._queries.append({name: query_NZ.detach() for name, query_NZ in queries.items()})

    def forget(self) -> None:
        """Drop what was observed since the last update, which was of a step that is not finite."""
        self._codes.clear()
        self._queries.clear()

    @torch.no_grad()
    def update(self, progress: float) -> dict[nn.Parameter, torch.Tensor]:
        """Apply all that was observed since the last call; once per optimizer step, on every rank.

        Args:
            progress: share of the training done, in [0, 1]; restarts end at `STOP_AT`.
        Returns:
            indices of the rows that were restarted, by parameter.
        """
        if not self._codes:
            return {}
        if self.count_V is None:
            self.begin()
        # All micro-batches of the step, and the hits of all ranks.
        codes = _joined(self._codes)
        queries = _joined(self._queries)
        self._codes.clear()
        self._queries.clear()
        count_KV, sum_VZ = self._global_statistics(codes, queries)
        count_V = count_KV.sum(0)
        self.hit_KV = count_KV
        for name, scale_count_V in zip(codes, count_KV.long(), strict=True):
            self.window.counts[name] = self.window.counts.get(name, 0) + scale_count_V

        # Every code moves to the running mean of its queries (arXiv 1711.00937, App. A.1); one that has had
        # hardly any stays where it is.
        if self.ema:
            self.count_V.mul_(GAMMA).add_(count_V, alpha=1 - GAMMA)
            self.sum_VZ.mul_(GAMMA).add_(sum_VZ, alpha=1 - GAMMA)
            moved_VZ = self.sum_VZ / self.count_V.clamp_min(EPS)[:, None]
            self.weight_VZ.copy_(torch.where(self.count_V[:, None] > EPS, moved_VZ, self.weight_VZ))

        # Figures of usage, and the watch over ranks that drift apart.
        self.age_V = torch.where(count_V > 0, 0, self.age_V + 1)
        self.step += 1
        if self.step % WINDOW == 0:
            self._close_window()
        if self.step % CHECKSUM_EVERY == 0:
            self._compare_ranks()

        # Now and then dead codes are replaced, but not near the end, where they could not settle.
        is_due = self.restart and self.step % CHECK_EVERY == 0 and progress < STOP_AT
        if not is_due:
            return {}
        dead = self._restart_dead(queries, tokens_per_step=count_V.sum().item())
        if len(dead) == 0:
            return {}
        first_row = self.rows.start or 0
        return {self.embedding.weight: first_row + dead}

    def _global_statistics(self, codes: dict[str, torch.Tensor],
                           queries: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(hits per scale and code (K, V), sum of the queries of each code (V, Z)) of all ranks."""
        sum_VZ = torch.zeros_like(self.weight_VZ)
        if self.ema:
            sum_VZ.index_add_(0, torch.cat([idx.flatten() for idx in codes.values()]),
                              torch.cat(list(queries.values())))
        hits_N = torch.cat([idx.flatten() + k * self.vocab_size for k, idx in enumerate(codes.values())])
        count_KV = sum_VZ.new_zeros(len(codes), self.vocab_size)
        count_KV.view(-1).index_add_(0, hits_N, count_KV.new_ones(len(hits_N)))
        both = torch.cat([count_KV.flatten(), sum_VZ.flatten()])
        dist.allreduce(both)
        return both[:count_KV.numel()].view_as(count_KV), both[count_KV.numel():].view_as(sum_VZ)

    # ------------------------------------------------------------------------------ restart
    def _restart_dead(self, queries: dict[str, torch.Tensor], tokens_per_step: float) -> torch.Tensor:
        """Put queries of this step in the place of dead codes; returns the codes replaced."""
        # A code is dead if it had no hit in so many tokens that an even use would have brought it several.
        patience = max(MIN_PATIENCE, math.ceil(PATIENCE_TOKENS * self.vocab_size / tokens_per_step))
        dead = (self.age_V >= patience).nonzero().flatten()
        # Those that are dead for longest come first; a few at a time keep the decoder from losing track.
        dead = dead[self.age_V[dead].argsort(descending=True, stable=True)]
        dead = dead[:max(1, int(MAX_REPLACED * self.vocab_size))]
        if len(dead) == 0:
            return dead
        # They begin anew where queries of this step are, with the average of an ordinary code.
        candidates = balanced_candidates(list(queries.values()), len(dead))
        dead = dead[:len(candidates)]
        self.count_V[dead] = self.count_V.mean()
        self.sum_VZ[dead] = candidates * self.count_V[dead, None]
        self.weight_VZ[dead] = candidates
        self.age_V[dead] = 0
        self.num_restarts += len(dead)
        return dead

    def _compare_ranks(self) -> None:
        checksums = dist.allgather(self.weight_VZ.double().sum().view(1))
        if not torch.equal(checksums, checksums[:1].expand_as(checksums)):
            raise ValueError(f'the codebooks of the ranks differ (sums {checksums.tolist()}): '
                             'restart from the last checkpoint')

    # ------------------------------------------------------------------------------ usage
    def _close_window(self) -> None:
        """Take the figures of the last steps, and warn of a scale that lives on few codes."""
        self.last_window = self.window
        self.window = CodeUsage(self.vocab_size)
        values = self.last_window.metrics()
        before = self.collapsed
        self.collapsed = []
        for name, count_V in self.last_window.counts.items():
            reachable = min(self.vocab_size, int(count_V.sum()))
            share = values[f'perplexity_{name}'] / reachable
            best = self.best_share[name] = max(share, self.best_share.get(name, 0.))
            lowest = max(HEALTHY_1X1 if name == '1x1' else HEALTHY, best / 2)
            if self.step >= ALARM_AFTER and share < lowest:
                self.collapsed.append(name)
                if name not in before and dist.is_master():
                    logger.warning('codebook collapse at scale %s: perplexity %.1f of %d reachable codes '
                                   '(best so far %.1f)', name, share * reachable, reachable, best * reachable)

    def metrics(self) -> dict[str, float]:
        """Figures of the last full window (of the first one while it lasts), restarts so far, the alarm."""
        window = self.last_window if self.last_window.counts else self.window
        return window.metrics() | dict(restarts=self.num_restarts, alarm_collapse=float(bool(self.collapsed)))

    def counts(self) -> dict[str, torch.Tensor]:
        """Hits (V,) per scale of the last full window."""
        return (self.last_window if self.last_window.counts else self.window).counts

    # ------------------------------------------------------------------------------ state
    def state_dict(self) -> dict:
        state = {name: getattr(self, name) for name in
                 ('count_V', 'sum_VZ', 'age_V', 'step', 'num_restarts', 'best_share', 'collapsed')}
        return state | dict(window=self.window.state_dict(), last_window=self.last_window.state_dict())

    def load_state_dict(self, state: dict) -> None:
        device = self.embedding.weight.device
        for name, value in copy.deepcopy(state).items():  # some of it changes in place
            if name in ('window', 'last_window'):
                getattr(self, name).load_state_dict({scale: count.to(device)
                                                     for scale, count in value.items()})
            else:
                setattr(self, name, value.to(device) if isinstance(value, torch.Tensor) else value)


def _joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Micro-batches as one batch."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def balanced_candidates(queries: list[torch.Tensor], count: int) -> torch.Tensor:
    """(<= count, Z) queries of the global batch, equally many from every scale, the same on every rank.

    All ranks draw the same positions from the global generator, each adds the rows it owns, and a sum
    collects them; so the choice does not depend on the number of ranks.

    Args:
        queries: (N, Z) of this rank per scale; N is equal on all ranks.
    """
    per_scale, extra = divmod(count, len(queries))
    chosen = []
    rank = dist.get_rank()
    for k, query_NZ in enumerate(queries):
        num_local = len(query_NZ)
        num_picks = per_scale + 1 if k < extra else per_scale
        pick = torch.randperm(num_local * dist.get_world_size())[:num_picks] - rank * num_local
        rows = query_NZ.new_zeros(len(pick), query_NZ.shape[1])
        mine = (pick >= 0) & (pick < num_local)
        rows[mine.to(rows.device)] = query_NZ[pick[mine].to(rows.device)]
        chosen.append(rows)
    candidates = torch.cat(chosen)
    dist.allreduce(candidates)
    return candidates


def squared_distances(query_NZ: torch.Tensor, code_VZ: torch.Tensor) -> torch.Tensor:
    """(N, V) between queries and codes, |q|^2 + |c|^2 - 2 qc."""
    # Near-equal distances must not be decided by TF32.
    with float32_matmul():
        distance_NV = query_NZ.square().sum(1, keepdim=True) + code_VZ.square().sum(1)
        return distance_NV.addmm_(query_NZ, code_VZ.T, alpha=-2)


def nearest(query_NZ: torch.Tensor, centre_VZ: torch.Tensor) -> torch.Tensor:
    """(N,) index of the closest centre, in parts that fit into memory."""
    return torch.cat([squared_distances(part_NZ, centre_VZ).argmin(1) for part_NZ in query_NZ.split(PART)])


def kmeans(query_NZ: torch.Tensor, num_centres: int, iterations: int = 10) -> torch.Tensor:
    """(num_centres, Z) centres of Lloyd's algorithm, started from queries drawn by the global generator.

    An empty cluster keeps its centre. Fewer queries than centres are repeated: restarts mend that later.
    """
    drawn = torch.randperm(len(query_NZ))[:POINTS_PER_CENTRE * num_centres]
    query_NZ = query_NZ[drawn.to(query_NZ.device)]
    centre_VZ = query_NZ[torch.arange(num_centres, device=query_NZ.device) % len(query_NZ)].clone()
    for _ in range(iterations):
        nearest_N = nearest(query_NZ, centre_VZ)
        count_V = torch.bincount(nearest_N, minlength=num_centres)
        sum_VZ = torch.zeros_like(centre_VZ).index_add_(0, nearest_N, query_NZ)
        filled_V = count_V > 0
        centre_VZ[filled_V] = sum_VZ[filled_V] / count_V[filled_V, None]
    return centre_VZ
