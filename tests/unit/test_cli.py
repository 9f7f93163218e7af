"""The command line itself; each command's own tests stand elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vllm_ray_ascend import __version__
from vllm_ray_ascend.cli.main import commands, main
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
    assert commands() and all(name in shown for name in commands())


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["env", "--no-such-option"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: vllm-ray-ascend" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error_to_complain_of() -> None:
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


def test_env_refuses_a_bad_value(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_RAY_ASCEND_EXECUTOR", "mp")
    assert main(["env"]) == 2
    assert "VLLM_RAY_ASCEND_EXECUTOR='mp'" in capsys.readouterr().err


def test_env_tells_a_misspelt_switch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_RAY_ASCEND_EXECUTER", "ours")
    assert main(["env"]) == 1
    assert "VLLM_RAY_ASCEND_EXECUTER is set, but is no switch" in capsys.readouterr().err
