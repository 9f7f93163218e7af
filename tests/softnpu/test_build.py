"""Building: once per source and compiler, again for what changed only, and errors that say what is missing."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from softnpu.errors import SoftNpuError

from softnpu import activate, build

AARCH64 = "aarch64-linux-gnu-g++"
AARCH64_MACHINE = 183
"""EM_AARCH64 of elf.h."""


def machine_of(path: Path) -> int:
    """Return e_machine of an ELF file."""
    return int.from_bytes(path.read_bytes()[18:20], sys.byteorder)


def linked_without_torch(library: build.Library, objects: list[Path], folder: Path) -> list[str]:
    """Return the command that links the library, or one that does nothing for one of torch's."""
    return ["true"] if library.torch else _make_link_command(library, objects, folder)


_make_link_command = build.make_link_command


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the files that the compiler makes during the test."""
    made: list[str] = []
    run_compiler = build.run_compiler

    def run_and_record(command: list[str]) -> None:
        run_compiler(command)
        made.append(Path(command[command.index("-o") + 1]).name if "-shared" in command else Path(command[-3]).name)

    monkeypatch.setattr(build, "run_compiler", run_and_record)
    return made


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Make a small software NPU of two sources, with a cache of its own."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    (folder / "two.cpp").write_text('extern "C" int two() { return 2; }\n')
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "LIBRARIES", (build.Library("libsmall.so", ("*.cpp",)),))
    monkeypatch.setenv("SOFTNPU_CACHE", str(tmp_path / "cache"))
    yield folder
    left = {path.name for path in (tmp_path / "cache").glob("tmp*")}
    assert not left, "temporary folders stay in the cache"


def test_these_libraries_are_found_without_compiling(compiled: list[str]) -> None:
    assert build.build_libraries() == Path(os.environ["SOFTNPU_LIB"])
    assert compiled == []


def test_another_clone_compiles_nothing_again(
    sources: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build.build_libraries()
    compiled.clear()
    clone = tmp_path / "clone" / "csrc"
    shutil.copytree(sources, clone)
    monkeypatch.setattr(build, "SOURCES", clone)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "clone" / ".venv"))
    build.build_libraries()
    assert compiled == ["libsmall.so"]


def test_only_what_changed_is_compiled_again(sources: Path, compiled: list[str]) -> None:
    first = build.build_libraries()
    assert sorted(path.name for path in first.iterdir()) == ["libsmall.so"]
    assert sorted(compiled) == ["libsmall.so", "one.cpp", "two.cpp"]
    compiled.clear()
    assert build.build_libraries() == first
    assert compiled == []
    (sources / "two.cpp").write_text('extern "C" int two() { return 22; }\n')
    assert build.build_libraries() != first
    assert compiled == ["two.cpp", "libsmall.so"]
    compiled.clear()
    (sources / "common.h").write_text("// any source may read it\n")
    build.build_libraries()
    assert sorted(compiled) == ["libsmall.so", "one.cpp", "two.cpp"]


def test_processes_that_start_at_once_build_once(sources: Path, compiled: list[str]) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build.build_libraries())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert sorted(compiled) == ["libsmall.so", "one.cpp", "two.cpp"]


def test_key_depends_on_source_and_compiler(sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = [build.compute_cache_key()]
    (sources / "one.cpp").write_text("// changed\n")
    keys.append(build.compute_cache_key())
    other = tmp_path / "other-compiler"
    other.symlink_to(build.find_compiler())
    monkeypatch.setenv("CXX", str(other))
    keys.append(build.compute_cache_key())
    assert len(set(keys)) == 3


def test_source_that_does_not_compile(sources: Path, tmp_path: Path) -> None:
    (sources / "two.cpp").write_text("no C++\n")
    with pytest.raises(SoftNpuError, match=r"(?s)Compiling the software NPU failed.*two\.cpp.*error"):
        build.build_libraries()
    assert not list((tmp_path / "cache").rglob("*.so"))
    assert all(path.suffix == ".o" for path in (tmp_path / "cache" / "objects").iterdir())


@pytest.mark.parametrize("variables", [{"PATH": "/nonexistent"}, {"CXX": "/nonexistent/c++"}], ids=["PATH", "CXX"])
def test_no_compiler(sources: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SoftNpuError, match=r"no C\+\+ compiler.*CXX=/path/to"):
        build.build_libraries()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(AARCH64) is None, reason=f"needs {AARCH64} (Debian: g++-aarch64-linux-gnu)")
def test_sources_compile_for_aarch64(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hosts of Atlas servers are often aarch64. What links torch is not linked: there is no torch for it here."""
    monkeypatch.setenv("CXX", AARCH64)
    monkeypatch.setenv("SOFTNPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "make_link_command", linked_without_torch)
    build.compile_libraries(tmp_path)
    machines = {path.name: machine_of(path) for path in (tmp_path / "lib").iterdir()}
    assert machines == {library.name: AARCH64_MACHINE for library in build.LIBRARIES if not library.torch}
    objects = list((tmp_path / "cache" / "objects").glob("*.o"))
    assert len(objects) >= len(set(build.SOURCES.rglob("*.cpp")))
    assert {machine_of(path) for path in objects} == {AARCH64_MACHINE}


def test_no_torch_npu(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def without_torch_npu(name: str) -> object:
        if name == "torch-npu":
            raise PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(build, "distribution", without_torch_npu)
    with pytest.raises(
        SoftNpuError,
        match=r"needs the package torch-npu, which is not installed.*pip install 'torch==.*then --no-deps 'torch-npu==",
    ):
        build.build_libraries()


def test_environment_keeps_what_the_user_set() -> None:
    base = {
        "LD_LIBRARY_PATH": "/mine",
        "LD_PRELOAD": "/my/own.so",
        "PYTHONPATH": "/also/mine",
        "OMP_NUM_THREADS": "3",
        "PATH": "/bin",
    }
    once = activate.make_environment(base)
    assert once["LD_LIBRARY_PATH"] == f"{once['SOFTNPU_LIB']}:/mine"
    assert once["LD_PRELOAD"] == f"{once['SOFTNPU_LIB']}/{build.PRELOADED}:/my/own.so"
    assert once["PYTHONPATH"].endswith(":/also/mine")
    assert (once["OMP_NUM_THREADS"], once["PATH"]) == ("3", "/bin")
    assert activate.make_environment(once) == once
    assert activate.make_environment({})["OMP_NUM_THREADS"] == "1"
