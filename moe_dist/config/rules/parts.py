"""What most rules are made of. Each yields the lines of what is broken: the value, the rule, the way out."""

from collections.abc import Iterator
from typing import Any


def multiple(name: str, size: int, part: str, divisor: int, advice: str) -> Iterator[str]:
    """Silent below 1: that is another rule's problem, and not to be divided by."""
    if size >= 1 and divisor >= 1 and size % divisor:
        yield f"{name}={size} is not divisible by {part}={divisor}; {advice}"


def at_least(low: int, section: Any, path: str, names: str) -> Iterator[str]:
    for name in names.split():
        value = getattr(section, name)
        if value is not None and value < low:
            yield f"{name}={value} is below {low}; set {path}.{name} to {low} or more"


def above_zero(section: Any, path: str, names: str, null: str = "") -> Iterator[str]:
    for name in names.split():
        value = getattr(section, name)
        if value is not None and not value > 0:
            yield f"{name}={value} is not above 0; raise {path}.{name}" + (f" ({null})" if null else "")


def between(section: Any, path: str, name: str, low: int, high: int) -> Iterator[str]:
    value = getattr(section, name)
    if not low <= value <= high:
        yield f"{name}={value} is outside {low} to {high}; change {path}.{name}"
