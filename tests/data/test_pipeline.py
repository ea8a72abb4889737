# SPDX-License-Identifier: Apache-2.0
"""Streams: the same global batches for any hosts and resumption, mixed by weight, padded at the end."""

import dataclasses
import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from research.core.config import config_hash, from_json, to_json
from research.core.sharding import MeshSpec, batch_sharding, make_mesh
from research.core.types import Source, UserError
from research.data.pipeline import DataError, TextSource
from research.data.sources import Mixture, Synthetic, TextFolder
from research.data.tokenizers import Bytes, Characters, SentencePiece
from tests.data import two_processes
from tests.data.batches import NAMES, as_numpy, assert_resumes, assert_same


@pytest.fixture
def source(folder) -> TextSource:
    return TextSource(TextFolder(str(folder)), SentencePiece(vocab_size=300), batch_size=8, sequence_length=16)


def test_a_source_is_a_setting(source):
    assert isinstance(source, Source)
    again = from_json(json.loads(json.dumps(to_json(source))), Source)
    assert again == source and config_hash(again) == config_hash(source)


def test_what_a_batch_holds(source, context):
    stream = source.start(context)
    batch = stream.next(None, 0)
    assert set(batch) == NAMES
    for name, array in batch.items():
        assert array.shape == (8, 16) and array.sharding.is_equivalent_to(batch_sharding(context.mesh), 2)
        assert array.dtype == (np.float32 if name in ("weights", "target_bytes") else np.int32)
    batch = as_numpy(batch)
    np.testing.assert_array_equal(
        batch["target_bytes"], stream.tokenizer.token_bytes[batch["targets"]] * batch["weights"]
    )
    assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()


# --- determinism, hosts, resumption -------------------------------------------------------------


def test_a_function_of_seed_and_step_in_any_order(source, context):
    forward = [as_numpy(source.start(context).next(None, step)) for step in range(5)]
    stream = source.start(context)
    for step in (4, 0, 3, 1, 2, 2):
        assert_same(stream.next(None, step), forward[step])
    other = source.start(dataclasses.replace(context, seed=4)).next(None, 0)
    assert (np.asarray(other["tokens"]) != forward[0]["tokens"]).any()


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_rows_by_host_join_into_the_global_batch(source, context, hosts):
    """Each host assembles its rows through the function that the arrays' callback uses."""
    stream = source.start(context)
    whole = as_numpy(stream.next(None, 5))
    rows = 8 // hosts
    shares = [stream.assemble(40 + rows * host, 40 + rows * (host + 1)) for host in range(hosts)]
    assert_same({name: np.concatenate([share[name] for share in shares]) for name in NAMES}, whole)


@pytest.mark.parametrize(
    "spec",
    [MeshSpec(data=1), MeshSpec(data=2, fsdp=2), MeshSpec(tensor=2), MeshSpec(data=1, fsdp=4, tensor=2)],
    ids=str,
)
def test_every_mesh_gets_the_same_batch_and_builds_its_rows_once(source, context, spec):
    want = source.start(context).next(None, 2)
    stream = source.start(dataclasses.replace(context, mesh=make_mesh(spec)))
    built = []
    assemble = stream.assemble
    stream.assemble = lambda start, stop: built.append((start, stop)) or assemble(start, stop)
    assert_same(stream.next(None, 2), want)
    stream.close()
    rows = sorted(row for start, stop in built for row in range(start, stop) if row < 24)
    assert rows == list(range(16, 24))


@pytest.mark.slow
def test_two_processes_build_one_batch_each_its_own_rows(source, context, tmp_path):
    """Two processes of four devices hold together what one process of eight holds, and build no row twice."""
    stream = source.start(context)
    want = [as_numpy(stream.next(None, step)) for step in range(two_processes.STEPS)]
    stream.close()
    processes = two_processes.run(source, context, tmp_path)
    for spec in two_processes.SPECS:
        rows = [[], []]
        for number, process in enumerate(processes):
            held = set()
            for step, name, index, data in process["shards", spec]:
                np.testing.assert_array_equal(data, want[step][name][index], err_msg=f"{spec} {step} {name} {index}")
                first, last, _ = index[0].indices(8)
                held.update((name, 8 * step + row) for row in range(first, last))
            rows[number] = sorted({row for _, row in held})
            assert held == {(name, row) for name in NAMES for row in rows[number]}
            built = [row for start, stop in process["built", spec] for row in range(start, stop)]
            assert sorted(row for row in built if row < 8 * two_processes.STEPS) == rows[number], f"{spec}, {number}"
        assert rows[0] and rows[1] and sorted(rows[0] + rows[1]) == list(range(8 * two_processes.STEPS))


@pytest.mark.parametrize("k", [0, 1, 7, 40])
def test_resuming_at_a_step_continues_the_stream(source, context, k):
    assert_resumes(source, context, k)


def test_another_batch_size_goes_on_at_the_same_row(source, context):
    """The state counts rows: a run that continues with larger batches sees each row once."""
    stream = source.start(context)
    for step in range(3):
        stream.next(None, step)
    wide = dataclasses.replace(source, batch_size=16).start(context)
    wide.set_state(stream.get_state())
    batch = as_numpy(wide.next(None, 3))
    rest = [as_numpy(stream.next(None, step)) for step in (3, 4)]
    assert_same(batch, {name: np.concatenate([b[name] for b in rest]) for name in NAMES})
    with pytest.raises(DataError, match="Step 0 lies before"):
        wide.next(None, 0)


def test_a_state_of_other_data_names_what_changed(source, context, tmp_path):
    state = source.start(context).get_state()
    (tmp_path / "a.txt").write_text("other text\n\n" * 200)
    changes = {
        "the corpus": dataclasses.replace(source, corpus=TextFolder(str(tmp_path)), tokenizer=Bytes()),
        "the tokenizer": dataclasses.replace(source, tokenizer=Bytes()),
        "the packing": dataclasses.replace(source, sequence_length=32),
    }
    for what, changed in changes.items():
        with pytest.raises(UserError, match=f"not those of the checkpoint.*{what} .was "):
            changed.start(context).set_state(state)
    with pytest.raises(UserError, match="the seed .was 3, is 4"):
        source.start(dataclasses.replace(context, seed=4)).set_state(state)
    with pytest.raises(UserError, match="not the state of a text stream"):
        source.start(context).set_state({"step": 3})


# --- epochs, shuffling, mixtures ----------------------------------------------------------------


def rows_of(stream, start: int, stop: int) -> list[tuple[int, int, int]]:
    return [stream._index[row] for row in range(start, stop)]


def test_every_row_once_an_epoch_and_another_order_in_each(source, context):
    stream = source.start(context)
    count = len(stream._rows[0])
    epochs = [rows_of(stream, epoch * count, (epoch + 1) * count) for epoch in range(3)]
    for number, rows in enumerate(epochs):
        assert Counter(rows) == Counter((0, number, index) for index in range(count))
    orders = [tuple(index for _, _, index in rows) for rows in epochs]
    assert len({*orders, tuple(range(count))}) == 4


def test_every_transition_is_a_target_once_an_epoch(source, context):
    stream = source.start(context)
    count = len(stream._rows[0])
    for epoch in range(2):
        rows = stream.assemble(epoch * count, (epoch + 1) * count)
        tokens = stream._rows[0].tokens
        assert rows["weights"].sum() == tokens.num_tokens - tokens.num_documents
        assert rows["target_bytes"].sum() == tokens.num_bytes
        counted = Counter(rows["targets"][rows["weights"] > 0].tolist())
        everything = Counter(tokens.flat.tolist())
        del everything[stream.tokenizer.bos_id]
        assert counted == everything


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), (1, 2, 5), (0.02, 0.98)])
def test_mixture_rows_follow_the_weights(cache, context, weights):
    corpora = tuple(Synthetic(vocab_size=8, num_symbols=3000, seed=i) for i in range(len(weights)))
    source = TextSource(Mixture(corpora, weights), Bytes(), batch_size=8, sequence_length=16)
    stream = source.start(context)
    drawn = rows_of(stream, 0, 4000)
    shares = np.bincount([part for part, _, _ in drawn]) / len(drawn)
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=0.003)
    for part in range(len(weights)):  # each corpus goes through its own epochs, missing no row
        count, own = len(stream._rows[part]), [(e, i) for p, e, i in drawn if p == part]
        assert set(own) == {(n // count, i) for n, (_, i) in enumerate(own)} and len(set(own)) == len(own)
    again = source.start(context)
    assert_same(again.next(None, 9), stream.assemble(72, 80))


def test_equal_corpora_in_a_mixture_are_shuffled_apart(cache, context):
    corpus = Synthetic(vocab_size=8, num_symbols=3000)
    stream = TextSource(Mixture((corpus, corpus), (1, 1)), Bytes(), batch_size=8, sequence_length=16).start(context)
    drawn = rows_of(stream, 0, 60)
    assert [i for p, _, i in drawn if p == 0] != [i for p, _, i in drawn if p == 1]


# --- streams in order ---------------------------------------------------------------------------


def test_validation_is_one_pass_padded_at_the_end(source, context):
    stream = source.validation().start(context)
    batches = [as_numpy(batch) for batch in stream.batches()]
    tokens = stream._rows[0].tokens
    assert len(batches) == stream.num_batches == -(-len(stream._rows[0]) // 8)
    assert sum(batch["weights"].sum() for batch in batches) == tokens.num_tokens - tokens.num_documents
    assert sum(batch["target_bytes"].sum() for batch in batches) == tokens.num_bytes
    beyond = as_numpy(stream.next(None, stream.num_batches))
    assert not beyond["weights"].any() and not beyond["segment_ids"].any()


def test_validation_does_not_depend_on_the_seed_or_batch_size(source, context):
    want = [as_numpy(b) for b in source.validation().start(context).batches()]
    other = source.validation(batch_size=16).start(dataclasses.replace(context, seed=99))
    got = [as_numpy(b) for b in other.batches()]
    for name in ("tokens", "weights"):
        first, second = (np.concatenate([b[name] for b in batches]) for batches in (want, got))
        shorter = min(len(first), len(second))
        np.testing.assert_array_equal(first[:shorter], second[:shorter])


@pytest.mark.parametrize("num_batches", [1, 2, 3, 1000])
def test_a_few_batches_are_spread_and_do_not_repeat(source, context, num_batches):
    stream = dataclasses.replace(source, shuffle=False, num_batches=num_batches).start(context)
    seen = []
    fill = stream._rows[0].fill
    stream._rows[0].fill = lambda out, at, *, epoch, index: (
        seen.append((epoch, index)) or fill(out, at, epoch=epoch, index=index)
    )
    rows = len(stream._rows[0])
    stream.assemble(0, stream.num_batches * 8)
    assert stream.num_batches == min(num_batches, -(-rows // 8))
    assert len(set(seen)) == len(seen) == min(num_batches * 8, rows) and seen == sorted(seen)
    assert seen[-1][1] - seen[0][1] > rows * 0.8


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), (3, 1), (0.011, 0.989)])
def test_a_mixture_in_order_repeats_nothing(context, weights):
    corpora = tuple(Synthetic(vocab_size=8, num_symbols=n, seed=n) for n in (3000, 20000))
    source = TextSource(Mixture(corpora, weights), Bytes(), batch_size=8, sequence_length=16)
    stream = source.validation().start(context)
    drawn = rows_of(stream, 0, len(stream._index))
    assert len(set(drawn)) == len(drawn) and {epoch for _, epoch, _ in drawn} == {0}


# --- the background thread ----------------------------------------------------------------------


def test_the_next_batch_is_built_on_another_thread_and_errors_surface(source, context):
    stream = source.start(context)
    threads = []
    assemble = stream.assemble

    def failing(start, stop):
        threads.append(threading.current_thread().name)
        if start >= 16:
            raise RuntimeError("the disk has gone")
        return assemble(start, stop)

    stream.assemble = failing
    stream.next(None, 0)
    stream.next(None, 1)
    with pytest.raises(RuntimeError, match="the disk has gone"):
        stream.next(None, 2)
    assert any(name.startswith("data") for name in threads)
    stream.assemble = assemble
    assert_same(stream.next(None, 2), source.start(context).next(None, 2))
    stream.close()
    assert_same(stream.next(None, 3), source.start(context).next(None, 3))


# --- preparation and mistakes -------------------------------------------------------------------


def test_prepare_says_what_the_data_are(source, cache, folder):
    info = source.prepare(cache)
    files = [path.read_bytes() for path in folder.iterdir()]
    assert info.corpus_bytes == sum(map(len, files)) == info.train_bytes + info.validation_bytes
    assert info.documents == len(files) and info.vocab_size == 300
    assert info.corpus_hash == source.corpus.fingerprint(cache)
    assert info.tokenizer == source.tokenizer_for(cache).fingerprint
    assert info.train_tokens > info.train_documents * 2
    json.dumps(dataclasses.asdict(info))


def test_the_vocabulary_size_is_known_beforehand(source, cache, tmp_path):
    assert source.vocab_size(tmp_path) == 300 and not list(tmp_path.iterdir())
    assert dataclasses.replace(source, tokenizer=Bytes()).vocab_size(tmp_path) == 259
    characters = dataclasses.replace(source, tokenizer=Characters())
    assert characters.vocab_size(cache) == characters.tokenizer_for(cache).vocab_size


def test_mistakes(source, context):
    with pytest.raises(DataError, match="must be at least 1; given 0 and 16"):
        dataclasses.replace(source, batch_size=0)
    with pytest.raises(UserError, match="splits train and validation; 'test'"):
        dataclasses.replace(source, split="test")
    with pytest.raises(DataError, match="num_batches=3 is for streams in order"):
        dataclasses.replace(source, num_batches=3)
    with pytest.raises(DataError, match="endless: say how many"):
        list(source.start(context).batches())
    if jax.device_count() > 1:
        with pytest.raises(UserError, match="the 3 rows of a batch"):
            dataclasses.replace(source, batch_size=3).start(context)


def test_a_warm_start_imports_no_builder_and_no_trainer(source, context, cache, folder):
    source.start(context)
    code = f"""
import sys
from pathlib import Path
from research.core.sharding import MeshSpec, make_mesh
from research.core.types import Context
from research.data.pipeline import TextSource
from research.data.sources import TextFolder
from research.data.tokenizers import SentencePiece
corpus, spec = TextFolder({str(folder)!r}), SentencePiece(vocab_size=300)
source = TextSource(corpus, spec, batch_size=8, sequence_length=16)
source.start(Context(mesh=make_mesh(MeshSpec()), seed=3, cache_dir=Path({str(cache)!r}))).next(None, 0)
sys.exit(sorted({{"sentencepiece", "tensorflow_datasets"}} & set(sys.modules)) or 0)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
