"""Read the rows of a task, pair the rows of two languages, encode the pairs for a model, and score predictions.

There are the tasks of the paper, tasks on further data sets, and tasks for your own data (`.registry`).

task = get_task("nusax")
pairs, notes = load_pairs(task, "data", "english", "acehnese", "train")
form = make_form(task, tokenizer, "encoder")
rows, notes = form.train_rows(pairs, with_source=True)      # for flare.FlareDataCollator
"""

from .alignment import align
from .data_error import DataError
from .data_sets import DATA_SETS, DataSet
from .examples import Answer, Example, Pair
from .files import write_split
from .forms import FAMILIES, Form, JoinedForm, joined_task, make_form
from .languages import LANGUAGES, NLLB_TAGS, Language, language, nllb_code
from .metrics import score
from .pairs import load_pairs, read_translation
from .reading import has_split, read_split, resolve_labels
from .registry import TASKS, Task, choice_task, get_task

__all__ = [
    "DATA_SETS",
    "FAMILIES",
    "LANGUAGES",
    "NLLB_TAGS",
    "TASKS",
    "Answer",
    "DataError",
    "DataSet",
    "Example",
    "Form",
    "JoinedForm",
    "Language",
    "Pair",
    "Task",
    "align",
    "choice_task",
    "get_task",
    "has_split",
    "joined_task",
    "language",
    "load_pairs",
    "make_form",
    "nllb_code",
    "read_split",
    "read_translation",
    "resolve_labels",
    "score",
    "write_split",
]
