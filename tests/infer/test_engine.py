# SPDX-License-Identifier: Apache-2.0
"""The engine against the plainest generation there is: the whole sequence anew for every token."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import sharding
from research.core.sharding import MeshSpec
from research.core.types import Precision, UserError
from research.infer import generate as programs
from research.infer.beam import Beam, beam_search
from research.infer.engine import Engine, Request
from research.infer.generate import Settings
from research.infer.sampling import Sampling, sampling
from research.models.attention import Attention
from research.models.cache import CacheSpec
from research.models.positions import Learned
from tests import tiny

MODEL = replace(tiny.MODEL, num_layers=3, attention=(Attention(4, 2, window=6), Attention(4)))
PROMPTS = [np.random.default_rng(n).integers(0, 264, n) for n in (3, 17, 1, 9, 30, 5)]
GREEDY = Settings(sampling(temperature=0), steps=4)


@functools.cache
def policy_of(model=MODEL):
    return model.bind(jax.jit(lambda: model.init_params(jax.random.key(0), Precision()))(), {}, Precision())


@functools.partial(jax.jit, static_argnums=1)
def log_probs_of(policy, settings, row, length):
    """Of every token of a padded row, given those before it, under the distribution that would be drawn from."""
    batch = {
        "tokens": row,
        "positions": jnp.arange(row.shape[1])[None],
        "segment_ids": jnp.arange(row.shape[1])[None] < length,
    }
    hidden = policy.forward({**batch, "segment_ids": batch["segment_ids"].astype(jnp.int32)}).hidden
    return settings.distribution(policy.logits(hidden[0]))


def recomputed(policy, prompt, count):
    """Greedy tokens, each from a forward pass over all before it."""
    row = np.zeros((1, 64), np.int32)
    row[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        row[0, at] = int(jnp.argmax(log_probs_of(policy, Sampling(), row, at)[at - 1]))
    return row[0, len(prompt) : len(prompt) + count].tolist()


def run(requests, settings=GREEDY, *, slots=3, model=MODEL, policy=None, **how):
    found = list(Engine(model, slots=slots, settings=settings).run(policy or policy_of(model), requests, **how))
    return {(result.request, result.sample): result for result in found}


@pytest.mark.parametrize("windows", ["ring", "full"])
def test_greedy_is_recomputing_everything_whatever_enters_and_leaves(windows):
    settings = replace(GREEDY, cache=CacheSpec(windows=windows))
    requests = [Request(prompt, 3 + 5 * number) for number, prompt in enumerate(PROMPTS)]
    found = run(requests, settings)
    for number, request in enumerate(requests):
        result = found[number, 0]
        assert result.tokens == recomputed(policy_of(), request.prompt, request.max_tokens)
        assert result.finish == "length" and len(result.log_probs) == len(result.tokens)


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours():
    settings = Settings(sampling(temperature=0.9, top_p=0.9), steps=5)
    requests = [Request(prompt, 8, seed=number, samples=2) for number, prompt in enumerate(PROMPTS)]
    together = run(requests, settings)
    for number, request in enumerate(requests):
        alone = run([request], settings, slots=1)
        for sample in range(2):
            assert alone[0, sample].tokens == together[number, sample].tokens
        assert together[number, 0].tokens != together[number, 1].tokens


def test_log_probabilities_are_those_of_the_training_forward_pass():
    settings = Settings(sampling(temperature=0.8, top_k=40, min_p=0.01), steps=6)
    requests = [Request(prompt, 10, seed=number) for number, prompt in enumerate(PROMPTS)]
    for (number, _), result in run(requests, settings).items():
        row, prompt = np.zeros((1, 64), np.int32), PROMPTS[number]
        row[0, : len(prompt) + 10] = [*prompt, *result.tokens]
        wanted = log_probs_of(policy_of(), settings.sampling, row, len(prompt) + 10)
        places = np.arange(len(prompt) - 1, len(prompt) + 9)
        np.testing.assert_allclose(result.log_probs, wanted[places, result.tokens], atol=1e-4)


def test_a_penalty_knows_the_prompt_and_what_was_drawn():
    settings = Settings(sampling(temperature=0, repetition_penalty=1e6), steps=4)
    for (number, _), result in run([Request(prompt, 12) for prompt in PROMPTS], settings).items():
        everything = [*PROMPTS[number], *result.tokens]
        assert len(set(everything)) == len(set(PROMPTS[number])) + len(result.tokens)


def test_prompts_of_a_group_are_prefilled_once(monkeypatch):
    rows = []
    real = programs.prefill
    monkeypatch.setattr(
        programs,
        "prefill",
        lambda m, p, tokens, length, s: rows.append(int(np.sum(length > 0))) or real(m, p, tokens, length, s),
    )
    found = run([Request(PROMPTS[1], 5, samples=7), Request(PROMPTS[0], 5, samples=4)], Settings(sampling(), steps=4))
    assert sum(rows) == 2 and len(found) == 11


def test_stop_ids_and_stop_strings_end_a_sequence():
    plain = run([Request(prompt, 12) for prompt in PROMPTS])
    first, second = plain[0, 0].tokens[4], plain[1, 0].tokens[6]
    found = run([Request(prompt, 12) for prompt in PROMPTS], replace(GREEDY, stop=(first, second)))
    for key, result in found.items():
        whole = plain[key].tokens
        ends = [place for place, token in enumerate(whole) if token in (first, second)]
        assert result.tokens == (whole[: ends[0] + 1] if ends else whole)
        assert result.finish == ("stop" if ends else "length")
    asked = run([Request(prompt, 12) for prompt in PROMPTS], ended=lambda result: len(result.tokens) >= 6)
    assert {result.finish for result in asked.values()} == {"stop"}
    for key, result in asked.items():  # with the token that ended it, whatever else was drawn in the same call
        assert result.tokens == plain[key].tokens[:6] and len(result.log_probs) == 6


@pytest.mark.parametrize("length", [20, 70])
def test_padding_beyond_a_table_of_positions_changes_nothing(length):
    """Prompts are padded to lengths that the table does not have."""
    model = replace(tiny.MODEL, position=Learned(length))
    prompt = np.random.default_rng(0).integers(0, 264, length - 2)
    (result,) = run([Request(prompt, 2)], model=model).values()
    policy = policy_of(model)
    for at, token in enumerate(result.tokens, start=len(prompt)):
        row = np.concatenate([prompt, result.tokens[: at - len(prompt)]])[None].astype(np.int32)
        batch = {"tokens": row, "positions": np.arange(at)[None], "segment_ids": np.ones_like(row)}
        assert token == int(jnp.argmax(policy.logits(policy.forward(batch).hidden)[0, -1]))
    (best,) = beam_search(model, policy, prompt, Beam(1, 2))
    assert best.tokens == result.tokens
    for ask in (run, lambda requests, model: beam_search(model, policy, requests[0].prompt, Beam(1, 3))):
        with pytest.raises(UserError, match=f"do not fit the model's table of {length} positions"):
            ask([Request(prompt, 3)], model=model)


def test_a_padded_vocabulary_is_never_drawn():
    settings = Settings(sampling(vocab_size=8), steps=8)
    assert (
        max(max(result.tokens) for result in run([Request([1], 30, seed=s) for s in range(6)], settings).values()) < 8
    )


def test_whole_numbers_in_the_cache_change_little():
    requests = [Request(prompt, 8) for prompt in PROMPTS]
    exact, rounded = (run(requests, replace(GREEDY, cache=CacheSpec(dtype, "ring"))) for dtype in ("compute", "int8"))
    for key, result in exact.items():
        if rounded[key].tokens == result.tokens:
            np.testing.assert_allclose(rounded[key].log_probs, result.log_probs, atol=0.05)
    assert sum(rounded[key].tokens == result.tokens for key, result in exact.items()) >= 4


@pytest.mark.parametrize(
    "spec",
    [
        MeshSpec(data=2, fsdp=2, tensor=2),
        pytest.param(MeshSpec(data=1, context=2, expert=4), marks=pytest.mark.slow),
        pytest.param(MeshSpec(data=2, stage=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_on_any_mesh(spec):
    requests = [Request(prompt, 8) for prompt in PROMPTS]
    plain = run(requests, slots=4)
    mesh = sharding.make_mesh(spec)
    with jax.set_mesh(mesh):
        layout = sharding.tree_shardings(mesh, MODEL.shapes(Precision()), MODEL.logical_axes())
        policy = MODEL.bind(jax.device_put(policy_of().params, layout), {}, Precision())
        found = run(requests, slots=4, policy=policy)
    assert {key: result.tokens for key, result in found.items()} == {
        key: result.tokens for key, result in plain.items()
    }


@pytest.mark.parametrize(
    ("request_", "how", "words"),
    [
        (Request([], 4), {}, "prompt of request 0 is empty"),
        (Request([1], 0), {}, "asks for 0 tokens of 1 samples"),
        (Request([264], 4), {}, "model's go from 0 to 263"),
        (Request([1] * 6, 4), {"length": 8}, "do not fit the engine's slots of 8"),
        (Request([1] * 6, 4), {"model": replace(MODEL, position=Learned(8))}, "the model's table of 8 positions"),
        (Request([1], 4, seed=-1), {}, "has the seed -1: it must be from 0"),
    ],
)
def test_what_cannot_be_generated_is_one_sentence(request_, how, words):
    engine = Engine(how.pop("model", MODEL), settings=GREEDY, **how)
    with pytest.raises(UserError, match=words):
        list(engine.run(policy_of(), [request_]))
