"""Run lm-evaluation-harness with ``--model flare`` registered: ``python -m flare.experiments.harness``."""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

from ..utils.errors import UserError


def main() -> int:
    """Run lm_eval's command; return the exit status."""
    try:
        cli_evaluate()
    except UserError as error:
        print(f"flare.experiments.harness: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
