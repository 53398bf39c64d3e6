"""Run all tests and measurements that need a GPU, in at most eight minutes: `python benchmarks/gpu.py`.

    python benchmarks/gpu.py --output gpu.md                     every section, in this order
    python benchmarks/gpu.py --sections tests bloom llama        some of them
    python benchmarks/gpu.py --device cpu --toy                  the same commands at toy size, on any machine

Each section is a command of its own, which can also be run alone; its output appears as it comes and is written to
--output, a Markdown file, at once. A section ends at the limit of its time, or at the end of --minutes; what it printed
before is kept.

* `doctor`: what the machine is;
* `tests`: parity with rows run alone and with PEFT, fp16 overflow, resume, out of memory, answers (`pytest -m gpu`);
* `rates`: the measured rate of matrix products and of memory;
* `bloom`, `llama`: training beside PEFT, P = 10 and 100, on rows as long as Chinese Alpaca's;
* `generate`: answers beside PEFT and transformers: one text, 32 texts, 8 adapters;
* `stream`, `4bit`: a step with --stream_base, and with --load_in_4bit and --load_in_8bit.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from arguments import ArgumentParser

FOLDER = Path(__file__).parent
LAST_LINES = 30  # of stderr
TRAIN = ("peft-bf16", "peft-best-bf16", "padded-bf16", "packed-bf16", "packed-sdpa-bf16", "peft", "packed")


class Section(NamedTuple):
    """A command and the seconds that it may take.

    Attributes:
        fenced: Whether its output is plain text, which Markdown shows as code.
    """

    command: list[str]
    seconds: int
    fenced: bool = False


def sections(device: str, toy: bool) -> dict[str, Section]:
    """Return all sections by name, the most important ones first."""
    bloom, llama = ("mini", "llama-toy") if toy else ("1b4", "llama-1b")
    measured = ["--device", device, "--rounds", "1", "--steps", "1" if toy else "2", "--num_virtual_tokens", "10"]
    measured += ["--no_memory"] if toy else ["100"]
    training = ["--real_lengths", "--contestants", *TRAIN, *measured]
    named = ["--model_name_or_path" if toy else "--size", bloom]
    answers = ["--cases", "plain", "adapters", "--batch_sizes", "1", "32", "--prompt_tokens", "16", "--rounds", "1"]
    answers += ["--new_tokens", "4" if toy else "64", "--device", device, "--bf16"]
    streamed = ["--size", bloom, "--rows", "32", "--contestants", "streamed", "resident", "--device", device]
    every = {
        "doctor": Section([sys.executable, "-m", "softprompt", "doctor"], 30, fenced=True),
        "tests": Section([sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", "-q", "tests/gpu"], 150, fenced=True),
        "rates": Section(_script("measure.py", "--device", device), 30),
        "bloom": Section(_script("train.py", "--size", bloom, *training), 120),
        "llama": Section(_script("train.py", "--size", llama, *training), 100),
        "generate": Section(_script("generate.py", *named, *answers), 90),
        "stream": Section(_script("stream.py", *streamed), 60),
        "4bit": Section(_script("quantized.py", "--model_name_or_path", bloom, "--device", device), 120),
    }
    # A CPU takes longer even at toy size, and nobody waits for it.
    return {name: each._replace(seconds=3 * each.seconds) if toy else each for name, each in every.items()}


def main() -> None:
    args = parse()
    known = sections(args.device, args.toy)
    ends = time.monotonic() + 60 * args.minutes
    with open(args.output, "w", encoding="utf-8") as file:
        say(file, f"# {args.device}{', toy size' if args.toy else ''}, {date.today()}\n")
        failed = [name for name in args.sections if not run(name, known[name], args.device, ends, file)]
    print(f"written: {args.output}", file=sys.stderr)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    names = list(sections("cuda", False))
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--toy", action="store_true", help="bases of a few million parameters")
    parser.add_argument("--minutes", type=float, default=8, help="time for all sections together")
    parser.add_argument("--output", default="benchmarks/results/gpu.md", metavar="FILE.md")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no CUDA device here; give --device cpu --toy")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    return args


def run(name: str, section: Section, device: str, ends: float, file: TextIO) -> bool:
    """Run one section, and copy its stdout to the terminal and to `file` line by line; if it fails,
    the end of its stderr follows. Return whether it did not fail; a section at the limit of its time did not."""
    began = time.monotonic()
    seconds = min(section.seconds, ends - began)
    say(file, f"\n## {name}\n\n`{shlex.join(['python', *section.command[1:]])}`\n")
    if seconds <= 1:
        say(file, "Not run: the time is up.")
        return True
    environment = {**os.environ, "SOFTPROMPT_TEST_DEVICE": device, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            section.command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=FOLDER.parent,
            env=environment,
            start_new_session=True,
        )
        timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        say(file, "```" if section.fenced else "")
        assert process.stdout is not None
        try:
            for line in process.stdout:
                say(file, line.rstrip("\n"))
            code = process.wait()
        finally:  # also when this program is stopped
            timer.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        say(file, "```" if section.fenced else "")
        ended = {0: "Done", -signal.SIGKILL: "Ended at its limit"}.get(code, f"Failed with exit code {code}")
        say(file, f"{ended} after {time.monotonic() - began:.0f} s.")
        errors.seek(0)
        if code:
            say(file, "\n".join(["", "```", *errors.read().splitlines()[-LAST_LINES:], "```"]))
    return code in (0, -signal.SIGKILL)


def say(file: TextIO, line: str) -> None:
    print(line, flush=True)
    print(line, file=file, flush=True)


def _script(name: str, *flags: str) -> list[str]:
    return [sys.executable, str((FOLDER / name).relative_to(FOLDER.parent)), *flags]


if __name__ == "__main__":
    main()
