"""Settings that come as flags and as YAML: one table of options makes both.

A settings class is a dataclass whose fields are made by :func:`option`; the field's name is the YAML key and, with
dashes, the flag. What is given on the command line wins over the file. Whatever is no option of ours is a field of
transformers.TrainingArguments, or an error that names the nearest ones.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import yaml

from ...recipes.yaml_loader import YamlLoader
from ..utils.errors import UserError
from ..utils.names import checked_text

#: Short forms -> TrainingArguments' fields.
SHORT = {"epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size", "lr": "learning_rate"}
#: TrainingArguments' fields that are ours to set, and what to use instead.
REFUSED = {
    "output_dir": "the folder is --output's",
    "seed": "use --seeds",
    "data_seed": "use --seeds",
    "do_train": "the command says what is done",
    "do_eval": "checkpoints are evaluated where the data have a valid split",
    "do_predict": "flare evaluate does it",
    "resume_from_checkpoint": "an unfinished run goes on by itself (--no-resume starts anew)",
    "metric_for_best_model": "use --metric",
    "greater_is_better": "every metric here is better when it is greater",
    "load_best_model_at_end": "the best checkpoint is chosen wherever the data have a valid split",
    "remove_unused_columns": "both texts are needed",
    "disable_tqdm": "use --no-progress",
    "label_names": "the task knows its labels",
    "save_only_model": "a run could not be resumed",
    "push_to_hub": "push the finished adapter folder by hand",
    "generation_config": "answers are generated greedily",
    "predict_with_generate": "decoders are always scored by generation",
    "use_legacy_prediction_loop": "evaluation is the command's own",
}

_UNITS = {
    f"{letter}{kind}": base ** (power + 1)
    for kind, base in (("iB", 1024), ("B", 1000))
    for power, letter in enumerate("KMGT")
}
_NUMBERS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float}


def option(kind: str, help: str, default: Any = None, choices: Sequence[str] | None = None, metavar: str = "") -> Any:
    """A field of a settings class.

    kind: "str", "int", "float", "path", "bool", "map" (KEY=VALUE ...), or a plural ("strs", "ints") for several values.
    """
    shown = {"kind": kind, "help": help, "choices": choices, "metavar": metavar}
    return field(default_factory=dict, metadata=shown) if kind == "map" else field(default=default, metadata=shown)


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return "--" + name.replace("_", "-")


def parse_bytes(text: str | None, where: str) -> int | None:
    """Bytes of "8GiB", "500MB" or "1000000"; None for None.

    Raises:
        UserError: another spelling, or 0 bytes.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9.]*[0-9])\s*([A-Za-z]*)", text.strip())
    units = {"": 1, **{name.casefold(): size for name, size in _UNITS.items()}}
    number = float(found[1]) if found and found[1].count(".") < 2 else 0.0
    if not number or not found or found[2].casefold() not in units:
        raise UserError(f"{where} {text!r} must be bytes, such as 8GiB or 500MB (units: {', '.join(_UNITS)})")
    return int(number * units[found[2].casefold()])


def add_options(parser: argparse.ArgumentParser, kind: type[Any], training: bool) -> None:
    """Put the options of a settings class into a parser; what is not given does not appear in the result."""
    group = parser.add_argument_group("options")
    for one in fields(kind):
        if "kind" not in one.metadata:
            continue
        wanted, shown = one.metadata["kind"], one.metadata
        more: dict[str, Any] = {"help": shown["help"], "default": argparse.SUPPRESS, "dest": one.name}
        if wanted == "bool":
            # argparse takes every --no-... of its own for false
            action = "store_true" if one.name.startswith("no_") else argparse.BooleanOptionalAction
            group.add_argument(flag(one.name), action=action, **more)
            continue
        if wanted in ("strs", "ints", "map"):
            more["nargs"] = "+"
        metavar = shown["metavar"] or {"int": "N", "ints": "N", "float": "X", "map": "KEY=VALUE", "path": "DIR"}.get(
            wanted, one.name.upper()
        )
        if shown["choices"] is None:
            more["metavar"] = metavar
        else:
            more["choices"] = list(shown["choices"])
        group.add_argument(flag(one.name), type=_NUMBERS.get(wanted.removesuffix("s"), str), **more)
    group.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of these; flags win")
    if training:
        train = parser.add_argument_group(
            "training", "and every flag of transformers.TrainingArguments, such as --warmup_steps 0.1 or --weight-decay"
        )
        for short, name in SHORT.items():
            number = int if short == "batch_size" else float
            said = f"{name}; rows of all processes together" if short == "batch_size" else name
            train.add_argument(flag(short), type=number, default=argparse.SUPPRESS, metavar="N", help=said)


def read_settings(
    kind: type[Any], given: Mapping[str, Any], rest: Sequence[str] = (), shared: Collection[str] = ()
) -> Any:
    """A settings object from parsed flags, the YAML file they name, and flags that are TrainingArguments'.

    Args:
        kind: a class with :func:`option` fields; one with a field ``training`` takes TrainingArguments.
        given: what :func:`add_options` parsed.
        rest: flags that are none of ours, with their values, as they stood on the command line.
        shared: names that a file may hold for other commands; those that are not this one's are skipped.

    Raises:
        UserError: an unknown name, a value of another kind, a file that cannot be read.
    """
    known = {one.name: one.metadata for one in fields(kind) if "kind" in one.metadata}
    trains = any(one.name == "training" for one in fields(kind))
    values = dict(given)
    file = values.pop("config", None)
    from_file = {} if file is None else {name.replace("-", "_"): value for name, value in _read_yaml(file).items()}
    training: dict[str, Any] = {}
    for name in [name for name in from_file if name not in known]:
        value = from_file.pop(name)
        if name not in shared and (trains or not shared or SHORT.get(name, name) not in _training_names()):
            training[SHORT.get(name, name)] = value
    named = f"{file}: " if file else ""
    if training:
        _check_training(training, trains, known, lambda name: f"{named}{name}")
    for name in [name for name in values if name in SHORT and name not in known]:
        training[SHORT[name]] = values.pop(name)
    if rest:
        parsed = _parse_training(rest, trains, known)
        _check_training(parsed, trains, known, flag)
        training.update(parsed)
    merged = {name: _convert(value, known[name], f"{named}{name}") for name, value in from_file.items()}
    for name, value in values.items():
        converted = _convert(value, known[name], flag(name))
        merged[name] = {**merged.get(name, {}), **converted} if known[name]["kind"] == "map" else converted
    if trains:
        merged["training"] = training
    if merged.get("paper"):
        merged = {**kind.PAPER, **merged}
    return kind(**merged)


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        path = Path(checked_text(file, "--config")).expanduser()
        content = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
    except (OSError, ValueError, RuntimeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config {file} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"--config {file} must hold names and values, such as 'task: nusax'")
    return content


def _convert(value: Any, shown: Mapping[str, Any], where: str) -> Any:
    """A value as its option's kind; lists may be given as one value."""
    wanted = shown["kind"]
    if value is None:
        return {} if wanted == "map" else None
    if wanted == "map":
        return _mapping(value, where)
    if wanted in ("strs", "ints"):
        many = value if isinstance(value, list | tuple) else [value]
        if not many:
            raise UserError(f"{where}: one or more values are needed")
        made = tuple(_convert(one, {**shown, "kind": wanted.removesuffix("s")}, where) for one in many)
        if len(set(made)) < len(made):
            raise UserError(f"{where}: a value stands there twice: {', '.join(map(str, made))}")
        return made
    if wanted == "bool":
        if not isinstance(value, bool):
            raise UserError(f"{where} must be true or false; got {value!r}")
        return value
    if isinstance(value, bool) and "off" in (shown["choices"] or ()):
        value = "on" if value else "off"  # YAML reads on and off as true and false
    if isinstance(value, list | tuple | dict | bool):
        raise UserError(f"{where} takes one value; got {value!r}")
    if wanted in _NUMBERS:
        try:
            number = _NUMBERS[wanted](value)
        except (ValueError, OverflowError):
            number = None
        if number is None or float(number) != float(value):
            raise UserError(f"{where} must be {'a whole number' if wanted == 'int' else 'a number'}; got {value!r}")
        return number
    if shown["choices"] is not None and str(value) not in shown["choices"]:
        raise UserError(f"{where} must be one of {', '.join(shown['choices'])}; got {value!r}")
    text = checked_text(str(value), where)
    try:
        return Path(text).expanduser() if wanted == "path" else text
    except RuntimeError as error:  # "~somebody" whose home is not known
        raise UserError(f"{where} {text}: {error}; write the whole path") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return dict(value)
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} takes names and values (NAME: VALUE); got {value!r}")
    made = {}
    for item in value:
        name, equals, text = str(item).partition("=")
        if not equals or not name:
            raise UserError(f"{where} takes KEY=VALUE; got {item!r}")
        try:
            made[name.replace("-", "_")] = yaml.load(text, YamlLoader)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{where} {item}: its value is not YAML ({error})") from error
    return made


def _parse_training(rest: Sequence[str], trains: bool, known: Mapping[str, Any]) -> dict[str, Any]:
    """TrainingArguments' flags that were given, converted; defaults are left out."""
    unknown = next((word for word in rest if word.startswith("-")), rest[0])
    if not trains:
        raise UserError(f"{unknown} is not known; {_nearest(unknown, [flag(name) for name in known])}")
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise UserError(message)

    parser = Parser(TrainingArguments, add_help=False, allow_abbrev=False)
    names = [one.name for one in fields(TrainingArguments) if one.init]
    not_given = object()  # argparse.SUPPRESS would come out as a value
    parser.set_defaults(**dict.fromkeys(names, not_given))
    found, left = parser.parse_known_args(list(rest))
    if left:
        unknown = next((word for word in left if word.startswith("-")), left[0])
        raise UserError(f"{unknown} is not known; {_nearest(unknown, [flag(name) for name in [*known, *names]])}")
    return {name: value for name, value in vars(found).items() if value is not not_given}


def _check_training(
    training: Mapping[str, Any], trains: bool, known: Mapping[str, Any], spelt: Callable[[str], str]
) -> None:
    if not trains:
        name = next(iter(training))
        raise UserError(f"{spelt(name)} is not known; {_nearest(name, list(known))}")
    names = _training_names()
    for name in training:
        if name in REFUSED:
            raise UserError(f"{spelt(name)} cannot be given: {REFUSED[name]}")
        if name not in names:
            raise UserError(f"{spelt(name)} is not known; {_nearest(name, [*known, *names])}")


def _training_names() -> set[str]:
    from transformers import TrainingArguments

    return {one.name for one in fields(TrainingArguments) if one.init}


def _nearest(name: str, names: Sequence[str]) -> str:
    accepted = [one for one in names if one.lstrip("-").replace("-", "_") not in REFUSED]
    near = difflib.get_close_matches(name.partition("=")[0], accepted, 3)
    return f"did you mean {' or '.join(near)}?" if near else "--help lists the options"
