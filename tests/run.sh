#!/usr/bin/env bash
# All tests, with everything that they need: QEMU, Python packages, a virtual environment.
#
#   ./tests/run.sh [PYTEST ARGUMENT ...]
#   ./tests/run.sh --all-qemu [PYTEST ARGUMENT ...]       block jobs on QEMU 5.2 to the newest,
#                                                         and the README's table of them
#   ./tests/run.sh --debug-asyncio [PYTEST ARGUMENT ...]  all tests in Python's development
#                                                         mode, the daemons' asyncio included
#   ./tests/run.sh --soak MINUTES                         random operations beside a model of the
#                                                         disks; memory and open files must not grow
#   ./tests/run.sh --all-python [PYTEST ARGUMENT ...]     unit tests, and some others, on every
#                                                         Python from 3.11 to Debian's newest
#   ./tests/run.sh --coverage [PYTEST ARGUMENT ...]       lines and branches of commit/ and qmp/, all of
#                                                         which tests/unit and tests/real must reach
#   ./tests/run.sh --coverage-report                      the same, of what was measured before
#   ./tests/run.sh --mutants [MUTMUT ARGUMENT ...]        changes to what decides that no test notices;
#                                                         10 minutes on two idle cores, not in CI
#   ./tests/run.sh --fuzz SECONDS [TARGET]                coverage-guided fuzzing of what reads foreign
#                                                         data, so long for each target; not in CI
#
# On Debian and Ubuntu what is missing is installed with apt-get (by sudo where you are not
# root); elsewhere it is named. The environment is .venv, or $QMPCOMMIT_VENV; it is filled again
# when pyproject.toml has changed. Other QEMUs are unpacked into .qemus, or $QMPCOMMIT_QEMUS,
# other Pythons into .pythons, or $QMPCOMMIT_PYTHONS, and what a real guest is made of into .guest,
# or $QMPCOMMIT_GUEST.
#
# Tests that kill a process or break its line at every step take a while; QMPCOMMIT_TEST_STRIDE=N
# has them try every N-th step, beginning with a random one.
#
# With COVERAGE_FILE=PATH, --debug-asyncio and --all-qemu (the latter on the machine's own QEMU)
# leave beside PATH which lines they have run, for --coverage-report: in CI that costs no run more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. examples/setup.sh

PYTHONS=${QMPCOMMIT_PYTHONS:-.pythons}

# Each Python from 3.11 on, once a version, the machine's own first: "VERSION PATH".
all_pythons() {
    local own
    own=$(print_pythons python3.{11..19} "$HOME"/.pyenv/versions/*/bin/python)
    # shellcheck disable=SC2046  # paths of our own
    {
        echo "$own"
        print_pythons $(./tests/other_pythons.sh "$PYTHONS" $(cut -d ' ' -f 1 <<<"$own"))
    } | sort -t . -k 2n -u -s
}

print_pythons() {
    local python
    for python in "$@"; do
        "$python" -c 'import sys; sys.version_info < (3, 11) and sys.exit(1)
print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null || true
    done
}

# All environments are made at once, for that is mostly waiting; then one is tested after the other.
on_all_pythons() {
    local base=$VENV found version python failed=0 results=() filling=()
    found=$(all_pythons)
    while read -r version python; do
        (VENV=$base-$version PYTHON=$python need_venv test) >"$base-$version.log" 2>&1 &
        filling+=($!)
    done <<<"$found"
    while read -r version python; do
        say "testing on Python $version ($python)"
        if ! wait "${filling[0]}"; then
            results+=("Python $version: not tested: $(tail -n 1 "$base-$version.log")")
            case $python in "$(realpath "$PYTHONS")"/*) ;; *) failed=1 ;; esac
        elif "$base-$version/bin/python" -m pytest -q \
            -o cache_dir="$(realpath "$base-$version")/cache" "$@" </dev/null; then
            results+=("Python $version: passed")
        else
            results+=("Python $version: FAILED")
            failed=1
        fi
        filling=("${filling[@]:1}")
    done <<<"$found"
    printf '%s\n' "${results[@]}"
    return $failed
}

need_qemu
flags=()
case ${1:-} in
--all-python)
    shift
    [ $# -gt 0 ] || set -- tests/unit tests/real/test_cycle.py
    on_all_pythons "$@"
    exit
    ;;
--all-qemu)
    shift
    need_venv test
    need_guest
    exec "$VENV/bin/python" -m tests.all_qemu "${QMPCOMMIT_QEMUS:-.qemus}" "$@"
    ;;
--debug-asyncio)
    shift
    flags=(-X dev ${COVERAGE_FILE:+-m coverage run --parallel-mode})
    ;;
--soak)
    shift
    need_venv test
    exec "$VENV/bin/python" -m tests.model.soak "$@"
    ;;
--coverage)
    shift
    need_venv test
    [ $# -gt 0 ] || set -- tests/unit tests/real
    "$VENV/bin/python" -m coverage run -m pytest "$@"
    exec "$VENV/bin/python" -m coverage report
    ;;
--coverage-report)
    need_venv test
    "$VENV/bin/python" -m coverage combine --quiet
    exec "$VENV/bin/python" -m coverage report
    ;;
--mutants)
    shift
    need_venv mutants
    PATH=$(cd "$VENV/bin" && pwd):$PATH exec "$VENV/bin/python" -m tests.mutation "$@"
    ;;
--fuzz)
    shift
    log=$(mktemp)
    need_venv fuzz 2>"$log" &  # waited for, so that it ends where it fails
    if ! wait $!; then
        say "atheris can't be installed here, and nothing was fuzzed:"
        say "$(grep -m 1 ERROR "$log" || tail -n 1 "$log")"
        rm "$log"
        exit 2
    fi
    rm "$log"
    exec "$VENV/bin/python" -m tests.fuzz "$@"
    ;;
esac
need_venv test
need_guest
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy" --strict qmpcommit tests examples
exec "$VENV/bin/python" "${flags[@]}" -m pytest "$@"
