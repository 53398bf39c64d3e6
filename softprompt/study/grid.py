"""Read a STUDY.toml: the cells of its grid, and every error in them before anything is loaded.

title = "…"                      # heading of the page; `about` is Markdown below it
output_dir = "runs/my-study"     # default: runs/study-<name of the file>
seeds = [42, 0, 1]               # every cell runs once for each seed
hard_prompts = ["…"]             # untrained texts before the input, compared with the trained prompts
voting = ["majority_vote"]       # also evaluate the prompts of all seeds of a setting as an ensemble

[settings]                       # settings of train.py, the same in every cell
dataset = "rows.jsonl"

[[grid]]                         # any number of grids; each is all combinations of the values in its lists
num_virtual_tokens = [1, 10, 100]
rows = [8, 32, 128, "all"]       # few-shot: the number of training rows, drawn with the seed
"""

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from softprompt.config.arg_parser import FlagParser
from softprompt.config.infer_args import Voting
from softprompt.config.loader import GROUPS, train_config
from softprompt.config.schema import closest_name, is_text
from softprompt.config.train_args import PromptTuningArguments
from softprompt.config.unknown_names import advice
from softprompt.config.validation import seed_faults
from softprompt.study.cell import ALL, PROMPT_SETTINGS, SETTINGS, Cell
from softprompt.utils.errors import ConfigError

KEYS = ("title", "about", "output_dir", "seeds", "hard_prompts", "voting", "settings", "grid")
# Settings that only some initializations, reparameterizations or templates use. They apply only to such cells, of which
# a study must have at least one.
USED_WITH = {
    "prompt_tuning_init_text": ("TEXT",),
    "class_labels": ("CLASS_LABELS",),
    "vocab_population": ("SAMPLE_VOCAB", "CLASS_LABELS"),
    "encoder_hidden_size": ("mlp",),
    "chat_template_date": ("chat",),
}
VOTINGS = set(get_args(Voting))
DEFAULT_SEEDS = [42]
MAX_ERRORS = 5  # listed in one message
EXAMPLES = (
    ("Run a study; the same command continues it after an interruption", "my-study.toml"),
    ("Write it into another folder", "my-study.toml --output_dir runs/again"),
    ("Repeat the study of the mini base in docs/study.md", "docs/mini-study.toml"),
)


@dataclass(frozen=True)
class Study:
    """A study file.

    Args:
        path: The file.
        title: Heading of the study's page.
        about: Markdown below the heading.
        output_dir: Folder of the results.
        cells: The cells of all grids, without duplicates.
        arguments: Arguments of the command that runs the study; the page names the command.
    """

    path: Path
    title: str
    about: str
    output_dir: Path
    cells: list[Cell]
    arguments: tuple[str, ...]


def read_study(path: Path) -> Study:
    """Read and check a study file.

    Raises:
        ConfigError: The file cannot be read, has an unknown key or a wrong value, or a cell has settings that are not
            valid.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a study file") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML
        raise ConfigError(f"{path}: not TOML: {error}") from None
    if errors := [*_key_errors(content), *_table_errors(content)]:
        raise ConfigError(f"{path}: {'; '.join(errors)}")
    output_dir = Path(content.get("output_dir", Path("runs") / f"study-{path.stem}")).expanduser()
    title, about = content.get("title", f"Study {path.stem}"), content.get("about", "")
    return Study(path, title, about, output_dir, list(_cells(path, content)), (path.as_posix(),))


def relocated(study: Study, output_dir: str | None) -> Study:
    """Return the study with another output folder; None keeps its own.

    Raises:
        ConfigError: `output_dir` is empty.
    """
    if output_dir == "":
        raise ConfigError("--output_dir is empty; name a folder, or leave it out")
    if output_dir is None:
        return study
    return replace(
        study, output_dir=Path(output_dir).expanduser(), arguments=(*study.arguments, "--output_dir", output_dir)
    )


def parse_study(argv: Sequence[str]) -> Study:
    """Return the study that the command line of `study` names; its arguments are the study's file and flags.

    Raises:
        ConfigError: An argument or the file is wrong.
    """
    description = "Train every cell of a grid of settings, and report what the results show."
    parser = FlagParser([], "study", description, "STUDY.toml [--output_dir DIR]", examples=EXAMPLES)
    parser.add_argument("study", metavar="STUDY.toml", help="The grid: what to vary. docs/study.md describes the file.")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="Write the study into this folder. (default: output_dir of STUDY.toml, else runs/study-NAME)",
    )
    given = parser.parse(argv)
    return relocated(read_study(Path(given["study"]).expanduser()), given.get("output_dir"))


def raise_cell_errors(path: Path, errors: Mapping[str, list[str]]) -> None:
    """Raise a ConfigError if there are any `errors`: error messages, each with the names of the cells that have it; no
    names if it is not about a cell."""
    if errors:
        messages = [f"{_named(cells)}{message}" for message, cells in errors.items()]
        more = f"; and {len(messages) - MAX_ERRORS} more errors" if len(messages) > MAX_ERRORS else ""
        raise ConfigError(f"{path}: {'; '.join(messages[:MAX_ERRORS])}{more}")


def _named(cells: Sequence[str]) -> str:
    more = f" and {len(cells) - 1:,} more" if len(cells) > 1 else ""
    return f"the cell {cells[0]}{more}: " if cells else ""


def _key_errors(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the errors in the keys above [settings]."""
    for key in content:
        if key not in KEYS:
            yield f"unknown key {key!r}{closest_name(key, KEYS) or '; the keys are ' + ', '.join(KEYS)}"
    for key in ("title", "about", "output_dir"):
        if key in content and not (is_text(content[key]) and content[key] and "\0" not in content[key]):
            yield f"{key} {content[key]!r} is not a text"
    seeds, texts = content.get("seeds", DEFAULT_SEEDS), content.get("hard_prompts", [])
    if not (isinstance(seeds, list) and seeds and all(type(s) is int and not seed_faults(s) for s in seeds)):
        yield f"seeds {seeds!r} is not a list of integers from 0 to 2**63 - 1"
    if not (isinstance(texts, list) and all(is_text(text) and text.strip() for text in texts)):
        yield f"hard_prompts {texts!r} is not a list of texts"
    votings = content.get("voting", [])
    if not (isinstance(votings, list) and set(map(str, votings)) <= VOTINGS):
        yield f"voting {votings!r} is not a list of {', '.join(sorted(VOTINGS))}"
    elif votings and isinstance(seeds, list) and len(set(map(str, seeds))) < 2:
        yield "voting needs several seeds, because the prompts of the seeds vote"


def _table_errors(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the errors in [settings] and in each [[grid]], except those that only `train_config` can find."""
    settings, grids = content.get("settings", {}), content.get("grid", [{}])
    if not (isinstance(grids, list) and grids and all(isinstance(grid, dict) for grid in grids)):
        yield "grid is not a list of tables; write [[grid]] above each"
        grids = []
    if not isinstance(settings, dict):
        yield "settings is not a table; write [settings] above it"
        settings = {}
    for name, table, known in [("settings", settings, ("preset", *SETTINGS))] + [
        ("grid", grid, (*SETTINGS, "rows")) for grid in grids
    ]:
        for key, value in table.items():
            if key not in known:
                yield f"{name}: unknown key {key!r}{_key_advice(key, known)}"
            elif name == "settings" and isinstance(value, list):
                labels = "; write the labels of one run as one text, 'one,another'" if key == "class_labels" else ""
                yield f"settings: {key} has several values; a list belongs under [[grid]]{labels}"
            elif value == []:
                yield f"{name}: {key} has no values"
            elif key == "rows" and not all(_is_row_count(n) for n in _as_list(value)):
                yield f"{name}: rows {value!r} are not integers of at least 1, or {ALL!r}"


def _key_advice(key: str, known: Sequence[str]) -> str:
    """Return what to do about an unknown key, as the rest of the error message."""
    if key in ("rows", "preset", *KEYS):
        places = {"rows": "under [[grid]]", "preset": "under [settings]"}
        return f"; it belongs {places.get(key, 'above [settings]')}"
    if key == "seed":
        return "; give a list of seeds above [settings]"
    if key in {field.name for group in GROUPS for field in fields(group)}:
        return ", which train.py has but a study does not; leave it out"
    return advice(key, known) or "; settings have train.py's names: python train.py --help"


def _cells(path: Path, content: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield the cells of all grids, each once. Raises ConfigError if any of them has settings that are not valid."""
    seen, used = set[str](), set[str]()
    errors: dict[str, list[str]] = {}
    for grid in content.get("grid", [{}]):
        for values in itertools.product(*map(_as_list, grid.values())):
            given = {**content.get("settings", {}), **dict(zip(grid, values, strict=True))}
            rows, usable = given.pop("rows", ALL), _usable_settings(given)
            used |= usable.keys()
            try:
                cells = list(_cells_of_setting(usable, None if rows == ALL else rows, content))
            except ConfigError as error:
                named = " ".join(f"{name} {value}" for name, value in zip(grid, values, strict=True))
                errors.setdefault(str(error), []).append(named or "of [settings]")
                continue
            for cell in cells:
                if (key := repr(cell.settings())) not in seen:
                    seen.add(key)
                    yield cell
    for name in (name for table in (content.get("settings", {}), *content.get("grid", [])) for name in table):
        if name in USED_WITH and name not in used:
            errors[f"no cell uses {name}, which is for {', '.join(USED_WITH[name])}; leave it out"] = []
    raise_cell_errors(path, errors)


def _cells_of_setting(given: Mapping[str, Any], rows: int | None, content: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield one trained cell for each seed, one ensemble for each voting, and one cell for each hard prompt."""
    seeds = list(dict.fromkeys(content.get("seeds", DEFAULT_SEEDS)))
    cells = [Cell(train_config(**given, seed=seed), rows) for seed in seeds]
    if text := cells[0].config.distillation.text:
        raise ConfigError(
            f"a study does not support distillation ({text}); leave out distill_prompt and distill_context, and name a "
            "preset or a dataset with answers"
        )
    yield from cells
    for voting in content.get("voting", []):
        yield replace(cells[0], trained=False, voting=voting, seeds=tuple(seeds))
    for text in content.get("hard_prompts", []):
        config = train_config(
            **{name: value for name, value in given.items() if name not in (*PROMPT_SETTINGS, "learning_rate")},
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
        )
        yield Cell(config, trained=False)


def _usable_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without those that the cell's initialization, reparameterization and template do not use."""
    usual = PromptTuningArguments()
    init = given.get("prompt_tuning_init", usual.prompt_tuning_init)
    chosen = [init, given.get("prompt_reparameterization", usual.prompt_reparameterization), given.get("template")]
    return {name: value for name, value in given.items() if any(use in chosen for use in USED_WITH.get(name, chosen))}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_row_count(value: Any) -> bool:
    return value == ALL or (type(value) is int and value > 0)
