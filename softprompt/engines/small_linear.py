"""Products of few rows and a large frozen weight, as decoding takes them: bound by memory, where gemm expects more."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows. From about FEW on the plain product was as fast, and from TRANSPOSED on a transposed argument was faster, in
# benchmarks/products.py on one machine (two AVX2 cores, MKL). Elsewhere others may be better; the product is the same
# whichever they are, but for rounding, and only its speed is not.
FEW = 64
TRANSPOSED = 16


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [S, in] · weightᵀ [in, out] + bias [out] → [S, out], all of one dtype and of any strides.

    Without a gradient, on the CPU and in fp32, few rows go another way, to the same numbers but for rounding: as
    weight · xᵀ, and one row in as many parts as there are threads (benchmarks/products.py shows what that is worth).
    """
    few = len(x) <= FEW and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    if not few or not len(x):
        return F.linear(x, weight, bias)
    y = _one_row(x, weight) if len(x) == 1 else _few_rows(x, weight)
    return y if bias is None else y.add_(bias)


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """What this returns lies transposed in memory, and from 16 rows on that suits the kernel as an argument, too."""
    return torch.mm(weight, (x if len(x) >= TRANSPOSED else x.contiguous()).T).T


def _one_row(x: Tensor, weight: Tensor) -> Tensor:
    """A part of the weight's rows for each thread: [1, in] → [1, out]."""
    parts = torch.get_num_threads()
    whole = len(weight) // parts * parts
    blocks = weight[:whole].unflatten(0, (parts, -1)).transpose(1, 2)  # [parts, in, whole / parts]
    y = torch.bmm(x.expand(parts, 1, -1), blocks).view(1, whole)
    return y if whole == len(weight) else torch.cat([y, F.linear(x, weight[whole:])], dim=1)
