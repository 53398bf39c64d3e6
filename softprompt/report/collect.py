"""What a run writes down for its report, beside what it keeps anyway.

report.json                 settings, rows, base, and the base's own evaluation; at the end examples and likenesses
prompt_start.safetensors    the prompt's first values [P, H] fp32
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from softprompt.data.tokenization import Example, Tokenized, count_targets, end_tokens
from softprompt.evaluation.evaluator import Evaluation, answer_ids, question_ids
from softprompt.generation.hf_generate import Generator, in_order
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.models.capabilities import why_not_generate
from softprompt.prompt.adapter_io import PROMPT_KEY
from softprompt.prompt.nearest_tokens import EmbeddingSpace, nearest, noise, shown, similarities
from softprompt.runs.file_names import START_FILE
from softprompt.runs.run_reader import Facts
from softprompt.training.setup import Prepared

BARS = 24  # of the histogram of lengths
EXAMPLES = 8  # of short answers that were evaluated anyway
WRITTEN, NEW_TOKENS = 4, 64  # examples that are written for the report alone
NEAREST = 5
MOST_TOKENS = 200  # virtual tokens of which likenesses are told


def facts_of(run: Prepared, arguments: Mapping[str, Any], before: Evaluation | None) -> Facts:
    """What is known when the loop starts; `before` is the bare base's evaluation. JSON-able."""
    config, prompt = run.base.config, run.prompt.weight
    training = "the stream's first" if run.config.data.streaming else "training"
    return {
        "arguments": dict(arguments),
        "base": {
            "type": config.model_type,
            "parameters": sum(p.numel() for p in run.base.parameters()),
            "vocabulary": run.base.get_input_embeddings().num_embeddings,
        },
        "prompt": list(prompt.shape),
        "training": f"{run.engine} on {run.engine.device}, {_name(run.engine.compute_dtype)}",
        "versions": {name: found for name in ("softprompt", "torch", "transformers") if (found := _version(name))},
        "rows": {training: rows_of(run.data), "held out": rows_of(run.held_out) if run.held_out else None},
        "rows_per_step": run.feed.rows_per_step,
        "total_steps": run.feed.total_steps,
        "sweep": next((record["sweep"] for record in run.history if "sweep" in record), None),
        "base_alone": before.metrics("_base") if before else {},
    }


def rows_of(data: Tokenized) -> Facts:
    """How many rows, how long in tokens, and what was cut."""
    lengths = sorted(len(example.input_ids) for example in data.examples)
    return {
        "rows": data.rows,
        "used": len(data.examples),
        "tokens": sum(lengths),
        "targets": sum(map(count_targets, data.examples)),
        "cut at max_length": data.cut,
        "left out, no answer left": data.without_target,
        "with an empty answer": data.empty_answers,
        "shortest": lengths[0],
        "median": statistics.median_low(lengths),
        "longest": lengths[-1],
        "histogram": histogram(lengths),
    }


def histogram(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(upper bound, how many) of at most BARS bars of one width, from 0 to the longest."""
    width = -(-max(lengths) // BARS)
    counts = [0] * -(-max(lengths) // width)
    for length in lengths:
        counts[(length - 1) // width] += 1
    return [(width * (bar + 1), count) for bar, count in enumerate(counts)]


def start_of(run: Prepared, output_dir: Path) -> dict[str, bytes]:
    """The file with the prompt's first values; a resumed run keeps the one that it has, or takes it with it from where
    it began."""
    if run.checkpoint is None:
        return {START_FILE: save({PROMPT_KEY: run.prompt.weight.detach().cpu().contiguous()})}
    old = run.checkpoint.parent / START_FILE
    if old.is_file() and old.parent.resolve() != output_dir.resolve():
        return {START_FILE: old.read_bytes()}
    return {}


def examples_of(
    run: Prepared, generator: Generator | None, before: Evaluation | None, after: Evaluation | None
) -> Facts:
    """The first rows, and what the bare base and the tuned one answer: held-out rows where there are any. Short answers
    were compared already; long ones are written now, the beginning of each, by a `generator` of this process alone."""
    held_out = run.held_out is not None
    data = run.held_out or run.data
    examples = data.examples
    compared = bool(before and after and before.answers and after.answers)
    found: Facts = {"of": "held-out" if held_out else "training", "compared": compared, "rows": []}
    if before and after and before.answers and after.answers:
        answers = list(zip(before.answers[:EXAMPLES], after.answers[:EXAMPLES], strict=True))
    elif generator is not None:
        answers = _answers(run, generator, examples[:WRITTEN])
        found["new_tokens"] = NEW_TOKENS
    else:
        streamed = "with this base each token of an answer would read or gather the base once more"
        return {**found, "left_out": why_not_generate(run.base) or streamed}
    for example, cut_off, (alone, tuned) in zip(examples, data.missing, answers, strict=False):
        question, expected = (_text(run.tokenizer, ids) for ids in (question_ids(example), answer_ids(example)))
        expected += "…" if cut_off else ""
        found["rows"].append({"question": question, "expected": expected, "before": alone, "after": tuned})
    return found


def likeness(space: EmbeddingSpace, tokenizer: Any, prompt: Tensor, start: Tensor | None) -> Facts:
    """For each virtual token of `prompt` [P, H] the nearest words and how far it moved from `start` [P, H], if that is
    known; and the tokens' similarities with each other. The vocabulary is gone through once for all of it."""
    P, known = len(prompt), start is not None and start.shape == prompt.shape
    prompt = prompt.detach().cpu().float()[:MOST_TOKENS]
    began = start[:MOST_TOKENS].float() if start is not None and known else prompt[:0]
    ids, cosines = nearest(space, torch.cat([prompt, began, noise(space)]), NEAREST, len(tokenizer))
    words = [list(zip(shown(tokenizer, row), _rounded(near), strict=True)) for row, near in _rows(ids, cosines)]
    sizes = [len(prompt), len(began)]
    tokens: list[Facts] = [{"nearest": near} for near in words[: sizes[0]]]
    moves = zip(tokens, _moves(space, prompt, began), words[sizes[0] : sum(sizes)], strict=True) if known else ()
    for token, moved, near in moves:
        token |= {**moved, "start": near[0]}
    return {
        "P": P,
        "layernorm": space.layernorm is not None,
        "chance": round(cosines[sum(sizes) :, 0].mean().item(), 4),
        "tokens": tokens,
        "similarities": [_rounded(row) for row in similarities(space, prompt).tolist()],
    }


def _rows(*values: Tensor) -> Iterator[tuple[list[Any], ...]]:
    return zip(*(value.tolist() for value in values), strict=True)


def _moves(space: EmbeddingSpace, prompt: Tensor, start: Tensor) -> Iterator[Facts]:
    """Euclidean distances from the start, beside the start's own length, and the cosine with it."""
    moved, sizes = (prompt - start).norm(dim=1), start.norm(dim=1)
    kept = (space.directions(prompt) * space.directions(start)).sum(dim=1)
    for far, size, cosine in _rows(moved, sizes, kept):
        yield {"moved": round(far, 4), "of": round(size, 4), "cosine": round(cosine, 4)}


@torch.no_grad()
def _answers(run: Prepared, generator: Generator, examples: Sequence[Example]) -> list[tuple[str, str]]:
    """The beginnings of greedy answers without and with the prompt."""
    ends, prompt = tuple(end_tokens(examples, run.tokenizer)), run.prompt.weight.detach()
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends)
    asked = [Request(question_ids(e), settings, behind) for e in examples for behind in (None, prompt)]
    texts = [_text(run.tokenizer, ids) for ids in in_order(generator.generate(asked, len(asked)))]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
