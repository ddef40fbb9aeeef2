"""The error a command prints without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can mend; the message says what came, what is accepted and what to do."""


class DivergedError(UserError):
    """A model whose weights, loss or logits are not finite: it has no score."""


_LONGEST = 600  # letters of another library's message


def reason(error: BaseException) -> str:
    """Return the kind and the whole text of another library's error in one line, cut only where it is very long."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def library_errors(what: str, kind: type[UserError] = UserError, advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises while it reads a user's model, adapter or hub id into a UserError.

    The hub, damaged files, missing files and missing packages each raise exceptions of their own, which no list holds.

    Args:
        what: the beginning of the sentence, such as "--model x: its tokenizer cannot be loaded".
        kind: the class to raise.
        advice: what to do, behind the reason.

    Raises:
        UserError: naming the library's exception and its whole text.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = str(error)
        if "trust_remote_code" in said:
            raise kind(
                f"{what}: it comes with code of its own, which flare's commands do not run; use a model whose "
                "architecture is in transformers, or call flare.fast_lora in Python"
            ) from error
        if "ignore_mismatched_sizes" in said:  # transformers' text points to a report in its log
            raise kind(
                f"{what}: its weights have other shapes than its config.json says, so the files are not of one model"
            ) from error
        raise kind(f"{what} ({reason(error)}){advice}") from error
