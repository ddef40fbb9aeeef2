"""`python -m flare` is the command `flare`; `accelerate launch -m flare` is the same in several processes."""

import sys

from .cli import main
from .experiments.utils.processes import leave

if __name__ == "__main__":
    status = main()
    if status == 0:
        leave()
    sys.exit(status)
