# SPDX-License-Identifier: Apache-2.0
"""The table of runs: exact round trips, the order of its columns, and plain words for files that are not
tables."""

import math
import typing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.files import write_atomically
from research.core.types import UserError
from research.scaling.table import Run, Status, Table, read_csv, write_csv

RUN = Run("a", 100, 50, 2000, 1.2e6, 3.5, 2.1, "finished", 12.5, 1000, "abc")
HEADER = "name,params,non_embedding_params,tokens,flops,loss,bits_per_byte,status,seconds"
NUMBERS = st.none() | st.floats(min_value=1e-300, max_value=1e300)


def test_columns_stand_in_the_promised_order(tmp_path):
    write_csv(Table((RUN,)), tmp_path / "table.csv")
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0] == HEADER + (
        ",corpus_bytes,corpus_hash,experts,active_params,head_params,learning_rate,batch_tokens,warmup_tokens,"
        "unique_tokens,schedule,tokenizer"
    )
    assert lines[1] == "a,100,50,2000,1200000.0,3.5,2.1,finished,12.5,1000,abc" + "," * 9


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            Run,
            name=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Z")), min_size=1),
            params=st.integers(1, 10**15),
            non_embedding_params=st.integers(0, 10**15),
            tokens=st.integers(1, 10**17),
            flops=st.floats(1.0, 1e30),
            loss=NUMBERS,
            bits_per_byte=NUMBERS,
            status=st.sampled_from(list(typing.get_args(Status))),
            seconds=NUMBERS,
            corpus_bytes=st.none() | st.integers(0, 10**12),
            corpus_hash=st.none() | st.just("0123abcd"),
            experts=st.none() | st.integers(0, 1000),
            active_params=st.none() | st.integers(1, 10**15),
        ),
        unique_by=lambda run: run.name,
        max_size=4,
    )
)
def test_round_trip_is_exact(tmp_path_factory, runs):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    table = Table(tuple(runs))
    write_csv(table, path)
    assert read_csv(path) == table


def test_numpy_numbers_and_nan_survive(tmp_path):
    run = replace(RUN, params=np.int64(7), flops=np.float64(3.25), loss=float("nan"), status="diverged")
    write_csv(Table((run,)), tmp_path / "t.csv")
    back = read_csv(tmp_path / "t.csv")["a"]
    assert back.params == 7 and back.flops == 3.25 and math.isnan(back.loss)


def test_corpus_columns_may_be_absent_and_others_are_passed_over(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(f"{HEADER},more\na,100,50,2000.0,1e6,3.5,,finished,,hello\n")
    assert read_csv(path).runs == (Run("a", 100, 50, 2000, 1e6, 3.5, None, "finished"),)


def test_finished_and_excluded_give_reasons():
    table = Table(
        (
            RUN,
            replace(RUN, name="b", status="failed"),
            replace(RUN, name="c", loss=float("nan")),
            replace(RUN, name="d", loss=None),
            replace(RUN, name="e", status="missing", loss=None),
            replace(RUN, name="f", tokens=0),
        )
    )
    assert [run.name for run in table.finished()] == ["a"]
    assert table.excluded() == {
        "b": "failed",
        "c": "its loss is nan",
        "d": "finished without a validation loss",
        "e": "never ran",
        "f": "its tokens is 0",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column 'name'"),
        ("name,params\na,1\n", "has no column 'non_embedding_params'"),
        (
            f"{HEADER}\na,many,50,2000,1e6,3.5,,finished,\n",
            "line 2: the params is 'many', which is not a number",
        ),
        (f"{HEADER}\na,,50,2000,1e6,3.5,,finished,\n", "line 2: the params is empty"),
        (
            f"{HEADER}\na,1,50,2000,1e6,3.5,,done,\n",
            "must be one of finished, running, interrupted, changed, failed, diverged, missing",
        ),
        (
            f"{HEADER}\na,1,1,1,1,1,,finished,\na,1,1,1,1,1,,finished,\n",
            "Two runs of the table are named 'a'",
        ),
        (f"{HEADER}\na,inf,1,1,1,1,,finished,\n", "which is not a number"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, text, words):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_csv(path)


def test_absent_file_and_absent_run(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(UserError, match="has no run 'z'; it has: a"):
        Table((RUN,))["z"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "t.txt"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["t.txt"]
