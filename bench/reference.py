"""The published way of computing, to measure the product against: eager, with everything done at every scale.

Each function takes a model of the product and uses its weights, so that results can be compared before
anything is timed. It does what the product saves: it concatenates the cache of keys and values, makes the
AdaLN products of the class at every scale, sorts the whole vocabulary, and draws noise for every code.
FlowAR's published solver is in `bench.published_solver`.
Letters: B batch, L all tokens, l tokens of one scale, C width, H heads, d head dim, V vocabulary, Z channels.
"""
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from models import NPP, VAR, FlexVAR
from models.basic_var import MAX_LOG_SCALE, AdaLNSelfAttn, SelfAttention
from models.helpers import guide
from models.layers import rotate
from models.noise import Rng, exponential_like
from models.npp import patches
from models.scales import ScaleLayout

Cache = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values (B, H, L, d) of each block so far


# ---------------------------------------------------------------------------------------------- codes
def filter_by_sorting(logits_BlV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits of the codes outside the top k and outside the nucleus set to -inf, in place."""
    if top_k > 0:
        smallest_kept = logits_BlV.topk(top_k, largest=True, sorted=False, dim=-1)[0].amin(-1, keepdim=True)
        logits_BlV.masked_fill_(logits_BlV < smallest_kept, -torch.inf)
    if top_p > 0:
        ascending, order = logits_BlV.sort(dim=-1, descending=False)
        remove = ascending.softmax(-1).cumsum_(-1) <= 1 - top_p
        remove[..., -1] = False
        logits_BlV.masked_fill_(remove.scatter(-1, order, remove), -torch.inf)
    return logits_BlV


def draw(logits_BlV: torch.Tensor, top_k: int, top_p: float, rng: Rng) -> torch.Tensor:
    """(B, l) codes: by `torch.multinomial`, as published, or by noise for every code where that is keyed."""
    probs_BlV = filter_by_sorting(logits_BlV.clone(), top_k, top_p).softmax(-1)
    if rng is not None and not isinstance(rng, torch.Generator):
        return probs_BlV.div_(exponential_like(probs_BlV, rng)).argmax(-1)
    B, l, V = probs_BlV.shape
    return torch.multinomial(probs_BlV.view(-1, V), 1, replacement=True, generator=rng).view(B, l)


# ---------------------------------------------------------------------------------------------- VAR
def attention(attn: SelfAttention, x_BLC: torch.Tensor, attn_bias: torch.Tensor | None, cache: Cache | None,
              index: int) -> torch.Tensor:
    """Attention with heads before positions; keys and values of earlier scales are concatenated."""
    B, L, C = x_BLC.shape
    bias = torch.cat((attn.q_bias, attn.zero_k_bias, attn.v_bias))
    qkv = F.linear(x_BLC, attn.mat_qkv.weight, bias).view(B, L, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                                         # (B, H, L, d)
    if attn.attn_l2_norm:
        scale = attn.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
        q = F.normalize(q, dim=-1).mul(scale)
        k = F.normalize(k, dim=-1)
    if cache is not None:
        if index < len(cache):
            k = torch.cat((cache[index][0], k), dim=2)
            v = torch.cat((cache[index][1], v), dim=2)
            cache[index] = (k, v)
        else:
            cache.append((k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=attn.scale)
    return attn.proj(out.transpose(1, 2).reshape(B, L, C))


def block(layer: AdaLNSelfAttn, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor | None,
          cache: Cache | None, index: int) -> torch.Tensor:
    """A block of VAR without dropout; the class goes through the AdaLN product each time."""
    if layer.shared_aln:
        modulation = layer.ada_gss + cond_BD
    else:
        modulation = layer.ada_lin(cond_BD).view(-1, 1, 6, layer.C)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
    normed = layer.ln_wo_grad(x).mul(scale1.add(1)).add_(shift1)
    x = x + attention(layer.attn, normed, attn_bias, cache, index).mul_(gamma1)
    normed = layer.ln_wo_grad(x).mul(scale2.add(1)).add_(shift2)
    hidden = F.gelu(layer.ffn.fc1(normed), approximate='tanh')
    return x + layer.ffn.fc2(hidden).mul(gamma2)


@torch.no_grad()
def sample_var(model: VAR, label_B: torch.Tensor, cfg: float, top_k: int, top_p: float,
               rng: Rng) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] of a VAR in eval mode."""
    B = len(label_B)
    null_B = torch.full_like(label_B, model.num_classes)
    cond_BD = model.class_emb(torch.cat((label_B, null_B)))
    position_1LC = model.lvl_embed(model.lvl_1L) + model.pos_1LC
    x = (cond_BD.unsqueeze(1).expand(2 * B, model.first_l, -1)
         + model.pos_start.expand(2 * B, model.first_l, -1) + position_1LC[:, :model.first_l])
    f_hat = cond_BD.new_zeros(B, model.Cvae, model.patch_nums[-1], model.patch_nums[-1])
    cache: Cache = []
    num_scales = len(model.patch_nums)
    begin = 0
    for k, side in enumerate(model.patch_nums):
        begin += side * side
        modulation = model.shared_ada_lin(cond_BD)
        for index, layer in enumerate(model.blocks):
            x = block(layer, x, modulation, None, cache, index)
        logits_BlV = model.get_logits(x, cond_BD)
        ratio = k / (num_scales - 1)
        logits_BlV = guide(logits_BlV[:B], logits_BlV[B:], 1 + cfg * ratio)
        idx_Bl = draw(logits_BlV, top_k, top_p, rng)
        quantize = model.tokenizer.quantize
        h_BZpp = quantize.embedding(idx_Bl).transpose(1, 2).reshape(B, model.Cvae, side, side)
        f_hat, next_input = quantize.get_next_autoregressive_input(k, num_scales, f_hat, h_BZpp)
        if k < num_scales - 1:
            next_side = model.patch_nums[k + 1]
            x = model.word_embed(next_input.view(B, model.Cvae, -1).transpose(1, 2))
            x = x + position_1LC[:, begin:begin + next_side ** 2]
            x = x.repeat(2, 1, 1)
    return model.tokenizer.fhat_to_img(f_hat).add_(1).mul_(0.5)


def loss_var(model: VAR, images_B3HW: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """The published training loss: float32 tokenizer, dense additive mask, logits of all tokens at once."""
    idx_kBl = model.tokenizer.img_to_idxBl(images_B3HW)
    target_BL = torch.cat(idx_kBl, dim=1)
    teacher_BLZ = model.tokenizer.quantize.idxBl_to_var_input(idx_kBl)
    B = len(label_B)
    cond_BD = model.class_emb(label_B)
    x = cond_BD.unsqueeze(1).expand(B, model.first_l, -1) + model.pos_start.expand(B, model.first_l, -1)
    x = torch.cat((x, model.word_embed(teacher_BLZ.float())), dim=1)
    x = x + model.lvl_embed(model.lvl_1L.expand(B, -1)) + model.pos_1LC
    modulation = model.shared_ada_lin(cond_BD)
    for index, layer in enumerate(model.blocks):
        x = block(layer, x, modulation, model.attn_bias_for_masking, None, index)
    logits_BLV = model.get_logits(x.float(), cond_BD)
    loss = F.cross_entropy(logits_BLV.view(-1, model.V), target_BL.view(-1), reduction='none')
    return loss.view(B, -1).mul(1 / model.L).sum(dim=-1).mean()


# ---------------------------------------------------------------------------------------------- FlexVAR
@torch.no_grad()
def sample_flexvar(model: FlexVAR, label_B: torch.Tensor, cfg: float, top_k: int, top_p: float,
                   rng: Rng) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] of a FlexVAR in eval mode, at sides that it draws at."""
    B = len(label_B)
    null_B = torch.full_like(label_B, model.num_classes)
    cond_BD = model.class_emb(torch.cat((label_B, null_B)))
    x = (cond_BD + model.pos_start[0]).view(2 * B, 1, -1) + model.positions((1, 1))
    cache: Cache = []
    num_scales = len(model.patch_nums)
    for k, side in enumerate(model.patch_nums):
        modulation = model.shared_ada_lin(cond_BD)
        for index, layer in enumerate(model.blocks):
            x = block(layer, x, modulation, None, cache, index)
        logits_BlV = model.get_logits(x, cond_BD)
        logits_BlV = guide(logits_BlV[:B], logits_BlV[B:], 1 + cfg * k / (num_scales - 1))
        idx_Bl = draw(logits_BlV, top_k, top_p, rng)
        code_BZpp = model.tokenizer.quantize.embed(idx_Bl, (side, side))
        if k < num_scales - 1:
            next_side = model.patch_nums[k + 1]
            next_input = F.interpolate(code_BZpp, size=(next_side, next_side), mode='bicubic')
            x = model.word_embed(next_input.flatten(2).transpose(1, 2))
            x = x + model.positions((next_side, next_side))
            x = x.repeat(2, 1, 1)
    return model.tokenizer.pixels(code_BZpp).clamp(-1, 1).add_(1).mul_(0.5)


def loss_flexvar(model: FlexVAR, images_B3HW: torch.Tensor, label_B: torch.Tensor,
                 patch_nums: Sequence[int]) -> torch.Tensor:
    """The published training loss on one pyramid, whose mask is built anew."""
    idx_kBl = model.tokenizer.encode(images_B3HW, patch_nums)
    target_BL = torch.cat(idx_kBl, dim=1)
    inputs = []
    for k, next_side in enumerate(patch_nums[1:]):
        code_BZpp = model.tokenizer.quantize.embed(idx_kBl[k], (patch_nums[k], patch_nums[k]))
        next_input = F.interpolate(code_BZpp, size=(next_side, next_side), mode='bicubic')
        inputs.append(next_input.flatten(2).transpose(1, 2))
    cond_BD = model.class_emb(label_B)
    x = (cond_BD + model.pos_start[0]).unsqueeze(1)
    x = torch.cat((x, model.word_embed(torch.cat(inputs, dim=1))), dim=1)
    x = x + torch.cat([model.positions((side, side)) for side in patch_nums], dim=1)
    attn_bias = ScaleLayout(tuple(patch_nums)).causal_bias(x.device)[None, None]
    modulation = model.shared_ada_lin(cond_BD)
    for index, layer in enumerate(model.blocks):
        x = block(layer, x, modulation, attn_bias, None, index)
    logits_BLV = model.get_logits(x.float(), cond_BD)
    return F.cross_entropy(logits_BLV.view(-1, model.V), target_BL.view(-1))


# ---------------------------------------------------------------------------------------------- NPP
@torch.no_grad()
def sample_npp(model: NPP, label_B: torch.Tensor, guidance: float, top_k: int, rng: Rng) -> torch.Tensor:
    """Codes (B, N) of an NPP in eval mode: each attends to a cache of full length, under a mask."""
    B = len(label_B)
    N = model.grid ** 2
    null_B = torch.full_like(label_B, model.num_classes)
    x = model.cls_embedding(torch.cat((label_B, null_B)))
    table = model.rope_table(model.grid)
    mask = torch.ones(N + 1, N + 1, dtype=torch.bool, device=x.device).tril()
    head_dim = x.shape[-1] // model.n_head
    cache = [torch.zeros(2, 2 * B, model.n_head, N + 1, head_dim, device=x.device) for _ in model.layers]
    codes = []
    for i in range(N):
        for layer, storage in zip(model.layers, cache, strict=True):
            x = x + npp_attention(layer.attention, layer.attention_norm(x), table[:, i:i + 1], storage, i,
                                  mask[i])
            x = x + npp_feed_forward(layer.feed_forward, layer.ffn_norm(x))
        logits_B1V = F.linear(model.norm(x), model.output.weight).float()
        logits_B1V = guide(logits_B1V[:B], logits_B1V[B:], guidance)
        idx_B1 = draw(logits_B1V, top_k, 0., rng)
        codes.append(idx_B1)
        x = model.tok_embeddings(idx_B1).repeat(2, 1, 1)
    return torch.cat(codes, dim=1)


def loss_npp(model: NPP, idx_BN: torch.Tensor, label_B: torch.Tensor, p: int) -> torch.Tensor:
    """The published loss for patches of p x p codes: logits are repeated for every code of a patch."""
    logits_BPV = model(label_B, idx_BN, p)
    idx_BPM = patches(idx_BN, p)
    logits_BPMV = logits_BPV.unsqueeze(2).expand(-1, -1, idx_BPM.shape[2], -1)
    return F.cross_entropy(logits_BPMV.reshape(-1, logits_BPV.shape[2]), idx_BPM.flatten())


def npp_feed_forward(ffn: nn.Module, x_B1C: torch.Tensor) -> torch.Tensor:
    """The feed-forward network by plain products."""
    hidden = F.silu(F.linear(x_B1C, ffn.w1.weight)) * F.linear(x_B1C, ffn.w3.weight)
    return F.linear(hidden, ffn.w2.weight)


def npp_attention(attn: nn.Module, x_B1C: torch.Tensor, table_21p: torch.Tensor, storage: torch.Tensor,
                  i: int, mask_L: torch.Tensor) -> torch.Tensor:
    """Attention of one token to all places of the cache, of which the mask hides those to come."""
    B, _, C = x_B1C.shape
    q, k, v = F.linear(x_B1C, attn.wqkv.weight).view(B, 1, 3, attn.n_head, -1).unbind(2)
    storage[0, :, :, i] = rotate(k, table_21p)[:, 0]
    storage[1, :, :, i] = v[:, 0]
    q = rotate(q, table_21p).transpose(1, 2)                                               # (B, H, 1, d)
    out = F.scaled_dot_product_attention(q, storage[0], storage[1], attn_mask=mask_L[None, None, None],
                                         scale=1 / math.sqrt(q.shape[-1]))
    return F.linear(out.transpose(1, 2).reshape(B, 1, C), attn.wo.weight)
