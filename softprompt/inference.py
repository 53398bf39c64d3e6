"""What `infer.py` does with its settings: one question, a file of them, a file to evaluate on, or a conversation."""

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
from softprompt.config.validation import bits_of
from softprompt.data.dataset import load_prompts
from softprompt.data.splits import find_splits
from softprompt.evaluation.side_by_side import AdapterEvaluator, AdapterResult, common_cut, report
from softprompt.generation.adapters import NONE, LoadedAdapter, base_identity, find_adapter, parse_adapter_specs
from softprompt.generation.adapters import load as read_adapter
from softprompt.generation.chat import Chat
from softprompt.generation.resumable_jsonl import TOKENIZER, ResumableJsonl, noted_seed
from softprompt.runs.crash_report import failure
from softprompt.utils.errors import AdapterError, ConfigError, DataError, SomeFailed
from softprompt.utils.std_streams import can_show
from softprompt.utils.tokenizer_fingerprint import fingerprint_of_tokenizer


class Asked(NamedTuple):
    """A line of a prompts file: where it stands, its columns, and the adapter that it names, if it does."""

    where: str
    row: dict[str, Any]
    adapter: str | None


def infer(config: InferConfig) -> None:
    """Raises SoftpromptError for anything in the way; answers that are finished by then stay, and so does the table of
    the adapters that could be evaluated."""
    question = config.question
    to_chat = question.prompt is question.prompts_file is question.eval_dataset is None
    if to_chat and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError('give either --prompt "…" or --prompts_file FILE; without them a terminal is needed to chat')
    asked = list(_asked(question.prompts_file)) if question.prompts_file is not None else []
    if question.ensemble and (named_one := next((line for line in asked if line.adapter is not None), None)):
        raise DataError(f"{named_one.where}: names an adapter, and --ensemble asks all of them; leave one of both out")
    model = load(config, asked)
    if question.eval_dataset is not None:
        table, fault = evaluate(config, model)
        _tell(model.description)
        print(table)
        if fault:
            raise SomeFailed(fault)
    elif asked:
        answer_file(config, model, asked)
    elif to_chat:
        _tell(model.description)
        chat(config, model)
    else:
        answer_one(config, model)


def load(config: InferConfig, asked: Sequence[Asked]) -> SoftPromptModel:
    """The base with the adapters of the command line and of the file's lines; where every line names one, no other is
    looked for.

    Raises:
        AdapterError: as of `SoftPromptModel.from_pretrained`, or a line's adapter that is neither known nor a folder,
            or is for another base than the one that is taken.
    """
    where, folders = config.model, parse_adapter_specs(config.model.adapter or ())
    wanted = {line.adapter: line.where for line in asked if line.adapter not in (None, NONE, *folders)}
    for name, at in wanted.items():
        if not Path(str(name)).is_dir():
            find_adapter({known: LoadedAdapter() for known in folders}, str(name), at)
    if not folders and asked and all(line.adapter for line in asked):
        folders = {str(name): str(name) for name in wanted} or {NONE: NONE}
    model = SoftPromptModel.from_pretrained(
        where.model_name_or_path,
        folders or None,
        device=where.device,
        bf16=where.bf16,
        fp16=where.fp16,
        load_in_8bit=where.load_in_8bit,
        load_in_4bit=where.load_in_4bit,
        engine=where.engine,
    )
    for name, at in wanted.items():
        if name in model.adapters:
            continue
        base = read_adapter(str(name)).base
        if where.model_name_or_path is None and base and base_identity(base) != base_identity(model.name):
            raise AdapterError(
                f"{at}: adapter {name} is for {base}, and this is {model.name}; ask those of one base at a time, or "
                "give --model_name_or_path"
            )
        model.load_adapter(str(name))
    return model


def answerer(config: InferConfig, model: SoftPromptModel) -> Any:
    """What answers: the model, or all of its adapters as one."""
    return model.ensemble(voting=config.question.voting) if config.question.ensemble else model


def answer_one(config: InferConfig, model: SoftPromptModel) -> None:
    question = config.question
    prompt, about = question.prompt or "", question.input
    row = {"prompt": prompt, "input": about} if question.ensemble else model.template.row(prompt, about)
    asked = answerer(config, model)
    if question.choice_list is not None:
        (verdict,) = asked.classify([row], question.choice_list, where=["--prompt"])
        _tell(model.description)
        print(f"{verdict.label}\t{verdict.probability:.4f}")
        return
    given = _settings(config)
    single = question.ensemble or model.settings(**_without(given, "seed", "batch_size")).num_return_sequences == 1
    write = _write if single and _streams(config) and not question.ensemble else None
    answers = asked.stream([row], where=["--prompt"], **({"on_text": write} if write else {}), **given)
    _tell(model.description)
    for answer in answers:
        print("" if write else answer if single else "\n".join(answer))


def answer_file(config: InferConfig, model: SoftPromptModel, asked: Sequence[Asked]) -> None:
    """One line for each prompt, in the file's order: its columns, its adapter, and `text` (`texts` where several are
    asked for; the label and its `probability` with --choices)."""
    question, given = config.question, _settings(config)
    names = [line.adapter or model.active_adapter for line in asked]
    all_of_them = list(model.adapters) if question.ensemble else None
    lines = [{**line.row, "adapter": all_of_them or name} for line, name in zip(asked, names, strict=True)]
    file, done = None, 0
    if question.output_file is not None:
        depends_on = {**_depends_on(config, model, set(all_of_them or names)), "seed": given["seed"]}
        file = ResumableJsonl(question.output_file, lines, depends_on, question.overwrite_output_file)
        done = file.done
    found = _found(config, model, asked, names, given, done)
    _tell(model.description)
    bar = tqdm(total=len(lines), initial=done, unit=" prompts", disable=file is None or not sys.stderr.isatty())
    with file or nullcontext(), bar:
        for line, columns in zip(lines[done:], found, strict=True):
            if file:
                file.write({**line, **columns})
            else:
                print(_json_line({**line, **columns}), flush=True)
            bar.update()
    if file:
        _tell(f"{len(lines):,} answers in {question.output_file}")


def _found(
    config: InferConfig,
    model: SoftPromptModel,
    asked: Sequence[Asked],
    names: Sequence[str],
    given: Mapping[str, Any],
    done: int,
) -> Iterator[dict[str, Any]]:
    """What answers add to the lines that are not done; all questions are checked before the first answer."""
    rows, places, choices = [line.row for line in asked], [line.where for line in asked], config.question.choice_list
    of_each: dict[str, Any] = {} if config.question.ensemble else {"adapter": names}
    if choices is not None:
        verdicts = answerer(config, model).classify(rows, choices, where=places, **of_each)
        return ({"text": v.label, "probability": v.probability} for v in verdicts[done:])
    answers = answerer(config, model).stream(rows, where=places, skip=done, **of_each, **given)
    return ({"text" if isinstance(answer, str) else "texts": answer} for answer in answers)


def evaluate(config: InferConfig, model: SoftPromptModel) -> tuple[str, str]:
    """The table of those adapters that can be evaluated, side by side, and what is wrong with the others, if there are
    any. Rows are read and cut as in the adapters' training, unless flags say otherwise."""
    tuned, question, dataset = list(model.adapters.values()), config.question, str(config.question.eval_dataset)
    if has_splits(dataset):
        splits = find_splits(dataset, None)
        for line in splits.describe_split("held-out", splits.choose(question.eval_split, "--eval_split")):
            _tell(line)
    cut = common_cut(tuned, config.generation.max_length, question.truncation_side)
    judge = AdapterEvaluator(
        model.engine,
        model.generator,
        model.tokenizer,
        dataset,
        cut,
        config.generation.batch_size,
        question.choice_list,
        next((each for each in tuned if each.prompt is not None), model.adapters[model.active_adapter]),
        question.column_map,
        question.eval_split,
    )
    found, fault = _judged(judge, model.adapters)
    if question.ensemble and not fault:
        found[f"ensemble of {len(found)}"] = judge.together(list(found.values()), question.voting)
    passages = dataset.lower().endswith(".txt") and config.generation.max_length is None
    told = [*cut.told, *([f"passages of --max_length {cut.max_length} tokens"] if passages else [])]
    return report(found, told), fault


def _judged(judge: AdapterEvaluator, adapters: Mapping[str, LoadedAdapter]) -> tuple[dict[str, AdapterResult], str]:
    """What was found of each adapter, and what is wrong with those of which nothing could be found. Raises the error of
    the first where that is so of all of them."""
    found: dict[str, AdapterResult] = {}
    errors: dict[str, Exception] = {}
    for name, each in adapters.items():
        try:
            found[name] = judge(each)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # which hold tensors, and memory may have run out
            errors[name] = error
    if not errors:
        return found, ""
    name, error = next(iter(errors.items()))
    if not found:
        raise error
    told = f"{len(errors):,} of {len(adapters):,} adapters cannot be evaluated"
    return found, f"{told} ({name}: {failure(error).line}); the table has the others"


def chat(config: InferConfig, model: SoftPromptModel) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401 (input() then has history and editing)
    given = {name: value for name, value in asdict(config.generation).items() if value is not None}
    Chat(model, given, parse_setting, input, _write, config.question.stream is not False).run()


def _asked(source: str) -> Iterator[Asked]:
    for where, row in load_prompts(source):
        name = row.get("adapter")
        if name is not None and not (is_text(name) and name):
            raise DataError(f"{where}: adapter must be a folder, a name given with --adapter, or none, not {name!r}")
        yield Asked(where, _without(row, "adapter"), name)


def _settings(config: InferConfig) -> dict[str, Any]:
    """Of generation, as flags have them; without --seed an output file goes on with its own, else one is drawn."""
    given = asdict(config.generation)
    if given["seed"] is None:
        output = config.question.output_file
        kept = noted_seed(output) if output is not None and not config.question.overwrite_output_file else None
        given["seed"] = secrets.randbits(31) if kept is None else kept
    return given


def _depends_on(config: InferConfig, model: SoftPromptModel, names: set[str]) -> dict[str, Any]:
    """What answers depend on beside the prompts and the seed, JSON-able; tokenizer and adapters by content."""
    settings = {n: v for n, v in asdict(config.generation).items() if v is not None and n not in ("seed", "batch_size")}
    if config.question.ensemble:
        settings["ensemble"] = config.question.voting or "default"
    if bits := bits_of(config.model.load_in_8bit, config.model.load_in_4bit):
        settings["bits"] = bits
    adapters = {name: _fingerprint(model.adapters.get(name, LoadedAdapter())) for name in sorted(names)}
    known = {"base": model.name, TOKENIZER: fingerprint_of_tokenizer(model.tokenizer), "adapters": adapters}
    return {**known, "choices": config.question.choices, **settings}


def _fingerprint(tuned: LoadedAdapter) -> str:
    values = b"" if tuned.prompt is None else tuned.prompt.cpu().numpy().tobytes()
    rest = json.dumps([tuned.template.spec, dict(tuned.generation)], sort_keys=True).encode()
    return hashlib.blake2b(values + rest, digest_size=16).hexdigest()


def _json_line(columns: Mapping[str, Any]) -> str:
    """Whatever stdout's encoding is, the line is JSON: what it lacks is written as JSON's own escapes."""
    line = json.dumps(columns, ensure_ascii=False)
    return line if can_show(line) else json.dumps(columns)


def _streams(config: InferConfig) -> bool:
    return sys.stdout.isatty() if config.question.stream is None else config.question.stream


def _tell(text: str) -> None:
    """Beside the answers."""
    print(text, file=sys.stderr)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
