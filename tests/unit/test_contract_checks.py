"""The checks of upstream's sources: each kind of fact can fail, and says what it found."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from ci.contract import code
from ci.contract.facts import PACKAGE, Place, check, imported, patched, table, written
from ci.releases import Sources
from vllm_ray_ascend.patches import PATCHES, Patch

pytestmark = pytest.mark.unit

SOURCE = '''
from elsewhere import borrowed
if TYPE_CHECKING:
    checked = 1

class Engine(Base):
    declared: int

    def step(self, request, *, timeout=None):
        """What it does."""
        self.made = helper(request)
        return self.made.result(timeout)
'''


def sources(folder: Path, text: str = SOURCE, version: str = "1.0") -> Sources:
    (folder / "module.py").write_text(text)
    return Sources("vllm", version, folder, frozenset({"module.py"}))


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"has": ["borrowed", "checked", "Engine"]}, ""),
        ({"of": "Engine", "has": ["declared", "made", "step"]}, ""),
        ({"of": "Engine", "has": ["gone"]}, "module.py, Engine has gone\n    found: not defined there"),
        ({"of": "Engine.gone", "has": ["x"]}, "module.py, Engine.gone\n    found: no such name"),
        ({"of": "Engine.step", "uses": ["helper"]}, ""),
        ({"of": "Engine.step", "uses": ["other"]}, "uses other\n    found: never read there"),
        ({"of": "Engine.step", "takes": ["self", "timeout"]}, ""),
        ({"of": "Engine.step", "takes": ["timeout", "self"]}, "found: takes self, request, timeout"),
        ({"of": "Engine.step", "says": ["self.made.result(timeout)", "self.made = helper(request)"]}, ""),
        ({"of": "Engine.step", "says": ["self.made.result()"]}, "says `self.made.result()`\n    found: it does not"),
        ({"of": "Engine", "bases": ["Base"]}, ""),
        ({"of": "Engine", "bases": ["Other"]}, "made from Other\n    found: Base"),
        ({"of": "Engine.step", "body": {"==2.*": "0"}}, "for this release nobody has read it"),
    ],
)
def test_a_fact_holds_or_says_what_is_there(tmp_path: Path, facts: dict[str, object], says: str) -> None:
    broken = Place("vllm", "module.py", by="here", **facts).broken(sources(tmp_path))  # type: ignore[arg-type]
    assert (says in str(broken[0]) and "relied on by: here" in str(broken[0])) if says else not broken


def test_a_missing_file_is_reported_unless_it_may_be_missing(tmp_path: Path) -> None:
    place = Place("vllm", "gone.py", by="here", has=["x"])
    assert "no such file" in str(place.broken(sources(tmp_path))[0])
    assert not Place("vllm", "gone.py", by="here", has=["x"], unless_gone=True).broken(sources(tmp_path))


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (("timeout=None):", "timeout: float | None = None) -> object:"), True),
        (('"""What it does."""', '"""What it did."""  # a comment'), True),
        (("helper(request)", "helper(\n            request,\n        )"), True),
        (("result(timeout)", "result()"), False),
        (("timeout=None", "timeout=1"), False),
    ],
)
def test_a_fingerprint_is_of_what_is_done(changed: tuple[str, str], same: bool) -> None:
    bodies = [code.find(code.parse(text), "Engine.step") for text in (SOURCE, SOURCE.replace(*changed))]
    prints = {code.fingerprint(body) for body in bodies if body is not None}
    assert len(prints) == (1 if same else 2)


def test_a_body_that_was_read_in_another_release_is_named(tmp_path: Path) -> None:
    body = code.find(code.parse(SOURCE), "Engine.step")
    assert body is not None
    place = Place("vllm", "module.py", "Engine.step", by="here", body={"<1": code.fingerprint(body)})
    assert ", as in <1" in str(place.broken(sources(tmp_path))[0])


def test_our_imports_are_places_too() -> None:
    ours = {(place.project, place.file, *place.has) for place in imported({})}
    assert ("vllm", "vllm/v1/executor/ray_executor_v2", "RayExecutorV2") in ours
    assert ("ray", "ray/_private/state", "available_resources_per_node") in ours


@pytest.mark.parametrize("key", ["ray/_private/state:available_resources_per_node", "ray/_private/state", "ray"])
def test_an_import_may_be_for_some_releases_only(key: str) -> None:
    name = ("available_resources_per_node",)
    found = [place for place in imported({key: ">=2.50"}) if (place.file, place.has) == ("ray/_private/state", name)]
    assert found and not any(place.holds_in("2.48.0") for place in found)


def row(releases: str, *names: str) -> Patch:
    return Patch("vllm.module", names, "wrap", "plugin.py", "what", "why", releases, "later", "now")


@pytest.mark.parametrize(
    ("releases", "name", "expected"),
    [
        ("vllm", "Engine.step", ""),
        ("vllm >=1.0; vllm-ascend >=7", "Engine.step:helper", ""),
        ("vllm", "Engine", ""),
        ("vllm <1.0", "gone", ""),
        ("vllm", "Engine._vllm_ray_ascend", ""),
        ("vllm", "Engine.gone", "Engine has gone\n    found: not defined there"),
        ("vllm", "Engine.step:other", "Engine.step uses other\n    found: never read there"),
        ("vllm <1.0", "Engine.step", "Engine lacks step\n    found: it is there, and not in <1.0"),
    ],
)
def test_a_patched_name_is_there_in_the_releases_of_its_row_and_no_others(
    releases: str, name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/module.py").write_text(SOURCE)
    monkeypatch.setattr("ci.contract.facts.table", lambda: patched([row(releases, name)]))
    broken = check(Sources("vllm", "1.0", tmp_path, frozenset({"vllm/module.py"})))
    assert (
        (expected in str(broken[0]) and "relied on by: plugin.py: what" in str(broken[0])) if expected else not broken
    )


def test_every_patched_name_has_a_place() -> None:
    assert len(patched()) == sum(len(patch.names) for patch in PATCHES)
    assert set(map(repr, patched())) <= set(map(repr, table()))


def test_no_patched_name_is_written_again_in_the_facts() -> None:
    def names(places: list[Place]) -> set[tuple[str, str, str]]:
        return {(place.file, place.of, name) for place in places for name in (*place.has, *place.uses)}

    assert not names(patched()) & names(written())


def test_the_table_is_well_formed() -> None:
    for place in table():
        assert (PACKAGE / place.by.partition(":")[0]).is_file()
        assert all(SpecifierSet(range_) for range_ in place.body or {})


def test_a_release_without_anything_breaks_every_fact(tmp_path: Path) -> None:
    nothing = Sources("ray", "2.60.0", tmp_path, frozenset())
    ours = [place for place in table() if place.project == "ray" and not place.unless_gone and place.holds_in("2.60.0")]
    assert len(check(nothing)) == len(ours) > 5
