"""Sampling of the product against the published way of computing it, with the same weights, in one run.

`python -m bench.sampling`: VAR and FlexVAR at 680 tokens, NPP at 256 codes and FlowAR at 256 pixels, each at
batches 1 and 4. Call by call the two ways take turns, and the medians are compared. Before anything is timed,
both must draw the same from the same noise.
"""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench import reference
from bench.common import (
    compare,
    counted,
    default_device,
    report_header,
    require_equal,
    to_device,
    write_report,
)
from bench.cost import npp_flops, sampling_flops
from bench.counter import Cost
from bench.published_solver import both_halves
from models import NPP, VAR, VQVAE, ARModel, AutoencoderKL, FlexVAE, FlexVAR, FlowAR, VQModel
from models.noise import ImageNoise
from utils.amp_sc import autocast, bfloat16_on_cpu

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
TOP_K = 900
TOP_P = 0.96


def make_var(depth: int) -> VAR:
    """A VAR of published width at 680 tokens on a narrow tokenizer, with weights that tell codes apart."""
    vae = VQVAE(ch=32, v_patch_nums=PATCH_NUMS)
    model = VAR(vae, attn_l2_norm=True, patch_nums=PATCH_NUMS, **VAR.published_sizes(depth))
    model.init_weights(init_adaln_gamma=1e-1, init_head=1., init_std=-1)
    return model.eval()


def make_flexvar(depth: int) -> FlexVAR:
    """A FlexVAR of published width at 680 tokens on a narrow tokenizer."""
    vae = FlexVAE(ch=32, test_mode=True)
    model = FlexVAR(vae, attn_l2_norm=True, patch_nums=PATCH_NUMS, **FlexVAR.published_sizes(depth))
    model.init_weights(init_adaln_gamma=1e-1, init_head=1., init_std=-1)
    return model.eval()


def make_npp() -> NPP:
    """A small NPP over 16x16 codes."""
    vae = VQModel(ch=32, test_mode=True)
    model = NPP(vae, dim=512, n_layer=8, n_head=8)
    torch.nn.init.normal_(model.output.weight, std=0.1)
    return model.eval()


def make_flowar() -> FlowAR:
    """A narrow FlowAR with cross-attention over 16x16 latents."""
    vae = AutoencoderKL(ch=32, test_mode=True)
    sizes = dict(encoder_embed_dim=384, encoder_depth=4, encoder_num_heads=6,
                 decoder_embed_dim=384, decoder_depth=4, decoder_num_heads=6)
    return FlowAR(vae, **sizes, diffloss_d=6, diffloss_w=384, cross=True).eval()


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are worth a row."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported()
    is_fast, _ = bfloat16_on_cpu()
    return is_fast


def with_precision(device: torch.device, precision: int, run: Callable[[], object]) -> object:
    """A call in this precision, 0 or 2 as `--fp16` takes it."""
    with torch.no_grad(), autocast(device.type, precision):
        return run()


def row_name(model: str, batch: int, args: argparse.Namespace) -> str:
    """What a row is of, but for its precision."""
    return f'{model}, batch {batch}, compiled' if args.compile else f'{model}, batch {batch}'


def count_and_compile(name: str, model: ARModel, product: Callable[[], object], flops: float,
                      compiles: bool) -> Cost:
    """What a call of the product costs in eager code; then it is compiled, if it is to be.

    Args:
        flops: of the call, by formula.
    """
    cost = counted(name, product, flops)
    if compiles:
        model.compile_sampling()
    return cost


def rows_of_var(args: argparse.Namespace, device: torch.device, batch: int) -> list[dict]:
    """VAR in float32 and in bfloat16 against the published way in float32."""
    model = to_device(make_var(args.depth), device)
    cfg = 1.5 if args.cfg is None else args.cfg
    return rows_by_precision('VAR', model, reference.sample_var, cfg, args, device, batch)


def rows_of_flexvar(args: argparse.Namespace, device: torch.device, batch: int) -> list[dict]:
    """The same of FlexVAR."""
    model = to_device(make_flexvar(args.depth), device)
    cfg = 2.5 if args.cfg is None else args.cfg
    return rows_by_precision('FlexVAR', model, reference.sample_flexvar, cfg, args, device, batch)


def rows_by_precision(family: str, model: VAR | FlexVAR, sample: Callable[..., torch.Tensor], cfg: float,
                      args: argparse.Namespace, device: torch.device, batch: int) -> list[dict]:
    """The product in float32, and in bfloat16 where that is fast, against the published way in float32.

    Args:
        sample: the published way, a function of `bench.reference`.
    """
    label_B = torch.arange(batch, device=device)
    numbers = list(range(batch))

    def product(noise=None) -> torch.Tensor:
        rng = noise or ImageNoise(1, numbers)
        return model.sample(label_B, guidance=1 + cfg, top_k=TOP_K, top_p=TOP_P, rng=rng)

    def published(noise=None) -> torch.Tensor:
        rng = noise or torch.Generator(device).manual_seed(1)
        return sample(model, label_B, cfg, TOP_K, TOP_P, rng)

    require_equal(family, product(ImageNoise(0, numbers)), published(ImageNoise(0, numbers)), 1e-3)
    guided = '' if cfg else ', without guidance'
    name = row_name(f'{family} depth {args.depth}{guided}', batch, args)
    flops = batch * sampling_flops(model, dict(guidance=1 + cfg))
    cost = count_and_compile(name, model, product, flops, args.compile)
    rows = [compare(f'{name}, float32', product, published, args.repeats, device, cost=cost)]
    if has_fast_bfloat16(device):
        in_bfloat16 = partial(with_precision, device, 2, product)
        rows.append(compare(f'{name}, bfloat16', in_bfloat16, published, args.repeats, device, torch.bfloat16,
                            cost))
    return rows


def rows_of_npp(args: argparse.Namespace, device: torch.device, batch: int) -> list[dict]:
    """Codes of NPP against a masked cache of full length."""
    model = to_device(make_npp(), device)
    label_B = torch.arange(batch, device=device)
    numbers = list(range(batch))

    def product() -> torch.Tensor:
        return model.sample_tokens(label_B, guidance=2., top_k=TOP_K, rng=ImageNoise(0, numbers))

    def published(noise=None) -> torch.Tensor:
        rng = noise or torch.Generator(device).manual_seed(1)
        return reference.sample_npp(model, label_B, 2., TOP_K, rng)

    require_equal('NPP', product(), published(ImageNoise(0, numbers)), 0.)
    name = row_name('NPP 8 x 512', batch, args) + ', float32'
    cost = count_and_compile(name, model, product, batch * npp_flops(model), args.compile)
    return [compare(name, product, published, args.repeats, device, cost=cost)]


def rows_of_flowar(args: argparse.Namespace, device: torch.device, batch: int) -> list[dict]:
    """FlowAR against the published solver, which moves a state of the null class at every step."""
    model = to_device(make_flowar(), device)
    label_B = torch.arange(batch, device=device)
    options = dict(guidance=2., num_steps=10, lower_steps=10, guidance_until=0.9)

    def product() -> torch.Tensor:
        return model.sample(label_B, rng=ImageNoise(0, list(range(batch))), **options)

    def published() -> torch.Tensor:
        with both_halves(model):
            return product()

    with torch.no_grad():
        require_equal('FlowAR', product(), published(), 1e-3)
    name = row_name('FlowAR', batch, args) + ', float32'
    cost = count_and_compile(name, model, product, batch * sampling_flops(model, options), args.compile)
    return [compare(name, product, published, args.repeats, device, cost=cost)]


ROWS = dict(var=rows_of_var, flexvar=rows_of_flexvar, npp=rows_of_npp, flowar=rows_of_flowar)


def main() -> None:
    """Compare all families and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--depth', type=int, default=8, help='of VAR and FlexVAR')
    parser.add_argument('--batches', type=int, nargs='+', default=[1, 4])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--families', nargs='+', choices=ROWS, default=list(ROWS))
    parser.add_argument('--cfg', type=float, help='guidance of VAR and FlexVAR; 0 is off')
    parser.add_argument('--compile', action='store_true', help='compile the product')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    device = default_device()
    torch.manual_seed(0)
    rows = []
    for batch in args.batches:
        for family in args.families:
            rows += ROWS[family](args, device, batch)
    write_report(report_header('sampling', device) | dict(rows=rows), args.out)


if __name__ == '__main__':
    main()
