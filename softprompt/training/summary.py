"""The summary that a run prints at its end: metrics before and after training, examples, and a command to try."""

import os
from html import escape

from softprompt.config.train_args import RUNS
from softprompt.config.validation import quantization_bits
from softprompt.evaluation.evaluator import decode_text, question_ids
from softprompt.generation.adapters import NONE
from softprompt.runs.file_names import QUESTION_FILE
from softprompt.training.first_question import FirstQuestion
from softprompt.training.result import Run
from softprompt.utils.shell_commands import command, flag
from softprompt.utils.text_table import Rows, display_width, html_table, table

EXAMPLES = 3
WIDTH = 44


def summary(run: Run) -> str:
    """Return a table of metrics, held-out rows with answers before and after training, and the infer.py command to try
    or the reason why there is none."""
    parts = [table(rows) for rows in _tables(run)]
    if run.no_answers:
        ask = command("infer")
        parts.append(f"No answers: {run.no_answers}; --choices and --eval_dataset of {ask} work without it")
    elif run.question:
        parts.append(f"Try: {infer_command(run, run.question)}")
    return "\n" + "\n\n".join(part for part in parts if part)


def html_summary(run: Run) -> str:
    """Return the tables of `summary` as HTML, below the run's folder and, if the run was stopped, below how to
    continue."""
    lines = [f"<p>Run in <code>{escape(str(run.output_dir))}</code></p>"]
    lines += [f"<p>{escape(run.stopped)}</p>"] if run.stopped else []
    return "\n".join([*lines, *map(html_table, _tables(run))])


def _tables(run: Run) -> list[Rows]:
    """Return the tables that there are, each a list of rows with a header."""
    return [rows for rows in (_figures(run), _examples(run)) if len(rows) > 1]


def infer_command(run: Run, question: FirstQuestion) -> str:
    """Return the command that asks `question` with the trained prompt; the base is quantized as in training. The run's
    folder is omitted if infer.py finds it by itself."""
    bits = quantization_bits(run.config.model.load_in_8bit, run.config.model.load_in_4bit)
    folder = str(run.output_dir) if str(run.output_dir) != NONE else os.path.join(".", NONE)
    words = ["" if run.output_dir.parent == RUNS else flag("adapter", folder)]
    words += [f" --load_in_{bits}bit"] if bits else []
    asked = question.flags or {"prompts_file": str(run.output_dir / QUESTION_FILE)}
    return f"{command('infer')}{''.join(words)}{''.join(flag(*each) for each in asked.items())}"


def _figures(run: Run) -> Rows:
    metrics = run.metrics
    rows = [("", "base alone", "with prompt")]
    if "eval_exact_match" in metrics and "eval_exact_match_base" in metrics:
        some = metrics.get("eval_exact_match_rows")
        name = f"exact match of {some:,} rows" if some else "exact match"
        rows.append((name, f"{metrics['eval_exact_match_base']:.1%}", f"{metrics['eval_exact_match']:.1%}"))
    if "eval_loss" in metrics and "eval_loss_base" in metrics:
        rows.append(("held-out loss", f"{metrics['eval_loss_base']:.4f}", f"{metrics['eval_loss']:.4f}"))
    elif "train_loss" in metrics:
        rows.append(("training loss (mean)", "", f"{metrics['train_loss']:.4f}"))
    if metrics:
        rows.append(("seconds of training", "", f"{metrics['train_runtime']:.1f}"))
        rows.append(("tokens per second", "", f"{metrics['train_tokens_per_second']:,.0f}"))
        rows.append(("adapter, bytes", "", f"{run.adapter_bytes:,}"))
    return rows


def _examples(run: Run) -> Rows:
    if not (run.evaluator and run.before and run.after and run.before.answers and run.after.answers):
        return []
    rows = [("held-out row", "base alone", "with prompt")]
    shown = zip(run.evaluator.examples[:EXAMPLES], run.before.answers, run.after.answers, strict=False)
    for example, before, after in shown:
        question = decode_text(run.evaluator.tokenizer, question_ids(example))
        rows.append((_cut(_plain(question)), _cut(_plain(before)), _cut(_plain(after))))
    return rows


def _plain(text: str) -> str:
    """Return the text on one line, without the default template's "Human:" and "Assistant:"."""
    text = text.removeprefix("Human: ").removesuffix("Assistant:").strip()
    return " ".join(text.split())


def _cut(text: str) -> str:
    if display_width(text) <= WIDTH:
        return text
    while display_width(text) > WIDTH - 1:
        text = text[:-1]
    return text + "…"
