"""Linear layers for decoding: few rows times a large weight. Memory bandwidth limits this product, while GEMM kernels
are optimized for many rows.

The result equals that of `F.linear` up to rounding. Only generation uses it, so that losses and likelihoods are the
same in training and in inference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Thresholds in rows, measured with benchmarks/products.py on one machine (two AVX2 cores, MKL). From about MAX_FEW_ROWS
# on, F.linear was as fast. From MIN_TRANSPOSED on, a transposed argument was faster than a contiguous one.
MAX_FEW_ROWS = 64
MIN_TRANSPOSED = 16


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [S, in] · weightᵀ + bias [out] as [S, out], for a weight [out, in]. All tensors have the same dtype;
    their strides may be any.

    On the CPU in fp32, few rows are computed as (weight · xᵀ)ᵀ, and a single row is split over the threads
    (benchmarks/products.py measures the gain). Otherwise this is `F.linear`. Use it for inference only.
    """
    few = 0 < len(x) <= MAX_FEW_ROWS and x.device.type == "cpu" and x.dtype == torch.float32
    if not few:
        return F.linear(x, weight, bias)
    y = _one_row(x, weight) if len(x) == 1 else _few_rows(x, weight)
    return y if bias is None else y.add_(bias)


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Compute [rows, in] → [rows, out]. The result is transposed in memory; from MIN_TRANSPOSED rows on, the next call
    uses it without a copy."""
    return torch.mm(weight, (x if len(x) >= MIN_TRANSPOSED else x.contiguous()).T).T


def _one_row(x: Tensor, weight: Tensor) -> Tensor:
    """Compute [1, in] → [1, out]; each thread takes an equal part of the weight's rows."""
    parts = torch.get_num_threads()
    whole = len(weight) // parts * parts
    blocks = weight[:whole].unflatten(0, (parts, -1)).transpose(1, 2)  # [parts, in, whole / parts]
    y = torch.bmm(x.expand(parts, 1, -1), blocks).view(1, whole)
    return y if whole == len(weight) else torch.cat([y, F.linear(x, weight[whole:])], dim=1)
