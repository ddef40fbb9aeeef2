"""The tasks' data sets on the Hugging Face hub: configurations, splits, and what has to be known of their rows.

A configuration is one language. It is called by a code, which `.languages` knows as a name of the language,
or by FLORES-200's tag, which is NLLB's. Columns and labels stand in `.registry`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..utils.errors import UserError
from .languages import language

#: Our split -> what a data set may call it.
SPLIT_NAMES = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}
_FLORES_TAG = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")


@dataclass(frozen=True)
class Elsewhere:
    """English rows that a data set takes from another one.

    hub_id, configuration: the other data set, with the same columns.
    renamed: labels of the other -> the task's.
    note: what a user is told.
    """

    hub_id: str
    configuration: str
    note: str
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """A data set on the hub.

    hub_id: owner/name.
    codes: its configurations, by language; None: FLORES-200's tags of some `languages` languages.
    languages: how many there are, where `codes` is None.
    parallel: whether rows of two languages with one id (or position) are translations of each other.
    splits: ours, as far as it has them.
    english: split -> where its English rows are from.
    """

    hub_id: str
    codes: tuple[str, ...] | None
    languages: int = 0
    parallel: bool = True
    splits: tuple[str, ...] = ("train", "valid", "test")
    english: Mapping[str, Elsewhere] = field(default_factory=dict)

    def configuration(self, name: str) -> str:
        """Return the configuration of a language.

        Raises:
            UserError: it is not in the table of languages, or the data set does not have it.
        """
        if self.codes is None:
            return name if _FLORES_TAG.fullmatch(name) else self._flores(name)
        found = language(name)
        for code in self.codes:
            if language(code) is found:
                return code
        has = sorted(f"{language(code).name} ({code})" for code in self.codes)
        raise UserError(f"{self.hub_id} has no {found.name}; it has {', '.join(has)}")

    def _flores(self, name: str) -> str:
        found = language(name)
        if found.nllb is None or found.substituted:
            raise UserError(f"{self.hub_id} names its languages by FLORES-200's tags, and {found.name} has none")
        return found.nllb


def _codes(names: str) -> tuple[str, ...]:
    return tuple(names.split())


_CONLL = "English rows are CoNLL-2003's: its MISC counts as O, and it has no DATE"
DATA_SETS: dict[str, DataSet] = {
    one.hub_id: one
    for one in (
        DataSet("indonlp/NusaX-senti", _codes("ace ban bbc bjn bug eng ind jav mad min nij sun")),
        DataSet("facebook/xnli", _codes("ar bg de el en es fr hi ru sw th tr ur vi zh")),
        DataSet(
            "google-research-datasets/tydiqa",
            _codes("arabic bengali english finnish indonesian korean russian swahili telugu"),
            parallel=False,
        ),
        DataSet("Davlan/sib200", None, languages=205),
        DataSet(
            "masakhane/masakhanews",
            _codes("amh eng fra hau ibo lin lug orm pcm run sna som swa tir xho yor"),
            parallel=False,
        ),
        DataSet(
            "masakhane/afrixnli",
            _codes("amh eng ewe fra hau ibo kin lin lug orm sna sot swa twi wol xho yor zul"),
            splits=("valid", "test"),
            english={"train": Elsewhere("facebook/xnli", "en", "English rows are XNLI's")},
        ),
        DataSet("facebook/belebele", None, languages=122, splits=("test",)),
        DataSet(
            "masakhane/masakhaner2",
            _codes("bam bbj ewe fon hau ibo kin lug luo mos nya pcm sna swa tsn twi wol xho yor zul"),
            parallel=False,
            english={
                split: Elsewhere("eriktks/conll2003", "conll2003", _CONLL, {"B-MISC": "O", "I-MISC": "O"})
                for split in SPLIT_NAMES
            },
        ),
    )
}


def english_rows(hub_id: str, name: str, split: str) -> Elsewhere | None:
    """Return where the rows of a language's split are from, if that is another data set."""
    known = DATA_SETS.get(hub_id)
    if known is None or split not in known.english:
        return None
    return known.english[split] if language(name).iso639_3 == "eng" else None


def translatable(data_set: DataSet, source: str) -> tuple[list[str], list[str]]:
    """Return the languages of a data set but the source, by name, and those among them that NLLB has no tag for.

    Raises:
        UserError: a data set whose languages are not listed here.
    """
    if data_set.codes is None:
        raise UserError(f"--target all: {data_set.hub_id} has {data_set.languages} languages; name those you want")
    found = [language(code) for code in data_set.codes]
    others = [one for one in found if one is not language(source)]
    names = [(one.name.lower().replace(" ", "_"), one.nllb) for one in others]
    return [name for name, tag in names if tag], [name for name, tag in names if not tag]
