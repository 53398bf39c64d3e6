"""How the rows of an evaluation are truncated: as in the training of the adapters."""

from collections.abc import Sequence
from dataclasses import dataclass

from softprompt.config.data_args import DEFAULT_MAX_LENGTH
from softprompt.generation.adapters import LoadedAdapter

DEFAULT_SIDE = "output"


@dataclass(frozen=True)
class Truncation:
    """How rows are truncated, which is the same for all adapters. `notes` say what was chosen if an adapter was trained
    with other settings, or if it is not known with which."""

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
    are whole. train.py's defaults stand for settings that are not saved with an adapter. The bare base is ignored
    unless there is no adapter with a prompt.

    Args:
        plain_text: The dataset is a plain text, whose passages have max_length tokens and are never truncated.
    """
    trained = [adapter for adapter in adapters if adapter.prompt is not None] or list(adapters)
    lengths = sorted({adapter.max_length or DEFAULT_MAX_LENGTH for adapter in trained}, reverse=True)
    sides = sorted({adapter.truncation_side or DEFAULT_SIDE for adapter in trained})
    side = truncation_side or sides[0]
    notes = [
        *_unknown_note(trained, max_length, side if plain_text else truncation_side),
        *_choice_note("max_length", lengths, max_length),
        *([] if plain_text else _choice_note("truncation_side", sides, truncation_side)),
    ]
    return Truncation(max_length or lengths[0], side, notes)


def _unknown_note(trained: Sequence[LoadedAdapter], max_length: int | None, side: str | None) -> list[str]:
    """Return a note on the settings that are neither given nor saved with an adapter."""
    prompts = [adapter for adapter in trained if adapter.prompt is not None]
    unknown = []
    if max_length is None and any(adapter.max_length is None for adapter in prompts):
        unknown.append(f"--max_length {DEFAULT_MAX_LENGTH}")
    if side is None and any(adapter.truncation_side is None for adapter in prompts):
        unknown.append(f"--truncation_side {DEFAULT_SIDE}")
    if not unknown:
        return []
    return [
        f"an adapter does not say how its training rows were truncated, so the default of train.py is used for it, "
        f"{' '.join(unknown)}; give the flag if it was trained otherwise"
    ]


def _choice_note(name: str, trained: Sequence[int] | Sequence[str], given: int | str | None) -> list[str]:
    """Return a note if the adapters were trained with different values, the first of which is chosen, or with another
    one than is given."""
    values = " and ".join(map(str, trained))
    if given is None and len(trained) > 1:
        return [
            f"the adapters were trained with --{name} {values}; all are evaluated with {trained[0]}; give --{name} to "
            "choose another value"
        ]
    if given is not None and list(trained) != [given]:
        return [f"the prompt was trained with --{name} {values}, and is evaluated with {given}"]
    return []
