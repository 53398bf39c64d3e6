"""How the metrics of all_results.json are shown to a reader."""

from collections.abc import Collection
from typing import NamedTuple

HIGHER, LOWER = 1, -1


class Metric(NamedTuple):
    """A metric of all_results.json.

    Attributes:
        label: Its name for a reader.
        form: A format string for `str.format`.
        better: HIGHER or LOWER; 0 if neither is better.
        of_tokens: Whether its value depends on how the base's tokenizer splits the text.
        hub_type: Its type in the hub's index of results; None if it is not a result.
    """

    label: str
    form: str
    better: int = 0
    of_tokens: bool = False
    hub_type: str | None = None


METRICS = {
    "eval_samples": Metric("held-out rows", "{:,}"),
    "eval_kl": Metric("KL from the text, nats per token", "{:.4f}", LOWER, of_tokens=True, hub_type="kl"),
    "eval_agreement": Metric("same most likely token as with the text", "{:.1%}", HIGHER, hub_type="agreement"),
    "tokens_saved": Metric("tokens saved per request", "{:,}", HIGHER),
    "time_to_first_token": Metric("seconds to the first token", "{:.3f}", LOWER),
    "eval_accuracy": Metric("accuracy (most likely label)", "{:.1%}", HIGHER, hub_type="accuracy"),
    "eval_majority": Metric("share of the most common label", "{:.1%}"),
    "eval_macro_f1": Metric("macro F1", "{:.3f}", HIGHER, hub_type="f1"),
    "eval_exact_match": Metric("exact match", "{:.1%}", HIGHER, hub_type="exact_match"),
    "eval_exact_match_rows": Metric("rows compared for exact match (complete answers)", "{:,}"),
    "eval_loss": Metric("held-out loss", "{:.4f}", LOWER, of_tokens=True, hub_type="loss"),
    "eval_perplexity": Metric("perplexity", "{:,.4g}", LOWER, of_tokens=True, hub_type="perplexity"),
    "best_global_step": Metric("step of the saved prompt, the best one", "{:,}"),
    "train_loss": Metric("mean training loss", "{:.4f}"),
    "train_runtime": Metric("seconds of training", "{:,.1f}"),
    "train_tokens_per_second": Metric("tokens per second", "{:,.0f}"),
}


def shown_metrics(names: Collection[str]) -> dict[str, Metric]:
    """Return those of METRICS that a run with metrics of these names shows: eval_loss is left out if eval_kl, which is
    equal, is among them."""
    return {name: metric for name, metric in METRICS.items() if name != "eval_loss" or "eval_kl" not in names}
