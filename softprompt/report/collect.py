"""Collect the data that a run records only for its report.

report.json                 settings, rows, base, and the base's evaluation; at the end also example answers and the
                            words nearest to the virtual tokens
prompt_start.safetensors    the initial prompt [P, H] in fp32
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from safetensors.torch import save

from softprompt.data.language import language_of
from softprompt.data.tokenization import Example, Tokenized, end_tokens
from softprompt.evaluation.answer_comparison import AnswerComparison, AnsweredRow
from softprompt.evaluation.evaluator import Evaluation
from softprompt.evaluation.rows import answer_ids, decode_text, question_ids
from softprompt.generation.generator import Generator, in_request_order
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.models.capabilities import why_not_generate
from softprompt.prompt.adapter_io import PROMPT_KEY
from softprompt.prompt.public_names import hub_ids
from softprompt.runs.file_names import START_FILE
from softprompt.runs.run_reader import Facts
from softprompt.training.result import Run

HISTOGRAM_BARS = 24
EXAMPLES = 8  # rows shown if the evaluation has already generated their answers; more if there are more labels
WRONG_ANSWERS = 200  # the most wrong answers that are listed
GENERATED_EXAMPLES, NEW_TOKENS = 4, 64  # otherwise: rows answered for the report, and tokens of an answer


def run_facts(run: Run, arguments: Mapping[str, Any]) -> Facts:
    """Return what is known when training starts, as JSON types. `arguments` are the settings of the run."""
    setup = run.setup
    start, data, base, learned, engine = setup.start, setup.data, setup.base, setup.prompt, setup.engine
    config, prompt, before = base.config, learned.weight, run.before
    training = "the stream's first" if run.config.data.streaming else "training"
    return {
        "arguments": dict(arguments),
        "hub": hub_ids(arguments),
        "language": language_of(data.first_rows),
        "base": {
            "type": config.model_type,
            "parameters": base.num_parameters(),
            "vocabulary": base.get_input_embeddings().num_embeddings,
        },
        "prompt": list(prompt.shape),
        "training": f"{engine} on {engine.device}, {str(engine.compute_dtype).removeprefix('torch.')}",
        "versions": {name: found for name in ("softprompt", "torch", "transformers") if (found := _version(name))},
        "rows": {training: row_facts(data.train), "held out": row_facts(data.held_out) if data.held_out else None},
        "rows_per_step": data.loader.rows_per_step,
        "total_steps": data.loader.total_steps,
        "sweep": next((record["sweep"] for record in start.history if "sweep" in record), None),
        "base_alone": _base_metrics(before) if before else {},
    }


def row_facts(data: Tokenized) -> Facts:
    """Return the number of rows, their lengths in tokens, and how many were truncated or left out."""
    lengths = sorted(data.examples.lengths.tolist())
    return {
        "rows": data.rows,
        "used": len(data.examples),
        "tokens": sum(lengths),
        "targets": data.examples.targets,
        "cut at max_length": data.cut,
        "left out, no answer left": data.without_target,
        "with an empty answer": data.empty_answers,
        "shortest": lengths[0],
        "median": statistics.median_low(lengths),
        "longest": lengths[-1],
        "histogram": length_histogram(lengths),
    }


def length_histogram(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (upper bound in tokens, count) of at most HISTOGRAM_BARS bars of equal width, up to the largest length."""
    width = -(-max(lengths) // HISTOGRAM_BARS)
    counts = [0] * -(-max(lengths) // width)
    for length in lengths:
        counts[(length - 1) // width] += 1
    return [(width * (bar + 1), count) for bar, count in enumerate(counts)]


def initial_prompt_file(run: Run) -> dict[str, bytes]:
    """Return {"prompt_start.safetensors": content}: the initial prompt [P, H] in fp32.

    A resumed run takes the file from the folder that it resumes from. The result is empty if that is its own folder, or
    if that folder has no such file.
    """
    checkpoint = run.setup.start.checkpoint
    if checkpoint is None:
        return {START_FILE: save({PROMPT_KEY: run.setup.prompt.weight.detach().cpu().contiguous()})}
    old = checkpoint.parent / START_FILE
    if old.is_file() and old.parent.resolve() != run.output_dir.resolve():
        return {START_FILE: old.read_bytes()}
    return {}


def _base_metrics(before: Evaluation) -> Facts:
    """Return the metrics of the bare base, and the accuracy of always giving the most common answer."""
    majority = {"eval_majority": before.classification.majority[1]} if before.classification else {}
    return {**before.metrics("_base"), **majority}


def confusion_facts(run: Run) -> Facts | None:
    """Return the labels, and the confusion matrices of the prompt and of the bare base: counts with a row for each
    expected and a column for each predicted label. Return None if the held-out answers are not labels."""
    prompt, base = (one.classification if one else None for one in (run.after, run.before))
    if prompt is None or base is None:
        return None
    matrix = prompt.confusion_matrix
    return {"labels": list(matrix.labels), "prompt": matrix.rows, "base": base.confusion_matrix.rows}


def wrong_answers(run: Run) -> list[Facts] | None:
    """Return the first WRONG_ANSWERS held-out rows that are answered wrongly with the prompt, the one with the largest
    loss per target first. Return None if answers are not compared."""
    compared = AnswerComparison.of(run.evaluator, run.before, run.after)
    return [_row_facts(one, "loss") for one in compared.wrong(WRONG_ANSWERS)] if compared else None


def example_answers(run: Run, generator: Generator | None) -> Facts:
    """Return some held-out rows (training rows if there are none) with the answers of the base without and with the
    prompt.

    If the evaluation compared answers, these are taken, and the rows are those of `AnswerComparison.selected`.
    Otherwise, `generator` generates the first NEW_TOKENS tokens of the answers to the first GENERATED_EXAMPLES rows. It
    is None if this process alone cannot generate with the base.
    """
    rows = run.setup.data
    found: Facts = {"of": "held-out" if rows.held_out else "training", "compared": False, "rows": []}
    if run.config.distillation.text:
        found["distilled"] = True
    if compared := AnswerComparison.of(run.evaluator, run.before, run.after):
        chosen = [_row_facts(one, "correct_before", "correct_after") for one in compared.selected(EXAMPLES)]
        return {**found, "compared": True, "rows": chosen}
    if run.answered_rows:
        answered, most = [_row_facts(one) for one in run.answered_rows], run.config.distillation.distill_max_new_tokens
        return {**found, "new_tokens": most, "rows": answered}
    if generator is None:
        streamed = "the whole base would be read or gathered again for every generated token"
        return {**found, "left_out": why_not_generate(run.setup.base) or streamed}
    data = rows.held_out or rows.train
    examples = data.examples[:GENERATED_EXAMPLES]
    found["new_tokens"] = NEW_TOKENS
    for example, cut_off, (alone, tuned) in zip(
        examples, data.missing, _answers(run, generator, examples), strict=False
    ):
        question, expected = (decode_text(rows.tokenizer, ids) for ids in (question_ids(example), answer_ids(example)))
        expected += "…" if cut_off else ""
        found["rows"].append({"question": question, "expected": expected, "before": alone, "after": tuned})
    return found


def _row_facts(row: AnsweredRow, *more: str) -> Facts:
    """Return the texts of an answered row, and the fields `more`. A loss that is not finite, which JSON cannot hold, is
    None."""
    known = row._asdict() | ({} if math.isfinite(row.loss) else {"loss": None})
    return {name: known[name] for name in ("question", "expected", "before", "after", *more)}


@torch.no_grad()
def _answers(run: Run, generator: Generator, examples: Sequence[Example]) -> list[tuple[str, str]]:
    """Return the beginnings of greedy answers without and with the prompt, a pair for each example."""
    tokenizer, prompt = run.setup.data.tokenizer, run.setup.prompt.weight.detach()
    ends = tuple(end_tokens(examples, tokenizer))
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends)
    asked = [Request(question_ids(e), settings, each) for e in examples for each in (None, prompt)]
    texts = [decode_text(tokenizer, ids) for ids in in_request_order(generator.generate(asked, len(asked)))]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
