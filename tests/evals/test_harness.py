# SPDX-License-Identifier: Apache-2.0
"""``lab eval`` against the harness's own Hugging Face backend (``golden/make.py``): every request, and the results."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.cli import main
from research.core.types import Precision, UserError
from research.models.positions import Learned
from tests import tiny
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
    lost = (folder / "choose.yaml").read_text().replace("documents.jsonl", "lost.jsonl").replace("choose", "lost")
    (tmp_path / "lost.yaml").write_text(lost)
    assert main(["eval", str(folder / "model"), "--tasks", str(tmp_path / "lost.yaml"), "--mesh", "data=1"]) == 2
    assert "The harness could not run lost (FileNotFoundError" in capsys.readouterr().err


def test_texts_longer_than_a_table_of_positions():
    """In windows as long as the table, whose padding is longer: the sum of all next tokens' log-probabilities."""
    from lm_eval.api.instance import Instance

    from research.data.tokenizers import Bytes
    from research.evals.harness import HarnessModel

    model = replace(tiny.MODEL, position=Learned(20))
    policy = model.bind(jax.jit(lambda: model.init_params(jax.random.key(0), Precision()))(), {}, Precision())
    harness = HarnessModel(model, policy, Bytes().train([]), rows=3, length=20)
    text = "a text that is longer than twenty of its own bytes are"
    (total,) = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids = [harness.prefix_token_id, *harness.tok_encode(text)]
    wanted = 0.0
    for start in range(0, len(ids) - 1, 20):
        part = np.array(ids[start : start + 21], np.int32)
        count = len(part) - 1
        if count < 20:  # the last window looks back as far as it can
            part = np.array(ids[-21:], np.int32)
        batch = {"tokens": part[None, :-1], "positions": np.arange(20)[None], "segment_ids": np.ones((1, 20), np.int32)}
        log_probs = jax.nn.log_softmax(policy.logits(policy.forward(batch).hidden)[0])
        wanted += float(np.take_along_axis(np.asarray(log_probs), part[1:, None], axis=1)[-count:].sum())
    assert total == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(UserError, match="it must be from 2 to 20"):
        HarnessModel(model, policy, Bytes().train([]), length=21)
    asked = Instance("generate_until", {}, ("a", {"until": ["x"], "num_beams": 4, "max_gen_toks": 4}), 0)
    with pytest.raises(UserError, match="asks for num_beams in its generation_kwargs"):
        harness.generate_until([asked])
