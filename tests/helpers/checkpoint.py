"""Shared by several test modules."""

from pathlib import Path

import pytest
import torch
from helpers.bases import make_bloom

from softprompt.prompt.adapter_io import Adapter, adapter_files, peft_config
from softprompt.utils.atomic_io import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter folder."""
    values = torch.arange(12.0).reshape(3, 4)
    config = peft_config("some/base", make_bloom().config, values, "RANDOM")
    write_folder(tmp_path / "adapter", adapter_files(Adapter(values, config, {"template": "chat"})))
    return tmp_path / "adapter"
