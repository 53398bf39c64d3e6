"""Settings of infer.py, each default in one place; validation as in config.py."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from softprompt.config.schema import build, option, setting_types, type_faults
from softprompt.config.validation import bits_faults, parse_columns, parse_labels, precision_faults, seed_faults
from softprompt.utils.errors import ConfigError

Voting = Literal["majority_vote", "mean_likelihood"]


@dataclass(frozen=True)
class QuestionArguments:
    _argument_group_name: ClassVar[str] = "what to answer"

    prompt: str | None = option(None, "The instruction, or the first column of the adapter's template.")
    input: str | None = option(
        None, "The text that the instruction is about: the article's second field, or the template's."
    )
    prompts_file: str | None = option(
        None,
        "Answer many: a .txt with one prompt a line, or a .jsonl with `prompt` (or the template's columns) and, for "
        "a line with an adapter of its own, `adapter`: a folder, a name given with --adapter, or `none`.",
    )
    output_file: str | None = option(
        None,
        "Where the answers to --prompts_file go: a .jsonl with prompt, adapter and text; the same command goes on "
        "where it stopped. (default: stdout)",
    )
    overwrite_output_file: bool = option(False, "Begin the output file anew.")
    choices: str | None = option(
        None, "Answers joined by commas, such as 正面,负面: give the likeliest and its probability."
    )
    eval_dataset: str | None = option(
        None,
        "Evaluate every --adapter, side by side, on a file of rows with answers (a dataset as train.py takes it), or "
        "on the plain text of a .txt: its perplexity in passages of --max_length tokens.",
    )
    eval_split: str | None = option(
        None, "Split of --eval_dataset. (default, where it has several: validation, else test)"
    )
    truncation_side: Literal["output", "input"] | None = option(
        None,
        "--eval_dataset: what is cut of a row that is longer than --max_length, as train.py has it. (default: as the "
        "adapter was trained, else output)",
    )
    columns: str | None = option(
        None,
        "--eval_dataset: other column names, as OURS=THEIRS pairs: instruction=question,output=answer. (default: those "
        "that the adapter was trained with, where the dataset has them)",
    )
    ensemble: bool = option(False, "All --adapter, prompts of one task, answer together: one answer to each question.")
    voting: Voting | None = option(
        None,
        "How an ensemble finds it: what most adapters answer (of several the likeliest), or what is the likeliest to "
        "all. (default: majority_vote, with --choices mean_likelihood)",
    )
    stream: bool | None = option(None, "Show the answer as it is written. (default: on a terminal)")

    @property
    def choice_list(self) -> list[str] | None:
        return None if self.choices is None else parse_labels(self.choices)

    @property
    def column_map(self) -> dict[str, str]:
        return parse_columns(self.columns)


@dataclass(frozen=True)
class AdapterArguments:
    _argument_group_name: ClassVar[str] = "model"

    adapter: list[str] | None = option(
        None,
        "Adapter folder, ours or PEFT's, or name=FOLDER; `none` is the bare base. May be given several times; the "
        "first answers where none is named. (default: the newest under runs/)",
    )
    model_name_or_path: str | None = option(None, "Base model, over the one that the adapter names.")
    device: str = option("auto", "auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:N.")
    bf16: bool | None = option(None, "bf16 autocast. (default: on CUDA where the card has it)")
    fp16: bool | None = option(None, "fp16 autocast. (default: on CUDA where the card has no bf16)")
    load_in_8bit: bool = option(
        False, "Hold the linear layers of a BLOOM's blocks in 8 bit (bitsandbytes' int8 rows); on the packed engine."
    )
    load_in_4bit: bool = option(False, "The same in 4 bit (NF4 in blocks of 64).")
    engine: Literal["auto", "packed", "padded"] = option(
        "auto", "packed is the fast one for BLOOM, padded is transformers' generate; auto: packed on the CPU."
    )


@dataclass(frozen=True)
class GenerationArguments:
    """None stands for what is saved beside the adapter, else for the article's setting."""

    _argument_group_name: ClassVar[str] = "generation"

    max_length: int | None = option(
        None,
        "Tokens of prompt and answer; virtual ones do not count. (default: 256; with --eval_dataset as the adapter was "
        "trained)",
    )
    max_new_tokens: int | None = option(None, "Tokens of the answer alone; wins over --max_length.")
    do_sample: bool | None = option(
        None, "Sample; `--do_sample false` is greedy. (default: true; the mini base: false)"
    )
    temperature: float | None = option(None, "Divides the logits before sampling. (default: 1.0)")
    top_k: int | None = option(None, "Sample from the k likeliest words, 0 from all. (default: 50)")
    top_p: float | None = option(None, "Sample from the likeliest words that make up this share. (default: 1.0)")
    min_p: float | None = option(None, "Leave out words less likely than this share of the likeliest. (default: none)")
    repetition_penalty: float | None = option(None, "Above 1: words that occurred become less likely. (default: 1.0)")
    no_repeat_ngram_size: int | None = option(None, "No run of so many tokens twice. (default: 0, not minded)")
    suppress_tokens: list[int] | None = option(None, "Token ids that are never written.")
    stop_strings: list[str] | None = option(None, "Texts that end an answer, which keeps them.")
    eos_token_id: list[int] | None = option(None, "Token ids that end an answer. (default: the tokenizer's)")
    num_return_sequences: int | None = option(None, "Answers to each prompt. (default: 1)")
    num_beams: int | None = option(None, "Beams of transformers' beam search. (default: 1, none)")
    seed: int | None = option(None, "Repeatable samples. (default: new ones each time)")
    batch_size: int = option(8, "Answers that are written together.")


INFER_GROUPS = (QuestionArguments, AdapterArguments, GenerationArguments)
# What infer.py does by default with an adapter that was trained on this base.
GENERATION_DEFAULTS: dict[str | None, dict[str, Any]] = {"mini": {"do_sample": False, "max_new_tokens": 32}}


@dataclass(frozen=True)
class InferConfig:
    question: QuestionArguments
    model: AdapterArguments
    generation: GenerationArguments


def infer_config(**given: Any) -> InferConfig:
    """Settings of infer.py from keyword arguments under the flags' names.

    Raises:
        ConfigError: as of `train_config`.
    """
    config = InferConfig(*build(INFER_GROUPS, given))
    question, model, generation = config.question, config.model, config.generation
    faults = precision_faults(model.bf16, model.fp16, model.device) + generation_faults(dataclasses.asdict(generation))
    faults += bits_faults(model.load_in_8bit, model.load_in_4bit, model.engine)
    asked = [n for n in ("prompt", "prompts_file", "eval_dataset") if getattr(question, n) is not None]
    if len(asked) > 1:
        faults.append('give either --prompt "…" or --prompts_file FILE or --eval_dataset FILE')
    if question.prompt is not None and not (question.prompt.strip() or (question.input or "").strip()):
        faults.append("--prompt is empty; write a question")
    if question.input is not None and asked != ["prompt"]:
        faults.append("--input goes with --prompt; in a --prompts_file it is a column")
    if question.output_file is not None and question.prompts_file is None:
        faults.append("--output_file goes with --prompts_file")
    if question.choices is not None and not asked:
        faults.append("--choices goes with --prompt, --prompts_file or --eval_dataset")
    if question.eval_split is not None and not has_splits(question.eval_dataset):
        faults.append("--eval_split goes with an --eval_dataset that has splits, which a .txt and mini:TASK have not")
    if question.ensemble and len(model.adapter or ()) < 2:
        faults.append("--ensemble needs two or more --adapter, prompts of one task")
    if question.ensemble and not asked:
        faults.append("--ensemble goes with --prompt, --prompts_file or --eval_dataset")
    faults += _rows_faults(question)
    if question.voting is not None and not question.ensemble:
        faults.append("--voting goes with --ensemble")
    if faults:
        raise ConfigError("; ".join(faults))
    return config


def has_splits(dataset: str | None) -> bool:
    """Whether what is named can have splits: a plain text and a mini task have none."""
    return dataset is not None and not dataset.lower().endswith(".txt") and not dataset.startswith("mini:")


def _rows_faults(question: QuestionArguments) -> list[str]:
    """What is wrong with the settings of how the rows of --eval_dataset are read."""
    given = [name for name in ("truncation_side", "columns") if getattr(question, name) is not None]
    if given and question.eval_dataset is None:
        return [f"--{name} goes with --eval_dataset" for name in given]
    if given and question.eval_dataset is not None and question.eval_dataset.lower().endswith(".txt"):
        return [f"--{name} is for rows, and {question.eval_dataset} is a plain text; leave it out" for name in given]
    try:
        parse_columns(question.columns)
    except ConfigError as error:
        return [str(error)]
    return []


def generation_faults(values: dict[str, Any]) -> list[str]:
    """What is of a wrong type or out of range among generation settings; None is never."""
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
            faults.append(f"--{name} {given[name]} is below 0.001; `--do_sample false` takes the likeliest word")
    if not 0 < given.get("top_p", 1) <= 1:
        faults.append(f"--top_p {given['top_p']} must lie above 0 and not above 1")
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
        faults.append(f"--num_return_sequences {samples} needs --do_sample or --num_beams; greedy answers are alike")
    return faults


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
