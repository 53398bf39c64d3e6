"""The results of a study's finished cells, and how they are selected and grouped for comparison."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from softprompt.prompt.adapter_io import json_bytes
from softprompt.runs.checkpoints import with_checksums
from softprompt.runs.file_names import CHECKSUMS_FILE
from softprompt.study.cell import BASE_SETTINGS, DATA_SETTINGS

T = TypeVar("T")
CELL_FILE = "cell.json"
# The content of a cell.json. The record of a failed cell is not written; its metrics are empty, and "failed" says why.
CellRecord = dict[str, Any]
START_SETTINGS = ("prompt_tuning_init_text", "class_labels", "vocab_population")
# Settings with a field of their own in CellResult. All others are its `context`.
FIELD_SETTINGS = (
    *("model_name_or_path", "dataset", "prompt_tuning_init", "num_virtual_tokens", "learning_rate", "seed", "rows"),
    *("trained", "voting", "seeds", *START_SETTINGS, "prompt_reparameterization", "encoder_hidden_size"),
)
EVALUATION_SETTINGS = (*BASE_SETTINGS, *DATA_SETTINGS)  # what a held-out loss depends on, besides the prompt
COMPARED_FIELDS = (
    *("base", "dataset", "init", "start", "reparameterization", "virtual_tokens", "learning_rate", "rows", "seed"),
    "context",
)


@dataclass(frozen=True)
class CellResult:
    """The values of a cell that are compared with those of other cells.

    Args:
        base: The base's name or path.
        parameters: The base's number of parameters.
        dataset: The dataset's name or path.
        init: The setting prompt_tuning_init.
        virtual_tokens: Number of virtual tokens.
        learning_rate: The peak learning rate; None if it is the default of a base that cannot be loaded.
        rows: Number of training rows.
        seed: The seed.
        trained: Whether the prompt was trained: not a hard prompt, and not an ensemble.
        voting: How an ensemble votes; empty for all other cells.
        members: Number of an ensemble's members; 1 for all other cells.
        loss: Held-out loss in nats per target token; inf if the loss or the prompt became infinite or NaN in training.
        exact_match: Share of held-out answers that are generated exactly; None if answers were not generated.
        base_loss: Held-out loss of the base without a prompt.
        base_exact_match: Exact match of the base without a prompt.
        targets: Number of held-out target tokens. Losses per token are comparable only if it is equal.
        start: The text, labels or vocabulary size that the prompt starts from.
        context: All settings that no hypothesis compares, as JSON.
        held_out: The settings that determine the held-out rows and how the base reads them, as JSON.
        failed: Why the cell has no result; empty if it has one. A failed cell is shown, but not compared.
        exact_match_rows: Number of rows that the exact match covers; None if it covers all held-out rows.
        reparameterization: The setting prompt_reparameterization, followed by encoder_hidden_size if it is given.
        accuracy: Share of held-out rows whose most likely label is the expected one. None if the answers are not
            labels, in an ensemble, and in results of earlier versions, which lack the next six values as well.
        accuracy_low, accuracy_high: The ends of the accuracy's 95 % interval.
        base_accuracy, base_accuracy_low, base_accuracy_high: The same of the base without a prompt.
        majority: Share of the most common label among the held-out rows.
        default_learning_rate: The default of the base and the initial prompt; None if an earlier version ran the cell.
    """

    base: str
    parameters: int
    dataset: str
    init: str
    virtual_tokens: int
    learning_rate: float | None
    rows: int
    seed: int
    trained: bool
    voting: str
    members: int
    loss: float
    exact_match: float | None
    base_loss: float
    base_exact_match: float | None
    targets: int
    start: str
    context: str
    held_out: str = ""
    failed: str = ""
    exact_match_rows: int | None = None
    reparameterization: str = "none"
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    base_accuracy: float | None = None
    base_accuracy_low: float | None = None
    base_accuracy_high: float | None = None
    majority: float | None = None
    default_learning_rate: float | None = None


Key = Callable[[CellResult], Any]


def read_finished(folder: Path) -> CellRecord | None:
    """Return the record in a cell's folder; None if there is none, or a file does not match its checksum."""
    try:
        checksums = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        content = {name: (folder / Path(name).name).read_bytes() for name in checksums}
        whole = with_checksums(content)[CHECKSUMS_FILE] == json_bytes(checksums)
        return json.loads(content[CELL_FILE]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def cell_result(record: Mapping[str, Any]) -> CellResult:
    """Return the result in the content of a cell.json."""
    s, metrics = record["settings"], record["metrics"]
    context = {k: v for k, v in s.items() if k not in FIELD_SETTINGS}
    return CellResult(
        base=s["model_name_or_path"],
        parameters=record["parameters"],
        dataset=s["dataset"],
        init=s["prompt_tuning_init"],
        virtual_tokens=record["virtual_tokens"],
        learning_rate=s["learning_rate"],
        rows=record["rows"],
        seed=s["seed"],
        trained=s["trained"],
        voting=s.get("voting", ""),
        members=len(s.get("seeds", (1,))),
        loss=metrics.get("eval_loss", math.inf),
        exact_match=metrics.get("eval_exact_match"),
        base_loss=metrics.get("eval_loss_base", math.inf),
        base_exact_match=metrics.get("eval_exact_match_base"),
        targets=record["held_out_targets"],
        start=", ".join(str(s[name]) for name in START_SETTINGS if s[name] is not None),
        context=json.dumps(context, sort_keys=True),
        held_out=json.dumps({k: v for k, v in context.items() if k in EVALUATION_SETTINGS}, sort_keys=True),
        failed=record.get("failed", ""),
        exact_match_rows=metrics.get("eval_exact_match_rows", metrics.get("eval_exact_match_rows_base")),
        reparameterization=_reparameterization(s),
        accuracy=metrics.get("eval_accuracy"),
        accuracy_low=metrics.get("eval_accuracy_low"),
        accuracy_high=metrics.get("eval_accuracy_high"),
        base_accuracy=metrics.get("eval_accuracy_base"),
        base_accuracy_low=metrics.get("eval_accuracy_low_base"),
        base_accuracy_high=metrics.get("eval_accuracy_high_base"),
        majority=metrics.get("eval_majority"),
        default_learning_rate=record.get("default_learning_rate"),
    )


def without_copies(results: Iterable[CellResult]) -> list[CellResult]:
    """Return the results without duplicates: two grids may contain the same run, if one of them gives the rate that is
    the default of the other. A copy that did not fail is kept, preferably one that stores all values."""
    runs = group_by(results, lambda r: (r.trained, r.voting, key_without()(r)))

    def lacks(r: CellResult) -> tuple[bool, ...]:
        return bool(r.failed), r.default_learning_rate is None, r.accuracy is None

    return [min(copies, key=lacks) for copies in runs.values()]


def _reparameterization(settings: Mapping[str, Any]) -> str:
    kind, width = settings.get("prompt_reparameterization", "none"), settings.get("encoder_hidden_size")
    return kind if width is None else f"{kind} {width}"


def at_best_learning_rate(results: Iterable[CellResult], *varied: str) -> list[CellResult]:
    """Return the trained cells of each setting at its best learning rate: the one with the lowest mean loss over seeds.

    Settings that differ only in the fields `varied` are compared with each other later. For a fair comparison, only
    learning rates that all of them were run at are considered, if there are any. Likewise, means are over the seeds
    that all learning rates were run with, if there are any.
    """
    kept: list[CellResult] = []
    trained = [r for r in results if r.trained and not r.failed]
    for compared in group_by(trained, key_without("learning_rate", "seed", *varied)).values():
        settings = group_by(compared, key_without("learning_rate", "seed")).values()
        shared = set.intersection(*({r.learning_rate for r in cells} for cells in settings))
        for cells in settings:
            candidates = [r for r in cells if r.learning_rate in shared or not shared]
            kept += lowest_mean_loss(group_by(candidates, lambda r: r.learning_rate).values())
    return kept


def best_on_other_seeds(settings: Iterable[Sequence[CellResult]]) -> dict[int, CellResult]:
    """Return for each seed its cell of the setting that has the lowest mean loss over the other seeds.

    Each setting is a list of cells, one for each seed. A setting that was chosen by the compared cells themselves would
    seem better than it is, the more so the more settings there are. So only settings with the most other seeds take
    part, and a seed is left out if there are none, unless no setting has several seeds.
    """
    every, found = list(settings), dict[int, CellResult]()
    seeds = dict.fromkeys(r.seed for cells in every for r in cells)
    for seed in seeds:
        others = [({r.seed for r in cells} - {seed}, cells) for cells in every if any(r.seed == seed for r in cells)]
        most = max((those for those, _ in others), key=len)
        if most or len(seeds) == 1:
            candidates = [cells for those, cells in others if those >= most]
            (found[seed],) = (r for r in lowest_mean_loss(candidates, left_out=seed) if r.seed == seed)
    return found


def lowest_mean_loss(settings: Iterable[Sequence[CellResult]], left_out: int | None = None) -> Sequence[CellResult]:
    """Return the setting with the lowest mean loss over the seeds that all settings have, except the seed `left_out`.

    Each setting is a list of cells, one for each seed. If the settings share no other seed, the mean is over all cells.
    """
    every = list(settings)
    seeds = set.intersection(*({r.seed for r in cells} for cells in every)) - {left_out}
    return min(every, key=lambda cells: mean(r.loss for r in cells if r.seed in seeds or not seeds))


def key_without(*names: str) -> Key:
    """Return a grouping key of all fields that distinguish two cells, except the fields `names`."""
    kept = [name for name in COMPARED_FIELDS if name not in names]
    return lambda r: tuple(getattr(r, name) for name in kept)


def varied_context(results: Iterable[CellResult]) -> Key:
    """Return a function that describes a result by those settings of its context that differ among `results`."""
    contexts = {r.context: json.loads(r.context) for r in results}
    every = list(contexts.values())
    names = dict.fromkeys(name for c in every for name in c)  # some settings are left out at their defaults
    varied = [name for name in names if any(c.get(name) != every[0].get(name) for c in every)]
    return lambda r: ", ".join(f"{name} {contexts[r.context].get(name)}" for name in varied)


def group_by(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Group items by their key, in the order in which the keys first appear."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
