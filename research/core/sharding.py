# SPDX-License-Identifier: Apache-2.0
"""Meshes and logical axes: one vocabulary of mesh axes, one rules table, one place to constrain.

Every parameter carries logical axis names beside it (``("embed", "mlp")``); ``RULES`` maps them to mesh
axes. Activations are constrained by the same table. Axis types are Auto: the compiler partitions.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from research.core.tree import named_leaves
from research.core.types import UserError

Axes = tuple[str | None, ...]

# Logical axis -> mesh axes. Parameters first, activations below; an axis that is not split maps to ().
RULES: Mapping[str, tuple[str, ...]] = {
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "expert": (),
    "router": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "position": (),
    "norm": (),
    "batch": ("data", "fsdp"),
    "sequence": (),
    "act_embed": (),
    "act_mlp": ("tensor",),
    "act_heads": ("tensor",),
    "act_vocab": ("tensor",),
}


class MeshError(UserError):
    """A mesh that does not fit the devices, the batch or the model."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many ways each mesh axis is split; ``data=-1`` takes the devices that are left.

    data: copies of the model, each on its share of the batch.
    fsdp: as data, with parameters and optimizer state sharded too (ZeRO-3).
    tensor: heads, feed-forward and vocabulary split within a layer (Megatron).
    """

    data: int = -1
    fsdp: int = 1
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
            given = " x ".join(f"{name}={n}" for name, n in sizes.items())
            raise MeshError(
                f"The mesh {given} needs {math.prod(sizes.values())} devices and there are {num_devices}: "
                "choose axes whose product is at most that number, and divides it where data is -1."
            )
        return sizes


def make_mesh(spec: MeshSpec, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh of a spec. A spec that names every axis may use fewer devices than there are."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = spec.shape(len(devices))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[: math.prod(sizes.values())],
    )


def partition_spec(axes: Axes) -> PartitionSpec:
    """The mesh axes of an array's logical axes. Raises MeshError for a name without a rule."""
    entries = []
    for name in axes:
        if name is not None and name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1)
            raise MeshError(f"The logical axis {name!r} has no rule{f'; did you mean {near[0]!r}' if near else ''}.")
        mesh_axes = RULES[name] if name is not None else ()
        entries.append(None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes)
    return PartitionSpec(*entries)


def named_sharding(mesh: Mesh, axes: Axes) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes))


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """The sharding of a batch array [B, ...]: rows over data and fsdp."""
    return named_sharding(mesh, ("batch",) + (None,) * (ndim - 1))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """Shardings of a tree of shapes whose logical axes stand in a tree of the same structure.

    Raises MeshError naming the first dimension that its mesh axes do not divide.
    """
    axes_by_name = named_leaves(jax.tree.map(_Leaf, axes, is_leaf=lambda a: isinstance(a, tuple)))

    def one(path: tuple[Any, ...], shape: Any) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        leaf_axes = axes_by_name[name].axes
        for dim, axis in zip(shape.shape, leaf_axes, strict=True):
            ways = math.prod(mesh.shape[m] for m in RULES[axis]) if axis else 1
            if dim % ways:
                raise MeshError(
                    f"The mesh splits {axis!r} {ways} ways ({' x '.join(RULES[axis])}), which does not divide "
                    f"the {dim} of parameter {name} {tuple(shape.shape)}: change the mesh or the model's size."
                )
        return named_sharding(mesh, leaf_axes)

    return jax.tree_util.tree_map_with_path(one, shapes)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """Wraps an axes tuple so that a tree does not descend into it."""

    axes: Axes


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays an activation out by its logical axes on the mesh in scope (``jax.set_mesh``); else does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def check_batch(mesh: Mesh, batch_size: int, microbatches: int = 1) -> None:
    """Raises MeshError where rows per microbatch do not split evenly over data and fsdp."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % microbatches:
        raise MeshError(
            f"A batch of {batch_size} rows does not split into {microbatches} microbatches: choose a batch size "
            f"that is a multiple of {microbatches}."
        )
    if (batch_size // microbatches) % ways:
        nearest = max(1, round(batch_size / (ways * microbatches))) * ways * microbatches
        raise MeshError(
            f"A batch of {batch_size} rows in {microbatches} microbatches does not split over "
            f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} devices: choose a batch size that is a multiple "
            f"of {ways * microbatches}, such as {nearest}."
        )
