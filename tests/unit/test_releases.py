"""Released sources from an index: a small one of our own on this machine, which knows no ranges."""

from __future__ import annotations

import functools
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ci import releases

pytestmark = pytest.mark.unit

FILES = {"a_project/__init__.py": "", "a_project/one.py": "ONE = 1\n", "a_project/data.txt": "no source\n"}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield an index with a wheel of a-project 1.0, and version 2.0 as an archive only."""
    page = tmp_path / "web" / "simple" / "a-project"
    page.mkdir(parents=True)
    with zipfile.ZipFile(page / "a_project-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in FILES.items():
            wheel.writestr(name, text)
    with tarfile.open(page / "a_project-2.0.tar.gz", "w:gz") as archive:
        for name, text in FILES.items():
            member = tarfile.TarInfo(f"a_project-2.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    names = sorted(path.name for path in page.iterdir())
    (page / "index.html").write_text("".join(f'<a href="{name}">{name}</a>' for name in names))
    handler = functools.partial(_Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = {"index-url": f"http://127.0.0.1:{server.server_port}/simple/"}
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(releases, "_pip_settings", lambda: settings)
        releases._finder.cache_clear()
        yield page
        server.shutdown()
    releases._finder.cache_clear()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_sources_are_had_from_wheels_and_archives(index: Path, version: str) -> None:
    sources = releases.fetch("a-project", version, ["a_project/one.py", "a_project/gone.py"])
    assert sources.names == {"a_project/__init__.py", "a_project/one.py"}
    assert sources.text("a_project/one.py") == "ONE = 1\n"
    assert sources.text("a_project/gone.py") is None
    for path in index.iterdir():
        path.unlink()
    again = releases.fetch("a-project", version, ["a_project/one.py", "a_project/gone.py"])
    assert again == sources, "what was read once is kept"


def test_all_versions_are_known(index: Path) -> None:
    assert releases.released("a-project") == ["1.0", "2.0"]


def test_a_release_that_there_is_not(index: Path) -> None:
    with pytest.raises(releases.ReleaseError, match=r"no a-project 3\.0: correct its line"):
        releases.fetch("a-project", "3.0", [])


def test_the_index_is_that_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple/")
    releases._pip_settings.cache_clear()
    assert releases._pip_settings()["index-url"] == "http://127.0.0.1:1/simple/"
    releases._pip_settings.cache_clear()
