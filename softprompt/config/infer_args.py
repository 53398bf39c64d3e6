"""Settings of inference: one frozen dataclass per group of `--help`."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from softprompt.config.schema import option, same_option
from softprompt.config.train_args import ModelArguments
from softprompt.config.value_parsers import parse_columns, parse_labels

Voting = Literal["majority_vote", "mean_likelihood"]


@dataclass(frozen=True)
class QuestionArguments:
    """What to answer, and how: questions, choices, evaluation, ensembles."""

    _argument_group_name: ClassVar[str] = "what to answer"
    _everyday: ClassVar[tuple[str, ...]] = (
        *("prompt", "input", "prompts_file", "output_file", "choices", "eval_dataset"),
    )

    prompt: str | None = option(
        None,
        "Answer this question: the instruction, or the first column of the adapter's template. (default: none; without "
        "--prompts_file and --eval_dataset, a chat starts on the terminal)",
        "TEXT",
    )
    input: str | None = option(
        None,
        "Fill the second column of the template with this text, which the --prompt is about. (default: none)",
        "TEXT",
    )
    prompts_file: str | None = option(
        None,
        "Answer each line of this file: a .txt with one prompt per line, or a .jsonl with `prompt` or the template's "
        "columns. In a .jsonl, `adapter` may name the adapter of a line: a folder, a name given with --adapter, or "
        "`none`. (default: none)",
        "FILE",
    )
    output_file: str | None = option(
        None,
        "Write the answers to the questions of --prompts_file to this .jsonl file, one line per question with prompt, "
        "adapter and text. After an interruption, the same command continues the file. (default: print them)",
        "FILE",
    )
    overwrite_output_file: bool = option(False, "Replace an existing --output_file instead of continuing it.")
    choices: str | None = option(
        None,
        "Choose among these comma-separated answers, such as 正面,负面, and print the most likely one and its "
        "probability. (default: generate the answer)",
        "A,B",
    )
    eval_dataset: str | None = option(
        None,
        "Evaluate every --adapter, side by side, on these rows with answers, in any form that --dataset of train.py "
        "takes. For a .txt file, print the perplexity of its plain text, cut into passages of --max_length tokens. "
        "(default: none)",
        "DATA",
    )
    eval_split: str | None = option(
        None,
        "Use this split of --eval_dataset. (default: if there are several splits, validation, or test if there is no "
        "validation)",
        "SPLIT",
    )
    truncation_side: Literal["output", "input"] | None = option(
        None,
        "Truncate rows of --eval_dataset longer than --max_length at the end of their answer (output), or within their "
        "input. (default: as the adapter was trained, else output)",
    )
    columns: str | None = option(
        None,
        "Map the template's columns to those of --eval_dataset, as OURS=THEIRS pairs such as "
        "instruction=question,output=answer. (default: as the adapter was trained, if the dataset has those columns)",
        "A=B",
    )
    ensemble: bool = option(
        False, "Combine the answers of all --adapter, which must be prompts of one task, into one answer per question."
    )
    voting: Voting | None = option(
        None,
        "Choose the ensemble's answer: the one that most adapters give, in a tie the most likely one (majority_vote), "
        "or the one with the highest mean likelihood (mean_likelihood). (default: mean_likelihood with --choices, else "
        "majority_vote)",
    )
    stream: bool | None = option(
        None, "Print an answer while it is generated. (default: true on a terminal, else false)"
    )

    @property
    def choice_list(self) -> list[str] | None:
        """The answers of --choices; None if the flag is not given."""
        return None if self.choices is None else parse_labels(self.choices)

    @property
    def column_map(self) -> dict[str, str]:
        """The pairs of --columns: our column → the dataset's; empty if the flag is not given."""
        return parse_columns(self.columns)


@dataclass(frozen=True)
class AdapterArguments:
    """The adapters and their base: files, device, precision, quantization, engine."""

    _argument_group_name: ClassVar[str] = "model"
    _everyday: ClassVar[tuple[str, ...]] = ("adapter", "model_name_or_path", "device")

    adapter: list[str] | None = option(
        None,
        "Use the prompt in this adapter folder, written by softprompt or by PEFT; of a run that has not ended, the "
        "newest complete checkpoint. name=FOLDER gives it a name, and `none` is the base without a prompt. If several "
        "are given, the first answers questions that name no adapter. "
        "(default: the newest adapter under runs/)",
        "DIR",
    )
    model_name_or_path: str | None = option(
        None, "Use this base model. (default: the one that the adapter names)", "BASE"
    )
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
        "Choose how answers are generated. packed: continuous batching; padded: transformers' generate, for any causal "
        "language model; auto: packed for BLOOM on the CPU and for any base that passes a check, else padded. This "
        "also chooses the engine that computes losses.",
    )


@dataclass(frozen=True)
class GenerationArguments:
    """Settings named as in transformers' GenerationConfig. None means the value saved with the adapter, else the
    default in the help text."""

    _argument_group_name: ClassVar[str] = "generation"
    _everyday: ClassVar[tuple[str, ...]] = ("max_new_tokens", "do_sample", "temperature", "top_p", "seed", "batch_size")

    max_length: int | None = option(
        None,
        "Limit prompt and answer together to this many tokens; virtual tokens are not counted. (default: 256; with "
        "--eval_dataset as the adapter was trained)",
    )
    max_new_tokens: int | None = option(
        None,
        "Limit the answer to this many tokens; --max_length then does not apply. (default: only --max_length limits "
        "it)",
    )
    do_sample: bool | None = option(
        None, "Sample the answer; `--do_sample false` decodes greedily. (default: true; for the mini base false)"
    )
    temperature: float | None = option(None, "Divide the logits by this before sampling. (default: 1.0)")
    top_k: int | None = option(None, "Sample from the k most likely tokens; 0 samples from all. (default: 50)")
    top_p: float | None = option(
        None, "Sample from the most likely tokens whose probabilities add up to this. (default: 1.0)"
    )
    min_p: float | None = option(
        None, "Exclude tokens whose probability is below this fraction of the most likely token's. (default: none)"
    )
    repetition_penalty: float | None = option(
        None, "Make tokens that have already occurred less likely, if this is above 1. (default: 1.0)"
    )
    no_repeat_ngram_size: int | None = option(
        None, "Never repeat a sequence of this many tokens; 0 allows repetition. (default: 0)"
    )
    suppress_tokens: list[int] | None = option(None, "Never generate these token ids. (default: none)", "ID")
    stop_strings: list[str] | None = option(
        None, "End an answer after any of these texts, which stays part of the answer. (default: none)", "TEXT"
    )
    eos_token_id: list[int] | None = option(
        None, "End an answer at any of these token ids. (default: the adapter's, else the tokenizer's)", "ID"
    )
    num_return_sequences: int | None = option(None, "Generate this many answers to each prompt. (default: 1)")
    num_beams: int | None = option(
        None, "Use transformers' beam search with this many beams. (default: 1, no beam search)"
    )
    seed: int | None = option(None, "Seed sampling, so that answers can be reproduced. (default: random)")
    batch_size: int = option(8, "Generate at most this many answers at a time.")


INFER_GROUPS = (QuestionArguments, AdapterArguments, GenerationArguments)
# The generation settings that are saved with an adapter, by the base that it was trained on.
GENERATION_DEFAULTS: dict[str | None, dict[str, Any]] = {"mini": {"do_sample": False, "max_new_tokens": 32}}
