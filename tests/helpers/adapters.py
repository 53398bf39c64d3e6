"""Adapter folders with random prompts, as train.py would save them."""

from pathlib import Path
from typing import Any

import torch
from helpers.bases import make_bloom
from transformers import PreTrainedModel

from softprompt.prompt.adapter_folder import adapter_files, peft_config
from softprompt.prompt.adapter_io import Adapter
from softprompt.utils.atomic_io import write_folder


def write_adapter(
    folder: Path,
    base: Path | str = "some/base",
    P: int = 3,
    template: str = "default",
    seed: int = 0,
    hidden_size: int = 32,
) -> Path:
    """Write an adapter whose config names `base`, which need not exist. Return `folder`."""
    config = make_bloom(hidden_size=hidden_size).config
    return _write(folder, config, str(base), _random(P, hidden_size, seed), {"template": template})


def write_adapter_for(folder: Path, base: PreTrainedModel, name: str, P: int, seed: int = 1, **settings: Any) -> Path:
    """Write an adapter that fits a loaded `base` of any architecture and names it `name`. `settings` become its
    softprompt.json. Return `folder`."""
    prompt = _random(P, base.get_input_embeddings().embedding_dim, seed)
    return _write(folder, base.config, name, prompt, settings)


def _random(P: int, H: int, seed: int) -> torch.Tensor:
    """A random prompt [P, H] fp32."""
    return torch.randn(P, H, generator=torch.Generator().manual_seed(seed))


def _write(folder: Path, config: Any, name: str, prompt: torch.Tensor, settings: dict[str, Any]) -> Path:
    write_folder(folder, adapter_files(Adapter(prompt, peft_config(name, config, prompt, "RANDOM"), settings)))
    return folder
