"""The terminal of a chat: messages of several lines, the history of earlier chats, and real pseudo-terminals."""

import re
import stat
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.programs import GREEDY
from helpers.pseudo_terminal import PseudoTerminal

import infer
import softprompt
from softprompt.generation.chat import history, terminal
from softprompt.generation.chat.history import HistoryFile
from softprompt.generation.chat.messages import read_message
from softprompt.generation.chat.terminal import PlainTerminal, open_terminal
from softprompt.utils.errors import DataError

ROOT = Path(infer.__file__).parent
ECHO = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # hides these modules
from softprompt.generation.chat.history import HistoryFile
from softprompt.generation.chat.messages import read_message
from softprompt.generation.chat.terminal import open_terminal

commands = ("/choices", "/adapters")
terminal = open_terminal(lambda line: [one for one in commands if one.startswith(line)], HistoryFile.of_user())
while True:
    try:
        message = read_message(terminal.read, "短> ")
    except EOFError:
        break
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        continue
    terminal.remember(message.typed)
    print(f"got {message.command!r} {ascii(message.text)}", flush=True)
assert "torch" not in sys.modules
print(type(terminal).__name__)
"""


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["  hallo "], ("", "hallo")),
        (["pasted\nlines "], ("", "pasted\nlines")),
        (['"""one line"""'], ("", "one line")),
        (['"""', "a", "", " b", '"""'], ("", "a\n\n b")),
        (['"""a', 'b"""  '], ("", "a\nb")),
        (['"""/exit"""'], ("", "/exit")),
        (['"""', '"""'], ("", "")),
        (["/INPUT  x y "], ("/input", "x y")),
        (['/input """a', 'b"""'], ("/input", "a\nb")),
        (["/?"], ("/?", "")),
        (["/etc/hosts"], ("", "/etc/hosts")),
        (["Exit"], ("/exit", "")),
        (["exit now"], ("", "exit now")),
        (['say """x'], ("", 'say """x')),
    ],
)
def test_a_message(lines, expected):
    prompts, typed = [], iter(lines)
    message = read_message(lambda prompt: (prompts.append(prompt), next(typed))[1], "> ")
    assert message[:2] == expected and next(typed, None) is None
    assert prompts == ["> "] + ["... "] * (len(lines) - 1) and message.typed.strip() == "\n".join(lines).strip()


@pytest.fixture
def file(tmp_path):
    return HistoryFile(tmp_path / "state/softprompt/chat_history")


def test_messages_are_kept_for_later_chats_and_for_their_user_alone(file):
    messages = ["你好", '"""a\n\nb"""', "\\n", "caf\udce9"]
    for message in messages:
        file.append(message)
    assert HistoryFile(file.path).load() == [*messages[:3], "caf?"]
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_the_history_does_not_grow_without_limit(file, monkeypatch):
    monkeypatch.setattr(history, "MAX_BYTES", 1000)
    for number in range(300):
        file.append(f"message {number}")
    assert file.load()[-1] == "message 299" and len(file.load()) < 100
    assert file.path.stat().st_size <= 1000
    monkeypatch.setattr(history, "MAX_ENTRIES", 5)
    assert file.load() == [f"message {number}" for number in range(295, 300)]


def test_damaged_lines_are_skipped(file):
    file.append("a")
    with open(file.path, "ab") as opened:
        opened.write(b'{"x": 1}\n"half\n\xff\n[[\n')
    file.append("b")
    assert file.load() == ["a", "b"]


def test_a_secret_is_not_kept(file):
    file.append("my token is hf_" + "x" * 20)
    assert "hf_x" not in file.path.read_text()


@pytest.mark.parametrize("kind", ["link", "folder", "below a file", "none"])
def test_what_cannot_be_a_history_is_left_alone(kind, tmp_path):
    path, other = tmp_path / "h", tmp_path / "other"
    other.write_text("mine\n")
    if kind == "link":
        path.symlink_to(other)
    elif kind == "folder":
        path.mkdir()
    file = HistoryFile({"below a file": other / "h", "none": None}.get(kind, path))
    file.append("a")
    assert file.load() == [] and other.read_text() == "mine\n"


def test_where_the_history_lies_and_how_it_is_turned_off(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    HistoryFile.of_user().append("a")
    assert HistoryFile.of_user().load() == ["a"] and (tmp_path / "softprompt/chat_history").is_file()
    monkeypatch.setenv("SOFTPROMPT_NO_HISTORY", "1")
    HistoryFile.of_user().append("b")
    assert HistoryFile.of_user().load() == [] and "b" not in (tmp_path / "softprompt/chat_history").read_text()
    monkeypatch.delenv("SOFTPROMPT_NO_HISTORY")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert HistoryFile.of_user().path == tmp_path / ".local/state/softprompt/chat_history"


def test_bytes_in_another_encoding_are_one_error(monkeypatch, file):
    def typed(prompt):
        raise UnicodeDecodeError("utf-8", b"\xc4\xe3", 0, 1, "invalid continuation byte")

    monkeypatch.setattr("builtins.input", typed)
    with pytest.raises(DataError, match="utf-8"):
        PlainTerminal(lambda line: [], file).read("> ")


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch, file):
    monkeypatch.setattr(terminal, "find_spec", lambda name: pytest.fail("prompt_toolkit was looked for"))
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_terminal(lambda line: [], file), PlainTerminal)


def behind_a_terminal(tmp_path, hidden, **variables):
    usual = {"TERM": "xterm", "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path), "PYTHONUTF8": "1"}
    argv = [sys.executable, "-c", ECHO, *hidden]
    return PseudoTerminal(argv, **usual, PROMPT_TOOLKIT_NO_CPR="1", **variables)


def send(user, keys, expected):
    """Type keys, wait for what the program answers, and for the next prompt."""
    user.type(keys)
    user.wait_for(expected)
    user.wait_for("短>")


def interrupt(user):
    """Press Ctrl-C until it is seen: readline misses a signal that arrives just before it waits for a key."""
    for _ in range(10):
        user.type("\x03")
        with suppress(AssertionError):
            user.wait_for("interrupted", 2)
            return user.wait_for("短>")
    pytest.fail("Ctrl-C was not seen")


def use_every_key(tmp_path, hidden, more):
    """Hold two chats: what the first one ends with is recalled in the second. Return all that was displayed."""
    with behind_a_terminal(tmp_path, hidden) as user:
        user.wait_for("短>")
        send(user, "你好吗\x7f\x7f\r", r"got '' '\u4f60'")  # two characters are deleted again
        user.type("/cho\t")
        user.wait_for("ices")
        send(user, " 正,负\r", r"got '/choices' '\u6b63,\u8d1f'")
        user.type("discarded")
        user.wait_for("discarded")  # the terminal reads keys now, so Ctrl-C reaches the reader
        interrupt(user)
        for keys, expected in more:
            send(user, keys, expected)
        send(user, "\x1b[200~pasted\rlines\x1b[201~\r", r"got '' 'pasted\nlines'")
        user.type('"""a\r')
        user.wait_for("...")
        send(user, 'b"""\r', r"got '' 'a\nb'")
        user.type("\x04")
        assert user.exit_code() == 0
        shown = user.shown
    assert "\x1b[?2004h" in shown  # asks the terminal to mark pasted lines
    with behind_a_terminal(tmp_path, hidden) as user:
        user.wait_for("短>")
        send(user, "\x1b[A\r", r"got '' 'a\nb'")
        user.type("\x04")
        assert user.exit_code() == 0
        return shown + user.shown


@pytest.mark.skipif(find_spec("prompt_toolkit") is None, reason="needs prompt_toolkit")
def test_prompt_toolkit_on_a_terminal(tmp_path):
    alt_enter = [("first\x1b\rsecond\r", r"got '' 'first\nsecond'")]
    shown = use_every_key(tmp_path, (), alt_enter)
    assert shown.count("PromptToolkitTerminal") == 2 and not re.search(r"\x1b\[[0-9;]*[349][0-7][;m]", shown)


def test_readline_on_a_terminal(tmp_path):
    pytest.importorskip("readline")
    assert use_every_key(tmp_path, ("prompt_toolkit",), []).count("PlainTerminal") == 2


@pytest.mark.slow
def test_a_chat_on_a_real_terminal(place):
    """infer.py itself: Ctrl-C stops an answer, and the next one is whole; the arrow keys recall a line."""
    variables = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(place), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    answer = softprompt.SoftPromptModel.from_pretrained(adapter="a").generate(
        "hello", **{"do_sample": False, "max_new_tokens": 5}
    )
    with PseudoTerminal([sys.executable, infer.__file__, "--adapter", "a", *GREEDY], **variables) as user:
        user.wait_for("a>")
        for keys in ("hello\r", "\x1b[A\r"):
            user.type(keys)
            user.wait_for(answer)
        user.type("/set max_new_tokens 100000\r")
        user.wait_for("max_new_tokens 100000\r\n")
        user.type("hello\r")
        user.wait_for(answer)
        user.type("\x03")
        user.wait_for("(stopped)")
        user.type("/set max_new_tokens 5\r")
        user.wait_for("max_new_tokens 5\r\n")
        user.type("hello\r")
        user.wait_for(answer)
        user.type("exit\r")
        assert user.exit_code() == 0
