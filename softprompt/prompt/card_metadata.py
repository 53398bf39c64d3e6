"""The YAML metadata of a model card, as the hub reads it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from softprompt.utils.metrics import shown_metrics

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TASK = "text-generation"


def front_matter(
    base: str | None,
    library: str,
    language: str | None = None,
    dataset: str | None = None,
    index: "tuple[str, list[EvalResult]] | None" = None,
) -> str:
    """Return the metadata block, with its delimiting lines.

    Args:
        base: Hub id of the base; None for a base that is not on the hub, because the hub refuses a card whose
            `base_model` is not an id.
        library: The library that loads the files.
        language: ISO 639-1 code.
        dataset: Hub id of the training rows.
        index: See `results_index`.
    """
    from huggingface_hub import ModelCardData

    name, results = index or (None, None)
    data = ModelCardData(
        base_model=base,
        library_name=library,
        language=language,
        datasets=[dataset] if dataset else None,
        pipeline_tag=TASK,
        tags=["prompt-tuning"],
        model_name=name,
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def results_index(
    metrics: Mapping[str, Any], repository: str | None, rows: tuple[str, str | None]
) -> "tuple[str, list[EvalResult]] | None":
    """Return the name of the model and its results for the hub's index (`model-index`); None if there are no metrics.

    Args:
        metrics: The final metrics, named as in all_results.json.
        repository: The repository of the card, whose last part is the model's name; None if it is not published.
        rows: The name of the held-out rows, and their id on the hub if they have one.
    """
    from huggingface_hub import EvalResult

    name, on_hub = rows
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=on_hub or "custom",
            dataset_name=f"{name} (held-out rows)",
            metric_type=metric.hub_type,
            metric_name=metric.label,
            metric_value=round(float(metrics[key]), 6),
        )
        for key, metric in shown_metrics(metrics).items()
        if metric.hub_type and isinstance(metrics.get(key), int | float)
    ]
    return ((repository or "soft-prompt").rpartition("/")[2], results) if results else None
