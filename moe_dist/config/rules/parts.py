"""What most rules are made of. Each yields the lines of what is broken: the value, the rule, the way out.

`section` is where a field stands, as the user wrote it: `model.moe` in a run's configuration, "" where the fields are
arguments of a layer that stands alone: `key("model.moe", "top_k")` is `model.moe.top_k`, `key("", "top_k")` `top_k`.
"""

from collections.abc import Iterable, Iterator
from typing import Any


def key(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def refuse(problems: Iterable[str]) -> None:
    """Raises one ValueError with all of them, if there are any."""
    lines = list(problems)
    if lines:
        raise ValueError("\n".join(lines))


def multiple(name: str, size: int, part: str, divisor: int, advice: str) -> Iterator[str]:
    """Silent below 1: that is another rule's problem, and not to be divided by."""
    if size >= 1 and divisor >= 1 and size % divisor:
        yield f"{name}={size} is not divisible by {part}={divisor}; {advice}"


def at_least(low: int, values: Any, section: str, names: str) -> Iterator[str]:
    for name in names.split():
        value = getattr(values, name)
        if value is not None and value < low:
            yield f"{name}={value} is below {low}; set {key(section, name)} to {low} or more"


def above_zero(values: Any, section: str, names: str, null: str = "") -> Iterator[str]:
    for name in names.split():
        value = getattr(values, name)
        if value is not None and not value > 0:
            yield f"{name}={value} is not above 0; raise {key(section, name)}" + (f" ({null})" if null else "")


def between(values: Any, section: str, name: str, low: int, high: int) -> Iterator[str]:
    value = getattr(values, name)
    if not low <= value <= high:
        yield f"{name}={value} is outside {low} to {high}; change {key(section, name)}"


def share(values: Any, section: str, names: str) -> Iterator[str]:
    """A probability that may be 0 and must be below 1."""
    for name in names.split():
        value = getattr(values, name)
        if not 0 <= value < 1:
            yield f"{name}={value} is outside 0 <= {name} < 1; change {key(section, name)}"
