"""The model card (README.md) of an adapter folder.

A card may be published with its adapter, so it contains no path of this machine: a local file or folder is shown by the
last component of its path.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softprompt.config.data_args import is_mini_task
from softprompt.config.loader import default_settings
from softprompt.data.template import DEFAULT, saved_template
from softprompt.prompt.adapter_io import CONFIG_FILE, Adapter
from softprompt.prompt.card_code import CardBase, peft_code, softprompt_code
from softprompt.prompt.card_metadata import front_matter, results_index
from softprompt.prompt.card_tables import curve_table, examples_table, metrics_table, settings_table
from softprompt.prompt.public_names import MINI, PATH_SETTINGS, hub_ids, public_name
from softprompt.utils.redact import redacted

# Settings that say where a run was computed, what it printed and where it was written, not what was learned.
NOT_SHOWN = {
    *PATH_SETTINGS,
    *("device", "print_model", "overwrite_cache", "chat_template_date"),
    *("preprocessing_num_workers", "logging_steps", "save_steps", "save_total_limit", "report_to"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says about the run, besides the adapter itself; whatever is empty is left out.

    Attributes:
        settings: The run's settings, by the names of the flags.
        metrics: The final metrics, named as in all_results.json.
        history: The records of metrics.jsonl.
        examples: Rows with answers: `question`, `expected`, `before`, `after`.
        compared: Whether an answer is right only if it equals the expected one.
        hub: Which base and rows are on the hub (see `hub_ids`); None: this is derived from the names.
        language: ISO 639-1 code of the rows' language.
        verdict: A sentence that says what the metrics mean.
        repository: The repository that the card is published in; None if it is in the adapter's folder.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    compared: bool = False
    hub: Mapping[str, str | None] | None = None
    language: str | None = None
    verdict: str | None = None
    repository: str | None = None

    @property
    def hub_ids(self) -> Mapping[str, str | None]:
        return hub_ids(self.settings) if self.hub is None else self.hub


def model_card(adapter: Adapter, facts: CardFacts) -> bytes:
    """Return the card of an adapter, in UTF-8."""
    base, template = card_base(adapter, facts), saved_template(adapter.settings)
    P, H = adapter.prompt.shape
    expected = "with the text" if _distills(facts) else "expected"
    lines = [
        front_matter(
            base.name if base.kind == "hub" else None,
            "peft",
            facts.language,
            facts.hub_ids.get("dataset"),
            results_index(facts.metrics, facts.repository, _held_out(facts)),
        ),
        f"# A soft prompt for {base.name}",
        "",
        f"{P:,} virtual tokens of size {H:,}, learned with softprompt by prompt tuning{_training(facts)}. The base is "
        "unchanged. The files are in PEFT's format.",
        "",
        *([verdict, ""] if (verdict := facts.verdict or facts.metrics.get("verdict")) else []),
        *_section("Results", metrics_table(facts.metrics)),
        *_section("Answers", examples_table(facts.examples, facts.compared, expected)),
        *_section("Training curve", curve_table(facts.history)),
        "## Use",
        "",
        *_how_to_run(base, facts.repository),
        *softprompt_code(base, template, facts.repository),
        "With PEFT, the question is written in the template of the training, which is `template` in `softprompt.json`: "
        f"`{json.dumps(adapter.settings.get('template', DEFAULT), ensure_ascii=False)}`.",
        "",
        *peft_code(base, template, facts.repository),
        *_section("Settings that differ from softprompt's defaults", settings_table(changed_settings(facts.settings))),
    ]
    return redacted("\n".join(lines)).encode()


def card_base(adapter: Adapter, facts: CardFacts) -> CardBase:
    """Return the base as a card names it."""
    name = adapter.base_model_name_or_path or "a causal language model"
    if name == MINI:
        return CardBase(name, "mini")
    known = facts.hub if facts.hub is not None else hub_ids({"model_name_or_path": name})
    on_hub = known.get("model_name_or_path")
    return CardBase(on_hub, "hub") if on_hub else CardBase(last_component(name), "local")


def last_component(name: str) -> str:
    """Return the last component of a path."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] or name


def changed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from the defaults of their preset, without those in NOT_SHOWN."""
    defaults = default_settings(settings)
    shown = {name: value for name, value in settings.items() if name not in NOT_SHOWN}
    return {name: value for name, value in shown.items() if name not in defaults or value != defaults[name]}


def _distills(facts: CardFacts) -> bool:
    return bool(facts.settings.get("distill_prompt") or facts.settings.get("distill_context"))


def _training(facts: CardFacts) -> str:
    """Return the end of a sentence, which says from which rows, in how many steps and at which learning rate the prompt
    was learned."""
    steps = max((record["step"] for record in facts.history), default=0)
    rate = facts.settings.get("learning_rate")
    parts = [f" from {rows}" if (rows := _rows(facts, "dataset")) else ""]
    parts += [", so that the base answers as with a long text" if _distills(facts) else ""]
    parts += [", starting from another prompt" if facts.settings.get("init_adapter") else ""]
    parts += [f", in {steps:,} optimizer steps" if steps else ""]
    parts += [f" at a peak learning rate of {rate:g}" if steps and rate else ""]
    return "".join(parts)


def _rows(facts: CardFacts, setting: str) -> str:
    """Return a Markdown text that names the rows of `dataset` or `eval_dataset`; empty if it is not given."""
    name = facts.settings.get(setting)
    if not name:
        return ""
    if on_hub := facts.hub_ids.get(setting):
        return f"[{on_hub}](https://huggingface.co/datasets/{on_hub})"
    return f"softprompt's task `{name}`" if is_mini_task(name) else f"the rows of `{last_component(public_name(name))}`"


def _held_out(facts: CardFacts) -> tuple[str, str | None]:
    """Return the name of the held-out rows, and their id on the hub if they have one."""
    setting = "eval_dataset" if facts.settings.get("eval_dataset") else "dataset"
    on_hub, name = facts.hub_ids.get(setting), str(facts.settings.get(setting) or "held-out rows")
    return on_hub or (name if is_mini_task(name) else last_component(name)), on_hub


def _how_to_run(base: CardBase, repository: str | None) -> list[str]:
    """Return what the code needs, as Markdown lines."""
    lines = [] if repository else ["Run this code in the folder of this file.", ""]
    if base.kind == "mini":
        lines += ["`mini` is the small Chinese base that comes with softprompt.", ""]
    if base.kind == "local" and repository:
        lines += [
            f"The base was a local folder, which is not published: write the path of your copy for `{base.name}`.",
            "",
        ]
    elif base.kind == "local":
        lines += [f"The base is a local folder, whose path is in {CONFIG_FILE}.", ""]
    return lines


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines] if lines else []
