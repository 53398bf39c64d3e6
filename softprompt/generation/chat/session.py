"""The state of a chat, and how it asks the model."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.config.adapter_specs import NONE, parse_adapter_specs
from softprompt.config.schema import is_text
from softprompt.config.train_args import RUNS
from softprompt.data.chat_template import prompt_messages
from softprompt.data.template import CHAT, Template
from softprompt.generation.adapters import LoadedAdapter
from softprompt.generation.model import SoftPromptModel
from softprompt.generation.requests import StreamSettings
from softprompt.prompt.adapter_io import CHECKPOINT
from softprompt.utils.errors import DataError
from softprompt.utils.translation import translate

WHERE = "this question"  # in error messages


class Turn(NamedTuple):
    """A question with the text of /input, and its answer."""

    question: str
    input: str | None
    answer: str


@dataclass
class ChatSession:
    """The state of a chat with a model.

    Attributes:
        given: Generation settings of this chat by name; they override those of the adapter.
        adapter: Name of the adapter that answers.
        input: Text for the second column of the template; None leaves it to the template.
        choices: Texts from which the most likely is chosen as the answer; if empty, answers are generated.
        history: Number of earlier turns that precede a question; None is the number that fits the template (`earlier`).
        turns: All turns so far.
        left_out: Number of turns that were left out before the last question because they did not fit.
    """

    model: SoftPromptModel
    given: dict[str, Any] = field(default_factory=dict)
    adapter: str = field(init=False)
    input: str | None = None
    choices: list[str] = field(default_factory=list)
    history: int | None = None
    turns: list[Turn] = field(default_factory=list)
    left_out: int = 0

    def __post_init__(self) -> None:
        self.adapter = self.model.active_adapter

    @property
    def template(self) -> Template:
        """The template of the adapter that answers."""
        return self.model.adapters.get(self.adapter, LoadedAdapter()).template

    @property
    def settings(self) -> StreamSettings:
        """The settings of the next answer."""
        return self.model.settings(self.adapter, **self.given)

    @property
    def earlier(self) -> list[Turn]:
        """The turns that should precede the next question: the last `history` ones. By default all in the template
        "chat", which is made for conversations, and none in others, whose adapters are trained on single questions."""
        if self.history is None:
            return list(self.turns) if self.template.spec == CHAT else []
        return self.turns[-self.history :] if self.history else []

    def answer(self, question: str, write: Callable[[str], None], stream: bool = True) -> None:
        """Answer a question, display the answer, and append the turn to `turns`. Several samples are displayed one per
        line, and the first one is kept.

        Args:
            write: Displays a text without adding a line break.
            stream: Whether an answer is displayed while it is generated.

        Raises:
            SoftpromptError: A setting is invalid, or the question cannot be answered.
        """
        row = self._row(question, write)
        if self.choices:
            (found,) = self.model.classify([row], self.choices, adapter=self.adapter, where=[WHERE])
            most_likely_first = sorted(found.probabilities.items(), key=lambda each: -each[1])
            write("   ".join(f"{label} {probability:.1%}" for label, probability in most_likely_first) + "\n")
            kept = found.label
        else:
            on_text = write if stream and self.settings.num_return_sequences == 1 else None
            asked = {"adapter": self.adapter, "where": [WHERE], "on_text": on_text}
            answer = self.model.generate(row, **asked, **self.given)
            texts = [answer] if isinstance(answer, str) else answer
            write("\n" if on_text else "".join(f"{text}\n" for text in texts))
            kept = texts[0]
        self.turns.append(Turn(question, self.input, kept))

    def use_adapter(self, named: str) -> None:
        """Answer with another adapter from now on.

        Args:
            named: One of: the name of a loaded adapter, or the short form of it that `short_name` returns; `none`; the
                folder of another adapter to load, as FOLDER or name=FOLDER; the name of a folder under runs/.

        Raises:
            AdapterError: There is no such adapter, or it cannot be loaded or used with this base.
        """
        by_short_name = {short_name(name, self.model.adapters): name for name in self.model.adapters}
        if named not in (*self.model.adapters, NONE):
            named = by_short_name.get(named) or self._loaded(named)
        self.adapter = named

    def _loaded(self, spec: str) -> str:
        """Load the adapter of a folder and return its name."""
        ((name, folder),) = parse_adapter_specs([spec]).items()
        under_runs = os.path.join(RUNS, folder)
        if not os.path.isdir(folder) and os.path.isdir(under_runs):
            name, folder = under_runs if name == folder else name, under_runs
        if name == folder:
            name = folder = os.path.normpath(folder)
        return name if name in self.model.adapters else self.model.load_adapter(folder, name)

    def _row(self, question: str, write: Callable[[str], None]) -> dict[str, Any]:
        """Return the question as a row of the template, or as a conversation if earlier turns precede it. The earliest
        turns are left out until the answer may have at least half as many tokens as without any earlier turn. The first
        time that turns are left out, a note is displayed."""
        if not is_text(question):
            raise DataError("the text is not in the encoding of this terminal; check the terminal's settings")
        alone, earlier, before = self.template.row(question, self.input), self.earlier, self.left_out
        room, self.left_out, row = self._room(alone) if earlier else 0, 0, alone
        while earlier and 2 * self._room(row := self._conversation(earlier, question)) < room:
            earlier, row, self.left_out = earlier[1:], alone, self.left_out + 1
        if self.left_out and not before:
            note = "(the earliest turns no longer fit before a question and are left out; /set max_length N makes room)"
            write(f"{translate(note)}\n")
        return row

    def _room(self, row: dict[str, Any]) -> int:
        return self.model.max_answer_length(row, adapter=self.adapter, where=WHERE, **self.given)

    def _conversation(self, earlier: Iterable[Turn], question: str) -> dict[str, Any]:
        messages = []
        for turn in earlier:
            messages += [self._user(turn.question, turn.input), {"role": "assistant", "content": turn.answer}]
        return {"messages": [*messages, self._user(question, self.input)]}

    def _user(self, question: str, input: str | None) -> dict[str, Any]:
        """Return a question as a message. In the template "chat", its input is part of it."""
        if self.template.spec == CHAT:
            return prompt_messages(self.template.row(question, input))[0]
        return {"role": "user", "content": question, **({} if input is None else {"input": input})}


def short_name(name: str, others: Iterable[str] = ()) -> str:
    """Return the last part of an adapter's name, which often is the path of its folder: for a checkpoint, the last two
    parts. The whole name is returned if another one of `others` has the same last part."""
    short = _last_parts(name)
    return name if any(_last_parts(other) == short for other in others if other != name) else short


def _last_parts(name: str) -> str:
    parts = Path(name).parts
    return os.path.join(*parts[-2:] if re.fullmatch(CHECKPOINT, parts[-1]) else parts[-1:]) if parts else name
