"""Linear layers for decoding: few rows times a large weight, which is bound by memory, where gemm kernels expect more.

The result equals that of `F.linear` except for rounding. Therefore only generation uses it; losses and gradients, and
with them likelihoods, are the same with and without `torch.no_grad`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of rows. From about MAX_FEW_ROWS on, F.linear was as fast; from MIN_TRANSPOSED on, a transposed argument was
# faster than a contiguous one. Measured by benchmarks/products.py on one machine (two AVX2 cores, MKL); elsewhere other
# numbers may be better.
MAX_FEW_ROWS = 64
MIN_TRANSPOSED = 16


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [S, in] · weightᵀ [in, out] + bias [out]: [S, out]. All have one dtype and any strides.

    On the CPU in fp32, few rows are computed as (weight · xᵀ)ᵀ, and one row in as many parts as there are threads
    (benchmarks/products.py shows what that gains). Everything else is `F.linear`. There is no backward pass.
    """
    few = 0 < len(x) <= MAX_FEW_ROWS and x.device.type == "cpu" and x.dtype == torch.float32
    if not few:
        return F.linear(x, weight, bias)
    y = _one_row(x, weight) if len(x) == 1 else _few_rows(x, weight)
    return y if bias is None else y.add_(bias)


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """The result is transposed in memory; with MIN_TRANSPOSED rows or more, that suits the next call's kernel as
    well."""
    return torch.mm(weight, (x if len(x) >= MIN_TRANSPOSED else x.contiguous()).T).T


def _one_row(x: Tensor, weight: Tensor) -> Tensor:
    """Compute [1, in] → [1, out], a part of the weight's rows per thread."""
    parts = torch.get_num_threads()
    whole = len(weight) // parts * parts
    blocks = weight[:whole].unflatten(0, (parts, -1)).transpose(1, 2)  # [parts, in, whole / parts]
    y = torch.bmm(x.expand(parts, 1, -1), blocks).view(1, whole)
    return y if whole == len(weight) else torch.cat([y, F.linear(x, weight[whole:])], dim=1)
