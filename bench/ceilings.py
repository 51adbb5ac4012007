"""What the machine can do at most, measured in the same run: the rates that give each loss's least possible time."""

from typing import NamedTuple

import torch

from bench.timing import stopwatch

BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # of the tensor that is copied and read: far more than a cache holds
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices that are multiplied
REPEATS = 5


class Ceilings(NamedTuple):
    copy: float  # bytes per second, read and written
    read: float  # bytes per second
    products: dict  # dtype -> operations of matrix products per second

    def line(self):
        products = ", ".join(
            f"{str(dtype).removeprefix('torch.')} products {rate / 1e12:.3g} TFLOP/s"
            for dtype, rate in self.products.items()
        )
        return f"Ceilings: copy {self.copy / 1e9:.3g} GB/s, read {self.read / 1e9:.3g} GB/s, {products}"


def measured(device, dtypes):
    seconds_of = stopwatch(device)

    def fastest(work):
        work()
        return min(seconds_of(work) for _ in range(REPEATS))

    source = torch.ones(BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy, read = fastest(lambda: target.copy_(source)), fastest(lambda: source.sum())
    products = {}
    for dtype in dtypes:
        a = torch.ones(SIDE[device.type], SIDE[device.type], dtype=dtype, device=device)
        products[dtype] = 2 * len(a) ** 3 / fastest(lambda a=a: a @ a)
    return Ceilings(2 * source.nbytes / copy, source.nbytes / read, products)


def products_of(case, shape, which):
    """Operations of a head's or a pairwise loss's products; two of its three are the backward's. 0 for other losses."""
    number = {"forward": 1, "no-grad": 1, "backward": 2, "full": 3}[which]
    logits = case.logits(shape)
    return number * 2 * logits * shape[1] if logits else 0


def floor_ms(row, case, shape, dtype, ceilings):
    """The least time that a measurement's bytes and products take at these rates, whichever is longer."""
    by_bytes = row["moved_mb"] * 1e6 / ceilings.copy
    return max(by_bytes, products_of(case, shape, row["pass"]) / ceilings.products[dtype]) * 1e3
