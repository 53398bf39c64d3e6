"""Chat in a terminal. Each line is a separate question, as in training; optionally, earlier turns precede it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from softprompt.generation.adapters import NONE
from softprompt.generation.model import SoftPromptModel
from softprompt.utils.errors import SoftpromptError

HELP = """/adapter NAME    answer with another adapter: a name given with --adapter, or a folder
/base            answer with the base alone, without a soft prompt
/history N       put the last N turns before each question; 0 by default, since prompts are trained on single questions
/set NAME VALUE  change a setting, such as /set temperature 0.7 or /set do_sample false; /set alone shows all settings
/help            show this help; Ctrl-C stops an answer, the arrow keys recall earlier lines
/quit            end the chat, like Ctrl-D"""


@dataclass
class Chat:
    """A chat with a model.

    Attributes:
        given: Generation settings of this chat by name.
        parse: Parses the name and text of a setting as the command line parses a flag; returns {name: value}.
        read: Displays its argument before the cursor and returns the next line; raises EOFError at the end of input.
        write: Displays a text without adding a line break.
        stream: Whether an answer is displayed while it is generated.
        adapter: Name of the adapter that answers.
        history: Number of earlier turns that precede a question.
        turns: All turns so far, each a question and its answer.
    """

    model: SoftPromptModel
    given: dict[str, Any]
    parse: Callable[[str, str], dict[str, Any]]
    read: Callable[[str], str]
    write: Callable[[str], None]
    stream: bool = True
    adapter: str = field(init=False)
    history: int = 0
    turns: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.adapter = self.model.active_adapter

    def run(self) -> None:
        """Read and answer lines until /quit or the end of input. A SoftpromptError is displayed and does not end the
        chat."""
        self.write("Each line is a question; /help lists the commands.\n")
        while True:
            try:
                line = self.read(f"{self.adapter}> ").strip()
            except EOFError:
                return self.write("\n")
            except KeyboardInterrupt:  # discard the line that is being typed
                self.write("\n")
                continue
            if line == "/quit":
                return None
            try:
                self.run_command(line) if line.startswith("/") else self.answer(line)
            except SoftpromptError as error:
                self.write(f"error: {' '.join(str(error).split())}\n")
            except KeyboardInterrupt:
                self.write(" …stopped\n")

    def answer(self, question: str) -> None:
        """Answer a question and append the turn to `turns`. Several samples are displayed one per line, and the first
        one is kept.

        Raises:
            SoftpromptError: A setting is invalid, or the question cannot be answered.
        """
        if not question:
            return
        single = self.model.settings(self.adapter, **self.given).num_return_sequences == 1
        on_text = self.write if self.stream and single else None
        answer = self.model.generate(self._with_history(question), adapter=self.adapter, on_text=on_text, **self.given)
        texts = [answer] if isinstance(answer, str) else answer
        self.write("\n" if on_text else "".join(f"{text}\n" for text in texts))
        self.turns.append((question, texts[0]))

    def run_command(self, line: str) -> None:
        """Run a command, which is a line that begins with a slash.

        Raises:
            SoftpromptError: An adapter cannot be loaded, or a setting is invalid.
        """
        name, *arguments = line.split(maxsplit=2)
        if name == "/help":
            self.write(HELP + "\n")
        elif name == "/base":
            self.adapter = NONE
        elif name == "/adapter":
            self._set_adapter(arguments)
        elif name == "/history":
            self._set_history(arguments)
        elif name == "/set":
            self._set(arguments)
        else:
            self.write(f"no such command: {line}\n{HELP}\n")

    def _set_adapter(self, arguments: list[str]) -> None:
        if len(arguments) != 1:
            names = ", ".join(dict.fromkeys([*self.model.adapters, NONE]))
            return self.write(f"/adapter NAME, where NAME is one of {names}, or a folder\n")
        (name,) = arguments
        if name not in (*self.model.adapters, NONE):
            self.model.load_adapter(name)
        self.adapter = name
        return None

    def _set_history(self, arguments: list[str]) -> None:
        if len(arguments) == 1 and arguments[0].isdecimal():
            self.history = int(arguments[0])
        else:
            self.write(f"/history N, where N is a number of earlier turns; now {self.history}\n")

    def _set(self, arguments: list[str]) -> None:
        if len(arguments) == 2:
            changed = {**self.given, **self.parse(*arguments)}
            self.model.settings(self.adapter, **changed)  # raises if the value is invalid
            self.given = changed
        else:
            self.write(f"{self.model.settings(self.adapter, **self.given)}\n")

    def _with_history(self, question: str) -> Any:
        """Return the question; with a history, return a conversation of the last turns and the question."""
        earlier = self.turns[-self.history :] if self.history else []
        if not earlier:
            return question
        said = [(role, text) for turn in earlier for role, text in zip(("user", "assistant"), turn, strict=True)]
        return {"messages": [{"role": role, "content": text} for role, text in [*said, ("user", question)]]}
