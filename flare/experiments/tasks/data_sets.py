"""List the tasks' data sets on the Hugging Face hub: configurations, splits, and where their English rows come from.

A data set has one configuration per language. The configuration's name is a code that `.languages` maps to the
language, or the language's FLORES-200 tag (such as ace_Latn), which is also its NLLB tag. TyDiQA-GoldP is an exception:
it has one configuration for all languages, and its codes are the language names in the ids of its rows (see `.hub`).
`.registry` lists the columns and labels of each task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..utils.errors import UserError
from .languages import language

#: Split -> the names that data sets use for this split.
SPLIT_NAMES = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}
_FLORES_TAG = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")


@dataclass(frozen=True)
class Elsewhere:
    """A second data set, from which English rows are read because the first data set lacks them.

    Attributes:
        hub_id: hub id of the second data set, which has the same columns as the first.
        configuration: name of its English configuration.
        note: line that tells the user where the English rows come from.
        renamed: label of the second data set -> label of the task; labels that are not listed are unchanged.
    """

    hub_id: str
    configuration: str
    note: str
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """A data set on the hub.

    Attributes:
        hub_id: owner/name.
        codes: names of the configurations, one per language; None if the names are FLORES-200 tags.
        languages: number of languages if `codes` is None, otherwise 0.
        parallel: whether rows of two languages with the same id (or position) are translations of each other.
        splits: the splits that the data set has.
        english: split -> the second data set that the English rows of this split are read from. The English rows of a
            split that is not listed come from the data set itself, if it has English rows.
    """

    hub_id: str
    codes: tuple[str, ...] | None
    languages: int = 0
    parallel: bool = True
    splits: tuple[str, ...] = ("train", "valid", "test")
    english: Mapping[str, Elsewhere] = field(default_factory=dict)

    def configuration(self, name: str) -> str:
        """Return the name of a language's configuration.

        If the names are FLORES-200 tags, `name` may be any such tag, which is returned without a check.

        Raises:
            UserError: the language is unknown, is not in the data set, or has no FLORES-200 tag although the
                configurations are named by such tags.
        """
        if self.codes is None:
            return name if _FLORES_TAG.fullmatch(name) else self._flores(name)
        entry = language(name)
        for code in self.codes:
            if language(code) is entry:
                return code
        available = sorted(f"{language(code).name} ({code})" for code in self.codes)
        raise UserError(f"{self.hub_id} has no {entry.name}; it has {', '.join(available)}")

    def _flores(self, name: str) -> str:
        entry = language(name)
        if entry.nllb is None or entry.substituted:
            raise UserError(f"{self.hub_id} names its languages by FLORES-200 tags, and {entry.name} has no tag")
        return entry.nllb


def _codes(names: str) -> tuple[str, ...]:
    return tuple(names.split())


_CONLL = "English rows come from CoNLL-2003, where MISC entities count as O and there are no DATE entities"
DATA_SETS: dict[str, DataSet] = {
    data_set.hub_id: data_set
    for data_set in (
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
            english={"train": Elsewhere("facebook/xnli", "en", "English rows come from XNLI")},
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
    """Return the second data set that the rows of a language's split are read from, if there is one, else None."""
    known = DATA_SETS.get(hub_id)
    if known is None or split not in known.english:
        return None
    return known.english[split] if language(name).iso639_3 == "eng" else None


def translatable(data_set: DataSet, source: str) -> tuple[list[str], list[str]]:
    """Return the names of the data set's languages with an NLLB tag, and the names of its languages without one.

    The source language is in neither list.

    Raises:
        UserError: the data set's languages are not listed in this module (`data_set.codes` is None).
    """
    if data_set.codes is None:
        raise UserError(
            f"--target all: {data_set.hub_id} has {data_set.languages} languages; name the languages you want"
        )
    others = [other for other in map(language, data_set.codes) if other is not language(source)]
    names = [(other.name.lower().replace(" ", "_"), other.nllb) for other in others]
    return [name for name, tag in names if tag], [name for name, tag in names if not tag]
