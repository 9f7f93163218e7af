"""Compile the software NPU, once for each combination of sources, compiler, Python and torch.

The libraries carry CANN's own names, so that the real torch_npu finds them where it looks for CANN's.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from softnpu.errors import SoftNpuError

SOURCES = Path(__file__).parent / "csrc"
WARNINGS = (
    "-Wall",
    "-Wextra",
    *(
        f"-Wno-{name}"
        for name in ("deprecated-declarations", "unknown-pragmas", "unused-parameter", "return-type-c-linkage")
    ),
)


@dataclass(frozen=True)
class Library:
    """One shared library: file name, folders of sources under csrc, whether it uses torch, and what it links."""

    name: str
    sources: tuple[str, ...]
    torch: bool = False
    links: tuple[str, ...] = ()


PRELOADED = "libsoftnpu_preload.so"
"""What LD_PRELOAD names in every process on software NPUs."""
LIBRARIES = (
    Library("libascendcl.so", ("runtime/*.cpp",), links=("-lpthread",)),
    Library("libacl_op_compiler.so", ("stubs/op_compiler.cpp",), links=("-lascendcl",)),
    Library("libhccl.so", ("hccl/*.cpp",), links=("-lascendcl", "-lpthread", "-lrt")),
    Library("libatb.so", ("stubs/atb.cpp",)),
    Library(PRELOADED, ("preload/*.cpp",)),
    Library("vllm_ascend_C.so", ("camem/*.cpp",), links=("-lascendcl",)),
    *(Library(f"lib{name}.so", ("stubs/empty.cpp",)) for name in ("ge_runner", "graph", "acl_tdt_channel")),
    Library("libopapi.so", ("opapi/*.cpp",), torch=True, links=("-ltorch", "-ltorch_cpu", "-lc10", "-lascendcl")),
    Library(
        "_softnpu_ops.so",
        ("ops/*.cpp",),
        torch=True,
        links=("-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-l:libtorch_npu.so", "-lascendcl"),
    ),
)


def find_package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it: importing torch_npu needs what is built here."""
    try:
        found = Path(str(distribution(name).locate_file(name.replace("-", "_"))))
    except PackageNotFoundError:
        raise SoftNpuError(
            f"The software NPU needs the package {name}, which is not installed in {sys.prefix}. "
            "Install both in releases that fit each other, such as 2.10: "
            f"{sys.executable} -m pip install 'torch==2.10.*' numpy pyyaml, then --no-deps 'torch-npu==2.10.*'."
        ) from None
    if not found.is_dir():
        raise SoftNpuError(f"The package {name} is installed, but its folder {found} is missing. Reinstall it.")
    return found


def find_compiler() -> str:
    """Return the path of the C++ compiler: CXX, or g++."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise SoftNpuError(
            f"The software NPU is compiled on first use, and there is no C++ compiler: {name!r} is not on PATH. "
            "Install one (Debian: apt-get install g++), or name yours with CXX=/path/to/c++."
        )
    return found


def compute_cache_key() -> str:
    """Return a key that changes with everything that the built code depends on."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(SOURCES)).encode() + b"\0" + path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    for package in ("torch", "torch-npu"):
        try:
            digest.update(f"{package}={distribution(package).version}".encode())
        except PackageNotFoundError:
            find_package_folder(package)
    digest.update(f"{sys.implementation.cache_tag} {sys.prefix} {find_compiler()}".encode())
    return digest.hexdigest()[:16]


def get_cache_folder() -> Path:
    """Return the folder in which builds are kept: SOFTNPU_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ascend-softnpu"
    return Path(os.environ.get("SOFTNPU_CACHE", default))


def build_libraries() -> Path:
    """Compile what is not compiled yet, and return the folder of the libraries.

    Raises SoftNpuError without a compiler, torch or torch_npu, and with the compiler's output if a source is wrong.
    """
    target = get_cache_folder() / compute_cache_key()
    if target.is_dir():
        return target
    get_cache_folder().mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        try:  # several processes may start simultaneously: one builds, the others find it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another process is compiling the software NPU: waiting for it ...", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            print("Compiling the software NPU (about a minute, once) ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=get_cache_folder()) as folder:
                compile_libraries(Path(folder))
                libraries = Path(folder) / "lib"
                libraries.rename(target)
    return target


def compile_libraries(folder: Path) -> None:
    """Compile all sources, one per core at a time, then link the libraries, each after those that it links."""
    objects: dict[str, list[Path]] = {}
    jobs: list[tuple[Path, list[str]]] = []
    for library in LIBRARIES:
        for source in (path for pattern in library.sources for path in sorted(SOURCES.glob(pattern))):
            command = [find_compiler(), *list_compile_flags(library), "-c", str(source)]
            target = get_cache_folder() / "objects" / f"{compute_object_key(source, command)}.o"
            objects.setdefault(library.name, []).append(target)
            jobs.append((target, command))
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 2) as pool:
        list(pool.map(compile_object, jobs))
    (folder / "lib").mkdir()
    for library in LIBRARIES:
        run_compiler(make_link_command(library, objects[library.name], folder / "lib"))


def compute_object_key(source: Path, command: list[str]) -> str:
    """Return a key that changes with the source, any header, the command, and the packages whose headers it reads.

    It does not change with their folders: another clone and its environment find what this one has compiled.
    """
    text = " ".join(command)
    for folder in (SOURCES, find_package_folder("torch"), find_package_folder("torch-npu")):
        text = text.replace(str(folder), folder.name)
    digest = hashlib.sha256(text.encode())
    for path in (source, *sorted(SOURCES.rglob("*.h"))):
        digest.update(path.read_bytes())
    digest.update("".join(distribution(name).version for name in ("torch", "torch-npu")).encode())
    return digest.hexdigest()[:24]


def compile_object(job: tuple[Path, list[str]]) -> None:
    """Run the compiler for an object file, unless that is in the cache."""
    target, command = job
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    try:
        run_compiler([*command, "-o", str(partial)])
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def list_compile_flags(library: Library) -> list[str]:
    """Return the compiler's flags for each source of the library."""
    torch_npu = find_package_folder("torch-npu") / "include"
    includes = [torch_npu, torch_npu / "third_party/acl/inc", torch_npu / "third_party/hccl/inc"]
    includes.append(Path(sysconfig.get_paths()["include"]))
    flags = ["-O2", "-g1", "-fPIC", *WARNINGS]
    if not library.torch:
        return [*flags, "-std=c++17", f"-I{SOURCES}", *(f"-isystem{path}" for path in includes)]
    torch = find_package_folder("torch") / "include"
    includes += [torch, torch / "torch/csrc/api/include"]
    flags += ["-O1", "-std=c++20", "-DTORCH_EXTENSION_NAME=_softnpu_ops"]
    return [*flags, f"-I{SOURCES}", *(f"-isystem{path}" for path in includes)]


def make_link_command(library: Library, objects: list[Path], folder: Path) -> list[str]:
    """Return the command that links the library into ``folder``, which holds the libraries that it needs already."""
    paths = [f"-L{folder}"]
    if library.torch:
        paths += [f"-L{find_package_folder(name) / 'lib'}" for name in ("torch", "torch-npu")]
    return [
        find_compiler(), "-shared", *map(str, objects), f"-Wl,-soname,{library.name}", *paths, *library.links,
        "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined", "-o", str(folder / library.name),
    ]  # fmt: skip


def run_compiler(command: list[str]) -> None:
    """Run the compiler. Raises SoftNpuError with the command and the end of its output when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        output = done.stderr.strip()[-3000:]
        raise SoftNpuError(f"Compiling the software NPU failed.\nCommand: {' '.join(command)}\n{output}")
