"""The values that the template shows, for one run and for several runs side by side."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from softprompt.config.loader import default_settings
from softprompt.report.svg import ChartRenderer, Curve
from softprompt.runs.run_reader import RunRecord
from softprompt.utils.shell_commands import command, flag

LOSSES = {"loss": "training", "eval_loss": "held out"}
OTHER_CURVES = {
    "eval_exact_match": "Exact match of held-out answers",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens per second, without padding",
}
RESULTS = {  # metrics of all_results.json: label and format
    "eval_loss": ("held-out loss", "{:.4f}"),
    "eval_perplexity": ("perplexity", "{:,.4g}"),
    "eval_exact_match": ("exact match", "{:.1%}"),
    "eval_exact_match_rows": ("rows compared for exact match (complete answers)", "{:,}"),
    "train_loss": ("mean training loss", "{:.4f}"),
    "train_runtime": ("seconds of training", "{:,.1f}"),
    "train_tokens_per_second": ("tokens per second", "{:,.0f}"),
}


@dataclass(frozen=True)
class Chart:
    """A chart: its title, an SVG element, its legend, and a note below it. A legend entry holds the number of a color
    of the page (-1: faint), whether the line is dashed, and its text."""

    title: str
    svg: Markup
    legend: Sequence[tuple[int, bool, str]] = ()
    note: str = ""


def run_view(record: RunRecord, name: str, renderer: ChartRenderer | None) -> dict[str, Any]:
    """Return the values that the template needs for one run. Without a renderer there are no charts."""
    facts = record.facts
    rows = [(kind, of) for kind, of in facts.get("rows", {}).items() if of]
    end = facts.get("so_far") or facts.get("end", {})
    bits = "".join(f" --{name}" for name in ("load_in_8bit", "load_in_4bit") if record.arguments.get(name))
    return {
        "name": name,
        "headline": _headline(record),
        "ended": record.ended,
        "status": status(record),
        "resume": None if record.ended else _resume_command(record),
        "infer": f"{command('infer')}{flag('adapter', str(record.folder))}{bits} --prompt …",
        "results": list(_results(record)),
        "curves": list(_curves(record, renderer)) if renderer else [],
        "sweep": facts.get("sweep"),
        "rows": rows,
        "row_facts": [fact for fact in rows[0][1] if fact != "histogram"] if rows else [],
        "lengths": _lengths(record, rows, renderer),
        "examples": end.get("examples"),
        "likeness": end.get("likeness"),
        "similarities": _cosines(end.get("likeness"), renderer),
        "left_out": end.get("left_out", []),
        "settings": list(_settings(record)),
        "training": facts.get("training"),
        "versions": facts.get("versions", {}),
    }


def _headline(record: RunRecord) -> str:
    arguments, facts = record.arguments, record.facts
    if "prompt" not in facts:
        return "This run was made by a version that wrote no report.json, so its rows and settings are unknown."
    P, H = facts["prompt"]
    base = facts["base"]
    return (
        f"{P:,} virtual tokens of size {H:,} for {arguments.get('model_name_or_path')} ({base['type']}, "
        f"{base['parameters']:,} parameters, all frozen), learned from {arguments.get('dataset')}."
    )


def status(record: RunRecord) -> str:
    """Return how far a run got, and why it ended early if it did."""
    total = record.facts.get("total_steps")
    steps = f"step {record.steps:,}" + (f" of {total:,}" if total else "")
    if not record.ended:
        return f"{'running now' if record.runs_now else 'not finished'}: its metrics end at {steps}"
    best = record.results.get("best_global_step")
    kept = f"; the saved prompt is the best one, from step {best:,}" if best is not None else ""
    if not total or record.steps >= total:
        return f"finished after {steps}{kept}"
    patient = record.arguments.get("early_stopping_patience") is not None
    why = "the metric no longer improved" if patient else "the stream had fewer rows than expected"
    return f"ended early at {steps}, because {why}{kept}"


def _resume_command(record: RunRecord) -> str | None:
    if record.runs_now or not record.checkpoint:
        return None
    launcher = "torchrun --nproc_per_node=N" if record.arguments.get("shard_base") else "python"
    return f"{command('train', launcher)}{flag('resume_from_checkpoint', str(record.folder))}"


def _results(record: RunRecord) -> Iterable[tuple[str, str | None, str]]:
    """Yield (label, value of the base alone, value with the prompt) for each metric that the run has."""
    for name, (label, form) in RESULTS.items():
        value, base = record.final(name), record.of_base(name)
        if value is not None or base is not None:
            yield label, None if base is None else form.format(base), "–" if value is None else form.format(value)


def _curves(record: RunRecord, renderer: ChartRenderer) -> Iterable[Chart]:
    base = record.of_base("eval_loss")
    drawn = [Curve(n, record.series(name), markers=n > 0) for n, name in enumerate(LOSSES)]
    legend = [(n, False, text) for n, (name, text) in enumerate(LOSSES.items()) if record.series(name)]
    if base is not None:
        drawn.append(Curve(2, level=base))
        legend.append((2, True, f"held out, base alone ({base:.4f})"))
    title = "Loss, nats per target token"
    yield from _charts(renderer, "loss", title, drawn, legend)
    for name, title in OTHER_CURVES.items():
        drawn, legend = [Curve(0, record.series(name))], []
        if (level := record.of_base(name)) is not None:
            drawn, legend = [*drawn, Curve(2, level=level)], [(0, False, "with the prompt"), (2, True, "base alone")]
        yield from _charts(renderer, name, title, drawn, legend)


def _charts(
    renderer: ChartRenderer, name: str, title: str, curves: Sequence[Curve], legend: Sequence[Any]
) -> Iterable[Chart]:
    """Yield the chart of a metric if any run has it."""
    if svg := renderer.line_chart(curves, title, logarithmic=name in LOSSES, share=name == "eval_exact_match"):
        yield Chart(title, Markup(svg), legend)


def _lengths(record: RunRecord, rows: Sequence[tuple[str, Any]], renderer: ChartRenderer | None) -> Chart | None:
    if not renderer or not rows:
        return None
    kind = "the training" if rows[0][0] == "training" else rows[0][0]  # else "the stream's first" or "held out"
    title, limit = f"Lengths of {kind} rows", record.arguments.get("max_length", 0)
    svg = renderer.histogram(rows[0][1]["histogram"], limit, title)
    return Chart(title, Markup(svg), [(0, False, "rows"), (-1, True, f"--max_length {limit}")])


def _cosines(likeness: Any, renderer: ChartRenderer | None) -> Chart | None:
    if not renderer or not likeness or len(likeness["tokens"]) < 2:
        return None
    values = likeness["similarities"]
    others = [value for i, row in enumerate(values) for j, value in enumerate(row) if i != j]
    title = "Cosine between the virtual tokens"
    mean = sum(others) / len(others)
    note = f"Between different tokens: {min(others):.2f} to {max(others):.2f}, {mean:.2f} on average."
    return Chart(title, Markup(renderer.heatmap(values, title)), note=note)


def _settings(record: RunRecord) -> Iterable[tuple[str, Any, bool]]:
    """Yield (flag, value, whether the value differs from the default)."""
    arguments = record.arguments
    defaults = default_settings(arguments)
    for name, value in arguments.items():
        if value is not None:
            yield name, value, name in defaults and value != defaults[name]


def comparison_view(
    records: Sequence[RunRecord], names: Sequence[str], renderer: ChartRenderer | None
) -> dict[str, Any]:
    """Return the results of several runs side by side, the settings that differ, and one chart for each metric."""
    every = list(dict.fromkeys(name for record in records for name in record.arguments))
    differ = [name for name in every if len({repr(r.arguments.get(name)) for r in records}) > 1]
    known = {label for record in records for label, _, _ in _results(record)}
    labels = [label for label, _ in RESULTS.values() if label in known]
    rows = []
    for number, (record, name) in enumerate(zip(records, names, strict=True)):
        results = {label: (base, value) for label, base, value in _results(record)}
        settings = [(key, record.arguments.get(key)) for key in differ if key != "output_dir"]
        rows.append({"name": name, "color": number, "status": status(record), "settings": settings, "results": results})
    curves = list(_compared_curves(records, names, renderer)) if renderer else []
    return {"labels": labels, "rows": rows, "curves": curves}


def _compared_curves(records: Sequence[RunRecord], names: Sequence[str], renderer: ChartRenderer) -> Iterable[Chart]:
    titles = {"loss": "Training loss", "eval_loss": "Held-out loss", **OTHER_CURVES}
    for name, title in titles.items():
        curves = [Curve(n, record.series(name), markers=name.startswith("eval")) for n, record in enumerate(records)]
        legend = [
            (n, False, run) for n, (run, record) in enumerate(zip(names, records, strict=True)) if record.series(name)
        ]
        levels: Mapping[float, int] = {
            level: n for n, record in reversed(list(enumerate(records))) if (level := record.of_base(name)) is not None
        }
        curves += [Curve(n, level=level) for level, n in levels.items()]
        legend += [(n, True, f"{names[n]}, base alone") for n in sorted(levels.values())]
        yield from _charts(renderer, name, title, curves, legend)


def run_names(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of the runs' folders, or their full paths if two have the same name."""
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]
