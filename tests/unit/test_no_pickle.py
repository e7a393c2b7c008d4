"""Nothing that moe_dist reads can run code: a walk over its sources for the calls that could."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "moe_dist"
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.distributed.checkpoint"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("subprocess.getstatusoutput", "torch.load", "torch.jit.load", "torch.package.PackageImporter", "np.load"),
    *("numpy.load", "pandas.read_pickle", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("dist.gather_object", "dist.all_gather_object", "dist.broadcast_object_list", "dist.scatter_object_list"),
    *("dist.send_object_list", "dist.recv_object_list"),
}
ALLOWED = {
    # Tensors between the ranks that the command itself has just started; nothing comes from a file.
    "verify/command.py: dist.broadcast_object_list",
}


def dangers(source: str) -> Iterator[str]:
    """What in a module's source can turn data into code, by the names it is called under."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name
                if alias.name in MODULES:
                    yield alias.name
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = whole
                if node.module in MODULES or whole in MODULES:
                    yield whole
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = _name(node.func, names).replace("torch.distributed.", "dist.")
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        pickles = keywords.get("allow_pickle")
        refused = called == "numpy.load" and isinstance(pickles, ast.Constant) and pickles.value is False
        if called in CALLS and not refused:
            yield called
        if called == "yaml.load" and _name(keywords.get("Loader"), names) != "_Loader":
            yield "yaml.load"
        for keyword in ("shell", "allow_pickle"):
            if keyword in keywords and not (
                isinstance(keywords[keyword], ast.Constant) and not keywords[keyword].value
            ):
                yield f"{called}({keyword}=...)"


def _name(node: ast.AST | None, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def test_no_load_path_runs_code() -> None:
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {danger}"
        for path in sorted(ROOT.rglob("*.py"))
        for danger in dangers(path.read_text())
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import torch as t\nt.load('x', weights_only=True)", "torch.load"),
        ("from torch import load\nload('x')", "torch.load"),
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle.loads"),
        ("import torch.distributed as d\nd.all_gather_object([], 1)", "dist.all_gather_object"),
        ("import torch\ntorch.distributed.broadcast_object_list([], 0)", "dist.broadcast_object_list"),
        ("import numpy as np\nnp.load('x')", "numpy.load"),
        ("import numpy as np\nnp.memmap('x', allow_pickle=flag)", "numpy.memmap(allow_pickle=...)"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "subprocess.run(shell=...)"),
        ("import os\nos.system('ls')", "os.system"),
        ("import yaml\nyaml.load('x', Loader=yaml.Loader)", "yaml.load"),
        ("eval('1')", "eval"),
    ],
)
def test_the_walk_sees(source: str, danger: str) -> None:
    assert list(dangers(source)) == [danger]


def test_arrays_are_loaded_where_pickles_are_refused() -> None:
    assert list(dangers("import numpy as np\nnp.load('x', allow_pickle=False)")) == []
    assert list(dangers("import torch\ntorch.load('x', allow_pickle=False)")) == ["torch.load"]


def test_the_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from moe_dist.config.read import _Loader

    assert issubclass(_Loader, yaml.SafeLoader) and not issubclass(_Loader, yaml.FullLoader)
