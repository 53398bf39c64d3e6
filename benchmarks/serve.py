"""Speed of the server under load: `python benchmarks/serve.py`.

    python benchmarks/serve.py
    python benchmarks/serve.py --model_name_or_path FOLDER --clients 1 8 32 --adapters 1 8 --requests 4
    python benchmarks/serve.py --sides serve --clients 4 --adapters 1 --new_tokens 8 --requests 1 --rounds 1

Each server is a process of its own, and the clients are another one, so that they do not share Python's lock. A client
sends one request after the other, each a chat that is streamed: a text of --prompt_tokens tokens or so (drawn from the
words of the vocabulary), to one of the adapters in turn. Prompts of P virtual tokens are random, answers are greedy and
have --new_tokens tokens, because no end token is taken.

Contestants:

* `serve`: `softprompt serve`, one process for all adapters;
* `transformers`: `transformers serve` on the folder that `softprompt export` writes, which holds one adapter. So with
  several adapters, the folders take turns, each for its share of the clients in a process of its own, and the time to
  start the processes is not counted. It is left out if `transformers[serving]` is not installed. Its answers may end
  early; the tokens that it wrote are counted. `--transformers_flags continuous-batching` gives it that flag.

They take turns for --rounds rounds, after one request each to warm up. tokens/s counts the tokens of all answers over
the time from the first request to the last answer; `first` is the median time from a request to its first token, `p99`
the 99th percentile of it, and `answer p99` that of whole answers. Results are medians over the rounds.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from arguments import ArgumentParser
from contestants import SEED
from measure import machine

from softprompt.models.loading import base_path, load_base, load_tokenizer, word_embeddings
from softprompt.models.precision import resolve_device
from softprompt.prompt.adapter_folder import adapter_files, peft_config
from softprompt.prompt.adapter_io import Adapter
from softprompt.utils.atomic_io import write_folder

SIDES = ["serve", "transformers"]
START_SECONDS, ANSWER_SECONDS = 600, 1800


class Load(NamedTuple):
    """What the clients did: seconds from the first request to the last answer, tokens of all answers, and for each
    answer the seconds to its first token and to its end."""

    seconds: float
    tokens: int
    first: list[float]
    whole: list[float]


def main() -> None:
    args = parse()
    print(json.dumps(machine(resolve_device(args.device))), file=sys.stderr)
    if "transformers" in args.sides and not transformers_can_serve():
        print('`transformers serve` is left out: pip install "transformers[serving]"', file=sys.stderr)
        args.sides = [side for side in args.sides if side != "transformers"]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.model_name_or_path:
            bench = Bench(name, Path(folder) / Path(name).name, args)
            for adapters in args.adapters:
                for clients in args.clients:
                    title = f"{Path(name).name}, {clients} clients, {adapters} adapters, {args.new_tokens} tokens"
                    found = bench.compete(clients, adapters)
                    results.append({"case": title, "sides": found})
                    print(table(title, found), flush=True)
    if args.json:
        report = {"machine": machine(resolve_device(args.device)), "cases": results}
        Path(args.json).write_text(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--model_name_or_path", nargs="+", default=["mini"], help="folders of bases, or mini")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=4, help="of each client, one after the other")
    parser.add_argument("--prompt_tokens", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--transformers_flags", nargs="*", default=[], help="for `transformers serve`, without dashes")
    parser.add_argument("--json", help="write all measurements to this file")
    return parser.parse_args()


class Bench:
    """One base with random adapters, in a folder that is filled with what the contestants need."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace):
        self.name, self.folder, self.args = name, folder, args
        base = load_base(base_path(name), torch.device("cpu"), torch.float32)
        self.tokenizer = load_tokenizer(base_path(name))
        draw = torch.Generator().manual_seed(SEED)
        never = sorted({self.tokenizer.eos_token_id, *self.tokenizer.all_special_ids})
        generation = {"do_sample": False, "suppress_tokens": never}
        scale = word_embeddings(base).weight.float().std()
        for number in range(max(args.adapters)):
            size = args.num_virtual_tokens, word_embeddings(base).embedding_dim
            prompt = scale * torch.randn(*size, generator=draw)
            settings = {"template": "default", "generation": generation}
            adapter = Adapter(prompt, peft_config(name, base.config, prompt, "RANDOM"), settings)
            write_folder(folder / "runs" / f"a{number}", adapter_files(adapter))

    def texts(self, n: int) -> list[str]:
        """Return texts of about --prompt_tokens random words of the vocabulary."""
        draw, V = random.Random(SEED), len(self.tokenizer)
        return [self.tokenizer.decode([draw.randrange(V) for _ in range(self.args.prompt_tokens)]) for _ in range(n)]

    def compete(self, clients: int, adapters: int) -> dict[str, list[Load]]:
        """Let the contestants take turns."""
        found: dict[str, list[Load]] = {side: [] for side in self.args.sides}
        for number in range(self.args.rounds):
            for side in self.args.sides if number % 2 == 0 else reversed(self.args.sides):
                load = self.serve(clients, adapters) if side == "serve" else self.transformers(clients, adapters)
                found[side].append(load)
                print(f"{side}: {load.tokens / load.seconds:,.1f} tokens/s", file=sys.stderr, flush=True)
        return found

    def serve(self, clients: int, adapters: int) -> Load:
        """Measure `softprompt serve`."""
        command = [sys.executable, "-m", "softprompt", "serve", "--model_name_or_path", self.name]
        command += ["--adapters", str(self.folder / "runs"), "--batch_size", str(self.args.batch_size)]
        command += ["--device", self.args.device, "--max_tokens", str(self.args.new_tokens)]
        with server(command) as url:
            ask(url, ["a0"], ["a"], 1, 1, 1)
            models = [f"a{number}" for number in range(adapters)]
            return ask(url, models, self.texts(clients), clients, self.args.requests, self.args.new_tokens)

    def transformers(self, clients: int, adapters: int) -> Load:
        """Measure `transformers serve`, adapter by adapter, each for its share of the clients."""
        parts = []
        for number in range(adapters):
            share = len(range(number, clients, adapters))
            if not share:
                continue
            model = self.folder / f"model-{number}"
            if not model.exists():
                export = [sys.executable, "-m", "softprompt", "export", str(self.folder / "runs" / f"a{number}")]
                export += ["--model_name_or_path", self.name, "--output", str(model)]
                subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
            command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
            command += ["--device", self.args.device, "--dtype", "float32"]
            command += [f"--{flag}" for flag in self.args.transformers_flags]
            with server(command) as url:
                ask(url, [str(model)], ["a"], 1, 1, 1)
                texts = self.texts(clients)[number::adapters]
                parts.append(ask(url, [str(model)], texts, share, self.args.requests, self.args.new_tokens))
        firsts, wholes = ([value for part in parts for value in part[at]] for at in (2, 3))
        return Load(sum(part.seconds for part in parts), sum(part.tokens for part in parts), firsts, wholes)


def transformers_can_serve() -> bool:
    """Whether `transformers serve` is installed, with what it needs."""
    return all(find_spec(name) for name in ("fastapi", "uvicorn", "openai", "rich"))


@contextmanager
def server(command: Sequence[str]) -> Iterator[str]:
    """Run a server on a free port until the block ends; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
    process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=environment)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while True:
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > end:
                log.seek(0)
                raise SystemExit(f"{' '.join(command)} does not serve:\n{log.read().decode(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def ask(url: str, models: Sequence[str], texts: Sequence[str], clients: int, requests: int, tokens: int) -> Load:
    """Send requests from several clients at once; client c asks the model c modulo their number."""
    first: list[float] = []
    whole: list[float] = []
    written = 0

    async def client(number: int) -> None:
        nonlocal written
        body = {"model": models[number % len(models)], "max_tokens": tokens, "temperature": 0, "stream": True}
        body |= {"messages": [{"role": "user", "content": texts[number % len(texts)]}]}
        body |= {"stream_options": {"include_usage": True}}
        for _ in range(requests):
            start = time.perf_counter()
            at_first, count = 0.0, 0
            async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise SystemExit((await response.aread()).decode())
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    text = any(choice["delta"].get("content") for choice in chunk["choices"])
                    at_first = at_first or (time.perf_counter() - start if text else 0.0)
                    count = chunk["usage"]["completion_tokens"] if chunk.get("usage") else count + text
            first.append(at_first or time.perf_counter() - start)
            whole.append(time.perf_counter() - start)
            written += count

    async def all_clients() -> float:
        start = time.perf_counter()
        await asyncio.gather(*map(client, range(clients)))
        return time.perf_counter() - start

    http = httpx.AsyncClient(timeout=ANSWER_SECONDS, limits=httpx.Limits(max_connections=None))
    return Load(asyncio.run(all_clients()), written, first, whole)


def table(title: str, found: dict[str, list[Load]]) -> str:
    """Format a case as a Markdown table."""
    speeds = {side: [load.tokens / load.seconds for load in loads] for side, loads in found.items()}
    head = ["contestant", "tokens/s", "slowest … fastest", "first, ms", "p99, ms", "answer p99, ms"]
    head += ["× transformers"] if "transformers" in found else []
    lines = [f"\n**{title}**\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for side, loads in found.items():
        cells: list[Any] = [side, f"{statistics.median(speeds[side]):,.1f}"]
        cells.append(f"{min(speeds[side]):,.1f} … {max(speeds[side]):,.1f}")
        for values in (
            [statistics.median(load.first) for load in loads],
            [percentile(load.first) for load in loads],
            [percentile(load.whole) for load in loads],
        ):
            cells.append(f"{1000 * statistics.median(values):,.0f}")
        if "transformers" in found:
            ratios = [a / b for a, b in zip(speeds[side], speeds["transformers"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percentile(values: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


if __name__ == "__main__":
    main()
