"""Hook of mkdocs (mkdocs.yml): tables that are made from the code, and pages from elsewhere in the repository.

In a page, ``<!-- table: NAME -->`` is replaced by the table of that name, so that no table can be out of date. A link
to a file outside docs/ becomes a link to the page made of that file, or the file's path as text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ci import layers
from ci.matrix import Matrix, read
from ci.suites import EVERY_CHANGE, NEEDS, SUITES
from vllm_ray_ascend.doctor.checks import CHECKS
from vllm_ray_ascend.environment.table import TABLE
from vllm_ray_ascend.observability.events import KINDS as EVENT_KINDS
from vllm_ray_ascend.observability.metrics import METRICS
from vllm_ray_ascend.patches import KINDS, PATCHES
from vllm_ray_ascend.settings import list_switches

ROOT = Path(__file__).resolve().parent.parent
PAGES: Mapping[str, str] = {"benchmarks.md": "benchmarks/README.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files elsewhere in the repository."""
_PROJECTS = {
    "vllm": "vLLM",
    "vllm-ascend": "vllm-ascend",
    "ray": "Ray",
    "torch": "PyTorch",
    "torch-npu": "torch_npu",
    "python": "Python",
}
_RUNS = {
    "contract": "source read",
    "unit": "unit tests",
    "basic": "a server and tokens",
    "softnpu": "on software NPUs",
    "e2e": "whole engines and servers",
}
_MARK = re.compile(r"^<!-- table: (\S+) -->$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    cells = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def settings_table() -> str:
    """Return the table of all switches of settings.py."""
    rows = [
        [f"`{each.variable}`", f"`{each.default}`", each.accepted.replace("|", ", "), each.meaning]
        for each in list_switches({})
    ]
    return markdown_table(["variable", "default", "accepted", "meaning"], rows)


def variables_table() -> str:
    """Return the table of all variables that environment/table.py knows, with the scope of each."""
    rows = [[f"`{each.name}`", each.scope, each.meaning] for each in TABLE.values()]
    return markdown_table(["variable", "scope", "meaning"], rows)


def compatibility_table(matrix: Matrix) -> str:
    """Return the tables of what was run with which release, from ci/matrix.toml."""
    parts = []
    for project, title in _PROJECTS.items():
        rows = []
        for release in reversed(matrix.projects[project]):
            marks = ["yes" if run in release.run else "" for run in _RUNS]
            made_for = f" (for vLLM {release.made_for})" if release.made_for else ""
            rows.append([f"{release.version}{made_for}", *marks, release.note])
        parts.append(f"### {title}\n\n{markdown_table(['release', *_RUNS.values(), ''], rows)}")
    return "\n\n".join(parts)


def suites_table() -> str:
    """Return the table of the suites of ci/suites.py."""
    rows = [
        [
            f"`{suite.name}`",
            suite.what,
            f"`{' '.join(suite.paths)}`, `-m '{suite.select}'`",
            "; ".join(NEEDS[need] for need in sorted(suite.needs)),
            "every change" if suite.name in EVERY_CHANGE else "nightly",
        ]
        for suite in SUITES.values()
    ]
    return markdown_table(["suite", "what", "tests", "needs", "when"], rows)


def patches_table() -> str:
    """Return the table of all upstream names that patches.py replaces, wraps or adds to."""
    kinds = markdown_table(["kind", "meaning"], [[f"`{kind}`", meaning] for kind, meaning in KINDS.items()])
    rows = [
        [
            "<br>".join(f"`{target}`" for target in patch.targets),
            f"`{patch.kind}`",
            patch.what,
            patch.why,
            patch.releases,
            patch.applied,
            patch.removable,
        ]
        for patch in PATCHES
    ]
    head = ["upstream's name", "kind", "what is there instead", "why", "releases", "applied at", "removable when"]
    return f"{kinds}\n\n{markdown_table(head, rows)}"


def doctor_table() -> str:
    """Return the table of the checks that `vllm-ray-ascend doctor` makes."""
    rows = [
        [
            f"`{check.name}`",
            check.summary,
            check.source,
            check.level,
            "all nodes" if check.of_cluster else "each node",
            "" if check.at_start == "skipped" else check.at_start,
        ]
        for check in CHECKS.values()
    ]
    return markdown_table(["check", "what is looked at", "source", "level", "judged over", "before a start"], rows)


def metrics_table() -> str:
    """Return the table of all metrics of observability/metrics.py, with labels beside the common ones."""
    rows = [
        [f"`{each.name}`", each.kind, each.unit, ", ".join(f"`{label}`" for label in each.labels), each.help]
        for each in METRICS.values()
    ]
    return markdown_table(["metric", "type", "unit", "labels", "meaning"], rows)


def events_table() -> str:
    """Return the table of all events of observability/events.py."""
    rows = [
        [
            f"`{kind.name}`",
            logging.getLevelName(kind.level).lower(),
            kind.help,
            ", ".join(f"`{f}`" for f in kind.fields),
        ]
        for kind in EVENT_KINDS.values()
    ]
    return markdown_table(["event", "level", "when", "fields"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "settings": settings_table,
    "variables": variables_table,
    "compatibility": lambda: compatibility_table(read()),
    "suites": suites_table,
    "patches": patches_table,
    "doctor": doctor_table,
    "metrics": metrics_table,
    "events": events_table,
    "layers": lambda: markdown_table(["layer", "in `vllm_ray_ascend/`", "purpose"], layers.table_rows()),
}


def fill_tables(markdown: str) -> str:
    """Return ``markdown`` with its tables. Raise KeyError for a table that does not exist."""
    return _MARK.sub(lambda found: TABLES[found.group(1)](), markdown)


def rewrite_links(markdown: str, page: str) -> str:
    """Return ``markdown`` with each link to a file outside docs/ changed to the page made of the file, or to text."""
    source = PAGES.get(page)
    folder = (ROOT / source).parent if source else (ROOT / "docs" / page).parent

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found.group(1), found.group(2), found.group(3) or ""
        if ":" in target or not (folder / target).exists():
            return found.group()  # mkdocs reports it
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        made = {file: name for name, file in PAGES.items()}.get(path)
        if made is not None:
            return f"[{text}]({'../' * page.count('/')}{made}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})" if source else found.group()
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return _LINK.sub(link, markdown)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from elsewhere in the repository."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with its tables and with links that work on the site."""
    return rewrite_links(fill_tables(markdown), page.file.src_uri)
