"""Answer the questions of a --prompts_file, one JSON line for each, on stdout or in a file that can be continued."""

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple

from softprompt.config.infer_config import InferConfig
from softprompt.config.schema import is_text
from softprompt.config.validation import quantization_bits
from softprompt.data.dataset import load_prompts
from softprompt.generation.adapters import LoadedAdapter
from softprompt.generation.model import SoftPromptModel
from softprompt.generation.resumable_jsonl import DTYPE, TOKENIZER, ResumableJsonl, saved_seed
from softprompt.utils.errors import DataError
from softprompt.utils.progress import progress_bar, shows_bars
from softprompt.utils.std_streams import can_show, tell
from softprompt.utils.tokenizer_fingerprint import fingerprint_of_tokenizer


class PromptLine(NamedTuple):
    """A line of a --prompts_file: its place for error messages, its columns, and the adapter that it names or None."""

    where: str
    row: dict[str, Any]
    adapter: str | None


def read_prompts(source: str) -> Iterator[PromptLine]:
    """Yield the lines of a --prompts_file.

    Raises:
        DataError: See `dataset.load_prompts`; or a line's `adapter` is not a text, or is empty.
    """
    for where, row in load_prompts(source):
        name = row.get("adapter")
        if name is not None and not (is_text(name) and name):
            raise DataError(f"{where}: adapter must be a folder, a name given with --adapter, or none, not {name!r}")
        yield PromptLine(where, {column: value for column, value in row.items() if column != "adapter"}, name)


def answer_file(config: InferConfig, model: SoftPromptModel, lines: Sequence[PromptLine]) -> None:
    """Write one JSON line for each prompt, in the file's order: the prompt's columns, the adapter, and the answer as
    `text`. Several answers to a prompt are a list `texts`. With --choices, `text` is the most likely choice, and
    `probability` is its probability."""
    question, given = config.question, generation_settings(config)
    names = [line.adapter or model.active_adapter for line in lines]
    members = list(model.adapters) if question.ensemble else None
    records = [{**line.row, "adapter": members or name} for line, name in zip(lines, names, strict=True)]
    file, done = None, 0
    if question.output_file is not None:
        depends_on = {**_depends_on(config, model, set(members or names)), "seed": given["seed"]}
        file = ResumableJsonl(question.output_file, records, depends_on, question.overwrite_output_file)
        done = file.done
    answers = _answer_columns(config, model, lines, names, given, done)
    tell(model.description)
    hidden = file is None or not shows_bars()  # the answers themselves show the progress
    bar = progress_bar(len(lines), "answering", " prompts", initial=done, leave=True, disable=hidden)
    with file or nullcontext(), bar:
        for record, columns in zip(records[done:], answers, strict=True):
            if file:
                file.write({**record, **columns})
            else:
                print(_json_line({**record, **columns}), flush=True)
            bar.update()
    if file:
        tell(f"{len(lines):,} answers in {question.output_file}")


def answerer_of(config: InferConfig, model: SoftPromptModel) -> Any:
    """Return the object whose `stream` and `classify` answer: the model, or, with --ensemble, the ensemble of all its
    adapters."""
    return model.ensemble(voting=config.question.voting) if config.question.ensemble else model


def _answer_columns(
    config: InferConfig,
    model: SoftPromptModel,
    lines: Sequence[PromptLine],
    adapters: Sequence[str],
    given: Mapping[str, Any],
    done: int,
) -> Iterator[dict[str, Any]]:
    """Return an iterator over the answers to all lines but the first `done`, each as columns of the output. All lines
    are checked before the first one is answered."""
    rows, places, choices = [line.row for line in lines], [line.where for line in lines], config.question.choice_list
    answerer = answerer_of(config, model)
    adapter: dict[str, Any] = {} if config.question.ensemble else {"adapter": adapters}
    if choices is not None:
        results = answerer.classify(rows, choices, where=places, **adapter)
        return ({"text": result.label, "probability": result.probability} for result in results[done:])
    answers = answerer.stream(rows, where=places, skip=done, **adapter, **given)
    return ({"text" if isinstance(answer, str) else "texts": answer} for answer in answers)


def generation_settings(config: InferConfig) -> dict[str, Any]:
    """Return the generation settings with a seed: that of --seed, else that of the output file if it is continued, else
    a random one."""
    given = asdict(config.generation)
    if given["seed"] is None:
        output = config.question.output_file
        noted = saved_seed(output) if output is not None and not config.question.overwrite_output_file else None
        given["seed"] = secrets.randbits(31) if noted is None else noted
    return given


def _depends_on(config: InferConfig, model: SoftPromptModel, names: set[str]) -> dict[str, Any]:
    """Return, as JSON types, everything that the answers depend on except the prompts and the seed. An output file is
    continued only if these values are unchanged; tokenizer and adapters are represented by hashes of their content."""
    settings = {n: v for n, v in asdict(config.generation).items() if v is not None and n not in ("seed", "batch_size")}
    if config.question.ensemble:
        settings["ensemble"] = config.question.voting or "default"
    if bits := quantization_bits(config.model.load_in_8bit, config.model.load_in_4bit):
        settings["bits"] = bits
    adapters = {name: _fingerprint(model.adapters.get(name, LoadedAdapter())) for name in sorted(names)}
    known = {"base": model.name, TOKENIZER: fingerprint_of_tokenizer(model.tokenizer), "adapters": adapters}
    known[DTYPE] = str(model.compute_dtype)
    return {**known, "choices": config.question.choices, **settings}


def _fingerprint(adapter: LoadedAdapter) -> str:
    values = b"" if adapter.prompt is None else adapter.prompt.cpu().numpy().tobytes()
    rest = json.dumps([adapter.template.spec, dict(adapter.generation)], sort_keys=True).encode()
    return hashlib.blake2b(values + rest, digest_size=16).hexdigest()


def _json_line(columns: Mapping[str, Any]) -> str:
    """Return the columns as one line of JSON. Non-ASCII characters are escaped if stdout's encoding lacks one of
    them."""
    line = json.dumps(columns, ensure_ascii=False)
    return line if can_show(line) else json.dumps(columns)
