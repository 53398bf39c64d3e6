"""The loop of a chat: read a message, run the command or answer the question, and display the result."""

import re
from collections.abc import Callable

from softprompt.generation.chat.commands import HELP, LEAVING, describe_turns, run_command
from softprompt.generation.chat.messages import read_message
from softprompt.generation.chat.session import ChatSession, short_name
from softprompt.generation.chat.terminal import Terminal
from softprompt.utils.errors import SoftpromptError
from softprompt.utils.translation import translate, translate_error

MAX_PROMPT = 32  # characters of an adapter's name before the cursor
LEAVE_HINT = "(Ctrl-D or /exit leaves)"


def hold_chat(
    session: ChatSession,
    terminal: Terminal,
    write: Callable[[str], None],
    stream: bool,
    describe_error: Callable[[Exception], str],
) -> None:
    """Read and answer messages until one of the commands to leave or the end of input. Ctrl-C stops an answer, or
    discards what is typed. An error is displayed in one line and does not end the chat.

    Args:
        write: Displays a text without adding a line break.
        stream: Whether an answer is displayed while it is generated.
        describe_error: Returns what to display about an error.
    """
    display = _Display(write)
    display.line(translate("Type a question; /? lists the commands; Ctrl-D or /exit leaves."))
    display.line(describe_turns(session))
    while True:
        try:
            message = read_message(terminal.read, f"{prompt_of(session)}> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            display.line(translate(LEAVE_HINT))
            continue
        except SoftpromptError as error:
            display.line(translate_error(str(error)))
            continue
        if message.typed.strip():
            terminal.remember(message.typed)
        if message.command in LEAVING:
            return
        try:
            if message.command:
                keys = ["", *map(translate, terminal.keys.split("\n"))] if message.command in HELP else []
                display.line("\n".join([run_command(session, message), *keys]))
            elif message.text.strip():
                session.answer(message.text, display.write, stream)
        except KeyboardInterrupt:
            display.write("\n")  # the terminal has displayed ^C
            display.line(translate(f"(stopped) {LEAVE_HINT}"))
        except Exception as error:
            display.line(translate_error(" ".join(describe_error(error).split())))


class _Display:
    """Displays texts without control characters (see `visible`), and knows whether the cursor is at the beginning of a
    line."""

    def __init__(self, write: Callable[[str], None]):
        self._write, self._at_start = write, True

    def write(self, text: str) -> None:
        """Display a text without adding a line break."""
        self._write(visible(text))
        self._at_start = text.endswith("\n") if text else self._at_start

    def line(self, text: str) -> None:
        """Display a text on lines of its own."""
        self.write(text + "\n" if self._at_start else f"\n{text}\n")


def prompt_of(session: ChatSession) -> str:
    """Return what is displayed before the cursor: the last part of the adapter's name, shortened to MAX_PROMPT
    characters."""
    name = visible(short_name(session.adapter, session.model.adapters))
    return name if len(name) <= MAX_PROMPT else f"{name[: MAX_PROMPT - 3]}..."


def visible(text: str) -> str:
    """Return a text with control characters, except line breaks and tabs, as escapes: some would change the
    terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)
