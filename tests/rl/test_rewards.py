# SPDX-License-Identifier: Apache-2.0
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.config import from_json, to_json
from research.core.types import UserError
from research.evals.tasks.base import BOXED, TAGS, Marked, Problem, Response, Reward
from research.evals.tasks.countdown import Makes
from research.rl.rewards.exact import Exact
from research.rl.rewards.format import Format
from research.rl.rewards.length import Cosine, SoftOverlong
from research.rl.rewards.numeric import Numeric, number
from research.rl.rewards.symbolic import Symbolic
from research.rl.rewards.weighted import Gated, Weighted
from tests.rl.hostile import hostile

LIMITS = dict(seconds=0.3, memory=1 << 29, processes=2)
WEIGHTED = Weighted({"right": (1.0, Exact(any_case=True)), "form": (0.25, Format("...####..."))})
REWARDS = [
    Numeric(),
    Numeric(TAGS),
    Exact(),
    Exact(None, any_space=False),
    Exact(BOXED, any_case=True),
    Symbolic(**LIMITS),
    Symbolic(None, **LIMITS),
    Format(),
    Format("...####..."),
    SoftOverlong(100, 20),
    Cosine(Numeric(), 100),
    WEIGHTED,
    Gated(Format("...####..."), WEIGHTED, closed=-0.5),
    Makes(TAGS, use_all=False),
]
PROBLEM = Problem("", "5", data={"numbers": [5, 10, 6], "target": 5})


def score(reward, text, reference="5", **said):
    return reward.score(PROBLEM._replace(reference=reference), Response(text, **said))


@pytest.mark.parametrize("reward", REWARDS, ids=lambda r: f"{type(r).__name__}-{getattr(r, 'mark', '')}")
def test_hostile_texts_are_worth_a_finite_number_and_are_never_evaluated(reward, tmp_path):
    texts = hostile(str(tmp_path / "evaluated"))
    mark = getattr(reward, "mark", None) or Marked()
    wrapped = {name: mark.write(text) for name, text in texts.items()}
    with ThreadPoolExecutor(2) as threads:
        for shape in (texts, wrapped):
            found = dict(zip(shape, threads.map(lambda text: score(reward, text), shape.values()), strict=True))
            assert all(type(value) is float and math.isfinite(value) for value in found.values()), found
            if isinstance(reward, Numeric | Symbolic | Makes):
                right = {name for name, value in found.items() if value == 1}
                allowed = {"long words"} | ({"nul", "signs"} if isinstance(reward, Symbolic) else set())  # they say 5
                assert right <= allowed | ({"raised digits"} if reward.mark is None else set()), right
    assert not (tmp_path / "evaluated").exists()


@pytest.mark.parametrize("reward", REWARDS, ids=lambda r: type(r).__name__)
def test_rewards_are_rewards_that_survive_json(reward):
    assert isinstance(reward, Reward)
    again = from_json(json.loads(json.dumps(to_json(reward), sort_keys=True)))
    assert again == reward and hash(again) == hash(reward)
    assert score(again, "####5") == score(reward, "####5")


# --- marks --------------------------------------------------------------------------------------


def test_the_last_mark_counts():
    assert Marked().find("a #### 4\n#### 5 \nb") == "5" and Marked().find("5") is None
    assert TAGS.find("<answer>4</answer><answer> 5\n</answer>") == "5" and TAGS.find("<answer>5") is None


def test_brackets_within_an_answer_are_its_own():
    assert BOXED.find(r"\boxed{\frac{1}{2}} and {") == r"\frac{1}{2}"
    assert BOXED.find(r"\boxed{\{1,2\}}.") == r"\{1,2\}" and BOXED.find(r"\boxed{\}}") == r"\}"
    assert BOXED.find(r"\boxed{{1}") is None and BOXED.find(r"\boxed{1\}") is None


@settings(deadline=None, derandomize=True)
@given(st.text("a{}\\ ", max_size=30))
def test_what_is_marked_in_balance_is_found(text):
    depth = [text[:i].count("{") - text[:i].count("}") for i in range(len(text) + 1)]
    if "\\" not in text and min(depth) == 0 == depth[-1]:
        assert BOXED.find("so " + BOXED.write(text) + " }") == text.strip()


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("0.50", Fraction(1, 2)),
        ("1/2.", Fraction(1, 2)),
        ("-$1,234.50", Fraction(-2469, 2)),
        ("50%.", Fraction(1, 2)),
        ("+.5e1", 5),
        ("5.", 5),
        ("1e-3", Fraction(1, 1000)),
        ("6 / 4", Fraction(3, 2)),
        ("0.1", Fraction(1, 10)),
        ("-0", 0),
    ],
)
def test_numbers_are_read_exactly(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "-",
        "--5",
        "+-5",
        "5...",
        "1,2",
        "12,34,567",
        "1234,567",
        "1 2",
        "1/0",
        "1/-2",
        "0x5",
        "1_000",
        "5²",
        "٣",
        "１",
        "½",
    ]
    + ["1e1000", "nan", "inf", "5\0", "\ud8005", "9" * 201],
)
def test_what_is_no_number_is_none(text):
    assert number(text) is None


@settings(deadline=None, derandomize=True)
@given(st.fractions(max_denominator=10**6), st.integers(0, 6))
def test_a_number_equals_itself_however_it_is_written(value, digits):
    assert number(f"{value.numerator}/{value.denominator}") == value
    scaled = round(value * 10**digits)
    sign, whole = "-" * (scaled < 0), abs(scaled) // 10**digits
    decimals = f".{abs(scaled) % 10**digits:0{digits}}" if digits else ""
    for text in (f"{sign}{whole}{decimals}", f"{sign}{whole:,}{decimals}", f"{scaled}e-{digits}"):
        assert number(text) == Fraction(scaled, 10**digits), text


# --- the others ---------------------------------------------------------------------------------


def test_exact_answers():
    assert score(Exact(), "####  a  b ", "a b") == 1 and score(Exact(), "#### A b", "a b") == 0
    assert score(Exact(any_case=True), "#### A b", "a B") == 1
    assert score(Exact(any_space=False), "#### a  b", "a b") == 0
    assert score(Exact(None), " a\nb ", "a b") == 1 and score(Exact(), "a b", "a b") == 0


@pytest.mark.parametrize(
    "reference, answer, right",
    [
        ("1/2", r"\frac{1}{2}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"\sqrt{2}/2", r"\frac{1}{\sqrt 2}", True),
        ("1,000", "1000", True),
        ("50", "$50$", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("25", "5²", True),
        ("5", "5²", False),
        ("(1,2)", "(2,1)", False),
        ("5", "6", False),
        ("x+1", "x-1", False),
        ("Monday", "Monday", True),
        ("Monday", "Tuesday", False),
    ],
)
def test_formulas_are_compared_by_what_they_are(reference, answer, right):
    reward = Symbolic(**LIMITS | {"seconds": 5.0})
    assert score(reward, BOXED.write(answer), reference) == right
    assert score(reward, answer, reference) == 0  # not marked
    if "Mon" not in reference:
        assert (
            score(Symbolic(None, **LIMITS | {"seconds": 5.0}), f"So it is ${answer.strip('$')}$.", reference) == right
        )


def test_verdicts_are_the_same_from_many_threads():
    reward = Symbolic(**LIMITS | {"seconds": 5.0})
    here = threading.get_ident()

    def one(i):
        assert threading.get_ident() != here
        return score(reward, BOXED.write(f"({i}+x)*2"), "6+2x")

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(one, range(24))) == [float(i == 3) for i in range(24)]


@pytest.mark.parametrize(
    "text, right",
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think>\na\n</think>\n\n<answer></answer>\n", 1),
        ("a<think>a</think><answer>b</answer>", 0),
        ("<think>a</think>b<answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>c", 0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0),
        ("<think><think>a</think><answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>b</answer>", 0),
        ("", 0),
    ],
)
def test_the_form_of_thoughts_and_an_answer(text, right):
    assert score(Format(), text) == right


def test_other_forms():
    assert score(Format("...####..."), "a####b") == 1 and score(Format("...####..."), "a####b####") == 0
    assert score(Format("a ... b"), "a b") == 1 and score(Format("a...b"), "ab") == 1
    assert score(Format("a b"), "a \n b") == 1 and score(Format("a b"), "a-b") == 0
    assert score(Format("aba cdc"), "abacdc") == 1
    for template in ("", "...", "<a>...<a>", "<a> a"):
        with pytest.raises(UserError, match="names no form"):
            Format(template)


def test_soft_overlong_is_the_line_of_equation_13():
    reward = SoftOverlong(max_tokens=20480, cache=4096)
    given = {0: 0.0, 16384: 0.0, 16385: -1 / 4096, 18432: -0.5, 20480: -1.0, 30000: -1.0}
    assert {tokens: score(reward, "", tokens=tokens) for tokens in given} == given
    for wrong in [(0, 0), (10, 0), (10, 11)]:
        with pytest.raises(UserError, match="cache"):
            SoftOverlong(*wrong)


def test_the_cosine_goes_from_one_end_to_the_other():
    reward = Cosine(Numeric(), 100, right=(2.0, 1.0), wrong=(-10.0, 0.0), too_long=-12.0)
    assert score(reward, "####5", tokens=0) == 2 and score(reward, "####5", tokens=50) == pytest.approx(1.5)
    assert score(reward, "####6", tokens=0) == -10 and score(reward, "####6", tokens=50) == pytest.approx(-5)
    right = [score(reward, "####5", tokens=i) for i in range(100)]
    wrong = [score(reward, "####6", tokens=i) for i in range(100)]
    assert right == sorted(right, reverse=True) and wrong == sorted(wrong) and min(right) > 1 and max(wrong) < 0
    assert score(reward, "####5", tokens=100) == score(reward, "####5", tokens=1, finished=False) == -12
    for wrong in [dict(max_tokens=0), dict(right=(1.0,)), dict(too_long=math.inf)]:
        with pytest.raises(UserError, match="Cosine needs"):
            Cosine(Numeric(), **{"max_tokens": 10} | wrong)


def test_weighted_and_gated():
    response = Response("a #### B")
    problem = Problem("", "b")
    assert WEIGHTED.components(problem, response) == {"right": 1.0, "form": 1.0}
    assert WEIGHTED.score(problem, response) == 1.25
    gated = Gated(Format("<t>...</t> ..."), WEIGHTED, closed=-0.5)
    assert gated.score(problem, response) == -0.5 and gated.score(problem, Response("<t></t>#### b")) == 1.25
    for parts in ({}, {"a": (math.nan, Numeric())}, {"a": Numeric()}, {"a": ("1", Numeric())}, [(1.0, Numeric())]):
        with pytest.raises(UserError, match="Weighted needs"):
            Weighted(parts)


def test_a_library_that_is_not_there_is_one_sentence(monkeypatch):
    from research.rl import workers

    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: None)
    workers.installed.cache_clear()
    with pytest.raises(UserError, match="math-verify is not installed: pip install"):
        score(Symbolic(), BOXED.write("5"))
    workers.installed.cache_clear()
