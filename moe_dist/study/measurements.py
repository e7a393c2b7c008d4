"""Measurements of a point."""

import json
from pathlib import Path
from typing import Any


def read_measurements(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
