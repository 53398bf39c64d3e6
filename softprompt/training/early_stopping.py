"""Early stopping: keep the best evaluation so far, and decide when to stop. The state consists of JSON types."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprompt.config.train_args import TrainingArguments


@dataclass(frozen=True)
class BestMetric:
    """The step and the metric of the best evaluation; both are None before the first one. `without_gain` is the number
    of evaluations since the last one that improved by more than `--early_stopping_threshold`."""

    step: int | None = None
    metric: float | None = None
    without_gain: int = 0


def metric_name(args: TrainingArguments) -> str:
    """Return the value of `--metric_for_best_model` with the prefix eval_, which the user may omit."""
    return "eval_" + args.metric_for_best_model.removeprefix("eval_")


def greater_is_better(args: TrainingArguments) -> bool:
    """Return `--greater_is_better` if it is given, else whether a larger value of the metric is better."""
    given = args.greater_is_better
    return metric_name(args) not in ("eval_loss", "eval_perplexity", "eval_kl") if given is None else given


def update_best(best: BestMetric, step: int, metrics: Mapping[str, Any], args: TrainingArguments) -> BestMetric:
    """Return `best` after one more evaluation. A metric that is missing or not finite is no improvement.

    As in transformers, any improvement makes an evaluation the best one (Trainer), but only an improvement of more than
    `--early_stopping_threshold` resets the count of evaluations without a gain (EarlyStoppingCallback).
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
    """Whether the last `--early_stopping_patience` evaluations brought no sufficient improvement; False without the
    flag."""
    return args.early_stopping_patience is not None and best.without_gain >= args.early_stopping_patience
