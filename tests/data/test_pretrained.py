# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of other people's models, made here with the libraries that they come from."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from research.data.tokenizer_base import TokenizerError
from research.data.tokenizers import Pretrained, load_tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a quick test of tokens, the tokens of a test",
    "x = [1, 2]\n",
] * 4


def byte_level(folder):
    """As GPT-2 and Llama 3 have it."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|begin|>", "<|endoftext|>", "<|eot|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    library.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return library


def metaspace(folder):
    """As Llama 2 and Gemma have it: marks for spaces, bytes to fall back on; no prefix of its own."""
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    library.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False)
    )
    record = json.loads(library.to_str())
    for added in record["added_tokens"]:
        added["special"] = added["id"] < 3
    record["added_tokens"] = record["added_tokens"][:3]
    (folder / "tokenizer.json").write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    return tokenizers.Tokenizer.from_str(json.dumps(record))


def sentence_piece(folder):
    """As the first LLaMA has it: a space before every text."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=writer, vocab_size=300, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=4,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(writer.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())


KINDS = {"byte level": byte_level, "metaspace": metaspace, "sentence piece": sentence_piece}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = {}
    for name, make in KINDS.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        library = make(folder)
        found[name] = (library, Pretrained(str(folder)).train(()))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_encodes_and_decodes_as_its_library(kind, made):
    library, mine = made[kind]

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=30))
    def same(text):
        ids = mine.encode(text).tolist()
        if kind == "sentence piece":
            assert ids == library.encode(text) and mine.decode(ids) == library.decode(ids)
        else:
            assert ids == library.encode(text, add_special_tokens=False).ids
            assert mine.decode(ids) == library.decode(ids)
        if kind == "byte level":
            assert mine.decode(ids) == text and b"".join(mine.pieces[i] for i in ids) == text.encode()
        if kind == "metaspace" and "▁" not in text:
            assert b"".join(mine.pieces[i] for i in ids) == text.encode()

    same()


def test_special_ids(made):
    assert [made[kind][1].prefix for kind in KINDS] == [(0,), (), (1,)]
    assert [made[kind][1].eos_ids for kind in KINDS] == [(1, 2), (2,), (2,)]
    assert made["byte level"][1].pieces[:3] == (b"", b"", b"")


def test_text_that_looks_like_a_special_token_is_text(made):
    for kind, special in (("byte level", "<|endoftext|>"), ("metaspace", "</s>"), ("sentence piece", "</s>")):
        mine = made[kind][1]
        ids = mine.encode(f"a{special}b").tolist()
        assert not set(ids) & {1, 2} or kind == "sentence piece" and 2 not in ids
        assert mine.decode(ids).strip() == f"a{special}b"


def test_it_is_saved_whole(made, tmp_path):
    for _, mine in made.values():
        mine.save(tmp_path)
        again = load_tokenizer(tmp_path)
        assert again.fingerprint == mine.fingerprint and again.prefix == mine.prefix
        np.testing.assert_array_equal(again.encode("the fox"), mine.encode("the fox"))


def test_what_is_no_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(TokenizerError, match="has no tokenizer: give a folder with tokenizer.json"):
        Pretrained(str(tmp_path)).train(())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is no tokenizer that can be read"):
        Pretrained(str(tmp_path)).train(())
