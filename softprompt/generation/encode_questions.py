"""Check questions and tokenize them in their adapters' templates. Every error names the question."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from softprompt.config.adapter_specs import NONE
from softprompt.config.schema import is_text
from softprompt.data.dataset import Row, question
from softprompt.data.encoding import prompt_ids
from softprompt.data.template import Template
from softprompt.generation.adapters import AdapterNames, LoadedAdapter, find_adapter
from softprompt.utils.errors import ConfigError, DataError

Question = str | Mapping[str, Any]  # a text, or a row with the template's columns


class EncodedQuestion(NamedTuple):
    """A checked and tokenized question.

    Attributes:
        where: Name of the question in error messages.
        adapter: Its adapter.
        row: The question as a row with the columns of the adapter's template.
        input_ids: The T ≥ 1 token ids of the row, rendered with the adapter's template.
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
    """Check questions and tokenize each in the template of its adapter.

    Args:
        adapters: The known adapters by name.
        active_adapter: Name of the default adapter.
        names: Name of the adapter of all questions, or a name for each; an empty name or None means `active_adapter`.
        where: Names of the questions in error messages, by default their numbers.

    Raises:
        ConfigError: The numbers of names and questions differ; or see `encode_question`.
        AdapterError: A name is neither a known adapter nor `none`.
        DataError: See `encode_question`.
    """
    where = where or [f"question {number}" for number in range(1, len(questions) + 1)]
    given = [names] * len(where) if isinstance(names, str) or names is None else names
    of_each = [name or active_adapter for name in given]
    if len(of_each) != len(where):
        raise ConfigError(f"{len(of_each)} adapter names for {len(where)} questions; give one, or one for each")
    encoded = []
    for place, asked, name in zip(where, questions, of_each, strict=True):
        adapter = adapters.get(name, LoadedAdapter()) if name == NONE else find_adapter(adapters, name, place)
        row, input_ids = encode_question(place, asked, adapter.template, tokenizer)
        encoded.append(EncodedQuestion(place, adapter, row, input_ids))
    return encoded


def encode_question(where: str, asked: Question, template: Template, tokenizer: Any) -> tuple[Row, list[int]]:
    """Check a question and tokenize it in a template.

    Args:
        where: Name of the question in error messages.

    Returns:
        The question as a row with the template's columns, and the T ≥ 1 token ids of the rendered row.

    Raises:
        DataError: The question is neither a text nor a row, the row lacks a column of the template, or the chat
            template refuses it.
        ConfigError: The template needs more than one text, or the question has no tokens.
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
