#!/usr/bin/env bash
# One entry for CI: ci/run_suite.sh SUITE [--flaky fail] [--pytest -k x]; --list lists the suites.
# Makes .venv with all packages, unless CI_PYTHON names a Python that has them (a container of ci/containers).
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -n "${CI_PYTHON:-}" ]]; then
  exec "$CI_PYTHON" -m ci.suite "$@"
fi
for name in "${PYTHON:-python3.11}" python3.12 python3.10 python3; do
  if command -v "$name" >/dev/null; then python="$name"; break; fi
done
: "${python:?no Python found: install python3.11, or name one in PYTHON}"
if [[ " $* " == *" --list "* ]]; then exec "$python" -m ci.suite --list; fi
"$python" demo/install.py test
exec .venv/bin/python -m ci.suite "$@"
