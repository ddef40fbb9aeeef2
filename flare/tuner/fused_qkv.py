"""Find the rows of query, key and value in the weight of a linear layer that computes all three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Names of linear layers that hold query, key and value.
FUSED_QKV_NAMES = ("query_key_value", "qkv_proj", "qkv", "Wqkv", "c_attn", "in_proj")


class RowsOfQKV(NamedTuple):
    """Row layout of a weight (n, d), which has ``groups`` groups of rows.

    Each group has ``query`` rows of the query, then ``key`` rows of the key, then ``value`` rows of the value.
    """

    groups: int
    query: int
    key: int
    value: int

    def key_mask(self, like: Tensor) -> Tensor:
        """Return a mask (n, 1), bool, true in the key's rows, on the device of ``like``."""
        mask = torch.zeros(self.groups, self.query + self.key + self.value, 1, dtype=torch.bool, device=like.device)
        mask[:, self.query : self.query + self.key] = True
        return mask.view(-1, 1)


def _thirds(config: Any) -> RowsOfQKV:
    width = config.hidden_size
    return RowsOfQKV(1, width, width, width)


def _by_head(config: Any) -> RowsOfQKV:
    heads = config.num_attention_heads
    width = config.hidden_size // heads
    return RowsOfQKV(heads, width, width, width)


def _phi3(config: Any) -> RowsOfQKV:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key = config.num_key_value_heads * width
    return RowsOfQKV(1, config.num_attention_heads * width, key, key)


def _falcon(config: Any) -> RowsOfQKV:
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:
        return RowsOfQKV(config.num_kv_heads, heads // config.num_kv_heads * width, width, width)
    return RowsOfQKV(1, heads * width, width, width) if config.multi_query else RowsOfQKV(heads, width, width, width)


#: model_type of the config -> function of the config that returns the row layout that the model's attention expects.
_ROWS: dict[str, Callable[[Any], RowsOfQKV]] = {
    **dict.fromkeys(("modernbert", "mpt", "gpt2"), _thirds),
    **dict.fromkeys(("gpt_neox", "bloom", "persimmon", "deberta"), _by_head),
    "phi3": _phi3,
    "falcon": _falcon,
}


def rows_of_qkv(config: Any, width: int | None) -> RowsOfQKV | None:
    """Return the row layout of a projection of query, key and value with ``width`` outputs.

    The result is None if the config's model_type is not known, or if the layout of this model_type does not have
    ``width`` rows.
    """
    layout = _ROWS.get(getattr(config, "model_type", ""))
    rows = None if layout is None else layout(config)
    return rows if rows is not None and rows.groups * (rows.query + rows.key + rows.value) == width else None
