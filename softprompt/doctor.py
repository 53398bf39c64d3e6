"""`softprompt doctor`: say what this machine has, what a run would use, and what is missing.

Nothing is downloaded or written. torch is imported only inside functions, so that a missing or broken torch is reported
like anything else.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.utils.text_table import table
from softprompt.utils.translation import translate

NVIDIA_WHEELS = "pip install 'torch<2.14' --force-reinstall --index-url https://download.pytorch.org/whl/cu130"
USED_FOR = {
    "accelerate": "--load_in_4bit and --load_in_8bit",
    "bitsandbytes": "--load_in_4bit and --load_in_8bit",
    "fastapi": "softprompt serve",
    "matplotlib": "loss.png, and charts of studies",
    "prompt_toolkit": "line editing in a chat",
    "tensorboard": "--report_to tensorboard",
    "uvicorn": "softprompt serve",
}
PYTHON = (3, 11)
LEAST_FREE_GIB = 1  # for downloads and caches; a base takes a few GiB


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        name: What was examined.
        text: What was found.
        advice: What to do about it; None if nothing has to be done.
        required: Whether nothing works before that is done.
        use: What a package is for; None if everything needs it.
    """

    name: str
    text: str
    advice: str | None = None
    required: bool = False
    use: str | None = None


def examine() -> list[Finding]:
    """Examine Python, the packages, the device and the memory."""
    python = sys.version.split()[0]
    old = f"install Python {'.'.join(map(str, PYTHON))} or newer" if sys.version_info < PYTHON else None
    findings = [Finding("python", f"{python}, {platform.system()} {platform.machine()}", old, True), *packages()]
    if any(finding.name in ("softprompt", "torch") and finding.advice for finding in findings):
        return findings
    if failure := _failure_of_torch():
        return [
            *findings,
            Finding("torch", f"does not work: {failure}", "pip install --force-reinstall 'torch<2.14'", True),
        ]
    for name, examined in (("hardware", hardware), ("folders", folders)):
        try:
            findings += examined()
        except Exception as error:  # what a system does not say is left out
            findings.append(Finding(name, f"could not be examined: {_reason(error)}"))
    return findings


def report(findings: list[Finding]) -> str:
    """Format findings as a table, followed by what to do, in the language of the user."""
    rows = [("what", "here"), *((finding.name, finding.text) for finding in findings)]
    uses = ["", *(translate(f" (for {finding.use})") if finding.use else "" for finding in findings)]
    lines = [table([(translate(name), translate(text) + use) for (name, text), use in zip(rows, uses, strict=True)])]
    for heading, required in ((translate("Needed:"), True), (translate("Worth having:"), False)):
        advice = [
            f"- {translate(one.name)}{translate(': ')}{translate(one.advice)}{use}"
            for one, use in zip(findings, uses[1:], strict=True)
            if one.advice and one.required is required
        ]
        lines += ["", heading, *advice] if advice else []
    return "\n".join(lines)


def packages() -> Iterator[Finding]:
    """Compare the installed packages with what this package requires, and with what its optional features need."""
    try:
        from packaging.requirements import Requirement  # installed with transformers

        declared = [Requirement(line) for line in requires("softprompt") or ()]
    except (PackageNotFoundError, ImportError):
        install = "pip install -e . in the folder of pyproject.toml"
        yield Finding("softprompt", "not installed, or without the packages that it needs", install, True)
        return
    yield Finding("softprompt", version("softprompt"))
    for needed in declared:
        optional = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
        if optional and (needed.name not in USED_FOR or "test" in str(needed.marker)):
            continue
        use = USED_FOR[needed.name] if optional else None
        install = f"pip install '{needed.name}{needed.specifier}'"
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            yield Finding(needed.name, "not installed", install, not optional, use)
            continue
        fits = needed.specifier.contains(found, prereleases=True)
        yield Finding(needed.name, found, None if fits else install, not optional, use)


def hardware() -> Iterator[Finding]:
    """Describe the processor, the GPUs and the memory, and what `--device auto` chooses."""
    import torch

    from softprompt.engines.memory_estimate import GIB, total_memory
    from softprompt.models.precision import resolve_device, resolve_dtype

    cpu = torch.device("cpu")
    instructions = ", ".join([torch.backends.cpu.get_cpu_capability(), *_cpu_flags()])
    yield Finding("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {instructions}")
    total, free = total_memory(cpu) / GIB, _available(GIB)
    yield Finding("memory", f"{total:.1f} GiB" if free is None else f"{total:.1f} GiB, {free:.1f} available")
    for index in range(torch.cuda.device_count()):
        yield _gpu(torch.cuda.get_device_properties(index), index, torch.cuda.mem_get_info(index), GIB)
    if not torch.cuda.is_available():
        yield _no_gpu()
    device = resolve_device("auto")
    dtype = str(resolve_dtype(device, None, None)).removeprefix("torch.")
    on_gpu = "varlen or flex_attention where the base and the check allow it, else sdpa"
    attention = on_gpu if device.type == "cuda" else "sdpa"
    slow = device.type == "cpu" and Path("/proc/cpuinfo").is_file() and not _cpu_flags()
    note = "; --bf16 saves memory but is slow on this processor" if slow else ""
    yield Finding("a run uses", f"--device {device.type}, {dtype}, attention: {attention}{note}")


def folders() -> Iterator[Finding]:
    """Describe the folders of downloads, of this package's cache, and of runs."""
    from huggingface_hub import constants

    from softprompt.config.train_args import RUNS
    from softprompt.engines.memory_estimate import GIB
    from softprompt.utils.atomic_io import cache_dir

    for name, folder, way_out in (
        ("downloads", Path(constants.HF_HUB_CACHE), "set HF_HOME to"),
        ("cache", cache_dir("tokens").parent, "set XDG_CACHE_HOME to"),
        ("runs", RUNS.absolute(), "give --output_dir"),
    ):
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        free = shutil.disk_usage(there).free / GIB if there.exists() else 0
        fault = _fault_of_folder(there, free)
        advice = f"{fault}; {way_out} a folder that can be written" if fault else None
        yield Finding(name, f"{folder}, {free:,.1f} GiB free", advice)


def _fault_of_folder(folder: Path, free: float) -> str | None:
    """Return why a folder cannot be written to, or why too little fits into it; None if there is no reason."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written"
    return f"{folder} is on a disk that is nearly full, with {free:.2f} GiB free" if free < LEAST_FREE_GIB else None


def _gpu(card: Any, index: int, memory: tuple[int, int], gib: int) -> Finding:
    """Describe one GPU: its name, compute capability, memory and dtypes."""
    free, total = memory
    bf16 = "bf16" if card.major >= 8 else "no bf16, so fp16"
    text = f"{card.name}, sm_{card.major}{card.minor}, {total / gib:.1f} GiB, {free / gib:.1f} free, {bf16}"
    if failure := _failure_of(index):
        text, advice = f"{text}, but it does not compute: {failure}", f"install a torch for this GPU: {NVIDIA_WHEELS}"
        return Finding(f"cuda:{index}", text, advice)
    busy = "other programs hold most of its memory; nvidia-smi lists them" if free < total / 2 else None
    return Finding(f"cuda:{index}", text, busy)


def _failure_of(index: int) -> str | None:
    """Multiply two small matrices on a GPU; return why that fails, or None if it does not."""
    import torch

    try:
        ones = torch.ones(16, 16, device=f"cuda:{index}")
        return None if (ones @ ones).sum().item() == 16**3 else "a product has a wrong value"
    except RuntimeError as error:
        return _reason(error)


def _no_gpu() -> Finding:
    """Say why torch finds no GPU."""
    import torch

    if shutil.which("nvidia-smi") is None:
        text = "no NVIDIA driver here" if _built() else "no NVIDIA driver here, and this torch has no CUDA"
        return Finding("cuda", text)
    if not _built():
        return Finding("cuda", f"an NVIDIA driver, but torch {torch.__version__} is a CPU build", NVIDIA_WHEELS)
    try:
        torch.cuda.init()
        reason = "no device is visible"
    except (RuntimeError, AssertionError) as error:
        reason = _reason(error)
    advice = "update the driver, install a torch for its CUDA version, and check CUDA_VISIBLE_DEVICES"
    return Finding("cuda", f"an NVIDIA driver, but torch finds no device: {reason}", advice)


def _reason(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def _failure_of_torch() -> str | None:
    """Import torch and add two numbers; return why that fails, or None if it does not."""
    try:
        import torch

        torch.ones(1).add(1)
    except Exception as error:  # a torch that is installed but broken may raise anything
        return _reason(error)
    return None


def _built() -> bool:
    import torch

    return torch.version.cuda is not None


def _cpu_flags() -> list[str]:
    """Return the processor's instructions for bf16 products, by the names of Linux; an empty list if it has none or if
    they are unknown."""
    words = set(_text_of(Path("/proc/cpuinfo")).split())
    return [name for name in ("avx512_bf16", "amx_bf16") if name in words]


def _available(gib: int) -> float | None:
    """Return how many GiB of memory programs can still take; None where the system does not say."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text_of(Path("/proc/meminfo")))
    return int(found[1]) * 1024 / gib if found else None


def _text_of(file: Path) -> str:
    """Return the text of a file of the system, or an empty string if it cannot be read."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
