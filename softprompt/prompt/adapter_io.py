"""Adapter folders in PEFT's exact format, with what this project needs beside it; a run's checkpoint folders.

adapter_config.json, adapter_model.safetensors   PEFT's two files, as peft 0.21 writes them for PROMPT_TUNING
softprompt.json                                  template, generation defaults, how rows were read; PEFT ignores it
README.md                                        a model card

What a later run needs to go on stands beside them: see resume.py. safetensors and JSON only, no pickle.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from softprompt.config.schema import is_text
from softprompt.prompt.adapter_kinds import check_kind
from softprompt.prompt.file_names import CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from softprompt.utils.atomic_io import open_inside, read_inside
from softprompt.utils.errors import AdapterError
from softprompt.utils.model_config import layers_and_heads
from softprompt.utils.shell_commands import command

PROMPT_KEY = "prompt_embeddings"
PEFT_VERSION = "0.21.2"  # whose format this is
CHECKPOINT = "checkpoint-(?:0|[1-9][0-9]*)"  # pattern of a folder's name
MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # of a safetensors file
MAX_TOKENS, MAX_SIZE = 100_000, 1 << 20  # P and H of a prompt
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
AGAIN = "copy the whole folder again, or take another checkpoint"


@dataclass(frozen=True)
class Adapter:
    """A learned prompt [P, H] fp32, the PEFT configuration that names its base, and our settings for using it.

    `settings` may hold `template` (see Template.spec), `generation` (defaults of infer.py), and how the rows were read
    and cut (`max_length`, `truncation_side`, `columns`); it is empty for an adapter that PEFT wrote.
    """

    prompt: Tensor
    config: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_model_name_or_path(self) -> str | None:
        """None where none is named; PEFT writes "" for a base that was made from a configuration."""
        name = self.config.get("base_model_name_or_path")
        return name if name and name.strip() else None


def peft_config(
    base_name: str, base_config: Any, prompt: Tensor, init: str, init_text: str | None = None
) -> dict[str, Any]:
    """The keys and values that PEFT's PromptTuningConfig saves for a prompt [P, H] of this base.

    PEFT knows no CLASS_LABELS. It takes the name unchecked, but a reader that makes its PromptTuningInit of it fails,
    so what is written is the nearest that it knows; the card and the checkpoint have the labels.
    """
    num_layers, num_attention_heads = layers_and_heads(base_config)
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.shape[0],
        "peft_type": "PROMPT_TUNING",
        "peft_version": PEFT_VERSION,
        "prompt_tuning_init": "SAMPLE_VOCAB" if init == "CLASS_LABELS" else init,
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
        AdapterError: no such folder; a file that is absent, unreadable, too large, broken or a link that leads out of
            the folder; another kind of adapter; a tensor beside the prompt, or of another shape than the configuration
            says; values that are not finite.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise AdapterError(f"adapter {folder}: no such folder; give an OUTPUT_DIR or checkpoint-N of train.py")
    config = _read_json(folder, CONFIG_FILE)
    check_kind(folder / CONFIG_FILE, config)
    base = config.get("base_model_name_or_path")
    if base is not None and not (is_text(base) and len(base) < 4096 and base.isprintable()):
        raise AdapterError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path is {base!r:.80}, no name or path of a base; write it "
            "there, or null and give --model_name_or_path"
        )
    settings = _read_json(folder, SETTINGS_FILE) if (folder / SETTINGS_FILE).exists() else {}
    return Adapter(_read_prompt(folder, config), config, settings)


def newest_adapter(runs: Path) -> Path:
    """The adapter that was written last under `runs`: a run's own, or a checkpoint of one that has not ended.

    Raises:
        AdapterError: there is none.
    """
    paths = [path for pattern in ("*", "*/checkpoint-*") for path in runs.glob(f"{pattern}/{WEIGHTS_FILE}")]
    # a finished run's own files are written after its last checkpoint
    if found := [(written, path) for path in paths if (written := _written(path)) is not None]:
        return max(found)[1].parent
    raise AdapterError(f"no trained adapter under {runs}/; run `{command('train')}` first, or name one with --adapter")


def _written(path: Path) -> int | None:
    """When a file was written, in ns; None where it is gone by now, as a run removes its old checkpoints."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _read(folder: Path, name: str, limit: int) -> bytes:
    try:
        return read_inside(folder, name, limit)
    except FileNotFoundError:
        more = _way_out_of_pickle(folder) if name == WEIGHTS_FILE else ""
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
    """The prompt [P, H] fp32, whose file may be no larger than the configuration lets it."""
    path, expected = folder / WEIGHTS_FILE, (config.get("num_virtual_tokens"), config.get("token_dim"))
    for name, size, most in zip(("num_virtual_tokens", "token_dim"), expected, (MAX_TOKENS, MAX_SIZE), strict=True):
        if type(size) is not int or not 1 <= size <= most:
            raise AdapterError(
                f"{folder / CONFIG_FILE}: {name} is {size!r:.80}, expected a number from 1 to {most:,}; {AGAIN}"
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
        raise AdapterError(f"{path}: holds values that are not finite; train it anew or use an earlier checkpoint")
    return prompt


def _names_in_header(folder: Path) -> list[str] | None:
    """The tensors' names, without reading the tensors: a head over the vocabulary is larger than any prompt. None for a
    header that cannot be read; whoever reads the whole file says why."""
    try:
        with open_inside(folder, WEIGHTS_FILE) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= MAX_HEADER_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return [name for name in header if name != "__metadata__"] if isinstance(header, dict) else None


def _check_names(path: Path, names: Sequence[str] | None) -> None:
    """Raises AdapterError where a file's tensors, if these are known, are not the prompt alone."""
    if names is None or names == [PROMPT_KEY]:
        return
    others = [name for name in names if name != PROMPT_KEY]
    found = ", ".join(repr(name)[1:-1][:80] for name in others[:3]) or "nothing"
    if PROMPT_KEY not in names:
        raise AdapterError(
            f"{path}: holds {found}, expected one tensor {PROMPT_KEY!r}; give a folder that PEFT or train.py wrote for "
            "prompt tuning"
        )
    raise AdapterError(
        f"{path}: holds {found} beside {PROMPT_KEY!r}: weights that were trained with the prompt, which answers "
        "otherwise without them; use it with PEFT itself"
    )


def _way_out_of_pickle(folder: Path) -> str:
    if (folder / "adapter_model.bin").exists():
        return (
            "; adapter_model.bin is a pickle and is not read: load it in PEFT and save it again with "
            "model.save_pretrained(DIR, safe_serialization=True)"
        )
    return ""
