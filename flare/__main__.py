"""Run the command `flare` with `python -m flare`, or in several processes with `accelerate launch -m flare`."""

import sys

from .cli import main
from .experiments.utils.processes import leave_group

if __name__ == "__main__":
    status = main()
    if status == 0:
        leave_group()
    sys.exit(status)
