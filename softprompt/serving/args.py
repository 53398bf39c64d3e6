"""Settings of `softprompt serve`, from its command line. This module does not import torch."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from softprompt.config.arg_parser import FlagParser
from softprompt.config.infer_args import AdapterArguments
from softprompt.config.schema import build, option, same_option
from softprompt.config.train_args import RUNS
from softprompt.config.validation import precision_faults, quantization_faults
from softprompt.utils.errors import AdapterError, ConfigError
from softprompt.utils.redact import add_secret

API_KEY = "SOFTPROMPT_API_KEY"  # environment variable
EXAMPLES = (
    ("Serve all runs under runs/ that have the base of the newest one", ""),
    ("Serve two adapters of one base under names of your choice", "--adapters mood=runs/one topic=runs/two"),
    ("Listen on all addresses, with the API key in SOFTPROMPT_API_KEY", "--host 0.0.0.0 --port 8000"),
)


@dataclass(frozen=True)
class ServeArguments:
    """The adapters, the address, and the limits of a request."""

    _argument_group_name: ClassVar[str] = "server"
    _everyday: ClassVar[tuple[str, ...]] = ("adapters", "host", "port", "api_key")

    adapters: list[str] = option(
        None,
        "Serve the adapters in these folders: an adapter folder or a run (name=FOLDER sets its name), or a folder of "
        f"such folders. They may change while the server runs. (default: {RUNS})",
        "FOLDER",
    )
    host: str = option(
        "127.0.0.1", "Listen on this address. With the default, only this machine can connect.", "ADDRESS"
    )
    port: int = option(8000, "Listen on this port; 0 takes a free one.", "N")
    api_key: str | None = option(
        None,
        "Refuse requests without the header `Authorization: Bearer KEY`. Prefer the environment variable "
        f"{API_KEY}, which other users of the machine do not see. (default: none)",
        "KEY",
    )
    allow_adapter_loading: bool = option(
        False,
        "Accept POST /v1/adapters, which serves one more adapter under a name that the request chooses; its folder "
        "must be inside a folder of --adapters.",
    )
    batch_size: int = option(32, "Generate at most this many answers at a time.", "N")
    max_queue: int = option(256, "Let at most this many answers wait in the queue; refuse further ones with 429.", "N")
    max_prompt_tokens: int = option(
        2048, "Refuse prompts of more tokens than this; virtual tokens are not counted.", "N"
    )
    max_tokens: int = option(1024, "Limit an answer to this many tokens, whatever a request asks for.", "N")
    max_body_bytes: int = option(1 << 20, "Refuse requests whose body is larger than this.", "N")
    request_timeout: float = option(
        300.0, "Cancel an answer after this many seconds, including its time in the queue.", "SECONDS"
    )


@dataclass(frozen=True)
class ServedModelArguments:
    """The base: files, device, precision, quantization, engine."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(
        None, "Serve this base model. (default: the one that the newest of the adapters names)", "BASE"
    )
    device: str = same_option(AdapterArguments, "device")
    bf16: bool | None = same_option(AdapterArguments, "bf16")
    fp16: bool | None = same_option(AdapterArguments, "fp16")
    load_in_8bit: bool = same_option(AdapterArguments, "load_in_8bit")
    load_in_4bit: bool = same_option(AdapterArguments, "load_in_4bit")
    engine: Literal["auto", "packed", "padded"] = same_option(AdapterArguments, "engine")


SERVE_GROUPS = (ServeArguments, ServedModelArguments)


@dataclass(frozen=True)
class ServeConfig:
    """The settings of a server."""

    server: ServeArguments
    model: ServedModelArguments


def serve_config(**given: object) -> ServeConfig:
    """Return validated settings from keyword arguments with the names of the flags. The API key may also come from the
    environment variable SOFTPROMPT_API_KEY.

    Raises:
        ConfigError: A setting is unknown, has a wrong type or is out of range; the message names all of them.
    """
    given = {"adapters": [str(RUNS)], **{name: value for name, value in given.items() if value is not None}}
    if key := os.environ.get(API_KEY):
        given.setdefault("api_key", key)
    config = ServeConfig(*build(SERVE_GROUPS, given))
    model, server = config.model, config.server
    faults = precision_faults(model.bf16, model.fp16, model.device)
    faults += quantization_faults(model.load_in_8bit, model.load_in_4bit)
    limits = ("batch_size", "max_queue", "max_prompt_tokens", "max_tokens", "max_body_bytes")
    values = asdict(server)
    faults += [f"--{name} {values[name]} must be at least 1" for name in limits if values[name] < 1]
    if not 0 <= server.port < 1 << 16:
        faults.append(f"--port {server.port} must lie between 0 and 65535")
    if not server.request_timeout > 0:
        faults.append(f"--request_timeout {server.request_timeout} must be above 0")
    if server.api_key is not None and not server.api_key.strip():
        faults.append("--api_key is empty, so that anyone could guess it; give a long random text")
    if faults:
        raise ConfigError("; ".join(faults))
    if server.api_key:
        add_secret(server.api_key)
    return config


def parse_serve(argv: Sequence[str]) -> ServeConfig:
    """Return the settings of `serve`.

    Raises:
        ConfigError: A flag is wrong.
    """
    description = (
        "Serve a base and its adapters with an OpenAI-compatible API. Requests for different adapters share one batch."
    )
    return serve_config(**FlagParser(SERVE_GROUPS, "serve", description, examples=EXAMPLES).parse(argv))


class Root(NamedTuple):
    """A value of --adapters; `name` is empty if the value is only a folder."""

    name: str
    folder: Path


def parse_roots(values: Sequence[str]) -> list[Root]:
    """Parse values of --adapters, each FOLDER or name=FOLDER.

    Raises:
        AdapterError: A folder does not exist.
    """
    roots = []
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or Path(value).expanduser().exists():  # the path of a folder may contain "="
            name, folder = "", value
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise AdapterError(f"--adapters {value}: no such folder; name an adapter folder, a run or a folder of them")
        roots.append(Root(name, path))
    return roots
