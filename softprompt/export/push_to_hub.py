"""Upload a finished run to the Hugging Face hub with huggingface_hub (`--push_to_hub`)."""

import shlex
from pathlib import Path
from typing import Any

from softprompt.config.train_args import SharingArguments
from softprompt.prompt.file_names import CARD_FILE, CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from softprompt.runs.file_names import REPORT_FILE
from softprompt.runs.manifest import Manifest
from softprompt.utils import hub
from softprompt.utils.errors import ConfigError, PushError, first_line
from softprompt.utils.redact import redacted
from softprompt.utils.shell_commands import argument

UPLOADED_FILES = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, CARD_FILE, REPORT_FILE)
UNAUTHORIZED = (401, 403)  # HTTP status codes


def check_hub(sharing: SharingArguments, output_dir: Path) -> None:
    """Check before training that the run can be uploaded.

    If the hub does not answer, the check only warns, because the hub may answer when training has ended.

    Args:
        sharing: Repository and token.
        output_dir: Folder of the run, whose name is the default name of the repository.

    Raises:
        ConfigError: The repository's name is not valid, there is no token, the hub refuses the token, or the upload
            would replace files that no run of train.py uploaded.
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
        if error.response.status_code in UNAUTHORIZED:
            raise ConfigError(f"--push_to_hub: the hub refuses the token ({_line(error)}); give a valid one") from None
        print(f"warning: --push_to_hub: {_line(error)}; the upload is tried when the run has ended")
    except Exception as error:  # from httpx, name resolution or offline mode
        reason = _line(error)
        print(f"warning: --push_to_hub: the hub does not answer ({reason}); the upload is tried when the run has ended")
    else:
        _refuse_foreign(api, name if "/" in name else f"{user}/{name}")


def _refuse_foreign(api: Any, repo_id: str) -> None:
    """Raise ConfigError if the upload would replace files of a repository that no run was uploaded to: it lacks
    `SETTINGS_FILE`."""
    try:
        existing = {file.rfilename for file in api.model_info(repo_id, timeout=10).siblings or ()}
    except Exception:  # the repository does not exist, or the hub does not answer
        return
    if SETTINGS_FILE not in existing and (foreign := existing.intersection(UPLOADED_FILES)):
        raise ConfigError(
            f"--push_to_hub: this would replace {', '.join(sorted(foreign))} in {repo_id}, which no run of train.py "
            "uploaded; name another repository with --hub_model_id"
        )


def push(folder: Path, sharing: SharingArguments) -> str:
    """Create the repository if it does not exist, upload UPLOADED_FILES in one commit, and return its address.

    Args:
        folder: Folder of the run.
        sharing: Repository and token.

    Raises:
        PushError: The upload failed; the message contains a command that uploads the run later.
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
        message, ours = "A soft prompt, learned with softprompt", Manifest(folder).names().intersection(UPLOADED_FILES)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=sorted(ours), commit_message=message)
        return str(made)
    except Exception as error:  # whatever fails here, the run itself has succeeded
        raise PushError(
            f"the run is complete in {folder}, but was not uploaded to the hub: {_line(error)}; upload it later with: "
            f"{upload_command(name, folder, sharing)}"
        ) from None
    finally:
        if not quiet:
            enable_progress_bars()


def repository(sharing: SharingArguments, output_dir: Path) -> str:
    """Return the repository's name: `--hub_model_id`, or the name of the run's folder."""
    return sharing.hub_model_id or output_dir.resolve().name


def upload_command(name: str, folder: Path, sharing: SharingArguments) -> str:
    """Return the command of huggingface_hub that uploads the same files."""
    private = ["--private"] if sharing.hub_private_repo else []
    names = [part for file in UPLOADED_FILES for part in ("--include", file)]
    return f"hf upload {name} {argument(str(folder))} . {shlex.join([*names, *private])}"


def _line(error: Exception) -> str:
    """Return the first line of an error's message, without secrets."""
    return redacted(first_line(error, 300).rstrip("."))
