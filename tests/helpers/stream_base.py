"""Shared by several test modules."""

import json
from pathlib import Path

import torch
from helpers.bases import make_bloom
from helpers.interruptions import interrupted, outcome, settings  # noqa: F401 (a fixture)
from safetensors.torch import save_file


def make_large(folder: Path, H: int = 1024, L: int = 15, N: int = 16, dtype: torch.dtype = torch.float32) -> None:
    """Many blocks and few words, file by file: the values of one block for all of them."""
    from transformers import BloomConfig

    one = make_bloom(H, 1, N, initializer_range=0.02).to(dtype)
    block = {n: t for n, t in one.state_dict().items() if n != "lm_head.weight"}
    BloomConfig(hidden_size=H, n_layer=L, n_head=N, vocab_size=300, dtype=dtype).save_pretrained(folder)
    names = {}
    for i in range(L):
        renamed = {n.replace(".h.0.", f".h.{i}."): t for n, t in block.items() if ".h.0." in n or i == 0}
        save_file(renamed, folder / f"model-{i}.safetensors")
        names |= dict.fromkeys(renamed, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
