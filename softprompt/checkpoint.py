"""Adapter folders in PEFT's exact format, with what this project needs beside it; a run's checkpoint folders.

adapter_config.json, adapter_model.safetensors   PEFT's two files, as peft 0.21 writes them for PROMPT_TUNING
softprompt.json                                  template and generation defaults; PEFT ignores it
README.md                                        a model card

What a later run needs to go on stands beside them: see resume.py. safetensors and JSON only, no pickle.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from softprompt.errors import AdapterError, OutputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SETTINGS_FILE = "softprompt.json"
PROMPT_KEY = "prompt_embeddings"
PEFT_VERSION = "0.21.2"  # whose format this is
MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True)
class Adapter:
    """A learned prompt [P, H] fp32, the PEFT configuration that names its base, and our settings for using it.

    `settings` may hold `template` (see Template.spec) and `generation` (defaults of infer.py); it is empty for
    an adapter that PEFT wrote.
    """

    prompt: Tensor
    config: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_model_name_or_path(self) -> str | None:
        return self.config.get("base_model_name_or_path")


def peft_config(
    base_name: str, base_config: Any, prompt: Tensor, init: str, init_text: str | None = None
) -> dict[str, Any]:
    """The keys and values that PEFT's PromptTuningConfig saves for a prompt [P, H] of this base."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": base_config.num_attention_heads,
        "num_layers": base_config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.shape[0],
        "peft_type": "PROMPT_TUNING",
        "peft_version": PEFT_VERSION,
        "prompt_tuning_init": init,
        "prompt_tuning_init_text": init_text,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": prompt.shape[1],
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": base_name if init == "TEXT" else None,
    }


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """The adapter's files as PEFT writes them, and softprompt.json."""
    values = adapter.prompt.detach().to("cpu", torch.float32).contiguous()
    return {
        WEIGHTS_FILE: save({PROMPT_KEY: values}, metadata={"format": "pt"}),
        CONFIG_FILE: json.dumps(adapter.config, indent=2, sort_keys=True).encode(),
        SETTINGS_FILE: json_bytes(adapter.settings),
    }


def json_bytes(value: Any) -> bytes:
    """Readable JSON in UTF-8; NaN and infinities are refused, since JSON has none."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder, ours or PEFT's, and check everything before it is used.

    Raises:
        AdapterError: no such folder, a file absent, unreadable or broken, another kind of adapter, a tensor of another
            shape than the configuration says, or values that are not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"adapter {folder}: no such folder; give an OUTPUT_DIR or checkpoint-N of train.py")
    config = _read_json(folder / CONFIG_FILE)
    if config.get("peft_type") != "PROMPT_TUNING":
        raise AdapterError(
            f"{folder / CONFIG_FILE}: peft_type is {config.get('peft_type')!r}, expected 'PROMPT_TUNING'"
        )
    settings = _read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).exists() else {}
    return Adapter(_read_prompt(folder, config), config, settings)


def newest_adapter(runs: Path) -> Path:
    """The adapter that was written last under `runs`: a run's own, or a checkpoint of one that has not ended.

    Raises:
        AdapterError: there is none.
    """
    found = [path for pattern in ("*", "*/checkpoint-*") for path in runs.glob(f"{pattern}/{WEIGHTS_FILE}")]
    if not found:
        raise AdapterError(f"no trained adapter under {runs}/; run `python train.py` first, or name one with --adapter")
    # a finished run's own files are written after its last checkpoint
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint-N folders of a run, oldest first."""
    numbered = [
        (int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [path for _, path in sorted(numbered)]


def remove_old_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Keep the newest `limit` checkpoints (None: all)."""
    for path in checkpoints(output_dir)[: -limit if limit else 0]:
        shutil.rmtree(path)


def refuse_other_run(output_dir: Path, overwrite: bool) -> None:
    """Raises OutputError where `output_dir` holds a run already and is not to be overwritten."""
    if not overwrite and ((output_dir / CONFIG_FILE).exists() or checkpoints(output_dir)):
        raise OutputError(
            f"--output_dir {output_dir} holds a run already; go on with it (--resume_from_checkpoint), start anew "
            "over it (--overwrite_output_dir), or name another folder"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise AdapterError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes, so it is no adapter's configuration")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{path.parent}: {path.name} is missing; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: expected an object of settings")
    return value


def _read_prompt(folder: Path, config: Mapping[str, Any]) -> Tensor:
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise AdapterError(f"{folder}: {WEIGHTS_FILE} is missing{_way_out_of_pickle(folder)}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            prompt = file.get_tensor(PROMPT_KEY) if PROMPT_KEY in names else None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    if prompt is None:
        raise AdapterError(f"{path}: holds {', '.join(names[:3]) or 'nothing'}, expected one tensor {PROMPT_KEY!r}")
    expected = (config.get("num_virtual_tokens"), config.get("token_dim"))
    if tuple(prompt.shape) != expected or not prompt.is_floating_point() or prompt.numel() == 0:
        found = f"{str(prompt.dtype).removeprefix('torch.')} {tuple(prompt.shape)}"
        raise AdapterError(f"{path}: {PROMPT_KEY} is {found}, but {CONFIG_FILE} says {expected} of floats")
    if not prompt.isfinite().all():
        raise AdapterError(f"{path}: holds values that are not finite; train it anew or use an earlier checkpoint")
    return prompt.float()


def _way_out_of_pickle(folder: Path) -> str:
    if (folder / "adapter_model.bin").exists():
        return (
            "; adapter_model.bin is a pickle and is not read: load it in PEFT and save it again with "
            "model.save_pretrained(DIR, safe_serialization=True)"
        )
    return f"; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
