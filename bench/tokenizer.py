"""Images/s of every tokenizer, from pixels to codes and back, in float32 as generators use them.

`python -m bench.tokenizer`: published sizes on a GPU, narrow ones on the CPU.
"""
import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from bench.common import compare, counted, default_device, four_digits, report_header, write_report
from bench.cost import decoder_flops, encode_flops
from models import VQVAE, AutoencoderKL, FlexVAE, Tokenizer, VQModel
from utils.misc import allow_tf32

SIDE = 256  # pixels


def tokenizers(on_gpu: bool) -> Iterator[tuple[str, Tokenizer]]:
    """Name and tokenizer, each built when its turn comes."""
    narrow = {} if on_gpu else dict(ch=32)
    yield 'VQVAE', VQVAE(**dict(ch=160) | narrow)
    yield 'VQ-16', VQModel(test_mode=True, **narrow)
    yield 'FlexVAE', FlexVAE(test_mode=True, **narrow)
    yield 'KL-16', AutoencoderKL(test_mode=True, **narrow)


def main() -> None:
    """Time all tokenizers and write the report."""
    device = default_device()
    on_gpu = device.type == 'cuda'
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--batch', type=int, default=32 if on_gpu else 2)
    parser.add_argument('--repeats', type=int, default=11 if on_gpu else 5)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    allow_tf32(True)  # as trainings do
    images_B3HW = torch.rand(args.batch, 3, SIDE, SIDE, device=device) * 2 - 1
    rows = []
    for name, tokenizer in tokenizers(on_gpu):
        tokenizer.to(device)
        tokens = tokenizer.encode(images_B3HW)
        feature_side = SIDE // tokenizer.stride
        flops = dict(encode=encode_flops(tokenizer, SIDE),
                     decode=decoder_flops(tokenizer.decoder, feature_side))
        runs = dict(encode=partial(tokenizer.encode, images_B3HW), decode=partial(decoded, tokenizer, tokens))
        for what, run in runs.items():
            title = f'{name} {what}, batch {args.batch}'
            cost = counted(title, run, args.batch * flops[what])
            row = compare(title, run, None, args.repeats, device, cost=cost)
            rows.append(row | dict(images_per_second=four_digits(args.batch / row['product_seconds'])))
    write_report(report_header('tokenizer', device) | dict(rows=rows), args.out)


@torch.no_grad()
def decoded(tokenizer: Tokenizer, tokens) -> torch.Tensor:
    """Images (B, 3, H, W) of what the tokenizer has encoded."""
    return tokenizer.decode(tokens)


if __name__ == '__main__':
    main()
