"""The notebook's cells run, in order, in one namespace; and its file is a notebook."""

import json
import runpy
from pathlib import Path

import matplotlib
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def test_the_classifier_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MOE_DIST_EXAMPLE", "fast")
    matplotlib.use("Agg")
    notebook = json.loads((ROOT / "examples" / "classifier.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"classifier.ipynb, code cell {number}", "exec"), names)
    counts = names["counts"]
    assert isinstance(counts, np.ndarray) and counts.sum() == len(names["test_labels"])  # type: ignore[arg-type]
    assert np.mean(names["losses"][-5:]) < np.mean(names["losses"][:5])  # type: ignore[index]
    assert "10 experts, the clones [8, 9] open" in capsys.readouterr().out


def test_the_drawing_follows_the_model(tmp_path: Path) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "drawn.svg"
    config.write_text("model: {d_model: 64, num_layers: 2, moe: {num_experts: 5, top_k: 3}}\ntask: classification\n")
    draw = runpy.run_path(str(ROOT / "examples" / "draw_classifier.py"))["main"]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(str(config), str(out))
    drawn = out.read_text()
    assert drawn.count("expert 4") == 2 and "expert 5" not in drawn and "router 5×64, softmax, top 3" in drawn
