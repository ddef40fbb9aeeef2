"""Test that SourceStateCache refuses wrong arguments, and adapters and models whose states cannot be cached."""

from __future__ import annotations

import pytest
from cached_states import MB, batch_of, fused

import flare


def test_wrong_arguments_are_named_in_the_error(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("unchanged")
    for match, error, keywords in [
        (r"budget=1.5 must be bytes", TypeError, {"budget": 1.5}),
        (r"budget=True must be bytes", TypeError, {"budget": True}),
        (r"tiers=\(\) is not accepted", ValueError, {"budget": 1, "tiers": ()}),
        (r"budget=-1 must be bytes, 0 or more", ValueError, {"budget": -1}),
        (r"budget names 'gpu'.*'device', 'host', 'disk'", ValueError, {"budget": {"gpu": 1}}),
        (r"budget names 'host', which is missing in tiers", ValueError, {"budget": {"host": 1}, "tiers": ("device",)}),
        (r"tiers=\('ram',\) is not accepted; pass 'auto', or", ValueError, {"budget": 1, "tiers": ("ram",)}),
        (r"tiers='disk' is not accepted", ValueError, {"budget": 1, "tiers": "disk"}),
        (r"'disk' needs a directory=", ValueError, {"budget": 1, "tiers": ("disk",)}),
        (r"'disk' needs a directory=", ValueError, {"budget": {"disk": 1}}),
        (r"directory=.* is for the tier 'disk'", ValueError, {"budget": 1, "tiers": ("host",), "directory": "x"}),
        (r"directory=.* cannot be created", ValueError, {"budget": 1, "directory": file}),
    ]:
        with pytest.raises(error, match=match):
            flare.SourceStateCache(**keywords)
    assert flare.SourceStateCache(1).tiers == ("device", "host")
    assert file.read_text() == "unchanged"


def test_adapters_and_models_that_cannot_be_cached_are_refused() -> None:
    cache = flare.SourceStateCache(MB)
    with pytest.raises(ValueError, match="source_dropout=True"):
        fused("bert", source_dropout=True).set_source_cache(cache)
    with pytest.raises(ValueError, match="no active adapter of this model fuses"):
        fused("bert", fusion=None).set_source_cache(cache)
    with pytest.raises(ValueError, match="latent_dim"):
        fused("bert", latent_dim=16).set_source_cache(cache)
    with pytest.raises(TypeError, match=r"cache must be a flare\.SourceStateCache"):
        fused("bert").set_source_cache({})
    model = fused("bert")
    model.get_base_model().bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"embeddings.word_embeddings.weight is trained"):
        model.set_source_cache(cache)


def test_an_adapter_with_source_dropout_is_refused_when_it_becomes_active() -> None:
    model, batch = fused("bert"), batch_of("bert")
    model.set_source_cache(flare.SourceStateCache(MB))
    model.add_adapter("noisy", flare.FlareConfig(r=4, source_dropout=True, task_type="SEQ_CLS"))
    model.set_adapter("noisy")
    with pytest.raises(ValueError, match="source_dropout=True"):
        model(**batch)
