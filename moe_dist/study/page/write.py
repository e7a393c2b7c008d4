"""A page on disk:

FOLDER/
  report.html        the page, with all it needs       report.md    the same in Markdown
  figures/NAME.svg   drawings                          data/NAME.csv    numbers of each figure and table
  report.json        names of all these files: what an earlier report made, and this one does not, is removed

Each file is replaced as a whole. Whoever is stopped between two of them leaves a page that is whole, and the next
report removes what is left over. Files that no report has made stay, unless they have the very name of one.
"""

import json
import re
from contextlib import suppress
from pathlib import Path

from moe_dist.disk import replace_text
from moe_dist.study.page.html import html
from moe_dist.study.page.markdown import markdown
from moe_dist.study.page.model import Figure, Page, with_data
from moe_dist.study.page.text import csv_of
from moe_dist.study.page.theme import standalone

_LIST = "report.json"
_OURS = re.compile(r"figures/[a-z0-9][a-z0-9_-]*\.svg|data/[a-z0-9][a-z0-9_-]*\.csv|report\.(html|md)")


def write_page(page: Page, folder: Path) -> list[Path]:
    """Returns the files, the page first. Raises ValueError for a format that does not fit a value, before anything is
    written, and OSError."""
    texts = {"report.html": html(page), "report.md": markdown(page)}
    for part in with_data(page):
        if isinstance(part, Figure):
            texts[f"figures/{part.name}.svg"] = standalone(part.svg)
        texts[f"data/{part.name}.csv"] = csv_of(part.columns, part.rows)
    earlier = _earlier(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _list(folder, {*texts, *earlier})
    for name in reversed(texts):  # the pages last, when what they point to is there
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        replace_text(path, texts[name])
    for name in earlier - set(texts):
        (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # others may keep something there
            (folder / name).parent.rmdir()
    _list(folder, set(texts))
    return [folder / name for name in texts]


def _earlier(folder: Path) -> set[str]:
    """Files of earlier reports, by their list; none where there is no list that can be read."""
    with suppress(OSError, ValueError, TypeError):
        names = json.loads((folder / _LIST).read_text(encoding="utf-8"))["files"]
        return {name for name in names if _OURS.fullmatch(name)}
    return set()


def _list(folder: Path, names: set[str]) -> None:
    replace_text(folder / _LIST, json.dumps({"files": sorted(names)}, indent=1))
