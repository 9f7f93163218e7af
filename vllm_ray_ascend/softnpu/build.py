"""Compiles the software NPU: once per source, compiler, Python and torch; later calls find the result.

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

from vllm_ray_ascend.errors import SoftNpuError

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
    Library("libacl_op_compiler.so", ("link/op_compiler.cpp",), links=("-lascendcl",)),
    Library("libhccl.so", ("hccl/*.cpp",), links=("-lascendcl", "-lpthread", "-lrt")),
    Library("libatb.so", ("link/atb.cpp",)),
    Library(PRELOADED, ("preload/*.cpp",)),
    Library("vllm_ascend_C.so", ("camem/*.cpp",), links=("-lascendcl",)),
    *(Library(f"lib{name}.so", ("link/empty.cpp",)) for name in ("ge_runner", "graph", "acl_tdt_channel")),
    Library("libopapi.so", ("opapi/*.cpp",), torch=True, links=("-ltorch", "-ltorch_cpu", "-lc10", "-lascendcl")),
    Library(
        "_softnpu_ops.so",
        ("ops/*.cpp",),
        torch=True,
        links=("-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-l:libtorch_npu.so", "-lascendcl"),
    ),
)


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it (importing torch_npu needs what is built here)."""
    try:
        found = Path(str(distribution(name).locate_file(name.replace("-", "_"))))
    except PackageNotFoundError:
        raise SoftNpuError(
            f"The software NPU needs the package {name}, which is not installed in {sys.prefix}. "
            f"Install it: {sys.executable} -m pip install --no-deps {name}"
        ) from None
    if not found.is_dir():
        raise SoftNpuError(f"The package {name} is installed, but its folder {found} is missing. Reinstall it.")
    return found


def compiler() -> str:
    """The C++ compiler: CXX, or g++."""
    wanted = os.environ.get("CXX", "g++")
    found = shutil.which(wanted)
    if found is None:
        raise SoftNpuError(
            f"The software NPU is compiled on first use, and there is no C++ compiler: {wanted!r} is not on PATH. "
            "Install one (Debian: apt-get install g++), or name yours with CXX=/path/to/c++."
        )
    return found


def cache_key() -> str:
    """Changes with everything that the built code depends on."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(SOURCES)).encode() + b"\0" + path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    for package in ("torch", "torch-npu"):
        try:
            digest.update(f"{package}={distribution(package).version}".encode())
        except PackageNotFoundError:
            package_folder(package)
    digest.update(f"{sys.implementation.cache_tag} {sys.prefix} {compiler()}".encode())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where builds are kept: SOFTNPU_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-ray-ascend" / "softnpu"
    return Path(os.environ.get("SOFTNPU_CACHE", default))


def build() -> Path:
    """Compiles what is not compiled yet, and returns the folder of the libraries.

    Raises SoftNpuError without a compiler, torch or torch_npu, and with the compiler's words if a source is wrong.
    """
    target = cache_folder() / cache_key()
    if target.is_dir():
        return target
    cache_folder().mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        try:  # several processes may start at once: one builds, the others find it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another process is compiling the software NPU: waiting for it ...", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            print("Compiling the software NPU (about a minute, once) ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
                compile_into(Path(folder))
                libraries = Path(folder) / "lib"
                libraries.rename(target)
    return target


def compile_into(folder: Path) -> None:
    """Compiles all sources, one for each core at a time, then links the libraries in the order of their needs."""
    objects: dict[str, list[Path]] = {}
    jobs: list[tuple[Path, list[str]]] = []
    for library in LIBRARIES:
        for source in (path for pattern in library.sources for path in sorted(SOURCES.glob(pattern))):
            command = [compiler(), *compile_flags(library), "-c", str(source)]
            target = cache_folder() / "objects" / f"{object_key(source, command)}.o"
            objects.setdefault(library.name, []).append(target)
            jobs.append((target, command))
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 2) as pool:
        list(pool.map(compile_object, jobs))
    (folder / "lib").mkdir()
    for library in LIBRARIES:
        run(link_command(library, objects[library.name], folder / "lib"))


def object_key(source: Path, command: list[str]) -> str:
    """Changes with the source, any header, the command, and the packages whose headers it reads.

    Not with the folders that they lie in: another clone and its environment find what this one has compiled.
    """
    words = " ".join(command)
    for folder in (SOURCES, package_folder("torch"), package_folder("torch-npu")):
        words = words.replace(str(folder), folder.name)
    digest = hashlib.sha256(words.encode())
    for path in (source, *sorted(SOURCES.rglob("*.h"))):
        digest.update(path.read_bytes())
    digest.update("".join(distribution(name).version for name in ("torch", "torch-npu")).encode())
    return digest.hexdigest()[:24]


def compile_object(job: tuple[Path, list[str]]) -> None:
    """Runs the command for the object file, unless that is in the cache."""
    target, command = job
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    try:
        run([*command, "-o", str(partial)])
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def compile_flags(library: Library) -> list[str]:
    """What the compiler is given for each source of the library."""
    torch_npu = package_folder("torch-npu") / "include"
    includes = [torch_npu, torch_npu / "third_party/acl/inc", torch_npu / "third_party/hccl/inc"]
    includes.append(Path(sysconfig.get_paths()["include"]))
    flags = ["-O2", "-g1", "-fPIC", *WARNINGS]
    if not library.torch:
        return [*flags, "-std=c++17", f"-I{SOURCES}", *(f"-isystem{path}" for path in includes)]
    torch = package_folder("torch") / "include"
    includes += [torch, torch / "torch/csrc/api/include"]
    flags += ["-O1", "-std=c++20", "-DTORCH_EXTENSION_NAME=_softnpu_ops"]
    return [*flags, f"-I{SOURCES}", *(f"-isystem{path}" for path in includes)]


def link_command(library: Library, objects: list[Path], folder: Path) -> list[str]:
    """Links into `folder`, where the libraries that it needs lie already."""
    paths = [f"-L{folder}"]
    if library.torch:
        paths += [f"-L{package_folder(name) / 'lib'}" for name in ("torch", "torch-npu")]
    return [
        compiler(), "-shared", *map(str, objects), f"-Wl,-soname,{library.name}", *paths, *library.links,
        "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined", "-o", str(folder / library.name),
    ]  # fmt: skip


def run(command: list[str]) -> None:
    """Runs the compiler; SoftNpuError with the command and its last words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip()[-3000:]
        raise SoftNpuError(f"Compiling the software NPU failed.\nCommand: {' '.join(command)}\n{words}")
