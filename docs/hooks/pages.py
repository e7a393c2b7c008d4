"""What the site has beside the pages in docs/.

| in a page                              | on the site                                                            |
|----------------------------------------|------------------------------------------------------------------------|
| CHANGELOG.md and its like (PAGES)      | a page of its own, from the file in the repository's root              |
| a link to a file outside docs/         | leads to source/, where that file is shown                             |
| a picture of drawings/                 | the SVG itself, so that its colours follow the palette                 |

The same Markdown reads well in the repository, where links and pictures are what they seem. MkDocs calls this.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "results.md": "benchmarks/RESULTS.md"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".md": "markdown", ".ipynb": "json"}
PICTURES = (".png", ".svg")
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
DRAWING = re.compile(r"!\[([^\]]*)\]\(((?:\.\./)*drawings/[\w-]+\.svg)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds PAGES, and what pages link to outside docs/."""
    from mkdocs.structure.files import File

    for page, origin in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / origin).read_text(encoding="utf-8")))
    linked = {target for page in files.documentation_pages() for target in _outside(page.src_uri, page.content_string)}
    for target in sorted(linked):
        path = ROOT / target
        if target.endswith(PICTURES):
            files.append(File.generated(config, f"source/{target}", abs_src_path=str(path)))
        else:
            files.append(File.generated(config, f"source/{target}.md", content=_shown(target, path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    markdown = DRAWING.sub(lambda found: _inline(here, *found.groups()), markdown)
    return LINK.sub(lambda found: _link(here, found[0]), markdown)


def _link(here: str, link: str) -> str:
    """As it must read on the page `here`; as it stands where it leads nowhere that we know."""
    target, anchor = _target(here, link)
    if target is None:
        return link
    found = posixpath.relpath(_on_site(target), posixpath.dirname(here) or ".")
    return f"{found}#{anchor}" if anchor else found


def _outside(here: str, markdown: str) -> Iterator[str]:
    for link in LINK.findall(markdown):
        target, _ = _target(here, link)
        if target is not None and _on_site(target).startswith("source/"):
            yield target


def _target(here: str, link: str) -> tuple[str | None, str]:
    """The path in the repository that a link of the page `here` leads to, if there is one, and the anchor."""
    path, _, anchor = link.partition("#")
    if not path or "://" in path:
        return None, anchor
    target = posixpath.normpath(posixpath.join(posixpath.dirname(PAGES.get(here, f"docs/{here}")), path))
    return (target if (ROOT / target).exists() else None), anchor


def _on_site(target: str) -> str:
    """Where the site has a path of the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target == "README.md":
        return "index.md"
    at = next((page for page, origin in PAGES.items() if origin == target), None)
    return at or (f"source/{target}" if target.endswith(PICTURES) else f"source/{target}.md")


def _shown(target: str, path: Path) -> str:
    """A page with the text of a file, or the names in a folder. It is left out of the search."""
    if path.is_dir():
        language, text = "text", "\n".join(sorted(each.name for each in path.iterdir() if each.name[0] not in "._"))
    else:
        language, text = LANGUAGES.get(path.suffix, "text"), path.read_text(encoding="utf-8")
    return f"---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n# {target}\n\n````````{language}\n{text}\n````````\n"


def _inline(here: str, about: str, link: str) -> str:
    path = DOCS / posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
    svg = path.read_text(encoding="utf-8").strip()
    return f'<figure class="drawing" markdown="0">\n{svg}\n<figcaption>{about}</figcaption>\n</figure>'
