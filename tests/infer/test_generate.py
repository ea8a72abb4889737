# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.types import Precision, UserError
from research.infer.generate import Sampling, generate
from research.models.positions import Learned
from tests import tiny

PROMPT = np.array([1, 40, 41, 42], np.int32)


@pytest.fixture(scope="module")
def bound():
    params = jax.jit(lambda: tiny.MODEL.init_params(jax.random.key(0), Precision()))()
    return tiny.MODEL.bind(params, {}, Precision())


def draw(bound, seed=0, model=tiny.MODEL, prompt=PROMPT, vocab_size=264, **settings):
    sampling = Sampling(**{"max_tokens": 6, **settings})
    return generate(bound, model, prompt, sampling=sampling, key=jax.random.key(seed), vocab_size=vocab_size)


def test_greedy_is_the_argmax_of_the_whole_forward_pass(bound):
    found = draw(bound, temperature=0.0)
    row = jnp.asarray(np.concatenate([PROMPT, found]))[None, :]
    batch = {"tokens": row, "positions": jnp.arange(row.shape[1])[None, :], "segment_ids": jnp.ones_like(row)}
    logits = jax.jit(lambda b: bound.logits(bound.forward(b).hidden))(batch)
    likeliest = jnp.argmax(logits[0, len(PROMPT) - 1 : -1], axis=-1)
    np.testing.assert_array_equal(likeliest, found)


def test_a_seed_repeats_and_another_differs(bound):
    assert np.array_equal(draw(bound, seed=1), draw(bound, seed=1))
    assert not np.array_equal(draw(bound, seed=1), draw(bound, seed=2))


def test_stop_ids_end_the_text_and_padded_ids_are_never_drawn(bound):
    first = draw(bound, temperature=0.0)
    assert len(draw(bound, temperature=0.0, stop=(int(first[2]),))) <= 2
    assert draw(bound, max_tokens=20, vocab_size=8).max() < 8


def test_what_does_not_fit_is_one_sentence(bound):
    with pytest.raises(UserError, match="table of 8 positions"):
        draw(bound, model=replace(tiny.MODEL, position=Learned(8)))
    with pytest.raises(UserError, match="prompt is empty"):
        draw(bound, prompt=np.zeros(0, np.int32))
