"""Look up the options of ``generate``, and refuse options that cannot be combined with a source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Options:
    """Options of a call of ``generate``.

    An option is looked up in the call's arguments, then in its generation_config, then in the model's
    generation_config.
    """

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def get(self, name: str) -> Any:
        """Return the value of an option; None if it is not set."""
        config = self.kwargs.get("generation_config", self.args[1] if len(self.args) > 1 else None)
        values = [
            self.kwargs.get(name),
            *(getattr(place, name, None) for place in (config, self.model.generation_config)),
        ]
        return next((value for value in values if value is not None), None)

    def token_ids(self, name: str) -> list[int]:
        """Return the token ids of an option that may hold one, several or none."""
        value = self.get(name)
        if value is None:
            return []
        if isinstance(value, Tensor):
            value = value.flatten().tolist()
        return [int(token) for token in (value if isinstance(value, (list, tuple)) else [value])]

    def pad_id(self) -> int:
        """Return the pad token. If none is set, return the first end token, as ``generate`` does, or else 0."""
        return next(iter([*self.token_ids("pad_token_id"), *self.token_ids("eos_token_id")]), 0)

    def max_new_tokens(self, prompt: int) -> int:
        """Return the largest number of new tokens after a prompt of ``prompt`` tokens.

        Raises:
            ValueError: neither max_new_tokens nor max_length is set.
        """
        if self.get("max_new_tokens") is not None:
            return int(self.get("max_new_tokens"))
        if self.get("max_length") is None:
            raise ValueError(
                "source_alignment='release' needs max_new_tokens, because the source is decoded to that length before "
                "the target; pass it"
            )
        return int(self.get("max_length")) - prompt


_POSITIONS = "it skips positions or goes back, but the source is decoded one position at a time"
_CACHE = "a source needs a dynamic KV cache, which generate creates"
_INPUT = "it also runs the model on a text that has no source"
_LOOP = "it replaces the decoding loop in which the source is decoded"

#: option -> (function that returns whether a value cannot be combined with a source, the reason)
_REFUSED: dict[str, tuple[Any, str]] = {
    "use_cache": (lambda value: value is False, _CACHE),
    "past_key_values": (lambda value: value is not None, _CACHE),
    "cache_implementation": (lambda value: value not in (None, "dynamic", "hybrid"), _CACHE),
    "assistant_model": (lambda value: value is not None, _POSITIONS),
    "prompt_lookup_num_tokens": (lambda value: value is not None, _POSITIONS),
    "assistant_early_exit": (lambda value: value is not None, _POSITIONS),
    "use_mtp": (bool, _POSITIONS),
    "penalty_alpha": (bool, _LOOP),
    "dola_layers": (lambda value: value is not None, _LOOP),
    "num_beam_groups": (lambda value: value is not None and value > 1, _LOOP),
    "constraints": (lambda value: value is not None, _LOOP),
    "force_words_ids": (lambda value: value is not None, _LOOP),
    "custom_generate": (lambda value: value is not None, _LOOP),
    "token_healing": (bool, _INPUT),
    "guidance_scale": (lambda value: value is not None and value != 1, _INPUT),
}


def refuse_options(options: Options) -> None:
    """Raise ValueError for an option that cannot be combined with a source."""
    for name, (is_refused, reason) in _REFUSED.items():
        value = options.get(name)
        if is_refused(value):
            shown = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
            # the model's own generation_config may hold use_cache=False (MPT)
            advice = "pass use_cache=True" if name == "use_cache" else f"leave {name} out"
            raise ValueError(f"generate: {name}={shown} cannot be combined with a source: {reason}; {advice}")
