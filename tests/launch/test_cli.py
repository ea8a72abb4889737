# SPDX-License-Identifier: Apache-2.0
"""The command line: what it runs, and one plain sentence for each mistake."""

import json
import os
import resource
import subprocess
import sys

import pytest

from launch import cli
from tests.conftest import ROOT

STUDY = str(ROOT / "tests" / "launch" / "tiny_study.py")


@pytest.fixture
def lab(tmp_path, cache_dir, monkeypatch, capsys):
    """Runs ``lab`` in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("LAB_CACHE", str(cache_dir))
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        code = cli.main(["--runs", str(tmp_path / "runs"), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


MISTAKES = {
    "misspelt path": (
        ["run", STUDY, "--only", "tiny", "--set", "model.d_modle=3"],
        "Did you mean 'd_model'?",
    ),
    "wrong type": (["run", STUDY, "--only", "tiny", "--set", "model.d_model=wide"], "not a whole number"),
    "no such run": (["run", STUDY, "--only", "tinny"], "has no experiment 'tinny'; it has: tiny, longer"),
    "no sweep": (["sweep", str(ROOT / "tests" / "tiny.py")], "has no function sweep()"),
    "not a function": (["list", STUDY + ":nothing"], "has no function nothing()"),
    "no study": (["list", "nowhere.py"], "There is no study nowhere.py"),
    "nothing to analyse": (["analyze", STUDY], "no function analyze"),
    "no checkpoint": (["sample", "nowhere", "--prompt", "a"], "holds no checkpoint"),
    "batch and mesh": (
        ["run", STUDY, "--only", "tiny", "--set", "source.batch_size=6"],
        "choose a multiple of 8",
    ),
    "length": (["run", STUDY, "--only", "tiny", "--set", "source.sequence_length=0"], "at least 1"),
    "a number out of range": (["list", STUDY, "--set", "optimizer.b1=2"], "below 1"),
    "no heads": (["list", STUDY, "--set", "model.attention.num_heads=0"], "at least 1"),
    "too large a number": (["list", STUDY, "--set", "length.count=1e400"], "not a whole number"),
    "a name": (["list", STUDY, "--set", "name=x"], "keys of the study's dict"),
    "no corpus": (["tokenizer", "train", "/nowhere/at/all"], "/nowhere/at/all"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_a_code(lab, tmp_path, mistake):
    arguments, words = MISTAKES[mistake]
    code, out, err = lab(*arguments)
    assert code == 2 and words in err and err.count("\n") == 1 and not out, err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("metrics.jsonl"))


def test_a_study_that_does_not_load_names_the_line(lab, tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\ny = x / 0\n")
    code, _, err = lab("list", str(tmp_path / "broken.py"))
    assert code == 2 and "ZeroDivisionError" in err and "line 2" in err and err.count("\n") == 1


DAMAGED = {
    "result.json": ["{", "[]", ""],
    "experiment.json": ["{", "null"],
    "failure.json": ["{"],
    "metrics.jsonl": ['{"step": 1}\n{"ste\n{"step": 3}\n', "3\n", "\xff\n"],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_of_a_run_are_one_sentence_and_stay(lab, tmp_path, name):
    folder = tmp_path / "runs" / "tiny_study" / "tiny"
    folder.mkdir(parents=True)
    for text in DAMAGED[name]:
        (folder / name).write_text(text, encoding="latin-1")
        command = ["list", STUDY] if name in ("result.json", "failure.json") else ["run", STUDY, "--only", "tiny"]
        code, _, err = lab(*command)
        errors = [line for line in err.splitlines() if line.startswith("lab: error")]
        assert code == 2 and len(errors) == 1 and "damaged" in errors[0], (text, err)
        assert (folder / name).read_text(encoding="latin-1") == text


def test_places_that_cannot_be_used_are_one_sentence(lab, tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file")
    code, _, err = lab("run", STUDY, "--only", "tiny")
    assert code == 2 and err.count("\n") == 1 and "cannot be used" in err
    (tmp_path / "runs").unlink()
    monkeypatch.setenv("LAB_CACHE", "/proc/nope")
    code, _, err = lab("tokenizer", "train", "stdlib")
    assert code == 2 and err.count("\n") == 1 and "/proc/nope" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def sweep(:\n", "line 1"),
        ("def sweep():\n    return {}['a']\n", "KeyError"),
        ("import sys\nsys.exit(3)\n", "SystemExit"),
        ("def sweep():\n    return {}\n", "returned no experiment"),
        ("def sweep():\n    return 3\n", "must return a dict"),
        ("from tests.launch.tiny_study import sweep\nanalyze = 3\n", "not a function"),
    ],
)
def test_a_study_that_fails_is_one_sentence(lab, tmp_path, text, words):
    (tmp_path / "broken.py").write_text(text)
    code, _, err = lab("list", str(tmp_path / "broken.py"))
    assert code == 2 and words in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_a_finished_study_whose_text_has_changed_is_refused(lab, tmp_path):
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / f"{name}.txt").write_text(f"some text of {name}\n" * 500)
    (tmp_path / "own.py").write_text(
        "from dataclasses import replace\nfrom tests import tiny\nfrom research.core.sharding import MeshSpec\n"
        "from research.data.sources import TextFolder\n"
        "def sweep():\n"
        "    e = tiny.experiment(steps=2, mesh=MeshSpec(data=1), evals=())\n"
        f"    return {{'a': replace(e, source=replace(e.source, corpus=TextFolder({str(tmp_path / 'text')!r})))}}\n"
        "def analyze(runs, out):\n    (out / 'said').write_text(next(iter(runs)).name)\n"
    )
    code, _, err = lab("sweep", str(tmp_path / "own.py"))
    assert code == 0, err
    assert lab("analyze", str(tmp_path / "own.py"))[0] == 0 and list((tmp_path / "runs").rglob("said"))
    (tmp_path / "text" / "a.txt").write_text("quite another\n" * 500)
    for command in (["sweep", str(tmp_path / "own.py")], ["run", str(tmp_path / "own.py"), "--only", "a"]):
        code, _, err = lab(*command)
        assert code == 2 and "content hash" in err and err.count("\n") == 1


def test_an_empty_document_set(lab, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = lab("tokenizer", "train", str(tmp_path / "empty"))
    assert code == 2 and "empty" in err and err.count("\n") == 1


@pytest.mark.slow
def test_sweep_list_sample(lab, tmp_path):
    """A sweep runs what is not finished, skips what is, goes past a failure, and its runs can be sampled."""
    code, _, err = lab("sweep", STUDY, "--set", "length.count=3", "--set", "mesh.data=1")
    assert code == 0 and "2 of 2 runs finished" in err
    code, _, err = lab("sweep", STUDY, "--set", "length.count=3", "--set", "mesh.data=1")
    assert code == 0 and err.count("finished before") == 2
    code, out, _ = lab("list", STUDY, "--set", "length.count=3", "--set", "mesh.data=1")
    assert code == 0 and out.count("finished") == 2
    (folder,) = (tmp_path / "runs").iterdir()
    first, again = (
        lab("sample", str(folder / "tiny"), "--prompt", "abc", "--tokens", "5", "--seed", "1") for _ in range(2)
    )
    assert first[0] == 0 and first[1].startswith("abc") and first == again
    code, out, _ = lab("list", STUDY)  # the plain study has a folder of its own: nothing has run there
    assert out.count("missing") == 2


@pytest.mark.slow
def test_a_sample_with_another_tokenizer_is_refused(lab, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for name in "abc":
        (text / f"{name}.txt").write_text(f"some text of {name} and no more\n" * 500)
    (tmp_path / "own.py").write_text(
        "from dataclasses import replace\nfrom tests import tiny\nfrom research.core.sharding import MeshSpec\n"
        "from research.data.sources import TextFolder\nfrom research.data.tokenizers import Characters\n"
        "def sweep():\n"
        "    e = tiny.experiment(steps=2, mesh=MeshSpec(data=1), evals=())\n"
        f"    own = replace(e.source, corpus=TextFolder({str(text)!r}), tokenizer=Characters())\n"
        "    return {'a': replace(e, source=own, model=replace(e.model, vocab_size=300))}\n"
    )
    assert lab("run", str(tmp_path / "own.py"), "--only", "a")[0] == 0
    (text / "a.txt").write_text("QUITE OTHER LETTERS\n" * 500)
    (run,) = (tmp_path / "runs").glob("*/a")
    code, _, err = lab("sample", str(run), "--prompt", "some")
    assert code == 2 and "tokenizer" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_diverged_run_is_marked_and_does_not_stop_the_sweep(lab):
    code, _, err = lab("sweep", STUDY + ":diverging", "--set", "mesh.data=1")
    assert code == 1 and "learning rate" in err and "0 of 1 runs finished" in err
    _, out, _ = lab("list", STUDY + ":diverging", "--set", "mesh.data=1")
    assert "diverged" in out


def test_two_processes_do_not_run_one_experiment(lab, tmp_path):
    from launch.locks import locked

    folder = tmp_path / "runs" / "tiny_study" / "tiny"
    with locked(folder):
        (folder / "metrics.jsonl").touch()
        code, _, err = lab("run", STUDY, "--only", "tiny")
        assert "running" in lab("list", STUDY)[1]
    assert code == 2 and "Another process is running" in err
    assert "interrupted" in lab("list", STUDY)[1]


def test_tokenizer_train_is_cached(lab, tmp_path):
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / f"{name}.txt").write_text(f"the {name} of the matter is the text of it\n" * 200)
    first = lab("tokenizer", "train", str(tmp_path / "text"), "--vocab-size", "300")
    assert first[0] == 0 and "300 tokens" in first[1]
    assert lab("tokenizer", "train", str(tmp_path / "text"), "--vocab-size", "300") == first


def test_without_jax_there_is_one_sentence(tmp_path):
    """As in a Python that has no JAX: the command says what to do."""
    script = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'jax' else find(name, *a)\n"
        "sys.modules['jax'] = None\n"
        "from launch import cli\n"
        "sys.exit(cli.main(['list', 'x.py']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "JAX is not installed" in done.stderr


def test_a_newer_jax_is_one_warning(monkeypatch, capsys):
    monkeypatch.setattr(cli.metadata, "version", lambda name: "0.99.1")
    assert cli.check_jax() == 0
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "JAX 0.99.1 is newer than the tested 0.10" in warning


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_what_was_saved_stays(tmp_path, cache_dir):
    """Files may grow to 24 kB and no further: a checkpoint does not fit, the metrics so far do."""
    environment = {**os.environ, "LAB_CACHE": str(cache_dir), "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    arguments = [sys.executable, "-m", "launch.cli", "--runs", str(tmp_path), "run", STUDY, "--only", "tiny"]
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))

    full = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, preexec_fn=limited)
    assert full.returncode == 2, full.stderr
    errors = [line for line in full.stderr.splitlines() if line.startswith("lab: error")]
    assert len(errors) == 1 and "Traceback" not in full.stderr, full.stderr
    assert "full" in errors[0] or "could not be written" in errors[0]
    done = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "tiny_study" / "tiny" / "result.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [300, 600, 1400])
def test_a_file_system_without_room_is_one_sentence_wherever_it_fills(tmp_path, cache_dir, kilobytes):
    """A file system of its own, in a mount namespace: metrics, TensorBoard and checkpoints all meet its end."""
    place = tmp_path / "small"
    place.mkdir()
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {place}"
    try:
        allowed = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("needs the right to mount a file system")
    environment = {**os.environ, "LAB_CACHE": str(cache_dir), "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    run = f"{sys.executable} -m launch.cli --runs {place} run {STUDY} --only tiny"
    both = ["unshare", "-m", "sh", "-c", f"{mount} && {run}"]
    full = subprocess.run(both, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert full.returncode == 2 and full.stderr.count("lab: error") == 1, full.stderr
    assert "Traceback" not in full.stderr, full.stderr
