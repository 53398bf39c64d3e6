"""Read lines from a terminal: with prompt_toolkit where it is installed, else with Python's readline, else with plain
`input()`."""

import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, Protocol

from softprompt.generation.chat.history import HistoryFile
from softprompt.generation.chat.messages import CONTINUED
from softprompt.utils.errors import DataError

Complete = Callable[[str], list[str]]  # returns possible completions of the line up to the cursor, as whole lines
KEYS = '''""" before and after a text of several lines; Ctrl-C stops an answer or discards what is typed.'''


class Terminal(Protocol):
    """The source of the lines of a chat.

    Attributes:
        keys: The keys that work here, for /help.
    """

    keys: str

    def read(self, prompt: str) -> str:
        """Display `prompt` and return the next line without its end; several lines if they were pasted or joined.

        Raises:
            EOFError: Ctrl-D was pressed, or the input has ended.
            KeyboardInterrupt: Ctrl-C was pressed. What has been typed is discarded.
            DataError: The bytes of the line are not text in the terminal's encoding.
        """
        ...

    def remember(self, message: str) -> None:
        """Add a message to the history, from which the arrow keys recall it, in this and in later chats."""
        ...


def open_terminal(complete: Complete, history: HistoryFile) -> Terminal:
    """Return the best terminal that is available. One that cannot move its cursor (TERM=dumb) gets plain lines."""
    can_edit = os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown") or os.name == "nt"
    if can_edit and find_spec("prompt_toolkit"):
        return PromptToolkitTerminal(complete, history)
    return PlainTerminal(complete, history)


class PlainTerminal:
    """`input()`, with the line editing of Python's readline module where there is one."""

    keys = KEYS

    def __init__(self, complete: Complete, history: HistoryFile):
        self._complete, self._history, self._candidates = complete, history, list[str]()
        self._readline = _readline()
        if self._readline is not None:
            self._set_up(self._readline)

    def _set_up(self, readline: Any) -> None:
        self.keys = f"{KEYS}\nTab completes commands; the arrow keys recall earlier messages."
        readline.set_auto_history(False)
        readline.clear_history()
        for message in self._history.load():
            readline.add_history(message)
        readline.set_completer_delims("")  # the whole line is completed
        readline.set_completer(self._candidate)
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off: pasted lines stay together

    def _candidate(self, line: str, number: int) -> str | None:
        if number == 0:
            self._candidates = self._complete(line)
        return self._candidates[number] if number < len(self._candidates) else None

    def read(self, prompt: str) -> str:
        """See `Terminal.read`."""
        try:
            return input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()  # the cursor is still behind the prompt
            raise
        except UnicodeDecodeError as error:
            raise _not_text(error.encoding) from None

    def remember(self, message: str) -> None:
        """See `Terminal.remember`."""
        if self._readline is not None:
            self._readline.add_history(message)
            self._history.append(message)


class PromptToolkitTerminal:
    """prompt_toolkit: messages of several lines, which are edited as a whole, and a menu of completions."""

    keys = (
        "Alt-Enter, or Esc and Enter, begins a new line of a message; Enter sends it.\n"
        f"{KEYS}\nTab completes commands; the arrow keys recall earlier messages, and Ctrl-R finds one."
    )

    def __init__(self, complete: Complete, history: HistoryFile):
        from prompt_toolkit import PromptSession

        self._history, self._messages = history, _recalled(history.load())
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation=CONTINUED,
            key_bindings=_key_bindings(),
            completer=_completer(complete),
            complete_while_typing=False,
            history=self._messages,
            enable_suspend=True,
        )

    def read(self, prompt: str) -> str:
        """See `Terminal.read`."""
        # Ctrl-C arrives as a key. prompt_toolkit's handler of the signal prints a traceback if the signal comes just
        # before or after it reads keys.
        return self._session.prompt(prompt, handle_sigint=False)

    def remember(self, message: str) -> None:
        """See `Terminal.remember`."""
        self._messages.remember(message)
        self._history.append(message)


def _readline() -> Any:
    try:
        import readline
    except ImportError:  # on Windows
        return None
    return readline


def _key_bindings() -> Any:
    """Let Enter send a message of several lines, and Alt-Enter (which terminals send as Esc, Enter) begin a line."""
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()
    bindings.add("enter", filter=has_focus(DEFAULT_BUFFER))(lambda event: event.current_buffer.validate_and_handle())
    bindings.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return bindings


def _completer(complete: Complete) -> Any:
    from prompt_toolkit.completion import Completer, Completion

    class LineCompleter(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterable[Any]:
            line = document.text_before_cursor
            for found in complete(line):
                yield Completion(found, -len(line), display=found.partition(" ")[2] or found)

    return LineCompleter()


def _recalled(messages: list[str]) -> Any:
    """Return a history that holds `messages` and those given to `remember`. prompt_toolkit would add each line of a
    message between quotation marks, so what it adds itself is ignored."""
    from prompt_toolkit.history import InMemoryHistory

    class WholeMessages(InMemoryHistory):
        def append_string(self, string: str) -> None: ...

        def remember(self, message: str) -> None:
            super().append_string(message)

    return WholeMessages(messages)


def _not_text(encoding: str) -> DataError:
    return DataError(f"the line is not text in {encoding}, the encoding of this terminal; check its settings")
