"""The paper's settings for a model and a task (Table 5 of the paper), adapted to what this machine supports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...recipes import TASKS, Recipe
from ..tasks import TASKS as REGISTRY
from ..utils.errors import UserError, library_errors
from ..utils.extra import installed
from ..utils.model_names import find_model
from ..utils.processes import process_count

#: Kinds of model that `flare.experiments.tasks.make_form` accepts.
FAMILIES = ("encoder", "causal", "seq2seq")
_QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
_PAPER_TASKS = ("nusax", "xnli", "tydiqa")
#: Task or kind of task -> the paper's task whose settings it uses. The paper's tasks use their own settings. All other
#: tasks use the settings of NusaX (short texts with a label).
_USES_SETTINGS_OF = {"qa": "tydiqa", "multiple-choice": "xnli", "afrixnli": "xnli"}
# Training arguments of a recipe that the experiment sets itself.
_SET_BY_EXPERIMENT = ("predict_with_generate",)


@dataclass(frozen=True)
class ModelKind:
    """Kind of a model.

    family: one of `FAMILIES`. model_type: transformers' name of the architecture.
    """

    family: str
    model_type: str


def kind_of(model: str, form: str | None = None) -> ModelKind:
    """Return the kind of the model in a folder or under a hub id; `form` overrides the family.

    Raises:
        UserError: the model's configuration cannot be read, or its family is not one of `FAMILIES`.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as names

    model = find_model(model, "model")
    with library_errors(f"model {model}: its configuration cannot be read"):
        # explicitly False: by default transformers asks at the terminal whether to run the folder's code
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    kind = config.model_type
    if form is not None:
        return ModelKind(form, kind)
    if getattr(config, "is_encoder_decoder", False):
        return ModelKind("seq2seq", kind)
    if kind in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return ModelKind("encoder", kind)
    if kind in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return ModelKind("causal", kind)
    raise UserError(
        f"model {model}: {kind!r} is not known as an encoder, decoder or encoder-decoder; name its kind with --form"
    )


def paper_recipe(kind: ModelKind, task: str) -> Recipe:
    """Return the paper's recipe for a kind of model and a task.

    The recipe names no base model, no model options, and no training arguments that the experiment sets itself.
    """
    file = "paper-xlmr" if kind.family == "encoder" else "paper-mt5"
    if kind.family == "causal" or (kind.family == "encoder" and kind.model_type in _decoders()):
        file = "paper-gemma2" if kind.model_type.startswith("gemma") else "paper-llama"
    paper_task = (
        task
        if task in _PAPER_TASKS
        else _USES_SETTINGS_OF.get(task, _USES_SETTINGS_OF.get(REGISTRY[task].kind, "nusax"))
    )
    recipe = Recipe.read(f"{file}/{paper_task}")
    training = {name: value for name, value in recipe.training.items() if name not in _SET_BY_EXPERIMENT}
    return replace(recipe, base=None, model={}, training=training)


def adapt_to_machine(recipe: Recipe, quantization: str | None, given: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """Return the recipe with the user's quantization and without what this machine cannot run, and notes for the user.

    Args:
        recipe: the paper's recipe.
        quantization: "none", "nf4" or "int8" from the user; None: the recipe's quantization, if the training runs on a
            CUDA device and bitsandbytes is installed.
        given: name -> value of the TrainingArguments fields that the user set. They are not changed.

    Raises:
        UserError: `quantization` needs bitsandbytes, which is not installed.
    """
    notes: list[str] = []
    use_cpu = bool(given.get("use_cpu"))
    cuda = torch.cuda.is_available() and not use_cpu
    if cuda and process_count() == 1 and torch.cuda.device_count() > 1:
        notes.append(
            f"one of {torch.cuda.device_count()} GPUs is used (CUDA_VISIBLE_DEVICES selects it); to use several, start "
            "the command with accelerate launch"
        )
    bitsandbytes = installed("bitsandbytes")
    training = dict(recipe.training)
    half = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    quantized = recipe.quantization
    if quantization is not None and quantization != "none":
        if not bitsandbytes:
            raise UserError(f"--quantization {quantization} needs bitsandbytes: pip install bitsandbytes")
        compute = {"bnb_4bit_compute_dtype": "bfloat16" if half or not cuda else "float16"}
        quantized = {**_QUANTIZED[quantization], **(compute if quantization == "nf4" else {})}
    elif quantization == "none":
        quantized = None
    elif quantized is not None and not (cuda and bitsandbytes):
        quantized = None
        without_cuda = "--use_cpu is given" if use_cpu else "there is no CUDA device"
        why = "bitsandbytes is not installed" if cuda else without_cuda
        notes.append(
            f"the base is not quantised to 4 bits as in the paper: {why} (--quantization nf4 quantises it nevertheless)"
        )
    if training.get("bf16") and not half and not {"bf16", "fp16"} & set(given):
        training["bf16"] = False
        if cuda:
            training["fp16"] = True
            notes.append("half precision is float16: this GPU has no bfloat16")
        else:
            notes.append("training is in float32: half precision needs a GPU")
    if "bnb" in str(training.get("optim")) and not (cuda and bitsandbytes) and "optim" not in given:
        training["optim"] = "adamw_torch"
        notes.append("the optimizer is 32-bit AdamW: 8-bit AdamW needs a GPU and bitsandbytes")
    dtype = recipe.dtype
    if dtype == "bfloat16" and not half and quantized is None:
        dtype = "float16" if cuda else "float32"
    # the recipe's quantization is replaced as a whole, so that none of its keys remains
    return replace(recipe, quantization=quantized, training=training, dtype=dtype), notes


def with_auto_class(recipe: Recipe, auto_class: str, model_options: Mapping[str, Any]) -> Recipe:
    """Return the recipe with a model class and the arguments of its from_pretrained, such as num_labels."""
    task = next(name for name, (model_class, _) in TASKS.items() if model_class == auto_class)
    return replace(recipe, task=task, model=dict(model_options))


def _decoders() -> set[str]:
    from transformers.models.auto import modeling_auto as names

    return set(names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(names.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
