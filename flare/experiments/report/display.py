"""Return display names for tables and figures. Files and CSV columns keep the user's own names."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ..tasks.languages import language
from ..utils.errors import UserError

METRIC_NAMES = {
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "f1": "F1",
    "entity_f1": "entity F1",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
_TASKS = {
    "nusax": "NusaX",
    "xnli": "XNLI",
    "tydiqa": "TyDiQA",
    "tydiqagoldp": "TyDiQA-GoldP",
    "sib200": "SIB-200",
    "masakhanews": "MasakhaNEWS",
    "masakhaner": "MasakhaNER",
    "masakhaner2": "MasakhaNER 2",
    "afrixnli": "AfriXNLI",
    "belebele": "Belebele",
    "xcopa": "XCOPA",
    "wikiann": "WikiANN",
    "qa": "question answering",
}
#: Pattern of a model's name -> display name. {1} and {2} stand for the last group of the pattern.
_MODELS = (
    (r"xlm-?r(oberta)?-(.*)", "XLM-R {2}"),
    (r"afro-?xlmr-(.*)", "AfroXLM-R {1}"),
    (r"(meta-)?llama-(.*)", "Llama {2}"),
    (r"(google-)?gemma-(.*)", "Gemma {2}"),
    (r"qwen-?(.*)", "Qwen {1}"),
    (r"mt5-(.*)", "mT5-{1}"),
    (r"nllb-200-(distilled-)?([0-9.]+[mb])", "NLLB {2}"),
)
#: Words in a model's name -> display form.
_WORDS = {
    "base": "Base",
    "large": "Large",
    "small": "Small",
    "xl": "XL",
    "xxl": "XXL",
    "it": "IT",
    "instruct": "Instruct",
}


def task_name(name: str) -> str:
    """Return the display name of a task, such as "NusaX" for nusax; an unknown name is unchanged."""
    return _TASKS.get(re.sub(r"[^a-z0-9]", "", name.lower()), name)


@functools.cache
def language_name(name: str) -> str:
    """Return the display name of a language, such as "Acehnese" for acehnese, ace or ace_Latn.

    An unknown name is capitalised if it has four or more letters, all lower-case, and is unchanged otherwise.
    """
    try:
        return language(name).name
    except UserError:
        return name[:1].upper() + name[1:] if re.fullmatch(r"[a-z]{4,}", name) else name


def language_names(names: Iterable[str]) -> dict[str, str]:
    """Return {name: display name}. Names that would have the same display name are unchanged."""
    return _unique(names, language_name)


def model_name(name: str) -> str:
    """Return the display name of a model, such as "XLM-R Large" for FacebookAI/xlm-roberta-large.

    An unknown model, such as a folder, is shown by the last part of its name, or by the part before it if the last part
    is "model" or "checkpoint".
    """
    path = Path(name.rstrip("/"))
    short = path.parent.name if path.name in ("model", "checkpoint") and path.parent.name else path.name
    for pattern, shown in _MODELS:
        if match := re.fullmatch(pattern, short, re.IGNORECASE):
            parts = [
                _WORDS.get(word.lower(), word.upper() if re.fullmatch(r"[0-9.]+[mb]", word) else word)
                for word in re.split(r"[-_]", match.groups()[-1] or "")
            ]
            return shown.replace("{1}", " ".join(parts)).replace("{2}", " ".join(parts)).strip()
    return short


def model_names(names: Iterable[str]) -> dict[str, str]:
    """Return {model: display name}. Models that would have the same display name are unchanged."""
    return _unique(names, model_name)


def metric_name(metric: str) -> str:
    """Return the display name of a metric, such as "macro F1" for macro_f1."""
    return METRIC_NAMES.get(metric, metric)


def axis_name(metric: str) -> str:
    """Return the axis label of a metric, such as "Macro F1 (%)"."""
    name = metric_name(metric)
    return f"{name[:1].upper()}{name[1:]} (%)"


def _unique(names: Iterable[str], show: Callable[[str], str]) -> dict[str, str]:
    shown = {name: show(name) for name in names}
    return {name: one if list(shown.values()).count(one) == 1 else name for name, one in shown.items()}
