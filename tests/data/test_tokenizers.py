# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: lossless on every text, exact in bytes, trained the same way twice, cached by content."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.config import config_hash, from_json, to_json
from research.data import tokenizers
from research.data.sentence_piece import SentencePiece
from research.data.sources import Mixture, Synthetic, TextFolder
from research.data.tokenizers import (
    Bytes,
    Characters,
    Tokenizer,
    TokenizerError,
    TokenizerSpec,
    load_tokenizer,
    sample,
    tokenizer_folder,
    train_tokenizer,
)

SPECS = [Bytes(), Characters(), SentencePiece(vocab_size=300), SentencePiece(vocab_size=290, kind="unigram")]
NASTY = [
    "",
    "\u2581",
    "\u2581\u2581 \u2581a\u2581",
    "a\u2581 b",
    "\u2585",
    "\0",
    "a\0b",
    " leading",
    "trailing ",
    "many   spaces    inside     ",
    "        ",
    "<s>",
    "</s>",
    "<unk><pad><bos><eos>",
    "<0x41>",
    "<0x0A><0xE2>",
    "\t\tx\ty",
    "\n",
    "\n\n\n  \n",
    "\r\n\r",
    "\ufeff",
    "a\ufeffb",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 \u00e9 o\u0302\u0323",
    "\ue000\U000f0000\U0010ffff\ufffe\uffff",
    "\u3000\u00a0\u200b\u2028\u2029\x0b\x0c\x85",
    "ﬁ ① Ａ ½",
    "the cat said: 漢字 и кириллица",
]


@pytest.fixture(scope="module")
def trained(folder, cache) -> dict[TokenizerSpec, Tokenizer]:
    return {spec: train_tokenizer(spec, TextFolder(str(folder)), cache_dir=cache) for spec in SPECS}


def check_lossless(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_nasty_texts_come_back(trained, spec):
    for text in NASTY:
        check_lossless(trained[spec], text)
    check_lossless(trained[spec], "".join(NASTY))
    batch = trained[spec].encode_batch(NASTY)
    for text, ids in zip(NASTY, batch, strict=True):
        np.testing.assert_array_equal(ids, trained[spec].encode(text))


@given(text=st.text() | st.text(alphabet="\u2581 \n<>s0xabc\t\r\0é\u2585"))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_text_comes_back(trained, text):
    for tokenizer in trained.values():
        check_lossless(tokenizer, text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_texts_full_of_marks_can_be_trained_on(kind):
    texts = [text + " the <s> <0x41> \u2581 cat\u2585sat " + "on a mat <unk>" * 3 for text in NASTY] * 3
    coverage = 1.0 if kind == "bpe" else 0.98  # unigram finds few pieces in so little text
    tokenizer = SentencePiece(vocab_size=340 if kind == "bpe" else 294, kind=kind, character_coverage=coverage)
    tokenizer = tokenizer.train(texts)
    assert len(set(tokenizer.pieces)) <= tokenizer.vocab_size
    for text in NASTY + texts:
        check_lossless(tokenizer, text)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_interface(trained, spec):
    tokenizer = trained[spec]
    assert isinstance(spec, TokenizerSpec)
    assert len({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}) == 3
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert not tokenizer.token_bytes[[tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]].any()
    assert spec.size in (None, tokenizer.vocab_size)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("cat"), tokenizer.eos_id]) == "cat"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) in ("é", "\ufffd")
    assert {bytes([b]) for b in range(256)} <= set(tokenizer.pieces)
    with pytest.raises(TokenizerError, match=f"{tokenizer.vocab_size} is not in the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(TokenizerError, match="half of a surrogate pair at character 1"):
        tokenizer.encode("a\ud800")
    again = from_json(json.loads(json.dumps(to_json(spec))), TokenizerSpec)
    assert again == spec and config_hash(again) == config_hash(spec)


def test_indentation_and_newlines_are_single_tokens(tmp_path):
    text = "def f(x):\n    if x:\n        return x\n\n" * 50
    tokenizer = SentencePiece(vocab_size=290).train([text])
    assert b"    " in tokenizer.pieces and b"\n" in tokenizer.pieces
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_characters_keep_the_frequent_ones():
    tokenizer = Characters(min_count=2, max_characters=2).train(["aaabbbccd"])
    assert tokenizer.pieces[-2:] == (b"a", b"b") and tokenizer.vocab_size == 3 + 256 + 2
    check_lossless(tokenizer, "abcd")
    assert len(tokenizer.encode("é")) == 2


@pytest.mark.parametrize("spec", SPECS[1:], ids=str)
def test_training_is_deterministic_and_quiet(folder, tmp_path, trained, spec, capfd):
    again = train_tokenizer(spec, TextFolder(str(folder)), cache_dir=tmp_path)
    assert again.fingerprint == trained[spec].fingerprint
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_cached_by_content_of_corpus_and_spec(folder, cache, trained, tmp_path, monkeypatch):
    corpus, spec = TextFolder(str(folder)), SPECS[2]
    monkeypatch.setattr(SentencePiece, "train", lambda *_: pytest.fail("trained although cached"))
    assert train_tokenizer(spec, corpus, cache_dir=cache).fingerprint == trained[spec].fingerprint
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_text(path.read_text())
    assert tokenizer_folder(spec, TextFolder(str(other)), cache_dir=cache) == tokenizer_folder(
        spec, corpus, cache_dir=cache
    )
    (other / "00.txt").write_text("changed")
    folders = {
        tokenizer_folder(spec, corpus, cache_dir=cache),
        tokenizer_folder(spec, TextFolder(str(other)), cache_dir=cache),
        tokenizer_folder(SPECS[3], corpus, cache_dir=cache),
    }
    assert len(folders) == 3


def test_a_damaged_tokenizer_is_trained_anew(folder, tmp_path):
    corpus, spec = TextFolder(str(folder)), Characters()
    whole = train_tokenizer(spec, corpus, cache_dir=tmp_path)
    path = tokenizer_folder(spec, corpus, cache_dir=tmp_path) / "tokenizer.json"
    text = path.read_text()
    for damaged in ("", text[: len(text) // 2], text.replace('"Yw=="', '"WA=="'), "{}"):
        path.write_text(damaged)
        assert train_tokenizer(spec, corpus, cache_dir=tmp_path).fingerprint == whole.fingerprint
        assert path.read_text() == text


def test_save_and_load(trained, tmp_path):
    for number, tokenizer in enumerate(trained.values()):
        place = tmp_path / str(number)
        place.mkdir()
        tokenizer.save(place)
        again = load_tokenizer(place)
        assert again.fingerprint == tokenizer.fingerprint and type(again) is type(tokenizer)
        np.testing.assert_array_equal(again.encode("a cat 漢"), tokenizer.encode("a cat 漢"))
    assert len({tokenizer.fingerprint for tokenizer in trained.values()}) == len(trained)


def test_the_sample_is_bounded_and_shared_by_weight(tmp_path):
    a = Synthetic(vocab_size=10, num_symbols=300_000, document_length=20)
    b = Synthetic(vocab_size=200, num_symbols=300_000, document_length=20, seed=1)  # 3 bytes each
    assert "".join(sample(a, limit=None, cache_dir=tmp_path)) == "".join(a.documents("train", cache_dir=tmp_path))
    text = "".join(sample(Mixture((a, b), (3, 1)), limit=200_000, cache_dir=tmp_path))
    ascii_bytes = sum(c < "\x7f" for c in text)
    assert 135_000 < ascii_bytes < 165_000
    assert 40_000 < len(text.encode()) - ascii_bytes < 60_000
    assert text == "".join(sample(Mixture((a, b), (3, 1)), limit=200_000, cache_dir=tmp_path))


def test_mistakes(folder, cache, tmp_path):
    corpus = TextFolder(str(folder))
    with pytest.raises(TokenizerError, match="too small for a bpe vocabulary of 5000: set vocab_size to [0-9]+"):
        train_tokenizer(SentencePiece(vocab_size=5000), corpus, cache_dir=cache)
    with pytest.raises(TokenizerError, match="too small for a unigram vocabulary of 5000: set vocab_size"):
        train_tokenizer(SentencePiece(vocab_size=5000, kind="unigram"), corpus, cache_dir=cache)
    with pytest.raises(TokenizerError, match="cannot hold the text's characters: set vocab_size to [0-9]+ or more"):
        train_tokenizer(SentencePiece(vocab_size=265), corpus, cache_dir=cache)
    with pytest.raises(TokenizerError, match="too little text"):
        SentencePiece(vocab_size=300).train(["\n\n"])
    with pytest.raises(TokenizerError, match="'bpe' or 'unigram'; given 'word'"):
        SentencePiece(vocab_size=300, kind="word")
    with pytest.raises(TokenizerError, match="needs at least 262 ids .* given vocab_size=64"):
        SentencePiece(vocab_size=64)
    with pytest.raises(TokenizerError, match="character_coverage must lie in 0.98 to 1"):
        SentencePiece(vocab_size=300, character_coverage=2.0)
    with pytest.raises(TokenizerError, match="must be at least 1"):
        Characters(min_count=0)
    assert not list(Path(cache).rglob("*.tmp"))


def test_the_vocabulary_named_as_largest_works(folder, cache):
    corpus = TextFolder(str(folder))
    with pytest.raises(TokenizerError) as caught:
        train_tokenizer(SentencePiece(vocab_size=5000), corpus, cache_dir=cache)
    most = int(str(caught.value).split("set vocab_size to ")[1].split()[0])
    assert train_tokenizer(SentencePiece(vocab_size=most), corpus, cache_dir=cache).vocab_size == most


def test_a_cached_tokenizer_needs_no_library(folder, cache, trained):
    """Loading, decoding and counting bytes start without SentencePiece, TFDS and Grain."""
    place = tokenizer_folder(SPECS[2], TextFolder(str(folder)), cache_dir=cache)
    code = (
        "import sys; from research.data.tokenizers import load_tokenizer; from pathlib import Path;"
        f"t = load_tokenizer(Path({str(place)!r})); t.decode(range(t.vocab_size)); t.fingerprint;"
        "sys.exit(sorted({'sentencepiece', 'tensorflow_datasets', 'grain'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


def test_module_exports():
    assert all(hasattr(tokenizers, name) for name in tokenizers.__all__)
