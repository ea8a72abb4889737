# SPDX-License-Identifier: Apache-2.0
"""What a table between Hugging Face tensors and ours is made of. One table of a family drives both directions.

A line says how one of their tensors lies and which of ours are in it:

    Line("self_attn.q_proj.weight", Part("attention/q/w", "(N H) D -> D N H"))
    Line("self_attn.kv_b_proj.weight", Part("attention/k_up/w", "X N R -> R N X", size="P"),
         Part("attention/v_up/w", "X N R -> R N X", size="U"), front="(N X) R -> X N R")

Patterns are those of einops, read from left to right for an import and from right to left for an export. Letters are
sizes of the layer (``sizes``). A line of several parts is brought to a form whose first axis they share (``front``) and
split there. A line whose own tensors the model does not have (biases, norms of heads) is left out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from research.models.decoder import Decoder
from research.models.latent_attention import LatentAttention
from research.models.moe import Moe
from research.models.stack import Kind, by_block

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Part:
    """One of our arrays in one of their tensors. path: below the layer, or below the model. size: letters or a number:
    how much of the shared axis it takes, where there are several. turned: letter of how many of our last entries are
    rotary dimensions that stand in pairs in theirs (ours are in halves). buffer: it is no parameter."""

    path: str
    pattern: str
    size: str = ""
    turned: str = ""
    buffer: bool = False


@dataclass(frozen=True)
class Line:
    """One of their tensors. name: may hold {expert}, which numbers our first axis; front: see above."""

    name: str
    parts: tuple[Part, ...]
    front: str = ""


def line(name: str, *parts: Part, front: str = "") -> Line:
    return Line(name, parts, front)


def weight(name: str, path: str, pattern: str, **how: object) -> Line:
    """A line of one part."""
    return Line(name, (Part(path, pattern, **how),))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Table:
    """A family's tensors. layer: how the name of layer number {layer} begins; ahead: the same for layers that predict
    further tokens, numbered after the others. unneeded: names, or ends of names, that old files have and nobody reads.
    prefix: how all names but the head's begin, which some files leave out."""

    top: tuple[Line, ...]
    layers: tuple[Line, ...]
    layer: str = "model.layers.{layer}."
    prefix: str = "model."
    ahead: tuple[Line, ...] = ()
    unneeded: tuple[str, ...] = ("rotary_emb.inv_freq",)


class Place(NamedTuple):
    """Where one of their tensors goes: our path from the root, and the number of the layer (and of the expert) in our
    array, by which it is indexed."""

    part: Part
    path: str
    index: tuple[int, ...]


class Tensor(NamedTuple):
    """One of their tensors in a given model: its name, its line, where its parts go, and the sizes of letters."""

    name: str
    line: Line
    places: tuple[Place, ...]
    sizes: Sizes


def tensors(table: Table, model: Decoder, has: Callable[[str], bool]) -> Iterator[Tensor]:
    """All that a model of the family has in their files. has: whether a path is one of our arrays."""
    yield from _lines(table.top, "", "", (), sizes_of(model, model.period[-1]), has)
    for stack, part in model.stacks.items():
        for number, (path, kind) in enumerate(by_block(part.kinds).items()):
            root, sizes = "/".join((stack, *path)) + "/", sizes_of(model, kind)
            for repeat in range(part.repeats):
                begin = table.layer.format(layer=part.start + repeat * len(part.kinds) + number)
                yield from _lines(table.layers, begin, root, (repeat,), sizes, has)
    for step in range(model.ahead if table.ahead else 0):
        begin, kind = table.layer.format(layer=model.num_layers + step), model.period[-1]
        yield from _lines(table.ahead, begin, "ahead/", (step,), sizes_of(model, kind), has)
        yield from _lines(table.layers, begin, "ahead/block/", (step,), sizes_of(model, kind), has)


def _lines(
    lines: Sequence[Line], begin: str, root: str, index: tuple[int, ...], sizes: Sizes, has: Callable[[str], bool]
) -> Iterator[Tensor]:
    for one in lines:
        parts = [part for part in one.parts if has(root + part.path)]
        if not parts:
            continue
        for expert in range(sizes["E"] if "{expert}" in one.name else 1):
            where = (*index, expert) if "{expert}" in one.name else index
            places = tuple(Place(part, root + part.path, where) for part in parts)
            yield Tensor(begin + one.name.format(expert=expert), one, places, sizes)


def sizes_of(model: Decoder, kind: Kind) -> dict[str, int]:
    """D model, V vocabulary, N heads, K kv heads, H head, F feed-forward, E experts, S shared experts' inner width, T
    positions; of latent attention R and Q ranks, P head without and Z with positions, U value, X whatever is left."""
    attention, mlp = kind
    found = dict(D=model.d_model, V=model.vocab_size, N=attention.num_heads, F=mlp.d_ff)
    if isinstance(attention, LatentAttention):
        found |= dict(R=attention.kv_rank, Q=attention.q_rank, P=attention.nope_dim, Z=attention.rope_dim)
        found |= dict(U=attention.v_dim, H=attention.width(model.d_model))
    else:
        found |= dict(K=attention.kv_heads, H=attention.width(model.d_model))
    if isinstance(mlp, Moe):
        found |= dict(E=mlp.num_experts, S=mlp.shared_d_ff)
    return found


def ours(tensor: Tensor, theirs: np.ndarray) -> Iterator[tuple[Place, np.ndarray]]:
    """What one of their tensors gives of ours."""
    for place, piece in zip(tensor.places, _split(tensor, theirs), strict=True):
        yield place, _turned(_rearranged(piece, place.part.pattern, tensor.sizes), place.part, tensor.sizes, back=False)


def theirs(tensor: Tensor, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One of their tensors from ours, one for each place."""
    pieces = []
    for place, array in zip(tensor.places, arrays, strict=True):
        array = _turned(array, place.part, tensor.sizes, back=True)
        pieces.append(_rearranged(array, _reversed(place.part.pattern), tensor.sizes))
    whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0)
    return _rearranged(whole, _reversed(tensor.line.front), tensor.sizes) if tensor.line.front else whole


def shape(tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that their tensor must have, from those of ours without the axes of layers and experts."""
    arrays = [np.broadcast_to(np.zeros((), np.int8), shapes[place.path][len(place.index) :]) for place in tensor.places]
    return theirs(tensor, arrays).shape


def _split(tensor: Tensor, whole: np.ndarray) -> list[np.ndarray]:
    if tensor.line.front:
        whole = _rearranged(whole, tensor.line.front, tensor.sizes)
    if len(tensor.places) == 1:
        return [whole]
    ends = np.cumsum([_number(place.part.size, tensor.sizes) for place in tensor.places])
    return np.split(whole, ends[:-1], axis=0)


def _number(text: str, sizes: Sizes) -> int:
    """A product of letters and numbers, such as "N H" or "1"."""
    return int(np.prod([int(word) if word.isdigit() else sizes[word] for word in text.split()]))


def _reversed(pattern: str) -> str:
    left, right = pattern.split("->")
    return f"{right} -> {left}"


def _rearranged(array: np.ndarray, pattern: str, sizes: Sizes) -> np.ndarray:
    import einops

    left = pattern.split("->")[0]
    known = {name: size for name, size in sizes.items() if name in left.replace("(", " ").replace(")", " ").split()}
    return einops.rearrange(array, pattern, **known)


def _turned(array: np.ndarray, part: Part, sizes: Sizes, *, back: bool) -> np.ndarray:
    """Rotary dimensions from pairs to halves, or back: RoPE turns (2i, 2i + 1) in the one layout, (i, i + R/2) in the
    other."""
    if not part.turned:
        return array
    count = sizes[part.turned]
    rest, last = array[..., :-count], array[..., -count:]
    shape, axes = ((2, count // 2), (-1, -2)) if back else ((count // 2, 2), (-1, -2))
    last = np.swapaxes(last.reshape(*last.shape[:-1], *shape), *axes).reshape(last.shape)
    return np.concatenate([rest, last], axis=-1)
