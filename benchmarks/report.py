"""Tables and charts of the results of `train.py`. A case is a dict in the format of its JSON file."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Case = dict[str, Any]
MIB = 1 << 20
EPOCH_ROWS = 26_858  # of the article's dataset


def summary(records: dict[str, list[Case]], peers: Sequence[str], operations_per_token: float) -> dict[str, Case]:
    """Summarize the records of each contestant, one for each round.

    Args:
        records: Records by contestant.
        peers: Contestants that the others are compared with.
        operations_per_token: Operations of the exact gradient's matrix products for one token.

    Returns:
        For each contestant the median, slowest and fastest tokens/s without padding, the median share of the limit that
        its matrix products allow, the median ratio to each peer in the same round, and the loss.
    """
    result = {}
    for name, rounds in records.items():
        speeds = [r["tokens_per_second"] for r in rounds]
        peer_speeds = {peer: [r["tokens_per_second"] for r in records[peer]] for peer in peers if peer in records}
        ratios = {p: statistics.median(a / b for a, b in zip(speeds, of, strict=True)) for p, of in peer_speeds.items()}
        shares = [operations_per_token * r["tokens_per_second"] / r["matmul_rate"] for r in rounds]
        result[name] = {
            "tokens_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "share_of_limit": statistics.median(shares),
            "ratio_to": ratios,
            "loss": rounds[0]["loss"],
        }
    return result


def table(case: Case, peers: Sequence[str]) -> str:
    """Return Markdown: one line about the case, then a table with one row for each contestant."""
    header = [
        "contestant",
        "tokens/s",
        "slowest … fastest",
        *(f"× {p}" for p in peers),
        "of the limit",
        "an epoch",
        "base MiB",
        "peak above MiB",
        "estimated MiB",
        "loss",
    ]
    lines = [
        f"{case['base']}, P = {case['num_virtual_tokens']}, {case['rows']} (mean {case['mean_row_length']:.1f} tokens, "
        f"{case['share_of_targets']:.0%} targets), {case['steps']} steps × {case['rounds']} rounds",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
    ]
    for name, result in case["contestants"].items():
        memory = case["memory"].get(name) or {}
        cells = [
            _formatted(result.get("tokens_per_second"), ",.0f", "does not fit"),
            " … ".join(_formatted(result.get(end), ",.0f") for end in ("slowest", "fastest")),
            *(_formatted(result.get("ratio_to", {}).get(p), ".2f") for p in peers),
            _formatted(result.get("share_of_limit"), ".0%"),
            _epoch(case["mean_row_length"], result.get("tokens_per_second")),
            _formatted(memory.get("base"), ",.0f", scale=MIB),
            _formatted(memory.get("peak_above"), ",.0f", scale=MIB),
            _formatted(memory.get("estimate"), ",.0f", scale=MIB),
            _formatted(result.get("loss"), ".5f"),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _epoch(mean: float, speed: float | None) -> str:
    """The time of `EPOCH_ROWS` rows of `mean` tokens."""
    minutes = EPOCH_ROWS * mean / speed / 60 if speed else None
    return "–" if minutes is None else f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _formatted(value: float | None, form: str, missing: str = "–", scale: float = 1) -> str:
    return missing if value is None else format(value / scale, form)


def charts(cases: Sequence[Case], folder: Path) -> list[Path]:
    """Write charts of the microseconds per token over the length of the prompt and over that of the rows.

    Each chart has a panel for each value of the other length. There is no chart without matplotlib, or of a length with
    one value only. Returns the files.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for base in dict.fromkeys(case["base"] for case in cases):
        of_base = [case for case in cases if case["base"] == base]
        for name, x, panel, label in (
            ("prompt", _prompt, _row_length, "virtual tokens"),
            ("rows", _row_length, _prompt, "mean row length (tokens)"),
        ):
            if len({x(case) for case in of_base}) > 1:
                files.append(folder / f"train-{base}-{name}.png")
                _chart(of_base, x, panel, label, files[-1])
    return files


def _prompt(case: Case) -> float:
    return case["num_virtual_tokens"]


def _row_length(case: Case) -> float:
    return round(case["mean_row_length"])


def _chart(
    cases: Sequence[Case], x: Callable[[Case], float], panel: Callable[[Case], float], label: str, path: Path
) -> None:
    from matplotlib.figure import Figure

    panels = sorted({panel(case) for case in cases})
    figure = Figure(figsize=(1 + 3.2 * len(panels), 3.8), layout="constrained")
    for axes, value in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        here = sorted((case for case in cases if panel(case) == value), key=x)
        names = [n for n in here[0]["contestants"] if not n.startswith("padded")]
        for name in names:
            speeds = [(x(case), case["contestants"][name].get("tokens_per_second")) for case in here]
            points = [(at, 1e6 / speed) for at, speed in speeds if speed]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", ls="--" if "bf16" in name else "-", label=name)
        axes.set(xlabel=label, yscale="log")
        axes.set_title(f"rows of {value:.0f} tokens" if panel is _row_length else f"{value:.0f} virtual tokens")
    figure.axes[0].set_ylabel("µs per token, without padding")
    figure.axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
