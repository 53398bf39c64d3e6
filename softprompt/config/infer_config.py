"""The settings of one call of `infer` or `chat`, and their validation. Each fault is a message that names the flag and
says what to do instead."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from softprompt.config.data_args import is_mini_task
from softprompt.config.infer_args import INFER_GROUPS, AdapterArguments, GenerationArguments, QuestionArguments
from softprompt.config.schema import build, setting_types, type_faults
from softprompt.config.validation import precision_faults, quantization_faults, seed_faults
from softprompt.config.value_parsers import parse_columns
from softprompt.utils.errors import ConfigError


@dataclass(frozen=True)
class InferConfig:
    """The settings of one call of `infer` or `chat`."""

    question: QuestionArguments
    model: AdapterArguments
    generation: GenerationArguments


def infer_config(**given: Any) -> InferConfig:
    """Return validated settings of inference from keyword arguments with the names of the flags.

    Raises:
        ConfigError: An unknown setting, a value of a wrong type or out of range, or settings that contradict each
            other; the message names all of them.
    """
    config = InferConfig(*build(INFER_GROUPS, given))
    model = config.model
    faults = precision_faults(model.bf16, model.fp16, model.device)
    faults += generation_faults(dataclasses.asdict(config.generation))
    faults += quantization_faults(model.load_in_8bit, model.load_in_4bit)
    faults += _question_faults(config.question, len(model.adapter or ()))
    if faults:
        raise ConfigError("; ".join(faults))
    return config


def _question_faults(question: QuestionArguments, adapters: int) -> list[str]:
    """Return the contradictions among the settings of a question to this number of adapters."""
    asked = [n for n in ("prompt", "prompts_file", "eval_dataset") if getattr(question, n) is not None]
    faults = []
    if len(asked) > 1:
        faults.append('give either --prompt "…" or --prompts_file FILE or --eval_dataset FILE, not several of them')
    if question.prompt is not None and not (question.prompt.strip() or (question.input or "").strip()):
        faults.append("--prompt is empty; write a question")
    if question.input is not None and asked != ["prompt"]:
        faults.append("--input goes with --prompt; in a --prompts_file it is a column")
    if question.output_file is not None and question.prompts_file is None:
        faults.append("--output_file goes with --prompts_file")
    if question.choices is not None and not asked:
        faults.append("--choices goes with --prompt, --prompts_file or --eval_dataset")
    if question.eval_split is not None and not has_splits(question.eval_dataset):
        faults.append("--eval_split goes with an --eval_dataset that has splits, unlike a .txt and mini:TASK")
    if question.ensemble and adapters < 2:
        faults.append("--ensemble needs two or more --adapter, which must be prompts of one task")
    if question.ensemble and not asked:
        faults.append("--ensemble goes with --prompt, --prompts_file or --eval_dataset")
    if question.voting is not None and not question.ensemble:
        faults.append("--voting goes with --ensemble")
    return faults + _rows_faults(question)


def has_splits(dataset: str | None) -> bool:
    """Return whether a dataset can have splits, which a .txt and a mini task do not."""
    return dataset is not None and not dataset.lower().endswith(".txt") and not is_mini_task(dataset)


def _rows_faults(question: QuestionArguments) -> list[str]:
    """Return the faults of the settings that say how the rows of --eval_dataset are read."""
    given = [name for name in ("truncation_side", "columns") if getattr(question, name) is not None]
    if given and question.eval_dataset is None:
        return [f"--{name} goes with --eval_dataset" for name in given]
    if given and question.eval_dataset is not None and question.eval_dataset.lower().endswith(".txt"):
        return [f"--{name} is for rows, but {question.eval_dataset} is a plain text; leave it out" for name in given]
    try:
        parse_columns(question.columns)
    except ConfigError as error:
        return [str(error)]
    return []


def generation_faults(values: dict[str, Any]) -> list[str]:
    """Return the faults of generation settings: wrong types, values out of range. None is always allowed."""
    limits = {"max_length": 1, "max_new_tokens": 1, "top_k": 0, "batch_size": 1, "no_repeat_ngram_size": 0}
    limits |= {"num_return_sequences": 1, "num_beams": 1}
    given = {name: value for name, value in values.items() if value is not None}
    if faults := type_faults(given, setting_types([GenerationArguments])):
        return faults
    faults = seed_faults(given.get("seed", 0))
    faults += [
        f"--{name} {given[name]} must be at least {low}" for name, low in limits.items() if given.get(name, low) < low
    ]
    for name in ("temperature", "repetition_penalty"):
        if not given.get(name, 1) > 0:
            faults.append(f"--{name} {given[name]} must be above 0")
        elif given.get(name, 1) < 1e-3:
            faults.append(f"--{name} {given[name]} is below 0.001; `--do_sample false` takes the most likely token")
    if not 0 < given.get("top_p", 1) <= 1:
        faults.append(f"--top_p {given['top_p']} must lie above 0 and must not exceed 1")
    if not 0 <= given.get("min_p", 0) <= 1:
        faults.append(f"--min_p {given['min_p']} must lie between 0 and 1")
    for name in ("suppress_tokens", "eos_token_id"):
        if any(token < 0 for token in _listed(given.get(name, []))):
            faults.append(f"--{name} {given[name]} must be token ids, which are 0 or more")
    if any(not text for text in _listed(given.get("stop_strings", []))):
        faults.append("--stop_strings holds an empty text, which would end every answer at once")
    samples, beams = given.get("num_return_sequences", 1), given.get("num_beams", 1)
    if 1 < beams < samples:
        faults.append(f"--num_return_sequences {samples} is above --num_beams {beams}; each beam finds one answer")
    if samples > 1 and beams == 1 and given.get("do_sample") is False:
        faults.append(
            f"--num_return_sequences {samples} needs --do_sample or --num_beams; greedy answers are identical"
        )
    return faults


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
