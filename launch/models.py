# SPDX-License-Identifier: Apache-2.0
"""Models by the name of a folder: a run, a checkpoint, an import, or Hugging Face files; imports and exports."""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from launch import host, store
from launch.plan import mesh_assignments
from research.core import config as configs
from research.core import sharding
from research.core.sharding import MeshSpec
from research.core.types import Precision, UserError
from research.data.pipeline import PackedSource
from research.data.pretrained import FILES, PretrainedTokenizer, place, read
from research.data.pretrained import FOLDER as TOKENIZER
from research.data.sentence_piece import SentencePieceTokenizer
from research.data.tokenizers import Tokenizer
from research.hf import convert
from research.hf.config import Config
from research.hf.multimodal import language_part
from research.hf.store import DTYPES, Store, check_empty, writing
from research.models.bound import Bound
from research.models.decoder import Decoder
from research.rl.rollout import Rollouts
from research.train import checkpoint, weights

CONFIG = "config.json"


class Loaded(NamedTuple):
    """A model ready for use on a mesh, its tokenizer, None where it came with none, and the most positions that it is
    said to take."""

    model: Decoder
    policy: Bound
    tokenizer: Tokenizer | None
    mesh: Any
    length: int


@dataclass(frozen=True)
class _Mesh:
    """What ``--mesh`` assigns to."""

    mesh: MeshSpec = MeshSpec()


def mesh_of(text: str | None) -> MeshSpec:
    """The mesh of ``--mesh``; without it all devices hold copies and share the rows."""
    return configs.override(_Mesh(), *mesh_assignments(text)).mesh if text else MeshSpec()


def is_hugging_face(folder: Path) -> bool:
    return (folder / CONFIG).exists() and not (folder / checkpoint.FOLDER).is_dir()


def load(name: str, *, mesh: MeshSpec, dtype: str | None = None) -> Loaded:
    """dtype: of parameters and products; None: as stored. Raises UserError for a folder that holds no model."""
    folder, devices = store.place(name), sharding.make_mesh(mesh)
    if is_hugging_face(folder):
        tokenizer = read(folder) if place(folder) else None
        values, model, policy = read_hugging_face(folder, devices, dtype)
        return Loaded(model, policy, tokenizer, devices, _promised({"config": values}))
    described = weights.describe(folder)
    precision = described.precision if dtype is None else precision_of(dtype)
    with jax.set_mesh(devices):
        policy = weights.load(folder, described.model, precision, devices)
    tokenizer = tokenizer_of(folder, described.origin)
    return Loaded(described.model, policy, tokenizer, devices, _promised(described.origin))


def tokenizer_of(folder: Path, origin: Any) -> Tokenizer | None:
    """A run's tokenizer, as its text gives it now, or that of an import."""
    directory, _ = checkpoint.locate(folder)
    if isinstance(origin, dict):
        return read(directory) if place(directory) else None
    if not isinstance(origin.source, PackedSource | Rollouts):
        raise UserError(f"{folder} was not trained on text, so that a prompt means nothing to it.")
    tokenizer = origin.source.tokenizer_for(host.cache_dir())
    before = checkpoint.read_item(folder, "data").get("data", {}).get("tokenizer")
    if before not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{folder} was trained with the tokenizer {before}, and its text now gives {tokenizer.fingerprint}: put "
            "the text back that the tokenizer was trained on."
        )
    return tokenizer


def precision_of(dtype: str) -> Precision:
    kind: Any = "bfloat16" if dtype in ("bfloat16", "BF16") else "float32"
    return Precision(params=kind, compute=kind)


def read_hugging_face(folder: Path, mesh: Any, dtype: str | None = None) -> tuple[dict[str, Any], Decoder, Bound]:
    """The config.json, model and weights of a folder; all that is wrong with it is told before weights are read."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("its settings have no names")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a folder with config.json and safetensors.") from error
    config, files = language_part(Config(values, str(path)), Store(folder))
    family, model = convert.described(config, files.shapes)
    _ = config.positions  # wrong ones are told now
    stored = {kind for _, kind in files.shapes.values()}
    precision = precision_of(dtype or ("BF16" if stored == {"BF16"} else "F32"))
    params, buffers = convert.load(family, model, files, mesh=mesh, precision=precision)
    return dict(config.values), model, model.bind(params, buffers, precision, platform=mesh.devices.flat[0].platform)


def import_model(options: argparse.Namespace) -> int:
    """``lab import hf PATH``."""
    folder = Path(options.path)
    out = Path(options.out) if options.out else store.place(options.runs) / "hf" / folder.resolve().name
    check_empty(out)
    theirs = place(folder)
    if theirs:
        read(theirs)  # whether it can be, before anything is written
    else:
        print(f"{folder} has no tokenizer: the import will have none.", file=sys.stderr)
    mesh = sharding.make_mesh(mesh_of(options.mesh))
    values, model, policy = read_hugging_face(folder, mesh, options.dtype)
    origin = {"kind": "hf", "config": values}
    with jax.set_mesh(mesh):
        weights.save(out, model, policy.module.precision, policy.params, policy.buffers, origin)
    (out / TOKENIZER).mkdir()
    for path in (*((theirs or folder) / name for name in FILES), folder / CONFIG):
        if path.exists():
            shutil.copyfile(path, out / TOKENIZER / path.name)
    print(
        f"{out}: {sum(x.size for x in jax.tree.leaves(policy.params)):,} parameters in {policy.module.precision.params}"
    )
    return 0


def export_model(options: argparse.Namespace) -> int:
    """``lab export hf RUN PATH``."""
    out = Path(options.path)
    check_empty(out)
    folder = store.place(options.run)
    described = weights.describe(folder)
    origin, model = described.origin, described.model
    length = options.length or _promised(origin)
    family, config = convert.fitting(model, length)
    dtype = DTYPES[{"float32": "F32", "bfloat16": "BF16"}[options.dtype or described.precision.params]]
    config["torch_dtype"] = str(dtype)
    tokenizer = tokenizer_of(folder, origin)
    if tokenizer is not None:
        eos = tokenizer.eos_ids
        config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos[0] if len(eos) == 1 else list(eos)}
        config |= {"pad_token_id": tokenizer.pad_id}
    mesh = sharding.make_mesh(MeshSpec(data=1))
    with jax.set_mesh(mesh):
        policy = weights.load(folder, model, described.precision, mesh)
        tensors = list(convert.tensors(family, model, policy.params, policy.buffers))
        with writing(out, {name: (shape, _kind(name, dtype)) for name, shape, _ in tensors}) as writer:
            for name, _, fetch in tensors:
                writer.write(name, fetch().astype(_kind(name, dtype)))
            (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            _write_tokenizer(out, folder, origin, tokenizer)
    print(f"{out}: {family.architecture}, {len(tensors)} tensors in {dtype}")
    return 0


def _kind(name: str, dtype: np.dtype) -> np.dtype:
    """A router's bias stays in float32: steps of a thousandth would be lost."""
    return DTYPES["F32"] if name.endswith("e_score_correction_bias") else dtype


def _promised(origin: Any) -> int:
    """The most positions that a model is said to take: those it was trained on."""
    if isinstance(origin, dict):
        return Config(origin["config"]).positions
    return origin.source.sequence_length


def _write_tokenizer(out: Path, folder: Path, origin: Any, tokenizer: Tokenizer | None) -> None:
    """The files that a tokenizer came with; a SentencePiece model of this project's as tokenizer.model."""
    if isinstance(tokenizer, PretrainedTokenizer):
        theirs = checkpoint.locate(folder)[0] if isinstance(origin, dict) else Path(origin.source.tokenizer.path)
        for path in (place(theirs) or theirs).iterdir():
            if path.name in FILES:
                shutil.copyfile(path, out / path.name)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        (out / "tokenizer.model").write_bytes(tokenizer.model)
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": True,
            "add_prefix_space": False,
        }
        settings |= {f"{kind}_token": piece for kind, piece in tokenizer.special_tokens.items()}
        (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    elif tokenizer is not None:
        print(
            f"The tokenizer of the kind {tokenizer.kind!r} has no Hugging Face form and was left out.", file=sys.stderr
        )
