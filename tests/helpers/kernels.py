"""torch's attention kernels for CUDA by their definitions."""

import torch
from torch import nn


def naive_varlen(q, k, v, starts_q, starts_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """torch's variable-length attention: in each part, the last query is aligned with the last key."""
    left, right = window_size
    assert right == 0 and max_q == int(starts_q.diff().max()) and max_k == int(starts_k.diff().max())
    assert starts_q.dtype == starts_k.dtype == torch.int32
    outputs = []
    for b in range(len(starts_q) - 1):
        query, key, value = (
            t[s[b] : s[b + 1]].transpose(0, 1) for t, s in ((q, starts_q), (k, starts_k), (v, starts_k))
        )
        distance = torch.arange(query.shape[1])[:, None] + key.shape[1] - query.shape[1] - torch.arange(key.shape[1])
        mask = (distance >= 0) & (distance <= left if left >= 0 else True)
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)
