"""Compare `generation.decode_linear` with torch's linear, by number of rows.

    python benchmarks/products.py [--threads N]

The weights have the shapes of a base of 49 M and one of 1.3 B parameters, in fp32. The results are medians of 15 calls:
the bytes of the weight divided by the time, in GB/s. Many weights take turns, which do not fit into the caches
together, because decoding also finds its weights outside the caches.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from arguments import ArgumentParser
from measure import clock
from torch import Tensor

from softprompt.generation.decode_linear import decode_linear

SHAPES = {"49m, to 4H": (2048, 512), "49m, head": (46145, 512), "1b4, to 4H": (8192, 2048)}
POOL = 1 << 28  # total bytes of the weights that take turns


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| weight | rows | linear, GB/s | decode_linear, GB/s | ratio |\n|---|---|---|---|---|")
    for name, size in SHAPES.items():
        weights = [torch.randn(size) for _ in range(max(1, POOL // (4 * size[0] * size[1])))]
        for rows in args.rows:
            x = torch.randn(rows, size[1])
            plain, ours = rate(F.linear, x, weights), rate(decode_linear, x, weights)
            print(f"| {name} | {rows} | {plain:.1f} | {ours:.1f} | {ours / plain:.2f} |", flush=True)


@torch.inference_mode()
def rate(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> float:
    """Return the bytes of a weight divided by the median time of a product, in GB/s."""
    seconds = []
    for turn in range(18):
        began = clock(x.device)
        product(x, weights[turn % len(weights)])
        seconds.append(clock(x.device) - began)
    return weights[0].nbytes / statistics.median(seconds[3:]) / 1e9


if __name__ == "__main__":
    main()
