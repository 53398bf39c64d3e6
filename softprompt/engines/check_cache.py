"""The cache of the results of checks (`self_check`), in files. `result_key` lists what a result depends on."""

import contextlib
import hashlib
import json
import math
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from softprompt.engines.self_check import CheckResult
from softprompt.utils.atomic_io import cache_dir, write_files

CHECKED_PACKAGES = ("data", "engines", "generation", "models", "prompt", "utils")


def cached_result(key: str, longest: int) -> CheckResult | None:
    """Return the cached result for `key` if it holds for rows of `longest` tokens."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        result = CheckResult(**json.loads((cache_dir("engines") / key).read_text(encoding="ascii")))
        numbers = [*result[:-3], result.speed or 1.0]
        whole = all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers) and numbers[-1] > 0
        if whole and result.failure is None and result.longest >= longest:
            return result
    return None


def cache_result(key: str, result: CheckResult) -> None:
    """Cache the result of a check that the packed engine passed. If the result cannot be written, it is not cached.

    Do not cache a failed check: the packed engine may be right for shorter rows, and an error may not occur again.
    """
    folder = cache_dir("engines")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, {key: json.dumps(result._asdict()).encode()})


def result_key(base: PreTrainedModel, device: torch.device, dtype: torch.dtype, P: int, *settings: Any) -> str:
    """Return the key under which a result is cached: a hash of the base's configuration and class, the GPU or the CPU
    and the number of its threads, the dtype, P, the versions of torch, transformers and softprompt, the code and
    `settings`."""
    on_cpu = f"{device.type} {_cpu_name()} {torch.get_num_threads()}"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    versions = torch.__version__, transformers.__version__, version("softprompt"), _code_hash()
    about = [base.config.to_json_string(), type(base).__name__, card, str(dtype), P, versions, settings]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


@cache
def _cpu_name() -> str:
    """Return the CPU's name as Linux reports it; elsewhere, what Python knows of it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def _code_hash() -> str:
    """Return a hash of the modules that compute what is checked. The version alone does not change with them."""
    package = Path(__file__).parents[1]
    files = sorted(path for name in CHECKED_PACKAGES for path in (package / name).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
