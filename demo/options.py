"""What the user asks of `make serve`, checked before anything is started."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from demo.train.recitation import DENSE, MODELS

DEFAULT_PORT = 8000


class DemoError(RuntimeError):
    """The demonstration cannot run as requested, or gave a wrong result."""


@dataclasses.dataclass(frozen=True)
class Options:
    """MODEL, PORT, SERVE_ARGS and SERVE_ONCE, and the sizes in SERVE_ARGS."""

    model: str
    port: int
    arguments: tuple[str, ...]
    once: bool
    npus: int

    @property
    def knows_text(self) -> bool:
        """Whether the model is one of this repository's, so that the right answer is known."""
        return Path(self.model).parent == MODELS


def read_options(environ: Mapping[str, str]) -> Options:
    """Return the options from environment variables. Raises DemoError for values that cannot work."""
    try:
        arguments = tuple(shlex.split(environ.get("SERVE_ARGS", "")))
    except ValueError as error:
        raise DemoError(f"SERVE_ARGS={environ['SERVE_ARGS']!r} cannot be split into arguments: {error}.") from None
    if any(argument.split("=")[0] in ("--port", "--host") for argument in arguments):
        raise DemoError(f"SERVE_ARGS={shlex.join(arguments)!r} sets where to listen: use PORT=8000 make serve.")
    return Options(
        model=_model(environ.get("MODEL") or str(DENSE)),
        port=_port(environ.get("PORT") or str(DEFAULT_PORT)),
        arguments=arguments,
        once=environ.get("SERVE_ONCE", "0") not in ("", "0"),
        npus=npus_needed(arguments),
    )


def npus_needed(arguments: tuple[str, ...]) -> int:
    """Return the NPUs for the TP, PP and DP sizes of ``arguments`` on top of the script's own TP 2 x PP 2."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-tp", "--tensor-parallel-size", dest="tp", type=int, default=2)
    parser.add_argument("-pp", "--pipeline-parallel-size", dest="pp", type=int, default=2)
    parser.add_argument("-dp", "--data-parallel-size", dest="dp", type=int, default=1)
    try:
        # vLLM takes underscores in the names of options for hyphens.
        sizes, _ = parser.parse_known_args([a.replace("_", "-") if a.startswith("--") else a for a in arguments])
    except argparse.ArgumentError as error:
        raise DemoError(f"SERVE_ARGS={shlex.join(arguments)!r}: {error}.") from None
    if min(sizes.tp, sizes.pp, sizes.dp) < 1:
        raise DemoError(f"SERVE_ARGS={shlex.join(arguments)!r}: TP, PP and DP sizes have to be 1 or more.")
    return int(sizes.tp * sizes.pp * sizes.dp)


def check_packages() -> None:
    """Raise DemoError unless what the demonstration runs is installed."""
    missing = [name for name in ("ray", "vllm", "vllm_ascend", "torch_npu", "openai") if not _installed(name)]
    if missing:
        raise DemoError(
            f"not installed for {sys.executable}: {', '.join(missing)}. `make serve` installs them in .venv; "
            "by hand: python demo/install.py"
        )


def reserve_port(port: int) -> socket.socket:
    """Return a socket bound to 127.0.0.1:``port``, which reserves the port until it is closed."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that just ended may linger in TIME_WAIT
    try:
        reserved.bind(("127.0.0.1", port))
        reserved.listen(128)
    except OSError as error:
        reserved.close()
        raise DemoError(
            f"port {port} cannot be used ({error.strerror}): choose another, as in PORT={port + 1} make serve, "
            f"or end what listens there (ss -ltnp 'sport = :{port}')."
        ) from None
    return reserved


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise DemoError(f"PORT={text} is not a TCP port: give a number from 1 to 65535.")
    return int(text)


def _model(text: str) -> str:
    """Return an absolute path, or the name of a model that is in the local Hugging Face cache."""
    path = Path(text).expanduser()
    if (path / "config.json").is_file():
        return str(path.resolve())
    if path.is_dir():
        raise DemoError(f"MODEL={text} holds no config.json: give a folder in the Hugging Face format.")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(text, "config.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise DemoError(
            f"MODEL={text} does not exist: give the path of a model folder, or the name of a model that was "
            "downloaded before (hf download NAME). Without MODEL a small model of this repository is served."
        )
    return text
