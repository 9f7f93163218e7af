"""Make PyTorch's CUDA wheel load without CUDA's libraries: `python demo/thin_torch.py`, with the Python that has it.

Some releases of PyTorch come as a CUDA build only, whose libraries link 3 GB of NVIDIA's, even where no GPU is used.
Here libtorch_cuda.so (1 GB) and NVIDIA's libraries are replaced by stubs, which have just the symbols that the other
libraries ask for. A stub of CUDA's runtime answers "the driver is too old", so that torch.cuda.is_available() is False;
any other ends the process, with its name. Libraries that run on the CPU stay as they are. torch.version says +cpu, and
no CUDA. So this is a modified PyTorch. A CPU build, and one that was changed before, are left alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection
from pathlib import Path

REPLACED = "libtorch_cuda.so"
REMOVED = (REPLACED, "libtorch_cuda_linalg.so", "libtorch_nvshmem.so", "libcaffe2_nvrtc.so")
"""PyTorch's own libraries that hold or call kernels for GPUs; the first is linked by others."""
SYSTEM = (
    *("libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"),
    *("ld-linux-x86-64.so.2", "libgomp.so.1"),
)
"""Libraries that a system with a C++ compiler has."""
STATUS = {"libcudart": 35, "libcupti": 15}
"""What functions of a library return: cudaErrorInsufficientDriver, CUPTI_ERROR_NOT_INITIALIZED."""

_HEAD = """\
#include <stdio.h>
#include <stdlib.h>
struct type_info { void **table; const char *name; };
extern void *_ZTVN10__cxxabiv117__class_type_infoE[];
static void end(const char *name) {
  fprintf(stderr, "%s was called, but this PyTorch has no CUDA: see demo/thin_torch.py\\n", name);
  abort();
}
"""
_TEXT = 'const char *{name}(void) {{ return "no CUDA in this PyTorch"; }}'
_SPECIAL = {
    "cudaGetErrorString": _TEXT,
    "cudaGetErrorName": _TEXT,
    # Called when torch is imported: where to put a pointer to a function.
    "_ZN4c10d15get_gil_checkerEv": "void **{name}(void) {{ static void *checker; return &checker; }}",
}
_VERSION = re.compile(r"^(__version__ = '[\d.]+)[^']*'", re.MULTILINE)
_CUDA = re.compile(r"^(cuda\b.* = )'.*'$", re.MULTILINE)


def thin(torch: Path) -> list[str]:
    """Replace what needs CUDA in the package folder ``torch``; returns the names of the libraries that are stubs now.

    Raises CalledProcessError where the compiler or one of binutils fails, FileNotFoundError where it is not installed.
    """
    version = torch / "version.py"
    text = version.read_text()
    if not _CUDA.search(text):
        return []
    folder = torch / "lib"
    for name in REMOVED:
        (folder / name).unlink(missing_ok=True)
    kept = sorted(folder.glob("*.so"))
    present = {name for path in [*kept, *_find_system()] for name, _ in read_symbols(path, "defined")}
    wanted = {symbol for path in kept for symbol in read_symbols(path, "undefined") if symbol[0] not in present}
    needed = {name for path in kept for name in read_needed(path)}
    missing = sorted(needed - {path.name for path in kept} - set(SYSTEM))
    for name in missing:
        label = "" if name == REPLACED else name  # NVIDIA labels its symbols with the library, PyTorch does not
        build_stub(folder / name, label, sorted(symbol for symbol, own in wanted if own == label))
    # Last, since a second run goes by it.
    version.write_text(_CUDA.sub(r"\1None", _VERSION.sub(r"\1+cpu'", text)))
    return missing


def read_symbols(library: Path, kind: str) -> set[tuple[str, str]]:
    """Return the symbols that ``library`` has ("defined") or asks for ("undefined"), each with its version or ""."""
    symbols = set()
    for line in _run("nm", "-D", f"--{kind}-only", library).splitlines():
        letter, symbol = line.split()[-2:]
        name, _, version = symbol.partition("@")
        if letter not in "wv" and not name.startswith(("Py", "_Py")):  # weak ones may be missing; Python has its own
            symbols.add((name, version.lstrip("@")))
    return symbols


def read_needed(library: Path) -> list[str]:
    """Return the names of the libraries that ``library`` links."""
    return re.findall(r"\(NEEDED\).*\[(.*)\]", _run("readelf", "-d", library))


def build_stub(path: Path, version: str, symbols: Collection[str]) -> None:
    """Compile a library with these ``symbols``, which carry the label ``version`` unless it is empty."""
    status = next((code for name, code in STATUS.items() if path.name.startswith(name)), None)
    with tempfile.TemporaryDirectory() as folder:
        source, labels = Path(folder, "stub.c"), Path(folder, "stub.map")
        source.write_text(_HEAD + "\n".join(_define(symbol, status) for symbol in symbols) + "\n")
        labels.write_text(f"{version} {{ global: {' '.join(f'{symbol};' for symbol in symbols)} }};\n")
        options = [f"-Wl,--version-script={labels}"] if version and symbols else []
        compiler = ("g++", "-shared", "-fPIC", "-O1", "-fno-builtin", "-w", "-x", "c")
        _run(*compiler, source, "-o", path, f"-Wl,-soname,{path.name}", *options)


def _define(symbol: str, status: int | None) -> str:
    """Return C that defines a function, or the data that C++ keeps of a class (its type, its tables)."""
    if symbol in _SPECIAL:
        return _SPECIAL[symbol].format(name=symbol)
    if symbol.startswith("_ZTI"):
        value = f'{{ _ZTVN10__cxxabiv117__class_type_infoE + 2, "{symbol.removeprefix("_ZTI")}" }}'
        return f"const struct type_info {symbol} = {value};"
    if symbol.startswith(("_ZTV", "_ZTT")):
        return f"void *{symbol}[64];"
    return (
        f'int {symbol}(void) {{ end("{symbol}"); return 0; }}'
        if status is None
        else f"int {symbol}(void) {{ return {status}; }}"
    )


def _find_system() -> list[Path]:
    return [Path(_run("g++", f"-print-file-name={name}").strip()) for name in SYSTEM]


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # its errors are shown


def main() -> int:
    """Change the torch that is installed for this Python."""
    names = thin(Path(sysconfig.get_path("platlib")) / "torch")
    if names:
        print(f"  PyTorch is a CUDA build: {', '.join(names)} replaced by stubs", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
