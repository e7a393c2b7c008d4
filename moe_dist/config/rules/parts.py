"""What most rules are made of. Each yields the lines of what is broken: the value, the rule, the way out.

`section` is where a field stands, as the user wrote it: `model.moe` in a run's configuration, "" where the fields are
arguments of a layer that stands alone: `key("model.moe", "top_k")` is `model.moe.top_k`, `key("", "top_k")` `top_k`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

MANY = 2**31 - 1
"""The most of what is counted and never held in memory, such as steps; also what 32 bits hold."""

Uses = Mapping[str, tuple[str, str]]
"""field -> (the field that chooses, the choices that use it): {"jitter": ("router", "softmax")}."""


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


def at_most(values: Any, section: str, **highest: float) -> Iterator[str]:
    """Where a number has no meaning any more, or no machine has room for it: at_most(train, "train", threads=1024)."""
    for name, high in highest.items():
        value = getattr(values, name)
        if value is not None and value > high:
            yield f"{name}={value} is above {high}; lower {key(section, name)}"


def above_zero(values: Any, section: str, names: str, null: str = "") -> Iterator[str]:
    for name in names.split():
        value = getattr(values, name)
        if value is not None and not value > 0:
            yield f"{name}={value} is not above 0; raise {key(section, name)}" + (f" ({null})" if null else "")


def between(values: Any, section: str, name: str, low: float, high: float) -> Iterator[str]:
    value = getattr(values, name)
    if value is not None and not low <= value <= high:
        yield f"{name}={value} is outside {low} to {high}; change {key(section, name)}"


def share(values: Any, section: str, names: str) -> Iterator[str]:
    """A probability that may be 0 and must be below 1."""
    for name in names.split():
        value = getattr(values, name)
        if not 0 <= value < 1:
            yield f"{name}={value} is outside 0 <= {name} < 1; change {key(section, name)}"


def unused(values: Any, section: str, uses: Uses) -> Iterator[str]:
    """An option that differs from its default is refused where the choice at hand does not look at it: whoever set it
    means it to do something."""
    for field in fields(values):
        if field.name not in uses:
            continue
        choice, users = uses[field.name]
        value, chosen = getattr(values, field.name), getattr(values, choice)
        default = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc,operator]
        if value != default and chosen not in users.split():
            names = " or ".join(users.split())
            yield (
                f"{field.name}={shown(value)} is of {choice}={names}, not {chosen}; "
                f"set {key(section, field.name)} to {shown(default)}"
            )


def shown(value: Any) -> str:
    """A value as YAML spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
