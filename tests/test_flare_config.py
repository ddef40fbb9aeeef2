"""FlareConfig documents its fields, for help() and for command lines built by transformers' HfArgumentParser."""

import inspect
from dataclasses import fields

import pytest

from flare import FlareConfig
from flare.tuner.config import FLARE_FIELDS

DOCUMENTED = sorted({*FLARE_FIELDS, "r", "lora_alpha"})


@pytest.mark.parametrize("name", DOCUMENTED)
def test_field_is_documented_in_docstring_and_metadata(name: str) -> None:
    metadata = {field.name: field.metadata for field in fields(FlareConfig)}
    words = " ".join((inspect.getdoc(FlareConfig) or "").split())
    assert len(metadata[name]["help"]) > 10
    assert f"): {metadata[name]['help']}" in words


def test_help_of_a_field_ends_before_the_next_field() -> None:
    metadata = {field.name: field.metadata for field in fields(FlareConfig)}
    assert metadata["r"]["help"] == "Rank of the adapter."
    assert metadata["latent_dim"]["help"].endswith("no source pass runs.")


def test_other_fields_keep_the_help_of_lora_config() -> None:
    assert "target_modules" not in FLARE_FIELDS
    metadata = {field.name: field.metadata for field in fields(FlareConfig)}
    assert "modules" in metadata["target_modules"]["help"]
