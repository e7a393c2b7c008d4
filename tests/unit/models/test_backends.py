"""`auto` names a backend once, and the names in the log say what will run."""

import pytest

from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig
from moe_dist.models.backends import describe_backends, resolve_backends


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
