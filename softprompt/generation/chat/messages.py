"""The messages of a chat: a question, or a command, on one line or between two lines of three quotation marks."""

import re
from collections.abc import Callable
from typing import NamedTuple

QUOTES = '"""'
CONTINUED = "... "  # displayed before each further line of a message
LEAVE = "/exit"
WORDS = {"exit": LEAVE, "quit": LEAVE}  # lines that are commands though they do not begin with a slash


class Message(NamedTuple):
    """What was typed.

    Attributes:
        command: The command in lower case with its slash; empty for a question.
        text: The question, or the text after the command.
        typed: The whole message as it was typed, for the history.
    """

    command: str
    text: str
    typed: str


def read_message(read: Callable[[str], str], prompt: str) -> Message:
    """Read one message.

    If a question, or the text after a command, begins with three quotation marks, the message ends with the first line
    that ends with three further ones. The text between them is not interpreted: without a command before it, it is a
    question even if it looks like a command.

    Args:
        read: Displays its argument before the cursor and returns the next line, or several lines that were pasted.
        prompt: What to display before the first line.
    """
    typed = read(prompt).lstrip()
    opened = re.match(rf"(/\S+\s+)?{QUOTES}", typed)
    if opened is None:
        return parse_message(typed.rstrip())
    while not typed[opened.end() :].rstrip().endswith(QUOTES):
        typed += "\n" + read(CONTINUED)
    enclosed = typed[opened.end() :].rstrip().removesuffix(QUOTES).strip("\n")
    return Message((opened[1] or "").strip().lower(), enclosed, typed)


def parse_message(typed: str) -> Message:
    """Tell a command from a question. A command is a slash and a word; other texts that begin with a slash, such as a
    path, are questions."""
    if typed.lower() in WORDS:
        return Message(WORDS[typed.lower()], "", typed)
    found = re.match(r"/([a-zA-Z]+|\?)(?=\s|$)", typed)
    if found is None:
        return Message("", typed, typed)
    return Message(found[0].lower(), typed[found.end() :].strip(), typed)


def unquoted(text: str) -> str:
    """Return a text without the pair of quotation marks around it, if there is one."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]
    return text[1:-1] if quoted else text
