"""What we rely on in upstream's sources: ci/contract/facts.toml, every patched name and every import in our code."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from packaging.specifiers import SpecifierSet

from ci.contract import code
from ci.matrix import toml
from ci.releases import COMPILED, Sources
from vllm_ray_ascend.patches import PATCHES, Patch

TABLE = Path(__file__).with_name("facts.toml")
PACKAGE = Path(__file__).parents[2] / "vllm_ray_ascend"
PROJECTS = {"vllm": "vllm", "vllm_ascend": "vllm-ascend", "ray": "ray", "torch": "torch", "torch_npu": "torch-npu"}
READ = (".py", COMPILED)
"""Endings of the files that a place names; an import names a module instead."""
KINDS = ("has", "uses", "takes", "says", "bases", "body")


class Broken(NamedTuple):
    """A fact that a release contradicts."""

    where: str
    """The place in upstream's source, with what was expected of it."""
    found: str
    """What is there instead."""
    by: str
    """Which of our files relies on it, and for what."""

    def __str__(self) -> str:
        return f"{self.where}\n    found: {self.found}\n    relied on by: {self.by}"


@dataclass(frozen=True)
class Place:
    """A module, class or function of upstream, and what we rely on there."""

    project: str
    file: str
    of: str = ""
    by: str = ""
    releases: SpecifierSet = field(default_factory=SpecifierSet)
    """In which it holds; elsewhere we do without."""
    unless_gone: bool = False
    """Whether it may be missing as a whole, and we do without."""
    nowhere_else: bool = False
    """Whether other releases lack it: one that has it is to be added to ``releases``."""
    has: Sequence[str] = ()
    """Names that it defines."""
    uses: Sequence[str] = ()
    """Global names that it reads, for which it can be given others."""
    takes: Sequence[str] = ()
    """Parameters, in this order among its others."""
    says: Sequence[str] = ()
    """Expressions or statements that stand in it."""
    bases: Sequence[str] = ()
    """Its base classes, all of them."""
    body: Mapping[str, str] | None = None
    """Fingerprint of all of it, by the releases for which it was read through."""

    def holds_in(self, version: str) -> bool:
        """Whether we rely on it in this release."""
        return self.releases.contains(version, prereleases=True)

    def broken(self, sources: Sources) -> list[Broken]:
        """Return what is not so in a release."""
        place = f"{self.file}{f', {self.of}' if self.of else ''}"
        text = sources.text(self.file)
        if text is not None and self.file.endswith(COMPILED):
            lacking = sorted({*self.has}.difference(text.splitlines()))
            return [Broken(f"{place} has {', '.join(lacking)}", "not among its texts", self.by)] if lacking else []
        node = None if text is None else code.find(code.parse(text), self.of)
        if node is None:
            if self.unless_gone:
                return []
            return [Broken(place, "no such file" if text is None else "no such name", self.by)]
        found = [*self._missing(node), *self._body(node, sources.version)]
        return [Broken(f"{place} {expected}", actual, self.by) for expected, actual in found]

    def _missing(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        if self.has and (lacking := sorted(set(self.has) - code.names(node))):
            yield f"has {', '.join(lacking)}", "not defined there"
        if self.uses and (lacking := sorted(set(self.uses) - code.used(node))):
            yield f"uses {', '.join(lacking)}", "never read there"
        given = code.parameters(node)
        if [name for name in given if name in self.takes] != list(self.takes):
            yield f"takes {', '.join(self.takes)}", f"takes {', '.join(given)}"
        for text in self.says:
            if not code.says(node, text):
                yield f"says `{text}`", "it does not"
        if self.bases and code.bases(node) != list(self.bases):
            yield f"is made from {', '.join(self.bases)}", ", ".join(code.bases(node))

    def _body(self, node: ast.AST, version: str) -> Iterator[tuple[str, str]]:
        if self.body is None:
            return
        print_, known = code.fingerprint(node), dict(self.body)
        accepted = [each for range_, each in known.items() if SpecifierSet(range_).contains(version, prereleases=True)]
        if print_ not in accepted:
            expected = " or ".join(accepted) or "for this release nobody has read it"
            before = [range_ for range_, each in known.items() if each == print_]
            same = f", as in {before[0]}" if before else ": read what changed, then add it"
            yield f"is as it was read ({expected})", f"{print_}{same}"


@functools.cache
def table() -> list[Place]:
    """Return all places. Raises ValueError for an entry of facts.toml that is none."""
    ranges: Mapping[str, str] = toml(TABLE).get("imports", {})
    return [*written(), *patched(), *imported(ranges)]


def written() -> list[Place]:
    """Return the places in facts.toml. Raises ValueError for an entry that is none."""
    tables = toml(TABLE)
    tables.pop("imports", None)
    return [_place(project, entry) for project, entries in tables.items() for entry in entries]


def patched(patches: Sequence[Patch] = PATCHES) -> list[Place]:
    """Return a place for each name in the table of patches: in the releases of its row it is there, in no others."""
    return [_patched(patch, name) for patch in patches for name in patch.names]


def _patched(patch: Patch, name: str) -> Place:
    project = PROJECTS[patch.module.partition(".")[0]]
    ranges = dict(each.strip().partition(" ")[::2] for each in patch.releases.split(";"))
    target, _, variable = name.partition(":")
    holder, _, attribute = target.rpartition(".")
    ours = attribute.startswith("_vllm_ray_ascend")  # what upstream does not have
    return Place(
        project,
        f"{patch.module.replace('.', '/')}.py",
        of=target if variable else holder,
        by=f"{patch.by}: {patch.what}",
        releases=SpecifierSet(ranges[project]),
        nowhere_else=True,
        has=() if variable or ours else (attribute,),
        uses=(variable,) if variable else (),
    )


def _place(project: str, entry: Mapping[str, Any]) -> Place:
    given = dict(entry)
    try:
        place = Place(project=project, **{**given, "releases": SpecifierSet(given.get("releases", ""))})
    except TypeError as error:
        raise ValueError(f"{TABLE.name}: {project}: {given}: {error}") from error
    known = place.of or any(getattr(place, kind) not in ((), None) for kind in KINDS)
    if not known or not place.by or not (PACKAGE / place.by.partition(":")[0]).exists():
        raise ValueError(f"{TABLE.name}: {project}: {given}: say file, of, one of {', '.join(KINDS)}, and by: OUR FILE")
    return place


def imported(ranges: Mapping[str, str], package: Path = PACKAGE) -> list[Place]:
    """Return a place for each `from vllm... import ...` of ours.

    ``ranges`` are the releases for which we import a name, by "package/module:name", or by a module for all below it.
    """
    found = []
    for path in sorted(package.rglob("*.py")):
        by = path.relative_to(package).as_posix()
        nodes = (node for node in ast.walk(code.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
        found += [place for node in nodes for place in _imports(node, f"{by}: imports it", ranges)]
    return found


def _imports(node: ast.ImportFrom, by: str, ranges: Mapping[str, str]) -> Iterator[Place]:
    parts = (node.module or "").split(".")
    project, module = PROJECTS.get(parts[0]), "/".join(parts)
    if project is None or node.level:
        return
    for alias in node.names:
        keys = (f"{module}:{alias.name}", *("/".join(parts[:end]) for end in range(len(parts), 0, -1)))
        releases = next((ranges[key] for key in keys if key in ranges), "")
        yield Place(project, module, has=(alias.name,), by=by, releases=SpecifierSet(releases))


def candidates(place: Place) -> tuple[str, str, str]:
    """Return the files in which an imported name may be: the module's, the package's, or a module of its own."""
    return f"{place.file}.py", f"{place.file}/__init__.py", f"{place.file}/{place.has[0]}.py"


def files(project: str) -> list[str]:
    """Return every file of a project that a place names."""
    wanted: set[str] = set()
    for place in table():
        if place.project == project:
            wanted |= {place.file} if place.file.endswith(READ) else set(candidates(place))
    return sorted(wanted)


def check(sources: Sources) -> list[Broken]:
    """Return what a release contradicts of all that we rely on in it."""
    found: list[Broken] = []
    for place in table():
        if place.project != sources.project:
            continue
        if place.holds_in(sources.version):
            found += place.broken(sources) if place.file.endswith(READ) else _import_broken(place, sources)
        elif place.nowhere_else and not place.broken(sources):
            name = ", ".join([*place.has, *place.uses])
            found.append(
                Broken(f"{place.file} {place.of} lacks {name}", f"it is there, and not in {place.releases}", place.by)
            )
    return found


def _import_broken(place: Place, sources: Sources) -> list[Broken]:
    module, package, submodule = candidates(place)
    if submodule in sources.names:
        return []
    texts = [text for name in (module, package) if (text := sources.text(name)) is not None]
    defined = [code.names(code.parse(text)) for text in texts]
    if any(place.has[0] in names or "*" in names for names in defined):  # what a star brings, nobody knows
        return []
    what = "not defined there" if texts else "no such module"
    return [Broken(f"{place.file.replace('/', '.')} has {place.has[0]}", what, place.by)]
