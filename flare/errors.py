"""The error a command prints without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; the message says what came, what is accepted and what to do."""


class DivergedError(UserError):
    """A model whose weights, loss or logits are not finite: it has no score."""
