"""Choose a training row as a question to try the new prompt with, in the form that infer.py takes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softprompt.data.chat_template import prompt_messages
from softprompt.data.template import Template
from softprompt.utils.errors import SoftpromptError

MOST_CHARACTERS = 120  # the most characters of a text that is printed as the value of a flag


@dataclass(frozen=True)
class FirstQuestion:
    """A question for infer.py.

    Attributes:
        row: The question as the object on one line of a --prompts_file.
        flags: The same question as texts, by the names of infer.py's flags; None unless all texts are short and
            printable on one line.
    """

    row: Mapping[str, Any]
    flags: Mapping[str, str] | None = None


def first_question(rows: Iterable[Mapping[str, Any]], template: Template, tokenizer: Any) -> FirstQuestion | None:
    """Return the shortest question in `rows`, preferably one that flags can ask and whose first text is not empty.
    Return None if all questions are empty. The question of a conversation is its last user message, preceded by the
    other messages if the chat template refuses a single one."""
    found = [question for row in rows if (question := _question_of(row, template, tokenizer))]
    return min(found, key=lambda q: (q.flags is None, _begins_empty(q), len(str(q.row))), default=None)


def _question_of(row: Mapping[str, Any], template: Template, tokenizer: Any) -> FirstQuestion | None:
    if "messages" not in row and "completion" not in row:
        return _question_of_columns(row, template)
    messages = prompt_messages(row)
    asked = next((m.get("content") for m in reversed(messages) if m.get("role") == "user"), None)
    if not isinstance(asked, str) or not asked.strip():
        return None
    try:
        template.render(template.row(asked), tokenizer)
    except SoftpromptError:
        return FirstQuestion({"messages": messages})
    return FirstQuestion({"prompt": asked}, _flags({"prompt": asked}))


def _question_of_columns(row: Mapping[str, Any], template: Template) -> FirstQuestion | None:
    names = template.fields or ("instruction", "input")
    texts = {name: row.get(name) or "" for name in names}
    if not any(text.strip() for text in texts.values()):
        return None
    second = template.second
    if any(texts[name] or name not in template.optional_fields for name in names[1:] if name != second):
        return FirstQuestion(texts)
    given = {"prompt": texts[names[0]]}
    if second and (texts[second] or second not in template.optional_fields):
        given["input"] = texts[second]
    return FirstQuestion(texts, _flags(given))


def _flags(texts: Mapping[str, str]) -> Mapping[str, str] | None:
    fit = all(len(text) <= MOST_CHARACTERS and (text.isprintable() or not text) for text in texts.values())
    return texts if fit else None


def _begins_empty(question: FirstQuestion) -> bool:
    values: Sequence[Any] = list((question.flags or question.row).values())
    return isinstance(values[0], str) and not values[0].strip()
