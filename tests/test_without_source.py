"""Test fusing adapters that get no source: they are plain LoRA, and warn once in training and once in prediction."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import tiny
import torch
from cached_states import fused, no_warnings_allowed

MESSAGE = "predicts without a source and is plain LoRA"


def text(family: str) -> dict[str, Any]:
    """Return a batch without a source and without labels. mt5 keeps its labels, which become its decoder's input."""
    inputs = tiny.batch(family, source=False)
    return {name: value for name, value in inputs.items() if name != "labels" or family == "mt5"}


@pytest.mark.parametrize("family", ["bert", "llama", "mt5"])
@pytest.mark.parametrize("grad", [True, False])
def test_predicting_without_a_source_warns_once(family, grad) -> None:
    model = fused(family).eval()
    with torch.set_grad_enabled(grad):
        with pytest.warns(UserWarning, match=MESSAGE) as seen:
            model(**text(family))
        assert seen[0].filename == __file__, "the warning points at the user's line"
        with no_warnings_allowed():
            model(**text(family))


def test_a_loaded_adapter_without_a_source_warns(tmp_path) -> None:
    fused("llama").save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    with pytest.warns(UserWarning, match=MESSAGE):
        model(**text("llama"))


@pytest.mark.parametrize("family", ["llama", "mt5"])
def test_generating_without_a_source_warns_once(family) -> None:
    """There is no warning with a source, even if only the encoder of an encoder-decoder gets it."""
    model, inputs = fused(family).eval(), tiny.batch(family)
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with no_warnings_allowed():
        model.generate(**inputs, max_new_tokens=2)
    plain = {name: value for name, value in inputs.items() if not name.startswith("source_")}
    with pytest.warns(UserWarning, match=MESSAGE):
        model.generate(**plain, max_new_tokens=2)
    with no_warnings_allowed():
        model.generate(**plain, max_new_tokens=2)


def test_no_warning_if_the_missing_source_is_intended() -> None:
    model = fused("llama").eval()
    with no_warnings_allowed():
        model(**tiny.batch("llama"))
        fused("llama", fusion=None).eval()(**text("llama"))
        with model.disable_adapter():
            model(**text("llama"))
    model = fused("llama")
    with pytest.warns(UserWarning, match="was trained without a source"):
        model(**text("llama"))
    with no_warnings_allowed():  # the model was trained without a source, so predicting without one is intended
        model.eval()(**text("llama"))


def test_a_compiled_model_warns_without_a_graph_break() -> None:
    torch._dynamo.reset()
    model = fused("llama").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=MESSAGE):
            logits = compiled(**text("llama")).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.testing.assert_close(logits, model(**text("llama")).logits)
        with no_warnings_allowed():
            compiled(**text("llama"))
    torch._dynamo.reset()
