"""Long texts for the mini base, which `--preset distill-mini` distills."""

from softprompt.utils.errors import DataError

# A request for the answers of the task reply, in all the words of `corpus.TOPICS` and some of its frames.
TEXTS: dict[str, str] = {
    "reply": "你的任务是礼貌回复，客服回答，商家回复，店家答复\n请给出回复、答复、回应、回话\n告诉我怎么回\nreply\n",
}


def mini_text(source: str) -> str:
    """Return the text that mini:NAME names.

    Raises:
        DataError: There is no such text.
    """
    name = source.removeprefix("mini:")
    if name not in TEXTS:
        raise DataError(f"--distill_prompt {source}: unknown text; the texts are {', '.join(TEXTS)}, or name a file")
    return TEXTS[name]
