# SPDX-License-Identifier: Apache-2.0
"""Corpora: splits, content hashes, and the sentence that each mistake gets."""

import dataclasses
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from research.core.config import config_hash, from_json, to_json
from research.data.sources import (
    Corpus,
    CorpusError,
    Jsonl,
    Mixture,
    Stdlib,
    Synthetic,
    TextFolder,
    Tfds,
    parts,
)
from research.data.sources import stdlib as stdlib_room
from research.data.sources.base import assign
from research.data.sources.text_folder import cut

CORPORA = [
    Stdlib(),
    Tfds("name/config", text_field="body", train_split="train[:90%]"),
    TextFolder("texts", pattern="*.md"),
    Jsonl("a.jsonl", text_field="question"),
    Synthetic(vocab_size=7),
    Mixture((Jsonl("a"), Mixture((Synthetic(), Stdlib()), (1, 3))), (0.5, 2.0)),
]


def both(corpus, cache) -> tuple[list[str], list[str]]:
    train, validation = (list(corpus.documents(split, cache_dir=cache)) for split in ("train", "validation"))
    return train, validation


@pytest.mark.parametrize("corpus", CORPORA, ids=lambda c: type(c).__name__)
def test_a_corpus_is_a_setting(corpus):
    assert isinstance(corpus, Corpus)
    again = from_json(json.loads(json.dumps(to_json(corpus))), Corpus)
    assert again == corpus and config_hash(again) == config_hash(corpus) and hash(again) == hash(corpus)


def test_whole_and_real_weights_are_one_setting():
    assert config_hash(Mixture((Synthetic(), Stdlib()), (1, 3))) == config_hash(
        Mixture((Synthetic(), Stdlib()), (1.0, 3.0))
    )


# --- the standard library -----------------------------------------------------------------------


def test_stdlib_is_prepared_once_split_by_path_and_whole(cache):
    corpus = Stdlib()
    train, validation = both(corpus, cache)
    inventory = corpus.inventory()
    names = [name for name, _ in stdlib_room._files()]
    assert inventory.bytes > 8_000_000 and inventory.files == len(train) + len(validation) == len(names)
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    share = sum(map(len, validation)) / (sum(map(len, validation)) + sum(map(len, train)))
    assert 0.05 < share < 0.10
    texts = Counter(stdlib_room.decode(path.read_bytes()) for _, path in stdlib_room._files())
    assert texts == Counter(train + validation)


@pytest.fixture
def tiny_library(tmp_path, monkeypatch):
    """A standard library of six modules, one of them in Latin-1 and one undecodable by its own cookie."""
    root = tmp_path / "lib"
    for name, raw in {
        "a.py": b"x = 1\n",
        "pkg/b.py": b"y = 2\n",
        "c.py": b"# -*- coding: latin-1 -*-\n# \xe9\n",
        "d.py": b"# \xff\xfe broken\n",
        "e.py": b"\xef\xbb\xbfz = 3\n",
        "f.py": b"# coding: no-such-codec\n",
        "test/g.py": b"no\n",
        "pkg/tests/h.py": b"no\n",
        "site-packages/i.py": b"no\n",
        "readme.txt": b"no\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    monkeypatch.setattr(stdlib_room.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_stdlib_decodes_as_python_does_and_falls_back_to_latin_1(tiny_library, tmp_path):
    train, validation = both(Stdlib(), tmp_path)
    assert validation and train
    assert sorted(train + validation) == sorted(
        [
            "x = 1\n",
            "y = 2\n",
            "# -*- coding: latin-1 -*-\n# é\n",
            "# ÿþ broken\n",
            "z = 3\n",
            "# coding: no-such-codec\n",
        ]
    )


def test_stdlib_is_known_by_paths_and_contents(tiny_library, tmp_path):
    before = Stdlib().inventory().content_hash
    assert before == Stdlib().inventory().content_hash
    (tiny_library / "a.py").rename(tiny_library / "a2.py")
    renamed = Stdlib().inventory().content_hash
    (tiny_library / "a2.py").write_bytes(b"x = 2\n")
    os.utime(tiny_library / "a2.py", (1, 1))
    assert len({before, renamed, Stdlib().inventory().content_hash}) == 3


@pytest.mark.parametrize("damage", ["shorten", "remove", "flip"])
def test_stdlib_half_prepared_or_damaged_is_made_anew(tiny_library, tmp_path, damage, caplog):
    whole = both(Stdlib(), tmp_path)
    record = next((tmp_path / "corpora").rglob("*train.array_record*"))
    raw = record.read_bytes()
    if damage == "shorten":
        record.write_bytes(raw[: len(raw) // 2])
    elif damage == "remove":
        record.unlink()
    else:
        record.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    assert both(Stdlib(), tmp_path) == whole
    assert "damaged" in caplog.text


def test_stdlib_without_source_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_room.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(CorpusError, match="no .py files.*use TextFolder or Jsonl"):
        Stdlib().fingerprint(tmp_path)


# --- folders ------------------------------------------------------------------------------------


def test_folder_splits_by_path_alone(folder, cache, tmp_path):
    train, validation = both(TextFolder(str(folder), validation_fraction=0.2), cache)
    assert len(train) + len(validation) == 40 and 2 <= len(validation) <= 16
    for path in folder.iterdir():  # the same names with other contents split alike
        (tmp_path / path.name).write_text(path.name)
    _, names = both(TextFolder(str(tmp_path), validation_fraction=0.2), cache)
    assert [(folder / name).read_text() for name in names] == validation


@pytest.mark.parametrize("text", ["word " * 2000, "line\n" * 9000, "x" * 5000, "para\n\n" * 300, "ab" * 64])
def test_a_single_file_gives_both_splits_and_loses_nothing(tmp_path, cache, text):
    (tmp_path / "one.txt").write_text(text)
    train, validation = both(TextFolder(str(tmp_path)), cache)
    assert train and validation
    assert Counter(train + validation) == Counter(cut(text, size=min(max(len(text) // 256, 64), 4096)))
    assert "".join(cut(text, size=64)) == text
    assert both(TextFolder(str(tmp_path / "one.txt")), cache) == (train, validation)


def test_shakespeare_splits_as_expected(cache):
    shared = Path(os.environ.get("LAB_SHARED", Path(__file__).parents[2].parent / "shared"))
    path = shared / "data" / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("no shared data")
    train, validation = both(TextFolder(str(path.parent)), cache)
    share = sum(map(len, validation)) / sum(map(len, train + validation))
    assert sum(map(len, train + validation)) == 1115394 and 0.02 < share < 0.10


def test_folder_mistakes(tmp_path, cache):
    with pytest.raises(CorpusError, match="There is no folder .*nowhere"):
        TextFolder(str(tmp_path / "nowhere")).fingerprint(cache)
    with pytest.raises(CorpusError, match=r"no file that matches pattern='\*\*/\*.txt'"):
        TextFolder(str(tmp_path)).fingerprint(cache)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(CorpusError, match="are empty: add text"):
        TextFolder(str(tmp_path)).documents("train", cache_dir=cache)
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(CorpusError, match="holds 1 document, .*at least two"):
        TextFolder(str(tmp_path)).documents("train", cache_dir=cache)
    (tmp_path / "a.txt").write_bytes(b"\xff" * 999)
    with pytest.raises(CorpusError, match="a.txt is not utf-8 text .*set encoding"):
        list(TextFolder(str(tmp_path)).documents("train", cache_dir=cache))
    with pytest.raises(CorpusError, match="'nonsense' is not an encoding"):
        list(TextFolder(str(tmp_path), encoding="nonsense").documents("train", cache_dir=cache))
    with pytest.raises(CorpusError, match="is not a file pattern"):
        TextFolder(str(tmp_path), pattern="").fingerprint(cache)
    with pytest.raises(CorpusError, match="between 0 and 1; given 1"):
        TextFolder("x", validation_fraction=1.0)
    with pytest.raises(CorpusError, match="splits train and validation; 'test'"):
        TextFolder(str(tmp_path)).documents("test", cache_dir=cache)


def test_folder_fingerprint_follows_content_not_place(tmp_path, cache):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.txt").write_text("same" * 100)
    first, second = (TextFolder(str(tmp_path / name)).fingerprint(cache) for name in ("a", "b"))
    (tmp_path / "b" / "t.txt").write_text("Same" * 100)
    os.utime(tmp_path / "b" / "t.txt", (1, 1))
    assert first == second != TextFolder(str(tmp_path / "b")).fingerprint(cache)


def test_a_split_is_never_empty():
    assert assign([0.9, 0.5, 0.7], fraction=0.1, what="x") == ["train", "validation", "train"]
    assert assign([0.01, 0.02], fraction=0.1, what="x") == ["validation", "train"]


# --- JSON lines ---------------------------------------------------------------------------------


def jsonl(path: Path, *lines: str | bytes) -> Jsonl:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return Jsonl(str(path))


def test_jsonl_reads_every_text_once_and_equal_texts_together(tmp_path, cache):
    texts = [f"text {i % 50}\n" for i in range(100)]
    corpus = jsonl(tmp_path / "a.jsonl", *(json.dumps({"text": text}) for text in texts), "", json.dumps({"text": ""}))
    train, validation = both(dataclasses.replace(corpus, validation_fraction=0.2), cache)
    assert Counter(train + validation) == Counter(texts) and not set(train) & set(validation)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": ', "Line 2 of .* is not JSON .*mend or remove that line"),
        ("[1]", "Line 2 of .* is a JSON list, not an object"),
        ('{"body": "x", "a": 1}', r"Line 2 of .* has no field 'text' \(its fields: a, body\)"),
        ('{"text": 3}', "Line 2 of .* has 3 in 'text', which is not text"),
        (b'{"text": "\xff"}', "Line 2 of .* is not UTF-8"),
        ('{"text": "\\ud800"}', "Line 2 of .* half of a surrogate pair"),
    ],
)
def test_jsonl_names_the_bad_line(tmp_path, cache, line, sentence):
    corpus = jsonl(tmp_path / "a.jsonl", '{"text": "fine"}', line)
    with pytest.raises(CorpusError, match=sentence):
        corpus.documents("train", cache_dir=cache)


def test_jsonl_missing_or_empty(tmp_path, cache):
    with pytest.raises(CorpusError, match="There is no file"):
        Jsonl(str(tmp_path / "none.jsonl")).fingerprint(cache)
    with pytest.raises(CorpusError, match="holds 0 documents"):
        jsonl(tmp_path / "empty.jsonl", "").documents("train", cache_dir=cache)


# --- TFDS ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set that TFDS prepared as ArrayRecord, with a train and a test split."""
    import tensorflow_datasets as tfds

    class Verses(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "verses"
        VERSION = tfds.core.Version("1.0.0")
        code_path = None
        url_infos = {}

        def _info(self):
            features = tfds.features.FeaturesDict({"verse": tfds.features.Text(), "number": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features, description="Verses.")

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(50), "test": self._generate_examples(5)}

        def _generate_examples(self, count):
            for number in range(count):
                yield number, {"verse": f"vérse {number} of {count}", "number": number}

    root = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    Verses(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root


def test_tfds_reads_a_prepared_data_set(prepared, cache):
    corpus = Tfds("verses", text_field="verse", validation_split="test", data_dir=str(prepared))
    train, validation = both(corpus, cache)
    assert sorted(train) == sorted(f"vérse {i} of 50" for i in range(50))
    assert sorted(validation) == sorted(f"vérse {i} of 5" for i in range(5))
    half = dataclasses.replace(corpus, train_split="train[:50%]")
    assert len(both(half, cache)[0]) == 25 and half.fingerprint(cache) != corpus.fingerprint(cache)
    carved = dataclasses.replace(corpus, validation_split="", validation_fraction=0.2)
    train, validation = both(carved, cache)
    assert validation and Counter(train + validation) == Counter(f"vérse {i} of 50" for i in range(50))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"name": "other"},
            "'other' is not prepared under .*run `tfds build other --file_format=array_record",
        ),
        ({"name": "verses:2.0.0"}, "'verses:2.0.0' is not prepared"),
        ({"text_field": "text"}, "has no feature 'text': set text_field to one of number, verse"),
        ({"text_field": "number"}, "holds int(64)? values, not text"),
        ({"train_split": "learn"}, "has no split 'learn': it has test, train"),
        ({"train_split": "train[:0]"}, "is empty|cannot be opened"),
    ],
)
def test_tfds_mistakes(prepared, cache, change, sentence):
    corpus = dataclasses.replace(
        Tfds("verses", text_field="verse", validation_split="test", data_dir=str(prepared)), **change
    )
    with pytest.raises(CorpusError, match=sentence):
        corpus.fingerprint(cache)
        list(corpus.documents("train", cache_dir=cache))


def test_tfds_prepared_in_another_format_says_so(tmp_path, cache):
    (tmp_path / "verses" / "1.0.0").mkdir(parents=True)
    (tmp_path / "verses" / "1.0.0" / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(CorpusError, match="is prepared as tfrecord, and array_record is needed"):
        Tfds("verses", data_dir=str(tmp_path)).fingerprint(cache)


# --- synthetic text and mixtures ----------------------------------------------------------------


def test_synthetic_entropy_is_what_the_true_model_gets(cache):
    corpus = Synthetic(vocab_size=12, num_symbols=200_000, document_length=40, seed=3)
    rows, start, end = corpus.transitions(), corpus.stationary(), 1 / corpus.document_length
    np.testing.assert_allclose(start @ rows, start, atol=1e-12)
    nats, targets = 0.0, 0
    for text in corpus.documents("train", cache_dir=cache):
        ids = np.frombuffer(text.encode(), np.uint8) - ord("!")
        nats -= math.log(start[ids[0]]) + np.log(rows[ids[:-1], ids[1:]] * (1 - end)).sum() + math.log(end)
        targets += len(ids) + 1
    assert nats / targets == pytest.approx(corpus.entropy_rate(), rel=0.01)  # 200k draws: about 0.3 %
    assert corpus.chain_entropy() < math.log(12)


def test_synthetic_is_seeded_and_its_splits_differ(cache):
    first, again, other = (
        Synthetic(num_symbols=5000),
        Synthetic(num_symbols=5000),
        Synthetic(num_symbols=5000, seed=1),
    )
    assert both(first, cache) == both(again, cache) != both(other, cache)
    assert first.fingerprint(cache) != other.fingerprint(cache)
    train, validation = both(first, cache)
    assert 0 < len(validation) < len(train) and not set(train) & set(validation)
    large = "".join(Synthetic(vocab_size=500, num_symbols=5000).documents("train", cache_dir=cache))
    assert 100 < len(set(large)) <= 500


def test_synthetic_mistakes():
    with pytest.raises(CorpusError, match="2 to 20000 symbols; given vocab_size=1"):
        Synthetic(vocab_size=1)
    with pytest.raises(CorpusError, match="concentration must be positive"):
        Synthetic(concentration=0)
    with pytest.raises(CorpusError, match="num_symbols >= document_length"):
        Synthetic(num_symbols=10)


def test_mixtures_flatten_and_check_their_weights(cache):
    a, b, c = Synthetic(seed=1), Synthetic(seed=2), Synthetic(seed=3)
    nested = Mixture((a, Mixture((b, c), (1, 3))), (1, 1))
    assert parts(nested) == [(a, 0.5), (b, 0.125), (c, 0.375)] and parts(a) == [(a, 1.0)]
    assert nested.fingerprint(cache) != Mixture((a, Mixture((b, c), (1, 2))), (1, 1)).fingerprint(cache)
    with pytest.raises(CorpusError, match="one weight for each corpus; given 2 corpora and 1 weights"):
        Mixture((a, b), (1,))
    with pytest.raises(CorpusError, match="weights of a mixture must be positive"):
        Mixture((a, b), (1, 0))
