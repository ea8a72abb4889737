# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
from dataclasses import dataclass, replace

import pytest

from research.core import config
from research.core.config import ConfigError, config_hash, from_json, override, to_json
from research.evals.validation import Validation
from research.objectives.grpo import Clip, Grpo
from research.train.experiment import Experiment, Init, Tokens
from tests import tiny


def test_json_round_trip_is_the_same_experiment():
    experiment = tiny.experiment(length=Tokens(1e6), accumulate=2)
    record = json.loads(json.dumps(to_json(experiment)))
    assert from_json(record) == experiment
    assert config_hash(from_json(record)) == config_hash(experiment)


def test_a_field_added_with_a_default_orphans_no_finished_run():
    @dataclass(frozen=True)
    class Old:
        size: int

    @dataclass(frozen=True)
    class New:
        size: int
        added: float = 0.5

    New.__qualname__ = Old.__qualname__
    assert config_hash(Old(3)) == config_hash(New(3))
    assert config_hash(New(3, 0.25)) != config_hash(New(3))


def test_whole_numbers_and_floats_hash_alike():
    assert config_hash(Tokens(1_000_000)) == config_hash(Tokens(1e6))


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("model.d_model=64", ("model", "d_model"), 64),
        ("length.count=1e3", ("length", "count"), 1000),
        ("optimizer.peak=0.5", ("optimizer", "peak"), 0.5),
        ("model.mlp.activation=relu", ("model", "mlp", "activation"), "relu"),
        ("model.attention.num_kv_heads=none", ("model", "attention", "num_kv_heads"), None),
        ("source.shuffle=false", ("source", "shuffle"), False),
        ("name=other", ("name",), "other"),
    ],
)
def test_override_reads_the_field_type(assignment, path, value):
    changed = override(tiny.experiment(), assignment)
    for name in path:
        changed = getattr(changed, name)
    assert changed == value and type(changed) is type(value)


def test_override_reaches_into_tuples():
    assert override(tiny.experiment(), "evals.0.every=7").evals[0].every == 7


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("model.d_modle=64", ["Decoder has no field 'd_modle'", "Did you mean 'd_model'?"]),
        ("modle.d_model=64", ["Experiment has no field 'modle'", "'model'"]),
        ("model.d_model=wide", ["'wide' is not a whole number"]),
        ("model.d_model=1.5", ["'1.5' is not a whole number"]),
        ("optimizer.peak=big", ["'big' is not a number"]),
        ("source.shuffle=maybe", ["true or false"]),
        ("model.mlp.activation=tanh", ["one of swiglu, geglu, gelu, gelu_exact, relu"]),
        ("model=big", ["whole Decoder", "d_model"]),
        ("evals.3.every=1", ["not an index", "0 to 0"]),
        ("model.d_model.x=1", ["below a int"]),
        ("model.d_model", ["path=value"]),
    ],
)
def test_override_errors_name_what_is_allowed(assignment, words):
    with pytest.raises(ConfigError) as error:
        override(tiny.experiment(), assignment)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(objective=Grpo(normaliser="token")), ["objective.normaliser is 'token'", "response, tokens, constant"]),
        (dict(objective=Grpo(clip=Clip(form="min"))), ["objective.clip.form is 'min'", "one of"]),
        (dict(init="stage:sft"), ["init is 'stage:sft'", "Init or none"]),
        (dict(objective=Grpo), ["objective is <class", "Objective"]),
        (dict(model=None), ["model is None", "Decoder"]),
        (dict(length=600), ["length is 600", "or Steps"]),
        (dict(frozen={"reference": "stage:sft"}), ["frozen is {'reference'", "a mapping", "Init"]),
        (dict(frozen=Init("x")), ["frozen is Init(", "a mapping"]),
        (dict(evals=Validation(None, Grpo())), ["evals is Validation(", "a tuple, as in (a, b), of Eval"]),
        (dict(evals=(Validation(None, Grpo(ratio="seq")),)), ["evals.0.source is None"]),
    ],
)
def test_choices_that_there_are_not_and_text_in_the_place_of_a_part_are_refused(change, words):
    with pytest.raises(ConfigError) as error:
        config.check_types(replace(tiny.experiment(), **change))
    assert all(word in str(error.value) for word in words), str(error.value)
    config.check_types(tiny.experiment())


def test_a_record_of_another_version_is_refused_by_name():
    record = to_json(tiny.experiment())
    record["model"]["colour"] = "red"
    with pytest.raises(ConfigError, match="Decoder has no field 'colour'"):
        from_json(record)
    with pytest.raises(ConfigError, match="cannot be imported"):
        from_json({"type": "research.nowhere:Thing"})


def test_values_that_json_cannot_hold_are_refused():
    @dataclass(frozen=True)
    class Holder:
        value: object

    with pytest.raises(ConfigError, match="cannot stand in a configuration"):
        to_json(Holder(lambda: None))


def test_differences_name_paths():
    old = to_json(tiny.experiment())
    new = to_json(replace(tiny.experiment(), model=replace(tiny.MODEL, d_model=64)))
    assert config.differences(old, new) == ["model.d_model: 32 -> 64"]


def test_every_experiment_field_that_is_not_required_has_a_default():
    required = [f.name for f in dataclasses.fields(Experiment) if config.default_of(f) is dataclasses.MISSING]
    assert required == ["name", "model", "objective", "source", "optimizer", "length"]
