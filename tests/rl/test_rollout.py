# SPDX-License-Identifier: Apache-2.0
# Rollouts as a source: what they hold, that they are a function of policy, seed and number, and that nothing is lost.

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest

from research.core.sharding import MeshSpec, make_mesh
from research.core.types import Context, Precision, UserError
from research.data.chat import ChatTemplate
from research.evals.tasks.base import Problem, Response
from research.objectives.grpo import Clip, Grpo, response_log_probs
from research.objectives.next_token import NextToken
from research.objectives.ppo import Ppo
from research.rl import record
from research.rl.advantages import BatchNormalised, Gae, GroupRelative, LeaveOneOut
from research.rl.groups import graded
from research.rl.rewards.learned import ValueAtEnd
from research.rl.rewards.length import SoftOverlong
from research.rl.rewards.weighted import Weighted
from research.train import ahead, loop, metrics
from research.train.experiment import CheckpointPolicy, Init, Steps
from tests import tiny
from tests.conftest import ROOT
from tests.rl import letters

ROWS = 16


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def policy(seed=0, model=letters.MODEL):
    return model.bind(model.init_params(jax.random.key(seed), Precision()), model.init_buffers(), Precision())


@contextlib.contextmanager
def scope(mesh):
    """``jax.set_mesh`` where it is entered: called, it holds from there on."""
    with jax.set_mesh(mesh):
        yield


@pytest.fixture
def start(cache_dir):
    def begin(source, mesh=None, seed=0, **changes):
        mesh = mesh or make_mesh(MeshSpec(), devices=jax.devices()[:1])
        return source.start(Context(mesh, seed, cache_dir, **changes)), scope(mesh)

    return begin


def host(batch):
    return {name: np.asarray(x) for name, x in batch.items()}


def test_a_batch_says_what_was_drawn_and_its_ratio_is_one(start):
    source = letters.rollouts(temperature=0.8)
    stream, mesh = start(source)
    with mesh:
        batch = stream.next(policy(), 0)
        loss = jax.jit(Grpo())(policy(), {}, batch, None)
    rows, shapes = host(batch), source.batch_shapes()
    assert {name: (x.shape, x.dtype) for name, x in rows.items()} == {k: (s.shape, s.dtype) for k, s in shapes.items()}
    # on the policy: the trainer's log-probabilities are the sampler's, and every ratio is 1
    assert float(loss.peaks["sampler_gap_max"]) < 2e-5
    assert abs(float(loss.peaks["ratio_max"]) - 1) < 2e-5 and abs(float(loss.peaks["ratio_min"]) - 1) < 2e-5
    lengths = rows["weights"].sum(1).astype(int)
    eos = stream.speaker.tokenizer.eos_id
    for row, length in enumerate(lengths):
        said = rows["targets"][row, :length]
        assert (rows["tokens"][row, 8 : 8 + length] == said).all() and not rows["tokens"][row, 8 + length :].any()
        assert (rows["weights"][row, :length] == 1).all() and not rows["weights"][row, length:].any()
        assert eos not in said[:-1] and (length == 8 or said[-1] == eos)  # its end is learnt from
    by_prompt = rows["tokens"][:, :8].reshape(4, 4, 8)
    assert (by_prompt == by_prompt[:, :1]).all() and len({tuple(p[0]) for p in by_prompt.tolist()}) == 4
    advantages = rows["advantages"].reshape(4, 4, 8)[..., 0]
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-5)
    report = stream.report()
    assert report["response/length"] == lengths.mean() and report["staleness"] == 0


def test_each_of_several_ends_is_learnt_from_and_nothing_behind_it(start):
    """Ends are what the sampler stopped at: no token is looked up for what its id is."""
    ends = (70, 71, 72, 73, *range(150, 200))

    @dataclass(frozen=True)
    class SeveralEnds(ChatTemplate):
        def stop(self, tokenizer):
            return ends

    source = letters.rollouts(speech=replace(letters.SPEECH, template=SeveralEnds()), prompts=16)
    stream, mesh = start(source)
    with mesh:
        rows = host(stream.next(policy(), 0))
    lengths = rows["weights"].sum(1).astype(int)
    last = rows["targets"][np.arange(len(lengths)), lengths - 1]
    stopped = np.isin(last, ends)
    assert (lengths[~stopped] == 8).all() and len(set(last[stopped])) > 5 and (lengths[stopped] < 8).any()
    inside = [rows["targets"][row, : length - 1] for row, length in enumerate(lengths)]
    assert not np.isin(np.concatenate(inside), ends).any()
    assert stream.report()["response/truncated"] == (~stopped).mean()


def test_what_is_sampled_depends_on_policy_seed_and_number_alone(start):
    first, mesh = start(letters.rollouts(slots=3))
    second, _ = start(letters.rollouts(slots=0, workers=1))
    other, _ = start(letters.rollouts(), seed=1)
    with mesh:
        bound = policy()
        one, same, changed = (host(stream.next(bound, 0)) for stream in (first, second, other))
        again = host(first.next(bound, 1))
    for name in one:  # however many are sampled at a time
        np.testing.assert_allclose(one[name], same[name], atol=1e-5)
    assert (one["targets"] != changed["targets"]).any() and (one["targets"] != again["targets"]).any()


def test_epochs_and_minibatches_go_through_all_rows_each_time(start):
    source = letters.rollouts(epochs=2, minibatches=4, advantage=LeaveOneOut())
    stream, mesh = start(source)
    with mesh:
        bound = policy()
        batches = [host(stream.next(bound, step)) for step in range(8)]
        stale = stream.report()["staleness"]
        following = host(stream.next(bound, 8))
    assert stale == 7 and stream.report()["staleness"] == 0

    def rows(parts):
        return sorted(tuple(row) for part in parts for row in part["sampler_log_probs"].tolist())

    assert rows(batches[:4]) == rows(batches[4:]) and len(rows(batches[:4])) == ROWS
    assert [b["targets"].tolist() for b in batches[:4]] != [b["targets"].tolist() for b in batches[4:]]
    assert not set(rows([following])) & set(rows(batches))


@pytest.mark.parametrize("changes", [{}, dict(epochs=2, minibatches=2), dict(staleness=2, minibatches=2, rounds=3)])
def test_a_state_goes_on_with_the_same_batches(start, changes):
    source, bounds = letters.rollouts(**changes), [policy(seed) for seed in range(9)]
    stream, mesh = start(source)
    with mesh:
        batches = [host(stream.next(bounds[step], step)) for step in range(5)]
        state = json.loads(json.dumps(stream.get_state()))
        batches += [host(stream.next(bounds[step], step)) for step in range(5, 9)]
        resumed, _ = start(source)
        resumed.set_state(state)
        for step in range(5, 9):
            for name, x in host(resumed.next(bounds[step], step)).items():
                np.testing.assert_array_equal(x, batches[step][name])
    assert resumed.report()["staleness"] <= (changes.get("staleness", 0) + 1) * source.steps - 1
    with pytest.raises(UserError, match="have the seed 0 and this run 1"):
        start(source, seed=1)[0].set_state(state)
    with pytest.raises(UserError, match="not the state of rollouts"):
        start(source)[0].set_state({"step": 1})


def test_staleness_is_what_was_asked_for_and_no_more(start):
    """Rollout n is sampled by the policy of the first step of rollout n - 2."""
    lagging, mesh = start(letters.rollouts(staleness=2, minibatches=2))
    live, _ = start(letters.rollouts())
    with mesh:
        bounds = [policy(seed) for seed in range(8)]
        for step in range(8):
            batch = host(lagging.next(bounds[step], step))
            assert lagging.report()["staleness"] == step - max(0, step // 2 * 2 - 4)
        live.set_state({"step": 3, "cursor": 12, "seed": 0, "rollouts": {}})
        drawn = host(live.next(bounds[2], 3))  # the fourth rollout, of the policy of step 2
    assert set(map(tuple, batch["targets"].tolist())) <= set(map(tuple, drawn["targets"].tolist()))


def test_groups_of_equal_reward_are_drawn_again(start):
    plain, mesh = start(letters.rollouts())
    again, _ = start(letters.rollouts(rounds=4))
    with mesh:
        bound = policy()
        equal = [plain.next(bound, step) and plain.report()["groups/zero_advantage"] for step in range(6)]
        for step in range(6):
            rows = host(again.next(bound, step))["advantages"].reshape(4, 4, 8)
            report = again.report()
            assert report["groups/zero_advantage"] <= max(0.0, equal[step])
            assert (np.abs(rows).max((1, 2)) > 0).mean() == 1 - report["groups/zero_advantage"]
            assert report["groups/drawn"] >= 4
    assert max(equal) > 0 and again.get_state()["cursor"] > plain.get_state()["cursor"] == 24


def test_cut_off_responses_may_be_left_out_or_punished(start):
    reward = Weighted({"correct": (1.0, letters.InAscii()), "overlong": (1.0, SoftOverlong(max_tokens=8, cache=4))})
    masked, mesh = start(letters.rollouts(overlong="mask", reward=reward))
    kept, _ = start(letters.rollouts(reward=reward))
    with mesh:
        bound = policy()
        left, whole = host(masked.next(bound, 0)), host(kept.next(bound, 0))
    cut = whole["weights"].all(1) & (whole["targets"][:, -1] != masked.speaker.tokenizer.eos_id)
    assert cut.any() and not left["weights"][cut].any()
    np.testing.assert_array_equal(left["weights"][~cut], whole["weights"][~cut])
    report = kept.report()
    assert report["reward/overlong"] < 0 and report["response/truncated"] == cut.mean()
    assert abs(report["reward"] - report["reward/correct"] - report["reward/overlong"]) < 1e-6


def test_penalties_values_and_rescoring_come_from_the_models(start):
    model = replace(letters.MODEL, value_head=True)
    bound, other = policy(0, model), policy(5, model)
    bound = replace(bound, params={**bound.params, "value": jax.tree.map(lambda w: w + 0.1, bound.params["value"])})
    source = letters.rollouts(advantage=Gae(whiten=False), kl_penalty=0.3, rescore=True)
    assert "old_log_probs" not in replace(source, rescore=False).batch_shapes()  # the ratio is to the sampler
    stream, mesh = start(source, frozen={"reference": other})
    with mesh:
        batch = stream.next(bound, 0)
        loss = jax.jit(Ppo())(bound, {}, batch, None)
    rows = host(batch)
    real = rows["weights"] > 0
    np.testing.assert_allclose(rows["old_log_probs"][real], rows["sampler_log_probs"][real], atol=2e-5)
    np.testing.assert_allclose((rows["advantages"] + rows["values"])[real], rows["returns"][real], atol=1e-5)
    assert set(rows) == set(source.batch_shapes())
    k1 = (
        rows["old_log_probs"][real]
        - np.asarray(response_log_probs(other, other.forward(rows), rows, 0).log_probs)[real]
    )
    assert abs(stream.report()["kl"] - k1.mean()) < 1e-4
    assert np.abs(rows["values"][real]).min() > 0 and float(loss.metrics["value"].mean) != 0
    with pytest.raises(UserError, match="frozen model 'reference'"):
        letters.experiment(source=source).check()


def test_a_reward_model_reads_the_end_of_each_response(start):
    model = replace(letters.MODEL, value_head=True)
    judge = policy(3, model)
    ones = jax.random.normal(jax.random.key(1), judge.params["value"]["w"].shape)
    judge = replace(judge, params={**judge.params, "value": {**judge.params["value"], "w": ones}})
    source = letters.rollouts(learned=(ValueAtEnd(weight=0.5),), advantage=GroupRelative(std=False))
    stream, mesh = start(source, frozen={"reward": judge})
    plain, _ = start(letters.rollouts(advantage=GroupRelative(std=False)))
    with mesh:
        rows, without = host(stream.next(policy(), 0)), host(plain.next(policy(), 0))
        values = np.asarray(judge.values(judge.forward(rows).hidden))
    last = 8 + rows["weights"].sum(1).astype(int) - 1
    given = values[np.arange(ROWS), last].reshape(4, 4)
    added = 0.5 * (given - given.mean(1, keepdims=True))
    found = (rows["advantages"] - without["advantages"])[:, 0].reshape(4, 4)
    np.testing.assert_allclose(found, added, atol=1e-4)
    assert abs(stream.report()["reward/learned"] - given.mean()) < 1e-4
    with pytest.raises(UserError, match="asks the frozen model 'reward'"):
        letters.experiment(source=source).check()


def test_a_mesh_of_its_own_for_sampling_gives_the_same(start):
    mesh = make_mesh(MeshSpec(data=2, fsdp=4))
    same, scope = start(letters.rollouts(), mesh)
    moved, _ = start(letters.rollouts(generation=MeshSpec(data=4, tensor=2)), mesh)
    with scope:
        one, two = host(same.next(policy(), 0)), host(moved.next(policy(), 0))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-4)


@pytest.mark.parametrize(
    "objective, changes",
    [
        (Grpo(), {}),
        slow(Grpo(normaliser="constant", clip=Clip(high=0.28)), dict(advantage=GroupRelative(std=False), rounds=2)),
        slow(Grpo(normaliser="tokens", importance_cap=2.0), dict(rescore=True, staleness=1)),
        slow(Grpo(ratio="sequence"), dict(epochs=2, advantage=BatchNormalised(baseline=True))),
    ],
)
def test_a_run_learns_and_repeats_on_any_mesh(tmp_path, cache_dir, objective, changes):
    source = letters.rollouts(**{"prompts": 8, "samples": 8, **changes})
    plain = letters.experiment(24 * source.steps, objective=objective, source=source, log_every=1)
    found = []
    for name in ("one", "two"):
        options = loop.Options(cache_dir=cache_dir)
        loop.run(
            replace(plain, mesh=MeshSpec(data=2, fsdp=4) if name == "two" else MeshSpec()), tmp_path / name, options
        )
        found.append([line for line in metrics.read(tmp_path / name) if "reward" in line])
    for lines in found:
        rewards = [line["reward"] for line in lines[:: source.steps]]
        assert np.mean(rewards[-6:]) > np.mean(rewards[:4]) + 0.1
    assert found[0][0]["reward"] == found[1][0]["reward"]  # the first rollout; later ones part by rounding
    shown = record.read(tmp_path / "one")
    assert len(shown) == 24 * 8 and {"prompt", "response", "reward", "parts"} <= set(shown[0])


def test_a_step_can_be_lowered_before_there_are_rollouts():
    model = replace(letters.MODEL, value_head=True)
    source = letters.rollouts(advantage=Gae(), kl_penalty=0.1)
    experiment = letters.experiment(
        model=model,
        objective=Ppo(policy=Grpo(beta=0.1)),
        source=source,
        frozen={"reference": Init("anywhere")},
        mesh=MeshSpec(data=2, fsdp=2, tensor=2),
    )
    assert "all-reduce" in ahead.lower_step(experiment, jax.devices()).compile().as_text()


def test_a_reward_with_parts_is_graded_by_part():
    reward = Weighted({"correct": (1.0, letters.InAscii()), "again": (-0.5, letters.InAscii())})
    assert graded(reward, Problem("", ""), Response("abcd")) == {"": 0.5, "correct": 1.0, "again": 1.0}
    assert graded(letters.InAscii(), Problem("", ""), Response("a")) == {"": 0.0, "correct": 0.0}


KILLED = """
import sys
from pathlib import Path
from research.train import loop
from tests.rl import letters
from research.train.experiment import CheckpointPolicy
from research.rl import rollout
source = letters.rollouts(epochs=2, minibatches=2, rounds=2)
experiment = letters.experiment(20, source=source, checkpoint=CheckpointPolicy(every=3))
original = rollout.Speaker.ask
def ask(self, policy, problems, **how):
    for answer in original(self, policy, problems, **how):
        if stop_at and "rollout" in how["seeds"] and how["seeds"][2] == stop_at and answer.sample == 2:
            print("in mid-rollout", flush=True)
            import time; time.sleep(60)
        yield answer
stop_at = int(sys.argv[2])
rollout.Speaker.ask = ask
loop.run(experiment, Path(sys.argv[1]), loop.Options(cache_dir=Path(sys.argv[3])))
"""


@pytest.mark.slow
def test_killed_in_mid_rollout_it_goes_on_to_the_same_rewards(tmp_path, cache_dir):
    def begin(name, stop_at):
        command = [sys.executable, "-c", KILLED, str(tmp_path / name), str(stop_at), str(cache_dir)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    whole = begin("whole", 0)
    killed = begin("killed", 3)
    assert killed.stdout is not None and killed.stdout.readline() == "in mid-rollout\n"
    while not (tmp_path / "killed" / "checkpoints" / "9").exists():
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert begin("killed", 0).wait(300) == 0 and whole.wait(300) == 0
    lines = []
    for name in ("whole", "killed"):
        read = metrics.read(tmp_path / name)
        lines.append([{k: v for k, v in line.items() if k not in metrics.CLOCK_FIELDS} for line in read])
    assert lines[0] == lines[1] and any("reward" in line for line in lines[0])
    assert record.read(tmp_path / "whole") == record.read(tmp_path / "killed")


@dataclass(frozen=True)
class Worth:
    """A reward of the user's own: 1 over a number, which may be none."""

    number: complex | None

    def score(self, problem, response):
        return 1 / self.number


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (Worth(0), r"The reward Worth fails with ZeroDivisionError: .* \(line \d+ of .*test_rollout.py\)"),
        (Weighted({"own": (1.0, Worth(None))}), r"The reward Worth fails with TypeError: .*test_rollout.py\)"),
        (Weighted({"own": (1.0, Worth(float("nan")))}), "The reward Worth gave nan for a response to 'p'"),
        (Worth(1j), "The reward Worth gave .*, which is no finite number"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_line(reward, told):
    with pytest.raises(UserError, match=told):
        graded(reward, Problem("p", "a"), Response("a"))


@dataclass(frozen=True)
class SomeLong(letters.Letters):
    """Every third problem does not fit."""

    def problem(self, split, index):
        plain = super().problem(split, index)
        return plain if index % 3 else plain._replace(prompt=plain.prompt * 9)


def test_problems_that_are_too_long_are_passed_over_and_counted(start):
    stream, mesh = start(letters.rollouts(task=SomeLong()))
    with mesh:
        stream.next(policy(), 0)
        assert stream.report()["prompts/too_long"] == pytest.approx(1 / 3, abs=0.15)
        again, _ = start(letters.rollouts(task=SomeLong()))
        again.set_state(json.loads(json.dumps(stream.get_state())))
        for one in (stream, again):
            one.next(policy(), 1)
        assert stream.report()["reward"] == again.report()["reward"] and stream.get_state() == again.get_state()


def test_mistakes_are_told_before_anything_is_sampled(tmp_path, cache_dir):
    for changes, told in (
        (dict(prompts=0), "source.prompts is 0"),
        (dict(minibatches=3), "does not split into 3"),
        (dict(temperature=0.0), "temperature must be above 0"),
        (dict(rounds=2, samples=1), "at least 2"),
    ):
        with pytest.raises(UserError, match=told):
            letters.rollouts(**changes)
    long = letters.experiment(source=letters.rollouts(speech=replace(letters.SPEECH, prompt_length=2)))
    with pytest.raises(UserError, match="A prompt has . tokens and prompt_length is 2"):
        loop.run(long, tmp_path / "long", loop.Options(cache_dir=cache_dir))
    for experiment, told in (
        (letters.experiment(objective=Grpo(beta=0.1)), "frozen model 'reference'"),
        (letters.experiment(source=letters.rollouts(kl_penalty=0.1)), "kl_penalty asks the frozen model 'reference'"),
        (letters.experiment(objective=Grpo(importance_cap=2.0)), "set rescore=True"),
        (letters.experiment(objective=Ppo()), "advantage to Gae"),
        (letters.experiment(objective=Ppo(), source=letters.rollouts(advantage=Gae())), "has no value head"),
        (letters.experiment(objective=NextToken()), "Rollouts has none, or for responses alone"),
        (replace(tiny.experiment(), objective=Grpo()), "TextSource gives none: set source to Rollouts"),
        (letters.experiment(source=letters.rollouts(overlong="masked")), "source.overlong is 'masked'"),
    ):
        with pytest.raises(UserError, match=told):
            loop.run(experiment, tmp_path / "without", loop.Options(cache_dir=cache_dir))


def test_a_value_head_begins_afresh_beside_a_checkpoint(tmp_path, cache_dir):
    options = loop.Options(cache_dir=cache_dir)
    plain = letters.experiment(2, checkpoint=CheckpointPolicy(every=0))
    loop.run(plain, tmp_path / "plain", options)
    model = replace(letters.MODEL, value_head=True)
    valued = replace(
        plain,
        model=model,
        objective=Ppo(),
        source=letters.rollouts(advantage=Gae()),
        init=Init(str(tmp_path / "plain"), model=letters.MODEL),
        length=Steps(3),
    )
    result = loop.run(valued, tmp_path / "valued", options)
    assert result["metrics"]["loss/value"] > 0
