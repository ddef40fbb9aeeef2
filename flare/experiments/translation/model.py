"""Load a machine translation model and its tokenizer, check language tags, and identify the model for provenance."""

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

_TAG = re.compile(r"[a-z]{2,3}_[A-Za-z]{2,4}")  # tags of NLLB and mBART; M2M100's tokenizer lists its tags
_WEIGHTS = (".safetensors", ".bin", ".pt", ".h5", ".msgpack")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class TranslationError(UserError):
    """A translation that is not possible. The message says what to do."""


class TranslationModel:
    """An encoder-decoder with its tokenizer. Translators of several directions can share it.

    The weights are loaded on first use.

    Args:
        name: hub id or folder (NLLB, M2M100, mBART, Marian, T5, ...).
        revision: branch, tag or commit on the hub.
        device: device of the model; None: the GPU if there is one, else the CPU.
        dtype: "float32", "float16", "bfloat16" or a torch dtype; "auto": bfloat16 on a GPU that supports it, else
            float32.

    Raises:
        TranslationError: an unknown model, device or dtype, or a model that is not an encoder-decoder.
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
            path = find_model(name, "--model")
        except UserError as error:
            raise TranslationError(str(error)) from error
        self.name, self._requested_revision = name, revision
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.folder = Path(path) if Path(path).is_dir() else None
        self.config = self._load(transformers.AutoConfig, "configuration")
        if not getattr(self.config, "is_encoder_decoder", False):
            raise TranslationError(
                f"--model {name}: {self.config.model_type} is not an encoder-decoder; use one, such as "
                "facebook/nllb-200-distilled-600M"
            )
        self.tokenizer = self._load(transformers.AutoTokenizer, "tokenizer")
        self.revision: str | None = getattr(self.config, "_commit_hash", None) or revision

    @functools.cached_property
    def model(self) -> Any:
        """The model with its weights, on its device, for inference.

        Raises:
            TranslationError: the weights cannot be loaded.
        """
        import transformers

        model = self._load(transformers.AutoModelForSeq2SeqLM, "weights", dtype=self.dtype)
        return model.to(self.device).eval().requires_grad_(False)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Identification of the model for provenance: its name, dtype, and commit (hub) or fingerprint (folder)."""
        version = {"fingerprint": fingerprint(self.folder)} if self.folder else {"revision": self.revision}
        return {"name": self.name, **version, "dtype": str(self.dtype).removeprefix("torch.")}

    def _load(self, auto: Any, what: str, **options: Any) -> Any:
        # pin the configuration's commit: the branch may move between two downloads
        revision = getattr(self, "revision", None) or self._requested_revision
        if self.folder is None and revision is not None:
            options["revision"] = revision
        with library_errors(f"--model {self.name}: its {what} could not be loaded", TranslationError):
            return auto.from_pretrained(str(self.folder or self.name), trust_remote_code=False, **options)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the given device. If it is None, return this process's GPU if there is one, else the CPU.

    Raises:
        TranslationError: the device is not available, or several processes would share it.
    """
    if device is None:
        return this_device()
    try:
        resolved = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises an AssertionError
        raise TranslationError(
            f"--device {device} cannot be used ({reason(error)}); leave --device out to use {this_device()}"
        ) from error
    if process_count() > 1 and resolved.type != "cpu":
        raise TranslationError(
            f"--device {device} would put all {process_count()} processes on one device; leave --device "
            "out, so that each process uses its own device"
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; "auto" is bfloat16 on a GPU that supports it, else float32.

    Raises:
        TranslationError: an unknown name.
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
    """Return whether a tokenizer writes language tags.

    The tokenizers of NLLB, M2M100 and mBART write them. The tokenizers of Marian and T5 do not.
    """
    return hasattr(tokenizer, "src_lang")


def known_tags(tokenizer: Any) -> list[str]:
    """Return the language tags that a tokenizer knows."""
    listed = getattr(tokenizer, "lang_code_to_id", None)
    if listed:
        return sorted(listed)
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return sorted(token for token in tokens if _TAG.fullmatch(token))


def check_tag(tokenizer: Any, tag: str, option: str) -> None:
    """Check that the tokenizer knows a tag, because it would silently encode an unknown tag as <unk>.

    Args:
        tokenizer: the tokenizer.
        tag: the language tag.
        option: name of the option with the tag, for the message.

    Raises:
        TranslationError: the tag is unknown; the message suggests similar ones.
    """
    tags = known_tags(tokenizer)
    if tag in tags or (not tags and tokenizer.convert_tokens_to_ids(tag) != tokenizer.unk_token_id):
        return
    by_key = {known.casefold(): known for known in tags}
    similar = [by_key[key] for key in difflib.get_close_matches(tag.casefold(), list(by_key), n=3, cutoff=0.5)]
    # a tag of another scheme ("eng_Latn" for "en" or "en_XX") is not spelled similarly, so compare two letters
    similar = similar or [known for known in tags if known[:2] == tag[:2]][:3]
    shown = f"did you mean {' or '.join(similar)}?" if similar else f"the first tags are {', '.join(tags[:8])}"
    raise TranslationError(
        f"{option} {tag!r}: {type(tokenizer).__name__} has no such language tag (it has {len(tags)} tags); {shown}"
    )


def tag_id(tokenizer: Any, tag: str) -> int:
    """Return the id of the token that starts a translation into a language."""
    if hasattr(tokenizer, "get_lang_id"):  # M2M100: the token differs from the tag
        return int(tokenizer.get_lang_id(tag))
    return int(tokenizer.convert_tokens_to_ids(tag))


# --- limits -----------------------------------------------------------------------------------------------------------


def position_limit(config: Any, tokenizer: Any = None) -> int | None:
    """Return the maximum number of tokens that the model and the tokenizer (if given) accept; None if not known."""
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    # T5 has relative positions without a limit; its n_positions is only the length in training
    if getattr(config, "relative_attention_num_buckets", None) is not None:
        limits = []
    limits.append(getattr(tokenizer, "model_max_length", None))
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 2**31]
    return min(known) if known else None


# --- identification ---------------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    """Return a digest of a model's folder that does not depend on its location or time stamps.

    Weight, JSON and tokenizer files contribute their names, sizes and contents; other files (a README) are ignored. The
    contents are all bytes, except for weight files of more than 4 MiB. These contribute 64 samples of 64 KiB, so that
    several GB take little time.
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
