"""Define the commands that have a settings class: finetune, translate, check, train, evaluate, predict and
demo."""

from __future__ import annotations

import argparse
import functools
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..demo.demo_settings import DemoSettings
from ..prediction.predict_settings import PredictSettings
from ..runs.run_settings import NAMES, CheckSettings, EvaluateSettings, FinetuneSettings, TrainSettings
from ..translation.translate_settings import TranslateSettings
from ..utils.environment import use_threads
from ..utils.options import add_options, read_settings
from ..utils.processes import is_main
from ..utils.progress import print_line


@dataclass(frozen=True)
class SettingsCommand:
    """A command whose options are the fields of a settings class.

    Attributes:
        name: name of the command.
        help: one line about the command in `flare --help`.
        description: text about the command in its own --help.
        settings: class with :func:`flare.experiments.utils.options.option` fields. If it has a field ``training``, the
            command also takes the flags of transformers.TrainingArguments.
        work: function that runs the command, called with an object of the settings class.
        after_interrupt: message after Ctrl-C, which says what is kept and how to resume. The command line replaces
            ``{command}`` in it.
        epilog: text after the options in its own --help. None: the list of tasks (`task_list`).
        shared: names of options that several commands may read from one --config file. If this command lacks such an
            option, it skips the option.
    """

    name: str
    settings: type[Any]
    work: Callable[[Any], None]
    help: str
    description: str
    after_interrupt: str
    epilog: str | None = None
    shared: Collection[str] = NAMES

    def add_parser(self, commands: Any) -> None:
        """Add the command to the sub-parsers of `flare`."""
        parser = commands.add_parser(
            self.name,
            help=self.help,
            description=self.description,
            epilog=task_list() if self.epilog is None else self.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_options(parser, self.settings, training=any(one.name == "training" for one in fields(self.settings)))
        # cli.main passes as `rest` the flags that the parser does not know: they may belong to TrainingArguments
        parser.set_defaults(command=self._run, rest=[], after_interrupt=self.after_interrupt)

    def _run(self, rest: Sequence[str], **options: Any) -> None:
        settings = read_settings(self.settings, options, rest, self.shared)
        if settings.threads is not None:
            use_threads(settings.threads)
        self.work(settings)


def task_list() -> str:
    """Return a text about the tasks that have a data set on the hub, one paragraph per task."""
    from ..tasks import DATA_SETS, TASKS

    lines = ["tasks with a data set on the hub (columns -> label; the metric that selects checkpoints):"]
    for task in TASKS.values():
        if task.hub_id is None:
            continue
        data = DATA_SETS[task.hub_id]
        others = dict.fromkeys(one.hub_id for one in data.english.values())
        english = "".join(f"; English {', '.join(data.english)} from {one}" for one in others)
        label = "answers" if task.kind == "qa" else task.label_column
        languages = " ".join(data.codes or (f"{data.languages} languages, named by FLORES-200's tags",))
        columns = f"{', '.join(task.text_columns)} -> {label}; {task.metrics[0]}; {', '.join(data.splits)}{english}"
        parallel = "" if data.parallel else "; languages are not translations of each other"
        text = f"{task.hub_id}: {columns}{parallel}; {languages}"
        lines += textwrap.wrap(f"  {task.name:<12} {text}", 110, subsequent_indent=" " * 15, break_on_hyphens=False)
    return "\n".join(lines)


# --- the commands, each of which imports its code when it runs --------------------------------------------------------


def _finetune(settings: FinetuneSettings) -> None:
    from ..runs.finetune import run_finetune

    run_finetune(settings, print_line)


def _translate(settings: TranslateSettings) -> None:
    from ..translation import run_translate

    if not settings.progress or not is_main():
        from transformers.utils import logging

        logging.disable_progress_bar()  # the bar that transformers shows while it loads weights
    run_translate(settings, print_line)


def _demo(settings: DemoSettings) -> None:
    from ..demo import run_demo

    run_demo(settings, print_line)


def _check(settings: CheckSettings) -> None:
    from ..check.run import run_check

    run_check(settings, print_line)


def _train(settings: TrainSettings) -> None:
    from ..runs.train import run_train

    run_train(settings, print_line)


def _evaluate(settings: EvaluateSettings) -> None:
    from ..runs.evaluate import run_evaluate

    run_evaluate(settings, print_line)


def _predict(settings: PredictSettings) -> None:
    from ..prediction.run import run_predict

    # with --output -, only the predictions go to standard output
    messages = functools.partial(print_line, file=sys.stderr) if settings.output == "-" else print_line
    run_predict(settings, messages)


_RUNS_ARE_KEPT = """\
Finished runs are kept. Resume with the same command:
  {command}
It skips finished runs and continues the interrupted run from its last checkpoint. A checkpoint is written after each
epoch, or every --save-steps steps. A run without a checkpoint starts again."""

FINETUNE = SettingsCommand(
    name="finetune",
    settings=FinetuneSettings,
    work=_finetune,
    help="train the base model on the task in the source language",
    description="""\
Train an adapter (or, with --full, all weights) on the task in the source language, and save the merged model in
OUTPUT/base/seed-N, one per seed. Learning rates, epochs, ranks and lengths default to the paper's values; --paper
also sets the paper's other values (5 seeds, fixed length). Finished runs are skipped; unfinished runs resume from
their last checkpoint.""",
    after_interrupt=_RUNS_ARE_KEPT,
)

TRANSLATE = SettingsCommand(
    name="translate",
    settings=TranslateSettings,
    work=_translate,
    help="translate a task's data",
    description="""\
Translate the train and valid splits into the target languages, and the test split into the source language, with
NLLB or another encoder-decoder model. An interrupted command resumes if it is repeated. See docs/translation.md.

example:
  flare translate --task nusax --data DATA --source english --target acehnese javanese \\
      --model facebook/nllb-200-distilled-600M --output translations""",
    after_interrupt="""\
Translations made so far are kept in the output folder. Resume with the same command:
  {command}""",
    shared=(),
)

CHECK = SettingsCommand(
    name="check",
    settings=CheckSettings,
    work=_check,
    help="check data, lengths and vocabulary, and estimate time and memory, before training",
    description="""\
Check the data and estimate the costs before hours of training. Print which texts are paired, how many are cut, the
distribution of the labels, how the tokenizer splits each language, the base's score on the source language, and how
much time and memory each method needs on this machine. It takes the flags of `flare train`. `flare check` writes
only the --json FILE. It also works without a fine-tuned base, if --model names a pretrained model.""",
    after_interrupt="""\
Nothing was written. Start again with the same command:
  {command}""",
)

TRAIN = SettingsCommand(
    name="train",
    settings=TrainSettings,
    work=_train,
    help="train adapters: lora, input-fusion, x-mixup, flare and flare-mt",
    description="""\
Train every method on every target language with every seed, into OUTPUT/<target>/<method>/seed-N, and evaluate the
test split. Learning rates, epochs, ranks and lengths default to the paper's values; --paper also sets the paper's
other values (5 seeds, machine-translated text, fixed length). Finished runs are skipped; unfinished runs resume
from their last checkpoint.""",
    after_interrupt=_RUNS_ARE_KEPT,
)

EVALUATE = SettingsCommand(
    name="evaluate",
    settings=EvaluateSettings,
    work=_evaluate,
    help="score zero-shot, translate-test and the trained adapters on the test split",
    description="""\
zero-shot: score the base on the test texts in the target language.
translate-test: score the base on the same texts in the source language.
translate-train: score every trained adapter. --source-text chooses gold or machine-translated source text, or both.""",
    after_interrupt="""\
Scores that were printed are saved. Resume with the same command, which skips them:
  {command}""",
)

PREDICT = SettingsCommand(
    name="predict",
    settings=PredictSettings,
    work=_predict,
    help="predict your own texts with a trained adapter",
    description="""\
Predict labels with probabilities, answers, or generated text for every row of a file. The output keeps the file's
columns. The source text of a row comes from the column source_<column>, from --source-input, or from --translator.
An interrupted command resumes if it is repeated. See docs/predicting.md.""",
    after_interrupt="""\
Finished batches are kept next to the output. Resume with the same command:
  {command}""",
)

DEMO = SettingsCommand(
    name="demo",
    settings=DemoSettings,
    work=_demo,
    help="compare zero-shot, LoRA, input-level fusion and FLARE in a few minutes",
    description="""\
Compare cross-lingual transfer by zero-shot, plain LoRA, input-level fusion and FLARE.
Without --model and --data it takes a few minutes on a CPU, on a small generated parallel corpus.
Where a default is written A / B, A is the default for this corpus and B the default for real data.""",
    after_interrupt="""\
Finished rows are in results.json in the output folder, and a finished base model is kept. The demo does not resume:
if you repeat the command, it starts again and moves these results to earlier-N.
  {command}""",
    epilog="""\
example on real data:
  flare demo --model PATH_OR_HUB_ID --data FOLDER_OR_HUB_ID --source english --target acehnese""",
    shared=(),
)
