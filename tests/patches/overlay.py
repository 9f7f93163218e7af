"""A real package with patches, beside the real one: links to it, and copies of what the patches change."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ci.check_patches import Patch, apply


def overlay(package: Path, patches: Sequence[Patch], folder: Path) -> None:
    """Make ``folder`` a place on PYTHONPATH before the one that ``package`` is in.

    Raises ValueError where a patch does not apply to that package.
    """
    for patch in patches:
        for name in patch.touches():
            _copy(package.parent, folder, Path(name))
    for patch in patches:
        apply(patch, folder)


def _copy(origin: Path, folder: Path, name: Path) -> None:
    """Copy one file; its folders are real ones, whose other entries are links."""
    for parent in reversed(name.parents[:-1]):
        here = folder / parent
        if here.is_symlink():
            here.unlink()
        if not here.exists():
            here.mkdir(parents=True)
            for entry in (origin / parent).iterdir():
                if entry.name != "__pycache__":
                    (here / entry.name).symlink_to(entry)
    target = folder / name
    if target.is_symlink():
        target.unlink()
        shutil.copyfile(origin / name, target)
