# SPDX-License-Identifier: Apache-2.0
"""Anybody's CSV: numbers as people write them, columns found or asked for, and nothing left out without a word."""

import math
from dataclasses import replace

import pytest

from research.core.types import UserError
from research.scaling import columns
from research.scaling.table import Run, Table, write_csv

NAMED = {"params": "Model Size", "flops": "Training FLOP", "loss": "loss"}


@pytest.fixture
def write(tmp_path):
    def file(text: str, *, encoding: str = "utf-8"):
        path = tmp_path / "runs.csv"
        path.write_text(text, encoding=encoding)
        return path

    return file


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("70B", 7e10),
        ("1.4 trillion", 1.4e12),
        ("1.4 trillion tokens", 1.4e12),
        ("5.76e23 FLOPs", 5.76e23),
        ("1,234,567", 1234567),
        ("125M params", 1.25e8),
        (" 2.5 ", 2.5),
        ("3e9", 3e9),
        ("-4", -4),
        (".5k", 500),
    ],
)
def test_numbers_as_people_write_them(text, value):
    assert columns.number(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "nan", "n/a", "None", "-"])
def test_no_number_is_nan(text):
    assert math.isnan(columns.number(text))


@pytest.mark.parametrize("text", ["many", "7 apples", "3 4", "1e", "70Q", "0x10"])
def test_other_text_is_no_number(text):
    with pytest.raises(ValueError):
        columns.number(text)


def test_any_two_of_three_are_enough(write):
    by_tokens = columns.read(write("params,tokens,loss\n1e8,2e9,3.0\n2e8,4e9,2.8\n"))
    assert [run.flops for run in by_tokens.table] == [6 * 1e8 * 2e9, 6 * 2e8 * 4e9]
    by_flops = columns.read(write("Model Size,Training FLOP,loss\n1e8,1.2e18,3.0\n"), columns=NAMED)
    assert by_flops.table.runs[0].tokens == 2_000_000_000
    by_size = columns.read(write("tokens,compute,val_loss\n2B,1.2e18,3.0\n"))
    assert by_size.table.runs[0].params == 100_000_000
    for found, third in ((by_tokens, "flops"), (by_flops, "tokens"), (by_size, "params")):
        assert any(f"no column of {third}" in note and "6 params tokens" in note for note in found.notes)
    assert any("70B as 7e10" in note for note in by_size.notes)


def test_a_table_of_this_project_is_read_whole(make_study, tmp_path):
    table = make_study()
    write_csv(table, tmp_path / "table.csv")
    assert columns.read(tmp_path / "table.csv").table == table


def test_a_byte_order_mark_and_names_that_repeat(write):
    found = columns.read(write("name,params,tokens,loss\na,1e8,2e9,3.0\na,2e8,2e9,2.9\n", encoding="utf-8-sig"))
    assert [run.name for run in found.table] == ["a", "a (line 3)"]


def test_every_row_is_kept_or_named(write):
    text = "name,params,tokens,loss,status\n" + "\n".join(
        [
            "good,1e8,2e9,3.0,finished", "nan,1e8,3e9,nan,", "inf,1e8,4e9,inf,", "empty,1e8,5e9,,",
            "minus,-1e8,6e9,3.0,",
            "words,lots,7e9,3.0,", "zero,0,8e9,3.0,", "stopped,1e8,9e9,2.9,diverged", "odd,1e8,1e10,2.9,crashed badly",
        ]
    )  # fmt: skip
    found = columns.read(write(text + "\n"))
    excluded, notes = found.table.excluded(), " ".join(found.notes)
    assert {run.name for run in found.table.finished()} == {"good"}
    assert excluded["nan"] == "its loss is nan" and excluded["inf"] == "its loss is inf"
    assert excluded["stopped"] == "diverged" and excluded["odd"] == "failed" and "empty" in excluded
    assert (
        "line 6: the params is -100000000.0" in notes and "line 7: the params is 'lots', which is not a number" in notes
    )
    assert len(found.table) + notes.count("Left out: line") == 9


def test_the_highest_losses_can_be_left_out(write):
    path = write("name,params,tokens,loss\n" + "".join(f"r{i},1e8,{i + 1}e9,{5 - i / 10}\n" for i in range(6)))
    found = columns.read(path, drop_highest=2)
    assert [run.name for run in found.table] == ["r2", "r3", "r4", "r5"]
    assert any("r0, r1" in note for note in found.notes)
    with pytest.raises(UserError, match="would leave none of the 6 runs"):
        columns.read(path, drop_highest=6)
    with pytest.raises(UserError, match="at least 0"):
        columns.read(path, drop_highest=-1)


@pytest.mark.parametrize(
    ("text", "named", "words"),
    [
        ("a,b\n1,2\n", {}, "needs a column of losses.*its columns are 'a', 'b'"),
        ("params,loss\n1,2\n", {}, "needs two of params, tokens and FLOPs"),
        (
            "params,tokens,loss\n1,2,3\n",
            {"loss": "los"},
            "no column 'los' for loss; its columns are 'params', 'tokens'",
        ),
        ("params,tokens,loss\n", {}, "No row of .* can be used: it has no rows"),
        ("params,tokens,loss\nx,2,3\n", {}, "No row of .* can be used: line 2: the params is 'x'"),
        ("", {}, "needs a column of losses"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(write, text, named, words):
    with pytest.raises(UserError, match=words):
        columns.read(write(text), columns=named)


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(UserError, match="cannot be read as a CSV file"):
        columns.read(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81loss")
    with pytest.raises(UserError, match="cannot be read as a CSV file"):
        columns.read(tmp_path / "binary.csv")


def test_copies_seeds_and_diverged_runs_are_said(make_study):
    runs = list(make_study())
    small = min(runs, key=lambda run: (run.params, run.tokens))
    runs.append(replace(runs[2], name="copy"))
    runs.append(replace(runs[4], name="seed", loss=runs[4].loss * 1.002))
    blown = Run(
        "blown", small.params * 2, small.params, small.tokens * 2, small.flops * 4, small.loss * 1.2, status="finished"
    )
    table, notes = columns.clean(Table((*runs, blown)))
    said = " ".join(notes)
    assert "copy" not in {run.name for run in table} and f"copy is left out: a copy of {runs[2].name}" in said
    assert "(seeds) all count: there are 1." in said and table["seed"].problem is None
    assert table["blown"].problem == "diverged" and "blown is taken to have diverged: its loss" in said
    again, told = columns.clean(table)
    assert again == table and "copy" not in " ".join(told) and "blown" not in " ".join(told)
    assert columns.clean(make_study(noise=0.01))[1] == ()
