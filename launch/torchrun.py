"""torchrun that ends at a signal with a status, where torchrun itself prints a traceback.

    python launch/torchrun.py --standalone --nproc-per-node 2 launch/pretrain.py CONFIG

Everything else, and every option, is torchrun's.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as error:
        # As a shell reports a process that a signal ended.
        sys.exit(128 + error.sigval)
