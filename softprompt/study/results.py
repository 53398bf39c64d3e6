"""A study's finished cells as points, and how they are put together to be compared."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, TypeVar

from softprompt.study.grid import OF_THE_BASE, OF_THE_ROWS

T = TypeVar("T")
NAMED = ("model_name_or_path", "dataset", "prompt_tuning_init", "num_virtual_tokens", "learning_rate", "seed", "rows")
OF_A_KIND = ("trained", "voting", "seeds")
HELD_OUT = (*OF_THE_BASE, *OF_THE_ROWS)  # what a loss on held-out rows depends on, whatever the prompt


@dataclass(frozen=True)
class Point:
    """A finished cell. `loss` is inf where training did not end in finite numbers; `targets` are the held-out ones,
    whose number shows whether losses per target can be compared; `exact_match_rows` is None where the exact match is
    over all rows. An ensemble has a `voting` and several `members`, and is not `trained`. `start` is the text or the
    labels that the prompt starts from, and `context` all that no claim is about. `held_out` names the held-out rows and
    how the base reads them. `failed` says why a cell has no result: it is shown, and compared with nothing."""

    base: str
    parameters: int
    dataset: str
    init: str
    virtual_tokens: int
    learning_rate: float
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


Key = Callable[[Point], Any]


def point(result: Mapping[str, Any]) -> Point:
    """From the content of a cell.json."""
    s, metrics = result["settings"], result["metrics"]
    texts = ("prompt_tuning_init_text", "class_labels", "vocab_population")
    context = {k: v for k, v in s.items() if k not in (*NAMED, *texts, *OF_A_KIND)}
    start = ", ".join(str(s[name]) for name in texts if s[name] is not None)
    return Point(
        s["model_name_or_path"],
        result["parameters"],
        s["dataset"],
        s["prompt_tuning_init"],
        result["virtual_tokens"],
        s["learning_rate"],
        result["rows"],
        s["seed"],
        s["trained"],
        s.get("voting", ""),
        len(s.get("seeds", (1,))),
        metrics.get("eval_loss", math.inf),
        metrics.get("eval_exact_match"),
        metrics.get("eval_loss_base", math.inf),
        metrics.get("eval_exact_match_base"),
        result["held_out_targets"],
        start,
        json.dumps(context, sort_keys=True),
        json.dumps({k: v for k, v in context.items() if k in HELD_OUT}, sort_keys=True),
        result.get("failed", ""),
        metrics.get("eval_exact_match_rows", metrics.get("eval_exact_match_rows_base")),
    )


def at_best_rate(points: Iterable[Point], *varied: str) -> list[Point]:
    """Of trained cells that differ in learning rate and seed alone, those at the rate whose mean loss is lowest. Cells
    that differ in the fields `varied`, too, are to be compared: it is the best of the rates that all of them were run
    at, if there is any, so that none gains by a rate that another one was not given. The means are those over the
    seeds that all rates were run with, if there is any."""
    kept = []
    trained = [p for p in points if p.trained and not p.failed]
    for compared in grouped(trained, without("learning_rate", "seed", *varied)).values():
        settings = grouped(compared, without("learning_rate", "seed")).values()
        shared = set.intersection(*({p.learning_rate for p in same} for same in settings))
        for same in settings:
            of_rates = grouped([p for p in same if p.learning_rate in shared or not shared], lambda p: p.learning_rate)
            kept += lowest(of_rates.values())
    return kept


def lowest(settings: Iterable[Sequence[Point]], left_out: int | None = None) -> Sequence[Point]:
    """Of several settings, each with a cell for each seed, the one whose mean loss is lowest: over the seeds that all
    of them have, if there is any, without the one `left_out`."""
    every = list(settings)
    seeds = set.intersection(*({p.seed for p in cells} for cells in every)) - {left_out}
    return min(every, key=lambda cells: mean(p.loss for p in cells if p.seed in seeds or not seeds))


def without(*names: str) -> Key:
    """All that tells a cell from another, but for the fields named."""
    told = ("base", "dataset", "init", "start", "virtual_tokens", "learning_rate", "rows", "seed", "context")
    left = [name for name in told if name not in names]
    return lambda p: tuple(getattr(p, name) for name in left)


def other_settings(points: Iterable[Point]) -> Key:
    """Of a point, the settings of its context that are not the same in all contexts."""
    contexts = {p.context: json.loads(p.context) for p in points}
    every = list(contexts.values())
    varied = [name for name in (every[0] if every else ()) if any(one.get(name) != every[0][name] for one in every)]
    return lambda p: ", ".join(f"{name} {contexts[p.context].get(name)}" for name in varied)


def grouped(things: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Those with the same key together, in the order in which the keys first come."""
    groups: dict[Any, list[T]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return groups
