"""moe_dist: distributed training of Mixture-of-Experts transformers, with one meaning in any layout."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.attention.kv_cache import KVCache as KVCache
    from moe_dist.attention.mixture import MixtureOfAutoregressiveAttention as MixtureOfAutoregressiveAttention
    from moe_dist.attention.multi_query import MultiQueryAttention as MultiQueryAttention
    from moe_dist.attention.switch_face import SwitchMultiQueryAttention as SwitchMultiQueryAttention
    from moe_dist.models.switch_classifier import Model as Model
    from moe_dist.models.switch_classifier import SwitchClassifier as SwitchClassifier
    from moe_dist.models.switch_transformer import Block as Block
    from moe_dist.models.switch_transformer import Transformer as Transformer
    from moe_dist.models.transformer_block import TransformerBlock as TransformerBlock
    from moe_dist.moe.mixture import MixtureOfExperts as MixtureOfExperts

__version__ = "0.1.0"

# Where the public layers are. They are imported when first asked for: `import moe_dist` does not import torch.
_LAYERS = {
    "Block": "moe_dist.models.switch_transformer",
    "KVCache": "moe_dist.attention.kv_cache",
    "MixtureOfAutoregressiveAttention": "moe_dist.attention.mixture",
    "MixtureOfExperts": "moe_dist.moe.mixture",
    "Model": "moe_dist.models.switch_classifier",
    "MultiQueryAttention": "moe_dist.attention.multi_query",
    "SwitchClassifier": "moe_dist.models.switch_classifier",
    "SwitchMultiQueryAttention": "moe_dist.attention.switch_face",
    "Transformer": "moe_dist.models.switch_transformer",
    "TransformerBlock": "moe_dist.models.transformer_block",
}


def __getattr__(name: str) -> Any:
    if name not in _LAYERS:
        raise AttributeError(f"module 'moe_dist' has no attribute {name!r}; it has {', '.join(sorted(_LAYERS))}")
    from importlib import import_module

    return getattr(import_module(_LAYERS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAYERS])
