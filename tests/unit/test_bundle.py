"""The support bundle: what of a node's files is in it, and that no secret is."""

from __future__ import annotations

import argparse
import json
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.cli.bundle import (
    _attempt,
    _common_files,
    _folder_names,
    _part,
    _pids_on,
    _redact,
    _topology_files,
    _write_archive,
    add_parser,
)
from vllm_ray_ascend.cluster.topology import Topology
from vllm_ray_ascend.doctor import bundle
from vllm_ray_ascend.doctor.bundle import collect_from, decode_files, plog_folder
from vllm_ray_ascend.doctor.records import Snapshot
from vllm_ray_ascend.environment.redact import HIDDEN, hide_known, redact_json, redact_text, secrets_of
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
        # JSON in strings of JSON, at any depth
        (r'{"cause": "of {\"token\": \"abc\"}"}', r'{"cause": "of {\"token\": ***}"}'),
        (r'"{\"b\": \"{\\\"token\\\": \\\"abc\\\"}\"}"', r'"{\"b\": \"{\\\"token\\\": ***}\"}"'),
        (r"token=\"abc\" next", "token=*** next"),
        ('{"password": "a\\"b", "size": 3}', '{"password": ***, "size": 3}'),
        # brackets, calls, prefixes of strings
        ("api_key: ['a','b'] next", "api_key: *** next"),
        ("api_keys = [\n  'a',\n  'b'\n]\nnext", "api_keys = ***\nnext"),
        ("api_key=SecretStr('x') next", "api_key=*** next"),
        ("token=b'x' next", "token=*** next"),
        ("api_key: ['a\nnext", "api_key: ***\nnext"),
        ("password='a b'c next", "password=*** next"),
        ("password: don't next", "password: *** next"),
        ("password: 'never closed\nnext", "password: ***\nnext"),
        ("os.environ['HF_TOKEN'] = 'x'", "os.environ['HF_TOKEN'] = ***"),
        ("['serve', '--api-key', 'abc', '--port', '1']", "['serve', '--api-key', ***, '--port', '1']"),
        ("(b'x-api-key', b'abc')", "(b'x-api-key', ***)"),
        ('{"mode": "token", "size": 3}', '{"mode": "token", "size": 3}'),
        # other names
        ("OPENAI_KEY=x next", "OPENAI_KEY=*** next"),
        ("pwd=x next", "pwd=*** next"),
        ('{"auths": {"r": {"auth": "dXNlcg=="}}}', '{"auths": {"r": {"auth": ***}}}'),
        ("get /a?X-Amz-Signature=x&b=1&sig=y", "get /a?X-Amz-Signature=***&b=1&sig=***"),
        ("get /a?key=x&b=1", "get /a?key=***&b=1"),
        ("curl -u me:pw http://host", "curl -u *** http://host"),
        ("curl --user='me:pw' http://host", "curl --user='***' http://host"),
        ("function signature mismatch, PWD is /root", "function signature mismatch, PWD is /root"),
        # values that are names, headers with several values
        ("password: token abc next", "password: *** next"),
        ("Cookie: a=b; c=d\nnext", "Cookie: ***\nnext"),
        ('Authorization: Digest username="me", response="abc"\nnext', "Authorization: ***\nnext"),
        ("RAY_AUTH_MODE=token\nRAY_ADDRESS=auto", "RAY_AUTH_MODE=token\nRAY_ADDRESS=auto"),
        ("http://me:p@ss@host/x", "http://***@host/x"),
        # the end of a private key
        ("MIIabc\nxyz==\n-----END RSA PRIVATE KEY-----\nb", "***\nb"),
        ("no end -----END CERTIFICATE----- here", "no end -----END CERTIFICATE----- here"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, expected: str) -> None:
    assert redact_text(text) == expected


def test_of_a_log_with_the_end_of_a_key_the_rest_is_kept() -> None:
    log = "line\n" * 10000
    redacted = redact_text(f"{log}MIIabc\n-----END PRIVATE KEY-----\nnext")
    assert "MIIabc" not in redacted and redacted.endswith("***\nnext") and len(redacted) > len(log) // 2


@given(st.text("token=[({'\"\\ \n,:]})b-u", max_size=60))
def test_any_text_can_be_redacted_twice(text: str) -> None:
    assert isinstance(redact_text(redact_text(text)), str)


SECRETIVE = st.recursive(
    st.just(PLANTED) | st.text(max_size=5) | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(SECRETIVE, st.integers(0, 3))
def test_what_a_key_of_json_hides_is_hidden_at_any_depth(value: Any, depth: int) -> None:
    """As a value of JSON, and as JSON in a string of it."""
    text = json.dumps({"cause": "x", "api_key": value})
    for _ in range(depth):
        text = json.dumps({"cause": f"of {text}", "rank": 0})
    assert PLANTED not in redact_json(text) and PLANTED not in redact_text(text)
    assert PLANTED not in redact_text(repr({"cause": "x", "api_key": value, "rank": 0}))


def test_json_stays_json() -> None:
    text = json.dumps({"cause": 'of {"token": "abc"}', "token": {"a": 1}, "pids": [47001], "none": None, "port": 8000})
    assert json.loads(redact_json(text, {"47001"})) == {
        "cause": 'of {"token": ***}',
        "token": "***",
        "pids": ["***"],
        "none": None,
        "port": 8000,
    }
    assert redact_json('cut off", "token": "abc"}') == 'cut off", "token": ***}'


def test_a_known_secret_is_hidden_as_json_writes_it() -> None:
    assert hide_known(json.dumps({"cause": 'a"b\\c'}), {'a"b\\c'}) == '{"cause": "***"}'


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
    cause = f'asked for {{"api_key": "{PLANTED}-2"}}'
    record = {"code": "VRA-322", "cause": cause, "ranks": [{"rank": 0, "pid": 4700}]}
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
    assert json.loads(texts["failures/failure-1.000.json"]) == {
        "code": "VRA-322",
        "cause": 'asked for {"api_key": ***}',
        "ranks": [{"rank": 0, "pid": 4700}],
    }


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


def test_secrets_of_ray_and_of_this_process_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable may differ: a job's runtime_env sets it."""
    (tmp_path / "worker-a.err").write_text("took of-the-job, of-the-node\n")
    monkeypatch.setenv("HF_TOKEN", "of-the-job")
    monkeypatch.setattr(bundle, "raylet_environment", lambda: {"HF_TOKEN": "of-the-node"})
    monkeypatch.setattr(bundle, "session_log_folder", lambda: tmp_path)
    assert decode_files(bundle.collect_files(1000)) == {"ray/worker-a.err": "took ***, ***\n"}


def test_what_nodes_have_redacted_is_not_searched_again() -> None:
    """Patterns take seconds for the logs of many nodes; what is known costs nothing."""
    assert _redact("nodes/10.0.0.1/ray/raylet.out", "token: abc, of-this-process", {"of-this-process"}) == (
        "token: abc, ***"
    )
    assert _redact("environment.txt", "A=--token abc", set()) == "A=--token ***"
    assert _redact("doctor.json", '{"text": "--token abc"}', set()) == '{\n  "text": "--token ***"\n}\n'


def test_a_part_that_fails_does_not_cost_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Topology:
        raise RuntimeError("Ray's table is gone")

    topology = _attempt(fail)
    files = _part("topology.txt", topology, _topology_files)
    assert list(files) == ["topology.txt"] and "RuntimeError: Ray's table is gone" in files["topology.txt"]
    assert _pids_on(topology, "a") == []
    monkeypatch.setenv("VLLM_RAY_ASCEND_STOP_GRACE_S", "soon")
    snapshot = Snapshot(version="0.1.0", time=0.0, level="full", nodes=[])
    common = _common_files(snapshot)
    assert "VLLM_RAY_ASCEND_STOP_GRACE_S" in common["environment.txt"] and {"doctor.txt", "doctor.json"} <= set(common)


def test_bytes_that_are_no_text_are_written(tmp_path: Path) -> None:
    _write_archive(tmp_path / "bundle.tar.gz", {"environment.txt": os.fsdecode(b"A=\xff")})
    with tarfile.open(tmp_path / "bundle.tar.gz") as archive:
        file = archive.extractfile("bundle/environment.txt")
        assert file is not None and file.read() == b"A=?"


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
