"""``python -m torch_eplb``: see `torch_eplb.offline.cli`."""

import os
import sys

from torch_eplb.values.threads import ONE_THREAD

if __name__ == "__main__":
    for name, count in ONE_THREAD.items():
        os.environ.setdefault(name, count)  # before numpy is imported
    from torch_eplb.offline.cli import main

    sys.exit(main())
