"""Models with sites, and functions that count calls and compare steps.

A site is a group of projections that read the same input and are computed in one call (flare.tuner.site).
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import parametrize

import flare
from flare.source.context import Slot
from flare.tuner import layer
from flare.tuner import site as sites
from flare.tuner.layer import SITE
from flare.tuner.site import SiblingLinear, Site

# family -> names of query, key and value
NAMES = {
    **dict.fromkeys(("bert", "xlmr", "roberta"), ("query", "key", "value")),
    **dict.fromkeys(("llama", "gemma2", "qwen3", "mistral"), ("q_proj", "k_proj", "v_proj")),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "mt5": ("q", "k", "v"),
}
# name of a subset -> indices of its projections in NAMES
SUBSETS = {"qv": (0, 2), "qkv": (0, 1, 2), "q": (0,)}


class Counts(collections.Counter):
    """Counter with these keys.

    joint: calls of a site that compute several projections.
    lone: calls of a site that compute one projection.
    owned: calls in which the autograd node also computes the frozen layers' products.
    single: calls of fused_lora by layers that are computed separately from their site.
    """

    names: list[frozenset[str]]  # names of the projections in each joint call


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Return a counter of the calls of sites and layers from now on; used by the fixture ``calls``."""
    counts = Counts()
    counts.names = []
    outputs, owned, single = Site._outputs, sites.apply_with_products, layer.fused_lora

    def spy_outputs(site: Site, *args: Any) -> Any:
        results = outputs(site, *args)
        if results:
            counts["joint" if len(results) > 1 else "lone"] += 1
        if results and len(results) > 1:
            counts.names.append(frozenset(name for name, child in site.parent.named_children() if child in results))
        return results

    def spy(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(Site, "_outputs", spy_outputs)
    monkeypatch.setattr(sites, "apply_with_products", spy("owned", owned))
    monkeypatch.setattr(layer, "fused_lora", spy("single", single))
    return counts


def forget(calls: Counts) -> None:
    """Reset the counter."""
    calls.clear()
    calls.names.clear()


def fused(family: str, subset: str = "qv", *, dtype: torch.dtype = torch.float32, **overrides) -> peft.PeftModel:
    targets = [NAMES[family][index] for index in SUBSETS[subset]]
    options = {"r": 5, "lora_alpha": 7, "target_modules": targets, **overrides}
    no_dropout = {"dropout_rate": 0.0} if family == "mt5" else {}
    model = flare.fast_lora(tiny.model(family, dtype=dtype, **no_dropout), **options)
    tiny.randomize_lora(model)
    return model


def all_sites(model: nn.Module) -> list[Site]:
    return list({id(site): site for m in model.modules() if (site := m.__dict__.get(SITE)) is not None}.values())


def alone(model: peft.PeftModel) -> peft.PeftModel:
    """Return a copy whose projections are computed separately."""
    twin = copy.deepcopy(model)
    for site in all_sites(twin):
        site.output = lambda module, x, slot: None  # type: ignore[method-assign]
    return twin


def step(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """Return the loss and every gradient of one step."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **tiny.gradients(model)}


def assert_same(actual: dict, expected: dict, **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name, **(tolerance or {"rtol": 1e-9, "atol": 1e-10}))


def plain(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if not name.startswith("source")}


def first_attention(model: nn.Module) -> nn.Module:
    return next(site.parent for site in all_sites(model) if len(site.names) > 1)


def siblings(model: nn.Module) -> set[str]:
    """Return the names of the projections without an adapter that take part in a site."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is SiblingLinear}


def is_empty(slot: Slot) -> bool:
    """Return whether every attribute of a thread's Slot (flare.source.context) has its default value."""
    return all(getattr(slot, name) is value for name, value in vars(Slot).items() if name in Slot.__annotations__)


def parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", nn.Identity())
