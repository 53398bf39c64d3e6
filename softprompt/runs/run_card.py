"""The model card of a finished run, from the files in its folder."""

from softprompt.prompt.adapter_io import load_adapter
from softprompt.prompt.model_card import CardFacts, model_card
from softprompt.runs.run_reader import RunRecord

EXAMPLES = 6  # rows with answers


def run_card(record: RunRecord, repository: str | None = None) -> bytes:
    """Return the card of a run, in UTF-8.

    Args:
        record: The run, whose folder holds its adapter.
        repository: The repository that the card is published in; None if it stays in the folder.

    Raises:
        AdapterError: The folder holds no whole adapter.
    """
    facts, end = record.facts, record.facts.get("end", {})
    shown = end.get("examples") or {}
    return model_card(
        load_adapter(record.folder),
        CardFacts(
            settings=record.arguments,
            metrics=record.results,
            history=record.history,
            examples=shown.get("rows", ())[:EXAMPLES],
            compared=bool(shown.get("compared")),
            hub=facts.get("hub"),
            language=facts.get("language"),
            verdict=end.get("verdict"),
            repository=repository,
        ),
    )
