"""``python -m torch_eplb``: see `torch_eplb.offline.cli`."""

import sys

from torch_eplb.offline.cli import main

if __name__ == "__main__":
    sys.exit(main())
