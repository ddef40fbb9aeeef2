"""`flare translate`: options, and the call."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..tasks.registry import OWN, TASKS
from ..utils.errors import UserError
from ..utils.processes import is_main
from .running import reported, say

_INTERRUPTED = """\
Translations made so far are kept in the output folder. Resume with the same command:
  {command}"""


def add_parser(commands: Any) -> None:
    """Register the command with the parser's sub-commands."""
    parser = commands.add_parser(
        "translate",
        help="translate a task's data: train and valid into the target languages, test into the source language",
        description="Machine translation with NLLB or any other encoder-decoder. A command that was interrupted goes\n"
        "on where it stopped when it is given again. See docs/translation.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  flare translate --task nusax --data DATA --source english --target acehnese javanese \\\n"
        "      --model facebook/nllb-200-distilled-600M --output translations",
    )
    parser.set_defaults(command=run, after_interrupt=_INTERRUPTED)
    # Defaults stand in TranslateSettings only; what is not given is not passed on.
    missing = argparse.SUPPRESS

    def add(group: Any, flag: str, text: str, kind: type = str, metavar: str | None = None, **more: Any) -> None:
        group.add_argument(flag, type=kind, default=missing, metavar=metavar, help=text, **more)

    what = parser.add_argument_group("what is translated")
    add(what, "--task", f"{', '.join(TASKS)} ({', '.join(OWN)} are for your own data)", metavar="TASK")
    add(what, "--data", "folder with one sub-folder per language, or hub id (default: the task's)", metavar="DATA")
    add(what, "--source", "language that is rich in data, such as english", metavar="LANGUAGE")
    add(what, "--target", "one or more languages", metavar="LANGUAGE", nargs="+")
    add(what, "--splits", "of train, valid and test (default: all)", metavar="SPLIT", nargs="+")
    add(
        what,
        "--direction",
        "auto: train and valid to the target, test to the source (default); to-target or to-source: all splits",
        metavar="WHICH",
    )
    add(what, "--text-columns", "columns of the texts in your own data", metavar="COLUMN", nargs="+")
    add(what, "--choice-columns", "columns of a multiple choice's choices", metavar="COLUMN", nargs="+")
    add(what, "--label-column", "column of the label in your own data", metavar="COLUMN")
    add(what, "--id-column", "columns of the id (default: the task's, or id)", metavar="COLUMN", nargs="+")
    add(what, "--labels", "the labels, where your rows hold their indices", metavar="LABEL", nargs="+")
    add(what, "--limit", "translate the first N rows of every split", int, "N")
    add(
        what,
        "--lost-marks",
        "QA rows whose answer is lost: drop or keep (default: auto, keep in test and drop elsewhere)",
        metavar="WHAT",
    )

    model = parser.add_argument_group("model")
    add(model, "--model", "hub id or folder of an encoder-decoder (NLLB, M2M100, mBART, Marian, T5)", metavar="MODEL")
    add(model, "--revision", "branch, tag or commit on the hub", metavar="NAME")
    add(model, "--source-code", "the source's language tag (default: NLLB's, such as eng_Latn)", metavar="TAG")
    add(model, "--target-code", "the targets' language tags, one for each", metavar="TAG", nargs="+")
    add(model, "--prefix", "before every text, with {source} and {target}, for models told by words", metavar="TEXT")
    add(model, "--beams", "beams (default: 1, greedy)", int, "N")
    add(model, "--max-length", "tokens of a piece of text (default: the model's limit, at most 512)", int, "N")
    add(model, "--max-new-tokens", "tokens of a translated piece (default: the same)", int, "N")
    add(model, "--batch-tokens", "rows times longest row of a batch (default: 2048)", int, "N")
    add(model, "--batch-size", "rows of a batch at most (default: no limit)", int, "N")
    add(model, "--dtype", "float32, float16, bfloat16 (default: bfloat16 on a GPU that has it, else float32)")
    add(model, "--device", "cuda, cuda:1, cpu (default: the GPU if there is one)")

    how = parser.add_argument_group("run")
    add(how, "--output", "folder of the translations (default: translations)", Path, "DIR")
    add(how, "--config", "YAML file with these options; those given here win", Path, "FILE")
    add(how, "--threads", "CPU threads (default: PyTorch's choice)", int, "N")
    how.add_argument("--no-progress", dest="progress", action="store_false", default=missing, help="no progress bars")


def run(config: Path | None = None, **options: Any) -> int:
    """Run the command; return the exit status (0 done, 2 something the user can mend)."""
    from ..translation import TranslateSettings, run_translate

    def work() -> None:
        given = {**(_read_config(config, TranslateSettings) if config is not None else {}), **options}
        lacking = [
            f"--{item.name}" for item in fields(TranslateSettings) if item.default is MISSING and item.name not in given
        ]
        if lacking:
            raise UserError(f"{', '.join(lacking)} must be given, here or in a --config file")
        settings = TranslateSettings(**given)
        if not settings.progress or not is_main():
            from transformers.utils import logging

            logging.disable_progress_bar()  # of loading the weights
        run_translate(settings, say=say)

    return reported("translate", work)


def _read_config(path: Path, settings: type) -> dict[str, Any]:
    """Options of a YAML file, under their names on the command line or with underscores.

    Raises:
        UserError: no such file, no mapping, an unknown option, or a value of another type.
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
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"--config {path}: {key!r} is no option; it has {', '.join(known)}")
        kind = known[name]
        if kind.startswith("Sequence") and isinstance(value, (str, int)):
            value = [str(value)]
        wanted: tuple[type, ...] = (str,)
        for begin, types in (("int", (int,)), ("bool", (bool,)), ("Sequence", (list,))):
            if kind.startswith(begin):
                wanted = types
        optional = kind.endswith("None") and value is None
        if not optional and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
            raise UserError(f"--config {path}: {key} must be {kind}; got {value!r}")
        found[name] = Path(value) if kind == "Path" else value
    return found
