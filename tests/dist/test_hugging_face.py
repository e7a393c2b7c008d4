"""Imported models in layouts of two ranks: logits are those of Transformers, all families in one start."""

import json
from pathlib import Path

import pytest
import torch

from moe_dist.checkpoint.find import run_config
from moe_dist.checkpoint.reshard import load_weights
from moe_dist.cli import main
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import create_mesh
from tests.dist.helpers import run_checks
from tests.unit.helpers import context, random_ids
from tests.unit.interop.test_hugging_face import saved
from tests.unit.models.test_families import FAMILIES, Widely

LAYOUTS = [(2, 1), (1, 2), (2, 2)]  # ep, tp
IDS = random_ids(2, 24, 256)


def check(folder: str) -> None:
    for name in json.loads((Path(folder) / "names.json").read_text()):
        run = Path(folder) / name
        expected, model = torch.load(run / "logits.pt"), run_config(run).model
        for ep, tp in LAYOUTS:
            mesh = create_mesh(ep, tp)
            decoder = Decoder(resolve_backends(model, ep), mesh).eval()
            load_weights(run / "checkpoints" / "step-000000", decoder, checked=True)
            with torch.no_grad():
                logits = decoder(IDS, None, context(phase="dropless"), "logits")
            apart, largest = (logits - expected).abs().max(), expected.abs().max()
            assert apart <= 1e-5 * largest, f"{name} in ep {ep} tp {tp}: {apart:.1e} of {largest:.1f}"


@pytest.mark.parametrize(
    "families",
    [
        pytest.param(["qwen2_moe", "gpt_oss", "glm4_moe", "jetmoe, more heads", "gpt_bigcode", "falcon"], id="six"),
        pytest.param(list(FAMILIES), id="all", marks=pytest.mark.slow),
    ],
)
def test_logits_in_every_layout(tmp_path: Path, families: list[str]) -> None:
    pytest.importorskip("transformers")
    names = []
    for number, name in enumerate(families):
        run = tmp_path / f"run-{number}"
        other = saved(name, tmp_path / f"theirs-{number}")
        assert main(["import", "hf", str(tmp_path / f"theirs-{number}"), "--output", str(run), "--no-compare"]) == 0
        with torch.no_grad(), Widely():
            expected = other(input_ids=IDS).logits
        torch.save(expected.float(), run / "logits.pt")
        names.append(run.name)
    (tmp_path / "names.json").write_text(json.dumps(names))
    run_checks(2, [check], str(tmp_path))
