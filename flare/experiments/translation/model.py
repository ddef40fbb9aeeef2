"""A machine translation model and its tokenizer: loading, language tags, limits, and a name for what was loaded."""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from ..utils.errors import UserError, library_errors, reason
from ..utils.model_names import find_model
from ..utils.processes import device as this_device
from ..utils.processes import process_count

_TAG = re.compile(r"[a-z]{2,3}_[A-Za-z]{2,4}")  # as NLLB and mBART write them; M2M100 lists its own
_WEIGHTS = (".safetensors", ".bin", ".pt", ".h5", ".msgpack")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class TranslationError(UserError):
    """A translation that cannot be made; the message says what to do."""


class TranslationModel:
    """An encoder-decoder with its tokenizer, for any number of directions. The weights are loaded when first needed.

    Args:
        name: hub id or folder (NLLB, M2M100, mBART, Marian, T5, ...).
        revision: branch, tag or commit on the hub.
        device: default: the GPU if there is one, else the CPU.
        dtype: "float32", "float16", "bfloat16" or a torch dtype; "auto": bfloat16 on a GPU that has it, else float32.

    Raises:
        TranslationError: no such model, device or dtype, or a model that is no encoder-decoder.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> None:
        import transformers

        try:
            found = find_model(name, "--model")
        except UserError as error:
            raise TranslationError(str(error)) from error
        self.name, self._wanted = name, revision
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.folder = Path(found) if Path(found).is_dir() else None
        self.config = self._load(transformers.AutoConfig, "configuration")
        if not getattr(self.config, "is_encoder_decoder", False):
            raise TranslationError(
                f"--model {name}: {self.config.model_type} is no encoder-decoder; translation takes one, such as "
                "facebook/nllb-200-distilled-600M"
            )
        self.tokenizer = self._load(transformers.AutoTokenizer, "tokenizer")
        self.revision: str | None = getattr(self.config, "_commit_hash", None) or revision

    @functools.cached_property
    def model(self) -> Any:
        """The model with its weights, on its device, for inference.

        Raises:
            TranslationError: it cannot be loaded.
        """
        import transformers

        model = self._load(transformers.AutoModelForSeq2SeqLM, "weights", dtype=self.dtype)
        return model.to(self.device).eval().requires_grad_(False)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What says which model it is, for provenance: name, commit or fingerprint of the folder, and dtype."""
        which = {"fingerprint": fingerprint(self.folder)} if self.folder else {"revision": self.revision}
        return {"name": self.name, **which, "dtype": str(self.dtype).removeprefix("torch.")}

    def _load(self, auto: Any, what: str, **options: Any) -> Any:
        # the commit that the configuration came from, so that a branch that moves meanwhile changes nothing
        revision = getattr(self, "revision", None) or self._wanted
        if self.folder is None and revision is not None:
            options["revision"] = revision
        with library_errors(f"--model {self.name}: its {what} could not be loaded", TranslationError):
            return auto.from_pretrained(str(self.folder or self.name), trust_remote_code=False, **options)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device meant: that given, else this process's GPU if there is one, else the CPU.

    Raises:
        TranslationError: it is not here, or one that several processes would share.
    """
    if device is None:
        return this_device()
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise TranslationError(
            f"--device {device} cannot be used here ({reason(error)}); leave it out for {this_device()}"
        ) from error
    if process_count() > 1 and found.type != "cpu":
        raise TranslationError(
            f"--device {device} would put all {process_count()} processes on one device; leave it out, and each takes "
            "its own"
        )
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype meant; "auto" is bfloat16 on a GPU that computes in it, else float32.

    Raises:
        TranslationError: another name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise TranslationError(f"--dtype must be one of auto, {', '.join(known)}; got {dtype!r}")
    return known[dtype]


# --- language tags ----------------------------------------------------------------------------------------------------


def writes_tags(tokenizer: Any) -> bool:
    """Whether a tokenizer writes a language tag (NLLB, M2M100, mBART), rather than none (Marian, T5)."""
    return hasattr(tokenizer, "src_lang")


def known_tags(tokenizer: Any) -> list[str]:
    """The language tags of a tokenizer, those included that somebody added to it."""
    listed = getattr(tokenizer, "lang_code_to_id", None)
    if listed:
        return sorted(listed)
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return sorted(token for token in tokens if _TAG.fullmatch(token))


def check_tag(tokenizer: Any, tag: str, option: str) -> None:
    """A tag the tokenizer does not know would become <unk>, in silence.

    Args:
        option: how the tag is given, for the message.

    Raises:
        TranslationError: it is unknown; the message names the nearest.
    """
    tags = known_tags(tokenizer)
    if tag in tags or (not tags and tokenizer.convert_tokens_to_ids(tag) != tokenizer.unk_token_id):
        return
    by_key = {one.casefold(): one for one in tags}
    near = [by_key[key] for key in difflib.get_close_matches(tag.casefold(), list(by_key), n=3, cutoff=0.5)]
    # an alphabet apart ("eng_Latn" for "en", "en_XX") nothing is close: what begins alike is meant
    near = near or [one for one in tags if one[:2] == tag[:2]][:3]
    shown = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(tags[:8])}, ..."
    raise TranslationError(
        f"{option} {tag!r}: {type(tokenizer).__name__} has no such language tag ({len(tags)} in all); {shown}"
    )


def tag_id(tokenizer: Any, tag: str) -> int:
    """The token that a translation into a language begins with."""
    if hasattr(tokenizer, "get_lang_id"):  # M2M100: the token is not spelt as the tag is
        return int(tokenizer.get_lang_id(tag))
    return int(tokenizer.convert_tokens_to_ids(tag))


# --- limits -----------------------------------------------------------------------------------------------------------


def position_limit(config: Any, tokenizer: Any = None) -> int | None:
    """How many tokens the model (and, where given, the tokenizer) can take; None: no limit is known."""
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    # T5's n_positions is what it was trained on; its positions are relative and go on
    if getattr(config, "relative_attention_num_buckets", None) is not None:
        limits = []
    limits.append(getattr(tokenizer, "model_max_length", None))
    known = [int(one) for one in limits if one is not None and 0 < one < 2**31]
    return min(known) if known else None


# --- which model it is ------------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    """A digest of a model's folder that does not depend on where it lies or when it was written.

    Of weights: names, sizes and 64 samples of 64 KiB, so that several GB take no minute; of JSON and tokenizer files
    all bytes. Other files (a README) do not count.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        weights = path.suffix in _WEIGHTS
        if not path.is_file() or not (weights or path.suffix in (".json", ".model", ".spm", ".txt")):
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if not weights or size <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
