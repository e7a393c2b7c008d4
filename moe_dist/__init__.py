"""moe_dist: distributed training of Mixture-of-Experts transformers, with one meaning in any layout."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.attention.kv_cache import KVCache as KVCache
    from moe_dist.standalone.classifier import Model as Model
    from moe_dist.standalone.classifier import SwitchClassifier as SwitchClassifier
    from moe_dist.standalone.mixture_of_experts import MixtureOfExperts as MixtureOfExperts
    from moe_dist.standalone.multi_query.layer import MultiQueryAttention as MultiQueryAttention
    from moe_dist.standalone.routed_attention import (
        MixtureOfAutoregressiveAttention as MixtureOfAutoregressiveAttention,
    )
    from moe_dist.standalone.switch_attention import SwitchMultiQueryAttention as SwitchMultiQueryAttention
    from moe_dist.standalone.switch_transformer import Block as Block
    from moe_dist.standalone.switch_transformer import Transformer as Transformer
    from moe_dist.standalone.transformer_block import TransformerBlock as TransformerBlock

__version__ = "0.1.0"

# Where the public layers are. They are imported when first asked for: `import moe_dist` does not import torch.
_LAYERS = {
    "Block": "moe_dist.standalone.switch_transformer",
    "KVCache": "moe_dist.attention.kv_cache",
    "MixtureOfAutoregressiveAttention": "moe_dist.standalone.routed_attention",
    "MixtureOfExperts": "moe_dist.standalone.mixture_of_experts",
    "Model": "moe_dist.standalone.classifier",
    "MultiQueryAttention": "moe_dist.standalone.multi_query.layer",
    "SwitchClassifier": "moe_dist.standalone.classifier",
    "SwitchMultiQueryAttention": "moe_dist.standalone.switch_attention",
    "Transformer": "moe_dist.standalone.switch_transformer",
    "TransformerBlock": "moe_dist.standalone.transformer_block",
}


def __getattr__(name: str) -> Any:
    if name not in _LAYERS:
        raise AttributeError(f"module 'moe_dist' has no attribute {name!r}; it has {', '.join(sorted(_LAYERS))}")
    from importlib import import_module

    return getattr(import_module(_LAYERS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAYERS])
