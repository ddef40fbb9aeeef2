"""The offline tuner of kernel launches (``flare bench --tune``). Needs Triton."""

from .problem import SHAPES, Problem, Shape, problems
from .search import tune

__all__ = ["SHAPES", "Problem", "Shape", "problems", "tune"]
