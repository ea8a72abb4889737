# SPDX-License-Identifier: Apache-2.0
"""Small helpers on pytrees of arrays: names of leaves, sizes, norms."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def named_leaves(tree: Any, separator: str = "/") -> dict[str, Any]:
    """Leaves by path, e.g. ``{"layers/attention/q/w": ...}``, in tree order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path, separator): leaf for path, leaf in flat}


def path_name(path: tuple[Any, ...], separator: str = "/") -> str:
    return separator.join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``jax.tree.map`` whose function is handed the leaf's name first."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def size(tree: Any) -> int:
    """Number of elements in all leaves (arrays or shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Bytes in all leaves (arrays or shapes)."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
