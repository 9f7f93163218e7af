"""A library that was linked with CUDA's loads without them, and says so when it calls one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from demo.thin_torch import thin
from tests.softnpu.processes import check_python
from tests.softnpu.ranks import ROOT

VERSION = """\
__version__ = '2.10.0+cu128'
cuda: Optional[str] = '12.8'
hip: Optional[str] = None
"""
CPU_VERSION = VERSION.replace("cu128", "cpu").replace("'12.8'", "None")
USER = """\
#include <cstdio>
struct Base { virtual ~Base(); };
struct Derived : Base {};
namespace at { void launch(); }
extern "C" {
int cudaFree(void *);
const char *cudaGetErrorString(int);
int cudnnCreate(void **);
int count() { return cudaFree(nullptr); }
const char *text() { return cudaGetErrorString(35); }
int create() { return cudnnCreate(nullptr); }
void launch() { at::launch(); }
void *make() { return new Derived; }
}
"""


def compile_library(path: Path, code: str, *options: str) -> None:
    source = path.with_suffix(".cpp")
    source.write_text(code)
    subprocess.run(["g++", "-shared", "-fPIC", "-w", str(source), "-o", str(path), *options], check=True)
    source.unlink()


@pytest.fixture
def torch(tmp_path: Path) -> Path:
    """A package like PyTorch's: NVIDIA's libraries are those of another folder, which is gone."""
    package, nvidia = tmp_path / "torch", tmp_path / "nvidia"
    library = package / "lib"
    library.mkdir(parents=True)
    nvidia.mkdir()
    (package / "version.py").write_text(VERSION)
    (nvidia / "map").write_text("libcudart.so.12 { global: cuda*; };\n")
    runtime = 'extern "C" { int cudaFree(void *) { return 0; } const char *cudaGetErrorString(int) { return "good"; } }'
    labels = f"-Wl,--version-script={nvidia / 'map'}"
    compile_library(nvidia / "libcudart.so.12", runtime, "-Wl,-soname,libcudart.so.12", labels)
    (nvidia / "map").write_text("libcudnn.so.9 { global: cudnn*; };\n")
    create = 'extern "C" int cudnnCreate(void **) { return 0; }'
    compile_library(nvidia / "libcudnn.so.9", create, "-Wl,-soname,libcudnn.so.9", labels)
    kernels = "struct Base { virtual ~Base(); }; Base::~Base() {} namespace at { void launch() {} }"
    compile_library(library / "libtorch_cuda.so", kernels, "-Wl,-soname,libtorch_cuda.so")
    linked = [str(library / "libtorch_cuda.so"), str(nvidia / "libcudart.so.12"), str(nvidia / "libcudnn.so.9")]
    compile_library(library / "libtorch_cpu.so", USER, "-Wl,-z,now", "-Wl,-rpath,$ORIGIN", *linked)
    return package


def call(torch: Path, function: str) -> subprocess.CompletedProcess[str]:
    code = f"import ctypes; print(ctypes.CDLL({str(torch / 'lib' / 'libtorch_cpu.so')!r}).{function}())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_a_cuda_build_loads_and_has_no_cuda(torch: Path) -> None:
    before = (torch / "lib" / "libtorch_cpu.so").read_bytes()
    assert "libcudart.so.12: cannot open shared object file" in call(torch, "count").stderr
    assert thin(torch) == ["libcudart.so.12", "libcudnn.so.9", "libtorch_cuda.so"]
    assert call(torch, "count").stdout == "35\n"
    for function, symbol in (("create", "cudnnCreate"), ("launch", "_ZN2at6launchEv")):
        ended = call(torch, function)
        assert ended.returncode == -signal.SIGABRT
        assert f"{symbol} was called, but this PyTorch has no CUDA" in ended.stderr
    assert (torch / "version.py").read_text() == CPU_VERSION
    assert (torch / "lib" / "libtorch_cpu.so").read_bytes() == before


def test_a_second_run_changes_nothing_and_an_interrupted_one_is_repeated(torch: Path) -> None:
    names = thin(torch)
    stubs = {path: path.stat().st_mtime_ns for path in (torch / "lib").iterdir()}
    assert thin(torch) == []
    assert stubs == {path: path.stat().st_mtime_ns for path in (torch / "lib").iterdir()}
    (torch / "version.py").write_text(VERSION)  # as where the first run ended before its last step
    assert thin(torch) == names
    assert call(torch, "count").stdout == "35\n"


def test_a_failure_shows_what_the_compiler_or_binutils_say(torch: Path) -> None:
    broken = torch / "lib" / "libbroken.so"
    broken.write_text("half a library")
    code = f"from pathlib import Path; from demo.thin_torch import thin; thin(Path({str(torch)!r}))"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 1 and f"nm: {broken}: file format not recognized" in failed.stderr


def test_a_cpu_build_is_left_alone(torch: Path) -> None:
    (torch / "version.py").write_text(CPU_VERSION)
    before = {path: path.stat().st_mtime_ns for path in torch.rglob("*")}
    assert thin(torch) == []
    assert before == {path: path.stat().st_mtime_ns for path in torch.rglob("*")}


def test_the_installed_torch_has_no_cuda() -> None:
    check_python("import torch; assert torch.version.cuda is None and not torch.cuda.is_available()")
