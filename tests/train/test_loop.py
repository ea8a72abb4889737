# SPDX-License-Identifier: Apache-2.0
"""Whole runs in this process: what they leave, what they refuse, how they stop."""

import json
import os
import shutil
import signal
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import sharding
from research.core.errors import Interrupted
from research.core.sharding import MeshError, MeshSpec
from research.core.types import Context, Loss, Term, UserError, WeightedSum
from research.data.sources import Synthetic
from research.data.tokenizers import Bytes
from research.evals.validation import Validation
from research.models.attention import Attention
from research.models.moe import Moe
from research.models.positions import Learned
from research.models.routers import Sigmoid
from research.objectives.next_token import NextToken
from research.train import checkpoint, loop, metrics
from research.train.checkpoint import CheckpointError
from research.train.experiment import AdamW, CheckpointPolicy, Init, Steps
from research.train.monitor import Diverged
from research.train.optimizers import Schedule
from research.train.start import Program, first_state
from tests import tiny
from tests.train import events

ONE = MeshSpec(data=1)


def run(directory, cache_dir, experiment=None, **changes):
    experiment = experiment or tiny.experiment(**{"steps": 10, "mesh": ONE, **changes})
    return loop.run(experiment, directory, loop.Options(cache_dir=cache_dir))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache_dir):
    directory = tmp_path_factory.mktemp("run")
    return directory, run(directory, cache_dir)


def test_a_run_leaves_metrics_provenance_checkpoint_and_result(finished):
    directory, result = finished
    lines = metrics.read(directory)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert lines[0]["loss"] > lines[-2]["loss"]
    assert result["loss"] == lines[-1]["validation/loss"] and result["bits_per_byte"] > 0
    assert result["tokens"] == 10 * 8 * 64 and result["status"] == "finished"
    provenance = json.loads((directory / "provenance.jsonl").read_text().splitlines()[0])
    assert provenance["packages"]["jax"] == jax.__version__ and provenance["devices"]["platform"] == "cpu"
    assert {"commit", "diff", "mesh", "data"} <= set(provenance)
    assert provenance["data"]["corpus_hash"] and provenance["data"]["corpus_bytes"] > 0
    assert checkpoint.steps(directory) == [5, 10]


def test_tensorboard_holds_what_the_metrics_hold(finished):
    directory, _ = finished
    found = {(name, step): value for name, step, value in events.read(directory)}
    for line in metrics.read(directory):
        for name, number in metrics.scalars(line):
            assert found[name, line["step"]] == pytest.approx(number, rel=1e-6), (name, line["step"])


def test_a_finished_run_is_left_alone(finished, cache_dir):
    directory, result = finished
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert run(directory, cache_dir) == result
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_a_run_that_died_before_its_result_was_written_writes_the_same_without_training(finished, tmp_path, cache_dir):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / loop.RESULT).unlink()
    result = run(tmp_path, cache_dir)
    assert result == finished[1] and result["loss"] > 0 and result["bits_per_byte"] > 0
    assert loop.read_json(tmp_path / loop.RESULT) == result
    assert metrics.read(tmp_path) == metrics.read(finished[0])  # the clock's fields too: no step was taken again
    assert sorted(events.read(tmp_path)) == sorted(events.read(finished[0]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": replace(tiny.MODEL, d_model=64)}, "model.d_model: 32 -> 64"),
        ({"seed": 3}, "seed"),
        ({"optimizer": AdamW(peak=1e-2)}, "optimizer.peak"),
    ],
)
def test_going_on_under_other_settings_is_refused_by_name(finished, cache_dir, change, words):
    with pytest.raises(CheckpointError, match=words):
        run(finished[0], cache_dir, **change)


def test_another_tokenizer_is_refused_by_name(finished, cache_dir):
    experiment = tiny.experiment(steps=10, mesh=ONE)
    from research.data.tokenizers import Characters

    other = replace(experiment, source=replace(experiment.source, tokenizer=Characters()))
    with pytest.raises(CheckpointError, match="source.tokenizer"):
        run(finished[0], cache_dir, other)


def test_data_that_changed_under_the_same_settings_are_refused(tmp_path, cache_dir):
    from research.data.sources import TextFolder

    (tmp_path / "text").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "text" / f"{name}.txt").write_text(f"{name} some text of its own.\n\n" * 400)
    experiment = tiny.experiment(steps=20, mesh=ONE, evals=())
    source = replace(experiment.source, corpus=TextFolder(str(tmp_path / "text")), tokenizer=Bytes())
    experiment = replace(experiment, source=source)
    interrupted_after(experiment, tmp_path / "run", cache_dir, step=5)
    (tmp_path / "text" / "a.txt").write_text("quite another text.\n\n" * 400)
    with pytest.raises(UserError, match="corpus"):
        run(tmp_path / "run", cache_dir, experiment)


class StopAt:
    """A progress that sends this process a signal once a step has been read."""

    def __init__(self, step, signum=signal.SIGTERM):
        self.step, self.signum = step, signum

    def start(self, name, *, total, step): ...

    def update(self, step, values):
        if step == self.step:
            os.kill(os.getpid(), self.signum)

    def note(self, text): ...

    def stop(self): ...


def interrupted_after(experiment, directory, cache_dir, *, step, signum=signal.SIGTERM):
    with pytest.raises(Interrupted) as stopped:
        loop.run(experiment, directory, loop.Options(cache_dir=cache_dir, progress=StopAt(step, signum)))
    return stopped.value


def without_clock(lines):
    return [{k: v for k, v in line.items() if k not in metrics.CLOCK_FIELDS} for line in lines]


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_leaves_and_the_run_goes_on_bit_for_bit(finished, tmp_path, cache_dir, signum):
    experiment = tiny.experiment(steps=10, mesh=ONE, checkpoint=CheckpointPolicy(every=0))
    stopped = interrupted_after(experiment, tmp_path, cache_dir, step=4, signum=signum)
    assert stopped.signum == signum and len(checkpoint.steps(tmp_path)) == 1
    run(tmp_path, cache_dir, experiment)
    assert without_clock(metrics.read(tmp_path)) == without_clock(metrics.read(finished[0]))


def test_a_signal_during_the_last_step_still_stops_the_caller(tmp_path, cache_dir):
    experiment = tiny.experiment(steps=6, mesh=ONE)
    interrupted_after(experiment, tmp_path, cache_dir, step=6)
    assert loop.read_json(tmp_path / loop.RESULT)["status"] == "finished"


def test_an_average_starts_from_loaded_weights(finished, tmp_path, cache_dir):
    experiment = tiny.experiment(steps=1, mesh=ONE, init=Init(checkpoint=str(finished[0])), ema=0.9)
    mesh = sharding.make_mesh(ONE)
    with jax.set_mesh(mesh):
        stream = experiment.source.start(Context(mesh=mesh, seed=0, cache_dir=cache_dir))
        state = first_state(Program(experiment, mesh), checkpoint.Checkpointer(tmp_path, experiment.checkpoint), stream)
    for average, weight in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(average, weight)


def test_checkpoints_kept(tmp_path, cache_dir):
    policy = CheckpointPolicy(every=2, keep_last=2, keep_every=4)
    run(tmp_path, cache_dir, checkpoint=policy, evals=())
    assert checkpoint.steps(tmp_path) == [4, 8, 10]


def test_lines_past_the_restored_step_are_dropped(tmp_path):
    (tmp_path / metrics.FILE).write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a"')
    writer = metrics.MetricsWriter(tmp_path, step=1)
    writer.write(2, {"a": np.float32(5), "b": float("nan"), "c": np.arange(2)})
    writer.close()
    assert metrics.read(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 5.0, "b": "nan", "c": [0, 1]}]


def test_the_clock_goes_on_where_a_restored_step_was_evaluated(tmp_path):
    (tmp_path / metrics.FILE).write_text('{"step": 1, "seconds": 7.5}\n{"step": 1, "validation/loss": 2}\n')
    writer = metrics.MetricsWriter(tmp_path, step=1)
    writer.close()
    assert writer.seconds == 7.5


def test_records_past_the_restored_step_are_dropped_from_tensorboard(tmp_path):
    for first, last, restored in ((1, 7, 0), (4, 5, 3)):
        writer = metrics.MetricsWriter(tmp_path, step=restored)
        for step in range(first, last + 1):
            writer.write(step, {"loss": 10.0 * restored + step})
        writer.close()
        if not restored:  # files are named by the second, and a run does not go on in the second it died in
            (path,) = (tmp_path / "tensorboard").iterdir()
            path.rename(path.with_name("events.out.tfevents.1.before"))
    assert events.read(tmp_path) == [("loss", *pair) for pair in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 34.0), (5, 35.0))]


def test_a_loss_that_is_not_a_number_stops_with_step_rate_and_last_good_checkpoint(tmp_path, cache_dir):
    rising = AdamW(peak=2e17, clip=0.0, schedule=Schedule(warmup=Steps(5)))
    wild = tiny.experiment(steps=10, mesh=ONE, optimizer=rising, evals=(), checkpoint=CheckpointPolicy(every=1))
    with pytest.raises(Diverged, match=r"at step \d+, at a learning rate of [\d.]+e\+\d+; the last good checkpoint is"):
        run(tmp_path, cache_dir, wild)
    saved = checkpoint.steps(tmp_path)
    shapes = tiny.MODEL.shapes(wild.precision)
    everywhere = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    params = checkpoint.load_params(tmp_path, shapes, everywhere)
    first_bad = next(line["step"] for line in metrics.read(tmp_path) if "nan" in (line["loss"], line["grad_norm"]))
    assert saved[-1] == first_bad - 1 and all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, cache_dir):
    """The step's loss and gradient were; its update was not."""
    wild = tiny.experiment(steps=10, mesh=ONE, optimizer=AdamW(peak=1e30, clip=0.0), evals=())
    with pytest.raises(Diverged, match="parameters' norm of tiny became inf at step 1.*there is no checkpoint before"):
        run(tmp_path, cache_dir, replace(wild, checkpoint=CheckpointPolicy(every=1)))
    assert not checkpoint.steps(tmp_path)


def test_a_bad_validation_loss_stops_the_run_too(tmp_path, cache_dir):
    bad = Validation(tiny.experiment().source.validation(num_batches=1), NotANumber())
    with pytest.raises(Diverged, match="validation/loss of tiny became nan at step 2"):
        run(tmp_path, cache_dir, tiny.experiment(steps=2, mesh=ONE, evals=(bad,)))
    assert not (tmp_path / loop.RESULT).exists()


@dataclass(frozen=True)
class NotANumber:
    def __call__(self, policy, frozen, batch, key):
        return Loss({"x": Term(1.0, WeightedSum(jnp.asarray(jnp.nan), jnp.ones(())))}, {}, {})


def test_the_state_of_another_model_is_refused_by_name(finished, tmp_path, cache_dir):
    other = tiny.experiment(mesh=ONE, model=replace(tiny.MODEL, d_model=64), init=Init(str(finished[0]), parts="all"))
    with pytest.raises(CheckpointError, match="belongs to other settings.*model.d_model: 32 -> 64"):
        run(tmp_path, cache_dir, other)


def test_an_eval_that_the_model_cannot_read_is_refused(tmp_path, cache_dir):
    short = replace(tiny.MODEL, position=Learned(64))
    source = tiny.experiment().source
    evals = (Validation(replace(source, sequence_length=128).validation(num_batches=1), NextToken()),)
    with pytest.raises(UserError, match="longer than the model's table"):
        run(tmp_path, cache_dir, tiny.experiment(mesh=ONE, model=short, evals=evals))


def test_two_evals_of_one_name_are_refused(tmp_path, cache_dir):
    with pytest.raises(UserError, match="name them apart"):
        run(tmp_path, cache_dir, tiny.experiment(mesh=ONE, evals=tiny.experiment().evals * 2))


@pytest.mark.parametrize("damage", ["missing", "garbled", "one bit"])
def test_a_corrupt_checkpoint_is_one_sentence(tmp_path, cache_dir, damage):
    experiment = tiny.experiment(steps=10, mesh=ONE, evals=())
    interrupted_after(experiment, tmp_path, cache_dir, step=6)
    *_, last = checkpoint.steps(tmp_path)
    folder = tmp_path / "checkpoints" / str(last) / "params"
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        if damage == "missing":
            path.unlink()
        elif damage == "garbled":
            path.write_bytes(os.urandom(path.stat().st_size))
    if damage == "one bit":
        path = max(folder.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match="could not be read.*remove that folder") as error:
        run(tmp_path, cache_dir, experiment)
    assert "\n" not in str(error.value) and metrics.read(tmp_path)[0]["step"] == 1


def test_a_half_written_checkpoint_is_not_taken_for_whole(tmp_path, cache_dir):
    experiment = tiny.experiment(steps=10, mesh=ONE, evals=())
    interrupted_after(experiment, tmp_path, cache_dir, step=6)
    *_, last = checkpoint.steps(tmp_path)
    half = tmp_path / "checkpoints" / f"{last + 1}.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    assert checkpoint.steps(tmp_path)[-1] == last
    assert run(tmp_path, cache_dir, experiment)["status"] == "finished"


@pytest.mark.slow
def test_weights_from_another_run(finished, tmp_path, cache_dir):
    """Weights alone start a new run at step 0 with another optimizer; everything goes on where the other stood."""
    init = Init(checkpoint=str(finished[0]))
    run(tmp_path / "weights", cache_dir, init=init, optimizer=AdamW(peak=0.0), evals=(), steps=1)
    done = metrics.read(finished[0])[-2]
    assert metrics.read(tmp_path / "weights")[0]["param_norm"] == pytest.approx(done["param_norm"], rel=1e-6)
    everything = replace(init, parts="all")
    run(tmp_path / "all", cache_dir, init=everything, evals=(), steps=12)
    assert [line["step"] for line in metrics.read(tmp_path / "all")] == [11, 12]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run(tmp_path / "none", cache_dir, init=Init(checkpoint=str(tmp_path)))
    wide = replace(tiny.MODEL, d_model=64)
    with pytest.raises(CheckpointError, match="do not fit the model"):
        run(tmp_path / "wide", cache_dir, init=init, model=wide, evals=())


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_goes_on_under_another(finished, tmp_path, cache_dir):
    experiment = tiny.experiment(steps=10, mesh=ONE)
    interrupted_after(experiment, tmp_path, cache_dir, step=5)
    run(tmp_path, cache_dir, replace(experiment, mesh=MeshSpec(data=2, fsdp=2, tensor=2)))
    wanted, found = metrics.read(finished[0]), metrics.read(tmp_path)
    np.testing.assert_allclose([l["loss"] for l in found[:-1]], [l["loss"] for l in wanted[:-1]], rtol=1e-4)  # noqa: E741


def test_experts_and_their_biases_go_from_mesh_to_mesh(tmp_path):
    """Arrays saved over stages, experts and fsdp are bit for bit those restored over a ring and tensor, and on one."""
    model = replace(tiny.MODEL, mlp=Moe(4, 16, Sigmoid(2, bias_rate=0.01), shared_d_ff=8))

    def program(spec):
        experiment = tiny.experiment(model=model, mesh=spec, ema=0.9)
        return Program(experiment, sharding.make_mesh(spec))

    first = program(MeshSpec(data=1, stage=2, fsdp=2, expert=2))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), first.shapes)
    checkpoints = checkpoint.Checkpointer(tmp_path, CheckpointPolicy())
    checkpoints.save(3, jax.device_put(state, first.layout), {"at": 7}, None)
    checkpoints.wait()
    checkpoints.close()
    for spec in (MeshSpec(data=2, context=2, tensor=2), ONE):
        other = program(spec)
        reader = checkpoint.Checkpointer(tmp_path, CheckpointPolicy(), read_only=True)
        found, position = reader.restore(3, other.shapes, other.layout, experiment=None)
        reader.close()
        assert position == {"at": 7} and jax.tree.leaves(found.buffers)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), state)
        assert jax.tree.map(lambda x: x.sharding, found) == other.layout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh": MeshSpec(data=3)}, "8 rows of a batch 3 ways"),
        ({"accumulate": 3}, "multiple of 3"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"model": replace(tiny.MODEL, position=Learned(16))}, "table of 16 positions"),
        ({"model": replace(tiny.MODEL, vocab_size=100)}, "vocab_size"),
        ({"model": replace(tiny.MODEL, attention=Attention(5))}, "does not split into 5 heads"),
    ],
)
def test_what_cannot_run_is_one_sentence_before_anything_is_written(tmp_path, cache_dir, changes, words):
    with pytest.raises((UserError, MeshError), match=words) as error:
        run(tmp_path / "run", cache_dir, **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [8, 5])
def test_profile_leaves_a_trace(tmp_path, cache_dir, steps):
    experiment = tiny.experiment(steps=steps, mesh=ONE, evals=())
    loop.run(experiment, tmp_path, loop.Options(cache_dir=cache_dir, profile=True))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_training_reaches_the_entropy_of_its_source(tmp_path, cache_dir):
    """A model of a first-order chain comes down to the chain's own entropy, and not below it."""
    corpus = Synthetic(vocab_size=16, num_symbols=400_000)
    source = replace(tiny.experiment().source, corpus=corpus, batch_size=32, sequence_length=64)
    evals = (replace(tiny.experiment().evals[0], source=source.validation(num_batches=8)),)
    result = run(
        tmp_path,
        cache_dir,
        source=source,
        evals=evals,
        length=Steps(400),
        optimizer=AdamW(peak=1e-2),
        log_every=50,
    )
    assert corpus.entropy_rate() - 0.02 < result["loss"] < corpus.entropy_rate() + 0.05
