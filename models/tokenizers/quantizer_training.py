"""What keeps the training of the multi-scale quantizer from collapse; nothing of it is part of the weights.

Trained by its published loss alone, the codebook lives on a few codes per scale. Five measures help: moving
averages and restarts of the codes (`codebook`), a start by k-means after some steps without quantisation, a
random number of scales per image, the entropy of the assignments, and a rotated gradient.
Letters: B batch, K scales, Z code channels, V vocabulary, N all queries of a scale, h w feature map.
"""
import torch
from torch import nn
from torch.nn import functional as F

import dist
from models.noise import GlobalBatch
from models.scales import as_sizes
from models.tokenizers.codebook import CodebookUpkeep, kmeans, nearest, squared_distances
from models.tokenizers.quantize import Quantised, ScaleCode, VectorQuantizer2

ENTROPY_TEMPERATURE = 0.1
KMEANS_IMAGES = 4096     # k-means wants the features of so many images at least, if the wait allows it
MIN_KEPT_FRACTION = 0.3  # of the scales, under scale dropout


def rotated(f_BZhw: torch.Tensor, q_BZhw: torch.Tensor) -> torch.Tensor:
    """q with the gradient of f rotated and rescaled onto it, per position (arXiv 2410.06424, Sec. 4.2)."""
    # Two reflections rotate f to q: one at the plane across u, one at that across w, which bisects u and v.
    u = F.normalize(f_BZhw.detach(), dim=1)
    v = F.normalize(q_BZhw, dim=1)
    w = F.normalize(u + v, dim=1)
    along_w = (f_BZhw * w).sum(1, keepdim=True)
    along_u = (f_BZhw * u).sum(1, keepdim=True)
    length_of_f = f_BZhw.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
    scale = q_BZhw.norm(dim=1, keepdim=True) / length_of_f
    return scale * (f_BZhw - 2 * along_w * w + 2 * along_u * v)


class QuantizerTraining:
    """The measures that a quantizer is trained with, and their state.

    Args:
        quantizer: which is trained; it hands its features to `quantised`.
        ema, restart: see `CodebookUpkeep`; with `ema` the codes get no gradient.
        defer_steps: steps without quantisation at the start; k-means then places the codes.
        scale_drop: fraction of the images that keep a random number of leading scales only.
        entropy: weight of the mean entropy of soft assignments minus the entropy of their mean.
        rotation: rotate and rescale the gradient of the decoder (arXiv 2410.06424) in place of copying it.
    Attributes:
        upkeeps: of the codebook, or of one per scale where scales do not share theirs.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer2,
        *,
        ema: bool = True,
        restart: bool = True,
        defer_steps: int = 0,
        scale_drop: float = 0.,
        entropy: float = 0.,
        rotation: bool = False,
    ):
        self.quantizer = quantizer
        self.defer_steps = defer_steps
        self.scale_drop = scale_drop
        self.entropy = entropy
        self.rotation = rotation
        num_codebooks = len(quantizer.v_patch_nums) if quantizer.unshared else 1
        self.upkeeps = [CodebookUpkeep(quantizer.embedding, ema, restart, quantizer.rows(k))
                        for k in range(num_codebooks)]
        self.steps_waited = 0                    # of defer_steps
        self.gathered: list[torch.Tensor] = []   # features of the images of all ranks, for k-means
        self._features: list[torch.Tensor] = []  # those of this rank and step

    @property
    def waiting(self) -> bool:
        """Whether quantisation is still deferred."""
        return self.steps_waited < self.defer_steps

    # ------------------------------------------------------------------------------ a forward pass
    def quantised(self, f_BZhw: torch.Tensor) -> Quantised:
        """As `VectorQuantizer2.quantised`; in training mode with these measures."""
        quantizer = self.quantizer
        is_training = quantizer.training
        # Encoder and decoder first learn without a quantizer between them, so that codes begin where
        # features have settled. A validation in that time does quantise, with codes that were never placed.
        if self.waiting and is_training:
            self._features.append(f_BZhw.detach())
            return Quantised(f_BZhw, f_BZhw.new_zeros(()), {}, {})

        # Some images keep their leading scales alone, so that these learn to stand for themselves.
        weight_BK = self.scale_weights(f_BZhw) if is_training and self.scale_drop > 0 else None
        out, scales = quantizer.quantise_scales(f_BZhw, weight_BK)
        if is_training:
            out = self._with_entropy(out, f_BZhw, scales)
            self._observe(out.codes, scales)

        # The decoder sees f_hat, and the encoder gets its gradient: rotated, or straight through.
        if self.rotation:
            f_hat_BZhw = rotated(f_BZhw, out.f_hat_BZhw.detach())
        else:
            f_hat_BZhw = (out.f_hat_BZhw - f_BZhw).detach() + f_BZhw
        return out._replace(f_hat_BZhw=f_hat_BZhw)

    def scale_weights(self, f_BZhw: torch.Tensor) -> torch.Tensor:
        """Weights (B, K) of the loss terms under scale dropout: 0 where a scale is dropped, mean 1 per scale.

        An image that drops scales keeps the first n of them, n uniform in [max(1, 0.3 K), K]. The mean is
        over the images of all ranks.
        """
        num_scales = len(self.quantizer.v_patch_nums)
        fewest = max(1, round(MIN_KEPT_FRACTION * num_scales))

        def weights(u_B: torch.Tensor) -> torch.Tensor:
            num_kept_B = torch.randint(fewest, num_scales + 1, u_B.shape, device=u_B.device)
            num_kept_B[u_B.uniform_() >= self.scale_drop] = num_scales
            is_kept_BK = torch.arange(num_scales, device=u_B.device) < num_kept_B[:, None]
            return is_kept_BK * (len(u_B) / is_kept_BK.sum(0).clamp_min(1))

        return GlobalBatch.current.per_image(len(f_BZhw), f_BZhw.device, weights)

    def _with_entropy(self, out: Quantised, f_BZhw: torch.Tensor, scales: list[ScaleCode]) -> Quantised:
        """With the entropy loss, whose gradient reaches codes and features, where it has a weight."""
        if not self.entropy:
            return out
        entropy = 0.
        for scale in scales:
            # What was left before this scale, with the gradient of f.
            residual_BZhw = f_BZhw - f_BZhw.detach() + scale.residual_BZhw
            entropy = entropy + self._entropy(residual_BZhw, scale)
        parts = out.parts | dict(entropy_loss=entropy.detach() / len(scales))
        return out._replace(loss=out.loss + self.entropy * entropy / len(scales), parts=parts)

    def _entropy(self, residual_BZhw: torch.Tensor, scale: ScaleCode) -> torch.Tensor:
        """Mean entropy of the soft assignments of a scale minus the entropy of their mean.

        It is low where each query is sure of its code and all codes are used alike. Distances are Euclidean,
        also where codes are chosen by their direction.
        """
        u_BZpp = F.interpolate(residual_BZhw, size=scale.idx_Bhw.shape[1:], mode='area')
        query_NZ = u_BZpp.permute(0, 2, 3, 1).flatten(0, 2)
        table_VZ = self.quantizer.embedding.weight[self.quantizer.rows(scale.k)]
        distance_NV = squared_distances(query_NZ, table_VZ)
        log_p_NV = F.log_softmax(-distance_NV / ENTROPY_TEMPERATURE, dim=1)
        p_NV = log_p_NV.exp()
        mean_V = p_NV.mean(0)
        entropy_of_mean = -(mean_V * (mean_V + 1e-9).log()).sum()
        mean_entropy = -(p_NV * log_p_NV).sum(1).mean()
        return mean_entropy - entropy_of_mean

    def _observe(self, codes: dict[str, torch.Tensor], scales: list[ScaleCode]) -> None:
        """Tell every upkeep the codes and queries of its scales: of all, or of one where unshared."""
        queries = {scale.name: scale.query_NZ for scale in scales}
        if not self.quantizer.unshared:
            self.upkeeps[0].observe(codes, queries)
            return
        for upkeep, name in zip(self.upkeeps, codes, strict=False):
            upkeep.observe({name: codes[name]}, {name: queries[name]})

    # ------------------------------------------------------------------------------ an optimizer step
    def after_step(self, progress: float) -> dict[nn.Parameter, torch.Tensor]:
        """Move and restart codes, or count a step of the wait; see `Trainable.after_step`.

        The optimizer forgets what it knew of the rows that are returned.
        """
        weight = self.quantizer.embedding.weight
        # Quantisation is on: moving averages and restarts of the codebook.
        if not self.waiting:
            replaced = []
            for upkeep in self.upkeeps:
                replaced += upkeep.update(progress).values()
            if self.upkeeps[0].hit_KV is not None:
                self.quantizer.average_hits(torch.cat([upkeep.hit_KV for upkeep in self.upkeeps]))
            return {weight: torch.cat(replaced)} if replaced else {}

        # It is deferred: the last steps of the wait gather features of all ranks, as many as k-means needs.
        batch_BZhw = torch.cat(self._features)
        self._features.clear()
        self.steps_waited += 1
        images_per_step = len(batch_BZhw) * dist.get_world_size()
        if self.steps_waited > self.defer_steps - self._gathering_steps(images_per_step):
            self.gathered.append(dist.allgather(batch_BZhw))
        if self.waiting:
            return {}

        # The wait is over: the codebook begins where the features are.
        self.place_codes(torch.cat(self.gathered))
        self.gathered.clear()
        return {weight: torch.arange(len(weight))}

    def _gathering_steps(self, images_per_step: int) -> int:
        """Steps at the end of the wait whose features are kept for k-means: at most half of them."""
        num_codes = len(self.quantizer.embedding.weight)
        num_images = max(4 * num_codes // len(self.quantizer.v_patch_nums), KMEANS_IMAGES)
        return min(-(-num_images // images_per_step), -(-self.defer_steps // 2))

    def forget_step(self) -> None:
        """See `Trainable.forget_step`."""
        self._features.clear()
        for upkeep in self.upkeeps:
            upkeep.forget()

    @torch.no_grad()
    def place_codes(self, f_BZhw: torch.Tensor) -> None:
        """Set the codebook by k-means, scale by scale on what the scales before leave of f.

        A shared codebook gives every scale V / K codes of its own, and the last scale those that are left.

        Args:
            f_BZhw: features of the same images on every rank.
        """
        table_VZ = self.quantizer.embedding.weight.data
        # The first rank decides, since k-means may fall out differently on other devices.
        if dist.is_master():
            self._cluster(f_BZhw, table_VZ)
        dist.broadcast(table_VZ, src_rank=0)
        for upkeep in self.upkeeps:
            upkeep.begin()

    def _cluster(self, f_BZhw: torch.Tensor, table_VZ: torch.Tensor) -> None:
        """Put the centres of all scales into the codebook (V, Z)."""
        quantizer = self.quantizer
        num_scales = len(quantizer.v_patch_nums)
        codes_per_scale = quantizer.vocab_size // num_scales
        residual_BZhw = f_BZhw
        for k, size in enumerate(as_sizes(quantizer.v_patch_nums)):
            is_last = k == num_scales - 1
            first = 0
            last = quantizer.vocab_size
            if not quantizer.unshared:
                first = k * codes_per_scale
                last = quantizer.vocab_size if is_last else first + codes_per_scale
            query_NZ = quantizer.queries(residual_BZhw, size, is_last)
            codes_VZ = table_VZ[quantizer.rows(k)][first:last]
            codes_VZ.copy_(kmeans(query_NZ, len(codes_VZ)))

            # The next scale is placed on what these codes leave.
            chosen_NZ = codes_VZ[nearest(query_NZ, codes_VZ)]
            h_BZpp = chosen_NZ.view(len(f_BZhw), *size, quantizer.Cvae).permute(0, 3, 1, 2)
            residual_BZhw = residual_BZhw - quantizer.contribution(h_BZpp, k, num_scales, f_BZhw.shape[-2:])

    # ------------------------------------------------------------------------------ state
    def state_dict(self) -> dict:
        """What a checkpoint keeps of the measures."""
        return dict(steps_waited=self.steps_waited, gathered=list(self.gathered),
                    upkeeps=[upkeep.state_dict() for upkeep in self.upkeeps])

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        device = self.quantizer.embedding.weight.device
        self.steps_waited = state['steps_waited']
        self.gathered = [f.to(device) for f in state['gathered']]
        for upkeep, saved in zip(self.upkeeps, state['upkeeps'], strict=True):
            upkeep.load_state_dict(saved)
