"""`python -m ci.contract [PROJECT==VERSION ...]`: check that upstream is as relied on. --bodies prints fingerprints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ci import matrix
from ci.contract import code
from ci.contract.facts import PROJECTS, check, files, table
from ci.releases import ReleaseError, Sources, fetch

_THREADS = 8


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ci.contract", description=__doc__)
    parser.add_argument("releases", nargs="*", metavar="PROJECT==VERSION", help="default: all of ci/matrix.toml")
    parser.add_argument("--bodies", action="store_true", help="print fingerprints for facts.toml")
    options = parser.parse_args(arguments)
    wanted = [(project, version) for project, _, version in (each.partition("==") for each in options.releases)]
    wanted = wanted or supported()
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            read = list(pool.map(lambda release: fetch(release[0], release[1], files(release[0])), wanted))
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 2
    if options.bodies:
        print_bodies(read)
        return 0
    broken = 0
    for sources in read:
        found = check(sources)
        broken += len(found)
        print(f"{sources.project} {sources.version}: {f'{len(found)} facts changed' if found else 'as relied on'}")
        for each in found:
            print(f"  {each}")
    return 1 if broken else 0


def supported() -> list[tuple[str, str]]:
    """Return every release of the matrix that has a contract."""
    lines = matrix.read()
    return [(project, version) for project in PROJECTS.values() for version in lines.versions(project)]


def print_bodies(read: Sequence[Sources]) -> None:
    """Print, for each place with a body, its fingerprints in these releases."""
    for place in table():
        prints: dict[str, list[str]] = {}
        for sources in read:
            text = sources.text(place.file) if sources.project == place.project else None
            node = None if text is None else code.find(code.parse(text), place.of)
            if node is not None and place.body is not None:
                prints.setdefault(code.fingerprint(node), []).append(sources.version)
        for value, versions in prints.items():
            print(
                f'{place.file} {place.of}: ">={versions[0]},<={versions[-1]}" = "{value}"  # {len(versions)} releases'
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
