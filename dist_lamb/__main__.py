"""``python -m dist_lamb inspect|verify|export|import DIR``: see :mod:`dist_lamb.checkpoint.cli`."""

import sys

from .checkpoint.cli import main

if __name__ == "__main__":
    sys.exit(main())
