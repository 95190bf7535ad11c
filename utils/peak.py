"""The speed of large products on a device, which a training can come near to but not pass."""
import functools
import time

import torch

FIRST_SIDE = 128   # of the matrices; their sides double until a product takes ENOUGH seconds
LAST_SIDE = 8192
ENOUGH = 2e-3
REPEATS = 5


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some products of square matrices, measured once per process.

    It takes some hundredths of a second. float32 uses TF32 where that is allowed at the first call.
    """
    highest = 0.
    side = FIRST_SIDE
    seconds = 0.
    while seconds < ENOUGH and side <= LAST_SIDE:
        seconds = _seconds_of_product(side, device, dtype)
        highest = max(highest, 2 * side ** 3 / seconds)
        side *= 2
    return highest


@torch.no_grad()
def _seconds_of_product(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the fastest of some products of two matrices."""
    def wait() -> None:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    # A generator of its own, since the random numbers of a training must not depend on this.
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.rand(side, side, generator=generator, device=device).to(dtype)
    times = []
    with torch.autocast(device.type, enabled=False):
        for _ in range(REPEATS):
            wait()
            begin = time.perf_counter()
            matrix @ matrix
            wait()
            times.append(time.perf_counter() - begin)
    return min(times)
