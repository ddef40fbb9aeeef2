"""Read settings from flags and from a YAML file. One dataclass defines the flags and the keys of the file.

A settings class is a dataclass whose fields are created by :func:`option`. The field's name is the YAML key and, with
dashes, the flag. The command line overrides the file. A name that is not an option must be a field of
transformers.TrainingArguments. Any other name is an error, whose message suggests the closest options.
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
from .errors import UserError
from .names import checked_text

#: Short name of an option -> the field of TrainingArguments that it sets.
SHORT = {"epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size", "lr": "learning_rate"}
#: Field of TrainingArguments that users cannot set -> what to use instead, or why.
REFUSED = {
    "output_dir": "use --output",
    "seed": "use --seeds",
    "data_seed": "use --seeds",
    "do_train": "the command decides what is done",
    "do_eval": "checkpoints are evaluated if the data have a valid split",
    "do_predict": "use flare evaluate",
    "resume_from_checkpoint": "an unfinished run is resumed automatically (--no-resume restarts it)",
    "metric_for_best_model": "use --metric",
    "greater_is_better": "for every metric, greater is better",
    "load_best_model_at_end": "the best checkpoint is selected if the data have a valid split",
    "remove_unused_columns": "the source columns are needed",
    "disable_tqdm": "use --no-progress",
    "label_names": "the task defines its labels",
    "save_only_model": "the run could then not be resumed",
    "push_to_hub": "push the finished adapter folder yourself",
    "generation_config": "answers are generated greedily",
    "predict_with_generate": "decoders are always scored by generation",
    "use_legacy_prediction_loop": "the command evaluates in its own way",
}

_UNITS = {
    f"{letter}{kind}": base ** (power + 1)
    for kind, base in (("iB", 1024), ("B", 1000))
    for power, letter in enumerate("KMGT")
}
_NUMBERS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float}


def option(
    kind: str,
    help: str,
    default: Any = None,
    choices: Sequence[str] | None = None,
    metavar: str = "",
    group: str = "",
) -> Any:
    """Return a field of a settings class.

    kind: "str", "int", "float", "path", "bool", "map" (KEY=VALUE ...), or a plural ("strs", "ints") for several values.
    group: heading in the help text for this option and the options after it. "": the heading of the option before.
    """
    shown = {"kind": kind, "help": help, "choices": choices, "metavar": metavar, "group": group}
    return field(default_factory=dict, metadata=shown) if kind == "map" else field(default=default, metadata=shown)


def flag(name: str) -> str:
    """Return an option's flag, such as --source-text for source_text."""
    return "--" + name.replace("_", "-")


def parse_bytes(text: str | None, where: str) -> int | None:
    """Return the number of bytes that a text such as "8GiB", "500MB" or "1000000" means; None for None.

    Raises:
        UserError: the text is not a number with an optional unit, or it means 0 bytes.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9.]*[0-9])\s*([A-Za-z]*)", text.strip())
    units = {"": 1, **{name.casefold(): size for name, size in _UNITS.items()}}
    number = float(match[1]) if match and match[1].count(".") < 2 else 0.0
    if not number or not match or match[2].casefold() not in units:
        raise UserError(
            f"{where} {text!r} must be a number of bytes, such as 8GiB or 500MB (units: {', '.join(_UNITS)})"
        )
    return int(number * units[match[2].casefold()])


def add_options(parser: argparse.ArgumentParser, kind: type[Any], training: bool) -> None:
    """Add the options of a settings class to a parser. Options that the user omits are missing in the parsed result."""
    group = None
    for one in fields(kind):
        if "kind" not in one.metadata:
            continue
        if one.metadata["group"] or group is None:
            group = parser.add_argument_group(one.metadata["group"] or "options")
        type_name, shown = one.metadata["kind"], one.metadata
        more: dict[str, Any] = {"help": shown["help"], "default": argparse.SUPPRESS, "dest": one.name}
        if type_name == "bool":
            # BooleanOptionalAction would read --no-source as source=False
            action = "store_true" if one.name.startswith("no_") else argparse.BooleanOptionalAction
            group.add_argument(flag(one.name), action=action, **more)
            continue
        if type_name in ("strs", "ints", "map"):
            more["nargs"] = "+"
        metavar = shown["metavar"] or {"int": "N", "ints": "N", "float": "X", "map": "KEY=VALUE", "path": "DIR"}.get(
            type_name, one.name.upper()
        )
        if shown["choices"] is None:
            more["metavar"] = metavar
        else:
            more["choices"] = list(shown["choices"])
        group.add_argument(flag(one.name), type=_NUMBERS.get(type_name.removesuffix("s"), str), **more)
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with these options; flags override it"
    )
    if training:
        train = parser.add_argument_group(
            "training", "and every flag of transformers.TrainingArguments, such as --warmup_steps 0.1 or --weight-decay"
        )
        for short, name in SHORT.items():
            number = int if short == "batch_size" else float
            text = f"{name}, the total over all processes" if short == "batch_size" else name
            train.add_argument(flag(short), type=number, default=argparse.SUPPRESS, metavar="N", help=text)


def read_settings(
    kind: type[Any], given: Mapping[str, Any], rest: Sequence[str] = (), shared: Collection[str] = ()
) -> Any:
    """Return a settings object from parsed flags, the YAML file they name, and flags of TrainingArguments.

    Args:
        kind: a class with :func:`option` fields; it accepts TrainingArguments if it has a field ``training``.
        given: options parsed by :func:`add_options`.
        rest: remaining words of the command line: flags of TrainingArguments with their values.
        shared: names of the options of all commands. The file may hold options for other commands, which are skipped.

    Raises:
        UserError: a name is unknown, a value has the wrong type, or the file cannot be read.
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
    required = {one.name for one in fields(kind) if one.default is not None and one.name in known}
    for name, value in from_file.items():
        if value is None and name in required and known[name]["kind"] != "map":
            raise UserError(f"{named}{name} is empty; give a value, or remove the line to use the default")
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
        raise UserError(f"--config {file} must map names to values, such as 'task: nusax'")
    return content


def _convert(value: Any, shown: Mapping[str, Any], where: str) -> Any:
    """Return a value converted to its option's type. A single value is accepted for an option with several values."""
    kind = shown["kind"]
    if value is None:
        return {} if kind == "map" else None
    if kind == "map":
        return _mapping(value, where)
    if kind in ("strs", "ints"):
        many = value if isinstance(value, list | tuple) else [value]
        if not many:
            raise UserError(f"{where} is empty; give one or more values")
        values = tuple(_convert(one, {**shown, "kind": kind.removesuffix("s")}, where) for one in many)
        if len(set(values)) < len(values):
            raise UserError(f"{where} has a value twice: {', '.join(map(str, values))}; give each value once")
        return values
    if kind == "bool":
        if not isinstance(value, bool):
            raise UserError(f"{where} must be true or false; got {value!r}")
        return value
    if isinstance(value, bool) and "off" in (shown["choices"] or ()):
        value = "on" if value else "off"  # YAML reads on and off as true and false
    if isinstance(value, list | tuple | dict | bool):
        raise UserError(f"{where} takes one value; got {value!r}")
    if kind in _NUMBERS:
        try:
            number = _NUMBERS[kind](value)
        except (ValueError, OverflowError):
            number = None
        if number is None or float(number) != float(value):
            raise UserError(f"{where} must be {'a whole number' if kind == 'int' else 'a number'}; got {value!r}")
        return number
    if shown["choices"] is not None and str(value) not in shown["choices"]:
        raise UserError(f"{where} must be one of {', '.join(shown['choices'])}; got {value!r}")
    text = checked_text(str(value), where)
    try:
        return Path(text).expanduser() if kind == "path" else text
    except RuntimeError as error:  # "~somebody" without a known home
        raise UserError(f"{where} {text}: {error}; give the full path") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return dict(value)
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} takes names and values (NAME: VALUE); got {value!r}")
    mapping = {}
    for item in value:
        name, equals, text = str(item).partition("=")
        if not equals or not name:
            raise UserError(f"{where} takes KEY=VALUE; got {item!r}")
        try:
            mapping[name.replace("-", "_")] = yaml.load(text, YamlLoader)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{where} {item}: its value is not YAML ({error})") from error
    return mapping


def _parse_training(rest: Sequence[str], trains: bool, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return name -> value of the TrainingArguments flags that the user gave."""
    unknown = next((word for word in rest if word.startswith("-")), rest[0])
    if not trains:
        raise UserError(f"{unknown} is not known; {_nearest(unknown, [flag(name) for name in known])}")
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise UserError(message)

    parser = Parser(TrainingArguments, add_help=False, allow_abbrev=False)
    names = [one.name for one in fields(TrainingArguments) if one.init]
    not_given = object()  # HfArgumentParser returns argparse.SUPPRESS as a value
    parser.set_defaults(**dict.fromkeys(names, not_given))
    parsed, left = parser.parse_known_args(list(rest))
    if left:
        unknown = next((word for word in left if word.startswith("-")), left[0])
        raise UserError(f"{unknown} is not known; {_nearest(unknown, [flag(name) for name in [*known, *names]])}")
    return {name: value for name, value in vars(parsed).items() if value is not not_given}


def _check_training(
    training: Mapping[str, Any], trains: bool, known: Mapping[str, Any], shown: Callable[[str], str]
) -> None:
    """Raise UserError for a name that is not a field of TrainingArguments or that users cannot set.

    shown: returns a name as messages show it.
    """
    if not trains:
        name = next(iter(training))
        raise UserError(f"{shown(name)} is not known; {_nearest(name, list(known))}")
    names = _training_names()
    for name in training:
        if name in REFUSED:
            raise UserError(f"{shown(name)} cannot be given: {REFUSED[name]}")
        if name not in names:
            raise UserError(f"{shown(name)} is not known; {_nearest(name, [*known, *names])}")


def _training_names() -> set[str]:
    from transformers import TrainingArguments

    return {one.name for one in fields(TrainingArguments) if one.init}


def _nearest(name: str, names: Sequence[str]) -> str:
    accepted = [one for one in names if one.lstrip("-").replace("-", "_") not in REFUSED]
    near = difflib.get_close_matches(name.partition("=")[0], accepted, 3)
    return f"did you mean {' or '.join(near)}?" if near else "--help lists the options"
