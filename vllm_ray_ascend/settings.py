"""Every VLLM_RAY_ASCEND* switch: its type, default and meaning. Nothing else in the package reads these variables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

from vllm_ray_ascend.errors import SettingError

PREFIX = "VLLM_RAY_ASCEND"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The switches of one process. Field ``x`` is the variable ``VLLM_RAY_ASCEND_X``; ``active`` is VLLM_RAY_ASCEND."""

    active: Annotated[
        Literal["auto", "0", "1"],
        Meta(description="auto: on where vllm-ascend is the platform; 0: off; 1: on CUDA too, and an error elsewhere"),
    ] = "auto"
    executor: Annotated[
        Literal["ours", "upstream", "compiled_graph"],
        Meta(
            description="which executor --distributed-executor-backend ray means: ours, vLLM's RayExecutorV2, or ours "
            "with steps as a Ray compiled graph"
        ),
    ] = "ours"
    npu_wait_s: Annotated[
        float,
        Meta(ge=0, description="seconds to wait for NPUs that are late or still held; 0 refuses at once"),
    ] = 10.0
    worker_limit_s: Annotated[
        float,
        Meta(ge=0, description="seconds for all worker processes of an engine to be there; 0: no limit"),
    ] = 300.0
    device_limit_s: Annotated[
        float,
        Meta(ge=0, description="seconds for opening the NPUs and for connecting HCCL's groups; 0: no limit"),
    ] = 600.0
    load_limit_s: Annotated[
        float,
        Meta(ge=0, description="seconds for loading the model; 0: no limit"),
    ] = 7200.0
    warm_up_limit_s: Annotated[
        float,
        Meta(ge=0, description="seconds for each part of the start after that, such as graph capture; 0: no limit"),
    ] = 3600.0
    hang_s: Annotated[
        float,
        Meta(ge=0, description="seconds that a step may take; 0: 0.8 x VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"),
    ] = 0.0
    silence_s: Annotated[
        float,
        Meta(ge=1, description="seconds without an answer after which a node is lost; a process's end is seen at once"),
    ] = 30.0
    stop_grace_s: Annotated[
        float,
        Meta(ge=0, description="seconds for an orderly end of workers, then they are killed; vLLM gives 5 in all"),
    ] = 3.0
    transfer_limit_s: Annotated[
        float,
        Meta(ge=0, description="seconds for a tensor between NPUs; 0: 120, or 0.8 x HCCL_EXEC_TIMEOUT if shorter"),
    ] = 0.0
    recover: Annotated[
        Literal["0", "1"],
        Meta(description="1: an engine whose worker died or hung restarts its workers and serves on; 0: it ends"),
    ] = "0"
    node_env: Annotated[
        Literal["derive", "off"],
        Meta(description="derive: set HCCL's and gloo's interface, address and ports on each node, where nobody did"),
    ] = "derive"
    graph_step_down: Annotated[
        Literal["on", "off"],
        Meta(description="on: where NPU streams or memory do not suffice, capture fewer graphs; off: that is an error"),
    ] = "on"
    graph_budget: Annotated[
        Literal["off", "warn", "fit"],
        Meta(description="estimate the streams of graphs before the capture: warn of too many, or trim the sizes"),
    ] = "off"
    graph_streams: Annotated[
        int,
        Meta(ge=0, description="streams that graph_budget may count on; 0 asks the driver, or takes 1800"),
    ] = 0
    graph_sleep: Annotated[
        Literal["release", "keep"],
        Meta(description="release graphs when the engine sleeps and capture anew on waking, or keep them"),
    ] = "release"
    direct_idle_s: Annotated[
        float,
        Meta(ge=0, description="seconds after which a pair of actors gives its unused communicator back; 0: never"),
    ] = 300.0


class Switch(NamedTuple):
    """One switch as `vllm-ray-ascend env` lists it."""

    variable: str
    value: str
    default: str
    accepted: str
    meaning: str


def variable_of(field: str) -> str:
    """Name of the variable that holds ``field``."""
    return PREFIX if field == "active" else f"{PREFIX}_{field.upper()}"


VARIABLES: Mapping[str, str] = {variable_of(field): field for field in Settings.__struct_fields__}


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from ``environ`` (default: this process's). An empty value counts as unset.

    Raises SettingError, naming the variable, its value and the accepted ones.
    """
    environ = os.environ if environ is None else environ
    return Settings(**{field: _parse(name, text) for name, field in VARIABLES.items() if (text := environ.get(name))})


def is_off(environ: Mapping[str, str] | None = None) -> bool:
    """Whether VLLM_RAY_ASCEND=0. Never raises: vLLM swallows what a platform plugin raises; `load` tells bad values."""
    return (os.environ if environ is None else environ).get(PREFIX) == "0"


def switches(environ: Mapping[str, str] | None = None) -> list[Switch]:
    """All switches with their values in ``environ``. Raises SettingError as `load` does."""
    values, defaults = load(environ), Settings()
    return [
        Switch(name, _text(values, field), _text(defaults, field), _accepted(field), _meta(field).description or "")
        for name, field in VARIABLES.items()
    ]


def unknown(names: Iterable[str]) -> list[str]:
    """Variables with our prefix that are no switch: spelling mistakes."""
    return sorted(name for name in names if name.startswith(PREFIX) and name not in VARIABLES)


def _parse(variable: str, text: str) -> Any:
    field = VARIABLES[variable]
    try:
        return msgspec.convert(text, _annotation(field), strict=False)
    except msgspec.ValidationError as error:
        remedy = f"Accepted: {_accepted(field)}. Unset {variable} for the default, {_text(Settings(), field)!r}."
        raise SettingError(f"{variable}={text!r} is not a value of this switch. {remedy}") from error


def _annotation(field: str) -> Any:
    return next(f.type for f in msgspec.structs.fields(Settings) if f.name == field)


def _meta(field: str) -> Meta:
    meta: Meta = get_args(_annotation(field))[1]
    return meta


def _accepted(field: str) -> str:
    kind = get_args(_annotation(field))[0]
    return ", ".join(get_args(kind)) or f"a number, {_meta(field).ge} or more"


def _text(settings: Settings, field: str) -> str:
    return format(getattr(settings, field), "")
