"""Translate a task's data with any encoder-decoder, and find the answer spans of questions in the translation.

An interrupted translation can be resumed, and provenance.json records how the files of a folder were made.
"""

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
