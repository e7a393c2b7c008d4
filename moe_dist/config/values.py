"""Values as people write them: times such as 4h, 90m or 1:30:00, and paths that open with ~."""

import re
from pathlib import Path
from typing import Any

_UNITS = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_PARTS = (24 * 60.0, 60.0, 1.0, 1 / 60)  # of a minute, in the order of both


def user_path(text: str) -> Path:
    """A path that somebody wrote, `~` standing for a home folder as in a shell, which expands it at the start of a word
    alone. Raises ValueError for the home of a user that is not there."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text}: there is no such user's home folder; write the path without ~") from None


def index_prefix(path: str) -> str:
    """PREFIX of PREFIX.bin and PREFIX.idx, by which an indexed corpus is named; either file names it too."""
    return path.removesuffix(".idx").removesuffix(".bin")


class Minutes:
    """Annotates a field that is a number of minutes, for which pydantic then takes text too."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(minutes, handler(source))


def minutes(value: Any) -> Any:
    """Text as minutes, for example "1h30m" and "1:30:00" as 90.0; anything else as it is.

    Raises ValueError for other text, also for 1:30, which is minutes and seconds to some and hours to others.
    """
    if not isinstance(value, str):
        return value
    found = _CLOCK.fullmatch(value) or _UNITS.fullmatch(value.replace(" ", ""))
    if not found or not value:
        raise ValueError("is no time: write 4h, 90m, 1h30m, hours:minutes:seconds as 1:30:00, or minutes as a number")
    return sum(float(part) * of for part, of in zip(found.groups(), _PARTS, strict=True) if part)
