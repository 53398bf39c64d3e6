"""The commands `infer` and `chat`: answer one question or a file of questions, evaluate adapters, or hold a
conversation.

In: the settings of infer.py. Out: answers on stdout or in a file; the names of the base and the adapters on stderr.
"""

import hashlib
import json
import secrets
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from softprompt.api import SoftPromptModel
from softprompt.config.arg_parser import parse_setting
from softprompt.config.infer_args import InferConfig, has_splits
from softprompt.config.schema import is_text
from softprompt.config.validation import quantization_bits
from softprompt.data.dataset import load_prompts
from softprompt.data.splits import find_splits
from softprompt.evaluation.comparison_report import comparison_report
from softprompt.evaluation.side_by_side import AdapterEvaluator, AdapterResult, common_truncation
from softprompt.generation.adapters import NONE, LoadedAdapter, base_identity, find_adapter, parse_adapter_specs
from softprompt.generation.chat import Chat
from softprompt.generation.resumable_jsonl import TOKENIZER, ResumableJsonl, saved_seed
from softprompt.runs.crash_report import failure
from softprompt.utils.errors import AdapterError, ConfigError, DataError, PartialFailureError
from softprompt.utils.shell_commands import command
from softprompt.utils.std_streams import can_show
from softprompt.utils.tokenizer_fingerprint import fingerprint_of_tokenizer


class PromptLine(NamedTuple):
    """A line of a --prompts_file: its place for error messages, its columns, and the adapter that it names or None."""

    where: str
    row: dict[str, Any]
    adapter: str | None


def infer(config: InferConfig) -> None:
    """Answer the questions that `config` asks, or evaluate its adapters; without either, hold a conversation.

    Raises:
        SoftpromptError: An answer or an evaluation failed. Earlier answers have been printed or written, as has the
            table of the adapters that could be evaluated.
    """
    question = config.question
    if question.prompt is question.prompts_file is question.eval_dataset is None:
        if not _on_terminal():
            raise ConfigError(
                'give either --prompt "…" or --prompts_file FILE; without them a terminal is needed to chat'
            )
        return chat(config)
    lines = list(_read_prompts(question.prompts_file)) if question.prompts_file is not None else []
    if question.ensemble and (named := next((line for line in lines if line.adapter is not None), None)):
        raise DataError(f"{named.where}: names an adapter, but --ensemble asks all of them; leave one of the two out")
    model = load_model(config, lines)
    if question.eval_dataset is not None:
        evaluate(config, model)
    elif question.prompts_file is not None:
        answer_file(config, model, lines)
    else:
        answer_prompt(config, model)


def chat(config: InferConfig) -> None:
    """Hold a conversation on the terminal.

    Raises:
        ConfigError: Standard input or output is not a terminal.
        SoftpromptError: See `SoftPromptModel.from_pretrained`.
    """
    if not _on_terminal():
        raise ConfigError(f"a conversation needs a terminal; ask single questions with: {command('infer')} --prompt …")
    model = load_model(config)
    _tell(model.description)
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() a history and line editing)
    given = {name: value for name, value in asdict(config.generation).items() if value is not None}
    Chat(model, given, parse_setting, input, _write, config.question.stream is not False).run()


def load_model(config: InferConfig, lines: Sequence[PromptLine] = ()) -> SoftPromptModel:
    """Load the base with the adapters that the command line and the lines of a prompts file name. If the command line
    names none, the default adapter is loaded, unless every line names an adapter.

    Raises:
        AdapterError: See `SoftPromptModel.from_pretrained`; or a line names an adapter that is neither a name from the
            command line nor a folder, or that is for another base.
    """
    settings, folders = config.model, parse_adapter_specs(config.model.adapter or ())
    named = {line.adapter: line.where for line in lines if line.adapter not in (None, NONE, *folders)}
    for name, where in named.items():
        if not Path(str(name)).is_dir():
            find_adapter({known: LoadedAdapter() for known in folders}, str(name), where)
    if not folders and lines and all(line.adapter for line in lines):
        folders = {str(name): str(name) for name in named} or {NONE: NONE}
    model = SoftPromptModel.from_pretrained(
        settings.model_name_or_path,
        folders or None,
        device=settings.device,
        bf16=settings.bf16,
        fp16=settings.fp16,
        load_in_8bit=settings.load_in_8bit,
        load_in_4bit=settings.load_in_4bit,
        engine=settings.engine,
    )
    for name, where in named.items():
        if name in model.adapters:
            continue
        base = LoadedAdapter.from_folder(str(name)).base
        if settings.model_name_or_path is None and base and base_identity(base) != base_identity(model.name):
            raise AdapterError(
                f"{where}: adapter {name} is for base {base}, but {model.name} is loaded; ask the adapters of one base "
                "at a time, or give --model_name_or_path"
            )
        model.load_adapter(str(name))
    return model


def answer_prompt(config: InferConfig, model: SoftPromptModel) -> None:
    """Print the answer to --prompt, or, with --choices, the likeliest choice and its probability."""
    question = config.question
    prompt, text = question.prompt or "", question.input
    row = {"prompt": prompt, "input": text} if question.ensemble else model.template.row(prompt, text)
    answerer = _answerer(config, model)
    if question.choice_list is not None:
        (result,) = answerer.classify([row], question.choice_list, where=["--prompt"])
        _tell(model.description)
        print(f"{result.label}\t{result.probability:.4f}")
        return
    given = _generation_settings(config)
    single = question.ensemble or model.settings(**_without(given, "seed", "batch_size")).num_return_sequences == 1
    write = _write if single and _streams(config) and not question.ensemble else None
    answers = answerer.stream([row], where=["--prompt"], **({"on_text": write} if write else {}), **given)
    _tell(model.description)
    for answer in answers:
        print("" if write else answer if single else "\n".join(answer))


def answer_file(config: InferConfig, model: SoftPromptModel, lines: Sequence[PromptLine]) -> None:
    """Write one JSON line for each prompt, in the file's order: the prompt's columns, the adapter, and the answer as
    `text`. Several answers to a prompt are a list `texts`. With --choices, `text` is the likeliest choice, and
    `probability` is its probability."""
    question, given = config.question, _generation_settings(config)
    names = [line.adapter or model.active_adapter for line in lines]
    members = list(model.adapters) if question.ensemble else None
    records = [{**line.row, "adapter": members or name} for line, name in zip(lines, names, strict=True)]
    file, done = None, 0
    if question.output_file is not None:
        depends_on = {**_depends_on(config, model, set(members or names)), "seed": given["seed"]}
        file = ResumableJsonl(question.output_file, records, depends_on, question.overwrite_output_file)
        done = file.done
    answers = _answer_columns(config, model, lines, names, given, done)
    _tell(model.description)
    bar = tqdm(total=len(lines), initial=done, unit=" prompts", disable=file is None or not sys.stderr.isatty())
    with file or nullcontext(), bar:
        for record, columns in zip(records[done:], answers, strict=True):
            if file:
                file.write({**record, **columns})
            else:
                print(_json_line({**record, **columns}), flush=True)
            bar.update()
    if file:
        _tell(f"{len(lines):,} answers in {question.output_file}")


def _answerer(config: InferConfig, model: SoftPromptModel) -> Any:
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
    answerer = _answerer(config, model)
    adapter: dict[str, Any] = {} if config.question.ensemble else {"adapter": adapters}
    if choices is not None:
        results = answerer.classify(rows, choices, where=places, **adapter)
        return ({"text": result.label, "probability": result.probability} for result in results[done:])
    answers = answerer.stream(rows, where=places, skip=done, **adapter, **given)
    return ({"text" if isinstance(answer, str) else "texts": answer} for answer in answers)


def evaluate(config: InferConfig, model: SoftPromptModel) -> None:
    """Evaluate the adapters on --eval_dataset, and print their results in one table. Rows are read and truncated as in
    the adapters' training, unless flags say otherwise.

    Raises:
        PartialFailureError: Some adapters could not be evaluated; the table shows the others.
        SoftpromptError: No adapter could be evaluated; this is the error of the first one.
    """
    adapters, question, dataset = list(model.adapters.values()), config.question, str(config.question.eval_dataset)
    if has_splits(dataset):
        splits = find_splits(dataset, None)
        for line in splits.describe_split("held-out", splits.choose(question.eval_split, "--eval_split")):
            _tell(line)
    cut = common_truncation(adapters, config.generation.max_length, question.truncation_side)
    evaluator = AdapterEvaluator(
        model.engine,
        model.generator,
        model.tokenizer,
        dataset,
        cut,
        config.generation.batch_size,
        question.choice_list,
        next((each for each in adapters if each.prompt is not None), model.adapters[model.active_adapter]),
        question.column_map,
        question.eval_split,
    )
    results, fault = _evaluated(evaluator, model.adapters)
    if question.ensemble and not fault:
        results[f"ensemble of {len(results)}"] = evaluator.evaluate_ensemble(list(results.values()), question.voting)
    in_passages = dataset.lower().endswith(".txt") and config.generation.max_length is None
    told = [*cut.notes, *([f"passages of --max_length {cut.max_length} tokens"] if in_passages else [])]
    _tell(model.description)
    print(comparison_report(results, told))
    if fault:
        raise PartialFailureError(fault)


def _evaluated(
    evaluator: AdapterEvaluator, adapters: Mapping[str, LoadedAdapter]
) -> tuple[dict[str, AdapterResult], str]:
    """Return the result of each adapter that can be evaluated, and a message about the others (empty if there are
    none). If no adapter can be evaluated, raise the error of the first one."""
    results: dict[str, AdapterResult] = {}
    errors: dict[str, Exception] = {}
    for name, adapter in adapters.items():
        try:
            results[name] = evaluator(adapter)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # the frames hold tensors, and memory may have run out
            errors[name] = error
    if not errors:
        return results, ""
    name, error = next(iter(errors.items()))
    if not results:
        raise error
    failed = f"{len(errors):,} of {len(adapters):,} adapters cannot be evaluated"
    return results, f"{failed} ({name}: {failure(error).line}); the table shows the others"


def _read_prompts(source: str) -> Iterator[PromptLine]:
    for where, row in load_prompts(source):
        name = row.get("adapter")
        if name is not None and not (is_text(name) and name):
            raise DataError(f"{where}: adapter must be a folder, a name given with --adapter, or none, not {name!r}")
        yield PromptLine(where, _without(row, "adapter"), name)


def _generation_settings(config: InferConfig) -> dict[str, Any]:
    """Return the generation settings with a seed: that of --seed, else that of the output file if it is continued, else
    a random one."""
    given = asdict(config.generation)
    if given["seed"] is None:
        output = config.question.output_file
        noted = saved_seed(output) if output is not None and not config.question.overwrite_output_file else None
        given["seed"] = secrets.randbits(31) if noted is None else noted
    return given


def _depends_on(config: InferConfig, model: SoftPromptModel, names: set[str]) -> dict[str, Any]:
    """Return, as JSON-able values, everything that the answers depend on except the prompts and the seed. An output
    file is continued only if these values are unchanged; tokenizer and adapters are represented by hashes of their
    content."""
    settings = {n: v for n, v in asdict(config.generation).items() if v is not None and n not in ("seed", "batch_size")}
    if config.question.ensemble:
        settings["ensemble"] = config.question.voting or "default"
    if bits := quantization_bits(config.model.load_in_8bit, config.model.load_in_4bit):
        settings["bits"] = bits
    adapters = {name: _fingerprint(model.adapters.get(name, LoadedAdapter())) for name in sorted(names)}
    known = {"base": model.name, TOKENIZER: fingerprint_of_tokenizer(model.tokenizer), "adapters": adapters}
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


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _streams(config: InferConfig) -> bool:
    return sys.stdout.isatty() if config.question.stream is None else config.question.stream


def _tell(text: str) -> None:
    """Print on stderr, so that stdout holds only answers."""
    print(text, file=sys.stderr)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
