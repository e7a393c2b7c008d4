"""Documents that do not see each other, in every layout: the logits of a single process."""

from dataclasses import replace

import torch

from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import create_mesh, single_process_mesh
from moe_dist.step import DocumentEnds, StepContext
from tests.dist.helpers import KEY, run_checks

MODEL = dict(vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=1, d_ff=24)


def masked_alike() -> None:
    ids_BS = (KEY.uniform(torch.arange(4 * 12)) * 32).long().view(4, 12)
    ids_BS[:, [3, 7]] = 5
    step = StepContext(KEY, "dropless", ends=DocumentEnds(5, mask=True, reset=True))
    for kind, ep, tp, sp in (("multi_query", 1, 2, True), ("multi_query", 2, 1, False), ("switch", 2, 1, False)):
        attention = AttentionConfig(kind=kind, moe=MoEConfig(num_experts=2, top_k=1))  # type: ignore[arg-type]
        model = ModelConfig(**MODEL, moe=MoEConfig(num_experts=4, top_k=2), attention=attention)
        alone = Decoder(resolve_backends(model, 1), single_process_mesh())
        cut = Decoder(resolve_backends(model, ep), create_mesh(ep, tp, sequence_parallel=sp))
        with torch.no_grad():
            whole = alone(ids_BS, None, step, "logits")
            torch.testing.assert_close(cut(ids_BS, None, step, "logits"), whole, rtol=0, atol=1e-5)
            assert (alone(ids_BS, None, replace(step, ends=None), "logits") - whole).abs().max() > 1e-3


def test_documents_are_masked_alike_in_every_layout() -> None:
    run_checks(2, [masked_alike])
