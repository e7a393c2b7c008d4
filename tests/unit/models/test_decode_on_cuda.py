"""Decoding with caches on a device that pretends to be a GPU: what is left on the host is an error."""

from dataclasses import replace

import pytest
import torch

from moe_dist.config.model import AttentionConfig, MoEConfig
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from tests.unit.helpers import context, random_ids, tiny_model
from tests.unit.pretended_cuda import on_host, pretended_cuda

KINDS = {
    "rotary": AttentionConfig(backend="flash"),
    "alibi, window, sinks": AttentionConfig(backend="torch", position="alibi", window=3, sinks=True),
    "switch": AttentionConfig(
        kind="switch", backend="flash", moe=MoEConfig(num_experts=4, dispatch="local", experts="bmm")
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_prefill_of_unequal_prompts_and_two_tokens_more(name: str) -> None:
    config = replace(tiny_model(attention=KINDS[name]), num_kv_heads=1)
    models = [Decoder(config, single_process_mesh(), seed=1) for _ in range(2)]
    ids, more, lengths = random_ids(3, 6), random_ids(3, 2, seed=1), [6, 2, 4]

    def decode(model: Decoder, device: torch.device) -> list[torch.Tensor]:
        caches = model.new_caches(3, 8)
        ends = torch.tensor(lengths, device=device) - 1
        found = [model(ids.to(device), None, context(phase="dropless"), "logits", caches, ends)]
        for cache in caches:
            cache.truncate(lengths)
        for at in range(2):
            token = more[:, at : at + 1].to(device)
            found.append(model(token, None, context(phase="dropless"), "logits", caches))
        return found

    with torch.no_grad():
        expected = decode(models[0], torch.device("cpu"))
        with pretended_cuda() as cuda:
            found = decode(models[1].to(cuda), cuda)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(on_host(ours), theirs, rtol=1e-5, atol=1e-5)
