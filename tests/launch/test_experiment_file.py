# SPDX-License-Identifier: Apache-2.0
"""Files of planned runs: they load, and hold the models, lengths and settings that were planned."""

from dataclasses import replace

import pytest

from launch import study
from launch.experiment_file import SEQUENCE_LENGTH, Like, Planned, checked, write
from research.core.types import UserError
from research.models.attention import Attention
from research.models.moe import Moe
from research.scaling import buildable, cost
from research.scaling.laws import DEEPSEEK_BATCH_TOKENS, DEEPSEEK_LEARNING_RATE
from research.train.experiment import Flops, Tokens

PLAIN = """
from dataclasses import replace
from experiments import quickstart
from research.train.experiment import Flops


def base(width, budget):
    return replace(quickstart.base(), model=quickstart.model(width), length=Flops(budget), seed=5)


def sweep():
    return {f'it is "{width}"': base(width, budget) for width, budget in ((16, 1e10), (64, 2e10))} | {
        "longer": base(64, 4e10)
    }


def other():
    return {"alone": replace(base(32, 1e10), log_every=7)}
"""
ADJUSTED = (
    PLAIN
    + """

def adjust(experiment):
    optimizer = replace(experiment.optimizer, peak=1 / experiment.model.d_model)
    return replace(experiment, optimizer=optimizer, log_every=3)
"""
)
WORDS = ("What it is for.", 'A "title" of """quotes""" and C:\\new\\x and {braces}', "word " * 60)


@pytest.fixture
def like(tmp_path, monkeypatch):
    """A study, with or without an ``adjust``, in the current folder or in another."""

    def made(text: str = PLAIN, *, function: str = "", inside: bool = False) -> Like:
        path = tmp_path / "own study.py"
        path.write_text(text)
        if inside:
            monkeypatch.chdir(tmp_path)
            path = path.relative_to(tmp_path)
        reference = f"{path}:{function}" if function else str(path)
        return Like(reference, study.load(reference))

    return made


def wider(like: Like, width: int = 40, depth: int = 3):
    family = buildable.family_of([experiment.model for experiment in like.study.experiments.values()])
    return family.model(width, depth)


def test_from_a_study_model_and_length_are_as_planned_and_all_else_stays(like, tmp_path):
    own = like()
    model = wider(own)
    path = write(tmp_path / "more.py", [Planned("big-1", model, 3e10, 1e5)], like=own, words=WORDS)
    found = study.load(str(path)).experiments["big-1"]
    base = own.experiment(float(cost.params(model).total))
    assert found == replace(base, name="big-1", model=model, length=Flops(3e10))
    assert found.flops == pytest.approx(3e10, rel=0.01) and found.seed == 5
    assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert all(len(line) <= 120 for line in path.read_text().splitlines() if "load_module(" not in line)


def test_the_study_s_adjust_has_the_last_word(like, tmp_path):
    own = like(ADJUSTED)
    path = write(tmp_path / "more.py", [Planned("a", wider(own, 48), 3e10, 1e5)], like=own, words=WORDS)
    found = study.load(str(path)).experiments["a"]
    assert found.optimizer.peak == pytest.approx(1 / 48) and found.log_every == 3


def test_the_function_that_was_named_is_the_one_that_goes_on(like, tmp_path):
    own = like(function="other")
    path = write(tmp_path / "more.py", [Planned("a", wider(own), 3e10, 1e5)], like=own, words=WORDS)
    assert study.load(str(path)).experiments["a"].log_every == 7


def test_a_study_in_the_current_folder_is_named_from_there(like, tmp_path):
    own = like(inside=True)
    path = write(tmp_path / "more.py", [Planned("a", wider(own), 3e10, 1e5)], like=own, words=WORDS)
    assert 'load_module(Path("own study.py"))' in path.read_text() and str(tmp_path) not in path.read_text()
    assert study.load(str(path)).experiments["a"].model == wider(own)


def test_like_is_the_nearest_in_size_at_the_largest_budget(like):
    own = like()
    names = list(own.study.experiments)
    sizes = [cost.params(experiment.model).total for experiment in own.study.experiments.values()]
    assert own.nearest(sizes[0] * 1.1) == names[0] == 'it is "16"'
    assert own.nearest(sizes[1] * 10) == "longer"  # as large as another, and trained for longer


def test_heads_are_as_described(like, tmp_path):
    """Fewer heads for keys and values, and a study whose heads have a width of their own."""
    own = like(PLAIN + "\n\nORIGINAL = base\n\n\ndef base(width, budget):\n    made = ORIGINAL(width, budget)\n"
               "    attention = replace(made.model.attention, head_dim=4)\n"
               "    return replace(made, model=replace(made.model, attention=attention))\n")  # fmt: skip
    model = replace(wider(own, 64), attention=Attention(num_heads=8, num_kv_heads=2))
    path = write(tmp_path / "more.py", [Planned("a", model, 3e10, 1e5)], like=own, words=WORDS)
    found = study.load(str(path)).experiments["a"].model
    assert found.attention == model.attention and cost.params(found) == cost.params(model)


def test_runs_that_are_made_again_have_another_seed(like, tmp_path):
    own = like()
    model = wider(own)
    twice = [Planned("a", model, 3e10, 1e5), Planned("b", model, 3e10, 1e5), Planned("c", model, 2e10, 1e5)]
    for like_it in (own, None):
        path = write(tmp_path / "more.py", twice, like=like_it, words=WORDS)
        experiments = study.load(str(path)).experiments
        base = 5 if like_it else 0
        assert {name: e.seed for name, e in experiments.items()} == {"a": base, "b": base + 1, "c": base}
        assert experiments["a"].hash != experiments["b"].hash


@pytest.mark.parametrize(("family", "params"), [("llama", 1e9), ("gpt", 1.3e8), ("small", 1e5)])
def test_from_scratch_every_family_is_written(family, params, tmp_path):
    model = buildable.nearest(buildable.FAMILIES[family](), params=params)
    flops, tokens = 120 * params**2, 20 * params
    path = write(tmp_path / "new.py", [Planned("recommended", model, flops, tokens)], like=None, words=WORDS)
    found = study.load(str(path)).experiments["recommended"]
    assert replace(found.model, layers=model.layers, remat=model.remat) == model
    assert found.length == Tokens(float(f"{tokens:.6g}"))
    assert abs(found.tokens - tokens) <= found.tokens_per_step
    assert found.optimizer.peak == pytest.approx(float(DEEPSEEK_LEARNING_RATE(flops)), rel=0.01)
    batch = float(DEEPSEEK_BATCH_TOKENS(flops))
    assert abs(found.tokens_per_step - batch) <= max(SEQUENCE_LENGTH / 2, SEQUENCE_LENGTH - batch)
    assert found.source.sequence_length == SEQUENCE_LENGTH and found.evals
    found.check()


def test_what_cannot_be_written_is_refused(like, tmp_path):
    own = like()
    planned = Planned("a", wider(own), 3e10, 1e5)
    for name in ("more.txt", "more", "more.py.txt"):
        with pytest.raises(UserError, match="written to a Python file: .* does not end in .py"):
            write(tmp_path / name, [planned], like=own, words=WORDS)
        with pytest.raises(UserError, match="does not end in .py"):
            checked(tmp_path / name)
    routed = replace(planned, model=replace(planned.model, mlp=Moe(num_experts=4, d_ff=64)))
    for like_it in (own, None):
        with pytest.raises(UserError, match="a has experts, and only dense models can be written"):
            write(tmp_path / "more.py", [routed], like=like_it, words=WORDS)
    assert not (tmp_path / "more.py").exists()
