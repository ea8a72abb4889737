# SPDX-License-Identifier: Apache-2.0
"""Beam search against all sequences there are; the best of several samples; text as it comes."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.types import Precision, UserError
from research.infer.beam import Beam, beam_search
from research.infer.best import best_of, mean_log_prob
from research.infer.engine import Result
from research.infer.sampling import sampling
from research.infer.text import Texts
from tests import tiny

VOCAB, STOP = 5, 4
MODEL = replace(tiny.MODEL, vocab_size=VOCAB)
PROMPT = [1, 0, 3]


@pytest.fixture(scope="module")
def policy():
    params = jax.jit(lambda: MODEL.init_params(jax.random.key(3), Precision()))()
    params["unembedding"]["w"] = 3 * params["unembedding"]["w"]  # some sequences much likelier than others
    return MODEL.bind(params, {}, Precision())


@pytest.fixture(scope="module")
def everything(policy):
    """All complete sequences of at most four tokens, with the sums of their log-probabilities."""
    rows = np.array([[*PROMPT, *rest] for rest in itertools.product(range(VOCAB), repeat=4)], np.int32)
    batch = {"tokens": rows, "positions": np.tile(np.arange(7), (len(rows), 1)), "segment_ids": np.ones_like(rows)}
    logits = jax.jit(lambda: policy.logits(policy.forward(batch).hidden))()
    steps = np.take_along_axis(jax.nn.log_softmax(logits)[:, 2:-1], rows[:, 3:, None], axis=2)[..., 0]
    found = {}
    for row, step in zip(rows[:, 3:].tolist(), steps, strict=True):
        end = row.index(STOP) + 1 if STOP in row else 4
        found[tuple(row[:end])] = float(np.sum(step[:end]))
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0, 2.0])
def test_a_wide_beam_finds_what_a_search_of_everything_finds(policy, everything, alpha):
    ranked = sorted(everything, key=lambda tokens: -everything[tokens] / len(tokens) ** alpha)
    found = beam_search(MODEL, policy, np.array(PROMPT), Beam(VOCAB**3, 4, alpha, stop=(STOP,)))
    assert [tuple(one.tokens) for one in found[:20]] == ranked[:20]
    for one in found[:20]:
        assert one.log_prob == pytest.approx(everything[tuple(one.tokens)], abs=1e-4)


def test_with_several_stop_ids_there_is_enough_to_go_on_with(policy, everything):
    """Were all candidates of a step ends, the search would be over; a high alpha prefers long sequences."""
    found = beam_search(MODEL, policy, np.array(PROMPT), Beam(1, 4, 5.0, stop=(1, 2, 3, 4)))
    assert [len(one.tokens) for one in found] == [4] and set(found[0].tokens[:3]) == {0}


def test_a_beam_of_one_is_greedy_and_transforms_apply(policy, everything):
    (one,) = beam_search(MODEL, policy, np.array(PROMPT), Beam(1, 4))
    greedy, allowed = [], sampling(allowed=(0, 2))
    for _ in range(4):
        row = np.array([[*PROMPT, *greedy]], np.int32)
        batch = {"tokens": row, "positions": np.arange(row.shape[1])[None], "segment_ids": np.ones_like(row)}
        greedy.append(int(jnp.argmax(policy.logits(policy.forward(batch).hidden)[0, -1])))
    assert one.tokens == greedy
    for one in beam_search(MODEL, policy, np.array(PROMPT), Beam(3, 4), sampling=allowed):
        assert set(one.tokens) <= {0, 2}
    with pytest.raises(UserError, match="width and max_tokens of at least 1"):
        Beam(0, 4)
    with pytest.raises(UserError, match="no repetition_penalty"):
        beam_search(MODEL, policy, np.array(PROMPT), Beam(1, 4), sampling=sampling(repetition_penalty=1.2))
    with pytest.raises(UserError, match="ids from 0 to 9"):
        beam_search(MODEL, policy, np.array([9, 0]), Beam(1, 4))


def test_the_best_of_several():
    results = [Result(0, 0, [1], [-2.0]), Result(0, 1, [1, 2], [-1.0, -1.5]), Result(1, 0, [3], [-9.0])]
    assert mean_log_prob(results[1]) == -1.25
    assert {n: one.sample for n, one in best_of(results).items()} == {0: 1, 1: 0}
    assert best_of(results, score=lambda one: -len(one.tokens))[0].sample == 0


def test_text_ends_before_a_stop_string_and_shows_nothing_that_may_change():
    texts = Texts(lambda ids: bytes(ids).decode("utf-8", errors="replace"), ["END", "##"])
    grow = lambda text: Result(0, 0, list(text if isinstance(text, bytes) else text.encode()))  # noqa: E731
    assert [texts.shown(grow(text)) for text in ("a", "aE", "aEN", "aEx", "a#")] == ["a", "a", "a", "aEx", "a"]
    assert texts.shown(grow("é".encode()[:1])) == "" and texts.shown(grow("é")) == "é"
    whole = grow("one ## two END")
    assert texts.ended(whole) and texts.text(whole) == "one " and not texts.ended(grow("one #"))
    pieces = {1: "▁the", 2: "▁quick", 3: "▁fox", 4: "es"}  # decoded as SentencePiece does
    decode = lambda ids: "".join(pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")  # noqa: E731
    assert Texts(decode, prompts=[[1, 2]]).text(Result(0, 0, [3, 4])) == " foxes"
    assert Texts(decode, ["fox"], prompts=[[1], [1, 3]]).text(Result(1, 0, [4, 3])) == "es "
    last = grow("aE")
    last.finish = "length"
    assert texts.shown(last) == "aE"
