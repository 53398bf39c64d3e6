"""Which evaluation was the best so far, and when to stop waiting for a better one. Pure; its state is JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprompt.config.train_args import TrainingArguments


@dataclass(frozen=True)
class BestMetric:
    """The best evaluation's step and metric (None before the first), and how many evaluations since the last that
    gained more than the threshold."""

    step: int | None = None
    metric: float | None = None
    without_gain: int = 0


def metric_name(args: TrainingArguments) -> str:
    """`--metric_for_best_model` as the metrics name it: with eval_, which may be left out."""
    return "eval_" + args.metric_for_best_model.removeprefix("eval_")


def greater_is_better(args: TrainingArguments) -> bool:
    """As given; else true of exact match alone."""
    given = args.greater_is_better
    return metric_name(args) == "eval_exact_match" if given is None else given


def update_best(best: BestMetric, step: int, metrics: Mapping[str, Any], args: TrainingArguments) -> BestMetric:
    """`best` after one more evaluation. A metric that is not there or not finite is no gain.

    As in transformers: the best is any that is better than all before (Trainer); a gain that counts for patience is one
    of more than `--early_stopping_threshold` over the best before it (EarlyStoppingCallback).
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
    """Whether `--early_stopping_patience` evaluations in a row brought no gain."""
    return args.early_stopping_patience is not None and best.without_gain >= args.early_stopping_patience
