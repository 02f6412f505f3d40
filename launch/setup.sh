# shellcheck shell=bash
# Sourced by the scripts beside it.
#
#   ready EXTRA    an environment with torch and dist_lamb[EXTRA]; sets PYTHON to its interpreter
#
# The environment is $VENV if that is set, else the active virtualenv or conda environment if it has
# torch, else .venv in the repository, made by $PYTHON (python3 if that is not set). What is missing
# is installed once; a torch that is there stays as it is.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

ready() {
    local base=${PYTHON:-python3} home=$ROOT/.venv stamp mark
    local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    if "$active/bin/python" -c 'import torch' 2>/dev/null; then home=$active; fi
    home=${VENV:-$home}
    PYTHON=$home/bin/python
    [ -x "$PYTHON" ] || "$base" -m venv "$home"
    # An environment that could not be finished for want of python3-venv, or one of uv's.
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip
    # The root is part of it because the package is installed as a link to it.
    stamp=$(echo "$ROOT" | cat - "$ROOT/pyproject.toml" | sha256sum)
    for mark in "$1" dev; do
        [ "$stamp" != "$(cat "$home/.dist_lamb-$mark" 2>/dev/null)" ] || return 0
    done
    echo "${0##*/}: installing dist_lamb[$1] into $home (minutes)" >&2
    # Without the first line, a dependency that asks for a newer torch would replace the one there.
    local kept=$home/.dist_lamb-constraints
    { "$PYTHON" -m pip list --format=freeze | grep '^torch==' || echo torch==2.13.0; } >"$kept"
    # Triton 3.6, which comes with torch 2.11, has an interpreter that fails with newer ones.
    if grep -q '^torch==2\.11' "$kept"; then echo 'numpy<2.4' >>"$kept"; fi
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -c "$kept" -e "${ROOT}[$1]"
    echo "$stamp" >"$home/.dist_lamb-$1"
}
