# shellcheck shell=bash
# Sourced by the scripts beside it.
#
#   ready EXTRA    an environment with torch and dist_lamb[EXTRA]; sets PYTHON to its interpreter
#
# The environment is $VENV if that is set, else the active virtualenv or conda environment if it has
# torch, else .venv in the repository. What is missing is installed once; a torch that is there
# stays as it is.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# What is installed where there is no torch, and the oldest that works.
TORCH_VERSION=2.13.0
TORCH_OLDEST=2.11

fail() {
    echo "${0##*/}: error: $*" >&2
    exit 1
}

note() {
    echo "${0##*/}: $*" >&2
}

# Version of the torch that $1, an interpreter, imports; empty if it has none. As pip knows it, to
# which torch.__version__ may add a "+cu130" that no registry has.
torch_version() {
    "$1" -c 'import torch; from importlib.metadata import version; print(version("torch"))' \
        2>/dev/null || true
}

# Whether dotted version $1 is at least $2; "2.13.0+cpu" counts as 2.13.
at_least() {
    [ "$(printf '%s\n%s\n' "$2" "${1%%+*}" | sort -V | head -n 1)" = "$2" ]
}

# An interpreter to make environments with.
system_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; python3 here is" \
        "$(python3 --version 2>/dev/null || echo 'not installed')"
}

make_environment() {
    local base
    [ ! -e "$1" ] || fail "$1 is there but is no environment: it has no bin/python"
    base=$(system_python)
    note "making the environment $1"
    if ! "$base" -m venv "$1"; then
        # The next call would take an incomplete environment for a complete one.
        rm -rf "$1"
        fail "python3 -m venv does not work; on Debian and Ubuntu:" \
            "apt-get install -y python3-venv"
    fi
}

ready() {
    local extra=$1 directory active stamp version constraints
    directory=${VENV:-}
    if [ -z "$directory" ]; then
        active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
        if [ -n "$active" ] && [ -n "$(torch_version "$active/bin/python")" ]; then
            directory=$active
        else
            directory=$ROOT/.venv
        fi
    fi
    [ -x "$directory/bin/python" ] || make_environment "$directory"
    PYTHON=$directory/bin/python

    # The root is part of it because the package is installed as a link to it.
    stamp=$(echo "$ROOT" | cat - "$ROOT/pyproject.toml" | sha256sum)
    local marks=("$directory/.dist_lamb-$extra")
    [ "$extra" = dev ] || marks+=("$directory/.dist_lamb-dev")
    local mark
    for mark in "${marks[@]}"; do
        if [ -f "$mark" ] && [ "$(cat "$mark")" = "$stamp" ]; then
            return
        fi
    done

    version=$(torch_version "$PYTHON")
    if [ -z "$version" ]; then
        note "installing torch $TORCH_VERSION into $directory (minutes)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "torch==$TORCH_VERSION" ||
            fail "torch $TORCH_VERSION could not be installed into $directory"
        version=$(torch_version "$PYTHON")
        [ -n "$version" ] || fail "torch was installed into $directory but cannot be imported:" \
            "$("$PYTHON" -c 'import torch' 2>&1 | tail -n 1)"
    fi
    at_least "$version" "$TORCH_OLDEST" ||
        fail "$directory has torch $version; $TORCH_OLDEST or newer is needed." \
            "Upgrade it there, or name another environment: VENV=path ${0##*/}"

    note "installing dist_lamb[$extra] into $directory, beside torch $version"
    constraints=$directory/.dist_lamb-constraints
    # Without it, a dependency that asks for a newer torch would replace the one that is there.
    echo "torch==$version" >"$constraints"
    # Triton 3.6, which comes with torch 2.11, has an interpreter that fails with newer ones.
    at_least "$version" 2.12 || echo "numpy<2.4" >>"$constraints"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" --editable "${ROOT}[$extra]" ||
        fail "dist_lamb[$extra] could not be installed into $directory"
    echo "$stamp" >"$directory/.dist_lamb-$extra"
}
