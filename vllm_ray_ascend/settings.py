"""Every VLLM_RAY_ASCEND* switch: its type, default and meaning. Nothing else in the package reads these variables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

from vllm_ray_ascend.errors import SettingError

PREFIX = "VLLM_RAY_ASCEND"
_HOUR_S = 3600
_DAY_S = 24 * _HOUR_S
WEEK_S = 7 * _DAY_S
"""Upper bounds: every wait of the system that is given such a number accepts it (TCP's keepalive up to a day)."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The switches of one process. Field ``x`` is the variable ``VLLM_RAY_ASCEND_X``; ``active`` is VLLM_RAY_ASCEND."""

    active: Annotated[
        Literal["auto", "0", "1"],
        Meta(
            description="auto: on where vllm-ascend is the platform; 0: off; 1: on NPUs and on CUDA, an error elsewhere"
        ),
    ] = "auto"
    executor: Annotated[
        Literal["ours", "upstream", "compiled_graph"],
        Meta(
            description="executor of --distributed-executor-backend ray: ours; upstream: vLLM's RayExecutorV2; "
            "compiled_graph: ours with steps as a Ray compiled graph"
        ),
    ] = "ours"
    npu_wait_s: Annotated[
        float,
        Meta(
            ge=0,
            le=WEEK_S,
            description="seconds to wait for NPUs that are missing or still in use; unset with an autoscaler: 1800; "
            "0: fail immediately",
        ),
    ] = 10.0
    worker_limit_s: Annotated[
        float,
        Meta(ge=0, le=WEEK_S, description="seconds until all worker processes of an engine have started; 0: no limit"),
    ] = 300.0
    device_limit_s: Annotated[
        float,
        Meta(ge=0, le=WEEK_S, description="seconds to open the NPUs and to connect the HCCL groups; 0: no limit"),
    ] = 600.0
    load_limit_s: Annotated[
        float,
        Meta(ge=0, le=WEEK_S, description="seconds to load the model; 0: no limit"),
    ] = 7200.0
    warm_up_limit_s: Annotated[
        float,
        Meta(
            ge=0,
            le=WEEK_S,
            description="seconds for each later phase of the start, such as graph capture; 0: no limit",
        ),
    ] = 3600.0
    hang_s: Annotated[
        float,
        Meta(
            ge=0,
            le=WEEK_S,
            description="seconds after which a step counts as hung; 0: 0.8 x VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS",
        ),
    ] = 0.0
    silence_s: Annotated[
        float,
        Meta(
            ge=1,
            le=_DAY_S,
            description="seconds without an answer until a node counts as lost; a process exit is detected immediately",
        ),
    ] = 30.0
    stop_grace_s: Annotated[
        float,
        Meta(
            ge=0,
            le=_HOUR_S,
            description="seconds for an orderly shutdown of workers, one more for each 128 ranks; then they are killed",
        ),
    ] = 3.0
    transfer_limit_s: Annotated[
        float,
        Meta(
            ge=0,
            le=_DAY_S,
            description="seconds for a tensor transfer between NPUs; 0: 120, or 0.8 x HCCL_EXEC_TIMEOUT if shorter",
        ),
    ] = 0.0
    recover: Annotated[
        Literal["0", "1"],
        Meta(
            description="1: an engine whose worker died or hung restarts its workers and keeps serving, and lost data "
            "parallel ranks are restarted while the others serve; 0: it ends"
        ),
    ] = "0"
    degraded_health: Annotated[
        Literal["200", "503"],
        Meta(description="what /health answers while some data parallel ranks are down (with all of them down: 503)"),
    ] = "200"
    elastic_ep: Annotated[
        Literal["0", "1"],
        Meta(description="experimental. 1: MoE engines with --enable-elastic-ep change their size while they serve"),
    ] = "0"
    node_env: Annotated[
        Literal["derive", "off"],
        Meta(
            description="derive: set HCCL's and gloo's unset interface, address and ports on each node; off: set none"
        ),
    ] = "derive"
    graph_step_down: Annotated[
        Literal["on", "off"],
        Meta(description="on: capture fewer graphs where NPU streams or memory are too few; off: raise an error"),
    ] = "on"
    graph_sleep: Annotated[
        Literal["release", "keep"],
        Meta(
            description="release: release graphs when the engine sleeps and capture them again on wake; keep: keep them"
        ),
    ] = "release"
    metrics: Annotated[
        Literal["on", "off"],
        Meta(description="on: metrics of the engine in vLLM's /metrics and in Ray's (unless --disable-log-stats)"),
    ] = "on"
    events: Annotated[
        Literal["text", "json"],
        Meta(description="log lines of failures, restarts and graph fallbacks: text, or one JSON object each"),
    ] = "text"
    direct_idle_s: Annotated[
        float,
        Meta(
            ge=0,
            le=WEEK_S,
            description="seconds after which a pair of actors destroys its unused communicator; 0: never",
        ),
    ] = 300.0


class Switch(NamedTuple):
    """One switch as `vllm-ray-ascend env` lists it."""

    variable: str
    value: str
    default: str
    accepted: str
    meaning: str


def variable_of(field: str) -> str:
    """Return the name of the variable that holds ``field``."""
    return PREFIX if field == "active" else f"{PREFIX}_{field.upper()}"


VARIABLES: Mapping[str, str] = {variable_of(field): field for field in Settings.__struct_fields__}


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings in ``environ`` (default: this process's). An empty value counts as unset.

    Raises SettingError, naming the variable, its value and the accepted ones.
    """
    environ = os.environ if environ is None else environ
    return Settings(
        **{field: _parse_value(name, text) for name, field in VARIABLES.items() if (text := environ.get(name))}
    )


def is_set(field: str, environ: Mapping[str, str] | None = None) -> bool:
    """Return whether the variable of ``field`` has a value, so that its default does not apply."""
    return bool((os.environ if environ is None else environ).get(variable_of(field)))


def is_off(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether VLLM_RAY_ASCEND=0. Never raises, since vLLM ignores what a platform plugin raises; `load` does."""
    return (os.environ if environ is None else environ).get(PREFIX) == "0"


def list_switches(environ: Mapping[str, str] | None = None) -> list[Switch]:
    """Return all switches with their values in ``environ``. Raises SettingError as `load` does."""
    values, defaults = load(environ), Settings()
    return [
        Switch(
            name,
            _format_value(values, field),
            _format_value(defaults, field),
            _accepted_values(field),
            _metadata(field).description or "",
        )
        for name, field in VARIABLES.items()
    ]


def unknown_variables(names: Iterable[str]) -> list[str]:
    """Return the variables with our prefix that are not switches: misspelled ones."""
    return sorted(name for name in names if name.startswith(PREFIX) and name not in VARIABLES)


def _parse_value(variable: str, text: str) -> Any:
    field = VARIABLES[variable]
    try:
        return msgspec.convert(text, _annotation(field), strict=False)
    except msgspec.ValidationError as error:
        raise SettingError(
            "VRA-141",
            f"{variable}={text!r} is not a value of this switch. Accepted: {_accepted_values(field)}. Unset {variable} "
            f"for the default, {_format_value(Settings(), field)!r}.",
        ) from error


def _annotation(field: str) -> Any:
    return next(f.type for f in msgspec.structs.fields(Settings) if f.name == field)


def _metadata(field: str) -> Meta:
    meta: Meta = get_args(_annotation(field))[1]
    return meta


def _accepted_values(field: str) -> str:
    kind = get_args(_annotation(field))[0]
    return ", ".join(get_args(kind)) or f"a number from {_metadata(field).ge} to {_metadata(field).le}"


def _format_value(settings: Settings, field: str) -> str:
    return format(getattr(settings, field), "")
