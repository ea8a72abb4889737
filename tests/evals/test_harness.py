# SPDX-License-Identifier: Apache-2.0
"""``lab eval`` against the harness's own Hugging Face backend (``golden/make.py``): every request, and the results."""

import json
from pathlib import Path

import pytest

from launch.cli import main
from tests.evals.golden import make

pytest.importorskip("lm_eval", reason="needs the extra eval")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "harness.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("harness")
    make.build(where / "model", GOLDEN["tokenizer"])
    return where


def close(found, wanted):
    """Answers of one request: log-probabilities to 1e-4, texts and choices alike."""
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(close(*pair) for pair in zip(found, wanted, strict=True))
    if isinstance(wanted, float) or isinstance(found, float):
        return found == pytest.approx(wanted, rel=1e-5, abs=1e-4)
    return str(found) == str(wanted)


@pytest.mark.parametrize("imported", [False, True], ids=["its files", "an import"])
def test_every_request_is_answered_as_by_transformers(folder, imported, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    model = folder / "model"
    if imported:
        model = tmp_path / "it"
        assert main(["import", "hf", str(folder / "model"), "--out", str(model), "--mesh", "data=1"]) == 0
    tasks = [str(folder / f"{name}.yaml") for name in make.TASKS]
    out = tmp_path / "found.json"
    command = ["eval", str(model), "--tasks", *tasks, "--mesh", "data=1", "--out", str(out), "--slots", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (
        "choose  acc: 0.3333 +- " in printed
        and f"bits_per_byte: {GOLDEN['results']['roll']['bits_per_byte,none']:.4f}" in printed
    )
    found = make.answers(json.loads(out.read_text()))
    for task, metrics in GOLDEN["results"].items():
        for name, value in metrics.items():
            assert found["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    for task, requests in GOLDEN["requests"].items():
        for (asked, answer), (mine, given) in zip(requests, found["requests"][task], strict=True):
            assert asked == mine and close(given, answer), (task, asked, given, answer)


def test_what_is_no_task_is_one_sentence(folder, capsys, tmp_path):
    for task, words in (
        ("missing.yaml", "There is no task missing.yaml"),
        (str(tmp_path / "a.yaml"), "no line 'task:"),
    ):
        (tmp_path / "a.yaml").write_text("nothing: 1\n")
        assert main(["eval", str(folder / "model"), "--tasks", task, "--mesh", "data=1"]) == 2
        assert words in capsys.readouterr().err
