"""Where a run starts: at the beginning, or at a checkpoint.

A resumed run must agree with its checkpoint on which rows come next, which token ids they become, and how its
evaluations are compared. `StartingPoint` holds the settings and the saved state; the checks raise CheckpointError.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from softprompt.config.loader import TrainConfig, validated
from softprompt.data.dataloader import rows_of_a_step
from softprompt.data.template import CHAT, DEFAULT
from softprompt.runs.checkpoints import fault_of
from softprompt.runs.file_names import ANSWERS_FILE
from softprompt.runs.state import Metrics, TrainingState
from softprompt.runs.train_state import find_checkpoint, load_state
from softprompt.training.early_stopping import BestMetric, greater_is_better, metric_name
from softprompt.training.metrics_log import Totals
from softprompt.training.resume_settings import merge_settings, saved_config
from softprompt.utils.errors import CheckpointError
from softprompt.utils.fingerprints import fingerprint_of_rows

OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
HELD_OUT = "held-out rows"
# Of a distillation; the second one belongs to the held-out rows, which a resumed run may add.
TRAIN_ANSWERS, HELD_OUT_ANSWERS = "answers with the text", f"{HELD_OUT}.answers with the text"
NO_ROWS = fingerprint_of_rows([])


@dataclass(frozen=True)
class StartingPoint:
    """The settings of a run, and the state that its loop starts from.

    A new run has the defaults. A resumed run has a `checkpoint`, and what was read from it: the state of the loop, the
    totals and metrics so far, the best evaluation, the evaluation of the base (see `base_evaluation`), and the
    fingerprints of rows, tokenizer and base.
    """

    config: TrainConfig
    rows_per_step: int
    checkpoint: Path | None = None
    state: TrainingState = field(default_factory=TrainingState)
    totals: Totals = field(default_factory=Totals)
    history: Sequence[Metrics] = ()
    best: BestMetric = field(default_factory=BestMetric)
    base_evaluation: Mapping[str, Any] | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def searches_learning_rate(self) -> bool:
        """Whether the learning rate is still to be found (`--find_learning_rate`); a resumed run already has it."""
        return self.config.training.find_learning_rate and self.checkpoint is None


def starting_point(config: TrainConfig, devices: int) -> StartingPoint:
    """Return where a run on `devices` processes starts. If it is resumed, the settings given now are merged over those
    of the checkpoint, and then checked.

    Raises:
        ConfigError: The settings are wrong.
        CheckpointError: There is no whole checkpoint, or the settings disagree with it.
    """
    checkpoint = find_checkpoint(config)
    if not checkpoint:
        return StartingPoint(_with_date(validated(config)), rows_of_a_step(config.training, devices))
    state, saved = load_state(checkpoint)
    config = _with_date(merge_settings(config, checkpoint, saved))  # earlier versions saved no date
    rows_per_step = rows_of_steps(config, saved, devices)
    check_rows(config, rows_per_step, saved, checkpoint)
    return StartingPoint(
        config,
        rows_per_step,
        checkpoint,
        state=align_position(state, config, saved),
        totals=Totals(**saved["totals"]),
        history=saved["history"],
        best=best_so_far(config, saved, checkpoint),
        base_evaluation=saved["base_evaluation"],
        fingerprints=saved["fingerprints"],
    )


def _with_date(config: TrainConfig) -> TrainConfig:
    """Return settings with the date that the chat template sees, which must be the same when the run is resumed."""
    data = config.data
    if data.template != CHAT or data.chat_template_date:
        return config
    return replace(config, data=replace(data, chat_template_date=date.today().isoformat()))


def compare_contents(start: StartingPoint, fingerprints: Mapping[str, str]) -> StartingPoint:
    """Compare the `fingerprints` of this run's rows, tokenizer and base with the checkpoint's, and return `start` with
    them. The best evaluation is dropped if later ones cannot be compared with it.

    Raises:
        CheckpointError: Rows, tokenizer or base differ, and `--ignore_data_skip` is not given.
    """
    if start.checkpoint is None:
        return replace(start, fingerprints=fingerprints)
    ignored = start.config.training.ignore_data_skip
    others = other_contents(start.fingerprints, fingerprints, start.checkpoint, ignored)
    best = start.best if are_comparable(others) else BestMetric()
    return replace(start, fingerprints=fingerprints, best=best)


def rows_of_steps(config: TrainConfig, saved: Mapping[str, Any], devices: int) -> int:
    """Return the number of rows of an optimizer step. It stays as the checkpoint has it, whatever the number of devices
    is now, unless the batch size or the gradient accumulation differs from the checkpoint's."""
    changed = any(getattr(config.training, name) != saved["arguments"].get(name) for name in OF_A_STEP)
    return rows_of_a_step(config.training, devices) if changed else int(saved["rows_per_step"])


def check_rows(config: TrainConfig, rows_per_step: int, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Compare the settings that decide which rows come next and what token ids they become.

    Raises:
        CheckpointError: They differ from the checkpoint's, so rows would be repeated, left out or tokenized
            differently. With --ignore_data_skip this is only printed.
    """
    old, ignored = saved_config(saved), config.training.ignore_data_skip
    was = old.data.streaming
    if was != config.data.streaming and not ignored:
        raise CheckpointError(
            f"{checkpoint}: was trained {'with' if was else 'without'} --streaming, which changes the order of rows; "
            f"leave out {'--streaming false' if was else '--streaming'}, or add --ignore_data_skip to "
            f"{'continue in the other order' if was else 'begin at the first row again'}"
        )
    before, now = _order_of(old, int(saved["rows_per_step"])), _order_of(config, rows_per_step)
    changed = [name for name in before if name in now and before[name] != now[name]]
    if not changed:
        return
    told = " and ".join(f"{name} {before[name]} (now {now[name]})" for name in changed)
    if not ignored:
        way = "begin this pass again" if _is_shuffled_anew(old, config) else "continue anyway"
        raise CheckpointError(
            f"{checkpoint}: was trained with {told}; rows of this pass would be repeated, left out or tokenized "
            f"differently; give the same flags, or add --ignore_data_skip to {way}"
        )
    print(f"{checkpoint.name}: was trained with {told}; some rows of this pass may be repeated or left out")


def align_position(start: TrainingState, config: TrainConfig, saved: Mapping[str, Any]) -> TrainingState:
    """Return the state to continue from. If another buffer size or seed changes the order of a stream's rows, the
    current pass over the rows starts again."""
    if start.position and _is_shuffled_anew(saved_config(saved), config):
        return replace(start, position={**start.position, "taken": 0})
    return start


def best_so_far(config: TrainConfig, saved: Mapping[str, Any], checkpoint: Path) -> BestMetric:
    """Return the best evaluation up to the checkpoint. It is dropped if later evaluations cannot be compared with it,
    or if --load_best_model_at_end is new and no whole checkpoint holds the best prompt."""
    best, old = BestMetric(**saved["best"]), saved_config(saved)
    if best.step is None:
        return best
    asked_now = config.training.load_best_model_at_end and not old.training.load_best_model_at_end
    if _measure(old) != _measure(config):
        why = "was chosen by another metric"
    elif asked_now and fault_of(checkpoint.parent / f"checkpoint-{best.step}"):
        why = "was not saved"
    else:
        return best
    print(
        f"{checkpoint.name}: the best prompt so far, of step {best.step}, {why}; the search for the best starts again"
    )
    return BestMetric()


def other_contents(saved: Mapping[str, str], now: Mapping[str, str], checkpoint: Path, ignored: bool) -> list[str]:
    """Return the names of those fingerprints `now` that differ from the `saved` ones. Fingerprints that an earlier
    version did not save are not compared; neither are held-out rows if the checkpoint had none.

    Raises:
        CheckpointError: Some differ, and `ignored` is False: the run would continue with another base, tokenizer or
            dataset, or with other held-out rows.
    """
    others = [what for what in now if saved.get(what, now[what]) != now[what]]
    if saved.get(HELD_OUT) == NO_ROWS:
        others = [what for what in others if _family(what) != HELD_OUT]
    if others and not ignored and {*others} <= {TRAIN_ANSWERS, HELD_OUT_ANSWERS}:
        file = checkpoint.parent / ANSWERS_FILE
        raise CheckpointError(
            f"{checkpoint}: the base's answers with the text are other ones than in training; restore {file}, or add "
            "--ignore_data_skip to continue with the new ones"
        )
    named = _named(others)
    if others and not ignored:
        differ = "differs" if len(named) == 1 and named != [HELD_OUT] else "differ"
        raise CheckpointError(
            f"{checkpoint}: the {' and the '.join(named)} named now {differ} in content from what was used in training"
            "; name the same, or add --ignore_data_skip to continue anyway"
        )
    if others:
        print(f"{checkpoint.name}: was trained with other contents, as --ignore_data_skip allows: {', '.join(named)}")
    if unknown := _named([what for what in now if what not in saved]):
        print(f"{checkpoint.name}: was written before {' and '.join(unknown)} were recorded; they are not compared")
    return others


def are_comparable(others: Collection[str]) -> bool:
    """Whether evaluations can be compared with earlier ones, given the names of the contents that differ."""
    return not any(_family(what) in (HELD_OUT, "tokenizer") for what in others)


def _order_of(config: TrainConfig, rows_per_step: int) -> dict[str, Any]:
    """Return the settings that decide which rows a step takes, and which token ids they become."""
    data = config.data
    # Without streaming, the fingerprint of the rows depends on the columns.
    streamed = {"--buffer_size": data.buffer_size, "--columns": config.columns} if data.streaming else {}
    step = " × ".join(f"--{name}" for name in OF_A_STEP)
    return {"--seed": config.training.seed, f"{step} (rows of a step)": rows_per_step, **streamed, **_seen_as(config)}


def _seen_as(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide which token ids a row becomes."""
    data = config.data
    return {
        "--template": data.template or DEFAULT,
        "--max_length": data.max_length,
        "--truncation_side": data.truncation_side,
    }


def _measure(config: TrainConfig) -> tuple[Any, ...]:
    return metric_name(config.training), greater_is_better(config.training), _seen_as(config)


def _is_shuffled_anew(old: TrainConfig, config: TrainConfig) -> bool:
    """Whether the settings change the order in which the rows of a stream are drawn."""
    drawn = [(one.data.buffer_size, one.training.seed) for one in (old, config)]
    return old.data.streaming and config.data.streaming and drawn[0] != drawn[1]


def _family(what: str) -> str:
    return what.partition(".")[0]


def _named(whats: Collection[str]) -> list[str]:
    """Return names for messages: "tokenizer.eos_token" becomes "tokenizer (eos_token)"."""
    named = []
    for family in dict.fromkeys(map(_family, whats)):
        parts = [what.partition(".")[2] or "tokenizer.json" for what in whats if _family(what) == family]
        in_parts = family == "tokenizer" and parts != ["tokenizer.json"]
        named.append(f"{family} ({', '.join(parts)})" if in_parts else family)
    return named
