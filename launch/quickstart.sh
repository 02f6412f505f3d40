#!/usr/bin/env bash
# Installs what is missing, then trains a small BERT on two CPU ranks: launch/quickstart.sh
# Arguments go to launch/pretrain.py, e.g. --optim.lr 5e-3 --train.run_dir runs/slower
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ready pretrain
# With torchrun's own store, restarted workers would read the keys of those before them and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun's default, set here so that it does not warn; pretrain.py sets its number of threads.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" "$ROOT/launch/torchrun.py" --standalone --nproc-per-node 2 \
    "$ROOT/launch/pretrain.py" "$ROOT/configs/quickstart.toml" "$@"
