"""mkdocs' hook: tables that are made from the code, and pages that stand elsewhere in the repository. See mkdocs.yml.

In a page, ``<!-- table: NAME -->`` is replaced by the table of that name, so that no table can be out of date. Links
out of docs/ become the page made of that file, or its path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ci.matrix import Matrix, read
from ci.suites import EVERY_CHANGE, NEEDS, SUITES
from vllm_ray_ascend.environment.table import TABLE
from vllm_ray_ascend.settings import switches

ROOT = Path(__file__).resolve().parent.parent
PAGES: Mapping[str, str] = {"benchmarks.md": "benchmarks/README.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site, and the files of the repository that they are."""
SECTIONS: Mapping[str, str] = {
    "compiled-graph.md": "Running it",
    "direct-transport.md": "Running it",
    "transport.md": "Running it",
}
_PROJECTS = {"vllm": "vLLM", "vllm-ascend": "vllm-ascend", "ray": "Ray", "python": "Python"}
_RUNS = {
    "contract": "its source read",
    "unit": "unit tests",
    "basic": "a server and tokens",
    "softnpu": "on software NPUs",
    "e2e": "whole engines and servers",
}
_BELONGS = {"node": "the node's", "travels": "travels", "secret": "secret", "other": "not ours"}
_MARK = re.compile(r"^<!-- table: (\S+) -->$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    cells = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def settings_table() -> str:
    """Every switch of settings.py."""
    rows = [
        [f"`{each.variable}`", f"`{each.default}`", each.accepted.replace("|", ", "), each.meaning]
        for each in switches({})
    ]
    return table(["variable", "default", "accepted", "meaning"], rows)


def variables_table() -> str:
    """Every variable that environment/table.py knows: whose it is."""
    rows = [[f"`{each.name}`", _BELONGS[each.belongs], each.meaning] for each in TABLE.values()]
    return table(["variable", "whose", "meaning"], rows)


def compatibility_table(matrix: Matrix) -> str:
    """What was run with which release: ci/matrix.toml."""
    parts = []
    for project, title in _PROJECTS.items():
        rows = []
        for release in reversed(matrix.projects[project]):
            marks = ["yes" if run in release.run else "" for run in _RUNS]
            made_for = f" (for vLLM {release.made_for})" if release.made_for else ""
            rows.append([f"{release.version}{made_for}", *marks, release.note])
        parts.append(f"### {title}\n\n{table(['release', *_RUNS.values(), ''], rows)}")
    return "\n\n".join(parts)


def suites_table() -> str:
    """The suites of ci/suites.py."""
    rows = [
        [
            f"`{suite.name}`",
            suite.what,
            f"`{' '.join(suite.paths)}`, `-m '{suite.select}'`",
            "; ".join(NEEDS[need] for need in sorted(suite.needs)),
            "every change" if suite.name in EVERY_CHANGE else "the night",
        ]
        for suite in SUITES.values()
    ]
    return table(["suite", "what", "tests", "needs", "when"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "settings": settings_table,
    "variables": variables_table,
    "compatibility": lambda: compatibility_table(read()),
    "suites": suites_table,
}


def filled(markdown: str) -> str:
    """``markdown`` with its tables. Raises KeyError for one that there is not."""
    return _MARK.sub(lambda found: TABLES[found.group(1)](), markdown)


def relinked(markdown: str, page: str) -> str:
    """Links of ``page`` to files outside docs/: to the page made of such a file, or its path as text."""
    source = PAGES.get(page)
    folder = (ROOT / source).parent if source else (ROOT / "docs" / page).parent

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found.group(1), found.group(2), found.group(3) or ""
        if ":" in target or not (folder / target).exists():
            return found.group()  # mkdocs says what is wrong with it
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        made = {file: name for name, file in PAGES.items()}.get(path)
        if made is not None:
            return f"[{text}]({made}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})" if source else found.group()
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return _LINK.sub(link, markdown)


def on_config(config: Any) -> Any:
    """Give pages that mkdocs.yml does not name a place: a new one is found before somebody writes it in there."""
    config["nav"] = with_further(config["nav"], [path.name for path in (ROOT / "docs").glob("*.md")])
    return config


def with_further(nav: list[dict[str, Any]], pages: list[str]) -> list[dict[str, Any]]:
    """The navigation with those of ``pages`` that it lacks, each in the section of SECTIONS, or in one at the end."""
    named = set(re.findall(r"[\w-]+\.md", json.dumps(nav)))
    further: dict[str, list[str]] = {}
    for page in sorted(set(pages) - named):
        further.setdefault(SECTIONS.get(page, "Further pages"), []).append(page)
    made = [{title: [*entries, *further.pop(title, ())] for title, entries in section.items()} for section in nav]
    return [*made, *({title: entries} for title, entries in further.items())]


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand elsewhere."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in tables, mend links."""
    return relinked(filled(markdown), page.file.src_uri)
