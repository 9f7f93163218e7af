"""The command, its text and JSON, what it saves and compares; over recorded machines instead of a cluster."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import msgspec
import pytest
from msgspec.structs import replace

from ci.doctor_schema import PATH, make_schema
from tests.doctor.machine import Machine
from vllm_ray_ascend.cli.doctor import _demand, _parse_path, read_snapshot
from vllm_ray_ascend.cli.main import main
from vllm_ray_ascend.doctor.checks import CHECKS
from vllm_ray_ascend.doctor.checks.model import MODEL
from vllm_ray_ascend.doctor.checks.network import PING
from vllm_ray_ascend.doctor.compare import changes_between
from vllm_ray_ascend.doctor.judge import checks_of_full_level, choose_checks, make_report
from vllm_ray_ascend.doctor.queries import model_command
from vllm_ray_ascend.doctor.records import Failure, NodeRecord, Report, Snapshot
from vllm_ray_ascend.doctor.text import format_report
from vllm_ray_ascend.errors import DoctorError

pytestmark = pytest.mark.unit


def snapshot(*names: str, failures: tuple[Failure, ...] = ()) -> Snapshot:
    """Return the snapshot of a cluster with these machines as its nodes."""
    records = [Machine(name, host=host).record() for host, name in enumerate(names, 1)]
    return Snapshot(
        version="0.1.0", time=0.0, level="full", head_address="10.0.0.1:6379", nodes=records, failures=list(failures)
    )


def report(*names: str, before: Snapshot | None = None) -> Report:
    return make_report(snapshot(*names), choose_checks("full"), before)


def text(made: Report, colours: bool = False) -> str:
    return "\n".join(format_report(made, colours=colours))


def test_a_healthy_cluster_is_one_screen() -> None:
    lines = text(report("a2", "a2")).splitlines()
    assert lines == [
        f"vllm-ray-ascend 0.1.0 doctor: 2 nodes, 16 NPUs, {len(CHECKS) - 1} checks (full)",
        "  10.0.0.1 (node-1): 8 NPUs Ascend 910B3, driver 25.5.1, CANN 8.5.1: ok",
        "  10.0.0.2 (node-2): 8 NPUs Ascend 910B3, driver 25.5.1, CANN 8.5.1: ok",
        "",
        "OK",
    ]


def test_findings_name_node_npu_and_remedy() -> None:
    made = text(report("a2", "link-down"))
    assert "10.0.0.2 (node-2): 8 NPUs Ascend 910B3, driver 25.5.1, CANN 8.5.1: 1 error" in made
    assert "\nERROR VRA-650 [roce-link]\n  10.0.0.2, NPU 3: its RoCE link is down.\n  -> Check the cable" in made
    assert made.endswith("\n\nCRITICAL: 1 error")


def test_what_is_wrong_with_every_npu_is_said_once() -> None:
    made = text(report("a2", "tls-on"))
    assert made.count("VRA-656") == 1 and "10.0.0.2, NPU 0, 1, 2, 3, 4, 5, 6, 7: its RoCE port has TLS" in made
    assert "`for i in 0 1 2 3 4 5 6 7; do sudo hccn_tool -i $i -tls -s enable 0; done` there" in made
    assert made.endswith("CRITICAL: 8 errors")


def test_what_is_no_terminal_gets_whole_lines() -> None:
    lines = list(format_report(report("a2", "tls-on"), is_terminal=False))
    (remedy,) = (line for line in lines if line.startswith("  -> "))
    assert remedy.endswith("where TLS is meant to be on.") and len(remedy) > 110


def test_checks_that_were_not_made_are_said() -> None:
    left_out = checks_of_full_level([check.name for check in choose_checks("quick")])
    assert PING in left_out and not checks_of_full_level([check.name for check in choose_checks("full")])
    *_, last = format_report(report("a2"), not_made=left_out)
    assert last.startswith(f"Not made: {len(left_out)} checks of level full, such as ")


def test_a_node_that_did_not_answer_is_unknown() -> None:
    late = (Failure("10.0.0.9", 8, "no answer within 30 s"),)
    made = make_report(snapshot("a2", failures=late), choose_checks("quick"))
    assert (made.status, made.exit_code, made.unanswered) == ("unknown", 3, ["10.0.0.9"])
    lines = list(format_report(made))
    assert "doctor: 1 of 2 nodes, " in lines[0] and any("--timeout 120" in line for line in lines)


def test_comparisons_that_leave_out_nodes_are_noted() -> None:
    made = make_report(replace(snapshot("a2"), left_out=["10.0.0.2"]), choose_checks("quick", only=["tls"]))
    (note,) = made.findings
    assert (note.code, made.exit_code) == ("VRA-623", 0) and note.text.startswith("tls compare nodes")
    assert "\n\nINFO VRA-623\n  tls compare nodes" in text(made) and text(made).endswith("\n\nOK: 1 note")


def test_no_check_at_all_is_refused() -> None:
    with pytest.raises(DoctorError, match="VRA-622"):
        choose_checks("quick", only=["tls"], skipped=["tls"])


def test_a_missing_tool_is_said_once_for_all_checks() -> None:
    made = text(report("a2", "a2-container"))
    (line,) = re.findall(r"UNKNOWN VRA-601 \[(.*roce-link.*)\]", made)
    assert {"roce-link", "net-health", "tls", "speed"} <= set(line.split(", "))
    assert made.endswith("unknown") and "\nUNKNOWN: " in made


def test_the_worst_comes_first() -> None:
    made = report("ecc", "link-down")
    assert [finding.severity for finding in made.findings] == ["error", "warning"]
    assert (made.status, made.exit_code) == ("critical", 2)


def test_colours_add_nothing_else() -> None:
    made = report("ecc", "link-down")
    assert "\033[31mERROR\033[0m" in text(made, colours=True) and "\033" not in text(made)
    assert re.sub(r"\033\[\d+m", "", text(made, colours=True)) == text(made)


def test_the_published_schema_is_that_of_the_code() -> None:
    assert PATH.read_text() == make_schema(), "python -m ci.doctor_schema writes it"


@pytest.mark.parametrize("name", ["a2", "stranger", "a2-container"])
def test_json_is_valid_by_the_published_schema(name: str) -> None:
    made = json.loads(msgspec.json.encode(report("a2", name, before=snapshot("a2", "other-cann"))))
    jsonschema.validate(made, json.loads(PATH.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**made, "status": "fine"}, json.loads(PATH.read_text()))


def test_a_snapshot_is_saved_and_read(tmp_path: Path) -> None:
    made = snapshot("a2", "a3", failures=(Failure("10.0.0.3", 8, "no answer within 30 s"),))
    (tmp_path / "s.json").write_bytes(msgspec.json.encode(made))
    assert read_snapshot(tmp_path / "s.json") == made
    (tmp_path / "later.json").write_bytes(msgspec.json.encode({**msgspec.to_builtins(made, str_keys=True), "new": 1}))
    assert read_snapshot(tmp_path / "later.json") == made, "of a later version"


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"version": 1}'])
def test_another_file_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DoctorError, match=r"VRA-605: .*s\.json is no snapshot of doctor \("):
        read_snapshot(path)


def test_changes_are_versions_settings_and_what_tools_say() -> None:
    assert changes_between(snapshot("a2", "a2"), snapshot("a2", "a2")) == []
    assert changes_between(snapshot("a2", "a2"), snapshot("a2", "hot")) == [], "temperatures vary"
    (change,) = changes_between(snapshot("a2", "a2"), snapshot("a2", "link-down"))
    assert (change.address, change.what, change.before, change.now) == (
        "10.0.0.2", "hccn_tool -i 3 -link -g", "UP", "DOWN"
    )  # fmt: skip
    (change,) = changes_between(
        snapshot("a2"), edited(lambda each: replace(each, versions={**each.versions, "ray": "2.55.0"}))
    )
    assert (change.what, change.before, change.now) == ("versions.ray", "2.60.0", "2.55.0")
    gone = changes_between(snapshot("a2", "a2"), snapshot("a2", failures=(Failure("10.0.0.2", 8, "no answer"),)))
    assert {each.address for each in gone} == {"10.0.0.2"} and "no answer" in {each.now for each in gone}


def edited(change: Callable[[NodeRecord], NodeRecord]) -> Snapshot:
    made = snapshot("a2")
    return replace(made, nodes=[change(each) for each in made.nodes])


def test_changes_are_part_of_the_report() -> None:
    made = report("a2", "other-cann", before=snapshot("a2", "a2"))
    lines = list(format_report(made, compared_at=0.0))
    assert any(line.startswith("1 change since the snapshot of 19") and line.endswith(":") for line in lines)
    unchanged = report("a2", before=snapshot("a2"))
    assert any(
        line.startswith("0 changes since the snapshot of 19") for line in format_report(unchanged, compared_at=0.0)
    )
    assert any(
        line.startswith("  10.0.0.2: files.cann: package_name=Ascend-cann-toolkit version=8.5.1") for line in lines
    )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stands in the place of a cluster: `doctor` collects these machines."""

    def of(*names: str) -> None:
        monkeypatch.setattr("vllm_ray_ascend.cli.doctor.take_snapshot", lambda *_, **__: snapshot(*names))

    return of


@pytest.mark.parametrize(
    ("names", "code"),
    [(("a2", "a2"), 0), (("a2", "ecc"), 1), (("ecc", "link-down"), 2), (("a2", "no-cann-file"), 3)],
)
def test_exit_codes(
    names: tuple[str, str], code: int, cluster: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster(*names)
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["exit_code"] == code
    assert main(["doctor"]) == code


def test_checks_are_chosen(cluster: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    cluster("ecc", "link-down")
    assert main(["doctor", "--checks", "ecc, clock"]) == 1
    assert main(["doctor", "--skip", "ecc,roce-link"]) == 0
    capsys.readouterr()
    assert main(["doctor", "--skip", "ecc,none-such"]) == 3
    message = capsys.readouterr().err
    assert message.startswith("vllm-ray-ascend: VRA-602: There is no check none-such. The checks: npus-declared, ")


def test_a_defect_is_no_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Ray's control store is gone")

    monkeypatch.setattr("vllm_ray_ascend.cli.doctor.take_snapshot", fail)
    assert main(["doctor"]) == 3
    assert "RuntimeError: Ray's control store is gone" in capsys.readouterr().err


def test_levels() -> None:
    quick, full = choose_checks("quick"), choose_checks("full")
    assert [check.name for check in full] == [name for name in CHECKS if name != MODEL]
    assert {check.level for check in quick} == {"quick"}
    assert 0 < len(quick) < len(full)
    assert [check.name for check in choose_checks("quick", ["speed"])] == ["speed"], "by name: of any level"
    assert {check.name for check in choose_checks("full", skipped=["speed"])} == CHECKS.keys() - {"speed", MODEL}


def test_the_check_of_a_model_is_made_where_a_path_is_given(
    cluster: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert {check.name for check in choose_checks("full", with_model=True)} == CHECKS.keys()
    assert [check.name for check in choose_checks("quick", ["ecc"], with_model=True)] == ["ecc", MODEL]
    assert [check.name for check in choose_checks("quick", ["ecc"], ["model"], with_model=True)] == ["ecc"]
    with pytest.raises(DoctorError, match="VRA-698"):
        choose_checks("quick", [MODEL])
    cluster("a2", "a2")
    assert main(["doctor", "--model", "/models/qwen", "--json"]) == 0
    assert MODEL in json.loads(capsys.readouterr().out)["checks"]
    assert main(["doctor", "--model", "Qwen/Qwen3-8B/"]) == 3
    assert "VRA-697: --model Qwen/Qwen3-8B is no absolute path" in capsys.readouterr().err


def test_a_model_is_looked_at_where_its_check_is_made() -> None:
    made = choose_checks("quick", ["ecc"], with_model=True)
    assert _demand(made, "/models/qwen")[1][-1] == model_command("/models/qwen")
    skipped = choose_checks("quick", ["ecc"], [MODEL], with_model=True)
    assert model_command("/models/qwen") not in _demand(skipped, "/models/qwen")[1]


@pytest.mark.parametrize(
    ("given", "path"), [("/models/qwen/", "/models/qwen"), ("/models//", "/models"), ("/", "/"), ("", "")]
)
def test_a_path_has_no_slash_at_its_end(given: str, path: str) -> None:
    assert _parse_path(given) == path


def test_save_and_compare(cluster: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "before.json"
    cluster("a2", "a2")
    assert main(["doctor", "--save", str(path)]) == 0
    cluster("a2", "link-down")
    capsys.readouterr()
    assert main(["doctor", "--compare", str(path)]) == 2
    assert "  10.0.0.2: hccn_tool -i 3 -link -g: UP -> DOWN" in capsys.readouterr().out
    assert main(["doctor", "--compare", str(tmp_path / "none.json")]) == 3
    assert "VRA-605" in capsys.readouterr().err
    assert main(["doctor", "--save", str(tmp_path)]) == 3
    assert "VRA-606" in capsys.readouterr().err
