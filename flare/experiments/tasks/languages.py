"""Look up languages in a table of names, ISO 639-3 codes and NLLB tags.

The table has every language of NLLB-200 (Costa-jussà et al., 2022) with the FLORES-200 tag that NLLB's tokenizer uses.
It also has the languages of NusaX, MasakhaNEWS and MasakhaNER 2 that NLLB lacks. For some of these, the table gives the
NLLB tag of a related language, with which the paper translates. Machine translation and data sets on the hub need a
language of this table. Folders of your own data may have any name.
"""

from __future__ import annotations

import difflib
import functools
import json
from dataclasses import dataclass
from importlib import resources

from ..utils.errors import UserError


@dataclass(frozen=True)
class Language:
    """A language.

    Attributes:
        name: English name.
        iso639_3: three-letter code.
        nllb: NLLB tag to translate with. It is the tag of a related language if `note` says so, and None if there is no
            suitable tag.
        also: other names and codes of the language.
        note: message shown to the user when the language is translated; None if there is nothing to say.
    """

    name: str
    iso639_3: str
    nllb: str | None
    also: tuple[str, ...] = ()
    note: str | None = None

    @property
    def substituted(self) -> bool:
        """Return whether `nllb` is the tag of another language."""
        return self.nllb is not None and not self.nllb.startswith(self.iso639_3)


def _read() -> tuple[Language, ...]:
    text = resources.files(__package__).joinpath("languages.json").read_text(encoding="utf-8")
    return tuple(
        Language(**{"iso639_3": (row["nllb"] or "")[:3], **row, "also": tuple(row.get("also", ()))})
        for row in json.loads(text)
    )


LANGUAGES: tuple[Language, ...] = _read()
#: Every tag of NLLB-200.
NLLB_TAGS: tuple[str, ...] = tuple(sorted({entry.nllb for entry in LANGUAGES if entry.nllb is not None}))


def _key(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


@functools.cache
def _by_key() -> dict[str, Language]:
    """Return a mapping from every name and code to its language.

    If a language has several scripts, the entry without a script in its name takes precedence.
    """
    by_key: dict[str, Language] = {}
    plain_first = sorted(LANGUAGES, key=lambda entry: "script)" in entry.name)
    for spellings in (
        lambda entry: [entry.name, *([] if entry.substituted else [entry.nllb or ""])],
        lambda entry: list(entry.also),
        lambda entry: [entry.iso639_3],
    ):
        for entry in plain_first:
            for spelling in spellings(entry):
                if spelling:
                    by_key.setdefault(_key(spelling), entry)
    return by_key


def language(name_or_code: str) -> Language:
    """Return a language by its name, ISO code or NLLB tag, ignoring case.

    Raises:
        UserError: the language is not in the table; the message suggests similar names.
    """
    entry = _by_key().get(_key(name_or_code))
    if entry is None:
        raise UserError(
            f"the language {name_or_code!r} is not known; accepted are English names (swahili), ISO codes (swh, sw) "
            f"and NLLB tags (swh_Latn){_suggestion(name_or_code)}"
        )
    return entry


def nllb_code(name: str, override: str | None = None) -> str:
    """Return the NLLB tag of a language; for some languages, the tag of a related language (see `Language.note`).

    Args:
        name: name or code of the language. The name of a data folder is accepted if it is a name or code.
        override: an NLLB tag to return instead of the language's tag.

    Raises:
        UserError: the override is not a tag of NLLB, or the language is not in the table or has no tag.
    """
    if override is not None:
        if override not in NLLB_TAGS:
            similar = _similar(override, {_key(tag): tag for tag in NLLB_TAGS})
            raise UserError(
                f"NLLB has no language {override!r}; its tags are an ISO 639-3 code and a script, such as swh_Latn"
                f"{_did_you_mean(similar)}"
            )
        return override
    try:
        entry = language(name)
    except UserError as error:
        raise UserError(f"{error} The NLLB tag can also be given with --source-code or --target-code") from error
    if entry.nllb is None:
        raise UserError(
            f"{entry.note}; to translate {name} anyway, give the tag of a related language with --source-code or "
            "--target-code"
        )
    return entry.nllb


def _suggestion(name: str) -> str:
    return _did_you_mean(_similar(name, {key: f"{entry.name} ({entry.nllb})" for key, entry in _by_key().items()}))


def _similar(name: str, known: dict[str, str]) -> list[str]:
    keys = difflib.get_close_matches(_key(name), list(known), n=3, cutoff=0.6)
    return list(dict.fromkeys(known[key] for key in keys))


def _did_you_mean(names: list[str]) -> str:
    return f". Did you mean {' or '.join(names)}?" if names else "."
