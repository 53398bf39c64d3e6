"""How the rows of an evaluation are truncated: as in the training of the adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softprompt.config.data_args import DEFAULT_MAX_LENGTH
from softprompt.generation.adapters import LoadedAdapter

DEFAULT_SIDE = "output"


@dataclass(frozen=True)
class Truncation:
    """How rows are truncated, which is the same for all adapters. `notes` say what was chosen if an adapter was trained
    with other or unknown settings."""

    max_length: int
    truncation_side: str
    notes: Sequence[str] = ()


def common_truncation(
    adapters: Sequence[LoadedAdapter],
    max_length: int | None = None,
    truncation_side: str | None = None,
    plain_text: bool = False,
) -> Truncation:
    """Choose how rows are truncated: as the arguments say, else as in the adapters' training.

    If the adapters differ, the largest max_length and the side "input" are used, so that as many answers as possible
    are whole. If a setting is not saved with an adapter, train.py's default is assumed. The bare base is ignored unless
    there is no adapter with a prompt.

    Args:
        plain_text: The dataset is a plain text, whose passages have max_length tokens and are never truncated.
    """
    trained = [adapter for adapter in adapters if adapter.prompt is not None]
    lengths = {adapter.max_length or DEFAULT_MAX_LENGTH for adapter in trained or adapters}
    sides = {adapter.truncation_side or DEFAULT_SIDE for adapter in trained or adapters}
    length, side = max_length or max(lengths), truncation_side or min(sides)
    notes = []
    if not (plain_text and max_length):
        notes += _notes("max_length", [adapter.max_length for adapter in trained], max_length, length)
    if not plain_text:
        notes += _notes("truncation_side", [adapter.truncation_side for adapter in trained], truncation_side, side)
    return Truncation(length, side, notes)


def _notes(name: str, saved: Sequence[Any], given: Any, chosen: Any) -> list[str]:
    """Return a note on a setting if an adapter was trained with another value than the chosen one, or with an unknown
    one.

    Args:
        saved: The value of each adapter's training; None if it is not known.
        given: The value that the user gave; None if there is none.
        chosen: The value that is used.
    """
    known, unknown = sorted({value for value in saved if value is not None}), None in saved and given is None
    if not unknown and known in ([], [chosen]):
        return []
    values = [*map(str, known), *(["an unknown value"] if unknown else [])]
    way = "" if given is not None else f"; give --{name} to choose another value"
    return [f"--{name}: trained with {' and '.join(values)}, evaluated with {chosen}{way}"]
