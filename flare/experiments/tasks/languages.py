"""The one table of languages: names, ISO 639-3 codes and NLLB's tags.

It holds every language of NLLB-200 (Costa-jussà et al., 2022; the tags of FLORES-200 as NLLB's tokenizer has them) and
those of NusaX, MasakhaNEWS and MasakhaNER 2 that NLLB lacks, with the paper's substitutes. It is consulted for machine
translation and for configurations on the hub; a folder of your own data may be called anything.
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
    """One language.

    name: in English.
    iso639_3: its code of three letters.
    nllb: the tag to translate with, a related language's where `note` says so; None: there is none.
    also: other names and codes it is found by.
    note: what has to be said when it is translated.
    """

    name: str
    iso639_3: str
    nllb: str | None
    also: tuple[str, ...] = ()
    note: str | None = None

    @property
    def substituted(self) -> bool:
        """Whether `nllb` is the tag of another language."""
        return self.nllb is not None and not self.nllb.startswith(self.iso639_3)


def _read() -> tuple[Language, ...]:
    text = resources.files(__package__).joinpath("languages.json").read_text(encoding="utf-8")
    return tuple(
        Language(**{"iso639_3": (row["nllb"] or "")[:3], **row, "also": tuple(row.get("also", ()))})
        for row in json.loads(text)
    )


LANGUAGES: tuple[Language, ...] = _read()
#: Every tag NLLB-200 knows.
NLLB_TAGS: tuple[str, ...] = tuple(sorted({one.nllb for one in LANGUAGES if one.nllb is not None}))


def _key(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


@functools.cache
def _by_key() -> dict[str, Language]:
    """Every name and code -> its language. Of several scripts the one with the bare name comes first."""
    found: dict[str, Language] = {}
    plain_first = sorted(LANGUAGES, key=lambda one: "script)" in one.name)
    for spellings in (
        lambda one: [one.name, *([] if one.substituted else [one.nllb or ""])],
        lambda one: list(one.also),
        lambda one: [one.iso639_3],
    ):
        for one in plain_first:
            for spelling in spellings(one):
                if spelling:
                    found.setdefault(_key(spelling), one)
    return found


def language(name_or_code: str) -> Language:
    """A language by its name, ISO code or NLLB tag; upper or lower case.

    Raises:
        UserError: it is not in the table; the message suggests the nearest names.
    """
    found = _by_key().get(_key(name_or_code))
    if found is None:
        raise UserError(
            f"the language {name_or_code!r} is not known; accepted are English names (swahili), ISO codes (swh, sw) "
            f"and NLLB's tags (swh_Latn){_suggestion(name_or_code)}"
        )
    return found


def nllb_code(name: str, override: str | None = None) -> str:
    """NLLB's tag for a language, which for some is a related language's (see `Language.note`).

    Args:
        name: a name or code, or a folder's name that is one.
        override: a tag to take instead.

    Raises:
        UserError: an override that NLLB does not have, a language that is not in the table, or one without a tag.
    """
    if override is not None:
        if override not in NLLB_TAGS:
            near = _near(override, {_key(tag): tag for tag in NLLB_TAGS})
            raise UserError(
                f"NLLB has no language {override!r}; its tags are ISO 639-3 and script, such as swh_Latn"
                f"{_did_you_mean(near)}"
            )
        return override
    try:
        found = language(name)
    except UserError as error:
        raise UserError(f"{error} NLLB's tag can be given by itself, with --source-code or --target-code") from error
    if found.nllb is None:
        raise UserError(
            f"{found.note}; to translate {name} all the same, name the tag of a related language with --source-code or "
            "--target-code"
        )
    return found.nllb


def _suggestion(name: str) -> str:
    return _did_you_mean(_near(name, {key: f"{one.name} ({one.nllb})" for key, one in _by_key().items()}))


def _near(name: str, known: dict[str, str]) -> list[str]:
    keys = difflib.get_close_matches(_key(name), list(known), n=3, cutoff=0.6)
    return list(dict.fromkeys(known[key] for key in keys))


def _did_you_mean(near: list[str]) -> str:
    return f". Did you mean {' or '.join(near)}?" if near else "."
