"""The house stands as it was drawn: which module may import which, and how large the entrances are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "softprompt"

# Each module and what it may import of ours; one way for data to flow, no going back.
MAY_IMPORT = {
    "redact": set(),
    "errors": {"redact"},
    "hub": {"redact"},
    "fields": {"errors"},
    "stopping": {"errors"},
    "arguments": {"fields"},
    "intervals": set(),
    "unwatched": {"distributed", "trainer"},
    "adapter_folder": {"card", "checkpoint", "config", "infer_config"},
    "faults": {"arguments", "errors", "sharing_config", "stopping"},
    "config": {"arguments", "errors", "faults", "fields", "redact", "sharing_config"},
    "sharing_config": {"fields"},
    "report_config": {"errors", "fields"},
    "infer_config": {"errors", "faults", "fields"},
    "export_config": {"errors", "fields"},
    "template": {"errors"},
    "chat_template": {"errors", "template"},
    "readers": {"errors", "hub"},
    "rows": {"errors", "fields", "readers", "template"},
    "sources": {"errors", "fingerprints", "readers"},
    "shuffle": set(),
    "feed": {"arguments", "batching", "data"},
    "row_stream": {"arguments", "data", "errors", "feed", "shuffle", "sources"},
    "intake": {
        *(
            "config",
            "data",
            "errors",
            "feed",
            "fingerprints",
            "mini",
            "row_stream",
            "rows",
            "sources",
            "template",
            "token_cache",
            "torchrun",
        ),
    },
    "data": {"errors", "template"},
    "batching": {"data"},
    "prompt": {"errors"},
    "vocabulary": {"errors"},
    "loss": set(),
    "files": {"errors"},
    "lock": {"errors"},
    "best": {"arguments"},
    "determinism": set(),
    "fingerprints": {"files", "rows", "stored"},
    "crash": {"redact", "resume"},
    "token_cache": {"data", "files"},
    "weights": set(),
    "memory": {"errors", "weights"},
    "attention": set(),
    "products": set(),
    "bloom": {"attention", "batching", "loss", "products", "weights"},
    "packed": {"batching", "bloom", "data", "errors", "loss", "memory", "prompt", "weights"},
    "stored": {"errors"},
    "hollow": {"errors", "hub", "model", "stored", "weights"},
    "streamed": {"stored", "weights"},
    "sharded": {"distributed", "stored", "weights"},
    "quantised": {"errors", "model", "weights"},
    "borders": {"errors"},
    "layerwise": {"attention", "batching", "bloom", "borders", "loss", "memory", "weights"},
    "requests": {"errors"},
    "sampling": {"requests"},
    "places": {"attention", "bloom", "sampling", "weights"},
    "decode": {"bloom", "memory", "places", "products", "requests", "sampling", "weights"},
    "engines": {
        *("config", "decode", "errors", "generate", "layerwise", "memory", "model", "packed", "quantised"),
        *("sharded", "stored", "streamed", "weights"),
    },
    "model": {"batching", "data", "errors", "hub", "loss", "prompt"},
    "adapter_kinds": {"errors"},
    "checkpoint": {"adapter_kinds", "errors", "fields", "files"},
    "generate": {"memory", "model", "requests", "sampling"},
    "answering": {"generate", "requests", "streaming"},
    "passages": {"data", "errors", "readers"},
    "confusion": {"scores", "tables"},
    "ensemble": {"adapters", "errors", "infer_config", "questions", "scores"},
    "joint": {"data", "ensemble", "evaluate", "infer_config", "model", "rows", "scores", "template"},
    "plain": {"batching", "errors", "model"},
    "evaluate": {"data", "generate", "model", "requests"},
    "scores": {"data", "errors", "model", "template"},
    "questions": {"errors", "fields", "infer_config", "requests", "rows", "template"},
    "streaming": set(),
    "answers_file": {"errors", "files"},
    "adapters": {"build", "checkpoint", "errors", "fields", "questions", "rows", "template"},
    "chat": {"adapters", "errors"},
    "compare": {
        *("adapters", "confusion", "data", "ensemble", "errors", "evaluate", "generate", "infer_config", "joint"),
        *("mini", "model", "passages", "rows", "scores", "tables", "template"),
    },
    "tables": set(),
    "trainer": {"arguments", "data", "errors", "feed", "model", "prompt"},
    "heartbeat": {"errors", "redact"},
    "torchrun": set(),
    "meeting": set(),
    "restart": {"arguments", "config", "errors", "resume", "torchrun"},
    "distributed": {"errors", "heartbeat", "meeting", "memory"},
    "shared": {"data", "distributed", "generate", "model", "prompt", "requests", "sampling", "stopping"},
    "find_rate": {"arguments", "data", "distributed", "errors", "feed", "model", "prompt", "trainer", "unwatched"},
    "announce": {"config", "data", "faults", "feed", "find_rate", "model", "rows", "trainer"},
    "resume": {"arguments", "checkpoint", "config", "errors", "files", "torchrun", "trainer"},
    "card": {"checkpoint", "redact"},
    "plot": {"trainer"},
    "board": {"errors", "redact", "trainer"},
    "progress": {"board", "files", "redact", "resume", "trainer"},
    "nearest": set(),
    "record": {"checkpoint", "errors", "files", "lock", "resume", "trainer"},
    "facts": {"checkpoint", "data", "evaluate", "generate", "nearest", "prepare", "record", "requests"},
    "so_far": {"build", "checkpoint", "errors", "facts", "model", "nearest", "record", "stored"},
    "pictures": set(),
    "page": {"arguments", "config", "errors", "pictures", "record", "redact"},
    "push": {"checkpoint", "errors", "hub", "redact", "report_config", "sharing_config"},
    "ending": {
        *("checkpoint", "engines", "errors", "evaluate", "facts", "files", "generate", "nearest", "page", "pictures"),
        *("plot", "prepare", "push", "record", "report_config", "shared"),
    },
    "build": {
        *("arguments", "checkpoint", "config", "errors", "faults", "files", "lock", "mini", "model"),
        *("prompt", "vocabulary"),
    },
}
MAY_IMPORT |= {  # a study is a grid of runs, made of a run's parts
    "grid": {"arguments", "config", "errors", "faults", "fields", "infer_config"},
    "points": set(),
    "claims": {"arguments", "intervals", "points"},
    "charts": {"points"},
    "study_page": {"claims", "points"},
    "study_plan": {
        *("arguments", "build", "data", "engines", "errors", "feed", "fingerprints", "grid", "intake", "model"),
        "rows",
    },
    "cells": {
        *("adapter_folder", "arguments", "build", "checkpoint", "data", "determinism", "engines", "points"),
        *(
            "errors",
            "evaluate",
            "feed",
            "files",
            "intake",
            "joint",
            "model",
            "prompt",
            "resume",
            "stopping",
            "study_plan",
        ),
        *("trainer", "unwatched"),
    },
}
MAY_IMPORT["export"] = {  # an entrance, too, but one that knows nothing of training
    "build",
    "card",
    "chat_template",
    "checkpoint",
    "cli",
    "errors",
    "export_config",
    "files",
    "infer_config",
    "model",
    "plain",
    "requests",
    "template",
}
ENTRANCES = {"cli", "api", "inference", "run", "summary", "export", "report", "study"}
NO_TORCH = {
    "arguments",
    "faults",
    "intervals",
    "torchrun",
    "token_cache",
    "vocabulary",
    "errors",
    "fields",
    "config",
    "infer_config",
    "export_config",
    "report_config",
    "sharing_config",
    "template",
    "chat_template",
    "readers",
    "rows",
    "shuffle",
    "data",
    "grid",
    "points",
    "claims",
    "charts",
    "study_page",
    "cli",
    "mini",
}


def modules() -> dict[str, list[Path]]:
    found = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    return found | {"mini": sorted((PACKAGE / "mini").glob("*.py"))}


def imported(path: Path, at_top: bool = False) -> set[str]:
    """Modules that a file imports, as dotted names; only those of its top level if asked."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    return {n.split(".")[1] for n in imported(path) if n.startswith("softprompt.")} & set(modules())


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_follow_the_table(name):
    for path in modules()[name]:
        assert ours(path) - {name} <= MAY_IMPORT[name]


def test_nothing_that_the_others_stand_on_knows_the_entrances():
    for name, paths in modules().items():
        if name not in {*ENTRANCES, "recorder", "dry_run"}:
            assert not ENTRANCES & set().union(*map(ours, paths)), name


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_what_needs_no_torch_does_not_wait_for_it(name):
    for path in modules()[name]:
        if path.stem != "make":
            assert not {n for n in imported(path, at_top=True) if n.split(".")[0] == "torch"}


def test_peft_is_not_used():
    for paths in modules().values():
        for path in paths:
            assert not {n for n in imported(path) if n.split(".")[0] in ("peft", "accelerate", "pickle")}


@pytest.mark.parametrize("name", ["train.py", "infer.py"])
def test_entrances_only_wire(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 60
