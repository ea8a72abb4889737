# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors, with the library as oracle."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from research.core.types import UserError
from research.hf.store import INDEX, SINGLE, Store, writing

BF16 = np.dtype(ml_dtypes.bfloat16)
ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b": np.linspace(-1, 1, 7).astype(BF16),
    "c": np.ones((5, 1), np.float16),
    "scalar": np.float32(3.5).reshape(()),
}


def write(folder, arrays=ARRAYS, **how):
    with writing(folder, {name: (x.shape, x.dtype) for name, x in arrays.items()}, **how) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


@pytest.mark.parametrize("shard_bytes", [10**9, 100, 1])
def test_what_is_written_is_what_the_library_reads(tmp_path, shard_bytes):
    write(tmp_path / "out", shard_bytes=shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == {10**9: 1, 100: 2, 1: 4}[shard_bytes]
    read = {name: array for file in files for name, array in load_file(file).items()}
    store = Store(tmp_path / "out")
    for name, array in ARRAYS.items():
        for found in (read[name], store.read(name)):
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found.astype(np.float32), array.astype(np.float32))
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in ARRAYS.values())
        assert set(index["weight_map"]) == set(ARRAYS)


def test_a_part_is_read_without_the_rest(tmp_path):
    save_file({"big": np.zeros((4000, 1000), np.float32)}, tmp_path / SINGLE)
    store = Store(tmp_path)
    assert store.shapes == {"big": ((4000, 1000), "F32")}
    tracemalloc.start()
    assert store.read("big", (slice(10, 20), slice(None))).shape == (10, 1000)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_an_interrupted_export_leaves_nothing_that_looks_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out", {"a": ((2,), BF16), "b": ((2,), BF16)}) as writer:
        writer.write("a", np.zeros(2, BF16))
        raise KeyboardInterrupt
    assert list((tmp_path / "out").iterdir()) == []
    both = {"a": ((2,), BF16), "b": ((2,), BF16)}
    with pytest.raises(ValueError, match="b was announced and not"), writing(tmp_path / "out", both) as writer:
        writer.write("a", np.zeros(2, BF16))
    with pytest.raises(ValueError, match="a was announced"), writing(tmp_path / "out", both) as writer:
        writer.write("a", np.zeros(3, BF16))
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_read_or_written_is_one_sentence(tmp_path):
    def refused(words):
        with pytest.raises(UserError, match=words):
            Store(tmp_path)

    refused("neither model.safetensors nor")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused("only pytorch_model.bin: save it as safetensors")
    save_file({"a": np.zeros(100, np.float32)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match="exists and is not empty"):
        write(tmp_path)
    whole = (tmp_path / SINGLE).read_bytes()
    for broken in (whole[:-1], whole[:20], b"", b"\xff" * 40):
        (tmp_path / SINGLE).write_bytes(broken)
        refused("is not a whole safetensors file")
    (tmp_path / SINGLE).write_bytes(whole)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE, "b": "other.safetensors"}}))
    refused("lacks other.safetensors, which its index names")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE, "b": SINGLE}}))
    refused("names b, which its file does not have")
    save_file({"a": np.zeros(100, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE, "b": "other.safetensors"}}))
    refused("a stands in model.safetensors and in other.safetensors")
    (tmp_path / INDEX).write_text("{}")
    refused("is no index of safetensors")
