"""Forms: how a task's examples become model rows, and how a model's output becomes predictions."""

from .base import Form
from .factory import FAMILIES, make_form
from .joined import JoinedForm, joined_task

__all__ = ["FAMILIES", "Form", "JoinedForm", "joined_task", "make_form"]
