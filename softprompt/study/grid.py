"""STUDY.toml → the cells of a grid, each with the settings of one training run, and every fault that is in them.

title = "…"                      # of the page; `about` is Markdown under it
output_dir = "runs/my-study"     # default: runs/study-<the file's name>
seeds = [42, 0, 1]               # every cell is run with each
hard_prompts = ["…"]             # texts put before the input as they are, beside the learned prompts
voting = ["majority_vote"]       # the prompts that a setting's seeds learn answer together, too

[settings]                       # what train.py takes, the same in every cell
dataset = "rows.jsonl"

[[grid]]                         # as many as are wanted: each is the product of its lists, one value is a list of one
num_virtual_tokens = [1, 10, 100]
rows = [8, 32, 128, "all"]       # few-shot: so many rows, drawn by the seed
"""

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from softprompt.config.infer_args import Voting
from softprompt.config.loader import GROUPS, TrainConfig, train_config
from softprompt.config.schema import closest_name, is_text
from softprompt.config.train_args import DEFAULT_NUM_VIRTUAL_TOKENS
from softprompt.config.unknown_names import advice
from softprompt.config.validation import seed_faults
from softprompt.utils.errors import ConfigError

ALL = "all"
KEYS = ("title", "about", "output_dir", "seeds", "hard_prompts", "voting", "settings", "grid")
OF_THE_BASE = ("model_name_or_path", "device", "bf16", "fp16", "engine")
OF_THE_ROWS = (
    *("dataset", "dataset_config_name", "dataset_split", "columns", "template", "max_length", "truncation_side"),
    *("eval_dataset", "eval_split", "eval_rows"),
)
OF_THE_PROMPT = (
    *("num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text", "class_labels", "vocab_population"),
)
OF_THE_TRAINING = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_microbatch", "gradient_checkpointing"),
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "deterministic", "per_device_eval_batch_size"),
)
SETTINGS = (*OF_THE_BASE, *OF_THE_ROWS, *OF_THE_PROMPT, *OF_THE_TRAINING)
# Given once for a study, these go to the cells that can use them.
OF_AN_INIT = {
    "prompt_tuning_init_text": ("TEXT",),
    "class_labels": ("CLASS_LABELS",),
    "vocab_population": ("SAMPLE_VOCAB", "CLASS_LABELS"),
}
VOTINGS = set(get_args(Voting))
MOST_NAMED = 5  # faults in one message


@dataclass(frozen=True)
class Cell:
    """One run of a grid: its settings with the seed, how many rows it sees (None: all), and whether it trains its
    prompt or takes a text as it is. With a `voting` it takes the prompts that its settings learn with each of `seeds`,
    as an ensemble."""

    config: TrainConfig
    rows: int | None = None
    trained: bool = True
    voting: Voting | None = None
    seeds: tuple[int, ...] = ()

    def members(self) -> list["Cell"]:
        """The cells whose prompts an ensemble takes."""
        return [Cell(with_seed(self.config, seed), self.rows) for seed in self.seeds]

    def settings(self) -> dict[str, Any]:
        """All that its result depends on, but for what is in the files it names. JSON-able."""
        every = {**self.config.as_dict(), "learning_rate": self.config.learning_rate}
        kept = {name: every[name] for name in (*SETTINGS, "seed")}
        together = {"voting": self.voting, "seeds": list(self.seeds)} if self.voting else {}
        return {**kept, "rows": self.rows, "trained": self.trained, **together}

    def __str__(self) -> str:
        c = self.config
        if not (self.trained or self.voting):
            return f"{c.model.model_name_or_path} {c.data.dataset} hard prompt {c.prompt.prompt_tuning_init_text!r}"
        tokens = c.prompt.num_virtual_tokens
        length = tokens or ("of its text" if c.prompt.prompt_tuning_init == "TEXT" else DEFAULT_NUM_VIRTUAL_TOKENS)
        seeds = (
            f"{self.voting} of seeds {', '.join(map(str, self.seeds))}" if self.voting else f"seed {c.training.seed}"
        )
        return (
            f"{c.model.model_name_or_path} {c.data.dataset} {c.prompt.prompt_tuning_init} num_virtual_tokens {length} "
            f"learning_rate {c.learning_rate:g} rows {self.rows or ALL} {seeds}"
        )


@dataclass(frozen=True)
class Study:
    """A study file: its path, what its page begins with, where it writes, and its cells, none twice. `arguments` are
    those of the command that runs it."""

    path: Path
    title: str
    about: str
    output_dir: Path
    cells: list[Cell]
    arguments: tuple[str, ...]


def read_study(path: Path) -> Study:
    """Raises ConfigError where the file cannot be read, holds an unknown key, or cells that cannot work."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a study file") from None
    except ValueError as error:  # not UTF-8, not TOML
        raise ConfigError(f"{path}: not TOML: {error}") from None
    if faults := list(_faults(found)):
        raise ConfigError(f"{path}: {'; '.join(faults)}")
    output_dir = Path(found.get("output_dir", Path("runs") / f"study-{path.stem}")).expanduser()
    title, about = found.get("title", f"Study {path.stem}"), found.get("about", "")
    return Study(path, title, about, output_dir, list(_cells(path, found)), (path.as_posix(),))


def refuse(path: Path, faults: Mapping[str, list[str]]) -> None:
    """Raises ConfigError where there are `faults`, each with the cells that have it."""
    if faults:
        told = [
            f"the cell {cells[0]}" + (f" and {len(cells) - 1:,} more" if len(cells) > 1 else "") + f": {fault}"
            for fault, cells in faults.items()
        ]
        more = f"; and {len(told) - MOST_NAMED} more faults" if len(told) > MOST_NAMED else ""
        raise ConfigError(f"{path}: {'; '.join(told[:MOST_NAMED])}{more}")


def _faults(found: Mapping[str, Any]) -> Iterator[str]:
    for key in found:
        if key not in KEYS:
            yield f"unknown key {key!r}{closest_name(key, KEYS) or '; there are ' + ', '.join(KEYS)}"
    for key in ("title", "about", "output_dir"):
        if key in found and not (is_text(found[key]) and found[key] and "\0" not in found[key]):
            yield f"{key} {found[key]!r} is not a text"
    seeds, texts = found.get("seeds", [42]), found.get("hard_prompts", [])
    if not (isinstance(seeds, list) and seeds and all(type(s) is int and not seed_faults(s) for s in seeds)):
        yield f"seeds {seeds!r} is not a list of whole numbers from 0 up"
    if not (isinstance(texts, list) and all(is_text(text) and text.strip() for text in texts)):
        yield f"hard_prompts {texts!r} is not a list of texts"
    votings = found.get("voting", [])
    if not (isinstance(votings, list) and set(map(str, votings)) <= VOTINGS):
        yield f"voting {votings!r} is not a list of {', '.join(sorted(VOTINGS))}"
    elif votings and isinstance(seeds, list) and len(set(map(str, seeds))) < 2:
        yield "voting needs several seeds, whose prompts vote"
    settings, grids = found.get("settings", {}), found.get("grid", [{}])
    if not (isinstance(grids, list) and grids and all(isinstance(grid, dict) for grid in grids)):
        yield "grid is not a list of tables; write [[grid]] above each"
        grids = []
    if not isinstance(settings, dict):
        yield "settings is not a table; write [settings] above it"
        settings = {}
    for where, table, known in [("settings", settings, ("preset", *SETTINGS))] + [
        ("grid", grid, (*SETTINGS, "rows")) for grid in grids
    ]:
        for key, value in table.items():
            if key not in known:
                yield f"{where}: unknown key {key!r}{_instead(where, key, known)}"
            elif where == "settings" and isinstance(value, list):
                labels = "; the labels of one run are one text, 'one,another'" if key == "class_labels" else ""
                yield f"settings: {key} has several values; a list belongs under [[grid]]{labels}"
            elif value == []:
                yield f"{where}: {key} has no values"
            elif key == "rows" and not all(_is_count(n) for n in _listed(value)):
                yield f"{where}: rows {value!r} are not whole numbers from 1 up, or {ALL!r}"


def _instead(where: str, key: str, known: Sequence[str]) -> str:
    """What to do about an unknown key."""
    if key in ("rows", *KEYS):
        return f"; it belongs {'under [[grid]]' if key == 'rows' else 'above [settings]'}"
    if key == "seed":
        return "; give a list of seeds above [settings]"
    if key in {field.name for group in GROUPS for field in fields(group)}:
        return ", which train.py takes and a study does not; leave it out"
    return advice(key, known) or "; settings have train.py's names: python train.py --help"


def _cells(path: Path, found: Mapping[str, Any]) -> Iterator[Cell]:
    seen: set[str] = set()
    faults: dict[str, list[str]] = {}
    for grid in found.get("grid", [{}]):
        for values in itertools.product(*map(_listed, grid.values())):
            given = {**found.get("settings", {}), **dict(zip(grid, values, strict=True))}
            rows = given.pop("rows", ALL)
            try:
                made = list(_of_one_setting(_fitting(given), None if rows == ALL else rows, found))
            except ConfigError as error:
                named = " ".join(f"{name} {value}" for name, value in zip(grid, values, strict=True))
                faults.setdefault(str(error), []).append(named or "of [settings]")
                continue
            for cell in made:
                if (key := repr(cell.settings())) not in seen:
                    seen.add(key)
                    yield cell
    refuse(path, faults)


def _of_one_setting(given: Mapping[str, Any], rows: int | None, found: Mapping[str, Any]) -> Iterator[Cell]:
    seeds = list(dict.fromkeys(found.get("seeds", [42])))
    cells = [Cell(train_config(**given, seed=seed), rows) for seed in seeds]
    yield from cells
    for voting in found.get("voting", []):
        yield replace(cells[0], trained=False, voting=voting, seeds=tuple(seeds))
    for text in found.get("hard_prompts", []):
        config = train_config(
            **{name: value for name, value in given.items() if name not in (*OF_THE_PROMPT, "learning_rate")},
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
        )
        yield Cell(config, trained=False)


def _fitting(given: Mapping[str, Any]) -> dict[str, Any]:
    init = given.get("prompt_tuning_init", "RANDOM")
    return {name: value for name, value in given.items() if init in OF_AN_INIT.get(name, (init,))}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_count(value: Any) -> bool:
    return value == ALL or (type(value) is int and value > 0)


def with_seed(config: TrainConfig, seed: int) -> TrainConfig:
    return replace(config, training=replace(config.training, seed=seed))


def relocated(study: Study, output_dir: str | None) -> Study:
    """The same study, written elsewhere. Raises ConfigError for an empty name."""
    if output_dir == "":
        raise ConfigError("--output_dir is empty; name a folder, or leave it out")
    if output_dir is None:
        return study
    return replace(
        study, output_dir=Path(output_dir).expanduser(), arguments=(*study.arguments, "--output_dir", output_dir)
    )
