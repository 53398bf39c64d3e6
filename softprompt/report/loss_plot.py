"""loss.png: the training loss and the held-out loss over the optimizer steps."""

import io
from collections.abc import Sequence

from softprompt.runs.state import Metrics


def loss_plot(history: Sequence[Metrics], eval_loss_base: float | None) -> bytes | None:
    """Return a PNG, or None if matplotlib is not installed.

    Args:
        history: The records of metrics.jsonl.
        eval_loss_base: Held-out loss of the base without a prompt, in nats per target token; None if unknown. It is
            drawn as a dashed line.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
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
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
