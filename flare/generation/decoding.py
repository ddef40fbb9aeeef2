"""Decode the source along with a target that is generated token by token.

The target's KV cache (flare.generation.caches) holds an instance of one of the classes below. For each forward pass of
the target, the instance returns S of the pass's positions, where S = x_source Aᵀ is the source's bottleneck. It also
maps the target's rows (beams, or several samples of a prompt) to the source's rows.

    AlignedDecoding   As in training: position j of the target's prompt fuses with position j of the source's prompt,
                      and new token t with the source's new token t. The frozen model decodes the source greedily, with
                      a separate KV cache. A row ends with its end token, whose S is used for all later positions. When
                      all rows have ended, the frozen model no longer runs.
    ReleaseDecoding   As in the authors' release: the source is decoded before the target. A forward pass of the target
                      fuses with one step of the source (the whole prompt, or one new token), which is chosen by the
                      target's length.
    LatentDecoding    FLARE MT: the user passes the states of a translation model's encoder, one per position of the
                      prompt. New tokens fuse with the last of these states that is not padding.

The classes hold no modules, so a cache can be copied without copying the model. Shapes: B rows of the source, m
positions of its prompt, q positions of a forward pass, rank r, V tokens of the vocabulary. S is stored as layer ->
adapter -> (B, q, r).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..source.context import Bottlenecks, SourceContext
from ..source.inputs import accepted_by
from ..source.projected import project_states
from ..source.runtime import Reads, Runtime
from ..source.source_pass import Preparation, read_from_run
from .shared_pass import SharedStep, inputs_of_both, join_caches, split_caches, warn_two_passes_once

#: (layer, adapter) pairs.
Pairs = frozenset[tuple[str, str]]


def fusing_pairs(reads: Reads) -> Pairs:
    """Return the (layer, adapter) pairs of the layers that read a source state, that is, that fuse."""
    return frozenset((layer.flare_key, adapter) for _, adapter, layer in reads.uses)


def map_states(states: Bottlenecks, function: Callable[[Tensor], Tensor]) -> Bottlenecks:
    """Apply a function to the S of every layer and adapter."""
    return {layer: {name: function(S) for name, S in by_adapter.items()} for layer, by_adapter in states.items()}


def join_states(parts: list[Bottlenecks]) -> Bottlenecks:
    """Concatenate S along the positions."""
    if len(parts) == 1:
        return parts[0]
    return {
        layer: {name: torch.cat([part[layer][name] for part in parts], dim=1) for name in by_adapter}
        for layer, by_adapter in parts[0].items()
    }


@dataclass(kw_only=True)
class SourceDecoding:
    """Base class: counts the target's positions, and maps the target's rows to the source's rows.

    Attributes:
        pairs: the (layer, adapter) pairs that fuse.
        in_decoder: whether these layers are in an encoder-decoder's decoder.
        used: number of the target's positions for which S was returned.
        rows: (target rows,), the index of the source row of each target row. None while every target row i
            uses source row i.
    """

    pairs: Pairs
    in_decoder: bool = False
    used: int = 0
    rows: Tensor | None = None

    def states(self, model: nn.Module, runtime: Runtime, reads: Reads, length: int) -> Bottlenecks:
        """Return S (B, length, r) for the target's next ``length`` positions, with one row per source row."""
        raise NotImplementedError

    @torch.compiler.disable  # as in training, the frozen pass is eager even if the model is compiled
    def carry(self, model: nn.Module, runtime: Runtime, shape: tuple[int, ...] | None, past: int) -> SourceContext:
        """Return the context that passes S to the layers in a forward of the target.

        Args:
            model: the transformers model.
            runtime: the model's runtime, which knows the layers that fuse.
            shape: (rows, q), the shape of the forward's token ids or embeddings; None if it got neither.
            past: number of positions in the target's KV cache.

        Raises:
            ValueError: ``shape`` is None, the forward does not start where the last one ended, other adapters are
                active, or the number of target rows does not fit the number of source rows.
        """
        active = runtime.active_uses()
        reads = active.of_decoder if self.in_decoder else active.of_text
        if fusing_pairs(reads) != self.pairs:
            raise ValueError(
                "past_key_values: other adapters were active when this generation began; start again without "
                "past_key_values"
            )
        if shape is None:
            raise ValueError(
                "past_key_values has a source, so the forward pass needs the target's token ids or embeddings"
            )
        if past != self.used:
            raise ValueError(
                f"past_key_values holds {past} positions, but its source has been used for {self.used} positions. A "
                "cache with a source can only be extended; it cannot be cropped, reset or used twice. Start again "
                "without past_key_values"
            )
        rows, length = shape
        with torch.no_grad():
            states = self.states(model, runtime, reads, length)
            self.used += length
            states = map_states(states, lambda S: self._for_target(S, rows))
        return SourceContext.of_bottlenecks(states, active.sites)

    def _for_target(self, states: Tensor, rows: int) -> Tensor:
        """Return S with one row per target row, from S with one row per source row."""
        source_rows = states.shape[0]
        if self.rows is None:
            if rows == source_rows:
                return states
            if rows % source_rows:
                raise ValueError(
                    f"input_ids has {rows} rows and the source has {source_rows} rows; the number of target rows must "
                    "be a multiple of the number of source rows"
                )
            self.rows = torch.arange(source_rows, device=states.device).repeat_interleave(rows // source_rows)
        if len(self.rows) != rows:
            raise ValueError(f"past_key_values was made for {len(self.rows)} rows, but input_ids has {rows} rows")
        return states.index_select(0, self.rows.to(states.device))

    def select_rows(self, rows: Tensor) -> None:
        """Reorder, repeat or drop rows of the target: after the call, row i is the previous row ``rows[i]``."""
        self.rows = rows if self.rows is None else self.rows[rows.to(self.rows.device)]

    def rows_of_cache(self, rows: Tensor) -> Tensor:
        """Return the KV cache's rows to keep if the target keeps ``rows``. Call this before :meth:`select_rows`."""
        return rows

    def share(self, model: nn.Module, runtime: Runtime, kwargs: dict[str, Any]) -> SharedStep | None:
        """Return a step that runs the model once on both the target and the source.

        Return None if such a step is not possible. Then :meth:`carry` provides S.

        Args:
            model: the transformers model.
            runtime: the model's runtime.
            kwargs: keyword arguments of the target's forward.
        """
        return None


@dataclass
class FrozenDecoder:
    """Reads the source with the frozen model and a KV cache, and chooses the source's next tokens greedily.

    Attributes:
        mask: the source's attention mask: (B, m) for the prompt, extended by each new token.
        cache: the source's KV cache.
        dropout: whether the frozen model's dropout is active in train mode (source_dropout).
        zero_pads: whether S = 0 at padding.
        encoder_outputs: output of the encoder on the source; None for a decoder-only model.
        encoder_mask: the encoder's attention mask; None for a decoder-only model.
        next_ids: (B, 1), the next token of each row; None before the prompt was read.
        first_ids: (B, 1), the first new token of each row, negative where it is chosen; None if all are chosen.
    """

    mask: Tensor
    cache: Any
    dropout: bool
    zero_pads: bool
    encoder_outputs: Any = None
    encoder_mask: Tensor | None = None
    next_ids: Tensor | None = None
    first_ids: Tensor | None = None

    def read(self, model: nn.Module, runtime: Runtime, reads: Reads, ids: Tensor) -> Bottlenecks:
        """Run the model on the next token ids (B, q), and return their S."""
        past = self.cache.get_seq_length()
        outputs: list[Any] = []
        inputs = self.inputs(model, ids, past)

        def run() -> None:
            outputs.append(model(**inputs, past_key_values=self.cache, use_cache=True, return_dict=True))

        pads = self.mask[:, past : past + ids.shape[1]] if self.zero_pads else None
        states = read_states(model, runtime, reads, run, pads, self.dropout)
        self.choose(outputs[0].logits)
        return states

    def choose(self, logits: Tensor) -> None:
        """Set ``next_ids`` to the most likely next tokens, from logits (B, q, V), or to ``first_ids``."""
        # in float32, because generate also chooses in float32: a tie is then resolved in the same way
        self.next_ids = logits[:, -1].to(dtype=torch.float32).argmax(dim=-1, keepdim=True)
        if self.first_ids is not None:
            given, self.first_ids = self.first_ids.to(self.next_ids.device), None
            self.next_ids = given.where(given >= 0, self.next_ids)

    def inputs(self, model: nn.Module, ids: Tensor, past: int) -> dict[str, Any]:
        """Return the frozen model's keyword arguments for token ids (B, q) after ``past`` tokens; extend the mask."""
        missing = past + ids.shape[1] - self.mask.shape[1]
        if missing > 0:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), missing)], dim=1)
        return self._inputs(model, ids, self.mask[:, : past + ids.shape[1]])

    def _inputs(self, model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        accepted = accepted_by(model)
        if self.encoder_outputs is not None:
            return {
                "encoder_outputs": self.encoder_outputs,
                "attention_mask": self.encoder_mask,
                "decoder_input_ids": ids,
            }
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in accepted:  # counted from a row's first token after the padding, as generate counts them
            positions = mask.long().cumsum(-1) - 1
            inputs["position_ids"] = positions.masked_fill(mask == 0, 0)[:, -ids.shape[1] :]
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        return inputs


def read_states(
    model: nn.Module,
    runtime: Runtime,
    reads: Reads,
    run: Callable[[], object],
    pads: Tensor | None,
    dropout: bool,
) -> Bottlenecks:
    """Run the whole frozen model, and return S of the tokens it read; S = 0 at positions where ``pads`` (B, q) is 0."""
    masks = {} if pads is None else {key.stack: pads for key in reads.keys}
    reader = read_from_run(model, run, reads.keys, dropout=dropout, to_the_end=True)
    prepare = Preparation.under_autocast(reads.device if reads else next(model.parameters()).device, masks)
    # this calls the whole model, so without this line a compiled model would run its compiled code
    with torch.compiler.set_stance("force_eager"):
        return project_states(reader, prepare, reads.groups).bottlenecks


@dataclass(kw_only=True)
class AlignedDecoding(SourceDecoding):
    """Decodes the source along with the target, position by position.

    Attributes:
        decoder: reads the source and chooses its next tokens.
        prompt: (B, m), token ids of the source's prompt.
        end_ids: the tokens that end a text; may be empty.
        done: (B,), whether a row's end token has been read.
        last_states: S (B, 1, r) of each row's last new token (of its end token, if it has ended); empty before the
            first new token was read.
        may_share: whether a decoding step may run the model once on both the target and the source.
        target_rows_in_cache: number of the target's rows if one KV cache holds the rows of target and source; 0 if the
            source has its own KV cache.
    """

    decoder: FrozenDecoder
    prompt: Tensor
    end_ids: Tensor
    done: Tensor = field(init=False)
    last_states: Bottlenecks = field(default_factory=dict)
    may_share: bool = False
    target_rows_in_cache: int = 0

    def __post_init__(self) -> None:
        self.done = torch.zeros(len(self.prompt), dtype=torch.bool, device=self.prompt.device)

    def states(self, model: nn.Module, runtime: Runtime, reads: Reads, length: int) -> Bottlenecks:
        parts = []
        piece = self.prompt[:, self.used : self.used + length]
        if piece.shape[1]:
            parts.append(self.decoder.read(model, runtime, reads, piece))
        for _ in range(length - piece.shape[1]):
            parts.append(self._next_token(model, runtime, reads))
        return join_states(parts)

    def _next_token(self, model: nn.Module, runtime: Runtime, reads: Reads) -> Bottlenecks:
        if bool(self.done.all()):
            return self.last_states
        ids = self.decoder.next_ids
        assert ids is not None
        states = self._keep_ended(self.decoder.read(model, runtime, reads, ids))
        self._advance(states, ids)
        return states

    def _keep_ended(self, states: Bottlenecks) -> Bottlenecks:
        """Replace the new token's S by the end token's S in the rows that have ended."""
        if not self.last_states:
            return states
        return {
            layer: {name: self._unless_done(self.last_states[layer][name], S) for name, S in by_adapter.items()}
            for layer, by_adapter in states.items()
        }

    def _advance(self, states: Bottlenecks, ids: Tensor) -> None:
        """Record that the frozen model has read one more token of every row, ``ids`` (B, 1); ``states``: their S."""
        self.last_states = states
        self.done = self.done | torch.isin(ids[:, 0], self.end_ids)

    def _unless_done(self, last: Tensor, new: Tensor) -> Tensor:
        return torch.where(self.done[:, None, None].to(new.device), last, new)

    # --- one pass for target and source -------------------------------------------------------------------------------

    def rows_of_cache(self, rows: Tensor) -> Tensor:
        first = self.target_rows_in_cache
        if not first:
            return rows
        return torch.cat([rows, torch.arange(first, first + len(self.prompt), device=rows.device)])

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        self.target_rows_in_cache = len(rows) if self.target_rows_in_cache else 0

    @torch.compiler.disable
    def share(self, model: nn.Module, runtime: Runtime, kwargs: dict[str, Any]) -> SharedStep | None:
        cache, reads = kwargs["past_key_values"], runtime.active_uses().of_text
        rows = len(self.prompt) if self.rows is None else len(self.rows)
        inputs = self._inputs_of_both(model, runtime, reads, kwargs, rows) if self.may_share else None
        if inputs is None:
            if self.target_rows_in_cache:
                keep_source = not bool(self.done.all())
                split_caches(cache, self.decoder.cache, self.target_rows_in_cache, keep_source=keep_source)
                self.target_rows_in_cache = 0
            return None
        if not self.target_rows_in_cache:
            join_caches(cache, self.decoder.cache)
            self.target_rows_in_cache = rows
        ids = inputs["input_ids"][rows:]

        def on_finish(states: Bottlenecks, logits: Tensor) -> None:
            self._advance(states, ids)
            self.decoder.choose(logits)
            self.used += 1

        return SharedStep(
            reads,
            inputs,
            rows,
            keep_ended=self._keep_ended,
            for_target=lambda states: map_states(states, lambda S: self._for_target(S, rows)),
            on_finish=on_finish,
        )

    def _inputs_of_both(
        self, model: nn.Module, runtime: Runtime, reads: Reads, kwargs: dict[str, Any], rows: int
    ) -> dict[str, Any] | None:
        """Return the keyword arguments of one forward on the next tokens of target and source; None if not possible."""
        past, target = kwargs["past_key_values"].get_seq_length(), kwargs.get("input_ids")
        ids = self.decoder.next_ids
        if (
            ids is None
            or not isinstance(target, Tensor)
            or target.shape != (rows, 1)
            or not past == self.used >= self.prompt.shape[1]
            or fusing_pairs(reads) != self.pairs
            or torch.is_grad_enabled()
            or model.training
            or bool(self.done.all())
        ):
            return None
        inputs, why = inputs_of_both(kwargs, self.decoder.inputs(model, ids, past), past)
        if why:
            warn_two_passes_once(runtime, why)
        return inputs


@dataclass(kw_only=True)
class ReleaseDecoding(SourceDecoding):
    """Follows the authors' release: a forward pass of the target fuses with one step of the source.

    The source is decoded before the target, in N steps. Step 0 reads the source's prompt, and each later step reads one
    new token. If the target has n tokens (including the prompt, padding and the tokens of this forward), the forward
    uses step min(n, N) - 1. If that step has as many positions as the forward, they fuse position by position. If it
    has a different number, all positions of the forward fuse with the step's last position. After a source row has
    ended, it continues with pad tokens until all rows have ended.

    Attributes:
        steps: S of each of the N steps.
    """

    steps: list[Bottlenecks]

    def states(self, model: nn.Module, runtime: Runtime, reads: Reads, length: int) -> Bottlenecks:
        step = self.steps[min(self.used + length, len(self.steps)) - 1]

        def at_step(S: Tensor) -> Tensor:
            if S.shape[1] > length:
                S = S[:, -1:]
            return S.expand(-1, length, -1)

        return map_states(step, at_step)


def decode_to_end(
    model: nn.Module,
    runtime: Runtime,
    reads: Reads,
    decoder: FrozenDecoder,
    prompt: Tensor,
    end_ids: Tensor,
    pad_id: int,
    max_steps: int,
) -> list[Bottlenecks]:
    """Decode the source until all rows have ended, in at most ``max_steps`` steps; return S of each step."""
    steps = [decoder.read(model, runtime, reads, prompt)]
    done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    while len(steps) < max_steps:
        assert decoder.next_ids is not None
        ids = decoder.next_ids.masked_fill(done[:, None], pad_id)
        done = done | torch.isin(ids[:, 0], end_ids)
        if bool(done.all()):
            break
        steps.append(decoder.read(model, runtime, reads, ids))
    return steps


@dataclass(kw_only=True)
class LatentDecoding(SourceDecoding):
    """FLARE MT: S of the prompt is given. A row's new tokens use S of its last position that is not padding.

    Attributes:
        prompt_states: S of the prompt.
        mask: (B, m), zero at padding; None if there is no padding.
    """

    prompt_states: Bottlenecks
    mask: Tensor | None

    def states(self, model: nn.Module, runtime: Runtime, reads: Reads, length: int) -> Bottlenecks:
        start = self.used

        def at_positions(S: Tensor) -> Tensor:
            positions = torch.arange(start, start + length, device=S.device)
            width = S.shape[1]
            last = torch.full((len(S),), width - 1, device=S.device)
            if self.mask is not None:
                real = self.mask.to(S.device) != 0
                last = torch.where(real, torch.arange(width, device=S.device), 0).amax(dim=1)
            index = torch.where(positions < width, positions, last[:, None])
            return S.gather(1, index[:, :, None].expand(-1, -1, S.shape[2]))

        return map_states(self.prompt_states, at_positions)
