"""Documents in one sequence: masked and with their own positions, each is as if it stood alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_dist.attention.positions import between_documents, documents_of, places_in_documents
from moe_dist.config import Config, validate
from moe_dist.config.model import AttentionConfig, MoEConfig
from moe_dist.config.schema import DataConfig
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import DocumentEnds
from tests.unit.helpers import context, tiny_model

END = 3
ROWS = [[5, 6, END, 7, 8, 9, END, 4], [END, END, 1, 2, 5, 5, 5, 6]]


def test_documents_by_hand() -> None:
    tokens_BS = torch.tensor(ROWS)
    assert documents_of(tokens_BS, END).tolist() == [[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2, 2, 2]]
    assert places_in_documents(tokens_BS, END).tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 0, 1, 2, 3, 4, 5]]


def test_masks_and_positions_are_megatrons() -> None:
    theirs = pytest.importorskip("megatron.core.datasets.gpt_dataset")._get_ltor_masks_and_position_ids
    rng = np.random.default_rng(0)
    tokens_BS = torch.from_numpy(rng.integers(0, 6, (20, 17)))
    bias_B1SS, place_BS = between_documents(tokens_BS, END, torch.float32), places_in_documents(tokens_BS, END)
    for row, tokens_S in enumerate(tokens_BS):
        hidden, _, places = theirs(tokens_S, END, True, True, False, True)
        causal = torch.ones(17, 17, dtype=torch.bool).tril()
        assert torch.equal((bias_B1SS[row, 0] == 0) & causal, ~hidden[0])
        assert place_BS[row].tolist() == places.tolist()


@pytest.mark.parametrize("kind", ["multi_query", "switch"])
@pytest.mark.parametrize("position", ["rotary", "alibi", "learned", "none"])
def test_each_document_is_as_if_it_stood_alone(kind: str, position: str) -> None:
    attention = AttentionConfig(kind=kind, position=position, moe=MoEConfig(num_experts=2, top_k=1))  # type: ignore[arg-type]
    model = replace(tiny_model(), attention=attention, max_positions=8 if position == "learned" else None)
    decoder = Decoder(resolve_backends(model, 1), single_process_mesh(), 0).double()
    ends = DocumentEnds(END, mask=True, reset=position in ("rotary", "learned"))
    step = replace(context(), phase="dropless", ends=ends)
    alone = replace(step, ends=None)
    for row in ROWS:
        with torch.no_grad():
            together = decoder(torch.tensor([row]), None, step, "logits")[0]
            unmasked = decoder(torch.tensor([row]), None, alone, "logits")[0]
            first = 0
            while first < len(row):
                end = row.index(END, first) + 1 if END in row[first:] else len(row)
                own = decoder(torch.tensor([row[first:end]]), None, alone, "logits")[0]
                torch.testing.assert_close(together[first:end], own, rtol=0, atol=1e-12)
                first = end
        assert (together - unmasked).abs().max() > 1e-6


def test_rules() -> None:
    config = Config(data=DataConfig(mask_documents=True, reset_positions=True))
    validate(config, 1)
    config.model.attention.position = "alibi"
    with pytest.raises(
        ValueError, match=r"reset_positions=true needs rotary or learned ones, not attention.po.*=alibi"
    ):
        validate(config, 1)
