"""Tokenizers read from files: ids as their own libraries give them, text back, bytes counted, and files that travel."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Package
from tokenizers import decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from moe_dist.data.documents import BLOCK
from moe_dist.data.tokenizer import ByteTokenizer, GrowingText, Tokenizer
from moe_dist.data.tokenizers import _KNOWN_RANKS, JsonTokenizer, ids_of, load_tokenizer, save_tokenizer

TEXTS = [
    "the cat sat on the mat\n",
    "naïve café, 日本語 и русский",
    "  two  blanks\tand\r\n\r\nlines",
    "x = f(1234567)",
] * 3


def byte_level(path: Path, special: str = "<|endoftext|>", vocab_size: int = 300) -> Path:
    """A tokenizer.json that asks for a token in front, for padding and for cutting: none of which may happen."""
    tokenizer = Package(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(f"{special} $A", special_tokens=[(special, 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def tiktoken_file(path: Path) -> Path:
    """All bytes and a few pairs, in an encoding of our own."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" t", b" the", b"at"]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    settings = {"pattern": r" ?\p{L}+|\s+|.", "special_tokens": {"<|end|>": 261}, "end_of_text": "<|end|>"}
    Path(f"{path}.json").write_text(json.dumps(settings))
    return path


def sentencepiece_file(path: Path) -> Path:
    package = pytest.importorskip("sentencepiece")
    sentences = iter([line for text in TEXTS for line in text.splitlines() if line] * 20)
    with path.open("wb") as file:
        package.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=file, vocab_size=300, byte_fallback=True, minloglevel=2
        )
    return path


def each(tmp_path: Path, kind: str) -> Tokenizer:
    if kind == "tiktoken":
        pytest.importorskip("tiktoken")
        return load_tokenizer(str(tiktoken_file(tmp_path / "own.bpe")))
    if kind == "sentencepiece":
        return load_tokenizer(str(sentencepiece_file(tmp_path / "spiece.model")))
    return load_tokenizer("bytes" if kind == "bytes" else str(byte_level(tmp_path / "tok")))


KINDS = ["bytes", "tokenizers", "tiktoken", "sentencepiece"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_encoded_is_decoded_and_its_bytes_are_counted(tmp_path: Path, kind: str) -> None:
    tokenizer = each(tmp_path, kind)
    assert tokenizer.kind == kind and 0 <= tokenizer.end_id < tokenizer.vocab_size
    sizes = tokenizer.bytes_per_token()
    assert sizes is not None and len(sizes) == tokenizer.vocab_size and sizes[tokenizer.end_id] == (kind == "bytes")
    for text, ids in zip(TEXTS, tokenizer.encode_all(TEXTS), strict=True):
        assert ids == tokenizer.encode(text) and max(ids) < tokenizer.vocab_size and tokenizer.end_id not in ids
        if kind == "sentencepiece":  # it makes one blank of several, and sets one in front
            assert tokenizer.decode(ids).split() == text.split()
            assert sizes[ids].sum() == len(tokenizer.decode(ids).encode()) + 1
        else:
            assert tokenizer.decode(ids) == text
            assert sizes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_grows_is_the_text(tmp_path: Path, kind: str) -> None:
    tokenizer = each(tmp_path, kind)
    for text in TEXTS[:4]:
        growing, ids = GrowingText(tokenizer), tokenizer.encode(text)
        parts = [growing.add(token) for token in ids]
        assert "".join(parts) + growing.end() == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(parts)
    growing = GrowingText(tokenizer)
    broken = tokenizer.encode("é")[:1] if kind == "bytes" else []
    assert "".join(map(growing.add, broken)) + growing.end() == tokenizer.decode(broken)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_files_of_a_tokenizer_are_the_tokenizer(tmp_path: Path, kind: str) -> None:
    tokenizer = each(tmp_path, kind)
    folder = tmp_path / "run" / "tokenizer"
    save_tokenizer(tokenizer, folder)
    again = load_tokenizer(str(folder))
    assert (again.kind, again.digest, again.end_id) == (tokenizer.kind, tokenizer.digest, tokenizer.end_id)
    assert again.encode_all(TEXTS) == tokenizer.encode_all(TEXTS)
    save_tokenizer(load_tokenizer(str(byte_level(tmp_path / "other", "</s>"))), folder)  # nothing of the first stays
    assert load_tokenizer(str(folder)).kind == "tokenizers"


def test_ids_are_those_of_the_libraries_themselves(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "tok")
    ours = load_tokenizer(str(folder))
    assert ours.encode("the cat sat on the mat the cat") == load_tokenizer(f"{folder}/tokenizer.json").encode(
        "the cat sat on the mat the cat"
    )
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False, truncation=False, padding=False).input_ids


def test_bytes_of_other_kinds_of_tokenizer_json() -> None:
    """Blanks as letters and bytes to fall back on, as in Llama 2: each text has one blank more, in front. Parts of
    words that are glued by their neighbours: nobody can tell."""
    tokenizer = Package(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = BpeTrainer(vocab_size=320, special_tokens=special[:2], initial_alphabet=[], show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    settings = json.loads(tokenizer.to_str())
    vocab = settings["model"]["vocab"]
    vocab |= {token: len(vocab) + number for number, token in enumerate(special[2:])}
    ours = JsonTokenizer(json.dumps(settings).encode(), None, {})
    sizes = ours.bytes_per_token()
    for text in ("the cat", "the naïve cat", "日本"):
        ids = ours.encode(text)
        assert sizes is not None and sizes[ids].sum() == len(text.encode()) + 1 and ours.decode(ids) == text
    assert sizes is not None and sizes[ours.end_id] == 0
    glued = Package(models.WordPiece({"[SEP]": 0, "a": 1, "##b": 2}, unk_token="[SEP]"))
    glued.decoder = decoders.WordPiece()
    assert JsonTokenizer(glued.to_str().encode(), None, {}).bytes_per_token() is None


def test_tiktoken_ids(tmp_path: Path) -> None:
    package = pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer(str(tiktoken_file(tmp_path / "own.bpe")))
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" t": 258, b" the": 259, b"at": 260}
    theirs = package.Encoding("x", pat_str=r" ?\p{L}+|\s+|.", mergeable_ranks=ranks, special_tokens={"<|end|>": 261})
    for text in [*TEXTS, "<|end|>"]:
        assert tokenizer.encode(text) == theirs.encode_ordinary(text)
    assert tokenizer.end_id == 261
    Path(f"{tmp_path}/own.bpe.json").unlink()
    with pytest.raises(ValueError, match=r"own.bpe: 261 ranks are of no published encoding.*write FILE.json"):
        load_tokenizer(str(tmp_path / "own.bpe"))


def test_patterns_of_published_encodings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tiktoken's own list has them; their ranks, which it would download, are left out."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *args, **options: {})
    for name, ranks in (("r50k_base", 50256), ("p50k_base", 50280), ("cl100k_base", 100256), ("o200k_base", 199998)):
        pattern, special, end = _KNOWN_RANKS[ranks]
        theirs = getattr(public, name)()
        assert pattern == theirs["pat_str"] and special[end] == theirs["special_tokens"]["<|endoftext|>"]


def test_the_end_of_a_text(tmp_path: Path) -> None:
    assert load_tokenizer(str(byte_level(tmp_path / "a", "</s>"))).end_id == 0
    folder = byte_level(tmp_path / "b", "<|mine|>")
    with pytest.raises(ValueError, match=r"nothing to end a document with: it says no eos_token"):
        load_tokenizer(str(folder))
    assert load_tokenizer(str(folder), "<|mine|>").end_id == 0
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "the"}}))
    named = load_tokenizer(str(folder))
    assert named.decode([named.end_id]) == "the" and named.digest != load_tokenizer(str(folder), "<|mine|>").digest
    with pytest.raises(ValueError, match=r"the token '<x>' is not in it"):
        load_tokenizer(str(folder), "<x>")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("tokenizer.json", b"{}", "no tokenizer of the tokenizers package"),
        ("tokenizer.json", b"{", "no tokenizer of the tokenizers package"),
        ("t.tiktoken", b"AA== 0\nA 1\n", "no lines of base64 and rank"),
        ("empty", b"", "the file is empty"),
        ("tokenizer.model", b"\x00\x01", "sentencepiece|SentencePiece"),
    ],
)
def test_what_is_no_tokenizer(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    if name.endswith(".tiktoken"):
        pytest.importorskip("tiktoken")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(str(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path}/{name}: ") and "\n" not in str(caught.value)


def test_where_there_is_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="holds no tokenizer, none of tokenizer"):
        load_tokenizer(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(ValueError, match=r"tiktoken, which is not installed: .* pip install 'moe_dist\[data\]'"):
        load_tokenizer(str(tiktoken_file(tmp_path / "own.bpe")))


@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.sampled_from(["the", "cat.", "日本", "1234", "\n", "\r\n", "  "]), min_size=3, max_size=40))
def test_a_long_text_is_cut_where_its_tokens_end(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Parts of 64 bytes in place of a MiB: a byte-level tokenizer gives the ids of the whole."""
    folder = tmp_path_factory.getbasetemp() / "cut"
    tokenizer = load_tokenizer(str(folder if folder.is_dir() else byte_level(folder)))
    text = "the\n".join(words) + "\nthe cat sat\n" * 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_dist.data.documents.BLOCK", 64)
        assert ids_of(tokenizer, text.encode()).tolist() == tokenizer.encode(text)
    assert BLOCK == 1 << 20


def test_bytes_are_their_own_ids() -> None:
    assert ByteTokenizer().encode_all(["ab", ""]) == [[97, 98], []]
    assert np.array_equal(ids_of(ByteTokenizer(), b"ab"), [97, 98]) and len(ids_of(ByteTokenizer(), b"")) == 0
