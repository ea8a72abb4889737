# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders by the command: text from one, an import, a run that starts from it, and the way back."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import sentencepiece

from launch.cli import main
from research.core import sharding
from research.core.sharding import MeshSpec
from research.core.types import Context, Precision
from research.data import sources
from research.data.pretrained import Pretrained, read
from research.data.tokenizers import SentencePiece
from research.hf import convert
from research.hf.config import canonical
from research.hf.store import Store, writing
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.routers import Sigmoid
from research.train import checkpoint, loop, weights
from research.train.checkpoint import CheckpointError
from research.train.experiment import Init
from research.train.start import Program, first_state
from tests import tiny
from tests.conftest import ROOT
from tests.data import test_pretrained as tokenizers

MODEL = replace(tiny.MODEL, vocab_size=336)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights with a tokenizer, as others would save it."""
    out = tmp_path_factory.mktemp("saved") / "tiny-llama"
    params = jax.jit(lambda: MODEL.init_params(jax.random.key(0), Precision()))()
    family, config = convert.fitting(MODEL, 128)
    tensors = list(convert.tensors(family, MODEL, params, {}))
    with writing(
        out, {name: (shape, np.dtype(np.float32)) for name, shape, _ in tensors}, shard_bytes=90_000
    ) as writer:
        for name, _, fetch in tensors:
            writer.write(name, fetch())
    (out / "config.json").write_text(json.dumps(config))
    tokenizers.byte_level(out)
    return out


@pytest.fixture
def lab(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        code = main(["--runs", str(tmp_path / "runs"), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


ONE = ("--mesh", "data=1")


def test_a_folder_is_sampled_imported_and_exported_without_a_change(lab, folder, tmp_path):
    asked = ("--prompt", "the quick", "--tokens", "12", "--seed", "1", *ONE)
    code, first, _ = lab("sample", folder, *asked)
    assert code == 0 and first.startswith("the quick") and len(first) > 12
    code, out, err = lab("import", "hf", folder, *ONE)
    assert code == 0, err
    imported = tmp_path / "runs" / "hf" / "tiny-llama"
    assert str(imported) in out and canonical(weights.describe(imported).model) == canonical(MODEL)
    assert lab("sample", imported, *asked)[1] == first
    code, _, err = lab("export", "hf", imported, tmp_path / "back")
    assert code == 0, err
    before, after = Store(folder), Store(tmp_path / "back")
    assert before.shapes == after.shapes
    for name in before.shapes:
        np.testing.assert_array_equal(before.read(name), after.read(name))
    assert lab("sample", tmp_path / "back", *asked)[1] == first
    code, _, err = lab("import", "hf", folder, *ONE)
    assert code == 2 and "exists and is not empty" in err
    code, out, _ = lab("export", "hf", imported, tmp_path / "half", "--dtype", "bfloat16")
    assert code == 0 and {kind for _, kind in Store(tmp_path / "half").shapes.values()} == {"BF16"}


def test_a_file_of_prompts_is_completed_where_it_was_left(lab, folder, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a fox", "the dog", "x = [")))
    asked = ("sample", folder, "--prompts", prompts, "--out", out, "--tokens", "6", "--samples", "2", *ONE)
    assert lab(*asked)[0] == 0
    lines = out.read_text().splitlines()
    whole = {(r["index"], r["sample"]): r for r in map(json.loads, lines)}
    assert sorted(whole) == [(i, s) for i in range(3) for s in range(2)]
    out.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # killed while it wrote the third
    code, said, _ = lab(*asked)
    assert code == 0 and "6 texts" in said and "2 of them from before" in said
    again = {(r["index"], r["sample"]): r for r in map(json.loads, out.read_text().splitlines())}
    assert {key: r["text"] for key, r in again.items()} == {key: r["text"] for key, r in whole.items()}
    again = ("sample", f"{folder}/", *asked[2:])  # the same folder in other words, and a line break inside a string
    prompts.write_text(prompts.read_text().replace("the dog", "the\u2028dog"))
    assert lab(*again)[0] == 2 and lab(*again, "--seed", str(2**64))[2].count("\n") == 1
    out.unlink()
    assert lab(*again)[0] == lab(*asked)[0] == 0 and "6 of them from before" in lab(*asked)[1]
    code, _, err = lab(*asked, "--seed", "9")
    assert code == 2 and "Line 1 of" in err and "other --out" in err or "name another --out" in err
    best = tmp_path / "best.jsonl"
    assert lab("sample", folder, "--prompts", prompts, "--out", best, "--tokens", "6", "--best-of", "3", *ONE)[0] == 0
    assert len(best.read_text().splitlines()) == 3


def test_a_folder_without_a_tokenizer_goes_the_same_ways(lab, folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert lab("import", "hf", bare, *ONE)[0] == 0
    code, _, err = lab("export", "hf", tmp_path / "runs" / "hf" / "bare", tmp_path / "back")
    assert code == 0, err
    assert Store(bare).shapes == Store(tmp_path / "back").shapes
    code, _, err = lab("sample", bare, "--prompt", "a", *ONE)
    assert code == 2 and "tokenizer" in err


def test_biases_of_routers_come_back_and_a_run_starts_from_them(tmp_path):
    """They are no parameters, and a model without them routes otherwise."""
    moe = Moe(4, 16, Sigmoid(k=2))
    model = replace(tiny.MODEL, mlp=moe, first=(Mlp(16),), num_layers=3)
    params = jax.jit(lambda: model.init_params(jax.random.key(0), Precision()))()
    buffers = {"layers": {"mlp": {"bias": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}}}
    weights.save(tmp_path / "it", model, Precision(), params, buffers, {"kind": "made"})
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape((1,) * 6), tuple(tiny.experiment().mesh.shape(1)))
    policy = weights.load(tmp_path / "it", model, Precision(), mesh)
    np.testing.assert_array_equal(policy.buffers["layers"]["mlp"]["bias"], buffers["layers"]["mlp"]["bias"])
    experiment = tiny.experiment(model=model, init=Init(str(tmp_path / "it")))
    with jax.set_mesh(mesh):
        stream = experiment.source.start(Context(mesh=mesh, seed=0, cache_dir=tmp_path / "cache"))
        saved = checkpoint.Checkpointer(tmp_path / "run", experiment.checkpoint)
        state = first_state(Program(experiment, mesh), saved, stream)
    for found, given in ((state.params, params), (state.buffers, buffers)):
        jax.tree.map(np.testing.assert_array_equal, found, given)
    assert int(state.step) == 0


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """A run that began with an import, on its tokenizer, and one with a tokenizer of this project's."""
    where = tmp_path_factory.mktemp("tuned")
    assert main(["import", "hf", str(folder), "--out", str(where / "import"), *ONE]) == 0
    (where / "texts").mkdir()
    for number, path in enumerate(sorted((ROOT / "tests" / "infer").glob("*.py"))):
        (where / "texts" / f"{number}.txt").write_text(path.read_text().encode("ascii", "ignore").decode())
    for name, tokenizer, init in (
        ("theirs", Pretrained(str(where / "import")), Init(str(where / "import"))),
        ("ours", SentencePiece(vocab_size=336, character_coverage=0.98), None),
    ):
        experiment = tiny.experiment(steps=1, model=MODEL, init=init, evals=(), mesh=MeshSpec(data=1))
        source = replace(experiment.source, tokenizer=tokenizer, corpus=sources.TextFolder(str(where / "texts")))
        loop.run(replace(experiment, source=source), where / name, loop.Options(cache_dir=where / "cache"))
    return where


def test_an_export_has_the_tokenizer_of_its_run(lab, folder, tuned, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tuned / "cache"))
    for name in ("theirs", "ours"):
        code, _, err = lab("export", "hf", tuned / name, tmp_path / name)
        assert code == 0 and not err, err
    assert (tmp_path / "theirs" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    settings = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "ours" / "tokenizer.model"))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for kind in ("bos", "eos"):  # a name that the model does not have would become a new id
        assert pieces.piece_to_id(settings[f"{kind}_token"]) == config[f"{kind}_token_id"] != pieces.unk_id()
    text = "def f(x):\n    return x + 1  # twice"
    first, again = (read(tmp_path / name).encode(text).tolist() for name in ("ours", "ours"))
    assert first == again == pieces.encode(text)
    asked = ("--prompt", "def", "--tokens", "8", "--temperature", "0", *ONE)
    for name in ("theirs", "ours"):
        assert lab("sample", tmp_path / name, *asked)[1] == lab("sample", tuned / name, *asked)[1]
    other = replace(MODEL, num_layers=3)
    with pytest.raises(CheckpointError, match="do not fit the model asked for .*num_layers: 2 -> 3"):
        weights.load(tuned / "ours", other, Precision(), sharding.make_mesh(MeshSpec(data=1)))
    with pytest.raises(CheckpointError, match="give the folder that lab import hf makes"):
        weights.describe(folder)


def test_what_cannot_be_taken_over_is_one_sentence_and_leaves_nothing(lab, folder, tmp_path):
    other = tmp_path / "other"

    def refused(words, **changes):
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folder, other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, **changes}))
        code, _, err = lab("import", "hf", other, *ONE)
        assert code == 2 and words in err and err.count("\n") == 1, err
        assert not (tmp_path / "runs" / "hf").exists()

    refused("model_type 'bert', which is not supported", model_type="bert")
    refused("hidden_act = 'gelu'", hidden_act="gelu")
    refused("rope_type 'longrope'", rope_scaling={"rope_type": "longrope", "factor": 2.0})
    refused("The weights lack model.layers.2", num_hidden_layers=3)
    refused("The weights have model.layers.1", num_hidden_layers=1)
    refused("has the shape", vocab_size=300)
    refused("has no hidden_size", hidden_size=None)
    refused("attn_logit_softcapping = 5.0, which is not supported in this family", attn_logit_softcapping=5.0)
    refused("partial_rotary_factor = 0.5, which is not supported: it must be 1.0", partial_rotary_factor=0.5)
    refused("is of quantized weights", quantization_config={"quant_method": "fp8"})
    refused("num_hidden_layers = 'two': it must be a whole number of at least 1", num_hidden_layers="two")
    refused("num_attention_heads = 0: it must be a whole number of at least 1", num_attention_heads=0)
    refused("tie_word_embeddings = 'no': it must be true or false", tie_word_embeddings="no")
    refused("rope_theta = 'x': it must be a number", rope_theta="x")
    refused("rope_scaling = 'linear': it must be settings by name", rope_scaling="linear")
    refused("has no factor", rope_scaling={"rope_type": "linear"})
    refused("has no low_freq_factor", rope_scaling={"rope_type": "llama3", "factor": 2.0})
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    refused("mscale_all_dim = 0.8, which only DeepSeek's attention has", rope_scaling={**yarn, "mscale_all_dim": 0.8})
    refused("max_position_embeddings = 'long': it must be", max_position_embeddings="long")
    for name, content, words in (
        ("config.json", "[]", "is not JSON of settings"),
        ("tokenizer.json", "{", "is no tokenizer that can be read"),
        ("tokenizer_config.json", "[1]", "is not JSON of settings"),
    ):
        shutil.rmtree(other)
        shutil.copytree(folder, other)
        (other / name).write_text(content)
        code, _, err = lab("import", "hf", other, *ONE)
        assert code == 2 and words in err and err.count("\n") == 1, err
        assert not (tmp_path / "runs" / "hf").exists()
    code, _, err = lab("sample", tmp_path / "nowhere", "--prompt", "a", *ONE)
    assert code == 2 and "holds no checkpoint" in err
    code, _, err = lab("export", "hf", tmp_path / "nowhere", tmp_path / "x")
    assert code == 2 and not (tmp_path / "x").exists()
