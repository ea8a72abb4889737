# SPDX-License-Identifier: Apache-2.0
"""Conversations in rows: each whole and once an epoch, learned as if alone, and only what the assistant says."""

import json
import random
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.config import config_hash, from_json, to_json
from research.core.sharding import MeshSpec, make_mesh
from research.core.types import Precision, Source, UserError
from research.data.chat import PLAIN, TAGGED, Message
from research.data.chat_packing import ChatRows, best_fit, tokenised
from research.data.chat_source import ChatSource
from research.data.pipeline import DataError, TextSource
from research.data.sources import (
    ChatCorpus,
    Conversations,
    CorpusError,
    Mixture,
    PlainText,
    Synthetic,
    TextFolder,
)
from research.data.tokenizers import Bytes, Characters, SentencePiece
from research.objectives.next_token import NextToken
from tests import tiny
from tests.data.batches import NAMES, as_numpy, assert_resumes, assert_same
from tests.data.conftest import some_text

LENGTH = 128


def said(seed: int) -> list[dict[str, str]]:
    """From two to six turns, from a few characters to more than a row of them."""
    draw = random.Random(seed)
    roles = ["system"] * (draw.random() < 0.3) + ["user", "assistant"] * draw.choice([1, 1, 2, 3])
    return [
        {"role": role, "content": some_text(seed=seed * 9 + i, words=draw.choice([0, 1, 2, 4, 8]))}
        for i, role in enumerate(roles)
    ]


def write(path, *records) -> str:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(lines))
    return str(path)


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Conversations:
    records = [{"messages": said(seed)} for seed in range(90)]
    return Conversations(write(tmp_path_factory.mktemp("chats") / "chats.jsonl", *records), validation_fraction=0.2)


@pytest.fixture
def source(chats) -> ChatSource:
    return ChatSource(chats, Bytes(), TAGGED, batch_size=8, sequence_length=LENGTH)


def epoch_of(stream, number: int = 0) -> dict[str, np.ndarray]:
    count = len(stream._rows[0])
    return stream.assemble(number * count, (number + 1) * count)


def encoded(source, cache) -> list[tuple[np.ndarray, np.ndarray]]:
    """What can be learned from each conversation of the split in rows of the source's length."""
    tokenizer, found = source.tokenizer_for(cache), []
    for messages in source.corpus.conversations(source.split, cache_dir=cache):
        ids, trained = source.template.encode(tokenizer, messages)
        ids, trained = ids[: source.sequence_length + 1], trained[: source.sequence_length + 1]
        if trained[1:].any():
            found.append((ids, trained))
    return found


def segments(rows) -> list[tuple[list[int], list[int], list[bool]]]:
    """Each conversation of some rows: inputs, targets and which of these count."""
    found = []
    for row in range(len(rows["tokens"])):
        for number in range(1, rows["segment_ids"][row].max() + 1):
            held = rows["segment_ids"][row] == number
            assert (np.diff(np.flatnonzero(held)) == 1).all()
            np.testing.assert_array_equal(rows["positions"][row][held], np.arange(held.sum()))
            columns = (rows[name][row][held].tolist() for name in ("tokens", "targets", "weights"))
            found.append(tuple(columns))
    return found


# --- what rows hold -----------------------------------------------------------------------------


def test_a_source_is_a_setting(source):
    assert isinstance(source, Source) and isinstance(source.corpus, ChatCorpus)
    mixed = replace(source, corpus=Mixture((source.corpus, PlainText(Synthetic())), (3, 1)))
    for one in (source, mixed):
        again = from_json(json.loads(json.dumps(to_json(one))), Source)
        assert again == one and config_hash(again) == config_hash(one)


def test_each_conversation_once_an_epoch_whole_and_only_the_assistant_counts(source, context, cache):
    stream = source.start(context)
    wanted = []
    for ids, trained in encoded(source, cache):
        last = np.flatnonzero(trained).max()
        wanted.append((tuple(ids[:last]), tuple(ids[1 : last + 1]), tuple(trained[1 : last + 1])))
    for number in range(2):
        rows = epoch_of(stream, number)
        assert Counter(tuple(map(tuple, one)) for one in segments(rows)) == Counter(wanted)
        padding = rows["segment_ids"] == 0
        assert not any(rows[name][padding].any() for name in NAMES)
        np.testing.assert_array_equal(
            rows["target_bytes"], stream.tokenizer.token_bytes[rows["targets"]] * rows["weights"]
        )
    orders = [
        [stream._index[i][2] for i in range(n * len(stream._rows[0]), (n + 1) * len(stream._rows[0]))] for n in (0, 1)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_what_counts_is_what_the_assistant_says(source, context, cache):
    """Every turn of the assistant's with its end, read off the targets; markers and users' words weigh nothing."""
    stream = replace(source, sequence_length=1024).start(context)
    learned = Counter()
    for _, targets, weights in segments(epoch_of(stream)):
        kept = [t for t, weight in zip(targets, weights, strict=True) if weight]
        learned["".join("#" if t == 2 else stream.tokenizer.decode([t]) for t in kept)] += 1
    wanted = Counter(
        "".join(f"{content}#" for role, content in messages if role == "assistant")
        for messages in source.corpus.conversations("train", cache_dir=cache)
    )
    assert learned == wanted and stream.info["train_cut"] == stream.info["train_lost"] == 0


def test_packed_is_unpacked(source, context, cache):
    """The loss over packed rows is the sum over conversations, each in a row of its own."""
    mesh = make_mesh(MeshSpec(data=1))
    in_order = replace(source, shuffle=False)
    stream = in_order.start(replace(context, mesh=mesh))
    params = jax.jit(lambda: tiny.MODEL.init_params(jax.random.key(0), Precision()))()

    @jax.jit
    def loss(batch):
        (term,) = NextToken()(tiny.MODEL.bind(params, {}, Precision()), {}, batch, None).terms.values()
        return term.value

    def alone(many):
        rows = {name: np.zeros((8, LENGTH), np.int32) for name in ("tokens", "targets", "segment_ids")}
        rows["positions"] = np.broadcast_to(np.arange(LENGTH, dtype=np.int32)[None], (8, LENGTH)).copy()
        rows |= {name: np.zeros((8, LENGTH), np.float32) for name in ("weights", "target_bytes")}
        for row, (ids, trained) in enumerate(many):
            where = slice(0, len(ids) - 1)
            rows["tokens"][row, where], rows["targets"][row, where] = ids[:-1], ids[1:]
            rows["weights"][row, where], rows["segment_ids"][row, where] = trained[1:], 1
        return rows

    with jax.set_mesh(mesh):
        packed = [jax.device_get(loss(batch)) for batch in stream.batches()]
        many = encoded(source, cache)
        unpacked = [jax.device_get(loss(alone(many[i : i + 8]))) for i in range(0, len(many), 8)]
    assert len(packed) < len(unpacked)
    (value, weight), (want, want_weight) = (np.sum(np.array(found, float), axis=0) for found in (packed, unpacked))
    assert weight == want_weight == stream.info["train_trained"]
    assert value == pytest.approx(want, rel=1e-5)


def test_what_does_not_fit_is_cut_or_left_out_and_told(tmp_path, context, cache):
    pairs = [(10, 10), (10, 300), (10, 21), (10, 20), (40, 10), (31, 1), (29, 9)]
    records = [{"ask": chr(65 + i) * a, "say": "y" * b} for i, (a, b) in enumerate(pairs)]
    path = write(tmp_path / "a.jsonl", *records)
    corpus = Conversations(path, prompt_field="ask", response_field="say", validation_path=path)
    source = ChatSource(corpus, Bytes(), PLAIN, batch_size=8, sequence_length=31)
    stream = source.start(context)
    info = stream.info
    # BOS and the prompt come before the first target that counts: the prompts of 40 and 31 leave no room for any
    assert (info["train_cut"], info["train_lost"], info["train_documents"]) == (3, 2, 7)
    assert info["train_trained"] == 11 + 21 + 21 + 21 + 2 and info["train_rows"] == 5
    assert info["train_filled"] == pytest.approx((21 + 31 * 4) / (31 * 5))
    assert info["validation_trained"] == info["train_trained"]
    for length, least in ((10, 11), (5, 11)):
        with pytest.raises(DataError, match=f"within {length} tokens; in one it does after {least}: set sequence_len"):
            replace(source, sequence_length=length).start(context)
    assert len(replace(source, sequence_length=11).start(context)._rows[0]) == 4


@given(st.integers(1, 40), st.lists(st.integers(1, 40), max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_fullest_row_that_fits(capacity, sizes):
    sizes = np.minimum(np.array(sizes, int), capacity)
    rows = best_fit(sizes, capacity=capacity)
    room = []
    for size in sorted(sizes.tolist(), reverse=True):
        enough = [row for row, left in enumerate(room) if left >= size]
        if not enough:
            room.append(capacity)
        row = min(enough, key=room.__getitem__, default=len(room) - 1)
        room[row] -= size
    held = np.bincount(rows, weights=sizes, minlength=len(room)) if len(rows) else []
    assert sorted(capacity - np.array(held)) == sorted(room)


# --- streams ------------------------------------------------------------------------------------


def test_what_a_batch_holds_and_hosts_rows_join_into_it(source, context):
    stream = source.start(context)
    whole = as_numpy(stream.next(None, 5))
    assert {name: (x.shape, x.dtype) for name, x in whole.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in source.batch_shapes().items()
    }
    for hosts in (1, 2, 8):
        rows = 8 // hosts
        shares = [stream.assemble(40 + rows * host, 40 + rows * (host + 1)) for host in range(hosts)]
        assert_same({name: np.concatenate([share[name] for share in shares]) for name in NAMES}, whole)
    meshes = MeshSpec(data=2, fsdp=2), MeshSpec(data=1, fsdp=4, tensor=2)
    for spec in meshes:
        assert_same(source.start(replace(context, mesh=make_mesh(spec))).next(None, 5), whole)


@pytest.mark.parametrize("k", [0, 1, 7])
def test_resuming_at_a_step_continues_the_stream(source, context, k):
    assert_resumes(source, context, k)


def test_a_state_of_other_data_names_what_changed(source, context, chats):
    state = source.start(context).get_state()
    shorter = replace(TAGGED, between=())
    for what, changed in {
        "the corpus": replace(source, corpus=replace(chats, validation_fraction=0.3)),
        "the template": replace(source, template=shorter),
        "the packing": replace(source, sequence_length=256),
        "the tokenizer": replace(source, tokenizer=SentencePiece(vocab_size=300)),
    }.items():
        with pytest.raises(DataError, match=f"not those of the checkpoint.*{what} .was "):
            changed.start(context).set_state(state)
    text = TextSource(chats, Bytes(), batch_size=8, sequence_length=LENGTH)
    with pytest.raises(DataError, match="not the state of a text stream"):
        source.start(context).set_state(text.start(context).get_state())


def test_validation_is_one_pass_whatever_the_seed(source, context):
    stream = source.validation().start(context)
    batches = [as_numpy(batch) for batch in stream.batches()]
    assert sum(batch["weights"].sum() for batch in batches) == stream.info["validation_trained"]
    other = source.validation(batch_size=16).start(replace(context, seed=99))
    np.testing.assert_array_equal(as_numpy(other.next(None, 0))["tokens"][:8], batches[0]["tokens"])


def test_text_among_conversations_by_weight_and_nothing_of_it_is_lost(source, context, folder, cache):
    plain = PlainText(TextFolder(str(folder)))
    stream = replace(source, corpus=Mixture((source.corpus, plain), (0.7, 0.3))).start(context)
    drawn = [stream._index[row][0] for row in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.005)
    alone = replace(source, corpus=plain, sequence_length=16).start(context)
    rows = epoch_of(alone)
    tokens = alone._rows[0].tokens
    assert rows["weights"].sum() == tokens.num_tokens - tokens.num_documents == alone.info["train_trained"]
    assert rows["target_bytes"].sum() == tokens.num_bytes and alone.info["train_cut"] == 0
    counted = Counter(rows["targets"][rows["weights"] > 0].tolist())
    everything = Counter(tokens.flat.tolist())
    del everything[alone.tokenizer.bos_id]
    assert counted == everything


def test_text_must_be_said_to_be_text(source):
    for corpus, name in ((Synthetic(), "Synthetic"), (Mixture((source.corpus, Synthetic()), (1, 1)), "Synthetic")):
        with pytest.raises(CorpusError, match=f"{name} is a corpus of text, not of conversations: write PlainText"):
            replace(source, corpus=corpus)


def test_tokenizers_are_trained_on_what_is_said(source, cache):
    tokenizer = replace(source, tokenizer=Characters()).tokenizer_for(cache)
    texts = "".join(source.corpus.documents("train", cache_dir=cache))
    assert {piece.decode() for piece in tokenizer.pieces[259:]} == set(texts)


@pytest.mark.parametrize("name", ["trained.bin", "notes.npy", "tokens.bin", "chat.json"])
def test_damaged_tokens_are_made_anew(chats, tmp_path, caplog, name):
    def rows():
        tokens = tokenised(chats, tokenizer=Bytes().train(()), template=TAGGED, split="train", cache_dir=tmp_path)
        return tokens, ChatRows(tokens, sequence_length=64)

    before = rows()
    (file,) = tmp_path.rglob(name)
    raw = file.read_bytes()
    file.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    after = rows()
    assert "damaged" in caplog.text
    np.testing.assert_array_equal(before[0].notes, after[0].notes)
    assert before[1].trained == after[1].trained and len(before[1]) == len(after[1])


# --- files of conversations ---------------------------------------------------------------------


def test_equal_questions_fall_on_one_side_and_blank_answers_are_passed_over(tmp_path, cache):
    records = [{"q": f"question {i % 30}", "a": f"answer {i}"} for i in range(90)]
    path = write(tmp_path / "a.jsonl", *records, b"  ", {"q": "none", "a": ""})
    corpus = Conversations(path, prompt_field="q", response_field="a", system="Be brief.", validation_fraction=0.3)
    splits = [list(corpus.conversations(split, cache_dir=cache)) for split in ("train", "validation")]
    asked = [{messages[1].content for messages in found} for found in splits]
    assert not asked[0] & asked[1] and len(splits[0]) + len(splits[1]) == 90 and all(splits)
    assert all(messages[0] == Message("system", "Be brief.") for found in splits for messages in found)
    plain = [list(replace(corpus, system="").conversations(s, cache_dir=cache)) for s in ("train", "validation")]
    assert [[m[1:] for m in found] for found in splits] == plain
    first = splits[0][0]
    assert next(corpus.documents("train", cache_dir=cache)) == "\n".join(content for _, content in first)


def test_a_file_for_validation(tmp_path, cache):
    paths = [write(tmp_path / f"{n}.jsonl", *({"messages": said(s)} for s in range(n, n + 9))) for n in (1, 20)]
    corpus = Conversations(paths[0], validation_path=paths[1])
    for split, path in zip(("train", "validation"), paths, strict=True):
        both = [
            replace(corpus, path=path, validation_path="").conversations(s, cache_dir=cache)
            for s in ("train", "validation")
        ]
        assert Counter(corpus.conversations(split, cache_dir=cache)) == Counter([*both[0], *both[1]])
    prints = {corpus.fingerprint(cache), replace(corpus, validation_path="").fingerprint(cache)}
    prints |= {
        replace(corpus, system="a").fingerprint(cache),
        Conversations(*paths[:1], prompt_field="a", response_field="b").fingerprint(cache),
    }
    assert len(prints) == 4
    write(tmp_path / "20.jsonl", {"messages": said(1)})
    assert corpus.fingerprint(cache) not in prints


TURN = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{", r"Line 2 of .*a.jsonl is not JSON \(.*mend or remove that line"),
        (b"\xff\xfe", "Line 2 of .* is not UTF-8"),
        (b"[1]", "Line 2 of .* is a JSON list, not an object"),
        ({"text": "a"}, r"Line 2 of .* no field 'messages' \(its fields: text\): set messages_field, or prompt_field"),
        ({"messages": "a"}, "Line 2 of .* has in 'messages' no list of messages: write "),
        ({"messages": ["a"]}, "Line 2 of .* has in 'messages' no list of messages"),
        ({"messages": [TURN, {"role": "user"}]}, "Message 2 of line 2 of .* has no field 'content'"),
        ({"messages": [TURN | {"content": None}]}, "Message 1 of line 2 of .* has null in 'content', which is not t"),
        ({"messages": [TURN, TURN | {"role": "tool"}]}, "Message 2 of line 2 of .* role 'tool'; roles are "),
        ({"messages": [TURN | {"role": "user"}]}, "Line 2 of .* has no assistant's message"),
        ({"messages": [TURN | {"content": "\ud800"}]}, "Message 1 of line 2 of .* half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, cache, line, sentence):
    corpus = Conversations(write(tmp_path / "a.jsonl", {"messages": [TURN]}, line))
    with pytest.raises(CorpusError, match=sentence):
        corpus.conversations("train", cache_dir=cache)


def test_mistakes(tmp_path, cache, source):
    with pytest.raises(CorpusError, match="prompt_field and response_field go together; given 'q' and ''"):
        Conversations("a.jsonl", prompt_field="q")
    with pytest.raises(CorpusError, match="There is no file 'none.jsonl'"):
        Conversations("none.jsonl").fingerprint(cache)
    with pytest.raises(CorpusError, match="holds 1 document, .*at least two"):
        Conversations(write(tmp_path / "a.jsonl", {"messages": [TURN]})).conversations("train", cache_dir=cache)
    pairs = Conversations(write(tmp_path / "b.jsonl", {"q": "a"}), prompt_field="q", response_field="a")
    with pytest.raises(CorpusError, match="no field 'a' .its fields: q.: set response_field"):
        pairs.conversations("train", cache_dir=cache)
    with pytest.raises(UserError, match="splits train and validation; 'test'"):
        replace(source, split="test")


def test_gsm8k_as_it_is_shipped(shared_data, context, cache):
    train, test = (shared_data / "gsm8k" / f"{name}.jsonl" for name in ("train", "test"))
    if not train.is_file():
        pytest.skip("no GSM8K")
    corpus = Conversations(str(train), prompt_field="question", response_field="answer", validation_path=str(test))
    source = ChatSource(corpus, Bytes(), TAGGED, batch_size=8, sequence_length=2048)
    stream = source.start(context)
    info = stream.info
    assert (info["train_documents"], info["validation_documents"]) == (7473, 1319)
    assert info["train_cut"] == info["train_lost"] == 0 and info["train_filled"] > 0.98
    answers = sum(len(messages[1].content.encode()) for messages in corpus.conversations("train", cache_dir=cache))
    assert info["train_trained"] == answers + 7473
    batch = as_numpy(stream.next(None, 0))
    kept = batch["targets"][0][batch["weights"][0] > 0]
    assert stream.tokenizer.decode(kept).count("####") == (kept == 2).sum() == batch["segment_ids"][0].max()
    carved = replace(corpus, validation_path="")
    assert 250 < sum(1 for _ in carved.conversations("validation", cache_dir=cache)) < 500
