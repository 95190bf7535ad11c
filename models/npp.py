"""NPP: a GPT over the codes of an image in raster order, trained on patches of codes that shrink to one code.

Letters: B batch, G side of the code map, N = G * G codes, p side of a patch in codes, P = (G / p)^2 patches,
M = p * p codes of a patch, L sequence, C width, H heads, d head dim, V vocabulary, 3HW image.
Source: arXiv 2412.15321, on the transformer of arXiv 2406.06525 (LlamaGen), under the names of its weights.
"""
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from models.attention import KVCache, attend, compile_around_attention
from models.base import ARModel, Tokenizer, num_weights
from models.helpers import DropPath, draw_codes, drop_labels, guide, in_chunks, weighted
from models.layers import RMSNorm, Rope2d, TokenLinear, rotate
from models.noise import GlobalBatch, Rng
from models.recompute import Recomputable
from models.sampling import sampling_mode


def patches(t_BN: torch.Tensor, p: int) -> torch.Tensor:
    """(B, P, M, ...) of codes, or whatever stands for them, (B, N, ...): blocks of p x p, all row by row.

    Raises:
        ValueError: the map is not square, or p does not divide its side.
    """
    side = math.isqrt(t_BN.shape[1])
    if side * side != t_BN.shape[1] or side % p:
        raise ValueError(f'expected a square map of codes whose side is a multiple of the patch, got '
                         f'{t_BN.shape[1]} codes and patches of {p}x{p}: choose another image size or patch')
    # (B, row of patches, row within, column of patches, column within, ...), then both rows before both
    # columns.
    blocks = t_BN.unflatten(1, (side // p, p, side // p, p)).transpose(2, 3)
    return blocks.flatten(1, 2).flatten(2, 3)


def patch_cross_entropy(logits_NV: torch.Tensor, idx_NM: torch.Tensor) -> torch.Tensor:
    """(..., N, M): cross-entropy of each code of a patch under the one distribution predicted for the patch.

    The normaliser is computed once per patch and the codes are gathered: logits are never repeated.
    """
    if idx_NM.shape[-1] == 1:  # torch has one kernel for it
        loss = F.cross_entropy(logits_NV.flatten(0, -2), idx_NM.flatten(), reduction='none')
        return loss.view_as(idx_NM)
    logits_NM = logits_NV.gather(-1, idx_NM)
    normaliser_N1 = logits_NV.logsumexp(-1, keepdim=True)
    return normaliser_N1 - logits_NM


def ffn_width(dim: int, multiple_of: int = 256, multiplier: float = 1.) -> int:
    """Hidden width of the feed-forward network: 8 / 3 of `dim`, rounded up to a multiple."""
    hidden = int(multiplier * int(8 * dim / 3))
    return math.ceil(hidden / multiple_of) * multiple_of


# ---------------------------------------------------------------------------------------------- parts
class LabelEmbedder(nn.Module):
    """Class tokens (B, 1, C); the last row is the null class."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, label_B: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(label_B)[:, None]


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped heads; `cache` is what `kv_caching` fills."""

    def __init__(self, dim: int, n_head: int, n_kv_head: int, attn_drop: float, resid_drop: float):
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.attn_drop = attn_drop
        self.wqkv = TokenLinear(dim, (n_head + 2 * n_kv_head) * (dim // n_head))
        self.wo = TokenLinear(dim, dim)
        self.resid_dropout = nn.Dropout(resid_drop)
        self.cache: KVCache | None = None

    def forward(self, x_BLC: torch.Tensor, table_2Lp: torch.Tensor) -> torch.Tensor:
        return self.project(self.attend(*self.queries_keys_values(x_BLC, table_2Lp)))      # (B, L, C)

    def queries_keys_values(self, x_BLC: torch.Tensor, table_2Lp: torch.Tensor,
                            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (B, L, H, d), k and v (B, L, groups, d), turned by their positions."""
        B, L, _ = x_BLC.shape
        heads = self.wqkv(x_BLC).view(B, L, self.n_head + 2 * self.n_kv_head, -1)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        # Keys are cached as rotated, since a position is the same at every later step.
        return rotate(q, table_2Lp), rotate(k, table_2Lp), v

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(B, L, H, d): what each head sees."""
        if self.cache is not None:
            k, v = self.cache.append(k, v)
        # A single token, while sampling, sees all that is cached; several see those before them.
        dropout_p = self.attn_drop if self.training else 0.
        return attend(q, k, v, causal=q.shape[1] > 1, dropout_p=dropout_p)

    def project(self, out_BLHd: torch.Tensor) -> torch.Tensor:
        """(B, L, C): what all heads see, mixed."""
        return self.resid_dropout(self.wo(out_BLHd.flatten(2)))


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.w1 = TokenLinear(dim, hidden)
        self.w3 = TokenLinear(dim, hidden)
        self.w2 = TokenLinear(hidden, dim)
        self.ffn_dropout = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class TransformerBlock(Recomputable):
    """Attention and feed-forward network, each normalised and added."""

    def __init__(
        self,
        dim: int,
        n_head: int,
        n_kv_head: int,
        hidden: int,
        eps: float,
        attn_drop: float,
        resid_drop: float,
        ffn_drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.attention = Attention(dim, n_head, n_kv_head, attn_drop, resid_drop)
        self.feed_forward = FeedForward(dim, hidden, ffn_drop)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)
        self.drop_path = DropPath(drop_path)

    @property
    def attn(self) -> Attention:
        """What `kv_caching` looks for."""
        return self.attention

    def forward(self, x_BLC: torch.Tensor, table_2Lp: torch.Tensor) -> torch.Tensor:
        return self.recomputed('block', self.both_branches, x_BLC, table_2Lp)              # (B, L, C)

    def both_branches(self, x_BLC: torch.Tensor, table_2Lp: torch.Tensor) -> torch.Tensor:
        """What `forward` computes, and computes again in the backward pass where that is asked for."""
        # Which images skip a branch is drawn here: the two parts below are compiled, and one graph serves
        # all blocks, whose rates differ.
        kept_attn_B11 = self.drop_path.weights(x_BLC)
        kept_ffn_B11 = self.drop_path.weights(x_BLC)
        out_BLHd = self.recomputed('attention', self.attended, x_BLC, table_2Lp)
        return self.after_attention(x_BLC, out_BLHd, kept_attn_B11, kept_ffn_B11)          # (B, L, C)

    def attended(self, x_BLC: torch.Tensor, table_2Lp: torch.Tensor) -> torch.Tensor:
        """(B, L, H, d): what each head sees, given the tokens as they enter the block."""
        return self.attention.attend(*self.before_attention(x_BLC, table_2Lp))

    def before_attention(self, x_BLC: torch.Tensor, table_2Lp: torch.Tensor,
                         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Attention.queries_keys_values`, of the normalised tokens."""
        return self.attention.queries_keys_values(self.attention_norm(x_BLC), table_2Lp)

    def after_attention(self, x_BLC: torch.Tensor, out_BLHd: torch.Tensor,
                        kept_attn_B11: torch.Tensor | None, kept_ffn_B11: torch.Tensor | None,
                        ) -> torch.Tensor:
        """The tokens with both branches added, which are dropped for some images in training."""
        x_BLC = x_BLC + weighted(self.attention.project(out_BLHd), kept_attn_B11)
        ffn_BLC = self.feed_forward(self.ffn_norm(x_BLC))
        return x_BLC + weighted(ffn_BLC, kept_ffn_B11)                                     # (B, L, C)


# ---------------------------------------------------------------------------------------------- model
class NPP(ARModel):
    """Next-patch prediction; in the last phase, and at sampling time, plain next-token prediction.

    Args:
        vae_local: frozen tokenizer (VQ-16), kept as a plain reference.
        num_classes: classes; index num_classes is the null class of classifier-free guidance.
        dim, n_layer, n_head: width, blocks, heads. n_kv_head: groups of heads that share keys and values.
        ffn_dim: hidden width of the feed-forward networks; None follows `ffn_width`.
        rope_base, norm_eps: of the rotary positions, of the norms.
        token_dropout_p, attn_dropout_p, resid_dropout_p, ffn_dropout_p, class_dropout_prob: in training.
        drop_path_rate: of the last block; as published, any other than 0 replaces resid and ffn dropout.
        grid: G, side of the code maps of training.
        phases: (share of the training at which it ends, p) of every phase, in order.
    Raises:
        ValueError: heads that do not divide the width, or phases that do not end with p = 1 at share 1.
    """

    SIZES: ClassVar[dict[str, dict[str, int]]] = {
        'GPT-B': dict(n_layer=12, n_head=12, dim=768),
        'GPT-L': dict(n_layer=24, n_head=16, dim=1024),
        'GPT-XL': dict(n_layer=36, n_head=20, dim=1280),
        'GPT-XXL': dict(n_layer=48, n_head=24, dim=1536),
        'GPT-XXXL': dict(n_layer=48, n_head=40, dim=2560),
        'GPT-1B': dict(n_layer=22, n_head=32, dim=2048),
        'GPT-3B': dict(n_layer=24, n_head=32, dim=3200),
        'GPT-7B': dict(n_layer=32, n_head=32, dim=4096),
    }
    headline = {'L': 'L_mean', 'Acc': 'acc_mean'}
    legend = 'L is the cross-entropy of the codes, Acc the percentage of them that are right'
    selection = 'L_mean'
    class_table = 'cls_embedding.embedding_table.weight'
    parts = dict(
        class_emb=('cls_embedding.*',),
        trunk=('layers.*', 'norm.*'),
        head=('output.*',),
    )

    def __init__(
        self,
        vae_local: Tokenizer,
        num_classes: int = 1000,
        dim: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_kv_head: int | None = None,
        ffn_dim: int | None = None,
        rope_base: float = 10000.,
        norm_eps: float = 1e-5,
        token_dropout_p: float = 0.1,
        attn_dropout_p: float = 0.,
        resid_dropout_p: float = 0.1,
        ffn_dropout_p: float = 0.1,
        class_dropout_prob: float = 0.1,
        drop_path_rate: float = 0.,
        grid: int = 16,
        phases: Sequence[tuple[float, int]] = ((1., 1),),
    ):
        super().__init__(vae_local)
        # 0. hyper-parameters
        n_kv_head = n_kv_head or n_head
        if dim % n_head or n_head % n_kv_head:
            raise ValueError(f'expected heads that divide the width and groups that divide the heads, got '
                             f'width {dim}, {n_head} heads, {n_kv_head} groups: choose other numbers')
        ends = [end for end, _ in phases]
        sides = [p for _, p in phases]
        ends_rise_from_zero = ends == sorted({*ends}) and min(ends, default=0) > 0
        patches_fit = all(p >= 1 and grid % p == 0 for p in sides)
        if not ends_rise_from_zero or not patches_fit or tuple(phases[-1]) != (1, 1):
            raise ValueError('expected phases (share at which it ends, side of a patch that divides '
                             f'{grid}) of which the last is (1, 1), got {tuple(phases)}: see --epoch_rate '
                             'and --patch_level')
        if drop_path_rate:
            resid_dropout_p = ffn_dropout_p = 0.
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.grid = grid
        self.phases = tuple(phases)
        self.vocab_size = vae_local.vocab_size
        self.n_head = n_head
        self.n_kv_head = n_kv_head

        # 1. input: class token, then patches of codes
        self.cls_embedding = LabelEmbedder(num_classes, dim)
        self.tok_embeddings = nn.Embedding(self.vocab_size, dim)
        self.tok_dropout = nn.Dropout(token_dropout_p)

        # 2. rotary positions, by row and column
        self.rope = Rope2d(dim // n_head, rope_base, persistent=False)

        # 3. transformer; drop path grows from block to block
        self.layers = nn.ModuleList(
            TransformerBlock(
                dim=dim,
                n_head=n_head,
                n_kv_head=n_kv_head,
                hidden=ffn_dim or ffn_width(dim),
                eps=norm_eps,
                attn_drop=attn_dropout_p,
                resid_drop=resid_dropout_p,
                ffn_drop=ffn_dropout_p,
                drop_path=rate,
            )
            for rate in torch.linspace(0, drop_path_rate, n_layer, device='cpu').tolist())

        # 4. head
        self.norm = RMSNorm(dim, norm_eps)
        self.output = TokenLinear(dim, self.vocab_size)
        self.init_weights()

    # ------------------------------------------------------------------------------ training
    def patch_side(self, progress: float) -> int:
        """p at this share of the training; patches shrink from phase to phase."""
        return next((p for end, p in self.phases if progress < end), 1)

    def training_loss(self, images_B3HW: torch.Tensor, label_B: torch.Tensor,
                      progress: float = 1.) -> tuple[torch.Tensor, dict[str, Any]]:
        """Cross-entropy of every code given the class and the patches before its own."""
        idx_BN = self.tokenizer.encode(images_B3HW)
        p = self.patch_side(progress)
        if self.training:
            label_B = drop_labels(label_B, self.num_classes, self.class_dropout_prob)
            # Dropout follows, whose masks must differ between ranks.
            GlobalBatch.current.reseed_per_rank()

        # One prediction per patch, compared with each of its M = p^2 codes.
        x_BPC = self.before_head(label_B, idx_BN, p)
        idx_NM = patches(idx_BN, p).flatten(0, 1)                                          # N = B * P
        loss_NM, predicted_N = in_chunks(self.losses, self.vocab_size, x_BPC.flatten(0, 1), idx_NM)
        loss = loss_NM.mean()
        hit_NM = predicted_N[:, None] == idx_NM
        return loss, dict(loss=loss.detach(), hit=hit_NM, p=p, num_tokens=x_BPC.shape[1])

    def log_probabilities(self, label_B: torch.Tensor, tokens: torch.Tensor,
                          ) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `ARModel`; the tokens are codes (B, N), and every patch is a single one."""
        if self.training:
            # Dropout follows, whose masks must differ between ranks.
            GlobalBatch.current.reseed_per_rank()
        x_BNC = self.before_head(label_B, tokens)
        idx_NM = tokens.reshape(-1, 1)
        loss_NM, predicted_N = in_chunks(self.losses, self.vocab_size, x_BNC.flatten(0, 1), idx_NM)
        hit_NM = predicted_N[:, None] == idx_NM
        aux = dict(loss=loss_NM.detach().mean(), hit=hit_NM, p=1, num_tokens=tokens.shape[1])
        return -loss_NM.view_as(tokens), aux

    def losses(self, x_NC: torch.Tensor, idx_NM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (N, M) of the codes of some patches, and the likeliest code (N,) of each patch."""
        logits_NV = self.output(x_NC).float()
        return patch_cross_entropy(logits_NV, idx_NM), logits_NV.detach().argmax(-1)

    def forward(self, label_B: torch.Tensor, idx_BN: torch.Tensor, p: int = 1) -> torch.Tensor:
        """Logits (B, P, V) of every patch, float32, each from the class and the patches before it.

        Args:
            label_B: (B,) int64 in [0, num_classes].
            idx_BN: (B, N) codes, int64 in [0, V), row by row.
            p: side of a patch; it is read as the mean of its codes' embeddings.
        """
        return self.output(self.before_head(label_B, idx_BN, p)).float()

    def before_head(self, label_B: torch.Tensor, idx_BN: torch.Tensor, p: int = 1) -> torch.Tensor:
        """(B, P, C), of which the head makes logits; see `forward`."""
        x_BPC = patches(self.tok_embeddings(idx_BN), p).mean(2)                            # (B, P, C)
        # Shifted by one: the class predicts the first patch, and nothing needs the last one.
        x_BPC = torch.cat([self.cls_embedding(label_B), x_BPC[:, :-1]], dim=1)
        x_BPC = self.tok_dropout(x_BPC)
        num_patches = x_BPC.shape[1]
        table_2Lp = self.rope_table(math.isqrt(num_patches))[:, :num_patches]
        return self.transform(x_BPC, table_2Lp)                                            # (B, P, C)

    def transform(self, x_BLC: torch.Tensor, table_2Lp: torch.Tensor) -> torch.Tensor:
        """(B, L, C): all blocks, and the last norm."""
        for block in self.layers:
            x_BLC = block(x_BLC, table_2Lp)
        return self.norm(x_BLC)

    def compile(self, **options: Any) -> None:
        """Compile the blocks; one graph serves all of them."""
        compile_around_attention(self.layers, **options)

    def rope_table(self, side: int) -> torch.Tensor:
        """(2, 1 + side^2, d / 2) cosines and sines of the class token and of a map.

        Upstream parity: those of the class token are 0, no rotation at all, so its query and key vanish; it
        sees itself alone, and everything sees it with score 0.
        """
        ticks = torch.arange(side, device=self.device)
        table_2Np = self.rope(torch.cartesian_prod(ticks, ticks))
        return F.pad(table_2Np, (0, 0, 1, 0))  # a row of zeros before all others

    # ------------------------------------------------------------------------------ sampling
    @property
    def native_side(self) -> int:
        return self.grid * self.tokenizer.stride

    @torch.no_grad()
    def sample_tokens(self, label_B: torch.Tensor, *, guidance: float = 1., cfg_interval: int = -1,
                      temperature: float = 1., top_k: int = 0, top_p: float = 1., greedy: bool = False,
                      grid: int | None = None, rng: Rng = None) -> torch.Tensor:
        """Codes (B, N) drawn one by one; in eval mode whatever the model's mode is.

        Args:
            label_B: (B,) int64, see `as_labels`.
            guidance: scale s; 1 and less are off.
            cfg_interval: codes 0 to cfg_interval + 1 are guided; -1 guides all.
            temperature: divides the logits.
            top_k: draw from the k likeliest codes; 0, or more than V, is off.
            top_p: draw from the smallest set of this probability; 1 is off, 0 takes the likeliest code.
            greedy: take the likeliest code.
            grid: side of the map; None is that of training.
            rng: a generator, `ImageNoise`, or None for torch's global generator.
        """
        B = len(label_B)
        num_codes = (grid or self.grid) ** 2
        table_2Lp = self.rope_table(grid or self.grid)
        last_guided = cfg_interval + 1 if cfg_interval >= 0 else num_codes
        codes = []

        # With guidance the second half of the batch has the null class.
        if guidance > 1:
            null_B = torch.full_like(label_B, self.num_classes)
            label_B = torch.cat([label_B, null_B])
        x_B1C = self.cls_embedding(label_B)                                                # (2B, 1, C)
        with sampling_mode(self, self.layers, capacity=num_codes - 1):
            for i in range(num_codes):
                # 1. One token goes in, the class or the code before; the cache holds all others.
                logits_B1V = self.output(self.transform(x_B1C, table_2Lp[:, i:i + 1])).float()

                # 2. Guidance, and the code that is drawn.
                if len(logits_B1V) > B:
                    cond_B1V, uncond_B1V = logits_B1V.chunk(2)
                    logits_B1V = guide(cond_B1V, uncond_B1V, guidance)
                idx_B1 = self.draw(logits_B1V, temperature, top_k, top_p, greedy, rng)
                codes.append(idx_B1)

                # 3. After the last guided code nothing needs the null class, so its half leaves the batch.
                if i == last_guided:
                    for block in self.layers:
                        block.attn.cache.truncate(B)
                    x_B1C = x_B1C[:B]

                # 4. The code is the next input, for both halves alike.
                num_copies = len(x_B1C) // B
                x_B1C = self.tok_embeddings(idx_B1).repeat(num_copies, 1, 1)
        return torch.cat(codes, dim=1)

    def draw_tokens(self, label_B: torch.Tensor, rng: Rng) -> torch.Tensor:
        """See `ARModel`: codes (B, N)."""
        return self.sample_tokens(label_B, rng=rng)

    def draw(self, logits_B1V: torch.Tensor, temperature: float, top_k: int, top_p: float, greedy: bool,
             rng: Rng) -> torch.Tensor:
        """(B, 1) codes; see `sample_tokens`."""
        if greedy or top_p <= 0:
            return logits_B1V.argmax(2)
        logits_B1V = logits_B1V / max(temperature, 1e-5)
        # The published options mean "off" by other values than the filter does.
        top_k = min(top_k, self.vocab_size)
        top_p = top_p if top_p < 1 else 0.
        return draw_codes(logits_B1V, top_k, top_p, rng)

    def sample(self, labels: torch.Tensor | Sequence[int], *, guidance: float = 1., rng: Rng = None,
               image_size: int | None = None, image_size_eval: int | None = None,
               **options: Any) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1].

        Args:
            labels: one per image. guidance, rng, options: see `sample_tokens`.
            image_size: pixels per side of what is drawn; None is that of training.
            image_size_eval: pixels per side to which the images are then resized; None leaves them.
        """
        label_B = self.as_labels(labels, len(labels), rng)
        grid = self.grid
        if image_size is not None:
            grid, _ = self.tokenizer.map_size(image_size, image_size)
        idx_BN = self.sample_tokens(label_B, guidance=guidance, grid=grid, rng=rng, **options)
        images_B3HW = self.tokenizer.decode_code(idx_BN, (len(label_B), self.tokenizer.channels, grid, grid))
        # Resized before clamping, as published.
        if image_size_eval not in (None, images_B3HW.shape[-1]):
            images_B3HW = F.interpolate(images_B3HW, (image_size_eval, image_size_eval), mode='bicubic')
        return images_B3HW.clamp(-1, 1).add(1).mul(0.5)

    # ------------------------------------------------------------------------------ metrics
    @torch.no_grad()
    def metrics(self, aux: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Loss and accuracy in percent; losses of different p do not compare."""
        return dict(L_mean=aux['loss'], acc_mean=100 * aux['hit'].float().mean(),
                    prog_patch=torch.tensor(float(aux['p'])))

    # ------------------------------------------------------------------------------ weights
    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02) everywhere but in the head, which is zero: the first loss is ln V."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.output.weight.zero_()

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As torch's, without the table of positions that old published files hold."""
        weights = {key: t for key, t in state_dict.items() if key != 'freqs_cis'}
        return super().load_state_dict(weights, strict=strict, assign=assign)

    def config_state(self, progress: float) -> dict[str, Any]:
        """What the weights do not tell."""
        return dict(n_head=self.n_head, n_kv_head=self.n_kv_head, grid=self.grid)

    def sharded_parts(self) -> list[nn.Module]:
        return list(self.layers)

    @property
    def codes_per_image(self) -> int:
        return self.grid ** 2

    def training_flops(self, num_tokens: int) -> int:
        """3 (2 N P + 4 P^2 C depth) for P patches, which are the tokens."""
        P = num_tokens
        N = num_weights(self)
        attention = 4 * P * P * self.norm.weight.numel() * len(self.layers)
        return 3 * (2 * N * P + attention)

    @classmethod
    def kwargs_from_size(cls, size: str, depth: int | None = None, width: int | None = None,
                         ) -> dict[str, Any]:
        """Blocks, heads and width of a key of `SIZES`.

        Args:
            depth, width: in place of those of the size; another width has heads of 64 channels.
        """
        kwargs = dict(cls.SIZES[size])
        if depth:
            kwargs['n_layer'] = depth
        if width:
            kwargs |= dict(dim=width, n_head=width // 64)
        return kwargs

    @staticmethod
    def kwargs_from_config(config: dict[str, Any]) -> dict[str, Any]:
        return {name: config[name] for name in ('n_head', 'n_kv_head', 'grid') if name in config}

    @classmethod
    def kwargs_from_state_dict(cls, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Everything but `config_state`, whose heads are those of the published width or 64 channels wide."""
        vocab_size, dim = state['tok_embeddings.weight'].shape
        heads_of_width = {size['dim']: size['n_head'] for size in cls.SIZES.values()}
        n_head = heads_of_width.get(dim, max(dim // 64, 1))
        kv_width = (len(state['layers.0.attention.wqkv.weight']) - dim) // 2
        return dict(
            num_classes=len(state['cls_embedding.embedding_table.weight']) - 1,
            dim=dim,
            n_layer=1 + max(int(key.split('.')[1]) for key in state if key.startswith('layers.')),
            n_head=n_head,
            n_kv_head=kv_width * n_head // dim,
            ffn_dim=len(state['layers.0.feed_forward.w1.weight']),
            vocab_size=vocab_size,
        )

    def extra_repr(self) -> str:
        return f'grid={self.grid}, phases={self.phases}'
