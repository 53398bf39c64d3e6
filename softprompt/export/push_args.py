"""Settings of `python -m softprompt push`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from softprompt.config.arg_parser import FlagParser
from softprompt.config.schema import build, option, same_option
from softprompt.config.train_args import SharingArguments
from softprompt.utils.redact import add_secret

EXAMPLES = (
    ("Upload a finished run to a repository of its own name", "runs/my-run"),
    ("Upload it to a repository that you name", "runs/my-run --hub_model_id me/sentiment"),
    ("Upload it to a new private repository", "runs/my-run --hub_model_id me/sentiment --hub_private_repo"),
)


@dataclass(frozen=True)
class PushArguments:
    """The flags of the command."""

    _argument_group_name: ClassVar[str] = "hub"

    hub_model_id: str | None = option(
        None,
        "Upload to this repository, NAME or OWNER/NAME. (default: the name of the folder, owned by the token's user)",
        "REPO",
    )
    hub_private_repo: bool | None = same_option(SharingArguments, "hub_private_repo")
    hub_token: str | None = same_option(SharingArguments, "hub_token")


def parse_push(argv: Sequence[str]) -> tuple[Path, SharingArguments]:
    """Return the run's folder and where to upload it, from the command line of `push`.

    Raises:
        ConfigError: An argument is wrong.
    """
    description = "Upload the adapter, the model card and the report of a finished run to the Hugging Face hub."
    parser = FlagParser([PushArguments], "push", description, "RUN [--flag value …]", examples=EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="Folder of a finished training run (its --output_dir).")
    given = parser.parse(argv)
    folder = Path(given.pop("run")).expanduser()
    if given.get("hub_token"):
        add_secret(given["hub_token"])
    (arguments,) = build([PushArguments], given)
    return folder, SharingArguments(
        push_to_hub=True,
        hub_model_id=arguments.hub_model_id,
        hub_private_repo=arguments.hub_private_repo,
        hub_token=arguments.hub_token,
    )
