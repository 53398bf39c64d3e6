"""Speed of the server under load: `python benchmarks/serve.py`.

    python benchmarks/serve.py --model_name_or_path mini FOLDER
    python benchmarks/serve.py --sides serve --clients 4 --adapters 1 --new_tokens 8 --answers 4 --rounds 1

Each server is a process of its own, and the clients are another one, so that they do not share Python's lock. In each
case there are --answers answers, or one for each client if there are more clients. A client sends its requests one
after the other, each a chat that is streamed: a text of its own of some --prompt_tokens tokens (random words of the
vocabulary), always to the same adapter. Prompts of P virtual tokens are random, answers are greedy and have
--new_tokens tokens, because no end token is taken. All weights are fp32.

Contestants:

* `serve`: `softprompt serve`, one process for all adapters;
* `transformers`: `transformers serve`, which answers one request at a time, on the folders that `softprompt export`
  writes. Each of these folders is a whole model with one adapter;
* `transformers-cb`: the same with `--continuous-batching`, which does not support every base (not BLOOM, for example).

A contestant that fails is left out from then on, and stderr says why; so are both peers if
`transformers[serving]` is not installed. `transformers serve` loads all folders into one process. Their models cannot
answer in one batch, and they would slow each other down if they answered at the same time; so with several adapters,
the folders are asked one after the other, each by those clients that ask for its adapter, and their times are added.
Loading, and one request to each folder to warm up, are not counted; nor, in the times of an answer, is the wait for the
folders before its own.

The servers of a base run all the time, and take turns for --rounds rounds. tokens/s counts the tokens of all answers
over the time from the first request to the last answer; `first` is the median time from a request to its first text,
`p99` its 99th percentile, and `answer p99` that of whole answers. Figures are medians over the rounds, and ratios
compare tokens/s of the same round. `same` is the share of the answers whose text is that of `serve`. A table is printed
(and the file of --json written) as soon as its case is done, and the speed of each round at once, on stderr. After
--minutes, no case begins a second round.
"""

import argparse
import json
import math
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from arguments import ArgumentParser
from contestants import SEED
from http_load import Answer, Load, Question, send, server
from measure import machine

from softprompt.export import export
from softprompt.models.loading import base_path, load_base, load_tokenizer, word_embeddings
from softprompt.models.precision import resolve_device
from softprompt.prompt.adapter_folder import adapter_files, peft_config
from softprompt.prompt.adapter_io import Adapter
from softprompt.utils.atomic_io import write_folder

# A process of `transformers serve` would otherwise reserve most of the memory for its cache, or unload idle models.
TRANSFORMERS_FLAGS = ["--model-timeout", "1000000", "--cb-max-memory-percent", "0.1"]
SIDES = {"serve": [], "transformers": TRANSFORMERS_FLAGS}
SIDES["transformers-cb"] = [*TRANSFORMERS_FLAGS, "--continuous-batching"]


class Contestant(NamedTuple):
    """A running server.

    Attributes:
        url: Its address.
        models: What it calls the adapters.
        at_once: Whether it is asked for all adapters at the same time.
    """

    url: str
    models: list[str]
    at_once: bool

    def load(self, questions: Sequence[Sequence[tuple[str, int]]], adapters: int) -> Load:
        """Ask the questions of each client, given as (text, tokens); client c asks adapter c modulo `adapters`."""
        groups = (
            [range(len(questions))] if self.at_once else [range(n, len(questions), adapters) for n in range(adapters)]
        )
        answers, seconds = dict[int, list[Answer]](), 0.0
        for clients in groups:
            models = [self.models[client % adapters] for client in clients]
            asked = [
                [Question(model, *each) for each in questions[n]] for model, n in zip(models, clients, strict=True)
            ]
            send(self.url, [[Question(model, "a", 1)] for model in sorted({*models})])  # to warm up
            load = send(self.url, asked)
            seconds += load.seconds
            answers.update(zip(clients, chunks(load.answers, len(asked[0])), strict=True))
        return Load([answer for client in sorted(answers) for answer in answers[client]], seconds)


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a limit of time ends the servers, too
    print(json.dumps(machine(resolve_device(args.device))), file=sys.stderr)
    if not transformers_can_serve():
        print('`transformers serve` is left out: pip install "transformers[serving]"', file=sys.stderr)
        args.sides = [side for side in args.sides if side == "serve"]
    results: list[dict[str, Any]] = []
    end = time.monotonic() + 60 * args.minutes
    for name in args.model_name_or_path:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
            bench = Bench(name, Path(folder), args, end)
            contestants = bench.start(servers)
            for adapters in args.adapters:
                for clients in args.clients:
                    if clients < adapters:
                        continue  # some adapters would not be asked, so this is a case of fewer adapters
                    title = f"{Path(name).name}, clients: {clients}, adapters: {adapters}"
                    found = bench.compete(contestants, clients, adapters)
                    results.append({"case": title, "sides": {side: [*map(as_json, found[side])] for side in found}})
                    print(table(title, found), flush=True)
                    if args.json:
                        report = {"machine": machine(resolve_device(args.device)), "cases": results}
                        Path(args.json).write_text(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--model_name_or_path", nargs="+", default=["mini"], help="folders of bases, or mini")
    parser.add_argument("--sides", nargs="+", choices=[*SIDES], default=[*SIDES])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--answers", type=int, default=8, help="of each case, at least one for each client")
    parser.add_argument("--prompt_tokens", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=int, default=10, help="after which each case has one round only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write all measurements to this file")
    return parser.parse_args()


class Bench:
    """One base with random adapters: `folder` gets the adapters, and the models that are exported from them. After
    `end`, by `time.monotonic`, no case begins a second round."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace, end: float):
        self.name, self.folder, self.args, self.end = name, folder, args, end
        base = load_base(base_path(name), torch.device("cpu"), torch.float32)
        self.tokenizer = load_tokenizer(base_path(name))
        draw = torch.Generator().manual_seed(SEED)
        never = sorted({self.tokenizer.eos_token_id, *self.tokenizer.all_special_ids})
        settings = {"template": "default", "generation": {"do_sample": False, "suppress_tokens": never}}
        size = args.num_virtual_tokens, word_embeddings(base).embedding_dim
        scale = word_embeddings(base).weight.float().std()
        for number in range(max(args.adapters)):
            prompt = scale * torch.randn(*size, generator=draw)
            adapter = Adapter(prompt, peft_config(name, base.config, prompt, "RANDOM"), settings)
            write_folder(folder / "runs" / f"a{number}", adapter_files(adapter))

    def start(self, servers: ExitStack) -> dict[str, Contestant]:
        """Start the servers; return those that answer."""
        numbers = range(max(self.args.adapters))
        if self.args.sides != ["serve"]:
            for number in numbers:
                export(
                    self.folder / "runs" / f"a{number}", self.folder / f"model{number}", model_name_or_path=self.name
                )
        contestants = {}
        for side in self.args.sides:
            if side == "serve":
                command = ["softprompt", "serve", "--model_name_or_path", self.name, "--device", self.args.device]
                command += ["--adapters", str(self.folder / "runs"), "--batch_size", str(self.args.batch_size)]
                models = [f"a{number}" for number in numbers]
            else:
                command = ["transformers.cli.transformers", "serve", "--device", self.args.device, "--dtype", "float32"]
                models = [str(self.folder / f"model{number}") for number in numbers]
            url = servers.enter_context(server([sys.executable, "-m", *command, *SIDES[side]]))
            try:
                send(url, [[Question(models[0], "a", 2)]])
            except (ValueError, httpx.HTTPError) as error:
                print(f"{side} does not answer with {self.name} and is left out: {error}", file=sys.stderr, flush=True)
            else:
                contestants[side] = Contestant(url, models, at_once=side == "serve")
        return contestants

    def questions(self, clients: int) -> list[list[tuple[str, int]]]:
        """Return the questions of each client: texts of about --prompt_tokens random words, and numbers of tokens."""
        draw, V, of_each = random.Random(SEED), len(self.tokenizer), math.ceil(self.args.answers / clients)
        words = [[draw.randrange(V) for _ in range(self.args.prompt_tokens)] for _ in range(clients * of_each)]
        return chunks([(self.tokenizer.decode(ids), self.args.new_tokens) for ids in words], of_each)

    def compete(self, contestants: dict[str, Contestant], clients: int, adapters: int) -> dict[str, list[Load]]:
        """Let the contestants take turns; return the load of each round by contestant. One that fails is removed."""
        found: dict[str, list[Load]] = {side: [] for side in contestants}
        for number in range(self.args.rounds):
            if number and time.monotonic() > self.end:
                break
            for side in list(contestants)[:: 1 if number % 2 == 0 else -1]:
                case = f"{Path(self.name).name}, clients: {clients}, adapters: {adapters}, round {number + 1}, {side}"
                try:
                    load = contestants[side].load(self.questions(clients), adapters)
                except (ValueError, httpx.HTTPError) as error:
                    print(f"{case}: it fails and is left out from now on: {error}", file=sys.stderr, flush=True)
                    del contestants[side], found[side]
                    continue
                found[side].append(load)
                print(f"{case}: {load.speed:,.1f} tokens/s in {load.seconds:.1f} s", file=sys.stderr, flush=True)
        return found


def transformers_can_serve() -> bool:
    """Whether `transformers serve` is installed, with what it needs."""
    return all(find_spec(name) for name in ("fastapi", "uvicorn", "openai", "rich", "typer"))


def chunks(values: list[Any], size: int) -> list[list[Any]]:
    """Return the values in lists of `size`."""
    return [values[at : at + size] for at in range(0, len(values), size)]


def as_json(load: Load) -> dict[str, Any]:
    """Return a load without the texts."""
    answers = [{"tokens": each.tokens, "first": each.first, "whole": each.whole} for each in load.answers]
    return {"seconds": load.seconds, "answers": answers}


def table(title: str, found: dict[str, list[Load]]) -> str:
    """Format a case as a Markdown table: each contestant's medians, and its ratios to the others in the same round."""
    peers = [side for side in found if side != "serve"]
    head = ["contestant", "tokens/s", "slowest … fastest", "first, ms", "p99, ms", "answer p99, ms"]
    head += [f"× {peer}" for peer in peers] + ["same"]
    lines = [f"\n**{title}**\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for side, loads in found.items():
        speeds = [load.speed for load in loads]
        cells = [side, f"{statistics.median(speeds):,.1f}", f"{min(speeds):,.1f} … {max(speeds):,.1f}"]
        cells.append(milliseconds(loads, lambda load: statistics.median(answer.first for answer in load.answers)))
        cells.append(milliseconds(loads, lambda load: percentile([answer.first for answer in load.answers])))
        cells.append(milliseconds(loads, lambda load: percentile([answer.whole for answer in load.answers])))
        for peer in peers:
            ratios = [load.speed / of.speed for load, of in zip(loads, found[peer], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
        cells.append(same(loads, found.get("serve", loads)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def milliseconds(loads: Sequence[Load], seconds: Callable[[Load], float]) -> str:
    """Format the median of a time over the rounds."""
    return f"{1000 * statistics.median(map(seconds, loads)):,.0f}"


def percentile(values: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def same(loads: Sequence[Load], others: Sequence[Load]) -> str:
    """Return the share of the answers that are the same in the other loads, apart from white space around them."""
    pairs = [
        (a, b) for load, of in zip(loads, others, strict=True) for a, b in zip(load.answers, of.answers, strict=True)
    ]
    return f"{statistics.mean(a.text.strip() == b.text.strip() for a, b in pairs):.0%}"


if __name__ == "__main__":
    main()
