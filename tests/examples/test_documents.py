"""Every snippet of the five documents runs on moe_dist with nothing but its import changed.

Blocks of a document share one namespace, as a reader would type them one after the other. Blocks that are no program
are read for what they promise: a class or a call with annotated parameters must be the signature of ours.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_dist

DOCUMENTS = sorted((Path(__file__).parent / "documents").glob("*.md"))
_IMPORT = re.compile(r"^from (experimental\.new_models\.switch_attn|model|mqa|transformer_block|zeta\.nn) import", re.M)


def blocks(document: Path) -> Iterator[str]:
    """The python blocks; one that was left open ends with the document."""
    yield from re.findall(r"^```python\n(.*?)^```", document.read_text() + "\n```", re.M | re.S)


def signature(block: str) -> dict[str, list[tuple[str, Any]]]:
    """{class or class.method: its parameters with defaults} that a block declares; empty for a program."""
    call = re.fullmatch(r"(\w+)\((\s*\w+: .*)\)\s*", block, re.S)
    if call:
        block = f"class {call[1]}:\n    def __init__(self, {call[2]}): ..."
    try:
        tree = ast.parse(textwrap.dedent(block))
    except SyntaxError:
        return {}
    found = {}
    for node in tree.body:
        functions = [node] if isinstance(node, ast.FunctionDef) else getattr(node, "body", [])
        for function in functions if isinstance(node, ast.ClassDef | ast.FunctionDef) else []:
            names = [arg.arg for arg in function.args.args if arg.arg != "self"]
            given = [eval(ast.unparse(value), {"torch": torch}) for value in function.args.defaults]
            defaults = [inspect.Parameter.empty] * (len(names) - len(given)) + given
            name = f"{node.name}.{function.name}" if isinstance(node, ast.ClassDef) else f"forward.{function.name}"
            found[name] = list(zip(names, defaults, strict=True))
    return found


def is_shell(block: str) -> bool:
    return block.lstrip().startswith("pip install")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_snippets_run(document: Path) -> None:
    namespace: dict[str, Any] = {"torch": torch}  # one document takes it for granted
    ran = 0
    for block in blocks(document):
        if is_shell(block) or signature(block):
            continue
        source = _IMPORT.sub("from moe_dist import", block)
        if not torch.cuda.is_available():
            source = source.replace("cuda", "cpu")  # kernels run in Triton's interpreter here
        exec(compile(source, f"{document.name}: {block[:40]}", "exec"), namespace)
        ran += 1
    assert ran >= 1


CLASSES = {"000": "", "001": "", "002": "", "003": "", "004": "MixtureOfAutoregressiveAttention"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_signatures_are_as_promised(document: Path) -> None:
    promised = {name: params for block in blocks(document) for name, params in signature(block).items()}
    for name, params in promised.items():
        owner, method = name.split(".")
        owner = CLASSES[document.stem] if owner == "forward" else owner
        ours = inspect.signature(getattr(getattr(moe_dist, owner), method)).parameters
        for parameter, default in params:
            assert parameter in ours, f"{owner}.{method} lacks {parameter}"
            assert ours[parameter].default == default, f"{owner}.{method}: {parameter}"
        positional = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD and n != "self"]
        assert positional[: len(params)] == [parameter for parameter, _ in params]
    assert bool(promised) == (document.stem in ("003", "004"))
