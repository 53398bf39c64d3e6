"""From questions to token ids behind their adapters. Every error names the question."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from softprompt.config.schema import is_text
from softprompt.data.dataset import Row, question
from softprompt.data.encoding import prompt_ids
from softprompt.data.template import Template
from softprompt.generation.adapters import NONE, AdapterNames, LoadedAdapter, find_adapter
from softprompt.utils.errors import ConfigError, DataError

Question = str | Mapping[str, Any]  # a text, or a row with the template's columns


class EncodedQuestion(NamedTuple):
    """A question that is ready for the base.

    Attributes:
        where: how error messages name the question.
        adapter: the adapter itself.
        row: the question as a checked row of the adapter's template.
        input_ids: token ids of the row in the adapter's template, at least one.
    """

    where: str
    adapter: LoadedAdapter
    row: Row
    input_ids: list[int]


def encode_questions(
    questions: Sequence[Question],
    adapters: Mapping[str, LoadedAdapter],
    active_adapter: str,
    names: AdapterNames,
    where: Sequence[str] | None,
    tokenizer: Any,
) -> list[EncodedQuestion]:
    """Check questions and encode each in the template of its adapter.

    Args:
        adapters: the known adapters by name.
        active_adapter: the adapter of questions that name none.
        names: one adapter for all questions, one for each, or None.
        where: how error messages name the questions; by default by number.

    Raises:
        ConfigError: the number of names is not that of the questions, or a question has no token.
        AdapterError: a name that is neither a known adapter nor `none`.
        DataError: a row without the template's columns.
    """
    where = where or [f"question {number}" for number in range(1, len(questions) + 1)]
    given = [names] * len(where) if isinstance(names, str) or names is None else names
    of_each = [name or active_adapter for name in given]
    if len(of_each) != len(where):
        raise ConfigError(f"adapter names {len(of_each)} for {len(where)} questions; give one, or one for each")
    encoded = []
    for place, asked, name in zip(where, questions, of_each, strict=True):
        adapter = adapters.get(name, LoadedAdapter()) if name == NONE else find_adapter(adapters, name, place)
        row, input_ids = encode_question(place, asked, adapter.template, tokenizer)
        encoded.append(EncodedQuestion(place, adapter, row, input_ids))
    return encoded


def encode_question(where: str, asked: Question, template: Template, tokenizer: Any) -> tuple[Row, list[int]]:
    """Check a question and encode it in a template.

    Args:
        where: how error messages name the question.

    Returns:
        The question as a row of the template, and the token ids of its prompt text, at least one.

    Raises:
        DataError: neither a text nor a row, a row without the template's columns, or one that a chat template refuses.
        ConfigError: a template that one text cannot fill, or a question that has no token.
    """
    if isinstance(asked, Mapping):
        row = question(where, dict(asked), template)
    elif is_text(asked):
        with naming_question(where):
            row = template.row(asked)
    else:
        raise DataError(f"{where} is neither a text nor a row: {asked!r:.80}")
    with naming_question(where):
        text = template.render(row, tokenizer)
    (input_ids,) = prompt_ids(tokenizer, [text], template)
    if not input_ids:
        raise ConfigError(f"{where} is empty: it has no token in the template; write something")
    return row, input_ids


@contextmanager
def naming_question(where: str) -> Iterator[None]:
    """Put the name of a question in front of the message of a ConfigError or DataError."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"{where}: {error}") from None
