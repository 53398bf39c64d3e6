"""Cut a plain text into passages, such that each token of the text except the first is a target exactly once."""

from pathlib import Path
from typing import Any

from softprompt.data.encoding import text_ids
from softprompt.data.examples import IGNORE, Example, Examples
from softprompt.data.readers import read_text
from softprompt.utils.errors import ConfigError, DataError


def passages(source: str, tokenizer: Any, max_length: int) -> Examples:
    """Cut the text of a file into passages of `max_length` tokens.

    Each passage begins with the last token of the previous passage; that first token is not a target. These are the
    rolling windows of EleutherAI's lm-evaluation-harness with one token of context: each token is predicted from at
    most max_length - 1 tokens before it, and from the soft prompt if there is one.

    Raises:
        DataError: the file does not exist, is not UTF-8, or has fewer than two tokens.
        ConfigError: `max_length` leaves passages without a target.
    """
    if max_length < 2:
        raise ConfigError(f"--max_length {max_length} leaves a passage of {source} nothing to predict; give 2 or more")
    if not Path(source).is_file():
        raise DataError(f"--eval_dataset {source}: no such file")
    (ids,) = text_ids(tokenizer, [read_text(Path(source))])
    if len(ids) < 2:
        raise DataError(f"--eval_dataset {source}: its text has {len(ids)} tokens; expected at least 2")
    cut = (ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1))
    return Examples.from_rows(Example(some, [IGNORE, *some[1:]]) for some in cut)
