"""Read adapter folders in PEFT's format; `adapter_folder` writes them.

adapter_config.json, adapter_model.safetensors   PEFT's two files, as peft 0.21 writes them for PROMPT_TUNING
softprompt.json                                  settings for inference, and how rows and base were read
README.md                                        the model card

Weights are safetensors and settings are JSON; pickles are not read. The files for resuming a run are handled by
`runs.train_state`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from softprompt.config.schema import is_text
from softprompt.prompt.adapter_kinds import check_kind
from softprompt.prompt.file_names import CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from softprompt.utils.atomic_io import open_inside, read_inside
from softprompt.utils.errors import AdapterError
from softprompt.utils.named_folders import check_adapter_folder

PROMPT_KEY = "prompt_embeddings"
CHECKPOINT = "checkpoint-(?:0|[1-9][0-9]*)"  # regular expression for the name of a checkpoint folder
MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # of a safetensors file
MAX_TOKENS, MAX_SIZE = 100_000, 1 << 20  # largest accepted P and H
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
AGAIN = "copy the whole folder again, or take another checkpoint"


@dataclass(frozen=True)
class Adapter:
    """A learned prompt with its configuration.

    Attributes:
        prompt: The virtual tokens [P, H] fp32.
        config: PEFT's configuration (adapter_config.json), which names the base.
        settings: This project's settings (softprompt.json); empty for an adapter that PEFT wrote. They may contain
            `template` (see `Template.spec`), `generation` (defaults of infer.py), how rows were read and truncated
            (`max_length`, `truncation_side`, `columns`, `optional_columns`), and how the base was quantized
            (`load_in_8bit`, `load_in_4bit`).
    """

    prompt: Tensor
    config: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_model_name_or_path(self) -> str | None:
        """Name or path of the base; None if it is missing or empty. PEFT writes an empty one for a base that was
        created from a configuration."""
        name = self.config.get("base_model_name_or_path")
        return name if name and name.strip() else None


def json_bytes(value: Any) -> bytes:
    """Serialize `value` as indented JSON in UTF-8.

    Raises:
        ValueError: `value` contains NaN or an infinity, which JSON cannot represent.
    """
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def load_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter folder that this project or PEFT wrote.

    Args:
        folder: The folder; a leading ~ is expanded.

    Returns:
        The adapter, its prompt in fp32 on the CPU.

    Raises:
        AdapterError: The folder does not exist; a file is missing, unreadable, damaged, too large, or a link that leads
            out of the folder; the adapter is of another kind or has other tensors than the prompt; the prompt's shape
            differs from the configuration, or its values are not all finite.
    """
    folder = Path(folder).expanduser()
    check_adapter_folder(folder)
    config = _read_json(folder, CONFIG_FILE)
    check_kind(folder / CONFIG_FILE, config)
    base = config.get("base_model_name_or_path")
    if base is not None and not (is_text(base) and len(base) < 4096 and base.isprintable()):
        raise AdapterError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path is {base!r:.80}, which is not a name or path; "
            "correct it, or set it to null and give --model_name_or_path"
        )
    settings = _read_json(folder, SETTINGS_FILE) if (folder / SETTINGS_FILE).exists() else {}
    return Adapter(_read_prompt(folder, config), config, settings)


def _read(folder: Path, name: str, limit: int) -> bytes:
    try:
        return read_inside(folder, name, limit)
    except FileNotFoundError:
        more = _pickle_advice(folder) if name == WEIGHTS_FILE else ""
        more = more or f"; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}: {AGAIN}"
        raise AdapterError(f"{folder}: {name} is missing{more}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / name}: {getattr(error, 'strerror', None) or error}; {AGAIN}") from None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    content = _read(folder, name, MAX_JSON_BYTES)
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / name}: cannot be read as JSON: {error}; {AGAIN}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{folder / name}: expected an object of settings; {AGAIN}")
    return value


def _read_prompt(folder: Path, config: Mapping[str, Any]) -> Tensor:
    """Read the prompt [P, H] fp32. Its shape in the configuration limits how many bytes of the file are read."""
    path, expected = folder / WEIGHTS_FILE, (config.get("num_virtual_tokens"), config.get("token_dim"))
    for name, size, most in zip(("num_virtual_tokens", "token_dim"), expected, (MAX_TOKENS, MAX_SIZE), strict=True):
        if type(size) is not int or not 1 <= size <= most:
            raise AdapterError(
                f"{folder / CONFIG_FILE}: {name} is {size!r:.80}, expected an integer from 1 to {most:,}; {AGAIN}"
            )
    P, H = expected
    _check_names(path, _names_in_header(folder))
    content = _read(folder, WEIGHTS_FILE, MAX_HEADER_BYTES + 8 * P * H)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise AdapterError(f"{path}: not a whole safetensors file ({what}); {AGAIN}") from None
    _check_names(path, list(tensors))
    prompt = tensors[PROMPT_KEY]
    if tuple(prompt.shape) != expected or prompt.dtype not in FLOATS:
        found = f"{str(prompt.dtype).removeprefix('torch.')} {tuple(prompt.shape)}"
        raise AdapterError(f"{path}: {PROMPT_KEY} is {found}, but {CONFIG_FILE} says {expected} of floats; {AGAIN}")
    prompt = prompt.float()
    if not prompt.isfinite().all():
        raise AdapterError(f"{path}: holds values that are not finite; train it again or use an earlier checkpoint")
    return prompt


def _names_in_header(folder: Path) -> list[str] | None:
    """Return the names of the tensors in the weights file, or None if its header cannot be read.

    Only the header is read, because an adapter of another kind may hold a head over the vocabulary, larger than any
    prompt. A broken header is reported when the whole file is read.
    """
    try:
        with open_inside(folder, WEIGHTS_FILE) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= MAX_HEADER_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return [name for name in header if name != "__metadata__"] if isinstance(header, dict) else None


def _check_names(path: Path, names: Sequence[str] | None) -> None:
    """Raise AdapterError if the tensors' names are known and the prompt is missing or not the only one."""
    if names is None or names == [PROMPT_KEY]:
        return
    others = [name for name in names if name != PROMPT_KEY]
    found = ", ".join(repr(name)[1:-1][:80] for name in others[:3]) or "nothing"
    if PROMPT_KEY not in names:
        raise AdapterError(
            f"{path}: holds {found}, expected one tensor {PROMPT_KEY!r}; give an adapter folder that PEFT or train.py "
            "wrote for prompt tuning"
        )
    raise AdapterError(
        f"{path}: holds {found} beside {PROMPT_KEY!r}: the prompt was trained together with these weights "
        "and does not work without them; use the adapter with PEFT itself"
    )


def _pickle_advice(folder: Path) -> str:
    """Return what to do about a pickle of weights; an empty string if there is none."""
    if (folder / "adapter_model.bin").exists():
        return (
            "; adapter_model.bin is a pickle and is not read: load it in PEFT and save it again with "
            "model.save_pretrained(DIR, safe_serialization=True)"
        )
    return ""
