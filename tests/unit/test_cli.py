"""The command line itself; each command's own tests stand elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vllm_ray_ascend import __version__
from vllm_ray_ascend.cli.main import command_names, main
from vllm_ray_ascend.settings import VARIABLES

pytestmark = pytest.mark.unit


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"vllm-ray-ascend {__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert command_names() and all(name in shown for name in command_names())


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["env", "--no-such-option"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: vllm-ray-ascend" in capsys.readouterr().err


def test_the_software_npu_has_a_command_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["softnpu", "exec", "--", "python", "-c", "print(1)"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "softnpu exec -- python -c 'print(1)'" in line and "ascend-softnpu" in line


def test_a_closed_pipe_is_not_reported() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vllm_ray_ascend.cli.main", "env"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


def test_env_lists_every_switch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert main(["env", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [switch["variable"] for switch in listed] == list(VARIABLES)
    assert all(switch["value"] == switch["default"] for switch in listed)


def test_env_rejects_a_bad_value(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_RAY_ASCEND_EXECUTOR", "mp")
    assert main(["env"]) == 2
    assert "VLLM_RAY_ASCEND_EXECUTOR='mp'" in capsys.readouterr().err


def test_env_reports_a_misspelled_switch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_RAY_ASCEND_EXECUTER", "ours")
    assert main(["env"]) == 1
    assert "VRA-142: VLLM_RAY_ASCEND_EXECUTER is set, but is not a switch" in capsys.readouterr().err


def test_env_lists_variables_and_their_scopes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HCCL_IF_IP", "10.0.0.1")
    monkeypatch.setenv("HCCL_NEW_SETTING", "7")
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    monkeypatch.setenv("ATB_STORE", "http://me:sesame@store:80")
    monkeypatch.delenv("HCCL_EXEC_TIMEOUT", raising=False)
    assert main(["env", "--variables", "--json"]) == 0
    shown = capsys.readouterr().out
    assert "sesame" not in shown
    found = {entry["variable"]: (entry["scope"], entry["value"]) for entry in json.loads(shown)}
    assert found["HCCL_IF_IP"] == ("node", "10.0.0.1")
    assert found["HCCL_NEW_SETTING"] == ("copied", "7")
    assert found["HCCL_EXEC_TIMEOUT"] == ("copied", None)
    assert found["VLLM_API_KEY"] == ("secret", "***")
    assert found["ATB_STORE"] == ("copied", "http://***@store:80")
    assert "PATH" not in found


def test_env_lists_variables_as_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HCCL_IF_IP", "10.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "sesame")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert main(["env", "--variables"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  HCCL_IF_IP=10.0.0.1" in lines and "  GLOO_SOCKET_IFNAME   (not set)" in lines
    assert lines.index("  HF_TOKEN=***") > lines.index("Secret: never shown.")
