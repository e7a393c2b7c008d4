"""Triton's interpreter without what it does twice: kernels compute the same in about half the time.

| what it does | what is done here |
|---|---|
| replaces its whole language again for each function that a kernel calls | once a launch for each module of kernels |
| computes whether 32-bit sums overflow, then asserts nothing, as it has no debug mode | leaves the sums out |
| makes a table of all types to look one up | remembers what it found |
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
from triton.runtime import interpreter


def quicken() -> None:
    """For the life of this process; a second time changes nothing. AttributeError where Triton is built otherwise."""
    if not hasattr(interpreter, "quick"):
        interpreter.quick = True  # type: ignore[attr-defined]
        _replace_the_language_once_a_launch()
        builder = interpreter.interpreter_builder
        assert not builder.options.debug
        builder.options = replace(builder.options, sanitize_overflow=False)
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)


def _replace_the_language_once_a_launch() -> None:
    """A launch undoes what its first call replaced; what later ones replaced stays, as it does without this."""
    replace_language, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: dict[int, Any] = {}

    def replace_once(function: FunctionType) -> Any:
        module = id(function.__globals__)
        if module not in replaced:
            replaced[module] = replace_language(function)
        return replaced[module]

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, launch_anew


def _remembered(find: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    of_scalar = cache(find)
    return lambda kind: find(kind) if kind.scalar.is_ptr() else of_scalar(kind.scalar)
