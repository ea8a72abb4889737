# SPDX-License-Identifier: Apache-2.0
"""Meshes and logical axes: one vocabulary of mesh axes, one rules table, one place to constrain.

Every parameter carries logical axis names beside it (``("embed", "mlp")``); ``RULES`` maps them to mesh axes.
Activations are constrained by the same table. Axis types are Auto: the compiler partitions, but for the islands
of ``shard_map`` where the models room says itself what moves (rings of keys, experts, kernels).
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from research.core.tree import named_leaves
from research.core.types import UserError

Axes = tuple[str | None, ...]

# Logical axis -> mesh axes, the strategy for every mesh: an axis of size 1 splits nothing, so that the mesh's shape
# alone decides. An array uses each mesh axis once, for the first of its dimensions that asks for it: a matrix
# [expert, embed, mlp] has its experts on "expert", a matrix [embed, mlp] splits "embed" over it instead, so that
# whatever the mesh no device keeps a part of a matrix that another one could keep.
RULES: Mapping[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "expert": ("expert",),
    "vocab": ("tensor", "stage"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp", "expert", "context", "stage"),
    "head_dim": (),
    "router": (),
    "latent": (),
    "position": (),
    "norm": (),
    # activations
    "stage": ("stage",),
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "residual_sequence": ("context", "tensor"),
    "head_sequence": ("context", "tensor", "stage"),
    "act_embed": (),
    "act_mlp": ("tensor",),
    "act_heads": ("tensor",),
}


class MeshError(UserError):
    """A mesh that does not fit the devices, the batch or the model."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many ways each mesh axis is split; ``data=-1`` takes the devices that are left.

    data: copies of the model, each on its share of the batch; the only axis that may cross slices.
    stage: layers one after the other on different devices (GPipe; circular as in Megatron's interleaved schedule).
    fsdp: as data, with parameters and optimizer state sharded too (ZeRO-3).
    expert: as fsdp for all but expert layers, whose experts it spreads; tokens travel to them.
    context: the sequence split; keys travel around a ring.
    tensor: heads, feed-forward and vocabulary split within a layer (Megatron), the residual stream by sequence.
    """

    data: int = -1
    stage: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def shape(self, num_devices: int) -> dict[str, int]:
        """Axis sizes for a number of devices. Raises MeshError where the product does not come out."""
        sizes = dataclasses.asdict(self)
        bad = {name: n for name, n in sizes.items() if n < 1 and not (name == "data" and n == -1)}
        if bad:
            raise MeshError(f"Mesh axes must be positive (data may be -1 for what is left); given {bad}.")
        if self.data == -1:
            sizes["data"] = max(1, num_devices // math.prod(n for n in sizes.values() if n > 0))
        if math.prod(sizes.values()) > num_devices or (self.data == -1 and math.prod(sizes.values()) != num_devices):
            raise MeshError(
                f"The mesh {described(sizes)} has {math.prod(sizes.values())} devices and there are {num_devices}: "
                f"choose axes whose product divides {num_devices}, or name data too, to use fewer of them."
            )
        return sizes


def described(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name}={n}" for name, n in sizes.items() if n > 1) or "data=1"


def make_mesh(spec: MeshSpec, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh of a spec. A spec that names every axis may use fewer devices than there are.

    TPUs of several slices (``slice_index``) are joined along ``data``, outermost: only gradients cross the data-centre
    network. Raises MeshError where data is no multiple of the slices, or a slice has too few devices for its share.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = spec.shape(len(devices))
    by_slice: dict[int, list[Any]] = {}
    for device in devices:  # of GPUs too, but there it tells hosts apart
        by_slice.setdefault(getattr(device, "slice_index", 0) if device.platform == "tpu" else 0, []).append(device)
    slices = len(by_slice)
    check_slices(sizes, slices, min(len(chips) for chips in by_slice.values()))
    share = math.prod(sizes.values()) // slices
    devices = [device for chips in by_slice.values() for device in chips[:share]]
    from jax.experimental import mesh_utils

    inside = {**sizes, "data": sizes["data"] // slices}
    across = {name: slices if name == "data" else 1 for name in sizes}
    split = dict(allow_split_physical_axes=True)  # 8 x 8 chips of a torus of 4 x 4 x 4
    if slices == 1:
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, **split)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(tuple(inside.values()), tuple(across.values()), devices, **split)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def check_slices(sizes: Mapping[str, int], slices: int, fewest: int) -> None:
    """Raises MeshError where a mesh cannot lie over so many slices, of which the smallest has ``fewest`` devices."""
    if sizes["data"] % slices:
        raise MeshError(
            f"{slices} slices are joined along data, and data={sizes['data']} is no multiple of {slices}: choose "
            f"a multiple, such as data={-(-sizes['data'] // slices) * slices}, or fewer slices."
        )
    if fewest < (share := math.prod(sizes.values()) // slices):
        raise MeshError(
            f"The mesh {described(sizes)} needs {share} devices of each of {slices} slices and one has {fewest}: "
            "choose axes whose product is smaller, or slices of one size."
        )


def partition_spec(axes: Axes, *, without: tuple[str, ...] = ()) -> PartitionSpec:
    """The mesh axes of an array's logical axes, each for the first dimension that asks for it.

    without: mesh axes that something around has taken (a ``vmap`` over stages). Raises MeshError for a name
    without a rule.
    """
    used, entries = set(without), []
    for name in axes:
        if name is not None and name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1)
            raise MeshError(f"The logical axis {name!r} has no rule{f'; did you mean {near[0]!r}' if near else ''}.")
        mine = tuple(axis for axis in (RULES[name] if name is not None else ()) if axis not in used)
        used |= set(mine)
        entries.append(None if not mine else mine[0] if len(mine) == 1 else mine)
    return PartitionSpec(*entries)


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """An entry of a PartitionSpec as a tuple."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def gathered(w: jax.Array, spec: PartitionSpec, *, keep: Collection[str] = ()) -> jax.Array:
    """In a ``shard_map``: a device's part of an array that lies by ``spec``, gathered over all its mesh axes but those
    to keep."""
    for dim, entry in enumerate(spec):
        axes = tuple(axis for axis in mesh_axes(entry) if axis not in keep)
        if axes and jax.lax.axis_size(axes) > 1:
            w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
    return w


def named_sharding(mesh: Mesh, axes: Axes) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch array [B, T]."""
    return named_sharding(mesh, ("batch", "sequence"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def placed(shapes: Any, where: Any) -> Any:
    """A tree of shapes as they lie: ``where`` is a tree of shardings, or one for all."""
    if isinstance(where, NamedSharding):
        where = jax.tree.map(lambda _: where, shapes)
    return jax.tree.map(lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), shapes, where)


def ways(logical: str) -> int:
    """How many ways the mesh in scope splits a logical axis; 1 without a mesh."""
    sizes = current_shape()
    return math.prod(sizes.get(axis, 1) for axis in RULES[logical])


def current_shape() -> Mapping[str, int]:
    """Axis sizes of the mesh in scope (``jax.set_mesh``), empty without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)


def partitioned() -> bool:
    """Whether the compiler lays out arrays over several devices here: not in a ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and AxisType.Manual not in mesh.axis_types


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays an activation out by its logical axes on the mesh in scope; on one device does nothing.

    Mesh axes that do not divide a dimension (one token of a generation) are left out.
    """
    sizes = current_shape()
    if not partitioned():
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(x.shape, partition_spec(axes), sizes))


def fitting_spec(shape: Sequence[int], spec: PartitionSpec, sizes: Mapping[str, int]) -> PartitionSpec:
    """The spec without the mesh axes, last ones first, that do not divide their dimension."""
    entries = []
    for dim, entry in zip(shape, spec, strict=True):
        mine = mesh_axes(entry)
        while dim % math.prod(sizes[axis] for axis in mine):
            mine = mine[:-1]
        entries.append(mine or None)
    return PartitionSpec(*entries)


class Split(NamedTuple):
    """What a mesh must divide: ``size`` of ``what``, by mesh axes, times ``multiple`` where a share needs parts: where
    the axes split anything, or where the axis ``wherever`` does."""

    what: str
    size: int
    axes: tuple[str, ...]
    multiple: int = 1
    wherever: str | None = None

    def ways(self, sizes: Mapping[str, int]) -> int:
        found = math.prod(sizes[axis] for axis in self.axes)
        needed = found > 1 if self.wherever is None else sizes[self.wherever] > 1
        return found * self.multiple if needed else 1


def parameter_splits(shapes: Any, axes: Any) -> list[Split]:
    """What the rules split of a tree of parameters, given as shapes and as logical axes."""
    axes_by_name = named_leaves(jax.tree.map(_Leaf, axes, is_leaf=lambda a: isinstance(a, tuple)))
    return [
        Split(f"{logical!r} of parameter {name} {tuple(shape.shape)}", dim, mesh_axes(entry))
        for name, shape in named_leaves(shapes).items()
        for dim, logical, entry in zip(
            shape.shape, axes_by_name[name].axes, partition_spec(axes_by_name[name].axes), strict=True
        )
        if entry is not None
    ]


def check_mesh(sizes: Mapping[str, int], splits: Iterable[Split]) -> None:
    """Raises MeshError naming the first thing that the mesh does not divide, and the nearest mesh that fits all."""
    splits = list(splits)
    for split in splits:
        if split.size % split.ways(sizes):
            count = math.prod(sizes[axis] for axis in split.axes)
            named = " x ".join(f"{axis}={sizes[axis]}" for axis in split.axes if sizes[axis] > 1) or "on each device"
            each = f", in multiples of {split.multiple}," if split.multiple > 1 else ""
            near = nearest_mesh(sizes, lambda other: not any(s.size % s.ways(other) for s in splits))
            advice = (
                f"the nearest mesh of as many devices that fits is {described(near)}"
                if near
                else "no mesh of as many devices fits"
            )
            raise MeshError(
                f"The mesh splits {split.what} {count} ways ({named}){each} which does not divide {split.size}: "
                f"{advice}; or choose a multiple of {split.ways(sizes)}."
            )


def nearest_mesh(sizes: Mapping[str, int], fits: Callable[[Mapping[str, int]], bool]) -> dict[str, int] | None:
    """The mesh of as many devices that fits and has the fewest factors of two, and so on, in other places."""

    def distance(other: Mapping[str, int]) -> float:
        return sum(abs(math.log(other[axis] / n)) for axis, n in sizes.items())

    found = sorted(meshes(math.prod(sizes.values()), tuple(sizes)), key=distance)
    return next((other for other in found if fits(other)), None)


def meshes(num_devices: int, axes: tuple[str, ...] = tuple(MeshSpec.__dataclass_fields__)) -> list[dict[str, int]]:
    """Every shape of a mesh with so many devices."""
    if len(axes) == 1:
        return [{axes[0]: num_devices}]
    return [
        {axes[0]: n, **rest}
        for n in range(num_devices, 0, -1)
        if num_devices % n == 0
        for rest in meshes(num_devices // n, axes[1:])
    ]


def tree_shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """Shardings of a tree of shapes whose logical axes stand in a tree of the same structure.

    Raises MeshError naming the first dimension that its mesh axes do not divide.
    """
    check_mesh(mesh.shape, parameter_splits(shapes, axes))
    leaves = jax.tree.map(_Leaf, axes, is_leaf=lambda a: isinstance(a, tuple))
    return jax.tree.map(lambda _, leaf: named_sharding(mesh, leaf.axes), shapes, leaves)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """Wraps an axes tuple so that a tree does not descend into it."""

    axes: Axes


def batch_splits(batch_size: int, sequence_length: int, *, microbatches: int = 1) -> list[Split]:
    """What the rules split of batches in so many microbatches: rows, and the sequence in two parts a device (rings
    are balanced by pairs). Raises MeshError where the microbatches do not come out."""
    if batch_size % microbatches:
        raise MeshError(
            f"A batch of {batch_size} rows does not split into {microbatches} microbatches: choose a batch size "
            f"that is a multiple of {microbatches}."
        )
    name = "a batch" if microbatches == 1 else f"each of {microbatches} microbatches"
    return [
        Split(f"the {batch_size // microbatches} rows of {name}", batch_size // microbatches, RULES["batch"]),
        Split(f"the {sequence_length} tokens of a sequence", sequence_length, RULES["sequence"], multiple=2),
    ]


def microbatch(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...], each part spread over all shards of the batch."""
    split = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return constrain(split, None, "batch", *(["sequence"] if x.ndim > 1 else []), *[None] * (x.ndim - 2))
