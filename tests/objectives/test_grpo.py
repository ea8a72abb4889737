# SPDX-License-Identifier: Apache-2.0
# GRPO and its kin: the losses and gradients of TRL, and the mistakes that others have made (normalisers, masks, KL).

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.sharding import MeshSpec, make_mesh
from research.core.types import Output, Precision, UserError
from research.objectives.grpo import Clip, Grpo, estimated_kl, response_log_probs
from research.objectives.log_probs import TokenLogProbs
from research.train.state import fresh, transformation
from research.train.step import make_gradient
from tests import tiny
from tests.conftest import ROOT
from tests.objectives.golden.cases import LENGTH, OURS

GOLDEN = np.load(ROOT / "tests" / "objectives" / "golden" / "grpo.npz")
NOTHING = Output(hidden=jnp.zeros(()), cache=None, aux={}, stats={})
PROMPT, RESPONSE = 6, 8


def objective(settings):
    return Grpo(**{**settings, "clip": Clip(**settings.get("clip", {}))})


def of_golden():
    return {
        "weights": jnp.asarray(GOLDEN["mask"]),
        "advantages": jnp.asarray(np.broadcast_to(GOLDEN["advantages"][:, None], GOLDEN["mask"].shape)),
        "old_log_probs": jnp.asarray(GOLDEN["old"]),
        "sampler_log_probs": jnp.asarray(GOLDEN["sampler"]),
        "reference_log_probs": jnp.asarray(GOLDEN["reference"]),
    }


def total(loss):
    return sum(term.coefficient * term.value.mean for term in loss.terms.values())


def loss_of(grpo, log_probs, batch):
    return grpo.loss(NOTHING, TokenLogProbs(log_probs, jnp.asarray(GOLDEN["entropy"])), {}, batch)


@pytest.mark.parametrize("case", OURS)
def test_losses_and_gradients_are_those_of_trl(case):
    grpo, batch = objective(OURS[case]), of_golden()
    value, gradient = jax.value_and_grad(lambda x: total(loss_of(grpo, x, batch)))(jnp.asarray(GOLDEN["log_probs"]))
    assert abs(float(value) - float(GOLDEN[f"{case}/loss"])) < 1e-6
    np.testing.assert_allclose(gradient, GOLDEN[f"{case}/gradient"], atol=1e-7)
    assert np.abs(GOLDEN[f"{case}/gradient"]).max() > 0.01


def batch_of(rows=8, lengths=None, vocab_size=264, seed=3):
    """Random prompts, padded on the left, and responses of several lengths; log-probabilities of no model."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths if lengths is not None else rng.integers(1, RESPONSE + 1, rows))
    before = rng.integers(1, PROMPT + 1, rows)
    slots = np.arange(PROMPT + RESPONSE)[None, :]
    real = (slots >= PROMPT - before[:, None]) & (slots < PROMPT + lengths[:, None])
    tokens = rng.integers(0, vocab_size, real.shape).astype(np.int32) * real
    shape = (rows, RESPONSE)
    return {
        "tokens": tokens,
        "positions": ((slots - (PROMPT - before[:, None])) * real).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "targets": tokens[:, PROMPT:].copy(),
        "weights": real[:, PROMPT:].astype(np.float32),
        "advantages": np.broadcast_to(rng.normal(size=(rows, 1)), shape).astype(np.float32),
        "sampler_log_probs": -rng.gamma(2.0, 2.0, shape).astype(np.float32),
        "temperature": np.full(shape, 0.7, np.float32),
    }


def policy(seed=0, model=tiny.MODEL):
    params = model.init_params(jax.random.key(seed), Precision())
    return model.bind(params, model.init_buffers(), Precision())


def gradient_of(experiment, batch):
    def run():
        state = fresh(experiment, transformation(experiment))
        return make_gradient(experiment, platform="cpu")(state, {}, batch, jax.random.key(1))

    return jax.jit(run)()


@pytest.mark.parametrize("normaliser", ["response", "tokens", "constant"])
def test_microbatches_and_meshes_add_up_to_the_whole(normaliser):
    """The counts that sums are divided by are those of the whole batch: rows of very different lengths tell."""
    batch = {name: jnp.asarray(x) for name, x in batch_of(lengths=[8, 1, 1, 1, 8, 8, 1, 2]).items()}
    whole = tiny.experiment(objective=Grpo(normaliser=normaliser))
    expected, loss = gradient_of(whole, batch)
    for changed, mesh in ((dict(accumulate=4), MeshSpec(data=1)), (dict(accumulate=2), MeshSpec(fsdp=2, tensor=2))):
        with jax.set_mesh(make_mesh(mesh, devices=jax.devices()[: 8 if mesh.tensor > 1 else 1])):
            found, parts = gradient_of(replace(whole, **changed), batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)
        for name, value in loss.peaks.items():
            np.testing.assert_allclose(parts.peaks[name], value, rtol=1e-4)
        for name, value in loss.metrics.items():
            np.testing.assert_allclose(parts.metrics[name].mean, value.mean, rtol=1e-4)


def test_normalisers_weigh_tokens_as_their_papers_say():
    """Two responses, of 2 and of 6 tokens, one advantage: the gradient of a token's log-probability."""
    lengths = np.array([2, 6])
    mask = jnp.asarray(np.arange(8)[None, :] < lengths[:, None], jnp.float32)
    old = jnp.full((2, 8), -1.0)
    batch = {"weights": mask, "advantages": jnp.ones((2, 8)), "sampler_log_probs": old}

    def weight(**settings):
        found = TokenLogProbs(old, jnp.zeros((2, 8)))
        run = lambda x: total(Grpo(**settings).loss(NOTHING, found._replace(log_probs=x), {}, batch))  # noqa: E731
        return -np.asarray(jax.grad(run)(old))

    np.testing.assert_allclose(weight()[:, 0], [1 / 2 / 2, 1 / 6 / 2])
    np.testing.assert_allclose(weight(normaliser="tokens")[:, 0], [1 / 8, 1 / 8])
    np.testing.assert_allclose(weight(normaliser="constant", constant=10)[:, 0], [1 / 20, 1 / 20])
    assert not weight()[0, 2:].any()


def test_equal_rewards_leave_the_gradient_of_kl_alone():
    log_probs, batch = jnp.asarray(GOLDEN["log_probs"]), of_golden() | {"advantages": jnp.zeros((6, LENGTH))}
    plain = jax.grad(lambda x: total(loss_of(Grpo(), x, batch)))(log_probs)
    assert not np.asarray(plain).any()
    with_kl = np.asarray(jax.grad(lambda x: total(loss_of(Grpo(beta=0.1), x, batch)))(log_probs))
    assert np.abs(with_kl[np.asarray(GOLDEN["mask"]) > 0]).min() > 1e-5


def test_the_mask_decides_whatever_the_ids_are():
    """Padding and the end's id may be the same: a response's own end is learnt from, what follows is not."""
    batch = batch_of(rows=2, lengths=[3, 3])
    batch["targets"][:, 2:] = 0  # the third token is the end, and its id is that of padding
    batch["tokens"][:, PROMPT + 2 :] = 0

    def run(policy, targets):
        return total(Grpo()(policy, {}, {**batch, "targets": targets}, None))

    bound = policy()
    same = jax.jit(run)
    one = same(bound, batch["targets"])
    after = batch["targets"].copy()
    after[:, 3:] = 9
    assert same(bound, after) == one
    end = batch["targets"].copy()
    end[:, 2] = 9
    assert same(bound, end) != one


def test_k1_has_no_gradient_on_average_and_k2_and_k3_do():
    """Over all tokens of a distribution, each as often as it is likely; k3 is never below 0, and its mean is the KL."""
    logits, reference = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32))
    reference = jax.nn.log_softmax(reference)

    def mean(logits, kl, weights):
        log_probs = jax.nn.log_softmax(logits)
        estimate = estimated_kl(kl, log_probs, reference)
        return jnp.sum(weights * estimate), estimate

    probs = jax.nn.softmax(logits)
    grads = {kl: jax.grad(lambda x, kl=kl: mean(x, kl, probs)[0])(logits) for kl in ("k1", "k2", "k3")}
    assert np.abs(grads["k1"]).max() < 1e-7 and min(np.abs(grads[kl]).max() for kl in ("k2", "k3")) > 1e-2
    exact = jnp.sum(probs * (jnp.log(probs) - reference))
    true_gradient = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - reference)))(logits)
    np.testing.assert_allclose(grads["k2"], true_gradient, atol=1e-6)  # that of k2 is the KL's own
    for kl in ("k1", "k3"):
        np.testing.assert_allclose(mean(logits, kl, probs)[0], exact, rtol=1e-5)
    assert np.asarray(mean(logits, "k3", probs)[1]).min() >= 0


def test_sequence_ratio_is_normalised_by_length_and_weights_of_cispo_have_no_gradient():
    log_probs, batch = jnp.asarray(GOLDEN["log_probs"]), of_golden()
    mask = GOLDEN["mask"]
    mean = ((GOLDEN["log_probs"] - GOLDEN["old"]) * mask).sum(1) / np.maximum(mask.sum(1), 1)
    found = loss_of(Grpo(ratio="sequence"), log_probs, batch)
    np.testing.assert_allclose(found.peaks["ratio_max"], np.exp(mean[mask.sum(1) > 0]).max(), rtol=1e-6)
    cispo = Grpo(clip=Clip(form="weight", low=1.0, high=0.4), normaliser="tokens")
    gradient = jax.grad(lambda x: total(loss_of(cispo, x, batch)))(log_probs)
    weight = np.minimum(np.exp(GOLDEN["log_probs"] - GOLDEN["old"]), 1.4)
    expected = -weight * GOLDEN["advantages"][:, None] * mask / mask.sum()
    np.testing.assert_allclose(gradient, expected, atol=1e-6)  # the weight itself is not differentiated


def test_log_probs_are_of_the_temperature_and_only_responses_reach_the_head():
    batch, bound = batch_of(), policy()
    output = bound.forward(batch)
    logits = np.asarray(bound.logits(output.hidden))[:, PROMPT - 1 : -1] / 0.7
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1)[..., 0]
    probs = np.asarray(jax.nn.softmax(logits))
    for chunk in (0, 8, 24, 512):
        found = response_log_probs(bound, output, batch, chunk)
        np.testing.assert_allclose(found.log_probs, expected, atol=1e-5)
        np.testing.assert_allclose(found.entropy, -(probs * np.log(probs)).sum(-1), atol=1e-4)


def test_a_share_of_a_mesh_gives_the_same_log_probs_and_gradients():
    batch, bound = {name: jnp.asarray(x) for name, x in batch_of().items()}, policy()

    def run(bound):
        found = response_log_probs(bound, bound.forward(batch), batch, 16)
        return jnp.sum(found.log_probs * batch["weights"]), found.log_probs

    expected, gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(bound)
    for spec in (MeshSpec(), MeshSpec(data=2, fsdp=2, tensor=2), MeshSpec(data=2, context=4)):
        with jax.set_mesh(make_mesh(spec)):
            found, sharded = jax.jit(jax.value_and_grad(run, has_aux=True))(bound)
        np.testing.assert_allclose(found[1], expected[1], atol=2e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), sharded.params, gradient.params)


def test_what_is_missing_is_said():
    batch = batch_of()
    with pytest.raises(UserError, match="no frozen model 'reference'"):
        Grpo(beta=0.1)(policy(), {}, batch, None)
    with pytest.raises(UserError, match="set rescore=True"):
        Grpo(importance_cap=2.0)(policy(), {}, batch, None)
    with pytest.raises(UserError, match=r"dual above 1 \+ high"):
        Clip(dual=0.5)
    with pytest.raises(UserError, match="at least 0"):
        Grpo(beta=-1)
