"""Tests of the table of languages: it has every tag of NLLB, names are unique, and errors suggest similar names."""

from __future__ import annotations

import pytest

from flare.experiments.tasks import LANGUAGES, NLLB_TAGS, language, nllb_code
from flare.experiments.utils.errors import UserError


def test_table_has_every_tag_of_nllb():
    from transformers.models.nllb import tokenization_nllb

    assert set(NLLB_TAGS) == set(tokenization_nllb.FAIRSEQ_LANGUAGE_CODES)
    assert len({one.name for one in LANGUAGES}) == len(LANGUAGES)
    for one in LANGUAGES:
        assert language(one.name) is one, one
        if one.nllb and not one.substituted:
            assert language(one.nllb) is one, one


@pytest.mark.parametrize(
    ("name", "tag"),
    [("acehnese", "ace_Latn"), ("ace", "ace_Latn"), ("ace_Arab", "ace_Arab"), ("SWAHILI", "swh_Latn"),
     ("sw", "swh_Latn"), ("swh", "swh_Latn"), ("telugu", "tel_Telu"), ("zh", "zho_Hans"), ("minangkabau", "min_Latn"),
     ("madurese", "ind_Latn"), ("nij", "ind_Latn"), ("bjn", "bjn_Latn"), ("ind", "ind_Latn"), ("mt", "mlt_Latn"),
     ("id", "ind_Latn"), ("arabic", "arb_Arab")],
)  # fmt: skip
def test_names_and_codes_give_the_nllb_tag(name, tag):
    assert nllb_code(name) == tag


def test_languages_with_the_tag_of_another_language_have_a_note():
    """NLLB lacks Madurese and Ngaju, so they are translated with the tag of Indonesian."""
    substituted = {one.name: one.note for one in LANGUAGES if one.substituted}
    assert set(substituted) == {"Madurese", "Ngaju"} and all("Indonesian" in note for note in substituted.values())
    assert language("indonesian").name == "Indonesian" and language("ind_Latn").name == "Indonesian"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("swahilli",), "the language 'swahilli' is not known; .*Did you mean Swahili (swh_Latn)"),
        (("acenese",), "Did you mean Acehnese (ace_Latn)"),
        (("anything", "swa_Latn"), "NLLB has no language 'swa_Latn'; .*swh_Latn"),
        (("toba_batak",), "NLLB has no Toba Batak, and the paper leaves it out; .*--source-code or --target-code"),
    ],
)
def test_error_for_an_unknown_language_has_suggestions(arguments, text):
    with pytest.raises(UserError, match=text.replace("(", r"\(").replace(")", r"\)")):
        nllb_code(*arguments)


def test_a_given_nllb_tag_overrides_the_table():
    assert nllb_code("my own folder", "ban_Latn") == "ban_Latn"
