"""The source beside a target that is generated token by token: which S each new position of the target meets.

A target's KV cache carries one of the classes below (flare.generation.generate makes it). At every forward of the
target it is asked for the S of as many positions as that forward has, advances by as many, and knows how the target's
rows (beams, several samples of one prompt) belong to its own.

    AlignedText   as in training: prompt position j meets the source's prompt position j, new token t the source's
                  token t. The frozen model writes its own greedy continuation, with a KV cache of its own. A row is
                  done once its end token has been fed, and holds that token's S; where all are done nothing runs.
    LateText      the authors' release: every position meets one late position of the source, decoded beforehand.
    GivenStates   FLARE MT, whose states are given: prompt by prompt, then the last real state is held.

Nothing here holds a module, so a cache can be copied without its model. Shapes: B rows of the source, m its prompt, q
positions that one forward asks for, r the rank; S is layer -> adapter -> (B, q, r).
"""

from __future__ import annotations

import warnings
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
from .shared_pass import SharedStep, inputs_of_both, join_caches, part_caches

Slots = frozenset[tuple[str, str]]


def slots_of(reads: Reads) -> Slots:
    """Return the (layer, adapter) pairs that fuse."""
    return frozenset((layer.flare_key, adapter) for _, adapter, layer in reads.uses)


def map_states(states: Bottlenecks, change: Callable[[Tensor], Tensor]) -> Bottlenecks:
    """The same layers and adapters with other tensors."""
    return {layer: {name: change(one) for name, one in own.items()} for layer, own in states.items()}


def join_states(parts: list[Bottlenecks]) -> Bottlenecks:
    """Parts laid one after the other along the positions."""
    if len(parts) == 1:
        return parts[0]
    return {
        layer: {name: torch.cat([part[layer][name] for part in parts], dim=1) for name in own}
        for layer, own in parts[0].items()
    }


def say_two_passes(runtime: Runtime, why: str) -> None:
    """Once for each reason: the streams could share a pass, and this keeps them from it."""
    if why not in runtime.warned:
        runtime.warned.add(why)
        warnings.warn(f"generate: source and target take a pass each, not one together: {why}", stacklevel=2)


@dataclass(kw_only=True)
class SourceDecoding:
    """What all have in common: how far the source has been used, and whose row is whose."""

    slots: Slots
    in_decoder: bool = False  # whether the layers stand in an encoder-decoder's decoder
    used: int = 0  # positions of the target that have been given their S
    rows: Tensor | None = None  # target row -> source row, once the target's first forward has shown how many it has

    def states(self, model: nn.Module, runtime: Runtime, reads: Reads, length: int) -> Bottlenecks:
        """S of the target's next ``length`` positions, one row per source row."""
        raise NotImplementedError

    @torch.compiler.disable  # as in training, the frozen pass stays eager under a compiled model
    def carry(self, model: nn.Module, runtime: Runtime, shape: tuple[int, ...] | None, past: int) -> SourceContext:
        """What travels to the layers in one forward of the target.

        Args:
            model, runtime: the transformers model and its runtime.
            shape: (rows, q) of the forward.
            past: positions that the target's cache holds.

        Raises:
            ValueError: the forward does not go on where the last one ended, or other adapters are active by now.
        """
        reading = runtime.reading()
        mine = reading.of_decoder if self.in_decoder else reading.of_text
        if slots_of(mine) != self.slots:
            raise ValueError("past_key_values: other adapters were active when this generation began; begin anew")
        if shape is None or past != self.used:
            raise ValueError(
                f"past_key_values holds {past} positions and its source has been used for {self.used}: a cache with a "
                "source only goes forward, position by position; it cannot be cropped, reset or used twice"
            )
        rows, length = shape
        with torch.no_grad():
            found = self.states(model, runtime, mine, length)
            self.used += length
            found = map_states(found, lambda one: self._for_target(one, rows))
        return SourceContext.of_bottlenecks(found, reading.sites)

    def _for_target(self, states: Tensor, rows: int) -> Tensor:
        """One row for each of the target's rows."""
        own = states.shape[0]
        if self.rows is None:
            if rows == own:
                return states
            if rows % own:
                raise ValueError(f"input_ids has {rows} rows and the source {own}: they do not belong together")
            self.rows = torch.arange(own, device=states.device).repeat_interleave(rows // own)
        if len(self.rows) != rows:
            raise ValueError(f"past_key_values belongs to {len(self.rows)} rows, the forward has {rows}")
        return states.index_select(0, self.rows.to(states.device))

    def select_rows(self, rows: Tensor) -> None:
        """The target's rows were reordered, repeated or dropped: row i is what row ``rows[i]`` was."""
        self.rows = rows if self.rows is None else self.rows[rows.to(self.rows.device)]

    def rows_of_cache(self, rows: Tensor) -> Tensor:
        """The rows of the KV cache as it is now that will belong to these rows of the target; then select_rows."""
        return rows

    def share(self, model: nn.Module, runtime: Runtime, kwargs: dict[str, Any]) -> SharedStep | None:
        """One pass of both streams in place of :meth:`carry` and a pass of the target; None where there can be none.

        Args:
            model, runtime: as in :meth:`carry`.
            kwargs: keyword arguments of the target's forward.
        """
        return None


@dataclass
class FrozenText:
    """The frozen model reading the source text piece by piece, with a KV cache, and choosing what comes next."""

    mask: Tensor  # (B, m) of the prompt, then also of what came after it
    cache: Any
    dropout: bool  # source_dropout
    zero_pads: bool
    encoder_outputs: Any = None  # of an encoder-decoder, whose encoder's mask is then ``encoder_mask``
    encoder_mask: Tensor | None = None
    next_ids: Tensor | None = None  # (B, 1), the greedy choice after what was read last

    def read(self, model: nn.Module, runtime: Runtime, reads: Reads, ids: Tensor) -> Bottlenecks:
        """Read token ids (B, q) behind what was read before; their S."""
        past = self.cache.get_seq_length()
        outputs: list[Any] = []
        inputs = self.inputs(model, ids, past)

        def run() -> None:
            outputs.append(model(**inputs, past_key_values=self.cache, use_cache=True, return_dict=True))

        pads = self.mask[:, past : past + ids.shape[1]] if self.zero_pads else None
        found = read_states(model, runtime, reads, run, pads, self.dropout)
        self.choose(outputs[0].logits)
        return found

    def choose(self, logits: Tensor) -> None:
        """Take note of the likeliest next tokens, by logits (B, q, V)."""
        # as generate chooses, so that ties fall alike
        self.next_ids = logits[:, -1].to(dtype=torch.float32).argmax(dim=-1, keepdim=True)

    def inputs(self, model: nn.Module, ids: Tensor, past: int) -> dict[str, Any]:
        """Keyword arguments of the frozen model for token ids (B, q) behind ``past`` others; the mask grows by them."""
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
        if "position_ids" in accepted:  # counted from a row's first token, as generate counts
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
    """Run the frozen model to its end; S of what it read, zero where ``pads`` (B, q) has zeros."""
    masks = {} if pads is None else {key.stack: pads for key in reads.keys}
    reader = read_from_run(model, run, reads.keys, dropout=dropout, to_the_end=True)
    prepare = Preparation.under_autocast(reads.device if reads else next(model.parameters()).device, masks)
    # eager also where the model itself is compiled: it is called as a whole here
    with torch.compiler.set_stance("force_eager"):
        return project_states(reader, prepare, reads.groups).bottlenecks


@dataclass(kw_only=True)
class AlignedText(SourceDecoding):
    """The source decodes along; see the module."""

    text: FrozenText
    prompt: Tensor  # (B, m)
    end_ids: Tensor  # the tokens that end a text; may be none
    done: Tensor = field(init=False)  # (B,), whether a row's end token has been read
    held: Bottlenecks = field(default_factory=dict)  # S of the position read last, (B, 1, r)
    shares: bool = False  # whether new tokens may go through the blocks beside the target's
    together: int = 0  # rows of the target in a cache that holds both streams; 0: each has its own

    def __post_init__(self) -> None:
        self.done = torch.zeros(len(self.prompt), dtype=torch.bool, device=self.prompt.device)

    def states(self, model: nn.Module, runtime: Runtime, reads: Reads, length: int) -> Bottlenecks:
        parts = []
        piece = self.prompt[:, self.used : self.used + length]
        if piece.shape[1]:
            parts.append(self.text.read(model, runtime, reads, piece))
        for _ in range(length - piece.shape[1]):
            parts.append(self._next_token(model, runtime, reads))
        return join_states(parts)

    def _next_token(self, model: nn.Module, runtime: Runtime, reads: Reads) -> Bottlenecks:
        if bool(self.done.all()):
            return self.held
        ids = self.text.next_ids
        assert ids is not None
        new = self._settle(self.text.read(model, runtime, reads, ids))
        self._note_token(new, ids)
        return new

    def _settle(self, new: Bottlenecks) -> Bottlenecks:
        """S of a new token, in rows that are done that of their last one."""
        if not self.held:
            return new
        return {
            layer: {name: self._unless_done(self.held[layer][name], one) for name, one in own.items()}
            for layer, own in new.items()
        }

    def _note_token(self, settled: Bottlenecks, ids: Tensor) -> None:
        """A token of every row (B, 1) was read."""
        self.held = settled
        self.done = self.done | torch.isin(ids[:, 0], self.end_ids)

    def _unless_done(self, held: Tensor, new: Tensor) -> Tensor:
        return torch.where(self.done[:, None, None].to(new.device), held, new)

    # --- one pass for both streams ------------------------------------------------------------------------------------

    def rows_of_cache(self, rows: Tensor) -> Tensor:
        if not self.together:
            return rows
        source = torch.arange(self.together, self.together + len(self.prompt), device=rows.device)
        return torch.cat([rows, source])

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        self.together = len(rows) if self.together else 0

    @torch.compiler.disable
    def share(self, model: nn.Module, runtime: Runtime, kwargs: dict[str, Any]) -> SharedStep | None:
        cache, reads = kwargs["past_key_values"], runtime.reading().of_text
        rows = len(self.prompt) if self.rows is None else len(self.rows)
        inputs = self._inputs_of_both(model, runtime, reads, kwargs, rows) if self.shares else None
        if inputs is None:
            if self.together:
                part_caches(cache, self.text.cache, self.together, keep_source=not bool(self.done.all()))
                self.together = 0
            return None
        if not self.together:
            join_caches(cache, self.text.cache)
            self.together = rows
        ids = inputs["input_ids"][rows:]

        def finished(settled: Bottlenecks, logits: Tensor) -> None:
            self._note_token(settled, ids)
            self.text.choose(logits)
            self.used += 1

        return SharedStep(
            reads,
            inputs,
            rows,
            settle=self._settle,
            spread=lambda states: map_states(states, lambda one: self._for_target(one, rows)),
            finished=finished,
        )

    def _inputs_of_both(
        self, model: nn.Module, runtime: Runtime, reads: Reads, kwargs: dict[str, Any], rows: int
    ) -> dict[str, Any] | None:
        """Keyword arguments of a forward over both streams' next tokens; None where this forward is another one."""
        past, target = kwargs["past_key_values"].get_seq_length(), kwargs.get("input_ids")
        ids = self.text.next_ids
        if (
            ids is None
            or not isinstance(target, Tensor)
            or target.shape != (rows, 1)
            or not past == self.used >= self.prompt.shape[1]
            or slots_of(reads) != self.slots
            or torch.is_grad_enabled()
            or model.training
            or bool(self.done.all())
        ):
            return None
        inputs, why = inputs_of_both(kwargs, self.text.inputs(model, ids, past), past)
        if why:
            say_two_passes(runtime, why)
        return inputs


@dataclass(kw_only=True)
class LateText(SourceDecoding):
    """The authors' rule: at target length n (prompt included) every position meets the source's step min(n - 1, T - 1).

    Step 0 is the source's prompt, each of the T - 1 others one new token; of a step longer than the forward only the
    last position counts. Rows that stop before the others go on with pad tokens.
    """

    steps: list[Bottlenecks]

    def states(self, model: nn.Module, runtime: Runtime, reads: Reads, length: int) -> Bottlenecks:
        step = self.steps[min(self.used + length, len(self.steps)) - 1]

        def at(one: Tensor) -> Tensor:
            if one.shape[1] > length:
                one = one[:, -1:]
            return one.expand(-1, length, -1)

        return map_states(step, at)


def decode_to_the_end(
    model: nn.Module,
    runtime: Runtime,
    reads: Reads,
    text: FrozenText,
    prompt: Tensor,
    end_ids: Tensor,
    pad_id: int,
    most: int,
) -> list[Bottlenecks]:
    """S of every step of the source's own greedy generation of at most ``most`` tokens, as LateText wants them."""
    steps = [text.read(model, runtime, reads, prompt)]
    done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    while len(steps) < most:
        assert text.next_ids is not None
        ids = text.next_ids.masked_fill(done[:, None], pad_id)
        done = done | torch.isin(ids[:, 0], end_ids)
        if bool(done.all()):
            break
        steps.append(text.read(model, runtime, reads, ids))
    return steps


@dataclass(kw_only=True)
class GivenStates(SourceDecoding):
    """S of the whole prompt, given; new tokens hold each row's last real one."""

    given: Bottlenecks
    mask: Tensor | None  # (B, m), where states are real; left out: everywhere

    def states(self, model: nn.Module, runtime: Runtime, reads: Reads, length: int) -> Bottlenecks:
        start = self.used

        def at(one: Tensor) -> Tensor:
            positions = torch.arange(start, start + length, device=one.device)
            width = one.shape[1]
            last = torch.full((len(one),), width - 1, device=one.device)
            if self.mask is not None:
                real = self.mask.to(one.device) != 0
                last = torch.where(real, torch.arange(width, device=one.device), 0).amax(dim=1)
            index = torch.where(positions < width, positions, last[:, None])
            return one.gather(1, index[:, :, None].expand(-1, -1, one.shape[2]))

        return map_states(self.given, at)
