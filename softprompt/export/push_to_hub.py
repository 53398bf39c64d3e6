"""Upload a finished run to the Hugging Face hub with huggingface_hub (`--push_to_hub`, `softprompt push`)."""

from pathlib import Path
from typing import Any

from softprompt.config.train_args import SharingArguments
from softprompt.export.public_files import UPLOADED_FILES, public_files
from softprompt.prompt.file_names import SETTINGS_FILE
from softprompt.runs.run_reader import read_run
from softprompt.runs.train_state import resume_command
from softprompt.utils import hub
from softprompt.utils.errors import ConfigError, PushError, first_line
from softprompt.utils.redact import redacted
from softprompt.utils.shell_commands import argument, command, flag

UNAUTHORIZED = (401, 403)  # HTTP status codes


def push_finished_run(folder: Path, sharing: SharingArguments) -> str:
    """Upload a run that has ended, and return the address of its repository.

    Raises:
        ReportError: The folder does not exist or holds no run.
        ConfigError: The run has not ended, or see `check_hub`.
        PushError: The upload failed.
    """
    if not read_run(folder).ended:
        raise ConfigError(f"{folder}: the run has not ended; continue it with: {resume_command(folder)}")
    check_hub(sharing, folder, command("push"))
    return push(folder, sharing)


def check_hub(sharing: SharingArguments, output_dir: Path, asked: str = "--push_to_hub") -> None:
    """Check before training that the run can be uploaded.

    If the hub does not answer, the check only warns, because the hub may answer when training has ended.

    Args:
        sharing: Repository and token.
        output_dir: Folder of the run, whose name is the default name of the repository.
        asked: The flag or command that asks for the upload, for messages.

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
        raise ConfigError(f"{asked}: {_line(error)}; name a repository with --hub_model_id") from None
    if not name.isascii():
        raise ConfigError(f"{asked}: the hub does not accept {name!r}; name a repository with --hub_model_id")
    hub.check_reachable()
    try:
        api = HfApi(token=sharing.hub_token)
        user = api.whoami()["name"]
    except LocalTokenNotFoundError:
        raise ConfigError(f"{asked} needs a token: HF_TOKEN, `hf auth login` or --hub_token") from None
    except HfHubHTTPError as error:
        if error.response.status_code in UNAUTHORIZED:
            raise ConfigError(f"{asked}: the hub refuses the token ({_line(error)}); give a valid one") from None
        print(f"warning: {asked}: {_line(error)}; the upload is tried anyway")
    except Exception as error:  # from httpx, name resolution or offline mode
        reason = _line(error)
        print(f"warning: {asked}: the hub does not answer ({reason}); the upload is tried anyway")
    else:
        _refuse_foreign(api, name if "/" in name else f"{user}/{name}", asked)


def _refuse_foreign(api: Any, repo_id: str, asked: str) -> None:
    """Raise ConfigError if the upload would replace files of a repository that no run was uploaded to: it lacks
    `SETTINGS_FILE`."""
    try:
        existing = {file.rfilename for file in api.model_info(repo_id, timeout=10).siblings or ()}
    except Exception:  # the repository does not exist, or the hub does not answer
        return
    if SETTINGS_FILE not in existing and (foreign := existing.intersection(UPLOADED_FILES)):
        raise ConfigError(
            f"{asked}: this would replace {', '.join(sorted(foreign))} in {repo_id}, which no run of train.py "
            "uploaded; name another repository with --hub_model_id"
        )


def push(folder: Path, sharing: SharingArguments) -> str:
    """Create the repository if it does not exist, upload `public_files` in one commit, and return its address.

    Args:
        folder: Folder of the run.
        sharing: Repository and token.

    Raises:
        PushError: The upload failed; the message contains a command that uploads the run later.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet, name = are_progress_bars_disabled(), repository(sharing, folder)
    hub.go_online()
    disable_progress_bars()
    try:
        api = HfApi(token=sharing.hub_token)
        made = api.create_repo(name, private=sharing.hub_private_repo, exist_ok=True)
        name = made.repo_id
        files = [CommitOperationAdd(file, content) for file, content in public_files(folder, name).items()]
        api.create_commit(name, files, commit_message="A soft prompt, learned with softprompt")
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
    """Return the command that uploads the run later."""
    private = " --hub_private_repo" if sharing.hub_private_repo else ""
    return f"{command('push')} {argument(str(folder))}{flag('hub_model_id', name)}{private}"


def _line(error: Exception) -> str:
    """Return the first line of an error's message, without secrets."""
    return redacted(first_line(error, 300).rstrip("."))
