# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.types import Precision, UserError
from research.train.experiment import AdamW, Flops, Steps, Tokens
from research.train.optimizers import Clock, Schedule, Share, decay_mask
from tests import tiny

CLOCK = Clock(tokens_per_step=100, flops_per_token=1e6, total=200)


@pytest.mark.parametrize("length", [Steps(20), Tokens(2000), Flops(2e9), Share(0.1)])
def test_a_length_is_the_same_in_any_unit(length):
    assert CLOCK.steps(length) == 20


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "wsd"])
def test_schedules_warm_up_peak_and_end_where_the_run_ends(shape):
    schedule = Schedule(shape=shape, warmup=Steps(20), decay=Share(0.25), final=0.1)
    rates = [schedule.value(2.0, CLOCK, step) for step in range(200)]
    assert rates[0] == pytest.approx(0.1) and rates[19] == pytest.approx(2.0) == max(rates)
    assert np.all(np.diff(rates[:20]) > 0) and np.all(np.diff(rates[20:]) <= 1e-12)
    assert rates[-1] == pytest.approx(2.0 if shape == "constant" else 0.2)
    if shape == "wsd":
        assert rates[149] == pytest.approx(2.0) and rates[160] < 2.0
    if shape == "cosine":
        assert rates[110] == pytest.approx(0.1 * 2 + 0.9 * 2 * 0.5, rel=0.02)


@pytest.mark.parametrize("length", [Tokens(64 * 256), Flops(1e9), Steps(33)])
def test_the_schedule_of_a_run_ends_where_it_ends(length):
    experiment = tiny.experiment(length=length)
    last = experiment.optimizer.learning_rate(experiment.clock, experiment.steps - 1)
    assert last == pytest.approx(0.1 * experiment.optimizer.peak)


def test_a_length_that_is_not_a_number_is_one_sentence():
    with pytest.raises(UserError, match="finite number"):
        CLOCK.steps(Tokens(float("nan")))
    with pytest.raises(UserError, match="at least 0"):
        CLOCK.steps(Tokens(-5))


def test_only_matrices_are_decayed():
    mask = decay_mask(tiny.MODEL.logical_axes())
    assert mask["layers"]["mlp"]["up"]["w"] and mask["embedding"]["table"] and mask["unembedding"]["w"]
    assert not mask["final_norm"]["scale"] and not mask["layers"]["mlp_norm"]["scale"]


def test_adamw_is_optax_adamw():
    """Direction times rate equals what optax's own AdamW with that rate and mask adds."""
    model, rate = tiny.MODEL, 0.01
    params = model.init_params(jax.random.key(0), Precision())
    gradients = jax.tree.map(lambda p: jnp.cos(100 * p), params)
    ours = replace(AdamW(), clip=0.0).build(params, model.logical_axes())
    theirs = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=decay_mask(model.logical_axes()))

    @jax.jit
    def compare(params, gradients):
        direction, _ = ours.update(gradients, ours.init(params), params)
        update, _ = theirs.update(gradients, theirs.init(params), params)
        return jax.tree.map(lambda d, u: jnp.max(jnp.abs(-rate * d - u)), direction, update)

    assert max(jax.tree.leaves(compare(params, gradients))) < 1e-8
