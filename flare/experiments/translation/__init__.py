"""Machine translation of a task's data with any encoder-decoder: resumable, with answer spans and provenance."""

from .job import Job, Outcome, translate_split
from .model import TranslationError, TranslationModel
from .run import run_translate
from .translate_settings import TranslateSettings
from .translator import Translated, Translator

__all__ = [
    "Job",
    "Outcome",
    "TranslateSettings",
    "Translated",
    "TranslationError",
    "TranslationModel",
    "Translator",
    "run_translate",
    "translate_split",
]
