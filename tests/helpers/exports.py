"""Shared by several test modules."""

from pathlib import Path
from typing import Any

import torch

from softprompt.prompt.adapter_io import Adapter, adapter_files, peft_config
from softprompt.utils.atomic_io import write_folder


def write_adapter(folder: Path, base: Any, name: str, P: int, seed: int = 1, **own: Any) -> Path:
    """A random prompt as train.py would save it; `own` is softprompt.json."""
    prompt = torch.randn(P, base.get_input_embeddings().embedding_dim, generator=torch.Generator().manual_seed(seed))
    write_folder(folder, adapter_files(Adapter(prompt, peft_config(name, base.config, prompt, "RANDOM"), own)))
    return folder
