"""CONTRIBUTING.md and README.md tell the truth: packages and their order, the places that are named, links."""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from moe_dist.cli import COMMANDS
from moe_dist.config.model import AttentionConfig, MoEConfig
from moe_dist.models.block import ATTENTIONS
from moe_dist.moe.routers import ROUTERS
from moe_dist.verify.cases import SETTING_AXES
from tests.dist.test_moe import CARRIERS
from tests.unit.models.test_causality import DECODERS

ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def choices(section: type, field: str) -> set[str]:
    return set(get_args(get_type_hints(section)[field]))


def test_packages_are_listed_in_the_order_of_their_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    table = CONTRIBUTING.split("| package | holds |\n|---|---|\n")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == layers
    there = {path.stem for path in (ROOT / "moe_dist").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert set(layers) == there - {"__init__"}


@cache
def definitions() -> tuple[set[str], dict[str, set[str]]]:
    """(all names that our sources define, by class what it holds)."""
    names: set[str] = set()
    members: dict[str, set[str]] = {}
    for folder in ("moe_dist", "tests"):
        for path in (ROOT / folder).glob("**/*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names |= _defined(node)
                if isinstance(node, ast.ClassDef):
                    members.setdefault(node.name, set()).update(*(_defined(inner) for inner in node.body))
    return names, members


def _defined(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def missing(text: str) -> Iterator[str]:
    """What stands in `code` and looks like a path or a name of ours, but is neither. `Class.field` is looked up in its
    class. Words in small letters may be anybody's, and are passed over."""
    names, members = definitions()
    for word in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"[\w./*-]+", word) and ("/" in word or word.endswith(".py")):
            pattern = word.rstrip("/") if "/" in word else f"**/{word}"
            if not any(any(home.glob(pattern)) for home in (ROOT, ROOT / "moe_dist")):
                yield word
        elif re.fullmatch(r"[A-Za-z_][\w.]*", word) and word != word.lower().replace("_", ""):
            owner, _, name = word.rpartition(".")
            if name not in (members.get(owner, set()) if owner[:1].isupper() else names):
                yield word


def test_named_places_exist() -> None:
    start, end = CONTRIBUTING.index("## Where things go"), CONTRIBUTING.index("## Style")
    assert list(missing(CONTRIBUTING[start:end])) == []
    for page in (ROOT / "docs" / "how-to").glob("write-a-*.md"):
        assert list(missing(page.read_text(encoding="utf-8"))) == [], page


@pytest.mark.parametrize(
    "text",
    [
        "`moe/nowhere.py`",
        "`kernels/nothing/`",
        "`NO_SUCH_TABLE`",
        "`MoEConfig.no_field`",
        "`NoConfig.router`",
        "`no_name`",
    ],
)
def test_a_missing_place_is_found(text: str) -> None:
    assert list(missing(f"its name in `ROUTERS` and `MoEConfig.router`, {text} of `moe/routers.py`")) == [
        text.strip("`")
    ]


def test_what_a_new_choice_must_be_added_to_has_all_that_are_there() -> None:
    assert set(ROUTERS) == choices(MoEConfig, "router") <= set(SETTING_AXES["router"])
    kinds = choices(AttentionConfig, "kind")
    assert set(ATTENTIONS) == kinds <= set(SETTING_AXES["attention"])
    assert {AttentionConfig(**options).kind for options in DECODERS.values()} == kinds
    carried = {moe["dispatch"] for moe, _ in CARRIERS}
    assert carried == choices(MoEConfig, "dispatch") - {"auto", "local"}


def test_what_is_like_it_is_where_a_new_one_is_to_go() -> None:
    """Kernels beside their reference, commands behind their arguments."""
    ops = {path.parent for path in (ROOT / "moe_dist/kernels").glob("*/*.py")}
    assert ops and all((op / "reference.py").is_file() for op in ops)
    for command in COMMANDS.values():
        for place in filter(None, (command.arguments, command.run)):
            module, _, function = place.partition(":")
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}, (
                place
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in set(anchors(target.read_text(encoding="utf-8"))), link


def anchors(text: str) -> Iterator[str]:
    """As GitHub makes them of headings."""
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
