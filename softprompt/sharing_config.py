"""Settings of what a run tells others: TensorBoard and the hub, under TrainingArguments' names; each default in one
place, validation as in config.py."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from softprompt.fields import option

SECRETS = ("hub_token",)  # no file, no message and no log has them


@dataclass(frozen=True)
class SharingArguments:
    _argument_group_name: ClassVar[str] = "telling others"

    report_to: Literal["none", "tensorboard"] = option(
        "none", "tensorboard: the metrics in OUTPUT_DIR/runs too, for `tensorboard --logdir`. (pip install tensorboard)"
    )
    push_to_hub: bool = option(
        False,
        "When the run is whole, upload adapter, model card and report (which shows some rows) to the hub. Where that "
        "fails the run is kept, the exit code is 1, and a line says how to upload it later.",
    )
    hub_model_id: str | None = option(
        None, "Repository on the hub: NAME or OWNER/NAME. (default: the name of --output_dir, of the token's owner)"
    )
    hub_private_repo: bool | None = option(
        None, "Make a new repository private. (default: as its owner has set; public for most)"
    )
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Token for the hub; written nowhere. (default: that of HF_TOKEN or `hf auth login`)"},
    )


def sharing_faults(sharing: SharingArguments) -> Iterator[str]:
    for name in ("hub_model_id", "hub_private_repo", "hub_token"):
        if getattr(sharing, name) is not None and not sharing.push_to_hub:
            yield f"--{name} is only used with --push_to_hub; add that flag"
    if sharing.hub_token is not None and not sharing.hub_token.strip():
        yield "--hub_token is empty; give a token, or leave it out where HF_TOKEN has one"
