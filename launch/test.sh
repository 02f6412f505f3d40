#!/usr/bin/env bash
# Every check of the repository. Arguments go to pytest: launch/test.sh -k golden
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ready dev
cd "$ROOT"
PATH=$(dirname "$PYTHON"):$PATH
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
ruff check
ruff format --check
mypy
lint-imports
exec pytest -n auto --dist loadgroup "$@"
