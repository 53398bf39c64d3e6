"""Settings of inference: one frozen dataclass per group of `--help`, and their validation."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from softprompt.config.schema import build, option, same_option, setting_types, type_faults
from softprompt.config.train_args import ModelArguments
from softprompt.config.validation import precision_faults, quantization_faults, seed_faults
from softprompt.config.value_parsers import parse_columns, parse_labels
from softprompt.utils.errors import ConfigError

Voting = Literal["majority_vote", "mean_likelihood"]


@dataclass(frozen=True)
class QuestionArguments:
    _argument_group_name: ClassVar[str] = "what to answer"

    prompt: str | None = option(
        None,
        "Answer this question: the instruction, or the first column of the adapter's template. (default: none; without "
        "--prompts_file and --eval_dataset a conversation starts on the terminal)",
    )
    input: str | None = option(
        None, "Add this text that the --prompt is about, the second column of the template. (default: none)"
    )
    prompts_file: str | None = option(
        None,
        "Answer each line of this file: a .txt with one prompt per line, or a .jsonl with `prompt` or the template's "
        "columns. In a .jsonl, `adapter` may name the adapter of a line: a folder, a name given with --adapter, or "
        "`none`. (default: none)",
    )
    output_file: str | None = option(
        None,
        "Write the answers to --prompts_file into this .jsonl, each line with prompt, adapter and text. After an "
        "interruption the same command continues it. (default: print them)",
    )
    overwrite_output_file: bool = option(False, "Replace an existing --output_file instead of continuing it.")
    choices: str | None = option(
        None,
        "Choose among these comma-separated answers, such as 正面,负面, and print the likeliest with its probability. "
        "(default: generate the answer)",
    )
    eval_dataset: str | None = option(
        None,
        "Evaluate every --adapter, side by side, on rows with answers (any --dataset of train.py), or on the plain "
        "text of a .txt, by its perplexity in passages of --max_length tokens. (default: none)",
    )
    eval_split: str | None = option(
        None, "Take this split of --eval_dataset. (default: of several splits validation, else test)"
    )
    truncation_side: Literal["output", "input"] | None = option(
        None,
        "Truncate rows of --eval_dataset longer than --max_length at the end of their answer (output), or within their "
        "input. (default: as the adapter was trained, else output)",
    )
    columns: str | None = option(
        None,
        "Read columns of --eval_dataset that have other names, as OURS=THEIRS pairs such as "
        "instruction=question,output=answer. (default: as the adapter was trained, if the dataset has those columns)",
    )
    ensemble: bool = option(False, "Combine the answers of all --adapter, prompts of one task, into one per question.")
    voting: Voting | None = option(
        None,
        "Let the ensemble take the answer that most adapters give, and of several such the likeliest (majority_vote), "
        "or the answer with the highest mean likelihood (mean_likelihood). (default: majority_vote, with --choices "
        "mean_likelihood)",
    )
    stream: bool | None = option(
        None, "Print an answer while it is generated. (default: true on a terminal, else false)"
    )

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
        "Use the prompt in this adapter folder, written by softprompt or by PEFT; name=FOLDER gives it a name, and "
        "`none` is the base without a prompt. If several are given, the first answers questions that name none. "
        "(default: the newest adapter under runs/)",
    )
    model_name_or_path: str | None = option(None, "Use this base model. (default: the one that the adapter names)")
    device: str = same_option(ModelArguments, "device")
    bf16: bool | None = same_option(ModelArguments, "bf16")
    fp16: bool | None = option(
        None,
        "Compute in fp16 autocast; `--fp16 false` computes in fp32. (default: true on a GPU without bf16, else false)",
    )
    load_in_8bit: bool = same_option(ModelArguments, "load_in_8bit")
    load_in_4bit: bool = same_option(ModelArguments, "load_in_4bit")
    engine: Literal["auto", "packed", "padded"] = option(
        "auto",
        "Choose how answers are generated. packed: fast, for BLOOM; padded: transformers' generate, for any causal "
        "language model; auto: packed for BLOOM on the CPU, else padded.",
    )


@dataclass(frozen=True)
class GenerationArguments:
    """None stands for the setting that is saved with the adapter, else for the article's."""

    _argument_group_name: ClassVar[str] = "generation"

    max_length: int | None = option(
        None,
        "Limit prompt and answer together to this many tokens; virtual tokens are not counted. (default: 256; with "
        "--eval_dataset as the adapter was trained)",
    )
    max_new_tokens: int | None = option(
        None, "Limit the answer to this many tokens, whatever --max_length says. (default: only --max_length limits it)"
    )
    do_sample: bool | None = option(
        None, "Sample the answer; `--do_sample false` decodes greedily. (default: true; for the mini base false)"
    )
    temperature: float | None = option(None, "Divide the logits by this before sampling. (default: 1.0)")
    top_k: int | None = option(None, "Sample from the k likeliest tokens; 0 samples from all. (default: 50)")
    top_p: float | None = option(
        None, "Sample from the likeliest tokens whose probabilities add up to this. (default: 1.0)"
    )
    min_p: float | None = option(
        None, "Exclude tokens less likely than this fraction of the likeliest one's probability. (default: none)"
    )
    repetition_penalty: float | None = option(
        None, "Make tokens that have occurred less likely, if above 1. (default: 1.0)"
    )
    no_repeat_ngram_size: int | None = option(
        None, "Never repeat a sequence of this many tokens; 0 allows repetition. (default: 0)"
    )
    suppress_tokens: list[int] | None = option(None, "Never generate these token ids. (default: none)")
    stop_strings: list[str] | None = option(
        None, "End an answer after any of these texts, which it keeps. (default: none)"
    )
    eos_token_id: list[int] | None = option(
        None, "End an answer at any of these token ids. (default: the adapter's, else the tokenizer's)"
    )
    num_return_sequences: int | None = option(None, "Generate this many answers to each prompt. (default: 1)")
    num_beams: int | None = option(
        None, "Search with this many beams, by transformers' beam search. (default: 1, no beam search)"
    )
    seed: int | None = option(None, "Seed the samples, so that they can be repeated. (default: random)")
    batch_size: int = option(8, "Generate this many answers at a time.")


INFER_GROUPS = (QuestionArguments, AdapterArguments, GenerationArguments)
# By base: the generation settings that are saved with an adapter trained on it.
GENERATION_DEFAULTS: dict[str | None, dict[str, Any]] = {"mini": {"do_sample": False, "max_new_tokens": 32}}


@dataclass(frozen=True)
class InferConfig:
    """The settings of one call of `infer` or `chat`."""

    question: QuestionArguments
    model: AdapterArguments
    generation: GenerationArguments


def infer_config(**given: Any) -> InferConfig:
    """Return validated settings of inference from keyword arguments with the names of the flags.

    Raises:
        ConfigError: an unknown setting, a value of a wrong type or out of range, or settings that contradict each
            other; the message names all of them.
    """
    config = InferConfig(*build(INFER_GROUPS, given))
    model = config.model
    faults = precision_faults(model.bf16, model.fp16, model.device)
    faults += generation_faults(dataclasses.asdict(config.generation))
    faults += quantization_faults(model.load_in_8bit, model.load_in_4bit, model.engine)
    faults += _question_faults(config.question, len(model.adapter or ()))
    if faults:
        raise ConfigError("; ".join(faults))
    return config


def _question_faults(question: QuestionArguments, adapters: int) -> list[str]:
    """Return what contradicts itself in a question to this number of adapters."""
    asked = [n for n in ("prompt", "prompts_file", "eval_dataset") if getattr(question, n) is not None]
    faults = []
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
        faults.append("--eval_split goes with an --eval_dataset that has splits, unlike a .txt and mini:TASK")
    if question.ensemble and adapters < 2:
        faults.append("--ensemble needs two or more --adapter, prompts of one task")
    if question.ensemble and not asked:
        faults.append("--ensemble goes with --prompt, --prompts_file or --eval_dataset")
    if question.voting is not None and not question.ensemble:
        faults.append("--voting goes with --ensemble")
    return faults + _rows_faults(question)


def has_splits(dataset: str | None) -> bool:
    """Return whether a dataset can have splits, which a .txt and a mini task do not."""
    return dataset is not None and not dataset.lower().endswith(".txt") and not dataset.startswith("mini:")


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
            faults.append(f"--{name} {given[name]} is below 0.001; `--do_sample false` takes the likeliest token")
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
        faults.append(
            f"--num_return_sequences {samples} needs --do_sample or --num_beams; greedy answers are identical"
        )
    return faults


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
