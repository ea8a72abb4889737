# SPDX-License-Identifier: Apache-2.0
"""Small helpers on pytrees of arrays: names and sizes of leaves, subtrees by path."""

import math
from collections.abc import Sequence
from typing import Any

import jax


def named_leaves(tree: Any, separator: str = "/") -> dict[str, Any]:
    """Leaves by path, e.g. ``{"layers/attention/q/w": ...}``, in tree order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path, separator): leaf for path, leaf in flat}


def path_name(path: tuple[Any, ...], separator: str = "/") -> str:
    return separator.join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def size(tree: Any) -> int:
    """Number of elements in all leaves (arrays or shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def at(tree: Any, path: Sequence[str]) -> Any:
    """The subtree of a nested dict under a path of keys."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Sequence[str], value: Any) -> Any:
    """A nested dict with another value under a path of keys; the given one stays as it is."""
    if not path:
        return value
    return {**tree, path[0]: put(tree[path[0]], path[1:], value)}
