"""Long texts for the mini base, which `--preset distill-mini` distills."""

from softprompt.utils.errors import DataError

TEXTS: dict[str, str] = {}


def mini_text(source: str) -> str:
    """Return the text that mini:NAME names.

    Raises:
        DataError: There is no such text.
    """
    name = source.removeprefix("mini:")
    if name not in TEXTS:
        raise DataError(f"--distill_prompt {source}: unknown text; the texts are {', '.join(TEXTS)}, or name a file")
    return TEXTS[name]
