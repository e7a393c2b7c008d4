"""Learns a byte-level BPE from texts: every byte is a token, then the pairs that are most frequent (arXiv 1508.07909).

Text is split as GPT-2 splits it before pairs are counted, so nothing is out of vocabulary and what is decoded is what
was encoded, byte by byte. The `tokenizers` package does the work. The same texts give the same file.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from moe_dist.data.documents import LeftOut
from moe_dist.data.prepare.blocks import Place, Unreadable, read_blocks
from moe_dist.data.prepare.sources import Kind, find_sources
from moe_dist.data.prepare.work import texts_of
from moe_dist.data.tokenizer import END_OF_TEXT
from moe_dist.data.tokenizers import CONFIG
from moe_dist.disk import replace_text

_SMALLEST = 256 + 1  # every byte, and the end of a text


def learn_tokenizer(
    paths: list[str],
    output: Path,
    vocab_size: int,
    kind: Kind | None,
    text_key: str,
    say: Callable[[str], None],
) -> int:
    """Writes tokenizer.json and tokenizer_config.json to the folder `output`. Returns how many ids there are: fewer
    than vocab_size where the texts hold fewer pairs.

    say: is told what was not read. Raises ValueError for paths that hold no text.
    """
    if vocab_size < _SMALLEST:
        raise ValueError(
            f"--vocab-size {vocab_size} is below {_SMALLEST}: a token for each byte, and the end of a text"
        )
    if (output / "tokenizer.json").exists():
        raise ValueError(f"{output} holds a tokenizer already: remove it, or choose another --output")
    left_out = LeftOut()
    sources = find_sources(paths, kind, left_out)
    if len(left_out):
        say(left_out.describe())
    seen = 0

    def texts() -> Iterator[str]:
        nonlocal seen
        for source in sources:
            try:
                for block in read_blocks(source, Place(), text_key):
                    for line, text, problem in texts_of(source.kind, block, text_key):
                        if problem:
                            say(f"left out: {source.path}, line {line}: {problem}")
                        else:
                            seen += len(text) > 0
                            yield text
            except Unreadable as problem:
                say(f"left out: {source.path}, line {problem.line}: {problem}")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if not seen:
        raise ValueError(f"{', '.join(paths)} holds no text to learn from")
    output.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    replace_text(output / CONFIG, json.dumps(config, indent=1))
    replace_text(output / "tokenizer.json", tokenizer.to_str(pretty=True))
    return int(tokenizer.get_vocab_size())
