"""The evaluation of the base without a prompt, which a resumed run takes from its checkpoint."""

import math
from collections.abc import Callable
from typing import Any

from softprompt.config.validation import quantization_bits
from softprompt.data.template import DEFAULT
from softprompt.distributed.process_group import World
from softprompt.evaluation.distillation import DistillationEvaluator
from softprompt.evaluation.evaluator import Evaluation, Evaluator
from softprompt.runs.state import Metrics
from softprompt.training.result import Setup


def evaluate_base(
    setup: Setup, evaluator: Evaluator | DistillationEvaluator, world: World, say: Callable[[str], object]
) -> Evaluation:
    """Evaluate the base, or restore its evaluation from the checkpoint if base, rows and settings are the same. Every
    rank must call this; `say` is called with each line to print."""
    saved = setup.start.base_evaluation
    is_same = saved is not None and saved["of"] == _identity(setup, evaluator)
    state = world.all_gather(saved if is_same else None)[0]  # with --shard_base, only rank 0 knows the base's hash
    if state is not None:
        before, when = evaluator.restored(state), ", evaluated when the run began"
    else:
        say("evaluating the base without a prompt …")
        before, when = evaluator(None), ""
    say(f"base without a prompt{when}: {_listed(before.metrics())}")
    return before


def base_evaluation_state(setup: Setup, before: Evaluation | None) -> dict[str, Any] | None:
    """Return the evaluation of the base as a checkpoint holds it, in JSON types. Return None without held-out rows, and
    if a loss is not finite, which JSON cannot hold: the evaluation is then repeated."""
    if before is None or setup.evaluator is None or not math.isfinite(before.loss):
        return None
    return {"of": _identity(setup, setup.evaluator), **setup.evaluator.state_of(before)}


def _identity(setup: Setup, evaluator: Evaluator | DistillationEvaluator) -> dict[str, Any]:
    """Return everything that the evaluation depends on, in JSON types. A saved evaluation is used only if this is
    equal."""
    config = setup.config
    return {
        "fingerprints": {name: value for name, value in setup.start.fingerprints.items() if name != "dataset"},
        "template": config.data.template or DEFAULT,
        "max_length": config.data.max_length,
        "truncation_side": config.data.truncation_side,
        "compute_dtype": str(setup.engine.compute_dtype),
        "bits": quantization_bits(config.model.load_in_8bit, config.model.load_in_4bit),
        "compares_answers": evaluator.compares_answers,
        "labels": list(evaluator.classifier.labels) if evaluator.classifier else None,
    }


def _listed(metrics: Metrics) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
