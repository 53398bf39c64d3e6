"""A finished run on the hub: `--push_to_hub`, through huggingface_hub."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softprompt.config.train_args import SharingArguments
from softprompt.prompt.file_names import CARD_FILE, CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from softprompt.runs.file_names import REPORT_FILE
from softprompt.runs.run_files import run_files
from softprompt.utils import hub
from softprompt.utils.errors import ConfigError, PushError
from softprompt.utils.redact import redacted
from softprompt.utils.shell_commands import argument

PUSHED = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, CARD_FILE, REPORT_FILE)
REFUSED = (401, 403)


def check_hub(sharing: SharingArguments, output_dir: Path, say: Callable[[str], object]) -> None:
    """Before a run is trained for its upload: see that the repository's name can be one, and that the hub knows the
    token, and that a repository of this name holds nothing of somebody else's that would be replaced. A hub that cannot
    be asked now may answer when the run has ended.

    Raises:
        ConfigError: it cannot, it does not, it does, or there is no token.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    name = repository(sharing, output_dir)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub: {_line(error)}; name a repository with --hub_model_id") from None
    hub.check_reachable()
    try:
        api = HfApi(token=sharing.hub_token)
        user = api.whoami()["name"]
    except LocalTokenNotFoundError:
        raise ConfigError("--push_to_hub needs a token: HF_TOKEN, `hf auth login` or --hub_token") from None
    except HfHubHTTPError as error:
        if error.response.status_code in REFUSED:
            raise ConfigError(f"--push_to_hub: the hub refuses the token ({_line(error)}); give a valid one") from None
        say(f"warning: --push_to_hub: {_line(error)}; it is tried again when the run has ended")
    except Exception as error:  # of httpx, of name resolution, offline
        say(f"warning: --push_to_hub: the hub does not answer now ({_line(error)}); it is tried when the run has ended")
    else:
        _refuse_foreign(api, name if "/" in name else f"{user}/{name}")


def _refuse_foreign(api: Any, repo_id: str) -> None:
    """Raises ConfigError where a repository has files that would be replaced, and none that says it is of a run."""
    try:
        there = {file.rfilename for file in api.model_info(repo_id, timeout=10).siblings or ()}
    except Exception:  # there is none, or the hub does not tell
        return
    if SETTINGS_FILE not in there and (foreign := there.intersection(PUSHED)):
        raise ConfigError(
            f"--push_to_hub: {repo_id} would lose its {', '.join(sorted(foreign))}, which no run of train.py uploaded; "
            "name another repository with --hub_model_id"
        )


def push(folder: Path, sharing: SharingArguments) -> str:
    """Make the repository unless it is there, and upload PUSHED in one commit. Returns its address.

    Raises:
        PushError: it failed; the message has the command that does it later.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet, name = are_progress_bars_disabled(), repository(sharing, folder)
    hub.go_online()
    disable_progress_bars()
    try:
        api = HfApi(token=sharing.hub_token)
        made = api.create_repo(name, private=sharing.hub_private_repo, exist_ok=True)
        name = made.repo_id
        message, ours = "A soft prompt, learned with softprompt", run_files(folder).names().intersection(PUSHED)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=sorted(ours), commit_message=message)
        return str(made)
    except Exception as error:  # whatever it is, the run has ended well
        raise PushError(
            f"the run is whole in {folder}, but not on the hub: {_line(error)}; upload it later with: "
            f"{upload_command(name, folder, sharing)}"
        ) from None
    finally:
        if not quiet:
            enable_progress_bars()


def repository(sharing: SharingArguments, output_dir: Path) -> str:
    return sharing.hub_model_id or output_dir.resolve().name


def upload_command(name: str, folder: Path, sharing: SharingArguments) -> str:
    """The hub's own command that uploads the same files."""
    private = ["--private"] if sharing.hub_private_repo else []
    names = [part for file in PUSHED for part in ("--include", file)]
    return f"hf upload {name} {argument(str(folder))} . {shlex.join([*names, *private])}"


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redacted((lines or [type(error).__name__])[0][:300].rstrip("."))
