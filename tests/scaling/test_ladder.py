# SPDX-License-Identifier: Apache-2.0
"""Ladders: whole steps whose exact FLOPs meet the budget within 1%, and plain words where none do."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.types import UserError
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.scaling import cost, ladder
from research.train.experiment import Experiment, Steps
from research.train.optimizers import AdamW, Schedule


@dataclass(frozen=True)
class FakeSource:
    batch_size: int = 4
    sequence_length: int = 64


@dataclass(frozen=True)
class FakeObjective:
    pass


MODEL = Decoder(vocab_size=256, d_model=32, num_layers=2, attention=Attention(2), mlp=Mlp(88))
BASE = Experiment(
    name="base",
    model=MODEL,
    objective=FakeObjective(),
    source=FakeSource(),
    optimizer=AdamW(),
    length=Steps(1),
)
SIZES = ladder.grid(MODEL, d_models=(16, 32, 48, 64, 96))


@settings(max_examples=80, deadline=None)
@given(
    d_model=st.sampled_from([16, 32, 48, 80, 128]),
    batch=st.integers(1, 64),
    length=st.sampled_from([16, 33, 128, 512]),
    budget=st.floats(1e9, 1e15),
)
def test_actual_flops_are_within_one_percent(d_model, batch, length, budget):
    base = replace(BASE, source=FakeSource(batch, length))
    models = ladder.grid(MODEL, d_models=(d_model,))
    try:
        found = ladder.isoflop(base, models=models, budgets=[budget])
    except UserError as error:
        step = batch * length * cost.training_flops_per_token(models[0], sequence_length=length)
        assert budget / step < 100 and "the nearest budget that works is" in str(error)
        return
    (experiment,) = found.values()
    exact = experiment.steps * batch * length * cost.training_flops_per_token(models[0], sequence_length=length)
    assert exact == experiment.flops
    assert abs(exact / budget - 1) <= 0.01
    assert experiment.clock.steps(experiment.length) == experiment.steps >= 100


def test_names_and_lengths():
    found = ladder.isoflop(BASE, models=SIZES, budgets=[1.6e11, 4e11])
    assert len(found) == 10
    total = cost.params(SIZES[1]).total
    name = f"c1.6e11-n{round(total / 1000)}k"
    experiment = found[name]
    assert experiment.name == name and experiment.model == SIZES[1]


def test_the_schedule_ends_where_the_run_ends():
    for experiment in ladder.isoflop(BASE, models=SIZES, budgets=[1.6e11]).values():
        clock = replace(experiment.clock, total=experiment.steps)
        schedule: Schedule = experiment.optimizer.schedule
        last = float(experiment.optimizer.learning_rate(clock, experiment.steps - 1))
        assert last == pytest.approx(schedule.final * experiment.optimizer.peak, rel=1e-5)


def test_models_by_name_and_close_numbers_stay_apart():
    named = ladder.isoflop(BASE, models={"small": SIZES[0], "large": SIZES[1]}, budgets=[1e11])
    assert list(named) == ["c1e11-small", "c1e11-large"]
    assert ladder.budget_labels([1e11, 1.01e11]) == ["c1e11", "c1.01e11"]
    near = [MODEL, replace(MODEL, mlp=Mlp(89))]
    assert len(ladder.labels(near)) == 2
    with pytest.raises(UserError, match="equal"):
        ladder.labels([MODEL, MODEL])
    with pytest.raises(UserError, match="equal"):
        ladder.isoflop(BASE, models=SIZES, budgets=[1e11, 1e11])


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (999, "1k"), (36_000, "36k"), (1_234_567, "1.2M"), (7e10, "70B"), (0.5, "0.5")],
)
def test_short_counts(value, text):
    assert ladder.short_count(value) == text


def test_too_few_steps_names_the_nearest_budget():
    with pytest.raises(UserError, match="at least 100 are needed.*the nearest budget that works is") as caught:
        ladder.isoflop(BASE, models=[MODEL], budgets=[1e9])
    nearest = float(str(caught.value).split("works is ")[1].split(" ")[0])
    found = ladder.isoflop(BASE, models=[MODEL], budgets=[nearest])
    assert [e.steps for e in found.values()] == [100]


def test_one_percent_that_cannot_be_met_names_both_neighbours():
    step = BASE.tokens_per_step * BASE.flops_per_token
    with pytest.raises(UserError, match=r"10\.50 steps, and no whole number of steps comes within 1\.00%") as caught:
        ladder.isoflop(BASE, models=[MODEL], budgets=[10.5 * step], min_steps=1)
    low, high = str(caught.value).split("that work are ")[1].split(" FLOPs")[0].split(" and ")
    assert float(low) == pytest.approx(10 * step, rel=1e-3) and float(high) == pytest.approx(11 * step, rel=1e-3)


def test_settings_that_depend_on_the_model():
    def by_width(experiment: Experiment) -> Experiment:
        peak = 1e-3 * 32 / experiment.model.d_model
        batch = replace(experiment.source, batch_size=2)
        return replace(experiment, name="ignored", optimizer=AdamW(peak=peak), source=batch)

    for name, experiment in ladder.isoflop(BASE, models=SIZES, budgets=[1.6e11], adjust=by_width).items():
        assert experiment.optimizer.peak == 1e-3 * 32 / experiment.model.d_model and experiment.name == name
        assert abs(experiment.flops / 1.6e11 - 1) <= 0.01
    with pytest.raises(UserError, match="an adjust function must leave the length as it is"):
        ladder.isoflop(BASE, models=[MODEL], budgets=[1.6e11], adjust=lambda e: replace(e, length=Steps(7)))


def test_sizes_by_tokens_per_parameter():
    budgets = ladder.geometric(2e10, last=2e12, count=3)
    assert budgets == pytest.approx((2e10, 2e11, 2e12))
    found = ladder.isoflop(
        BASE,
        models=ladder.grid(MODEL, d_models=range(16, 200, 8), head_dim=8),
        budgets=budgets[1:],
        tokens_per_param=(5, 200),
    )
    for experiment in found.values():
        assert 4 < experiment.tokens / cost.params(experiment.model).total < 250
    smallest = {name.split("-")[0]: e.model.d_model for name, e in reversed(list(found.items()))}
    assert smallest["c2e12"] > smallest["c2e11"]  # a larger budget runs larger models
    with pytest.raises(UserError, match="0 of the 5 models see 1e-06 to 2e-06 tokens per parameter and 3 are needed"):
        ladder.choose(SIZES, budget=1e11, sequence_length=64, tokens_per_param=(1e-6, 2e-6))
    with pytest.raises(UserError, match="positive and rising"):
        ladder.choose(SIZES, budget=1e11, sequence_length=64, tokens_per_param=(20, 5))


def test_a_grid_keeps_the_base_and_checks_heads():
    grouped = replace(MODEL, attention=Attention(4, num_kv_heads=2))
    models = ladder.grid(grouped, d_models=(64, 48), head_dim=16)
    assert [m.attention.kv_heads for m in models] == [2, 3]  # groups of two where they divide
    assert [m.num_layers for m in models] == [2, 2] and all(m.vocab_size == 256 for m in models)
    assert all(m.mlp.d_ff % 8 == 0 for m in models)
    with pytest.raises(UserError, match="d_model 40 does not split into heads of 16"):
        ladder.grid(MODEL, d_models=(40,))
    with pytest.raises(UserError, match="positive number of FLOPs"):
        ladder.isoflop(BASE, models=SIZES, budgets=[0.0])
