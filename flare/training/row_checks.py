"""Check that rows and tokenizers fit a model. A mismatch would cause an index error or a worse model later."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

#: Accepted names of the label column.
LABEL_NAMES = ("labels", "label", "label_ids")
_SPECIAL = ("pad", "bos", "eos")


def read_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of lists and numbers, with the labels also under "labels", and without columns that hold None.

    ``source_states`` become a float32 tensor.

    Raises:
        ValueError: there are no rows, labels are text, or token ids are missing, empty or text.
    """
    if not rows:
        raise ValueError("the collator was given no rows")
    plain = [_plain_row(row) for row in rows]
    for index, row in enumerate(plain):
        check_row(row, index)
    return plain


def _plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return one row as described in :func:`read_rows`."""
    plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
    if row.get("source_states") is not None:
        plain["source_states"] = torch.as_tensor(row["source_states"], dtype=torch.float32)
    plain = {n: list(v) if isinstance(v, tuple) else v for n, v in plain.items() if v is not None}
    label_names = [name for name in LABEL_NAMES if name in plain]
    if label_names:
        plain["labels"] = plain[label_names[0]]
    return plain


def all_have(rows: Sequence[Mapping[str, Any]], name: str, prefix: str = "") -> bool:
    """Return whether all rows have a column.

    Raises:
        ValueError: only some rows have it.
    """
    missing = [index for index, row in enumerate(rows) if name not in row]
    if 0 < len(missing) < len(rows):
        raise ValueError(
            f"row {missing[0]} of the batch has no column '{prefix}{name}', but other rows have it: give it to every "
            "row or to none"
        )
    return not missing


def check_row(row: Mapping[str, Any], index: int) -> None:
    """Raise ValueError for ids that are missing, empty or text, and for labels that are text."""
    if "input_ids" not in row:
        raise ValueError(f"row {index} has no column 'input_ids'; it has {sorted(row)}")
    for name in ("input_ids", "source_input_ids"):
        ids = row.get(name, [0])
        if not isinstance(ids, list) or (ids and not isinstance(ids[0], int)):
            raise ValueError(
                f"row {index}: {name} must be a list of token ids, got {str(ids)[:60]!r}; tokenise the text"
            )
        if not ids:
            raise ValueError(
                f"row {index}: {name} is empty; leave such rows out, or keep the special tokens that "
                "tokenizers add by default"
            )
    labels = row.get("labels")
    first = labels[0] if isinstance(labels, list) and labels else labels
    if isinstance(first, str):
        raise ValueError(
            f"row {index}: labels is the text {first!r}, and models are trained on numbers; convert it first, such as "
            "with model.config.label2id[label]"
        )


def check_vocabulary(ids: Sequence[int], vocab_size: int, index: int, name: str) -> None:
    """Raise ValueError for a token id without an embedding."""
    highest = max(ids)
    if highest >= vocab_size:
        raise ValueError(
            f"row {index}: {name} holds the id {highest}, and the model's vocabulary has {vocab_size} ids: this text "
            "was made by another model's tokenizer, or tokens were added without model.resize_token_embeddings"
        )


def vocabulary_of(model: Any) -> int | None:
    """Return the number of token ids that a model has embeddings for, or None if it is unknown."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    sizes = (size, getattr(embeddings, "num_embeddings", None))
    return max((number for number in sizes if isinstance(number, int)), default=None)


def refuse_lost_labels(trainer: Any) -> None:
    """Raise ValueError for options with which a Trainer takes the labels from the model's inputs."""
    options = {
        "label_smoothing_factor": trainer.args.label_smoothing_factor or None,
        "compute_loss_func": trainer.compute_loss_func,
    }
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name}={value}: Trainer takes the labels from the model's inputs, so X-Mixup's losses (of the "
                f"source, KL and MSE) would be lost; leave {name} out"
            )


def wrong_tokenizer(tokenizer: Any, model: Any) -> str | None:
    """Return why a tokenizer seems to belong to another model, or None.

    The reasons are special tokens beyond the model's vocabulary, and pad, bos or eos ids that differ from the ids in
    the model's configuration and generation configuration. The result is only used for a warning, because the ids of
    some published models differ by design.
    """
    size, name = vocabulary_of(model), type(tokenizer).__name__
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in (*_SPECIAL, "cls", "sep", "mask", "unk")}
    beyond = {kind: id_ for kind, id_ in ids.items() if size is not None and isinstance(id_, int) and id_ >= size}
    if beyond:
        return (
            f"the tokenizer ({name}) has {_listed(beyond)}, and the model's vocabulary has {size} ids; use the model's "
            "own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) after adding tokens"
        )
    differing = {}
    for kind in _SPECIAL:
        model_ids = _ids_of(model, kind)
        if model_ids and ids[kind] is not None and ids[kind] not in model_ids:
            differing[kind] = f"{ids[kind]} (the model has {', '.join(map(str, model_ids))})"
    if not differing:
        return None
    return (
        f"the tokenizer ({name}) has {_listed(differing)}, so it may belong to another model. Use the model's own "
        "tokenizer for target and source texts, or set the ids in model.config if they are intended"
    )


def broken_by(tokenizer: Any, model: Any) -> str | None:
    """Return why a tokenizer's special tokens change what a model computes, or None.

    RoBERTa and XLM-R count positions from the pad id, so another pad id gives wrong positions. A model that generates
    text does not stop at another tokenizer's end token.
    """
    name = type(tokenizer).__name__
    counted = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
    pads, pad = _ids_of(model, "pad"), tokenizer.pad_token_id
    if counted and pads and pad is not None and pad not in pads:
        return (
            f"the tokenizer ({name}) belongs to another model: its pad_token_id is {pad}, but {type(model).__name__} "
            f"counts positions from pad_token_id {pads[0]}"
        )
    ends, end = _ids_of(model, "eos"), tokenizer.eos_token_id
    if model.can_generate() and ends and end is not None and end not in ends:
        return (
            f"the tokenizer ({name}) belongs to another model: its eos_token_id is {end}, but {type(model).__name__} "
            f"stops at {', '.join(map(str, ends))}"
        )
    return None


def _ids_of(model: Any, kind: str) -> list[int]:
    """Return the ids that a model's configurations accept as its pad, bos or eos token."""
    ids: list[int] = []
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        value = getattr(config, f"{kind}_token_id", None)
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(ids))


def first_special(tokenizer: Any) -> int | None:
    """Return the first token id of the empty text, or None if it has no tokens.

    If the tokenizer puts a special token at the start of every text, this is its id.
    """
    ids = tokenizer("")["input_ids"]
    return ids[0] if ids else None


def check_beginnings(rows: Sequence[Mapping[str, Any]], first: int | None) -> bool:
    """Warn about the first row whose source was tokenised differently; return whether there is such a row.

    In such a row the target begins with the tokenizer's first special token, and the source does not.

    Args:
        rows: rows with ``input_ids`` and ``source_input_ids``.
        first: the token id from :func:`first_special`.
    """
    for index, row in enumerate(rows):
        target, source = row["input_ids"][0], row["source_input_ids"][0]
        if target == first != source:
            warnings.warn(
                f"row {index}: input_ids begins with the special token {first}, and source_input_ids with {source}: "
                "the source text was tokenised by another model's tokenizer, or without special tokens. Tokenise both "
                "texts with the model's own tokenizer, with the same options",
                UserWarning,
                stacklevel=4,
            )
            return True
    return False


def plain_collator(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack rows of equal length, as transformers' default collator does.

    Raises:
        ValueError: labels are text, or the rows have different lengths, so they need a tokenizer that pads them.
    """
    from transformers import default_data_collator

    for index, row in enumerate(rows):
        labels = row.get("labels", row.get("label"))
        check_row({"input_ids": [0], "labels": labels}, index)
    try:
        return dict(default_data_collator([dict(row) for row in rows]))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            "these rows cannot be stacked: their texts differ in length, and the trainer has no tokenizer to pad them "
            "with; pass processing_class=tokenizer to FlareTrainer, or data_collator=flare.FlareDataCollator(tokenizer)"
        ) from error


def _listed(ids: Mapping[str, Any]) -> str:
    return ", ".join(f"{kind}_token_id {value}" for kind, value in ids.items())
