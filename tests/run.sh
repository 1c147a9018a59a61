#!/usr/bin/env bash
# Everything the project checks, on a bare machine with Python 3.11+: makes .venv, installs, lints,
# checks types, runs the tests. Arguments go to pytest (`tests/run.sh -k threshold`).
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,demo]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# One thread a process: two of them share the cores, and the work.
run() {
  OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
}
if (($#)); then
  run "$@"
  exit
fi
failed=0
run tests/cluster || failed=$? # by themselves: they mostly wait, and others would hold them up
run --ignore tests/cluster || failed=$?
exit "$failed"
