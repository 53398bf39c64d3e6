"""The commands `infer` and `chat`: answer one question or a file of questions, evaluate adapters, or hold a
conversation.

In: the settings of infer.py. Out: answers on stdout or in a file; the names of the base and the adapters on stderr.
"""

import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from softprompt.config.adapter_specs import NONE, parse_adapter_specs
from softprompt.config.infer_config import InferConfig, has_splits
from softprompt.data.splits import find_splits
from softprompt.evaluation.comparison_report import comparison_report
from softprompt.evaluation.side_by_side import AdapterEvaluator, AdapterResult
from softprompt.evaluation.truncation import common_truncation
from softprompt.generation.adapters import LoadedAdapter, base_identity, find_adapter
from softprompt.generation.chat.commands import completions
from softprompt.generation.chat.history import HistoryFile
from softprompt.generation.chat.loop import hold_chat
from softprompt.generation.chat.session import ChatSession
from softprompt.generation.chat.terminal import open_terminal
from softprompt.generation.model import SoftPromptModel
from softprompt.generation.prompts_file import (
    PromptLine,
    answer_file,
    answerer_of,
    generation_settings,
    read_prompts,
)
from softprompt.models.capabilities import max_positions
from softprompt.runs.crash_report import crash_line, failure
from softprompt.utils.errors import AdapterError, ConfigError, DataError, PartialFailureError, SoftpromptError
from softprompt.utils.out_of_memory import is_out_of_memory
from softprompt.utils.shell_commands import command
from softprompt.utils.std_streams import tell
from softprompt.utils.translation import translate


def infer(config: InferConfig) -> None:
    """Answer the questions that `config` asks, or evaluate its adapters; without either, hold a conversation.

    Raises:
        ConfigError: Nothing is asked or evaluated, and there is no terminal for a conversation.
        SoftpromptError: An answer or an evaluation failed. Earlier answers have been printed or written, as has the
            table of the adapters that could be evaluated.
    """
    question = config.question
    if question.prompt is question.prompts_file is question.eval_dataset is None:
        if not _on_terminal():
            raise ConfigError(
                'give either --prompt "…" or --prompts_file FILE or --eval_dataset FILE; without them, infer.py chats, '
                "which needs a terminal"
            )
        return chat(config)
    lines = list(read_prompts(question.prompts_file)) if question.prompts_file is not None else []
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
    tell(model.description)
    given = {name: value for name, value in asdict(config.generation).items() if value is not None}
    session = ChatSession(model, given)
    terminal = open_terminal(partial(completions, session), HistoryFile.of_user())
    hold_chat(session, terminal, _write, config.question.stream is not False, _error_line)


def load_model(config: InferConfig, lines: Sequence[PromptLine] = ()) -> SoftPromptModel:
    """Load the base with the adapters that the command line and the lines of a prompts file name. If the command line
    names none, the default adapter is loaded, unless every line names an adapter.

    Raises:
        AdapterError: See `SoftPromptModel.from_pretrained`; or a line names an adapter that is neither a name from the
            command line nor a folder, or that is for another base.
    """
    settings, folders = config.model, parse_adapter_specs(config.model.adapter)
    named = {line.adapter: line.where for line in lines if line.adapter not in (None, NONE, *folders)}
    for name, where in named.items():
        if not Path(str(name)).is_dir():
            find_adapter({known: LoadedAdapter() for known in folders}, str(name), where)
    if not folders and lines and all(line.adapter for line in lines):
        folders = {str(name): str(name) for name in named} or {NONE: NONE}
    others = {name: value for name, value in asdict(settings).items() if name not in ("model_name_or_path", "adapter")}
    model = SoftPromptModel.from_pretrained(settings.model_name_or_path, folders or None, **others)
    for name, where in named.items():
        if name in model.adapters:
            continue
        adapter = LoadedAdapter.from_folder(str(name))
        base = adapter.base
        if settings.model_name_or_path is None and base and base_identity(base) != base_identity(model.name):
            raise AdapterError(
                f"{where}: adapter {name} is for base {base}, but {model.name} is loaded; ask the adapters of one base "
                "at a time, or give --model_name_or_path"
            )
        model.add_adapter(str(name), adapter)
    return model


def answer_prompt(config: InferConfig, model: SoftPromptModel) -> None:
    """Print the answer to --prompt, or, with --choices, the most likely choice and its probability."""
    question = config.question
    prompt, text = question.prompt or "", question.input
    row = {"prompt": prompt, "input": text} if question.ensemble else model.template.row(prompt, text)
    answerer = answerer_of(config, model)
    if question.choice_list is not None:
        (result,) = answerer.classify([row], question.choice_list, where=["--prompt"])
        tell(model.description)
        print(f"{result.label}\t{result.probability:.4f}")
        return
    given = generation_settings(config)
    single = question.ensemble or model.settings(**given).num_return_sequences == 1
    streams = sys.stdout.isatty() if question.stream is None else question.stream
    write = _write if single and streams and not question.ensemble else None
    answers = answerer.stream([row], where=["--prompt"], on_text=write, **given)
    tell(model.description)
    for answer in answers:
        print("" if write else answer if single else "\n".join(answer))


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
            tell(line)
    is_text = dataset.lower().endswith(".txt")
    cut = common_truncation(adapters, config.generation.max_length, question.truncation_side, is_text)
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
        max_positions(model.base),
    )
    results, fault = _evaluated(evaluator, model.adapters)
    model.note_foreign_rows(next(iter(results.values())).rows)
    if question.ensemble and not fault:
        name, members = translate(f"ensemble of {len(results)}"), list(results.values())
        results[name] = evaluator.evaluate_ensemble(members, question.voting)
    in_passages = is_text and config.generation.max_length is None
    told = [*cut.notes, *([f"passages of --max_length {cut.max_length} tokens"] if in_passages else [])]
    tell(model.description)
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


def _error_line(error: Exception) -> str:
    """Describe an error in one line; write the traceback of an unexpected one to a file that the line names."""
    if isinstance(error, SoftpromptError):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
        return failure(error).line
    return crash_line(error)


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _write(text: str) -> None:
    print(text, end="", flush=True)
