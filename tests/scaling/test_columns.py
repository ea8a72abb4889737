# SPDX-License-Identifier: Apache-2.0
"""Anybody's CSV: numbers as people write them, columns found or asked for, and nothing left out without a word."""

import math
from dataclasses import replace

import pytest

from research.core.types import UserError
from research.scaling import columns
from research.scaling.table import COLUMNS, Run, Table, write_csv

NAMED = {"params": "Model Size", "flops": "Training FLOP", "loss": "loss"}


@pytest.fixture
def write(tmp_path):
    def file(text: str, *, encoding: str = "utf-8"):
        path = tmp_path / "runs.csv"
        path.write_text(text, encoding=encoding)
        return path

    return file


def told(found: columns.Imported) -> str:
    return " ".join(found.notes)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("70B", 7e10),
        ("1.4 trillion", 1.4e12),
        ("1.4 trillion tokens", 1.4e12),
        ("5.76e23 FLOPs", 5.76e23),
        ("1,234,567", 1234567),
        ("1,234.5", 1234.5),
        ("125M params", 1.25e8),
        ("2.31 nats/token", 2.31),
        ("2 PFLOPs", 2e15),
        (" 2.5 ", 2.5),
        ("3e9", 3e9),
        ("1_000", 1000),
        ("-4", -4),
        (".5k", 500),
        ("-inf", -math.inf),
    ],
)
def test_numbers_as_people_write_them(text, value):
    assert columns.number(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "  ", "nan", "NaN", "n/a", "None", "-"])
def test_no_number_is_nan(text):
    assert math.isnan(columns.number(text))


@pytest.mark.parametrize(
    "text",
    [
        "many",
        "7 apples",
        "3 4",
        "1e",
        "70Q",
        "0x10",
        "3,14",
        "0,125B",
        "0,500",
        "12,34,567",
        "1,2345",
        "B",
        "1.2.3",
        "70%",
    ],
)
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
    assert "there are 1." in told(by_size) and "units" not in told(by_tokens)


def test_where_two_were_named_the_third_follows_from_them(write):
    text = "params,tokens,flops,total params,loss\n1e8,2e9,1.8e18,1.5e8,3.0\n"
    every = columns.read(write(text)).table.runs[0]
    assert (every.params, every.tokens, every.flops) == (100_000_000, 2_000_000_000, 1.8e18)
    named = columns.read(write(text), columns={"params": "total params", "flops": "flops"}).table.runs[0]
    assert (named.params, named.tokens) == (
        150_000_000,
        2_000_000_000,
    )  # not the column of tokens, which it agrees with
    other = columns.read(write(text), columns={"params": "params", "flops": "flops"}).table.runs[0]
    assert other.tokens == 3_000_000_000


def test_usual_names_are_found_whatever_their_case(write):
    found = columns.read(write(" N_Params , Training_Tokens ,Val_Loss,Run\n1e8,2e9,3.0,first\n"))
    assert [(run.name, run.params, run.tokens, run.loss) for run in found.table] == [("first", 10**8, 2 * 10**9, 3.0)]
    both = columns.read(write("params,tokens,loss,val_loss\n1e8,2e9,3.0,2.5\n"))
    assert both.table.runs[0].loss == 3.0
    assert "The loss is read from 'loss', not from 'val_loss': --loss-column names another." in both.notes
    chosen = columns.read(write("params,tokens,loss,val_loss\n1e8,2e9,3.0,2.5\n"), columns={"loss": "val_loss"})
    assert chosen.table.runs[0].loss == 2.5 and "read from" not in told(chosen)


def test_a_table_of_this_project_is_read_whole(make_study, tmp_path):
    runs = [replace(run, head_params=7, warmup_tokens=11, schedule="cosine") for run in make_study()]
    path = tmp_path / "table.csv"
    write_csv(Table(tuple(runs)), path)
    assert columns.read(path) == columns.Imported(Table(tuple(runs)), ())
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert columns.read(path).table == Table(tuple(runs))
    assert set(COLUMNS) > {"head_params", "schedule"}


def test_a_byte_order_mark_and_names_that_repeat(write):
    found = columns.read(write("name,params,tokens,loss\na,1e8,2e9,3.0\na,2e8,2e9,2.9\n", encoding="utf-8-sig"))
    assert [run.name for run in found.table] == ["a", "a (line 3)"]
    assert any("told apart by their lines: there are 1" in note for note in found.notes)
    nameless = columns.read(write("params,tokens,loss\n1e8,2e9,3.0\n\n2e8,2e9,2.9\n"))
    assert [run.name for run in nameless.table] == ["line-2", "line-4"]  # as an editor numbers them


ROWS = {
    "good": "1e8,2e9,3.0,finished",
    "done": "2e8,2e9,2.9,Completed",
    "nan": "1e8,3e9,nan,",
    "inf": "1e8,4e9,inf,",
    "empty": "1e8,5e9,,",
    "minus loss": "1e8,5e9,-3,",
    "stopped": "1e8,9e9,2.9,diverged",
    "odd": "1e8,1e10,2.9,crashed badly",
    "minus": "-1e8,6e9,3.0,",
    "words": "lots,7e9,3.0,",
    "zero": "0,8e9,3.0,",
    "no tokens": "1e8,,3.0,",
    "billions": "1.3,8e9,3.0,",
    "endless": "inf,8e9,3.0,",
    "comma": '1e8,8e9,"2,945",',
    "spilt": "1,234,567,8e9,3.0,",
    "apples": "1e8,8e9,7 apples,",
}


def test_every_row_is_kept_or_named(write):
    text = "name,params,tokens,loss,status\n" + "".join(f"{name},{row}\n" for name, row in ROWS.items())
    found = columns.read(write(text))
    excluded = found.table.excluded()
    assert {run.name for run in found.table.finished()} == {"good", "done"}
    assert excluded == {
        "nan": "its loss is nan",
        "inf": "its loss is inf",
        "empty": "its loss is nan",
        "minus loss": "its loss is -3.0",
        "stopped": "diverged",
        "odd": "failed",
    }
    assert "The status of odd is 'crashed badly', which is taken for failed." in found.notes
    out = [note for note in found.notes if note.startswith("Left out: line ")]
    assert len(found.table) + len(out) == len(ROWS)
    for words in (
        "line 10: the params is -100000000.0, and a positive number is needed",
        "line 11: the params is 'lots', which is not a number",
        "line 12: the params is 0.0",
        "line 13: the tokens is nan",
        "line 14: the params is 1.3, which is no count: write it out, or with its unit",
        "line 15: the params is inf",
        "line 16: the loss is '2,945', which is not a number",
        "line 17: 7 cells for 5 columns: put numbers with commas between quotes",
        "line 18: the loss is '7 apples'",
    ):
        assert any(words in note for note in out), words


def test_where_many_rows_are_left_out_each_line_is_named(write):
    found = columns.read(write("params,tokens,loss\n1e8,2e9,3.0\n" + "x,2e9,3.0\n" * 25))
    assert sum(note.startswith("Left out: line") for note in found.notes) == 10
    rest = ", ".join(str(line) for line in range(13, 28))
    assert f"Left out: 15 more without usable numbers, on lines {rest}." in found.notes


def test_numbers_between_quotes_may_have_commas(write):
    found = columns.read(write('params,tokens,loss\n"1,234,567","20,000,000",3.0\n'))
    assert found.table.runs[0].params == 1234567 and found.table.runs[0].tokens == 20_000_000


def test_the_highest_losses_can_be_left_out(write):
    path = write("name,params,tokens,loss\n" + "".join(f"r{i},1e8,{i + 1}e9,{5 - i / 10}\n" for i in range(6)))
    found = columns.read(path, drop_highest=2)
    assert [run.name for run in found.table] == ["r2", "r3", "r4", "r5"]
    assert "Left out for the highest losses (4.9 and above): r0, r1." in found.notes
    for count in (6, 7):
        with pytest.raises(UserError, match="would leave none of the 6 runs"):
            columns.read(path, drop_highest=count)
    with pytest.raises(UserError, match="at least 0"):
        columns.read(path, drop_highest=-1)


@pytest.mark.parametrize(
    ("text", "named", "words"),
    [
        ("a,b\n1,2\n", {}, "needs a column of losses.*its columns are 'a', 'b'"),
        ("params;tokens;loss\n1;2;3\n", {}, "has semicolons between its cells"),
        ("params,loss\n1,2\n", {}, "needs two of params, tokens and FLOPs.*it has 'params', 'loss'"),
        (
            "params,tokens,loss\n1,2,3\n",
            {"loss": "los"},
            "no column 'los' for loss; its columns are 'params', 'tokens', 'loss'",
        ),
        ("params,tokens,loss,loss\n1,2,3,4\n", {}, "two columns named 'loss'"),
        ("params,tokens,loss\n", {}, "No row of .* can be used: it has no rows"),
        ("params,tokens,loss\n,,\n\n", {}, "No row of .* can be used: it has no rows"),
        ("params,tokens,loss\nx,2,3\n", {}, "No row of .* can be used: line 2: the params is 'x'"),
        ("flops,params,loss\n1e300,1e-310,3\n", {}, "No row of .* can be used: line 2: the params is"),
        ("", {}, "needs a column of losses.*its columns are none"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(write, text, named, words):
    with pytest.raises(UserError, match=words):
        columns.read(write(text), columns=named)


def test_no_file_and_no_text(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81loss")
    for path in (tmp_path / "absent.csv", tmp_path, tmp_path / "binary.csv"):
        with pytest.raises(UserError, match="cannot be read as a CSV file .*: give the path of a table of runs"):
            columns.read(path)


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
    assert "all count (seeds): 1." in said and table["seed"].problem is None
    assert table["blown"].problem == "diverged" and "blown is taken to have diverged: its loss" in said
    assert "% above that of" in said
    again, repeated = columns.clean(table)
    assert again == table and "copy" not in " ".join(repeated) and "blown" not in " ".join(repeated)
    assert columns.clean(make_study(noise=0.01))[1] == ()


def test_a_run_that_failed_does_not_make_a_copy_of_its_repeat():
    failed = Run("first", 10**8, 10**8, 10**9, 6e17, 3.0, status="failed")
    table, notes = columns.clean(Table((failed, replace(failed, name="second", status="finished"))))
    assert [run.name for run in table.finished()] == ["second"] and notes == ()


def test_a_little_worse_or_a_larger_run_has_not_diverged():
    small = Run("small", 10**8, 10**8, 10**9, 6e17, 3.0, status="finished")
    worse = replace(small, name="worse", params=2 * 10**8, loss=3.2)
    fewer = replace(small, name="fewer tokens", tokens=10**8, loss=4.0)
    assert columns.clean(Table((small, worse, fewer)))[1] == ()


def test_a_table_of_this_project_says_what_is_lost_where_columns_are_named(tmp_path, make_study):
    table = make_study()
    write_csv(table, tmp_path / "table.csv")
    whole = columns.read(tmp_path / "table.csv", columns={"loss": "loss"})
    assert list(whole.table) == list(table) and not any("is not read" in note for note in whole.notes)
    part = columns.read(tmp_path / "table.csv", columns={"params": "non_embedding_params"})
    assert any("is not read" in note for note in part.notes)
    assert [r.params for r in part.table] == [r.non_embedding_params for r in table]


GOOD = [(n, d, 1.7 + 400 / n**0.34 + 1500 / d**0.36) for n in (1e7, 3e7, 1e8, 3e8) for d in (1e9, 3e9, 1e10)]


def as_csv(rows, head="params,tokens,loss"):
    return "\n".join([head, *(",".join(f"{value:.10g}" for value in row) for row in rows)])


def test_units_of_a_whole_column_are_asked_for_in_its_cells(write):
    path = write(as_csv([(n / 1e6, d / 1e9, loss) for n, d, loss in GOOD], "Size (M),Tokens (B),loss"))
    with pytest.raises(UserError, match=r"'Size \(M\)' of .* is in units of M: write its numbers out"):
        columns.read(path, columns={"params": "Size (M)", "tokens": "Tokens (B)"})
    found = columns.read(write(as_csv([(n / 1e6, d / 1e6, loss) for n, d, loss in GOOD])))
    assert "if the numbers are in millions or billions" in told(found)
    found = columns.read(
        write(as_csv([(n, d, 6 * n * d / 1e18, loss) for n, d, loss in GOOD], "params,tokens,flops,loss"))
    )
    assert "The FLOPs are 1e-18 times 6 params tokens" in told(found) and found.derived is None
    found = columns.read(write(as_csv(GOOD)))
    assert found.derived == "flops" and "other units" not in told(found)


def test_one_run_that_is_too_good_condemns_no_others(write):
    found = columns.read(write(as_csv([*GOOD, (1e7, 1e9, 1.2)])))
    assert "line-14 is left out: its loss 1.2 is more than 10% below" in told(found)
    assert sum(run.problem is None for run in found.table) == len(GOOD)
