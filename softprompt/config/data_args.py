"""Settings of the rows of a training run."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from softprompt.config.schema import option

DEFAULT_MAX_LENGTH = 256
DEFAULT_BUFFER_SIZE, MAX_BUFFER_SIZE = 10_000, 1_000_000_000


def is_mini_task(dataset: str | None) -> bool:
    """Return whether a dataset is a task of the mini base, such as mini:sentiment."""
    return str(dataset).startswith("mini:")


@dataclass(frozen=True)
class DataArguments:
    """The rows: where they come from, and how they are read, tokenized and held out."""

    _argument_group_name: ClassVar[str] = "data"
    _everyday: ClassVar[tuple[str, ...]] = (
        *("dataset", "columns", "template", "max_length", "eval_rows", "eval_dataset"),
    )

    dataset: str | None = option(
        None,
        "Train on these rows: a .json, .jsonl, .csv or .parquet file, a folder of such files, a folder of "
        "Dataset.save_to_disk, a hub id, or mini:TASK for a task of the package's own base. (default: the preset's)",
        "DATA",
    )
    dataset_config_name: str | None = option(
        None, "Use this configuration of a hub dataset that has several. (default: the dataset's own default)", "NAME"
    )
    dataset_split: str = option(
        "train",
        "Use this split, or slices of splits such as train[:1000] or train[:90%], of a hub dataset, of a DatasetDict "
        "folder, or of a folder whose files are named for splits (train-00000-of-00002.parquet, data/test.jsonl).",
        "SPLIT",
    )
    columns: str | None = option(
        None,
        "Map the template's columns to the dataset's, as OURS=THEIRS pairs such as instruction=question,output=answer, "
        "or as a JSON object if a name contains a comma. (default: the names are the same)",
        "A=B",
    )
    template: str | None = option(
        None,
        "Write prompts in this format, with columns in braces ('Q: {instruction}\\nA: '), or `chat` for the "
        "tokenizer's chat template. (default: 'Human: {instruction}\\n{input}\\n\\nAssistant: ', with white space "
        "stripped before '\\n\\nAssistant: ')",
        "TEXT",
    )
    chat_template_date: str | None = option(
        None,
        "The date that the chat template writes as the current one, such as 2026-01-31. (default: the day on which the "
        "run starts, also when it is resumed later)",
        "DATE",
    )
    max_length: int = option(
        DEFAULT_MAX_LENGTH,
        "Truncate a row to this many tokens, prompt and answer together, not counting virtual tokens.",
    )
    truncation_side: Literal["output", "input"] = option(
        "output", "Truncate a row at the end of its answer (output), or within its input, which keeps the answer."
    )
    overwrite_cache: bool = option(False, "Tokenize the rows again even if their token ids are cached.")
    preprocessing_num_workers: int | None = option(
        None, "Tokenize the rows in this many processes; the result is the same. (default: 1)"
    )
    streaming: bool = option(
        False,
        "Read the training rows during training instead of holding all of them in memory. Works with .jsonl, .parquet, "
        "folders of these or of Dataset.save_to_disk, and hub ids. Token ids are not cached.",
    )
    buffer_size: int = option(
        DEFAULT_BUFFER_SIZE,
        "Draw the next row of --streaming at random from a shuffle buffer of this size; 1 keeps the dataset's order.",
    )
    eval_dataset: str | None = option(
        None,
        "Evaluate on these held-out rows, in any form that --dataset takes. (default: --dataset if --eval_split is "
        "given or for mini:TASK, else none)",
        "DATA",
    )
    eval_split: str | None = option(
        None,
        "Use this split of --eval_dataset, written as for --dataset_split. (default: if there are several "
        "splits, validation, or test if there is no validation)",
        "SPLIT",
    )
    eval_rows: int = option(
        0,
        "Hold out this many rows for evaluation, from the end of --dataset, or with --streaming from its beginning.",
    )

    @property
    def held_out(self) -> str | None:
        """The dataset of the held-out rows; None if there are none, or if --eval_rows takes them from --dataset."""
        has_own = is_mini_task(self.dataset)  # such a task has held-out rows of its own
        return self.eval_dataset or (self.dataset if self.eval_split or has_own else None)
