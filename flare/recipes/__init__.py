"""Recipes: the settings of a training run, except its data, in one YAML file.

    model, tokenizer = flare.from_recipe("qlora", "meta-llama/Llama-3.1-8B")

A recipe holds the task, and the settings of the base model, its quantisation, the adapter, the batches and the
training. The YAML files in this folder are the paper's settings and two QLoRA presets. Your own files have the same
keys.
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

#: PEFT's task type (and MULTIPLE_CHOICE, which PEFT lacks) -> transformers' Auto class, and the collator's layout.
TASKS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "encoder"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "encoder"),
    "MULTIPLE_CHOICE": ("AutoModelForMultipleChoice", "encoder"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "encoder"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "causal"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "seq2seq"),
}
_CHECKPOINTING = (False, True, "non-reentrant", "reentrant")
# These heads are trained, or used in full precision, so they must not be quantised.
_NEVER_QUANTIZED = ["lm_head", "score", "classifier", "qa_outputs"]
# FlareConfig has a field revision too. The revision of a recipe is an argument of the base's from_pretrained.
_ADAPTER_FIELDS = {f.name for f in fields(FlareConfig) if f.init} - {"revision"}

# Options that let from_pretrained or PEFT run code or read pickles. A call may set them, a recipe may not.
_RUNS_CODE = {"trust_remote_code", "code_revision", "use_kernels", "weights_only", "custom_generate", "megatron_core"}


@dataclass(frozen=True)
class Recipe:
    """A recipe as read from YAML. Every field except ``name`` is a key of the file.

        recipe = flare.Recipe.read("qlora")
        model, tokenizer = recipe.load("meta-llama/Llama-3.1-8B", r=16)
        args = recipe.training_arguments("out", num_train_epochs=3)
        flare.FlareTrainer(model, args, train_dataset=rows, data_collator=recipe.collator(tokenizer)).train()

    Attributes:
        name: the name or file that the recipe was read from.
        task: a key of ``TASKS``, such as "SEQ_CLS" or "CAUSAL_LM".
        about: one line of description.
        base: name or folder of the base model, or None.
        dtype: dtype of the base weights that are not quantised ("float32", "bfloat16", "auto", ...).
        quantization: arguments of transformers.BitsAndBytesConfig, or None for a base that is not quantised.
        gradient_checkpointing: False, True (non-reentrant), "non-reentrant" or "reentrant".
        adapter: fields of FlareConfig.
        model: further arguments of the base's from_pretrained (num_labels, attn_implementation, ...).
        tokenizer: arguments of the tokenizer's from_pretrained (padding_side, ...).
        batches: arguments of FlareDataCollator.
        training: fields of TrainingArguments.

    Raises:
        TypeError, ValueError: a value is not accepted, or it would run code from a model's folder or from the hub.
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
        self._refuse_code()
        unknown = sorted(set(self.adapter) - _ADAPTER_FIELDS)
        if unknown:
            raise ValueError(
                f"recipe {self.name!r}: adapter has {', '.join(unknown)}; it takes the fields of FlareConfig except "
                "revision, which belongs under model"
            )

    def _refuse_code(self) -> None:
        """Raise ValueError for an option that would run code from a model's folder or from the hub."""
        for key in ("model", "tokenizer", "adapter"):
            for name in sorted(_RUNS_CODE & set(getattr(self, key))):
                raise ValueError(
                    f"recipe {self.name!r}: {key} has {name}: a recipe never runs code that comes with a model. Pass "
                    f"{name} in the call (flare.from_recipe(..., {name}=...)) if you trust it"
                )
        if "/" in str(self.model.get("attn_implementation", "")):
            raise ValueError(
                f"recipe {self.name!r}: attn_implementation={self.model['attn_implementation']!r} is code from the "
                "hub, which a recipe never runs. Pass attn_implementation in the call if you trust this code"
            )

    @classmethod
    def read(cls, recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
        """Read a recipe from its name (see :func:`names`), a YAML file, or a mapping with the keys of such a file.

        A file with the key ``tasks`` has one recipe per task: ``"paper-llama/nusax"``, ``"mine.yaml/nusax"``. A
        ``Recipe`` is returned unchanged.

        Raises:
            TypeError: a key that needs a mapping has another value.
            ValueError: ``recipe`` is neither a known name nor a YAML file, the name of a file with ``tasks`` has no
                ``/TASK``, or a key or value is missing or not accepted.
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
            raise ValueError(f"recipe {name!r}: {path} does not hold a mapping of keys to values")
        return cls._of(name, content, variant)

    @classmethod
    def _of(cls, name: str, content: dict[str, Any], variant: str | None) -> Recipe:
        variants = content.pop("tasks", None) or {}
        if not isinstance(variants, dict) or not all(isinstance(keys, dict) for keys in variants.values()):
            raise ValueError(
                f"recipe {name!r}: tasks must map names to mappings of recipe keys, got {str(variants)[:60]}"
            )
        if variant is None and variants:
            recipes = ", ".join(f"{name}/{task}" for task in variants)
            raise ValueError(f"recipe {name!r} has one recipe for each task: {recipes}")
        if variant is not None and variant not in variants:
            raise ValueError(f"recipe {name!r}: no task {variant!r}; it has: {', '.join(variants) or 'none'}")
        task: dict[str, Any] = variants[variant] if variant is not None else {}
        content = {
            key: {**content[key], **task[key]} if key in content and isinstance(task.get(key), dict) else value
            for key, value in {**content, **task}.items()
        }
        known = {f.name for f in fields(cls)} - {"name"}
        unknown = sorted(set(content) - known)
        if unknown:
            raise ValueError(
                f"recipe {name!r}: {', '.join(unknown)}: not a key of a recipe; keys: {', '.join(sorted(known))}"
            )
        if "task" not in content:
            raise ValueError(f"recipe {name!r}: task is missing; one of: {', '.join(TASKS)}")
        return cls(name=name, **content)

    # --- models, collators, arguments ---------------------------------------------------------------------------------

    def load(
        self,
        base: str | os.PathLike[str] | None = None,
        *,
        trained: str | os.PathLike[str] | None = None,
        **changes: Any,
    ) -> tuple[peft.PeftModel, Any]:
        """Load the base model with adapters to train, and its tokenizer; see :func:`from_recipe`."""
        recipe, adapter, options = self._changed(changes)
        base = os.fspath(base) if base is not None else recipe.base
        if base is None:
            raise ValueError(f"recipe {recipe.name!r} has no base model: pass its name or folder as base")
        tokenizer = recipe.tokenizer_of(base, **options)
        model = recipe.base_model(base, tokenizer, **options)
        if trained is None:
            return fast_lora(model, **{**recipe.adapter, **adapter}), tokenizer
        if adapter:
            raise ValueError(
                f"{', '.join(sorted(adapter))}: fixed by the trained adapter {os.fspath(trained)!r}; leave them out"
            )
        return peft.PeftModel.from_pretrained(model, os.fspath(trained), is_trainable=True), tokenizer

    def tokenizer_of(self, base: str | os.PathLike[str], **changes: Any) -> Any:
        """Load the base's tokenizer, and set its pad token if it has none.

        Args:
            base: name or folder of the base model.
            **changes: arguments of the base's from_pretrained. Of these, revision, trust_remote_code, token and
                cache_dir are passed to the tokenizer's from_pretrained.
        """
        names = ("revision", "trust_remote_code", "token", "cache_dir")
        shared = {name: changes[name] for name in names if name in changes}
        options: dict[str, Any] = {"trust_remote_code": False, **shared, **self.tokenizer}
        tokenizer = transformers.AutoTokenizer.from_pretrained(os.fspath(base), **options)
        if tokenizer.pad_token is None:
            # padding is masked by its position and not by its token, so real end tokens still count
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def base_model(
        self, base: str | os.PathLike[str], tokenizer: Any, missing_keys: list[str] | None = None, **options: Any
    ) -> Any:
        """Load the base model without adapters, quantised and prepared for training as the recipe says.

        Args:
            base: name or folder of the base model.
            tokenizer: the base's tokenizer. A model without a pad token gets the tokenizer's pad token.
            missing_keys: list that receives the names of the weights that the checkpoint lacks. These weights are
                initialised at random.
            **options: further arguments of the base's from_pretrained.

        Raises:
            ImportError: the recipe quantises, and bitsandbytes is not installed.
        """
        if missing_keys is None:
            model = self._base_model(os.fspath(base), options)
        else:
            model, info = self._base_model(os.fspath(base), {**options, "output_loading_info": True})
            missing_keys += sorted(info["missing_keys"])
        model = self._prepared(model)
        set_pad_token(model, tokenizer)
        return model

    def collator(self, tokenizer: Any, **changes: Any) -> FlareDataCollator:
        """Return a FlareDataCollator with the recipe's ``batches`` and ``changes``, in the layout of its task."""
        return FlareDataCollator(tokenizer, **{"layout": TASKS[self.task][1], **self.batches, **changes})

    def training_arguments(self, output_dir: str | os.PathLike[str], **changes: Any) -> transformers.TrainingArguments:
        """Return the recipe's TrainingArguments (encoder-decoders: Seq2SeqTrainingArguments) with ``changes``."""
        seq2seq = self.task == "SEQ_2_SEQ_LM"
        kind = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
        return kind(output_dir=os.fspath(output_dir), **{**self.training, **changes})

    def _changed(self, changes: dict[str, Any]) -> tuple[Recipe, dict[str, Any], dict[str, Any]]:
        """Return three parts: the recipe with its changed keys, changed fields of FlareConfig, and other changes.

        The other changes are arguments of the base's from_pretrained.
        """
        keys = {f.name for f in fields(self)} - {"name"}
        adapter = {key: value for key, value in changes.items() if key in _ADAPTER_FIELDS}
        options = {key: value for key, value in changes.items() if key not in keys and key not in _ADAPTER_FIELDS}
        merged: dict[str, Any] = {
            key: {**getattr(self, key), **value}
            if isinstance(value, dict) and isinstance(getattr(self, key), dict)
            else value
            for key, value in changes.items()
            if key in keys
        }
        return replace(self, **merged), adapter, options

    def _base_model(self, base: str, changes: dict[str, Any]) -> Any:
        options: dict[str, Any] = {"dtype": self.dtype, "trust_remote_code": False, **self.model, **changes}
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
            refused = [name for name in changes if name in str(error)]
            if not refused:
                raise
            raise TypeError(
                f"{', '.join(refused)}: not a key of a recipe, not a field of FlareConfig, and not accepted by the "
                f"base model's from_pretrained ({error})"
            ) from error

    def _prepared(self, model: Any) -> Any:
        """Enable gradient checkpointing if the recipe has it enabled.

        For a quantised base, PEFT also freezes all weights, and casts the half-precision weights that are not quantised
        (such as norms and embeddings) to float32.
        """
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
    """Load a recipe's base model, quantised and prepared, with fusing adapters to train, and its tokenizer.

        model, tokenizer = flare.from_recipe("qlora", "meta-llama/Llama-3.1-8B", r=16)
        model, tokenizer = flare.from_recipe("paper-xlmr/nusax")  # the recipe names its base
        model, tokenizer = flare.from_recipe("mine.yaml", trained="out/adapter")  # continue from a saved adapter

    Args:
        recipe: a name (see ``flare.recipes.names()``), a YAML file, or a mapping with the keys of such a file.
        base: name or folder of the base model. Default: the recipe's ``base``.
        trained: folder of a saved adapter to load in place of a new one.
        **changes: keys of the recipe (``quantization=None``, ``gradient_checkpointing="reentrant"``), fields of
            FlareConfig (``r=8``, ``fusion="mul"``), and further arguments of the base's ``from_pretrained``
            (``num_labels=3``, ``device_map=...``).

    Returns:
        (model, tokenizer): a ``peft.PeftModel`` to train, and a tokenizer with a pad token.

    Raises:
        ValueError, TypeError: a recipe, key or value is not accepted; the message names it and what is accepted.
        ImportError: the recipe quantises, and bitsandbytes is not installed.
    """
    return Recipe.read(recipe).load(base, trained=trained, **changes)


def set_pad_token(model: Any, tokenizer: Any) -> None:
    """Set the tokenizer's pad token in the config of a model without one. Multimodal models have it in a sub-config."""
    config = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def names() -> list[str]:
    """Return the names of the recipes in this package."""
    recipes = []
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        variants = yaml.load(path.read_text(encoding="utf-8"), YamlLoader).get("tasks", {})
        recipes += [f"{path.stem}/{task}" for task in variants] or [path.stem]
    return recipes


def _find(name: str) -> tuple[Path, str | None]:
    """Return a recipe's file, and the task that the name selects in the file, or None.

    Raises:
        ValueError: the name is neither a file nor a recipe of this package.
    """
    here = Path(__file__).parent
    stem, _, variant = name.rpartition("/")
    for path, task in ((Path(name), None), (Path(stem), variant) if stem else (Path(name), None)):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path, task
    for known, task in ((name, None), (stem, variant)):
        path = here / f"{known}.yaml"
        if known and "/" not in known and path.is_file():
            return path, task
    raise ValueError(f"recipe {name!r} is neither a file nor one of: {', '.join(names())}")


def _this_process_device() -> str | int:
    """Return the device for this process's copy of a quantised model."""
    return int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
