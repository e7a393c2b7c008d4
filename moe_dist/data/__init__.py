"""Where tokens come from, and in which order."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.data.corpus import Corpus as Corpus
    from moe_dist.data.corpus import load_corpus as load_corpus
    from moe_dist.data.labelled import LabelledCorpus as LabelledCorpus
    from moe_dist.data.labelled import LabelledSplit as LabelledSplit
    from moe_dist.data.labelled import load_labelled as load_labelled
    from moe_dist.data.sampler import SequenceSampler as SequenceSampler
    from moe_dist.data.sampler import micro_batch as micro_batch
    from moe_dist.data.sampler import rank_starts as rank_starts
    from moe_dist.data.sampler import validation_batches as validation_batches
    from moe_dist.data.sampler import validation_starts as validation_starts
    from moe_dist.data.subwords import Subwords as Subwords
    from moe_dist.data.tokenizer import ByteTokenizer as ByteTokenizer
    from moe_dist.data.tokenizer import bits_per_byte as bits_per_byte

# Imported when first asked for: `moe-dist data` and its workers need no torch.
_HOMES = {
    "corpus": ("Corpus", "load_corpus"),
    "labelled": ("LabelledCorpus", "LabelledSplit", "load_labelled"),
    "sampler": ("SequenceSampler", "micro_batch", "rank_starts", "validation_batches", "validation_starts"),
    "subwords": ("Subwords",),
    "tokenizer": ("ByteTokenizer", "bits_per_byte"),
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"moe_dist.data.{module}"), name)
    raise AttributeError(f"module 'moe_dist.data' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
