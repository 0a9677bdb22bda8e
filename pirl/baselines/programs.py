"""Convex programs, solved by Clarabel through CVXPY, which the extra "baselines" brings."""

from __future__ import annotations

import warnings
from typing import Any

from pirl.errors import ConvergenceError, MissingDependencyError

# Clarabel's own default is 1e-8; what is asked of multipliers and constraints here is finer.
_TOLERANCE = 1e-11


def cvxpy() -> Any:
    """The module, imported when it is needed.

    Raises:
        MissingDependencyError: it, or its solver, is not installed.
    """
    try:
        import clarabel  # noqa: F401
        import cvxpy
    except ImportError as error:
        raise MissingDependencyError(f"{error.name} is not installed: pip install 'pirl[baselines]'") from None
    return cvxpy


def solve(problem: Any) -> bool:
    """Solve a program in place; whether it has a solution.

    Raises:
        ConvergenceError: the solver gave up.
    """
    names = ("tol_gap_abs", "tol_gap_rel", "tol_feas")
    cp = cvxpy()
    try:
        with warnings.catch_warnings():
            # What the solver calls inaccurate has still met its coarser tolerances; callers check what they need.
            warnings.filterwarnings("ignore", message="Solution may be inaccurate", category=UserWarning)
            problem.solve(solver=cp.CLARABEL, **dict.fromkeys(names, _TOLERANCE))
    except cp.error.SolverError as error:
        raise ConvergenceError(f"the convex program was not solved: {error}") from None
    if problem.status in (cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE):
        return False
    if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        raise ConvergenceError(f"the convex program was not solved: its status is {problem.status}")
    return True
