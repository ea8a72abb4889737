# SPDX-License-Identifier: Apache-2.0
import ast
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.config import from_json, to_json
from research.core.types import UserError
from research.data.sources.base import CorpusError
from research.evals.tasks.arithmetic import Arithmetic
from research.evals.tasks.base import BOXED, TAGS, Marked, Problem, Response, Task
from research.evals.tasks.countdown import TOKEN, Countdown, Makes, value
from research.evals.tasks.gsm8k import GSM8K
from research.evals.tasks.gym import LIBRARY, Gym, names
from research.evals.tasks.modular import Modular
from research.evals.tasks.sorting import Sorting
from research.rl.workers import shared
from tests.conftest import ROOT
from tests.rl.hostile import hostile

MADE = [
    Arithmetic(),
    Arithmetic(terms=2, digits=1, operations="*", held_out=0.5),
    Modular(),
    Modular(terms=1, digits=3, moduli=(7, 7), mark=TAGS),
    Sorting(),
    Sorting(shortest=2, longest=2, digits=1, mark=BOXED),
    Countdown(),
    Countdown(count=3, largest=9, targets=(1, 30), use_all=False, mark=Marked("#"), prompt="{numbers}={target}:"),
    Countdown(count=3, attempts=4),
]
splits = pytest.mark.parametrize("split", ["train", "validation"])
made = pytest.mark.parametrize("task", MADE, ids=lambda t: f"{type(t).__name__}-{MADE.index(t)}")


def score(task, problem, text):
    return task.verifier.score(problem, Response(text))


# --- what holds for all tasks that are made ------------------------------------------------------


@made
@splits
@settings(max_examples=30, deadline=None, derandomize=True)
@given(index=st.integers(0, 2**40))
def test_worked_solutions_are_right_and_others_wrong(task, split, index):
    problem = task.problem(split, index)
    assert problem == task.problem(split, index) == replace(task, held_out=task.held_out).problem(split, index)
    assert score(task, problem, problem.worked) == 1
    assert score(task, problem, task.mark.write(f" {problem.reference} ")) == 1
    assert score(task, problem, problem.worked + task.mark.write("12345")) == 0
    assert score(task, problem, task.mark.write("")) == score(task, problem, problem.prompt) == 0
    assert json.loads(json.dumps(problem.data)) == problem.data


@made
def test_the_splits_of_all_seeds_share_nothing(task):
    asked = {
        split: {task_.problem(split, i).prompt for task_ in (task, replace(task, seed=1)) for i in range(150)}
        for split in ("train", "validation")
    }
    assert len(asked["train"]) > 20 and len(asked["validation"]) > 5
    assert not asked["train"] & asked["validation"]


@made
def test_settings_survive_json(task):
    again = from_json(json.loads(json.dumps(to_json(task))))
    assert again == task and isinstance(again, Task) and hash(again) == hash(task)
    assert again.problem("train", 3) == task.problem("train", 3)
    assert from_json(to_json(task.verifier)) == task.verifier


def test_problems_are_the_same_in_every_process():
    script = (
        "from tests.evals.test_tasks import MADE\n"
        "print([task.problem(split, 7) for task in MADE for split in ('train', 'validation')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{[task.problem(split, 7) for task in MADE for split in ('train', 'validation')]}\n"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Modular(terms=0),
        lambda: Modular(moduli=(1, 5)),
        lambda: Modular(operations="/"),
        lambda: Sorting(shortest=3, longest=2),
        lambda: Countdown(count=1),
        lambda: Countdown(attempts=0),
        lambda: Countdown(targets=(9, 1)),
        lambda: Countdown(held_out=1.0),
        lambda: Gym("chain_sum", held_out=0.0),
        lambda: Countdown(count=2, largest=2, targets=(90, 99)).problem("train", 0),
        lambda: Sorting(1, 1, 1, held_out=1e-9).problem("validation", 0),
        lambda: Sorting().problem("test", 0),
    ],
)
def test_mistakes_are_one_sentence(wrong):
    with pytest.raises(UserError) as said:
        wrong()
    assert len(str(said.value)) > 40 and str(said.value).endswith(".")


# --- the tasks one by one ------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True)
@given(index=st.integers(0, 10**6))
def test_remainders(index):
    problem = Modular().problem("train", index)
    inside, modulus = re.fullmatch(r"([\d()+*-]+) mod (\d+)=", problem.prompt).groups()
    assert eval(inside) % int(modulus) == int(problem.reference)
    for step in problem.worked.split("#")[0].split(";"):
        made, *rest = step.split("=")
        assert eval(made) == int(rest[0]) and (int(rest[0]) - int(rest[-1])) % int(modulus) == 0


def test_sorting_counts_every_number():
    task, problem = Sorting(), Problem("3 3 1:", "1 3 3")
    assert score(task, problem, "#1 3 3") == 1
    assert score(task, problem, "#1 3") == score(task, problem, "#3 3 1") == score(task, problem, "#133") == 0


def makes(text, numbers=(3, 5, 8), target=7, use_all=False):
    problem = Problem("", "", data={"numbers": list(numbers), "target": target})
    return Makes(use_all=use_all).score(problem, Response(f"<answer>{text}</answer>"))


def test_an_expression_makes_the_target_of_its_numbers():
    assert makes("8*5/(3+5)", (3, 5, 5, 8), 5, use_all=True) == 1
    assert makes("(8 - 3) + 5", target=10) == makes("((8))", target=8) == makes("8-3-5", target=0) == 1
    assert makes("3/5*5", (3, 5, 5), 3) == makes("8/3*3", (8, 3, 3), 8) == 1  # fractions on the way are exact
    assert makes("3+5", target=8) == 1 and makes("3+5", target=8, use_all=True) == 0
    for text in [
        "8-1",
        "5+1+1",
        "3+3+1",
        "7",
        "35-28",
        "8-3",
        "8/(5-5)",
        "8/(3-3)",
        "8+-1",
        "-8+5",
        "+8",
        "8**5",
        "8//5",
    ]:
        assert makes(text) == 0, text
    for text in [
        "",
        "(",
        ")",
        "()",
        "8)",
        "(8",
        "8 5",
        "8(5)",
        "(8)5",
        "8+",
        "*8",
        "8-3=5",
        "8,5",
        "8.0",
        "08e1",
        "8!",
        "x",
    ]:
        assert makes(text, target=8) == 0, text


trees = st.recursive(
    st.integers(0, 99).map(str),
    lambda part: (
        st.builds("({}{}{})".format, part, st.sampled_from("+-*/"), part)
        | st.builds("{}{}{}".format, part, st.sampled_from("+-*/"), part)
    ),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True)
@given(trees)
def test_expressions_come_to_what_they_do_in_python(text):
    exact = re.sub(r"(\d+)", r"Fraction(\1)", text)
    try:
        expected = eval(exact)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            value(TOKEN.findall(text))
        return
    assert value(TOKEN.findall(text)) == expected and isinstance(expected, Fraction)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*"+-*/()", "1", "2"]), max_size=7))
def test_what_is_no_expression_has_no_value(tokens):
    try:
        ast.parse("".join(f" {token} " for token in tokens).strip(), mode="eval")
        python = True
    except SyntaxError:
        python = False
    try:
        found = value(tokens) is not None
    except ZeroDivisionError:
        found = True
    assert python or not found  # Python has signs before numbers besides


def test_countdowns_worked_attempts_miss_until_the_last():
    searched, plain = Countdown(count=3, attempts=4), Countdown(count=3)
    counts = Counter[int]()
    for i in range(200):
        problem = searched.problem("train", i)
        assert (problem.prompt, problem.data) == (plain.problem("train", i).prompt, plain.problem("train", i).data)
        *misses, last = problem.worked.partition("<")[0].split("|")
        assert last == plain.problem("train", i).worked.partition("<")[0]
        ends = [int(one.rpartition("=")[2]) for one in misses]
        assert problem.data["target"] not in ends and len({*misses}) == len(misses) <= 3
        counts[len(misses)] += 1
    assert min(counts[n] for n in range(4)) > 30  # as many of each


def test_the_order_of_countdowns_numbers_is_not_that_of_the_solution():
    problems = [Countdown().problem("train", i) for i in range(40)]
    orders = [p.data["numbers"] == [int(n) for n in re.findall(r"\d+", p.reference)] for p in problems]
    assert sum(orders) < 20


# --- GSM8K ---------------------------------------------------------------------------------------

ROWS = [
    {"question": "Q1?", "answer": "Half of 48 is <<48/2=24>>24.\nSo 24+1=<<24+1=25>>25.\n#### 25"},
    {"question": "Q2?", "answer": "Many.\n#### 1,200"},
]


def written(path: Path, rows) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def test_gsm8k_is_read_as_it_is_shipped(tmp_path):
    train = written(tmp_path / "train.jsonl", ROWS)
    test = written(tmp_path / "test.jsonl", [{"question": "Q2?", "answer": "Four\u2028teen.\n#### -14"}])
    task = GSM8K(train, test)
    assert (task.size("train"), task.size("validation")) == (1, 1)  # Q2 is held out
    assert task.problem("train", 0) == Problem("Q1?", "25", "Half of 48 is 24.\nSo 24+1=25.\n#### 25")
    assert task.problem("validation", 0) == Problem("Q2?", "-14", "Four\u2028teen.\n#### -14")
    noted = GSM8K(train, test, notes=True, mark=BOXED, instruction=" Box it.").problem("train", 0)
    assert noted.prompt == "Q1? Box it." and noted.worked == ROWS[0]["answer"].replace("#### 25", r"\boxed{25}")
    assert from_json(to_json(task)) == task and isinstance(task, Task)


@pytest.mark.parametrize(
    "rows",
    [[], ["no json"], ["[]"], ["{}"], [{"question": "Q", "answer": "5"}], [{"question": "Q", "answer": None}], ROWS],
)
def test_files_that_are_not_gsm8k_are_one_sentence(tmp_path, rows):
    test = written(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(UserError, match="GSM8K"):
        GSM8K(written(tmp_path / "train.jsonl", rows), test).problem("train", 0)
    with pytest.raises(UserError, match="cannot be read"):
        _ = GSM8K(str(tmp_path / "absent.jsonl"), test).size("train")


def test_gsm8ks_ends_are_told(tmp_path):
    task = GSM8K(written(tmp_path / "a", ROWS[:1]), written(tmp_path / "b", ROWS[1:]))
    for split, index in [("train", 1), ("validation", 1), ("validation", -1)]:
        with pytest.raises(UserError, match="1 problems, from 0"):
            task.problem(split, index)
    with pytest.raises(CorpusError):
        task.problem("test", 0)


def test_gsm8k_itself(shared_data):
    folder = shared_data / "gsm8k"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    task = GSM8K(str(folder / "train.jsonl"), str(folder / "test.jsonl"))
    assert (task.size("train"), task.size("validation")) == (7473, 1319)
    for split, size in [("train", 7473), ("validation", 1319)]:
        for problem in (task.problem(split, index) for index in range(size)):
            assert score(task, problem, problem.worked) == 1 and "<<" not in problem.worked
            assert score(task, problem, f"#### 1{problem.reference}") == 0


# --- reasoning-gym -------------------------------------------------------------------------------

gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs the extra rl: make rl")
# Tasks without an answer of their own: the library only checks what is given.
UNANSWERED = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
# Tasks whose scores read what is given as Python, as a formula or as complex numbers, and one whose score is replaced.
READING = [
    "countdown",
    "simple_integration",
    "string_insertion",
    "n_queens",
    "complex_arithmetic",
    "game_of_life_halting",
]
COMPOSITE = {"datasets": ({"name": "chain_sum", "config": {"max_terms": 2}}, {"name": "aiw", "weight": 2.0})}


def gym_task(name, **settings):
    return Gym(name, COMPOSITE if name == "composite" else {}, processes=2, **settings)


@gym
def test_every_task_of_the_library_scores_its_own_answer():
    def one(name):
        task = gym_task(name)
        problem = task.problem("train", 0)
        assert problem.prompt and problem.data["question"] == problem.prompt
        own = score(task, problem, f"Well, <answer>{problem.reference}</answer>")
        rest = [
            score(task, problem, text) for text in ("<answer>garbage xyz</answer>", "<answer>nan</answer>", "", "5")
        ]
        return name, bool(problem.reference), own, max(rest)

    known = names(2)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(one, known))
    assert len(found) > 100
    assert {name for name, has_answer, _, _ in found if not has_answer} == UNANSWERED & set(known)
    assert [(name, own) for name, has_answer, own, _ in found if has_answer and own != 1] == []
    assert [(name, rest) for name, _, _, rest in found if rest >= 1] == []


@gym
def test_gym_problems_are_functions_of_the_split_and_the_index():
    task = gym_task("polynomial_multiplication")  # whose terms come out of a set
    first = [task.problem("train", i) for i in range(6)]
    shared(2, task.seconds, task.memory).close()
    assert [task.problem("train", i) for i in range(6)] == first
    assert len({p.prompt for p in first}) == 6
    again = from_json(json.loads(json.dumps(to_json(gym_task("composite")))))
    assert again == gym_task("composite") and isinstance(again, Task) and isinstance(hash(again), int)
    assert again.problem("train", 0) == gym_task("composite").problem("train", 0)
    assert from_json(to_json(again.verifier)) == again.verifier


@gym
def test_gym_splits_share_no_question():
    task = Gym(
        "chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, held_out=0.3, processes=2
    )
    asked = {split: {task.problem(split, i).prompt for i in range(100)} for split in ("train", "validation")}
    assert len(asked["train"]) > 50 and len(asked["validation"]) > 30 and not asked["train"] & asked["validation"]
    assert Gym("aiw", instruction=" Tell!", processes=2).problem("train", 0).prompt.endswith(" Tell!")


def hostile_scores(name, texts):
    task = gym_task(name, seconds=0.3)
    problem = gym_task(name).problem("train", 0)
    return {key: score(task, problem, TAGS.write(text)) for key, text in texts.items()}


def check_hostile(tasks, path):
    texts = hostile(str(path))
    with ThreadPoolExecutor(2) as threads:
        for name, found in zip(tasks, threads.map(lambda name: hostile_scores(name, texts), tasks), strict=True):
            assert all(type(x) is float and math.isfinite(x) for x in found.values()), (name, found)
            right = {key for key, x in found.items() if x >= 1}
            assert right <= {"a boolean"}, (name, right)  # which may be the answer
    assert not path.exists()


@gym
def test_hostile_answers_to_tasks_that_read_them(tmp_path):
    check_hostile(READING, tmp_path / "evaluated")


@gym
@pytest.mark.slow
def test_hostile_answers_to_every_task(tmp_path):
    check_hostile(names(2), tmp_path / "evaluated")


@gym
def test_nothing_else_of_the_library_evaluates_text():
    """Where eval and the like are called, as looked through by hand; a new version must be looked through again."""
    root = Path(importlib.util.find_spec("reasoning_gym").origin).parent
    calls = re.compile(
        r"(?<![\w.])(?:eval|exec|__import__)\(|\b(?:sp|sympy)\.(?:parse_expr|sympify|S)\(|(?<!def )\bparse_expr\("
    )
    found = {str(path.relative_to(root))[:-3] for path in root.rglob("*.py") if calls.search(path.read_text("utf-8"))}
    literals = {
        "algorithmic/binary_matrix",
        "algorithmic/spiral_matrix",
        "algorithmic/string_insertion",
        "games/n_queens",
    }
    formulas = {"algebra/intermediate_integration", "algebra/polynomial_multiplication", "algebra/simple_integration"}
    formulas |= {"games/countdown", "games/puzzle24"}
    its_own = {
        "algorithmic/number_sorting",
        "arithmetic/basic_arithmetic",
        "arithmetic/bitwise_arithmetic",
        "code/codeio",
    }
    its_own |= {"arithmetic/gsm_symbolic/generators_00_49", "arithmetic/gsm_symbolic/generators_50_99"}
    own_parser = {"logic/propositional_logic"}
    assert found - own_parser == literals | formulas | its_own


@gym
def test_what_the_library_refuses_is_one_sentence():
    with pytest.raises(UserError, match="'no_such_task'.*not registered"):
        gym_task("no_such_task").problem("train", 0)
    with pytest.raises(UserError, match="'chain_sum'.*no_such_setting"):
        Gym("chain_sum", {"no_such_setting": 1}, processes=2).problem("train", 0)
    task = gym_task("chain_sum")
    problem = task.problem("train", 0)
    changed = problem._replace(data={**problem.data, "question": "What else?"})
    with pytest.raises(UserError, match="another question"):
        score(task, changed, "<answer>5</answer>")


@gym
def test_the_training_process_does_not_load_the_libraries():
    script = (
        "import sys\nfrom research.evals.tasks.gym import Gym\nfrom research.rl.rewards.symbolic import Symbolic\n"
        "from research.evals.tasks.base import Problem, Response\n"
        "Gym('aiw', processes=1).problem('train', 0)\n"
        "print(Symbolic(processes=1).score(Problem('', '5'), Response(r'\\boxed{10/2}')))\n"
        "print([m for m in ('reasoning_gym', 'math_verify', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1.0\n[]\n"


@gym
def test_formulas_are_numbers_letters_and_functions():
    def is_formula(text):
        return shared(2).call(f"{LIBRARY}:is_formula", text).value

    for text in ["2*x**3 + exp(x)*sin(x)/2 + C", "1.5*x - .5", "2.*x", "sqrt(2)", "3 4"]:
        assert is_formula(text), text
    for text in [
        "x.args",
        "2.real",
        "x . T",
        "eval(x)",
        "chr(1)",
        "x if x else y",
        "lambda: 1",
        "a=1",
        "'x'",
        "x_1",
        "x[0]",
        "µ",
    ]:
        assert not is_formula(text), text
