"""The support bundle: what of a node's files is in it, and that no secret is."""

from __future__ import annotations

import argparse
import json
import os
import stat
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.cli.bundle import _folder_names, _write_archive, add_parser
from vllm_ray_ascend.doctor.bundle import collect_from, decode_files, plog_folder
from vllm_ray_ascend.environment.redact import HIDDEN, redact_text, secrets_of
from vllm_ray_ascend.errors import DoctorError

pytestmark = pytest.mark.unit

PLANTED = "Pl4nted-s3cret"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HF_TOKEN=hf_abc", "HF_TOKEN=***"),
        ('{"HF_TOKEN": "hf_abc", "size": 3}', '{"HF_TOKEN": ***, "size": 3}'),
        ("loaded with hf_abcdefghijklmnop from the hub", "loaded with *** from the hub"),
        ("key sk-abcdefghijklmnop1234, ghp_abcdefghijklmnop1234", "key ***, ***"),
        ("get https://me:pw@host/x and http://other/", "get https://***@host/x and http://other/"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: ***"),
        ("header 'Bearer abcdef123456' sent", "header 'Bearer ***' sent"),
        ("vllm serve m --api-key abc --port 8000", "vllm serve m --api-key *** --port 8000"),
        ("a\n-----BEGIN RSA PRIVATE KEY-----\nMIIabc\nxyz==\n-----END RSA PRIVATE KEY-----\nb", "a\n***\nb"),
        ("-----BEGIN PRIVATE KEY-----\nMIIabc\ncut off", "***"),
        ("jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl end", "jwt *** end"),
        ("aws AKIAIOSFODNN7EXAMPLE", "aws ***"),
        ("max_tokens: 512, node 10.0.0.1, me@example.org", "max_tokens: 512, node 10.0.0.1, me@example.org"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, expected: str) -> None:
    assert redact_text(text) == expected


def test_known_secrets_are_hidden_wherever_they_stand() -> None:
    environ = {
        "HF_TOKEN": PLANTED,
        "http_proxy": "http://me:pr0xy-pass@proxy:3128",
        "DB_PASSWORD": "1",
        "HCCL_IF_IP": "10.0.0.1",
    }
    secrets = secrets_of(environ)
    assert secrets == {PLANTED, "me:pr0xy-pass", "pr0xy-pass"}
    assert redact_text(f"x{PLANTED}y pr0xy-pass 1", secrets) == f"x{HIDDEN}y {HIDDEN} 1"


@given(st.text(), st.text("abcdef0123456789-_", min_size=8))
def test_a_known_secret_is_never_left(before: str, secret: str) -> None:
    hidden = redact_text(f"{before}{secret}{before}", {secret})
    assert secret not in hidden.replace(before, "") or secret in before


def make_node(folder: Path) -> tuple[Path, Path]:
    """Return Ray's and CANN's folders of logs, with secrets in them."""
    logs, plog = folder / "logs", folder / "ascend" / "log"
    (logs / "vllm_ray_ascend").mkdir(parents=True)
    (plog / "run" / "plog").mkdir(parents=True)
    (logs / "worker-a-01000000-4700.err").write_text(f"line\nopened with {PLANTED}\nurl http://me:{PLANTED}@host/\n")
    (logs / "raylet.out").write_text("a raylet\n")
    (logs / "other.log").write_text("of nobody\n")
    (logs / "worker-link").symlink_to("/etc/passwd")
    record = {"code": "VRA-322", "ranks": [{"rank": 0, "pid": 4700}]}
    (logs / "vllm_ray_ascend" / "failure-1.000.json").write_text(json.dumps(record, indent=2))
    for pid in (4700, 4800, 4900):
        (plog / "run" / "plog" / f"plog-{pid}_20260101000000.log").write_text(f"[ERROR] HCCL({pid}) {PLANTED}\n")
    return logs, plog


def test_logs_records_and_plog_of_our_processes_are_collected_without_secrets(tmp_path: Path) -> None:
    logs, plog = make_node(tmp_path)
    texts = decode_files(collect_from(logs, plog, {PLANTED}, 1 << 20, [4800]))
    assert sorted(texts) == [
        "failures/failure-1.000.json",
        "plog/run/plog/plog-4700_20260101000000.log",
        "plog/run/plog/plog-4800_20260101000000.log",
        "ray/raylet.out",
        "ray/worker-a-01000000-4700.err",
    ]
    assert not any(PLANTED in text for text in texts.values())
    assert "opened with ***" in texts["ray/worker-a-01000000-4700.err"]
    assert json.loads(texts["failures/failure-1.000.json"])["code"] == "VRA-322"


def test_the_ends_of_the_newest_files_are_taken_with_whole_lines(tmp_path: Path) -> None:
    (tmp_path / "worker-old.err").write_text("".join(f"old {number}\n" for number in range(1000)))
    (tmp_path / "worker-new.err").write_text("".join(f"new {number}\n" for number in range(100)))
    os.utime(tmp_path / "worker-old.err", (1, 1))
    texts = decode_files(collect_from(tmp_path, tmp_path / "none", (), 1000))
    assert texts["ray/worker-new.err"].startswith("new 0\n")
    old = texts["ray/worker-old.err"]
    assert old.startswith("old ") and old.endswith("old 999\n") and len(old) < 1000 - len(texts["ray/worker-new.err"])


def test_nothing_to_collect_is_no_error(tmp_path: Path) -> None:
    assert collect_from(tmp_path / "gone", tmp_path / "gone", (), 1000) == {}


def test_plog_is_where_cann_writes_it() -> None:
    assert plog_folder({"ASCEND_PROCESS_LOG_PATH": "/logs"}) == Path("/logs")
    assert plog_folder({"HOME": "/home/me"}) == Path("/home/me/ascend/log")


def test_the_archive_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    _write_archive(path, {"README.txt": "hello", "nodes/10.0.0.1/ray/raylet.out": "x"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["bundle/README.txt", "bundle/nodes/10.0.0.1/ray/raylet.out"]
    with pytest.raises(DoctorError) as raised:
        _write_archive(tmp_path / "gone" / "bundle.tar.gz", {})
    assert raised.value.code == "VRA-607"


def test_nodes_with_one_address_have_a_folder_each() -> None:
    assert _folder_names({"aaaaaaaaaa": "10.0.0.1", "bbbbbbbbbb": "10.0.0.2"}) == {
        "aaaaaaaaaa": "10.0.0.1",
        "bbbbbbbbbb": "10.0.0.2",
    }
    assert _folder_names({"aaaaaaaaaa": "10.0.0.1", "bbbbbbbbbb": "10.0.0.1"}) == {
        "aaaaaaaaaa": "10.0.0.1-aaaaaaaa",
        "bbbbbbbbbb": "10.0.0.1-bbbbbbbb",
    }


def test_the_command_s_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["bundle", "--nodes", "a,b"])
    assert (args.nodes, args.megabytes, args.local, args.output) == (["a", "b"], 5, False, None)
