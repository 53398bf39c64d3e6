"""Early stopping: the best evaluation so far, and when to stop waiting for a better one. The state is JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprompt.config.train_args import TrainingArguments


@dataclass(frozen=True)
class BestMetric:
    """The step and the metric of the best evaluation, None before the first; `without_gain` counts the evaluations
    since the last one that improved by more than the threshold."""

    step: int | None = None
    metric: float | None = None
    without_gain: int = 0


def metric_name(args: TrainingArguments) -> str:
    """Return `--metric_for_best_model` with the prefix eval_, which may be left out there."""
    return "eval_" + args.metric_for_best_model.removeprefix("eval_")


def greater_is_better(args: TrainingArguments) -> bool:
    """Return `--greater_is_better` if it is given; else True for exact match alone."""
    given = args.greater_is_better
    return metric_name(args) == "eval_exact_match" if given is None else given


def update_best(best: BestMetric, step: int, metrics: Mapping[str, Any], args: TrainingArguments) -> BestMetric:
    """Return `best` after one more evaluation. A metric that is missing or not finite is no improvement.

    As in transformers: the best is the one that is better than all before (Trainer); patience only counts improvements
    of more than `--early_stopping_threshold` over the best before (EarlyStoppingCallback).
    """
    value = metrics.get(metric_name(args))
    if value is None or not math.isfinite(value):
        return BestMetric(best.step, best.metric, best.without_gain + 1)
    if best.metric is None:
        return BestMetric(step, value)
    gain = value - best.metric if greater_is_better(args) else best.metric - value
    without_gain = 0 if gain > max(0.0, args.early_stopping_threshold) else best.without_gain + 1
    return BestMetric(step, value, without_gain) if gain > 0 else BestMetric(best.step, best.metric, without_gain)


def out_of_patience(best: BestMetric, args: TrainingArguments) -> bool:
    """Whether `--early_stopping_patience` consecutive evaluations brought no improvement."""
    return args.early_stopping_patience is not None and best.without_gain >= args.early_stopping_patience
