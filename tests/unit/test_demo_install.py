"""What `demo/install.py` leaves behind where it is interrupted, without pip."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo import install


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
