"""Draw the loss over the steps of a run with matplotlib, which is optional."""

from collections.abc import Sequence
from typing import Any

from softprompt.runs.state import Metrics


def draw_loss_curves(axes: Any, history: Sequence[Metrics], eval_loss_base: float | None) -> None:
    """Draw the curves into matplotlib's `axes`.

    Args:
        axes: A matplotlib Axes, whose labels and legend are set, too.
        history: The records of metrics.jsonl.
        eval_loss_base: Held-out loss of the base without a prompt, in nats per target token; None if unknown. It is
            drawn as a dashed line.
    """
    train = [(r["step"], r["loss"]) for r in history if r.get("loss") is not None]
    held_out = [(r["step"], r["eval_loss"]) for r in history if "eval_loss" in r]
    if train:
        axes.plot(*zip(*train, strict=True), label="training loss")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", label="held-out loss")
    if eval_loss_base is not None:
        axes.axhline(eval_loss_base, color="gray", linestyle="--", label="held-out loss of the base alone")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
