"""What `moe-dist data prepare` leaves beside a corpus: PREFIX.json, and its tokenizer in PREFIX.tokenizer/."""

import json
from pathlib import Path
from typing import Any

from moe_dist.data.tokenizer import ByteTokenizer, Tokenizer
from moe_dist.data.tokenizers import load_tokenizer


def read_record(prefix: str) -> dict[str, Any] | None:
    """What PREFIX.json says; None where `moe-dist data prepare` wrote none. Raises ValueError when it is damaged."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record["digest"]["bin"], record["tokenizer"]["digest"], record["bad"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what `moe-dist data prepare` writes: {error!r}") from None
    return record


def tokenizer_beside(prefix: str) -> Tokenizer | None:
    """The tokenizer of a corpus; None where nothing tells. Raises ValueError when it is not the one that it was."""
    folder, record = Path(f"{prefix}.tokenizer"), read_record(prefix)
    if record is not None and record["tokenizer"]["digest"] == ByteTokenizer.digest:
        return ByteTokenizer()
    if not folder.is_dir():
        return None
    tokenizer = load_tokenizer(str(folder))
    if record is not None and record["tokenizer"]["digest"] != tokenizer.digest:
        raise ValueError(f"{folder} is not the tokenizer that {prefix}.bin was made with: prepare the corpus anew")
    return tokenizer
