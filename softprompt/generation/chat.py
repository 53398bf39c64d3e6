"""A small conversation on a terminal: each line a question by itself, answered as the adapter has learned, or behind
earlier turns where that is wished."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from softprompt.generation.adapters import NONE
from softprompt.utils.errors import SoftpromptError

HELP = """/adapter NAME    answer with another adapter: a name given with --adapter, or a folder
/base            answer with the bare base
/history N       put N earlier turns before a question; 0 at first, since prompts learn single questions
/set NAME VALUE  such as /set temperature 0.7, /set do_sample false; /set alone shows what is set
/help            this; Ctrl-C stops an answer, arrow keys bring lines back
/quit            as Ctrl-D does"""


class Answers(Protocol):
    """What the conversation needs of `api.SoftPromptModel`."""

    adapters: Any
    active_adapter: str

    def generate(self, prompts: Any, **settings: Any) -> Any: ...
    def settings(self, adapter: str | None = None, /, **given: Any) -> Any: ...
    def load_adapter(self, folder: str, adapter_name: str | None = None) -> str: ...


@dataclass
class Chat:
    """`read` asks for a line and raises EOFError at the end, `write` shows a text as it is, without a line break;
    `parse` turns a setting's name and value into that setting, as the command line's flags do."""

    model: Answers
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
        """Until /quit or the end of input. What is wrong with a line is told, and the next one is read."""
        self.write("A line is a question; /help shows what else there is.\n")
        while True:
            try:
                line = self.read(f"{self.adapter}> ").strip()
            except EOFError:
                return self.write("\n")
            except KeyboardInterrupt:  # a line that was begun is thrown away
                self.write("\n")
                continue
            if line == "/quit":
                return None
            try:
                self.obey(line) if line.startswith("/") else self.answer(line)
            except SoftpromptError as error:
                self.write(f"error: {' '.join(str(error).split())}\n")
            except KeyboardInterrupt:
                self.write(" …stopped\n")

    def answer(self, line: str) -> None:
        if not line:
            return
        single = self.model.settings(self.adapter, **self._settings()).num_return_sequences == 1
        streamed = self.write if self.stream and single else None
        answer = self.model.generate(self._behind_turns(line), adapter=self.adapter, on_text=streamed, **self.given)
        texts = [answer] if isinstance(answer, str) else answer
        self.write("\n" if streamed else "".join(f"{text}\n" for text in texts))
        self.turns.append((line, texts[0]))

    def obey(self, line: str) -> None:
        name, *rest = line.split(maxsplit=2)
        if name == "/help":
            self.write(HELP + "\n")
        elif name == "/base":
            self.adapter = NONE
        elif name == "/adapter" and len(rest) == 1:
            if rest[0] not in (*self.model.adapters, NONE):
                self.model.load_adapter(rest[0])
            self.adapter = rest[0]
        elif name == "/adapter":
            self.write(f"/adapter NAME, one of {', '.join(dict.fromkeys([*self.model.adapters, NONE]))}, or a folder\n")
        elif name == "/history" and len(rest) == 1 and rest[0].isdecimal():
            self.history = int(rest[0])
        elif name == "/history":
            self.write(f"/history N, a number of earlier turns; it is {self.history}\n")
        elif name == "/set" and len(rest) == 2:
            changed = {**self.given, **self.parse(rest[0], rest[1])}
            self.model.settings(self.adapter, **self._settings(changed))  # what is wrong is not kept
            self.given = changed
        elif name == "/set":
            self.write(f"{self.model.settings(self.adapter, **self._settings())}\n")
        else:
            self.write(f"no such command: {line}\n{HELP}\n")

    def _behind_turns(self, line: str) -> Any:
        """The question, behind the last turns."""
        earlier = self.turns[-self.history :] if self.history else []
        if not earlier:
            return line
        said = [(role, text) for turn in earlier for role, text in zip(("user", "assistant"), turn, strict=True)]
        return {"messages": [{"role": role, "content": text} for role, text in [*said, ("user", line)]]}

    def _settings(self, given: dict[str, Any] | None = None) -> dict[str, Any]:
        given = self.given if given is None else given
        return {name: value for name, value in given.items() if name not in ("seed", "batch_size")}
