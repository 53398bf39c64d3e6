"""The results of a finished run: the metrics of all_results.json, and whether the prompt is useful."""

from collections.abc import Sequence
from typing import Any

from softprompt.config.loader import TrainConfig
from softprompt.evaluation.evaluator import Evaluation, Rival
from softprompt.evaluation.verdict import Verdict, verdict
from softprompt.runs.state import Metrics
from softprompt.training.early_stopping import BestMetric
from softprompt.training.metrics_log import Totals


def final_metrics(
    totals: Totals,
    seconds: float,
    after: Evaluation | None,
    before: Evaluation | None,
    best: BestMetric | None,
    rivals: Sequence[Rival] = (),
) -> Metrics:
    """Return the metrics of a run whose training loop took `seconds`.

    Args:
        after, before: The evaluations of its prompt and of the bare base; None without held-out rows.
        best: Given if the run ends with its best prompt.
        rivals: What else the prompt is compared with.
    """
    return {
        "epoch": round(totals.epoch, 4),
        **({} if totals.mean_loss is None else {"train_loss": totals.mean_loss}),
        "train_runtime": round(seconds, 2),
        "train_tokens_per_second": round(totals.tokens_per_second, 1),
        **({**after.metrics(), **after.sample_metrics()} if after else {}),
        **(before.metrics("_base") if before else {}),
        **{name: value for rival in rivals for name, value in rival.evaluation.metrics(rival.suffix).items()},
        **({"best_global_step": best.step, "best_metric": best.metric} if best else {}),
    }


def verdict_of_run(
    config: TrainConfig,
    after: Evaluation | None,
    before: Evaluation | None,
    rivals: Sequence[Rival] = (),
    seen: Sequence[bool] = (),
) -> Verdict | None:
    """Return whether the run's prompt is useful, and if not, what to try; None without held-out rows. `seen` says of
    each held-out row whether it is among the training rows."""
    if after is None or before is None:
        return None
    from_text = config.prompt.prompt_tuning_init == "TEXT"
    ways = ["train longer", *([] if from_text else ["start from TEXT"]), "take a larger base"]
    if config.distillation.text:
        ways = ["train longer", "give more questions", "raise --num_virtual_tokens"]
    return verdict(after, before, ways, rivals, seen)


def verdict_facts(judged: Verdict | None) -> dict[str, Any]:
    """Return the fields of a verdict in all_results.json and report.json; an empty dict without a verdict."""
    return {"verdict": judged.sentence, "verdict_better": judged.better} if judged else {}
