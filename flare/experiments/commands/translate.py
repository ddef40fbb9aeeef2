"""`flare translate`: translate a task's data by machine."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..tasks.registry import OWN, TASKS
from ..utils.errors import UserError
from ..utils.processes import is_main
from ..utils.progress import print_line
from .arguments import add_option

_INTERRUPTED = """\
Translations made so far are kept in the output folder. Resume with the same command:
  {command}"""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `flare`."""
    parser = commands.add_parser(
        "translate",
        help="translate a task's data",
        description="Translate the train and valid splits into the target languages, and the test split into the\n"
        "source language, with NLLB or another encoder-decoder model. An interrupted command resumes if\n"
        "it is repeated. See docs/translation.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        epilog="example:\n  flare translate --task nusax --data DATA --source english --target acehnese javanese \\\n"
        "      --model facebook/nllb-200-distilled-600M --output translations",
    )
    parser.set_defaults(command=run, after_interrupt=_INTERRUPTED)
    data = parser.add_argument_group("data")
    add_option(data, "--task", f"{', '.join(TASKS)} ({', '.join(OWN)} are for your own data)", metavar="TASK")
    add_option(
        data, "--data", "folder with one sub-folder per language, or hub id (default: the task's)", metavar="DATA"
    )
    add_option(data, "--source", "source language, such as english", metavar="LANGUAGE")
    add_option(data, "--target", "target languages", metavar="LANGUAGE", nargs="+")
    add_option(data, "--splits", "splits to translate: train, valid, test (default: all)", metavar="SPLIT", nargs="+")
    add_option(
        data,
        "--direction",
        "auto (default): train and valid into the target language, test into the source language; to-target or "
        "to-source: all splits into that language",
        metavar="WHICH",
    )
    add_option(data, "--text-columns", "text columns of your own data", metavar="COLUMN", nargs="+")
    add_option(data, "--choice-columns", "columns of the choices (multiple-choice)", metavar="COLUMN", nargs="+")
    add_option(data, "--label-column", "label column of your own data", metavar="COLUMN")
    add_option(data, "--id-column", "id columns (default: the task's, or id)", metavar="COLUMN", nargs="+")
    add_option(data, "--labels", "names of the labels, if the rows hold indices", metavar="LABEL", nargs="+")
    add_option(data, "--limit", "translate the first N rows of every split", int, "N")
    add_option(
        data,
        "--lost-marks",
        "what to do with QA rows whose answer cannot be found after translation: drop, keep, or auto (default: keep "
        "them in the test split, drop them in the other splits)",
        metavar="WHAT",
    )

    model = parser.add_argument_group("model")
    add_option(
        model, "--model", "hub id or folder of an encoder-decoder (NLLB, M2M100, mBART, Marian, T5)", metavar="MODEL"
    )
    add_option(model, "--revision", "branch, tag or commit on the hub", metavar="NAME")
    add_option(
        model,
        "--source-code",
        "the model's tag of the source language (default: the tag of NLLB, such as eng_Latn)",
        metavar="TAG",
    )
    add_option(
        model, "--target-code", "the model's tags of the target languages, one per language", metavar="TAG", nargs="+"
    )
    add_option(
        model,
        "--prefix",
        "text before every input, with {source} and {target}, for models without language tags (T5)",
        metavar="TEXT",
    )
    add_option(model, "--beams", "beams of the beam search (default: 1, greedy decoding)", int, "N")
    add_option(model, "--max-length", "tokens per piece of text (default: the model's limit, at most 512)", int, "N")
    add_option(model, "--max-new-tokens", "tokens per translated piece (default: --max-length)", int, "N")
    add_option(model, "--batch-tokens", "tokens per batch, padding included (default: 2048)", int, "N")
    add_option(model, "--batch-size", "maximum rows per batch (default: no limit)", int, "N")
    add_option(
        model, "--dtype", "float32, float16, bfloat16 (default: bfloat16 on a GPU that supports it, else float32)"
    )
    add_option(model, "--device", "cuda, cuda:1, cpu (default: the GPU if there is one)")

    run_options = parser.add_argument_group("run")
    add_option(run_options, "--output", "folder of the translations (default: translations)", Path, "DIR")
    add_option(run_options, "--config", "YAML file with these options; flags override it", Path, "FILE")
    add_option(run_options, "--threads", "CPU threads (default: PyTorch's choice)", int, "N")
    run_options.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")


def run(config: Path | None = None, **options: Any) -> None:
    """Run `flare translate` with the options of the YAML file `config` and the flags, which override the file."""
    from ..translation import TranslateSettings, run_translate

    if config is not None:
        options = {**_read_config(config, TranslateSettings), **options}
    missing = [
        f"--{item.name}" for item in fields(TranslateSettings) if item.default is MISSING and item.name not in options
    ]
    if missing:
        raise UserError(f"{', '.join(missing)} must be given, as flags or in a --config file")
    settings = TranslateSettings(**options)
    if not settings.progress or not is_main():
        from transformers.utils import logging

        logging.disable_progress_bar()  # the bar that transformers shows while it loads weights
    run_translate(settings, print_fn=print_line)


def _read_config(path: Path, settings: type) -> dict[str, Any]:
    """Return name -> value of the options in a YAML file. The file may write a name with dashes or underscores.

    Raises:
        UserError: the file cannot be read or is not a mapping, an option is unknown, or a value has a wrong type.
    """
    import yaml

    from ...recipes.yaml_loader import YamlLoader

    try:
        content = yaml.load(path.expanduser().read_text(encoding="utf-8"), YamlLoader)
    except (OSError, ValueError, RuntimeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold options and their values, such as 'task: nusax'")
    known = {item.name: str(item.type) for item in fields(settings)}
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"--config {path}: {key!r} is not an option; the options are {', '.join(known)}")
        kind = known[name]
        if kind.startswith("Sequence") and isinstance(value, (str, int)):
            value = [str(value)]
        accepted: tuple[type, ...] = (str,)
        for begin, types in (("int", (int,)), ("bool", (bool,)), ("Sequence", (list,))):
            if kind.startswith(begin):
                accepted = types
        optional = kind.endswith("None") and value is None
        if not optional and (not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted)):
            raise UserError(f"--config {path}: {key} must be {kind}; got {value!r}")
        options[name] = Path(value) if kind == "Path" else value
    return options
