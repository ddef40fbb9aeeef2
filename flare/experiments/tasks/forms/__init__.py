"""Forms: classes that convert a task's examples to model rows, and a model's output to predictions."""

from .base import Form
from .factory import FAMILIES, make_form
from .joined import JoinedForm, joined_task

__all__ = ["FAMILIES", "Form", "JoinedForm", "joined_task", "make_form"]
