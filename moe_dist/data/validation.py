"""What a model is measured on: which windows of the validation split, with which weights, and where documents end in
them."""

import numpy as np

from moe_dist.config.schema import DataConfig
from moe_dist.data.blending import blended_validation
from moe_dist.data.corpus import Corpus
from moe_dist.data.sampler import validation_starts
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.step import DocumentEnds


def validation_windows(corpus: Corpus, data: DataConfig, seq_len: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, weights) of at most about `limit` windows, the same at every call. The loss of the split is
    sum(weights * losses) / sum(weights). Windows of one corpus follow one another, and have one weight."""
    if data.blend and not data.validation_paths:
        assert corpus.lengths is not None, "what is blended is indexed"
        return blended_validation(corpus.lengths[1], list(data.blend.values()), seq_len, limit)
    apart = [length for _, length in corpora_apart(corpus, data)]
    if apart:
        return blended_validation(apart, apart, seq_len, limit)
    starts = validation_starts(len(corpus.validation), seq_len, limit)
    return starts, np.ones(len(starts), np.float32)


def corpora_apart(corpus: Corpus, data: DataConfig) -> list[tuple[str, int]]:
    """(path, tokens) of each corpus of the validation split that has a loss of its own, as they follow one another
    there; none where it is one corpus, or several that are read as one. No window has tokens of two of them."""
    named = data.validation_paths or list(data.blend)
    if corpus.lengths is None or len(named) < 2:
        return []
    return list(zip(named, corpus.lengths[1], strict=True))


def document_ends(data: DataConfig, tokenizer: Tokenizer | None) -> DocumentEnds | None:
    """What a forward pass does at the ends of documents; None: nothing. Raises ValueError where nobody knows the token
    that ends one."""
    mask, reset = data.mask_documents, data.reset_positions
    if not mask and not reset:
        return None
    if tokenizer is None:
        name = "mask_documents" if mask else "reset_positions"
        raise ValueError(f"data.{name}=true asks which token ends a document: name the tokenizer in data.tokenizer")
    return DocumentEnds(tokenizer.end_id, mask, reset)
