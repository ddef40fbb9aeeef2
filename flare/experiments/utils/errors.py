"""Errors that a command prints without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """An error the user can fix; the message says which value was given, what is accepted and what to do."""


class DivergedError(UserError):
    """An error about a model whose weights, loss or logits are not finite, so that it has no score."""


_LONGEST = 600  # maximum number of characters of another library's message


def reason(error: BaseException) -> str:
    """Return the class and the text of another library's error in one line. The text is cut after 600 characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def library_errors(what: str, kind: type[UserError] = UserError, advice: str = "") -> Iterator[None]:
    """Turn every exception that a library raises while it reads a user's model, adapter or hub id into a UserError.

    The hub, damaged files, missing files and missing packages raise too many exception classes to list.

    Args:
        what: start of the message, such as "--model x: its tokenizer cannot be loaded".
        kind: class of the error to raise.
        advice: end of the message, which says what to do.

    Raises:
        UserError: the library raised an exception. The message contains the exception's class and text, except for two
            known causes, which it explains instead: code in the model's folder, and weights whose shapes differ from
            the model's config.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise kind(
                f"{what}: the folder has its own code, which the commands of flare do not run; use a model whose "
                "architecture is in transformers, or call flare.fast_lora in Python"
            ) from error
        if "ignore_mismatched_sizes" in text:  # transformers' own message only refers to its log
            raise kind(
                f"{what}: its weights have other shapes than its config.json says; the files belong to different models"
            ) from error
        raise kind(f"{what} ({reason(error)}){advice}") from error
