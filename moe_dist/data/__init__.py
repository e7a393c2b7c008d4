"""Where tokens come from, and in which order."""

from moe_dist.data.corpus import Corpus, load_corpus
from moe_dist.data.labelled import LabelledCorpus, LabelledSplit, load_labelled
from moe_dist.data.sampler import SequenceSampler, micro_batch, rank_starts, validation_batches, validation_starts
from moe_dist.data.subwords import Subwords
from moe_dist.data.tokenizer import ByteTokenizer, bits_per_byte

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "LabelledCorpus",
    "LabelledSplit",
    "SequenceSampler",
    "Subwords",
    "bits_per_byte",
    "load_corpus",
    "load_labelled",
    "micro_batch",
    "rank_starts",
    "validation_batches",
    "validation_starts",
]
