# SPDX-License-Identifier: Apache-2.0
"""``lab plan``: what shares a program, what is remembered, what is said of what does not fit, what a search finds."""

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from launch import prices
from launch.compiler import Compiled, Compiler, Failed, Job, TooLarge, failure
from launch.search import Search
from research.core.chips import CHIPS, slice_of
from research.core.config import override
from research.core.errors import UserError
from research.core.sharding import MeshSpec
from research.data.sources import Stdlib
from research.train.ahead import program_record
from research.train.estimate import estimate
from research.train.experiment import Steps
from tests import tiny
from tests.conftest import ROOT

STUDY = "tests/launch/tiny_study.py"
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not here: install libtpu"
)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Runs the command in a process of its own; gives its exit code, what it printed and what it complained of."""
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XLA_FLAGS", "")

    def run(*arguments, code="sys.exit(main(sys.argv[1:]))"):
        script = f"import sys; from launch.cli import main; {code}"
        done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


def test_runs_that_differ_in_steps_seed_rate_or_text_share_a_program():
    one = tiny.experiment()
    for other in (
        replace(one, name="b", seed=3, length=Steps(7), log_every=2),
        replace(one, optimizer=replace(one.optimizer, peak=1.0)),
        replace(one, source=replace(one.source, corpus=Stdlib())),
        replace(one, evals=()),
    ):
        assert program_record(other) == program_record(one)
    for other in (
        replace(one, mesh=MeshSpec(fsdp=2)),
        replace(one, accumulate=2),
        replace(one, source=replace(one.source, batch_size=16)),
        replace(one, model=replace(one.model, d_model=64)),
        replace(one, optimizer=replace(one.optimizer, b2=0.99)),
    ):
        assert program_record(other) != program_record(one)
    evaluation, again = one.evals[0], replace(one, model=replace(one.model, remat="full"), accumulate=2)
    assert program_record(one, evaluation) == program_record(again, evaluation) != program_record(one)


def test_a_second_plan_needs_no_jax_and_a_changed_study_is_planned_anew(lab, tmp_path):
    study = tmp_path / "study.py"
    study.write_text((ROOT / STUDY).read_text())
    words = ("plan", str(study), "--tpu", "v5e-8", "--estimate", "--json")
    code, first, _ = lab(*words)
    made = json.loads(first)
    assert code == 0 and [row["name"] for row in made["rows"]] == ["tiny", "longer"]
    assert [row["steps"] for row in made["rows"]] == [30, 40] and made["rows"][0]["parts"]["compute"] > 0
    without = "main(sys.argv[1:]); print('jax' in sys.modules, 'numpy' in sys.modules)"
    _, again, _ = lab(*words, code=without)
    assert again.splitlines()[-1] == "False False"
    assert json.loads(again.splitlines()[0])["rows"] == made["rows"]
    study.write_text(study.read_text().replace("Steps(40)", "Steps(50)"))
    _, changed, _ = lab(*words)
    assert [row["steps"] for row in json.loads(changed)["rows"]] == [30, 50]


def test_a_table_a_price_and_a_note_on_what_is_too_small_to_time(lab, tmp_path):
    table = tmp_path / "prices.toml"
    table.write_text("[v5e]\nours = 3600\n")
    code, printed, _ = lab("plan", STUDY, "--tpu", "v5e-8", "--estimate", "--pricing", "ours", "--prices", str(table))
    assert code == 0 and "v5e-8: 8 chips of 16 GB" in printed and "bound by what starting a program" in printed
    assert "ours at 3600 $" in printed


def test_runs_that_learn_from_rollouts_say_that_sampling_is_not_counted(lab):
    _, printed, _ = lab("plan", "experiments/grpo_variants.py", "--tpu", "v5e-4", "--estimate", "--json")
    (note,) = (note for note in json.loads(printed)["notes"] if "rollouts" in note)
    assert note.endswith("leave out their sampling: --generate 256x42 gives both.")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--tpu", "v5e-7"), "There is no slice v5e-7"),
        (("--tpu", "h100-8"), "names no TPU slice"),
        (("--tpu", "v5e-8", "--mesh", "rows=8"), "the axes are data, stage, fsdp"),
        (("--tpu", "v5e-8", "--slices", "0"), "--slices 0: give 1 or more"),
        (("--tpu", "v5e-8", "--generate", "0x8"), "--generate 0x8: give SLOTSxTOKENS"),
        (("--tpu", "v5e-8", "--pricing", "gratis"), "has no price of v5e for gratis"),
        (("--tpu", "v5e-8", "--prices", "nowhere.toml"), "There is no price table nowhere.toml"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    from launch.cli import main

    assert main(["plan", STUDY, *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1] and len(said) == 1


def test_prices_of_every_chip_are_numbers(tmp_path):
    for chip in CHIPS.values():
        assert 0 < prices.per_chip_hour(chip, "spot") < prices.per_chip_hour(chip, "on-demand")
    for text in ("[v5e]\non-demand = true\n", "[v5e]\non-demand = -1\n", "v5e = 3\n", "[v5e\n", ""):
        (tmp_path / "p.toml").write_text(text)
        with pytest.raises(UserError, match=r"p\.toml"):
            prices.per_chip_hour(CHIPS["v5e"], "on-demand", tmp_path / "p.toml")


def test_a_run_without_a_legal_mesh_says_so_and_the_others_are_planned(lab):
    code, printed, _ = lab("plan", STUDY, "--tpu", "v5e-16", "--estimate", "--json")  # a batch of 8 rows
    rows = json.loads(printed)["rows"]
    assert code == 1 and "does not divide 8" in rows[0]["problem"] and rows[0]["parts"] == {}


# --- what does not fit, what is fastest ---------------------------------------------------------


LARGE = override(
    tiny.experiment(), "model.d_model=4096", "model.num_layers=32", "model.attention.num_heads=32",
    "model.attention.num_kv_heads=8", "model.mlp.d_ff=14336", "source.batch_size=256", "source.sequence_length=4096",
    "precision.compute=bfloat16", "mesh.data=1", "mesh.fsdp=64",
)  # fmt: skip


class Truth:
    """Stands for the compiler: memory affine in rows, and a little other than the estimate; time as estimated."""

    def __init__(self, experiment, where, factor):
        self.experiment, self.where, self.factor, self.asked = experiment, where, factor, []

    def peak(self, change):
        return estimate(override(self.experiment, *change), self.where).peak * self.factor

    def __call__(self, change):
        self.asked.append(tuple(change))
        guess = estimate(override(self.experiment, *change), self.where)
        return Compiled(0, 0, 0, 0, 0, int(self.peak(change)), 0, 0, guess.roofline.parts, {}, 0.0)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.4])
def test_a_search_finds_the_fastest_that_fits_in_few_compilations(factor):
    where = slice_of("v5p-128")
    truth = Truth(LARGE, where, factor)
    choice = Search(LARGE, where, 1, truth).fastest()
    assert len(truth.asked) <= 5 and choice.change in truth.asked  # verified by the compiler
    assert truth.peak(choice.change) <= where.chip.hbm_bytes
    best = estimate(override(LARGE, *choice.change), where).roofline.seconds
    everything = Search(LARGE, where, 1, None)
    rivals = [c for c in everything._candidates(everything._meshes(), ("none", "save_weight_matmuls", "full"))
              if c.guess.peak * factor <= where.chip.hbm_bytes]  # fmt: skip
    assert best <= 1.001 * min(c.guess.roofline.seconds for c in rivals)


def test_what_does_not_fit_is_told_the_least_change_and_that_it_was_compiled():
    where = slice_of("v5p-128")
    crowded = replace(LARGE, source=replace(LARGE.source, batch_size=2048))
    assert estimate(crowded, where).peak > where.chip.hbm_bytes
    truth = Truth(crowded, where, 1.1)
    choice = Search(crowded, where, 1, truth).fitting()
    assert "mesh." not in choice.told and "(compiled)" in choice.told and truth.peak(choice.change) <= 95 * 2**30
    assert "remat=" in choice.told or "accumulate=" in choice.told


def test_where_nothing_fits_it_is_said_and_a_program_that_fails_is_passed_over():
    huge, where = override(LARGE, "model.num_layers=2000"), slice_of("v5e-16")
    nothing = Search(override(huge, "mesh.fsdp=16"), where, 1, None).fitting()
    assert "no mesh, recomputation or microbatch" in nothing.problem
    asked = []

    def broken(change):
        asked.append(change)
        if len(asked) == 1:
            raise Failed("the compiler ended with status 134")
        return Truth(LARGE, slice_of("v5p-128"), 1.0)(change)

    choice = Search(LARGE, slice_of("v5p-128"), 1, broken).fastest()
    assert choice.change in asked[1:]


# --- the compiler's process ----------------------------------------------------------------------


def test_a_process_that_dies_is_one_failed_program_and_the_next_gets_a_new_one(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import os\nos.write(2, b'Check failed: it is broken\\n')\nos._exit(134)\n")
    said = []
    with Compiler(said.append) as compiler:
        with pytest.raises(Failed, match="status 134: Check failed: it is broken"):
            compiler.compile(Job(str(bad), (), "x", "v5e-4"), "x")
        with pytest.raises(UserError, match="There is no study nowhere.py"):
            compiler.compile(Job("nowhere.py", (), "x", "v5e-4"), "x")


@needs_compiler
@pytest.mark.slow
def test_a_study_compiled_for_a_slice(lab):
    """Distinct programs are compiled once, the figures are the compiler's, and the same words again compile nothing."""
    words = ("plan", "experiments/quickstart.py:smallest", "--tpu", "v5e-4", "--mesh", "fsdp=4")
    code, printed, told = lab(*words, "--json")
    made = json.loads(printed)
    models = {row["params"] for row in made["rows"]}
    assert code == 0 and len(made["rows"]) > len(models) == 3 and made["programs"] == made["compiled"] == 2 * 3
    assert told.count("compiling ") == 6
    check = (
        "from launch import study; from research.core.config import override; from research.train import ahead;"
        "e = study.load('experiments/quickstart.py:smallest').only(sys.argv[1]);"
        "e = override(e, 'mesh.data=1', 'mesh.fsdp=4');"
        "print(ahead.compile_step(e, 'v5e:2x2').memory_analysis().peak_memory_in_bytes,"
        "ahead.compile_step(e, 'v5e:2x2').memory_analysis().argument_size_in_bytes)"
    )
    row = made["rows"][-1]
    _, figures, _ = lab(row["name"], code=f"import os; os.environ['JAX_PLATFORMS'] = 'cpu'; {check}")
    step, arguments = (int(figure) for figure in figures.split())
    assert row["memory"]["arguments"] == arguments and row["memory"]["step"] == step <= row["memory"]["peak"]
    _, again, told = lab(*words, "--fresh", "--json")
    assert json.loads(again)["compiled"] == 0 and "compiling" not in told
    assert json.loads(again)["rows"] == made["rows"]
    _, more, _ = lab(*words, "--generate", "8x64", "--json")
    assert json.loads(more)["compiled"] == 2 * 3
    for row in json.loads(more)["rows"]:  # 64 tokens of a row take longer than one, though the weights are the same
        assert row["generation"]["prefill"]["seconds"] > row["generation"]["decode"]["seconds"] > 0
        assert min(one["peak"] for one in row["generation"].values()) > 0


@needs_compiler
@pytest.mark.verify
def test_a_7b_model_on_a_pod(lab):
    """Its HBM figure is the compiler's own, and the second plan is there at once."""
    words = ("plan", "experiments/llama2_7b.py", "--tpu", "v5e-256", "--json")
    code, printed, _ = lab(*words)
    (row,) = json.loads(printed)["rows"]
    figure = (
        "from experiments import llama2_7b; from research.train import ahead;"
        "e = llama2_7b.sweep()['llama2-7b'];"
        "print(ahead.compile_step(e, 'v5e:16x16').memory_analysis().peak_memory_in_bytes)"
    )
    _, compiled, _ = lab(code=f"import os; os.environ['JAX_PLATFORMS'] = 'cpu'; {figure}")
    assert code == 0 and row["memory"]["peak"] == int(compiled) and row["bound"] == "compute"
    begun = time.monotonic()
    _, again, told = lab(*words, code="main(sys.argv[1:]); print('jax' in sys.modules)")
    assert again.splitlines()[-1] == "False" and "compiling" not in told and time.monotonic() - begun < 5


@needs_compiler
@pytest.mark.verify
def test_every_kind_of_reinforcement_learning_compiles_for_a_slice(lab):
    words = ("plan", "experiments/grpo_variants.py", "--tpu", "v5e-4", "--generate", "256x42", "--json")
    code, printed, _ = lab(*words)
    made = json.loads(printed)
    assert code == 0 and len(made["rows"]) == 9 and made["programs"] == 9 + 2 * 2  # one has a value head
    assert all(row["compiled"] and not row["problem"] and row["generation"]["decode"] for row in made["rows"])
    assert not any("rollouts" in note for note in made["notes"])


def test_a_program_too_large_for_the_compiler_tells_its_size_and_what_would_fit():
    said = (
        "XlaRuntimeError: RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 16.54G of 15.75G hbm. Exceeded hbm capacity by 811.03M."
    )
    found = failure(said)
    assert isinstance(found, TooLarge) and found.peak == pytest.approx(16.54 * 2**30)
    other = failure("XlaRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory: (1.5T) exceeds available HBM (15.75G)")
    assert isinstance(other, TooLarge) and other.peak == 1.5 * 2**40
    assert not isinstance(failure("INTERNAL: Mosaic failed to compile"), TooLarge)
    where = slice_of("v5p-128")
    crowded = replace(LARGE, source=replace(LARGE.source, batch_size=2048))
    truth = Truth(crowded, where, 1.1)

    def compiles(change):
        if truth.peak(change) > where.chip.hbm_bytes:
            truth.asked.append(tuple(change))
            raise TooLarge(truth.peak(change))
        return truth(change)

    choice = Search(crowded, where, 1, compiles).fitting()
    assert choice.change and truth.peak(choice.change) <= where.chip.hbm_bytes and len(truth.asked) <= 5
