"""Recipes: everything a training needs beside its data, in one YAML file or one call.

    model, tokenizer = flare.from_recipe("qlora", "meta-llama/Llama-3.1-8B")

A recipe names the task, how the base is quantised, the adapter, the training arguments and how batches are made. The
files beside this module are the paper's settings and two QLoRA presets; a file of your own looks the same.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml

from .._compat import enable_checkpointing
from ..training.collator import FlareDataCollator
from ..tuner.config import FlareConfig
from ..tuner.convert import fast_lora
from .yaml_loader import YamlLoader

#: PEFT's task type (it has none for a multiple choice) -> transformers' Auto class, and the collator's layout.
TASKS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "encoder"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "encoder"),
    "MULTIPLE_CHOICE": ("AutoModelForMultipleChoice", "encoder"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "encoder"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "causal"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "seq2seq"),
}
_CHECKPOINTING = (False, True, "non-reentrant", "reentrant")
# Heads are trained or read in full precision: a quantised one could be neither.
_NEVER_QUANTIZED = ["lm_head", "score", "classifier", "qa_outputs"]
# PEFT has a field of this name for the base model's revision, which is what from_pretrained is told.
_ADAPTER_FIELDS = {f.name for f in fields(FlareConfig) if f.init} - {"revision"}

# What lets from_pretrained or PEFT run code, or read pickles: for the caller to say, not for a file.
_RUNS_CODE = {"trust_remote_code", "code_revision", "use_kernels", "weights_only", "custom_generate", "megatron_core"}


@dataclass(frozen=True)
class Recipe:
    """A recipe as read from YAML; every field but ``name`` is a key of the file.

    name: what it was read as.
    about: one line for people.
    base: the base model's name or folder, where the recipe has one.
    task: a key of ``TASKS``.
    dtype: dtype of the base weights that are not quantised ("float32", "bfloat16", "auto", ...).
    quantization: arguments of transformers.BitsAndBytesConfig; None: not quantised.
    gradient_checkpointing: False, True (non-reentrant), "non-reentrant" or "reentrant".
    adapter: FlareConfig's fields.
    model: further arguments of the base's from_pretrained (num_labels, attn_implementation, ...).
    tokenizer: arguments of the tokenizer's from_pretrained (padding_side, ...).
    batches: FlareDataCollator's arguments.
    training: TrainingArguments' fields.
    """

    name: str
    task: str
    about: str = ""
    base: str | None = None
    dtype: str = "float32"
    quantization: dict[str, Any] | None = None
    gradient_checkpointing: bool | str = False
    adapter: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    batches: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"recipe {self.name!r}: task={self.task!r} is not accepted; one of: {', '.join(TASKS)}")
        if self.gradient_checkpointing not in _CHECKPOINTING:
            raise ValueError(
                f"recipe {self.name!r}: gradient_checkpointing={self.gradient_checkpointing!r} is not accepted; one "
                f"of: {', '.join(map(repr, _CHECKPOINTING))}"
            )
        for key in ("adapter", "model", "tokenizer", "batches", "training"):
            if not isinstance(getattr(self, key), dict):
                raise TypeError(f"recipe {self.name!r}: {key} must be a mapping, got {getattr(self, key)!r}")
        self._check_harmless()
        unknown = sorted(set(self.adapter) - _ADAPTER_FIELDS)
        if unknown:
            raise ValueError(f"recipe {self.name!r}: adapter has {', '.join(unknown)}, no field of FlareConfig")

    def _check_harmless(self) -> None:
        """Raise ValueError for what would let a file decide that code of a folder or the hub is run."""
        for key in ("model", "tokenizer", "adapter"):
            for name in sorted(_RUNS_CODE & set(getattr(self, key))):
                raise ValueError(
                    f"recipe {self.name!r}: {key} has {name}: a recipe never runs code that comes with a model. Pass "
                    f"{name} in the call (flare.from_recipe(..., {name}=...)) if you trust it"
                )
        if "/" in str(self.model.get("attn_implementation", "")):
            raise ValueError(
                f"recipe {self.name!r}: attn_implementation={self.model['attn_implementation']!r} is code of the hub: "
                "a recipe never runs such. Pass attn_implementation in the call if you trust it"
            )

    @classmethod
    def read(cls, recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
        """A recipe from its name (``names()``), a YAML file, or a mapping of what such a file holds.

        A file with ``tasks`` has one recipe for each: ``"paper-llama/nusax"``, ``"mine.yaml/nusax"``.

        Raises:
            ValueError: a name that is none and no file, an unknown key or value, or a task that was left out.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls._of("a mapping", dict(recipe), None)
        name = os.fspath(recipe)
        path, variant = _find(name)
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"recipe {name!r}: {path} cannot be read as YAML: {error}") from error
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise ValueError(f"recipe {name!r}: {path} holds no mapping of keys to values")
        return cls._of(name, content, variant)

    @classmethod
    def _of(cls, name: str, content: dict[str, Any], variant: str | None) -> Recipe:
        variants = content.pop("tasks", None) or {}
        if not isinstance(variants, dict) or not all(isinstance(one, dict) for one in variants.values()):
            raise ValueError(f"recipe {name!r}: tasks must map names to keys of a recipe, got {str(variants)[:60]}")
        if variant is None and variants:
            named = ", ".join(f"{name}/{one}" for one in variants)
            raise ValueError(f"recipe {name!r} has one recipe for each task: {named}")
        if variant is not None and variant not in variants:
            raise ValueError(f"recipe {name!r}: no task {variant!r}; it has: {', '.join(variants) or 'none'}")
        own = variants[variant] if variant is not None else {}
        content = {
            key: {**content[key], **own[key]} if key in content and isinstance(own.get(key), dict) else value
            for key, value in {**content, **own}.items()
        }
        known = {f.name for f in fields(cls)} - {"name"}
        unknown = sorted(set(content) - known)
        if unknown:
            raise ValueError(
                f"recipe {name!r}: {', '.join(unknown)}: no key of a recipe; keys: {', '.join(sorted(known))}"
            )
        if "task" not in content:
            raise ValueError(f"recipe {name!r}: task is missing; one of: {', '.join(TASKS)}")
        return cls(name=name, **content)

    # --- what it makes ------------------------------------------------------------------------------------------------

    def load(
        self,
        base: str | os.PathLike[str] | None = None,
        *,
        trained: str | os.PathLike[str] | None = None,
        **changes: Any,
    ) -> tuple[peft.PeftModel, Any]:
        """The base model with adapters, ready to train, and its tokenizer; see :func:`from_recipe`."""
        recipe, adapter, passed = self._changed(changes)
        base = os.fspath(base) if base is not None else recipe.base
        if base is None:
            raise ValueError(f"recipe {recipe.name!r} names no base model: pass its name or folder as base")
        tokenizer = recipe.tokenizer_of(base, **passed)
        model = recipe.base_model(base, tokenizer, **passed)
        if trained is None:
            return fast_lora(model, **{**recipe.adapter, **adapter}), tokenizer
        if adapter:
            raise ValueError(f"{', '.join(sorted(adapter))}: fixed by the trained adapter {os.fspath(trained)!r}")
        return peft.PeftModel.from_pretrained(model, os.fspath(trained), is_trainable=True), tokenizer

    def tokenizer_of(self, base: str | os.PathLike[str], **passed: Any) -> Any:
        """The base's tokenizer, with a pad token; of ``passed`` it takes revision, token, cache_dir and the like."""
        return self._tokenizer(os.fspath(base), passed)

    def base_model(
        self, base: str | os.PathLike[str], tokenizer: Any, lacking: list[str] | None = None, **passed: Any
    ) -> Any:
        """The (quantised) base model, prepared for adapters but without any; ``passed`` goes to its from_pretrained.

        Args:
            base: a folder or the hub's name of a model.
            tokenizer: its tokenizer, whose pad token the model takes over where it has none.
            lacking: receives the names of the weights that the checkpoint lacks, which are random then.

        Raises:
            ImportError: a quantised recipe without bitsandbytes.
        """
        if lacking is None:
            model = self._base_model(os.fspath(base), passed)
        else:
            model, info = self._base_model(os.fspath(base), {**passed, "output_loading_info": True})
            lacking += sorted(info["missing_keys"])
        model = self._prepared(model)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model

    def collator(self, tokenizer: Any, **changes: Any) -> FlareDataCollator:
        """FlareDataCollator with the recipe's ``batches``, in the layout of its task."""
        return FlareDataCollator(tokenizer, **{"layout": TASKS[self.task][1], **self.batches, **changes})

    def training_arguments(self, output_dir: str | os.PathLike[str], **changes: Any) -> transformers.TrainingArguments:
        """TrainingArguments (for encoder-decoders Seq2SeqTrainingArguments) with the recipe's ``training``."""
        seq2seq = self.task == "SEQ_2_SEQ_LM"
        made = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
        return made(output_dir=os.fspath(output_dir), **{**self.training, **changes})

    def _changed(self, changes: dict[str, Any]) -> tuple[Recipe, dict[str, Any], dict[str, Any]]:
        """The recipe with its own keys changed, the adapter's fields, and what is left for from_pretrained."""
        keys = {f.name for f in fields(self)} - {"name"}
        own: dict[str, Any] = {key: value for key, value in changes.items() if key in keys}
        adapter = {key: value for key, value in changes.items() if key in _ADAPTER_FIELDS}
        passed = {key: value for key, value in changes.items() if key not in keys and key not in _ADAPTER_FIELDS}
        merged: dict[str, Any] = {
            key: {**getattr(self, key), **value}
            if isinstance(value, dict) and isinstance(getattr(self, key), dict)
            else value
            for key, value in own.items()
        }
        return replace(self, **merged), adapter, passed

    def _tokenizer(self, base: str, passed: dict[str, Any]) -> Any:
        shared: dict[str, Any] = {
            key: passed[key] for key in ("revision", "trust_remote_code", "token", "cache_dir") if key in passed
        }
        options: dict[str, Any] = {"trust_remote_code": False, **shared, **self.tokenizer}
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, **options)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, so ends of text still count
        return tokenizer

    def _base_model(self, base: str, passed: dict[str, Any]) -> Any:
        options: dict[str, Any] = {"dtype": self.dtype, "trust_remote_code": False, **self.model, **passed}
        if self.quantization is not None:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise ImportError(
                    f"recipe {self.name!r} quantises the base model with bitsandbytes, which is not installed: "
                    "pip install bitsandbytes, or pass quantization=None"
                )
            options.setdefault("device_map", {"": _this_process_device()})
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                **{"llm_int8_skip_modules": _NEVER_QUANTIZED, **self.quantization}
            )
        try:
            return getattr(transformers, TASKS[self.task][0]).from_pretrained(base, **options)
        except TypeError as error:
            refused = [name for name in passed if name in str(error)]
            if not refused:
                raise
            raise TypeError(
                f"{', '.join(refused)}: no key of a recipe, no field of FlareConfig, and not accepted by the base "
                f"model's from_pretrained ({error})"
            ) from error

    def _prepared(self, model: Any) -> Any:
        """Frozen weights, norms in float32 over a quantised base (PEFT's preparation), and checkpointing."""
        on = bool(self.gradient_checkpointing)
        mode = {"use_reentrant": self.gradient_checkpointing == "reentrant"}
        if self.quantization is not None:
            return peft.prepare_model_for_kbit_training(
                model, use_gradient_checkpointing=on, gradient_checkpointing_kwargs=mode
            )
        if on:
            enable_checkpointing(model, mode)
        return model


def from_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    base: str | os.PathLike[str] | None = None,
    *,
    trained: str | os.PathLike[str] | None = None,
    **changes: Any,
) -> tuple[peft.PeftModel, Any]:
    """The whole recipe in one call: the (quantised) base model, prepared, with fusing adapters, and its tokenizer.

    Args:
        recipe: a name (``flare.recipes.names()``), a YAML file, or a mapping of what such a file holds.
        base: name or folder of the base model; default: the recipe's own.
        trained: a saved adapter to go on with, in place of a new one.
        **changes: keys of the recipe (``quantization=None``, ``gradient_checkpointing="reentrant"``), fields of
            FlareConfig (``r=8``, ``fusion="mul"``), and anything else for the base's ``from_pretrained``
            (``num_labels=3``, ``device_map=...``).

    Returns:
        (model, tokenizer): a ``peft.PeftModel`` to train, and the tokenizer, which has a pad token.

    Raises:
        ValueError, TypeError: an unknown recipe, key or value; the message names it and what is accepted.
        ImportError: a quantised recipe without bitsandbytes.
    """
    return Recipe.read(recipe).load(base, trained=trained, **changes)


def names() -> list[str]:
    """The recipes that come with the package."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        variants = yaml.load(path.read_text(encoding="utf-8"), YamlLoader).get("tasks", {})
        found += [f"{path.stem}/{one}" for one in variants] or [path.stem]
    return found


def _find(name: str) -> tuple[Path, str | None]:
    """The file of a recipe, and which of its tasks is meant."""
    here = Path(__file__).parent
    stem, _, variant = name.rpartition("/")
    for path, task in ((Path(name), None), (Path(stem), variant) if stem else (Path(name), None)):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path, task
    for shipped, task in ((name, None), (stem, variant)):
        path = here / f"{shipped}.yaml"
        if shipped and "/" not in shipped and path.is_file():
            return path, task
    raise ValueError(f"recipe {name!r} is no file and none of: {', '.join(names())}")


def _this_process_device() -> str | int:
    """Where this process's whole copy of a quantised model goes."""
    return int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
