# SPDX-License-Identifier: Apache-2.0
"""Packing: every transition once, rows as a pure index, and a token cache that is whole or made anew."""

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data import cache as cache_room
from research.data import packing
from research.data.cache import CacheError, cached_folder, checksum, files_hash
from research.data.packing import (
    PackingError,
    Rows,
    Tokens,
    empty_rows,
    order,
    read_tokens,
    tokenised,
    write_tokens,
)
from research.data.sources import TextFolder
from research.data.tokenizers import Bytes

TOKENIZER = Bytes().train(())


def tokens_of(lengths: list[int]) -> Tokens:
    """Documents of BOS, numbered tokens and EOS; every token but BOS (1) and EOS (2) is unique."""
    flat, offsets = [], [0]
    for length in lengths:
        flat += [1, *range(100 + offsets[-1], 100 + offsets[-1] + length), 2]
        offsets.append(len(flat))
    return Tokens(np.array(flat, np.int32), np.array(offsets, np.int64), 0)


def one(rows: Rows, *, epoch: int, index: int) -> dict[str, np.ndarray]:
    out = empty_rows(1, sequence_length=rows.sequence_length)
    rows.fill(out, 0, epoch=epoch, index=index)
    return {name: array[0] for name, array in out.items()}


CASES = dict(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), length=st.integers(1, 17))


@given(**CASES, seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_transition_is_a_target_once_an_epoch(lengths, length, seed, epoch):
    tokens = tokens_of(lengths)
    rows = Rows(tokens, sequence_length=length, seed=seed)
    found = []
    for index in range(len(rows)):
        row = one(rows, epoch=epoch, index=index)
        counts = row["weights"] > 0
        found += zip(row["tokens"][counts].tolist(), row["targets"][counts].tolist(), strict=True)
    want = []
    for start, stop in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        document = tokens.flat[start:stop].tolist()
        want += zip(document[:-1], document[1:], strict=True)
    assert sorted(found) == sorted(want)


@given(**CASES, seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_segments_and_positions(lengths, length, seed):
    rows = Rows(tokens_of(lengths), sequence_length=length, seed=seed)
    for index in range(len(rows)):
        row = one(rows, epoch=0, index=index)
        segments, positions, tokens = row["segment_ids"], row["positions"], row["tokens"]
        held = segments > 0
        assert not (np.diff(held.astype(int)) > 0).any()  # padding only at the end
        assert index == len(rows) - 1 or held.all()
        assert not tokens[~held].any() and not positions[~held].any() and not row["weights"][~held].any()
        steps = np.diff(segments[held])
        assert segments[0] == 1 and set(steps.tolist()) <= {0, 1}
        assert positions[0] == 0
        np.testing.assert_array_equal(np.diff(positions[held]), np.where(steps == 0, 1, -positions[held][:-1]))
        # a new segment starts exactly at each BOS, but for the row's first
        np.testing.assert_array_equal(np.flatnonzero(steps) + 1, np.flatnonzero(tokens[held][1:] == 1) + 1)
        # weight 0 exactly after an EOS, and where the stream ends
        ends = (tokens == 2) | ~held
        np.testing.assert_array_equal(row["weights"] == 0, ends)


def test_rows_join_into_the_stream():
    tokens = tokens_of([5, 9, 1, 30])
    rows = Rows(tokens, sequence_length=7, seed=4)
    stream = np.concatenate([tokens.flat[tokens.offsets[d] : tokens.offsets[d + 1]] for d in order(4, seed=4, epoch=2)])
    for index in range(len(rows)):
        row = one(rows, epoch=2, index=index)
        part = stream[index * 7 : index * 7 + 8]
        np.testing.assert_array_equal(np.append(row["tokens"], row["targets"][-1])[: len(part)], part)


def test_a_row_depends_on_seed_epoch_and_index_alone():
    tokens = tokens_of([20] * 30)
    first, second = (Rows(tokens, sequence_length=16, seed=1) for _ in range(2))
    wanted = [(epoch, index) for epoch in range(6) for index in range(len(first))]
    ahead = {key: one(first, epoch=key[0], index=key[1]) for key in wanted}
    for epoch, index in reversed(wanted):  # another order of asking, through evicted permutations
        for name, array in one(second, epoch=epoch, index=index).items():
            np.testing.assert_array_equal(array, ahead[epoch, index][name])
    other = Rows(tokens, sequence_length=16, seed=2)
    assert any((one(other, epoch=0, index=i)["tokens"] != ahead[0, i]["tokens"]).any() for i in range(len(other)))
    assert any((ahead[1, i]["tokens"] != ahead[0, i]["tokens"]).any() for i in range(len(first)))


def test_the_order_is_fixed_for_ever():
    """A change here would silently give resumed runs other data: it must raise packing.FORMAT."""
    assert order(8, seed=0, epoch=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert sorted(order(1000, seed=3, epoch=7).tolist()) == list(range(1000))
    assert packing.FORMAT == 1


# --- the token cache ----------------------------------------------------------------------------


def test_tokens_are_the_documents(folder, cache):
    corpus = TextFolder(str(folder))
    tokens = tokenised(corpus, tokenizer=TOKENIZER, split="train", cache_dir=cache)
    documents = list(corpus.documents("train", cache_dir=cache))
    assert tokens.num_documents == len(documents) and tokens.flat.dtype == np.uint16
    assert tokens.num_bytes == sum(len(text.encode()) for text in documents)
    for start, stop, text in zip(tokens.offsets[:-1], tokens.offsets[1:], documents, strict=True):
        ids = tokens.flat[start:stop]
        assert (ids[0], ids[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id) and TOKENIZER.decode(ids) == text


def test_batches_of_documents_change_nothing(tmp_path, monkeypatch):
    texts = ["a" * n for n in range(1, 40)] + [""]
    for name, size in (("one", 10**6), ("many", 50)):
        monkeypatch.setattr(packing, "BATCH_CHARACTERS", size)
        (tmp_path / name).mkdir()
        write_tokens(tmp_path / name, iter(texts), tokenizer=TOKENIZER, split="train")
    one, many = (read_tokens(tmp_path / name) for name in ("one", "many"))
    np.testing.assert_array_equal(one.flat, many.flat)
    np.testing.assert_array_equal(one.offsets, many.offsets)
    assert one.num_documents == 39


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizer = Bytes().train(())
    tokenizer.pieces = tokenizer.pieces + (b"x",) * 70_000
    write_tokens(tmp_path, ["abc"], tokenizer=tokenizer, split="train")
    assert read_tokens(tmp_path).flat.dtype == np.uint32


@pytest.mark.parametrize("file", ["tokens.bin", "offsets.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["remove", "shorten", "flip", "empty"])
def test_damaged_tokens_are_made_anew(folder, tmp_path, caplog, file, damage):
    corpus = TextFolder(str(folder))
    whole = np.array(tokenised(corpus, tokenizer=TOKENIZER, split="train", cache_dir=tmp_path).flat)
    path = next((tmp_path / "tokens").rglob(file))
    raw = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        at = len(raw) // 2
        flipped = raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]
        path.write_bytes({"shorten": raw[:-2], "flip": flipped, "empty": b""}[damage])
    again = tokenised(corpus, tokenizer=TOKENIZER, split="train", cache_dir=tmp_path)
    np.testing.assert_array_equal(again.flat, whole)
    assert "is damaged" in caplog.text
    assert [p for p in (tmp_path / "tokens").iterdir() if p.name.startswith(".")] == []


def test_an_empty_split_is_one_sentence(tmp_path):
    with pytest.raises(PackingError, match="The validation split holds no text"):
        write_tokens(tmp_path, ["", ""], tokenizer=TOKENIZER, split="validation")


# --- cached folders -----------------------------------------------------------------------------


def load(folder):
    text = (folder / "a").read_text()
    if text != "whole":
        raise ValueError("not whole")
    return text


def test_what_a_killed_process_left_is_not_taken(tmp_path):
    def killed(folder):
        (folder / "a").write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(tmp_path / "x", build=killed, load=load)
    assert list(tmp_path.iterdir()) == []
    left = tmp_path / ".x.1.abc.tmp"  # as after kill -9, when nothing is tidied
    left.mkdir()
    (left / "a").write_text("ha")
    assert cached_folder(tmp_path / "x", build=lambda f: (f / "a").write_text("whole") and None, load=load) == "whole"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    def full(folder):
        (folder / "a").write_text("wh")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CacheError, match="The disk is full while writing .*: free some space or choose another"):
        cached_folder(tmp_path / "x", build=full, load=load)
    assert list(tmp_path.iterdir()) == []


def test_a_write_limit_reached_midway_leaves_nothing(folder, tmp_path):
    """The real thing, in a process whose files may not grow beyond 200 kB."""
    code = f"""
import resource, signal
from pathlib import Path
from research.data.cache import CacheError
from research.data.packing import tokenised
from research.data.sources import Stdlib, Synthetic
from research.data.tokenizers import Bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for corpus in (Synthetic(), Stdlib()):
    try:
        tokenised(corpus, tokenizer=Bytes().train(()), split="train", cache_dir=Path({str(tmp_path)!r}))
    except CacheError as error:
        print(error)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.count("free some space or choose another cache folder") == 2, done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.parent != tmp_path]


def test_a_disk_that_loses_data_is_one_sentence(tmp_path):
    with pytest.raises(CacheError, match="does not read back as it was written"):
        cached_folder(tmp_path / "x", build=lambda f: (f / "a").write_text("wh") and None, load=load)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_read_is_kept_and_one_sentence(tmp_path):
    def refused(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "x").mkdir()
    with pytest.raises(CacheError, match="cannot be read .Permission denied."):
        cached_folder(tmp_path / "x", build=lambda f: None, load=refused)
    assert (tmp_path / "x").is_dir()


def test_a_cache_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be written"):
        cached_folder(tmp_path / "file" / "x", build=lambda f: None, load=load)


def test_two_processes_at_once(tmp_path):
    def slow(folder):
        (folder / "a").write_text("whole")
        cached_folder(tmp_path / "x", build=lambda f: (f / "a").write_text("whole") and None, load=load)

    assert cached_folder(tmp_path / "x", build=slow, load=load) == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_hashes_of_large_corpora_are_kept_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_room, "ALWAYS_HASH_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_text("x" * 100)
    first = files_hash([("a", path)], cache_dir=tmp_path)
    cache_room._hashes.clear()
    monkeypatch.setattr(cache_room, "_hash_contents", lambda files: pytest.fail("read again"))
    assert files_hash([("a", path)], cache_dir=tmp_path) == first


def test_checksums_see_length_and_content(monkeypatch):
    data = np.arange(1000, dtype=np.uint16)
    assert len({checksum(data), checksum(data[:-1]), checksum(data[::-1].copy())}) == 3
    monkeypatch.setattr(cache_room, "CHECKSUM_BLOCK", 16)
    monkeypatch.setattr(cache_room, "CHECKSUM_BLOCKS", 4)
    assert checksum(data) != checksum(data[:-1]) and checksum(data) == checksum(data.copy())
