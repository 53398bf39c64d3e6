"""A plain text as passages, over which every one of its tokens but the first is predicted exactly once."""

from pathlib import Path
from typing import Any

from softprompt.data.examples import IGNORE, Example, Examples
from softprompt.data.readers import text_of
from softprompt.data.tokenization import text_ids
from softprompt.utils.errors import ConfigError, DataError


def passages(source: str, tokenizer: Any, max_length: int) -> Examples:
    """The text of a file as passages of `max_length` tokens. Each begins with the last token of the one before, which
    is no target there: the rolling windows of EleutherAI's lm-evaluation-harness with one token of context, so a token
    is predicted from at most max_length - 1 before it (and from the prompt, where there is one).

    Raises:
        DataError: not there, not UTF-8, or a text of fewer than two tokens.
        ConfigError: passages without a target.
    """
    if max_length < 2:
        raise ConfigError(f"--max_length {max_length} leaves a passage of {source} nothing to predict; give 2 or more")
    if not Path(source).is_file():
        raise DataError(f"--eval_dataset {source}: no such file")
    (ids,) = text_ids(tokenizer, [text_of(Path(source))])
    if len(ids) < 2:
        raise DataError(f"--eval_dataset {source}: its text has {len(ids)} tokens; expected at least 2")
    cut = (ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1))
    return Examples.from_rows(Example(some, [IGNORE, *some[1:]]) for some in cut)
