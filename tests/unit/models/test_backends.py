"""`auto` names a backend once, and the names in the log say what will run."""

from dataclasses import replace

import pytest
import torch

from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig
from moe_dist.config.schema import Config, DataConfig, EngineConfig
from moe_dist.config.validate import validate
from moe_dist.generate.decode import CachedDecoder, generate
from moe_dist.generate.sampling import Sampling
from moe_dist.models.backends import describe_backends, resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from tests.unit.helpers import context, random_ids
from tests.unit.kernels.pretended_packages import CALLS, apex, flash_attn, pretended


def test_auto_is_resolved() -> None:
    model = resolve_backends(ModelConfig(), ep=1)
    assert (model.attention.backend, model.moe.dispatch, model.moe.experts) == ("flash", "local", "grouped_mm")
    assert resolve_backends(ModelConfig(), ep=2).moe.dispatch == "all_to_all"


@pytest.mark.parametrize(
    ("device", "seq_len", "kv_heads", "backend"),
    [
        ("cpu", 1024, 1, "packed"),
        ("cpu", 1024, 2, "packed"),
        ("cpu", 1024, 4, "flash"),
        ("cpu", 1025, 1, "flash"),
        ("cpu", None, 1, "flash"),
        ("cuda", 1024, 1, "flash"),
    ],
)
def test_packed_attention_is_for_shared_keys_on_cpu(device: str, seq_len: int, kv_heads: int, backend: str) -> None:
    model = ModelConfig(num_heads=8, num_kv_heads=kv_heads)
    assert resolve_backends(model, 1, device, seq_len).attention.backend == backend


def test_what_was_chosen_stays() -> None:
    moe = MoEConfig(dispatch="all_to_all", experts="loop")
    model = ModelConfig(attention=AttentionConfig(backend="torch"), kernels="torch", moe=moe)
    assert resolve_backends(model, ep=1) == model


def test_names() -> None:
    model = resolve_backends(ModelConfig(), ep=2)
    names = describe_backends(model, "cpu")
    assert names["experts"] in {f"grouped_mm (cpu loop, fused; fp32 products {lib})" for lib in ("oneDNN", "MKL")}
    assert names["dispatch"] == "all_to_all (ragged)"
    assert describe_backends(model, "cuda")["experts"] == "grouped_mm"
    assert "experts" not in describe_backends(resolve_backends(ModelConfig(moe=MoEConfig(num_experts=0)), 1), "cpu")


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, kernels = ModelConfig(moe=MoEConfig(experts="triton")), ModelConfig(kernels="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backends(experts, 1).moe.experts == resolve_backends(kernels, 1).kernels == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    for model, words in (
        (experts, "model.moe.experts=triton.*to grouped_mm"),
        (kernels, "model.kernels=triton.*torch"),
    ):
        with pytest.raises(ValueError, match=words):
            resolve_backends(model, 1, "cpu")
        assert resolve_backends(model, 1, "cuda")
    for module in ("kernels.registry", "models.backends"):
        monkeypatch.setattr(f"moe_dist.{module}.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        resolve_backends(experts, 1, "cuda")
    assert resolve_backends(ModelConfig(), 1, "cuda").kernels == "torch"


NAMED = ModelConfig(attention=AttentionConfig(backend="flash_attn"), norm_kernels="apex")


def test_packages_are_taken_by_name_alone() -> None:
    with pytest.raises(ValueError, match=r"model\.attention\.backend=flash_attn needs a GPU.*set it to flash$"):
        resolve_backends(replace(NAMED, norm_kernels="same"), 1, "cpu")
    with pytest.raises(ValueError, match=r"model\.norm_kernels=apex needs a GPU.*set it to same$"):
        resolve_backends(NAMED, 1, "cpu")
    with pretended(flash_attn(), *apex()):
        assert resolve_backends(ModelConfig(), 1, "cuda").attention.backend == "flash"
        named = describe_backends(resolve_backends(NAMED, 1, "cuda"), "cuda")
    assert (named["attention"], named["norm"]) == ("flash-attn", "apex")
    assert "norm" not in describe_backends(resolve_backends(ModelConfig(), 1), "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(engine=EngineConfig()), "computes in bf16, not in precision=fp32"),
        (dict(model=replace(NAMED, d_model=2112)), "heads up to 256 wide, not 264"),
        (dict(model=replace(NAMED, attention=AttentionConfig(backend="flash_attn", sinks=True))), "sinks=true; set"),
        (
            dict(model=replace(NAMED, attention=AttentionConfig(backend="flash_attn", dropout=0.1))),
            "draw other numbers",
        ),
        (dict(data=DataConfig(mask_documents=True)), r"data\.mask_documents=true; set"),
        (dict(task="classification"), "task=classification; set"),
    ],
)
def test_what_flash_attn_cannot_do_is_refused_before_a_run(changes: dict[str, object], words: str) -> None:
    config = replace(Config(model=NAMED, engine=EngineConfig(precision="bf16")), **changes)
    with pytest.raises(ValueError, match=words):
        validate(config, 1)


def test_a_decoder_on_flash_attn_and_apex() -> None:
    """Gradients and text in bf16 as with plain maths: grouped heads, windows by layer, norms of heads, caches."""
    attention = AttentionConfig(backend="torch", window=[5, None], qk_norm="head")
    sizes = dict(vocab_size=32, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48)
    plain = ModelConfig(**sizes, attention=attention, kernels="torch", moe=MoEConfig(num_experts=0))
    fused = replace(plain, attention=replace(attention, backend="flash_attn"), norm_kernels="apex")
    ids, outcomes, texts = random_ids(2, 13, vocab=32), [], []
    with pretended(flash_attn(), *apex()):
        for model in (plain, resolve_backends(fused, 1, "cuda")):
            decoder = Decoder(model, single_process_mesh()).bfloat16()
            CALLS.clear()
            decoder(ids[:, :-1], ids[:, 1:], context()).loss.backward()
            outcomes.append({name: param.grad.float() for name, param in decoder.named_parameters()})
            steps = generate(
                CachedDecoder(decoder, torch.device("cpu")), [[1, 2, 3], [4]], 6, 12, 0, Sampling(temperature=0)
            )
            texts.append([list(step) for step in steps])
    assert {call["name"] for call in CALLS} == {"func", "kvcache"} and {(4, 0), (-1, 0)} == {
        call["window_size"] for call in CALLS
    }
    for name, expected in outcomes[0].items():
        assert float((outcomes[1][name] - expected).norm()) <= 0.05 * float(expected.norm()), name
    assert texts[0] == texts[1]
