# SPDX-License-Identifier: Apache-2.0
"""Weights from Hugging Face files into our parameters on a mesh, and back, one tensor at a time.

Everything that can be told from names, shapes and dtypes is told before a single weight is read.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.core import sharding
from research.core.tree import named_leaves
from research.core.types import Array, Params, Precision, UserError
from research.hf import deepseek, gemma, gpt2, gpt_neox, llama, mixtral, phi3, qwen, tables
from research.hf.config import Config, Unfit, canonical
from research.hf.family import Family
from research.hf.multimodal import Files
from research.hf.tables import Table, Tensor
from research.models.decoder import Decoder

FAMILIES = (
    llama.LLAMA, llama.MISTRAL, qwen.QWEN2, qwen.QWEN3, gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3, mixtral.MIXTRAL,
    qwen.QWEN2_MOE, qwen.QWEN3_MOE, phi3.PHI3, gpt2.GPT2, gpt_neox.GPT_NEOX, deepseek.DEEPSEEK_V3, deepseek.DEEPSEEK_V2,
)  # fmt: skip
DTYPES = ("F32", "F16", "BF16")
LISTED = 4


class Imported(NamedTuple):
    params: Params
    buffers: Params


def family_of(config: Config) -> Family:
    """Raises UserError for a model_type that is not here."""
    kind = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == kind:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"{config.where} is of the model_type {kind!r}, which is not supported: it must be {known}.")


def described(config: Config, names: Iterable[str]) -> tuple[Family, Decoder]:
    """The family and the model of a config whose tensors have these names: layers that predict further tokens are there
    where their tensors are. Raises UserError for a setting that is not supported."""
    family = family_of(config)
    model, names = family.model(config), set(names)
    config.check_read()
    for begin in _further(family.table, model):
        if begin + family.table.ahead[0].name in names:
            model = replace(model, ahead=model.ahead + 1)
    return family, model


def _further(table: Table, model: Decoder) -> Iterator[str]:
    for step in range(8 if table.ahead else 0):
        yield table.layer.format(layer=model.num_layers + step)


def fitting(model: Decoder, length: int) -> tuple[Family, dict[str, Any]]:
    """The first family whose config describes the model exactly, and that config. Raises UserError saying for each
    family of that kind of model what is in the way."""
    reasons = []
    for family in FAMILIES:
        try:
            found = {"model_type": family.model_type, "architectures": [family.architecture]}
            found |= family.config(model, length)
            rebuilt = replace(family.model(Config(found)), ahead=model.ahead)
        except UserError as error:
            reasons.append(f"{family.model_type}: {error if isinstance(error, Unfit) else 'other settings'}")
            continue
        if canonical(rebuilt) == canonical(model):
            return family, found
        reasons.append(f"{family.model_type}: {_difference(canonical(model), canonical(rebuilt))}")
    raise UserError(f"No Hugging Face family has this model ({'; '.join(reasons)}): change it to fit one of them.")


def _difference(model: Decoder, other: Decoder) -> str:
    names = [name for name in vars(model) if getattr(model, name) != getattr(other, name)]
    return f"another {', '.join(names)}"


def plan(family: Family, model: Decoder, files: Files | None = None) -> list[Tensor]:
    """All tensors of a model in their files. With files, raises UserError naming what is missing, unknown, or of
    another shape or dtype."""
    leaves = shapes_of(model)
    found = list(tables.tensors(family.table, model, leaves.__contains__))
    covered = {place.path for tensor in found for place in tensor.places}
    if left := [path for path in leaves if path not in covered]:
        raise UserError(f"The family {family.model_type} has no tensor for {', '.join(left[:LISTED])}.")
    if files is not None:
        _check(family.table, model, found, leaves, files)
    return found


def shapes_of(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Our arrays, buffers too, by path."""
    found = {**named_leaves(model.shapes(Precision())), **named_leaves(jax.eval_shape(model.init_buffers))}
    return {path: leaf.shape for path, leaf in found.items()}


def _check(table: Table, model: Decoder, wanted: list[Tensor], ours: Mapping[str, Any], files: Files) -> None:
    names = [_name(table, tensor.name, files) for tensor in wanted]
    if missing := [name for name in names if name not in files.shapes]:
        raise UserError(
            f"The weights lack {_listed(missing)}: give all files of the model, with their own config.json."
        )
    spare = set(files.shapes) - set(names)
    spare -= {name for name in spare if name.endswith(table.unneeded) or _copies(table, model, name)}
    if spare:
        raise UserError(f"The weights have {_listed(sorted(spare))}, which the model of config.json has not.")
    for tensor, name in zip(wanted, names, strict=True):
        shape, dtype = files.shapes[name]
        if dtype not in DTYPES:
            raise UserError(f"{name} is stored as {dtype}, which is not supported: it must be {', '.join(DTYPES)}.")
        if tuple(shape) != (expected := tables.shape(tensor, ours)):
            raise UserError(f"{name} has the shape {tuple(shape)} and config.json asks for {expected}.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _name(table: Table, name: str, files: Files) -> str:
    """As the files have it: some leave the prefix out."""
    bare = name.removeprefix(table.prefix)
    return bare if name not in files.shapes and bare in files.shapes else name


def _copies(table: Table, model: Decoder, name: str) -> bool:
    """A tied head written out, or what layers that predict further tokens share with the model."""
    if name in ("lm_head.weight", "embed_out.weight"):
        return model.head == "tied"
    return name.endswith(("embed_tokens.weight", "shared_head.head.weight")) and any(
        name.startswith(begin) for begin in _further(table, model)
    )


def load(family: Family, model: Decoder, files: Files, *, mesh: Mesh, precision: Precision) -> Imported:
    """Parameters and buffers laid out over the mesh. Each array is allocated once where it lies, and one of their
    tensors at a time is put into it. Raises UserError as ``plan`` does, before anything is read."""
    wanted = plan(family, model, files)
    axes = {path: sharding.partition_spec(leaf) for path, leaf in _axes(model).items()}
    shapes, dtype = shapes_of(model), jnp.dtype(precision.params)
    arrays: dict[str, Array] = {}
    buffers = set(named_leaves(jax.eval_shape(model.init_buffers)))
    sharding.check_mesh(mesh.shape, model.splits(rows=mesh.size))
    with jax.set_mesh(mesh):
        for tensor in wanted:
            for place, array in tables.ours(tensor, files.read(_name(family.table, tensor.name, files))):
                spec = axes.get(place.path, PartitionSpec(*[None] * len(shapes[place.path])))
                kind = jnp.dtype(jnp.float32) if place.path in buffers else dtype
                if place.path not in arrays:
                    arrays[place.path] = _zeros(shapes[place.path], kind, NamedSharding(mesh, spec))
                part = NamedSharding(mesh, PartitionSpec(*spec[len(place.index) :]))
                piece = jax.device_put(np.ascontiguousarray(array).astype(kind), part)
                arrays[place.path] = _put(arrays[place.path], np.asarray(place.index, np.int32), piece)
                arrays[place.path].block_until_ready()  # else pieces would wait for each other in memory
    tree = lambda leaves: jax.tree.map(lambda leaf: arrays[leaf], leaves)  # noqa: E731
    return Imported(tree(_paths(model.shapes(Precision()))), tree(_paths(jax.eval_shape(model.init_buffers))))


def tensors(
    family: Family, model: Decoder, params: Params, buffers: Params
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """What to write: name, shape, and a function that fetches one of their tensors from ours."""
    arrays, leaves = {**named_leaves(params), **named_leaves(buffers)}, shapes_of(model)
    for tensor in plan(family, model):

        def fetch(tensor: Tensor = tensor) -> np.ndarray:
            return tables.theirs(tensor, [np.asarray(arrays[p.path][p.index]) for p in tensor.places])

        yield tensor.name, tables.shape(tensor, leaves), fetch


def _paths(tree: Any) -> Any:
    """A tree with the path of each leaf in its place."""
    names = iter(named_leaves(tree))
    return jax.tree.map(lambda _: next(names), tree)


def _axes(model: Decoder) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(tree: Any, path: str) -> None:
        for name, child in tree.items():
            where = f"{path}/{name}" if path else name
            if isinstance(child, tuple):
                found[where] = child
            else:
                walk(child, where)

    walk(model.logical_axes(), "")
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), where)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: Array, index: Array, piece: Array) -> Array:
    """Not ``at[].set``: of bfloat16 a CPU would scatter into a copy of the whole in float32."""
    start = (*index, *[0] * piece.ndim)
    return jax.lax.dynamic_update_slice(whole, piece.reshape((1,) * len(index) + piece.shape), start)
