"""Tokenizers that are read from files. What a file is, its contents say, not its name.

| PATH | read with | ends a document |
|---|---|---|
| tokenizer.json, or a Hugging Face folder with it | tokenizers | eos_token of tokenizer_config.json, or a usual name |
| lines of base64 and rank | tiktoken (extra `data`) | that of the encoding; FILE.json tells of one's own |
| a SentencePiece model, or a folder with one | sentencepiece (extra `data`) | its end of sentence |
| `bytes` | - | byte 0 |

A folder of the files that a tokenizer names is that tokenizer again: so it travels with a run.
"""

import base64
import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as package

from moe_dist.config.extras import install
from moe_dist.config.values import user_path
from moe_dist.data.documents import cut
from moe_dist.data.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer
from moe_dist.disk import replacing

BYTES = "bytes"
IN_RUN = "tokenizer"
"""The folder of a run that holds its tokenizer, where that is not bytes."""
CONFIG = "tokenizer_config.json"
_USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
_IN_FOLDERS = ("tokenizer.json", "*.tiktoken", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_WORDS = r"[^\r\n\p{L}\p{N}]?+\p{L}++"
_LIKE_LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
_LIKE_LLAMA += r"\s+(?!\S)|\s+"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (
    rf"'(?i:[sdmt]|ll|ve|re)|{_WORDS}|\p{{N}}{{1,3}}+| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_KNOWN_RANKS: dict[int, tuple[str, dict[str, int], str]] = {
    50256: (_GPT2, {END_OF_TEXT: 50256}, END_OF_TEXT),  # r50k_base
    50280: (_GPT2, {END_OF_TEXT: 50256}, END_OF_TEXT),  # p50k_base, which leaves 50256 out of its ranks
    100256: (_CL100K, {END_OF_TEXT: 100257}, END_OF_TEXT),  # cl100k_base
    199998: (_O200K, {END_OF_TEXT: 199999}, END_OF_TEXT),  # o200k_base
    128000: (
        _LIKE_LLAMA % "{1,3}",
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001},
        "<|end_of_text|>",
    ),  # Llama 3
    151643: (_LIKE_LLAMA % "", {END_OF_TEXT: 151643}, END_OF_TEXT),  # Qwen
}
"""By the number of ranks, of which each encoding that was published has its own: (pattern, special tokens, the one that
ends a text). The file itself holds none of this."""


def load_tokenizer(path: str, end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer at `path`, or `bytes`. end_of_text: the token that ends a document, where it is not the usual one.

    Raises ValueError when it cannot be read, a package is missing, or no token ends a document.
    """
    if path == BYTES:
        if end_of_text is not None:
            raise ValueError(f"end_of_text={end_of_text!r} is of tokenizers with a vocabulary: byte 0 ends a document")
        return ByteTokenizer()
    file = _file_of(user_path(path))
    try:
        data = file.read_bytes()
        beside = file.with_name(CONFIG).read_bytes() if file.with_name(CONFIG).is_file() else b"{}"
        own = Path(f"{file}.json").read_bytes() if Path(f"{file}.json").is_file() else None
    except OSError as error:
        raise ValueError(f"{path}: the tokenizer cannot be read: {error}") from None
    if not data:
        raise ValueError(f"{path}: the file is empty, so no tokenizer")
    config = _object(beside, str(file.with_name(CONFIG)))
    end = end_of_text or _content(config.get("eos_token"))
    if end_of_text is not None:
        config["eos_token"] = end_of_text
    try:
        if data.lstrip()[:1] == b"{":
            return JsonTokenizer(data, end, config)
        if _RANK.match(data):
            return TiktokenTokenizer(data, end_of_text, None if own is None else _object(own, f"{file}.json"))
        return SentencePieceTokenizer(data, end, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Its files in a folder of their own, which load_tokenizer reads; nothing for bytes. Of a tokenizer that was there
    before, nothing stays."""
    for old in folder.iterdir() if folder.is_dir() else ():
        if old.name not in tokenizer.files:
            old.unlink()
    if tokenizer.files:
        folder.mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer.files.items():
        with replacing(folder / name) as file:
            file.write(data)


def ids_of(tokenizer: Tokenizer, data: bytes) -> np.ndarray:
    """int64, of a text of any length in UTF-8; a long one in the parts that `cut` makes. Raises UnicodeDecodeError."""
    parts = []
    while data:
        end = cut(data)
        parts.append(np.array(tokenizer.encode(data[:end].decode("utf-8")), np.int64))
        data = data[end:]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: there is no tokenizer: neither a file nor a folder (looked from {Path.cwd()})")
    found = next((sorted(path.glob(name))[0] for name in _IN_FOLDERS if any(path.glob(name))), None)
    if found is None:
        raise ValueError(f"{path} holds no tokenizer, none of {', '.join(_IN_FOLDERS)}")
    return found


class JsonTokenizer:
    """tokenizer.json, read with the `tokenizers` package. Names of special tokens in a text are those tokens, as in
    Transformers. It neither cuts nor pads, whatever the file asks for."""

    kind = "tokenizers"

    def __init__(self, data: bytes, end: str | None, config: dict[str, Any]) -> None:
        try:
            self._tokenizer = package.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"no tokenizer of the tokenizers package: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = self._tokenizer.token_to_id
        end = end or next((name for name in _USUAL_ENDS if known(name) is not None), None)
        self.end_id = _end_id(end, None if end is None else known(end))
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.digest = _digest(self.kind, data, self.end_id)
        self.files: Mapping[str, bytes] = {"tokenizer.json": data, CONFIG: _json(config | {"eos_token": end})}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(_checked(text), add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoded.ids for encoded in found]

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def bytes_per_token(self) -> np.ndarray | None:
        decoders = _types(json.loads(self._tokenizer.to_str())["decoder"])
        width: Callable[[str], int]
        if "ByteLevel" in decoders:
            width = len  # a letter of the token is a byte of the text
        elif decoders & {"Metaspace", "ByteFallback"}:
            width = _piece_bytes
        else:
            return None
        sizes_V = np.zeros(self.vocab_size, np.int64)
        for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            sizes_V[number] = width(token)
        for number, added in self._tokenizer.get_added_tokens_decoder().items():
            sizes_V[number] = 0 if added.special else len(added.content.encode())
        return sizes_V


class TiktokenTokenizer:
    """Ranks of byte pairs, read with tiktoken. Names of special tokens in a text are text.

    own: what FILE.json says of an encoding that is not a published one: pattern, special_tokens, end_of_text.
    """

    kind = "tiktoken"

    def __init__(self, data: bytes, end: str | None, own: dict[str, Any] | None) -> None:
        tiktoken = require("tiktoken", "a tiktoken file")
        try:
            pairs = (line.split() for line in data.splitlines() if line)
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        except ValueError as error:
            raise ValueError(f"no lines of base64 and rank: {error}") from None
        pattern, special, usual = _encoding(len(ranks), own)
        self._sizes = {rank: len(token) for token, rank in ranks.items()}
        try:
            self._encoding = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        except Exception as error:  # of its Rust part
            raise ValueError(f"tiktoken does not take it: {error}") from None
        self.end_id = _end_id(end or usual, special.get(end or usual))
        self.vocab_size = max(*ranks.values(), *special.values()) + 1
        settings = _json({"pattern": pattern, "special_tokens": special, "end_of_text": end or usual})
        self.digest = _digest(self.kind, data + settings, self.end_id)
        self.files: Mapping[str, bytes] = {"tokenizer.tiktoken": data, "tokenizer.tiktoken.json": settings}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoding.encode_ordinary(_checked(text))
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        known = [number for number in map(int, ids) if number in self._sizes or number == self.end_id]
        text: str = self._encoding.decode(known)
        return text

    def bytes_per_token(self) -> np.ndarray:
        sizes_V = np.zeros(self.vocab_size, np.int64)
        sizes_V[list(self._sizes)] = list(self._sizes.values())
        return sizes_V


class SentencePieceTokenizer:
    """A SentencePiece model. Where it has no bytes to fall back on, what it does not know becomes one unknown token."""

    kind = "sentencepiece"

    def __init__(self, data: bytes, end: str | None, config: dict[str, Any]) -> None:
        sentencepiece = require("sentencepiece", "a SentencePiece model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:  # of its C++ part
            raise ValueError(
                f"neither JSON, nor lines of base64 and rank, nor a SentencePiece model: {error}"
            ) from None
        self.vocab_size = self._model.vocab_size()
        if end is None and self._model.eos_id() >= 0:
            end = self._model.id_to_piece(self._model.eos_id())
        number = None if end is None else self._model.piece_to_id(end)
        self.end_id = _end_id(end, None if number == self._model.unk_id() else number)
        self.digest = _digest(self.kind, data, self.end_id)
        self.files: Mapping[str, bytes] = {"tokenizer.model": data, CONFIG: _json(config | {"eos_token": end})}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(_checked(text))
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.encode([_checked(text) for text in texts])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._model.decode([number for number in map(int, ids) if number < self.vocab_size])
        return text

    def bytes_per_token(self) -> np.ndarray:
        model = self._model
        no_text = [number for number in range(self.vocab_size) if model.is_control(number)]
        sizes_V = np.array([_piece_bytes(model.id_to_piece(number)) for number in range(self.vocab_size)], np.int64)
        sizes_V[no_text] = 0
        sizes_V[model.unk_id()] = 1  # of a text that it stands for, nobody knows how long it was
        return sizes_V


def require(package: str, what: str) -> Any:
    """An optional package. Raises ValueError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{what} is read with {package}, which is not installed: {install('data')}") from None


def _encoding(ranks: int, own: dict[str, Any] | None) -> tuple[str, dict[str, int], str]:
    if own is None and ranks in _KNOWN_RANKS:
        return _KNOWN_RANKS[ranks]
    if own is None:
        raise ValueError(
            f"{ranks} ranks are of no published encoding, and the file holds no pattern: write FILE.json beside it, "
            '{"pattern": ..., "special_tokens": {"<|endoftext|>": ID}, "end_of_text": "<|endoftext|>"}'
        )
    try:
        return str(own["pattern"]), {str(k): int(v) for k, v in own["special_tokens"].items()}, str(own["end_of_text"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"its FILE.json must have pattern, special_tokens and end_of_text: {error!r}") from None


def _end_id(name: str | None, number: int | None) -> int:
    if number is None:
        asked = f"the token {name!r} is not in it" if name else f"it says no eos_token, and has none of {_USUAL_ENDS}"
        raise ValueError(f"nothing to end a document with: {asked}; name a token of it as end_of_text")
    return number


def _checked(text: str) -> str:
    """Without half surrogates, which a prompt on the command line may hold and UTF-8 does not."""
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")


def _piece_bytes(piece: str) -> int:
    return 1 if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece) else len(piece.replace("\u2581", " ").encode())


def _types(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_types(part) for part in decoder.get("decoders", [])))


def _content(token: Any) -> str | None:
    """tokenizer_config.json has a name, or a mapping with it."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name}: not a JSON object")
    return values


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1).encode()


def _digest(kind: str, data: bytes, end_id: int) -> str:
    digest = hashlib.sha256(f"{kind} {end_id} ".encode())
    digest.update(data)
    return digest.hexdigest()
