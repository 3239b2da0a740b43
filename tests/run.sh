#!/usr/bin/env bash
# The tests, with everything that they need: QEMU, Python packages, a virtual environment.
#
#   ./tests/run.sh                                        static checks, all that needs no QEMU, and a
#                                                         sample of every other kind (tests/sample.py)
#                                                         on the machine's QEMU: ten minutes at most
#                                                         on two cores; says what it left out
#   ./tests/run.sh PYTEST ARGUMENT ...                    those tests
#   ./tests/run.sh --full                                 all that CI leaves out too: every step to
#                                                         break at, every QEMU and Python whole;
#                                                         two hours and more
#   ./tests/run.sh --at-once NUMBER ...                   the same tests (of this line, the first, or
#                                                         --debug-asyncio), shared out among so many
#                                                         processes, for most of them wait
#   ./tests/run.sh --all-qemu [PYTEST ARGUMENT ...]       block jobs on QEMU 5.2 to the newest,
#                                                         and the manual's table of them
#   ./tests/run.sh --other-qemu [PYTEST ARGUMENT ...]     on all but the machine's own, what can
#                                                         differ there (tests/choice.py)
#   ./tests/run.sh --debug-asyncio [PYTEST ARGUMENT ...]  all tests in Python's development
#                                                         mode, the daemons' asyncio included
#   ./tests/run.sh --soak MINUTES                         random operations beside a model of the
#                                                         disks; memory and open files must not grow
#   ./tests/run.sh --all-python [PYTEST ARGUMENT ...]     unit tests, and some others, on every
#                                                         Python from 3.11 to Debian's newest
#   ./tests/run.sh --other-python                         unit tests on the newest, and a sample
#                                                         of them on those before it
#   ./tests/run.sh --page [PYTEST ARGUMENT ...]           the daemon's page in a real browser, which is
#                                                         installed for that
#   ./tests/run.sh --types                                an embedder's program as pyright reads it,
#                                                         which is installed for that, with node
#   ./tests/run.sh --judges                               what the programs of others say: promtool of
#                                                         the alert rules, redocly of the API's document
#   ./tests/run.sh --coverage [PYTEST ARGUMENT ...]       lines and branches of what decides, all of
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
# or $QMPCOMMIT_GUEST; programs of others that judge into .judges, or $QMPCOMMIT_JUDGES.
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
JUDGES=${QMPCOMMIT_JUDGES:-.judges}

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

# What is run on a Python between the oldest and the newest: what rests on asyncio, on pydantic and
# on the grammar of types.
SAMPLE=(tests/unit/test_{cancellation,config,events,journal,policy,schema}.py)

# All environments are made at once, for that is mostly waiting; then one is tested after the other.
on_pythons() {
    local base=$VENV found=$1 version python failed=0 results=() filling=()
    shift
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

# The oldest and the newest whole, a sample on those between; the environment's own had its tests.
on_other_pythons() {
    local found own between ends failed=0
    found=$(all_pythons)
    own=$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    ends=$(sed -n '1p;$p' <<<"$found" | uniq | grep -v "^$own " || true)
    between=$(sed '1d;$d' <<<"$found" | grep -v "^$own " || true)
    [ -z "$ends" ] || on_pythons "$ends" "$@" || failed=1
    [ -z "$between" ] || on_pythons "$between" "${SAMPLE[@]}" || failed=1
    return $failed
}

# Everything, each part though another has failed.
full() {
    local measured failed=() part
    unset QMPCOMMIT_TEST_STRIDE
    measured=$(mktemp -d)
    say "Everything is run, for two hours and more, in this order:"
    say "  unit tests in debug mode, with the static checks; every line and branch counted"
    say "  the command, the daemon, real guests, the model and hostile input, in debug mode;"
    say "    killed and cut off at every step"
    say "  block jobs on every QEMU from 5.2 to the newest, with a fault at every message;"
    say "    the manual's table of them is written"
    say "  unit tests on every Python from 3.11 to the newest"
    say "  the daemon's page in a browser, and an embedder's program in another type checker"
    for part in "--at-once 4 --debug-asyncio tests/unit" \
        "--at-once 4 --debug-asyncio --ignore=tests/unit --ignore=tests/real" \
        --all-qemu --coverage-report --all-python --page --types; do
        say "--- $part"
        case $part in *--ignore* | --all-python | --page | --types) unset COVERAGE_FILE ;; *)
            export COVERAGE_FILE=$measured/lines ;;
        esac
        # shellcheck disable=SC2086  # words of our own
        ./tests/run.sh $part || failed+=("$part")
    done
    rm -rf "$measured"
    [ ${#failed[@]} -gt 0 ] || { say "all of it passed"; return; }
    say "FAILED:"
    for part in "${failed[@]}"; do say "  ./tests/run.sh $part"; done
    return 1
}

# Programs of others that judge what we ship, in $JUDGES/bin; what can't be had is said.
need_judges() {
    local fetched
    mkdir -p "$JUDGES/bin"
    if ! command -v promtool >/dev/null && command -v apt-get >/dev/null; then
        say "unpacking promtool into $JUDGES"
        fetched=$(mktemp -d)
        (cd "$fetched" && { apt-get -q download prometheus ||
            { as_root apt-get -q -y update && apt-get -q download prometheus; }; }) \
            >/dev/null 2>&1 &&
            dpkg-deb --fsys-tarfile "$fetched"/prometheus_*.deb |
                tar -x -O ./usr/bin/promtool >"$JUDGES/bin/promtool" &&
            chmod +x "$JUDGES/bin/promtool" || rm -f "$JUDGES/bin/promtool"
        rm -rf "$fetched"
    fi
    if ! command -v redocly >/dev/null && command -v npm >/dev/null; then
        say "installing redocly into $JUDGES"
        npm install --silent --no-audit --no-fund --prefix "$JUDGES" @redocly/cli@2 >/dev/null &&
            ln -sf ../node_modules/.bin/redocly "$JUDGES/bin/redocly" || true
    fi
    for fetched in promtool redocly; do
        command -v "$fetched" >/dev/null || say "$fetched can't be had here, and judges nothing"
    done
}

need_qemu
flags=()
at_once=
if [ "${1:-}" = --at-once ]; then
    at_once=$2
    shift 2
fi
case ${1:-} in
--full)
    full
    exit
    ;;
--all-python | --other-python)
    which=$1
    shift
    [ $# -gt 0 ] || set -- tests/unit tests/real/test_cycle.py
    if [ "$which" = --all-python ]; then
        on_pythons "$(all_pythons)" "$@"
    else
        need_venv test
        on_other_pythons "$@"
    fi
    exit
    ;;
--all-qemu | --other-qemu)
    choice=()
    [ "$1" = --all-qemu ] || choice=(--choice)
    shift
    need_venv test
    need_guest
    exec "$VENV/bin/python" -m tests.all_qemu "${QMPCOMMIT_QEMUS:-.qemus}" "${choice[@]}" "$@"
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
--page)
    shift
    command -v chromium >/dev/null || apt_install chromium fonts-dejavu-core
    need_venv page
    [ $# -gt 0 ] || set -- tests/daemon/test_page_browser.py
    exec "$VENV/bin/python" -m pytest "$@"
    ;;
--types)
    need_venv types
    exec "$VENV/bin/python" -m pytest tests/typing
    ;;
--judges)
    need_venv test
    PATH=$(realpath -m "$JUDGES")/bin:$PATH
    need_judges
    exec "$VENV/bin/python" -m pytest tests/hostile/test_judges.py
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
if [ -z "$at_once" ] && [ ${#flags[@]} -eq 0 ] && [ $# -eq 0 ]; then
    export QMPCOMMIT_TEST_STRIDE=${QMPCOMMIT_TEST_STRIDE:-1000}
    say "A sample of the tests is run: ./tests/run.sh --full runs all of them, for some hours, and"
    say "./tests/run.sh tests/real (or any other of pytest's arguments) those that you name."
    exec "$VENV/bin/python" -m tests.crew 2 -- -p tests.sample
fi
if [ -n "$at_once" ]; then
    exec "$VENV/bin/python" -m tests.crew "$at_once" "${flags[@]}" -- "$@"
fi
exec "$VENV/bin/python" "${flags[@]}" -m pytest "$@"
