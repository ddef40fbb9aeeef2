"""The model card of a saved adapter. It replaces PEFT's empty template, and never a card that a user wrote."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flare_kernels import __version__

CARD_FILE = "README.md"
_LOADING = "## Loading this adapter"
_VERSIONS = "### Framework versions"
#: Last line of a card that this module wrote: the adapter's name, and a digest of the text above this line.
_MARK = re.compile(r"<!-- flare: (.*) ([0-9a-f]{16}); an edited card is not written again -->\n?$")
#: PEFT's task type -> transformers' Auto class, and further arguments of its from_pretrained.
_AUTO = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", ", num_labels=..."),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", ""),
    "TOKEN_CLS": ("AutoModelForTokenClassification", ", num_labels=..."),
    "CAUSAL_LM": ("AutoModelForCausalLM", ""),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", ""),
}
_PHI = {
    "add_relu": "relu(S) + relu(T)",
    "add": "S + T",
    "mul": "S * T",
    "mul_relu": "relu(S) * relu(T)",
    "cross_attention": "attention with queries from S, keys and values from T",
}
_OFFSETS = {
    1: "block i fuses with the source's output of block i, as in the paper",
    0: "block i fuses with the source's input of block i, as in the authors' release",
}


def fill_card(folder: Path, config: Any, facts: Sequence[tuple[str, str]] = (), languages: Sequence[str] = ()) -> None:
    """Fill in the model card of a saved adapter.

    Replace PEFT's empty template, or a card that this function wrote and nobody has edited since. If another card has
    ``library_name: peft`` in its front matter, add a section on loading the adapter, once. Leave any other card
    unchanged, and do not create a missing one.

    Args:
        folder: the folder that ``save_pretrained`` wrote. The card is in it or, for a named adapter, in its parent.
        config: the adapter's FlareConfig.
        facts: additional rows of the table, as (name, value).
        languages: ISO codes for the front matter.
    """
    for path, name in ((folder / CARD_FILE, "default"), (folder.parent / CARD_FILE, folder.name)):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        front = re.match(r"---\n(.*?)\n---[^\S\n]*(\n|$)", text, re.DOTALL)
        if front is None or not re.search(r"^library_name:\s*['\"]?peft['\"]?\s*$", front[1], re.MULTILINE):
            continue
        body = text[front.end() :]
        mark = _MARK.search(body)
        ours = mark is not None and (mark[1], mark[2]) == (name, _digest(body[: mark.start()]))
        if ours or _is_template(body):
            _write(path, name, config, facts, languages)
        elif _LOADING not in text:
            extended = f"{text.rstrip()}\n\n{_LOADING}\n\n{config.card}"
            path.write_text(extended, encoding="utf-8", errors="surrogateescape")
        return


def _write(path: Path, name: str, config: Any, facts: Sequence[tuple[str, str]], languages: Sequence[str]) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(path)
    card.data["tags"] = sorted({*(card.data.tags or []), "flare"})
    if languages:
        card.data["language"] = list(languages)
    body = _body(config, facts)
    card.text = f"\n{body}\n<!-- flare: {name} {_digest(body)}; an edited card is not written again -->\n"
    card.save(path)


def _body(config: Any, facts: Sequence[tuple[str, str]]) -> str:
    base = config.base_model_name_or_path or "BASE"
    reads_source = config.fusion is not None or "source" in config.card
    rows = [("base model", f"`{base}`"), *facts, *_details(config)]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    task_type = str(config.task_type and getattr(config.task_type, "value", config.task_type))
    auto_class, arguments = _AUTO.get(task_type, ("AutoModel", ""))
    source = ""
    if config.latent_dim is not None:
        source = ", source_states=..., source_attention_mask=..."
    elif reads_source:
        source = ", source_input_ids=..., source_attention_mask=..."
    versions = [f"- PEFT {importlib.metadata.version('peft')}", f"- flare-kernels {__version__}"]
    versions += [f"- {package} {importlib.metadata.version(package)}" for package in ("transformers", "torch")]
    return "\n".join(
        [
            f"# {'Two-language adapter' if reads_source else 'Adapter'} for {base}\n",
            config.card,
            f"| | |\n|---|---|\n{table}\n",
            f"{_LOADING}\n",
            "```python",
            "import flare  # registers the adapter's type with PEFT",
            "from peft import PeftModel",
            f"from transformers import {auto_class}\n",
            f'base = {auto_class}.from_pretrained("{base}"{arguments})',
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()',
            f"output = model(input_ids=..., attention_mask=...{source})",
            "```\n",
            'To predict from text: `flare.FlarePipeline("BASE", "THIS_FOLDER")`, or '
            "`flare predict --adapter THIS_FOLDER`.\n",
            f"{_VERSIONS}\n",
            *versions,
            "",
        ]
    )


def _details(config: Any) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if config.fusion is not None:
        rows.append(("fusion", f"`{config.fusion}`" + (f": {_PHI[config.fusion]}" if config.fusion in _PHI else "")))
        if config.latent_dim is None:
            rows.append(
                ("source_layer_offset", f"{config.source_layer_offset}: {_OFFSETS[config.source_layer_offset]}")
            )
            rows.append(("source_padding", f"`{config.source_padding}`"))
        else:
            rows.append(("latent_dim", f"{config.latent_dim}: the width of the MT encoder's states"))
    rows.append(("r, lora_alpha", f"{config.r}, {config.lora_alpha:g}"))
    targets: Any = config.target_modules
    if targets:
        rows.append(("target_modules", f"`{targets}`" if isinstance(targets, str) else ", ".join(sorted(targets))))
    return rows


def _is_template(body: str) -> bool:
    """Return whether a card's text is PEFT's template with nothing filled in."""
    from huggingface_hub import ModelCard, ModelCardData

    return _normalized(body) == _normalized(ModelCard.from_template(ModelCardData()).text)


def _digest(body: str) -> str:
    return hashlib.sha256(_normalized(body).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _normalized(body: str) -> str:
    """Return the text without empty lines, white space at line ends, and PEFT's section of versions."""
    lines = [line.rstrip() for line in body.splitlines() if not line.startswith(("- PEFT ", _VERSIONS))]
    return "\n".join(line for line in lines if line)
