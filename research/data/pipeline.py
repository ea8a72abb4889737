# SPDX-License-Identifier: Apache-2.0
"""From a corpus to global batches: an experiment names a ``TextSource`` and draws from its ``TextStream``.

A batch is a function of (corpus, tokenizer, seed, step). Grain's random-access data sets turn a global row
number into (corpus, epoch, row): shuffled anew every epoch, mixed by weight. Each host builds only the rows
that its devices hold, so the global batch is the same for any number of hosts.
"""

import abc
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import numpy as np

from research.core.sharding import batch_sharding, batch_splits, check_mesh
from research.core.types import Batch, Context, UserError
from research.data import packing
from research.data.cache import name_of
from research.data.packing import Rows, Tokens, empty_rows, tokenised
from research.data.sources import Corpus, parts
from research.data.sources.base import check_split
from research.data.tokenizer_base import Tokenizer, TokenizerSpec
from research.data.tokenizers import train_tokenizer

FORMAT = 1
# The seed of streams that are not shuffled: their documents come in one fixed, mixed order for every run.
FIXED_ORDER = 0x5EED


class DataError(UserError):
    """A source that cannot be started, or a state that belongs to other data."""


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a run was trained on: recorded with its results. Bytes are UTF-8 bytes of text."""

    corpus: str
    corpus_hash: str
    corpus_bytes: int
    documents: int
    train_bytes: int
    train_documents: int
    train_tokens: int
    validation_bytes: int
    validation_documents: int
    validation_tokens: int
    tokenizer: str
    vocab_size: int


class RowIndex(Protocol):
    """Rows that are a pure index (``packing.Rows``): what a part of a corpus is packed into."""

    def __len__(self) -> int:
        """Rows of one epoch."""
        ...

    def fill(self, out: dict[str, np.ndarray], at: int, *, epoch: int, index: int) -> None:
        """Writes row ``index`` of an epoch into row ``at`` of arrays (as ``packing.empty_rows`` makes)."""
        ...


class PackedSource(abc.ABC):
    """What sources of packed rows have in common; each is a frozen dataclass of these fields.

    batch_size: rows of the global batch. sequence_length: inputs, hence targets, of a row.
    shuffle: an endless stream, shuffled by the run's seed and anew every epoch. Without it the stream is one
        pass in an order that is the same for every run, padded with rows of weight 0 at the end.
    num_batches: without shuffle: how many batches, of rows evenly spaced over the split; 0 for all.
    """

    corpus: Any
    tokenizer: TokenizerSpec
    batch_size: int
    sequence_length: int
    split: str
    shuffle: bool
    num_batches: int

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.batch_size < 1 or self.sequence_length < 1:
            raise DataError(
                f"batch_size and sequence_length must be at least 1; given {self.batch_size} and "
                f"{self.sequence_length}."
            )
        if self.num_batches < 0 or (self.num_batches and self.shuffle):
            raise DataError(
                f"num_batches={self.num_batches} is for streams in order: give 0 or more, with shuffle=False."
            )

    def validation(self, *, num_batches: int = 0, batch_size: int | None = None) -> Self:
        """The same corpus's validation split, in order and without repetition."""
        same: Any = self
        return dataclasses.replace(
            same,
            split="validation",
            shuffle=False,
            num_batches=num_batches,
            batch_size=batch_size or self.batch_size,
        )

    def tokenizer_for(self, cache_dir: Path) -> Tokenizer:
        """The trained tokenizer; trains and caches it where it is not there yet."""
        return train_tokenizer(self.tokenizer, self.corpus, cache_dir=Path(cache_dir))

    def vocab_size(self, cache_dir: Path) -> int:
        """Ids the tokenizer has; found without training it where the spec says it."""
        return self.tokenizer.size or self.tokenizer_for(cache_dir).vocab_size

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Those of ``TextStream``'s batches."""
        shape = self.batch_size, self.sequence_length
        ids, amounts = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.float32))
        names = "tokens", "targets", "segment_ids", "positions"
        return dict.fromkeys(names, ids) | dict.fromkeys(("weights", "target_bytes"), amounts)

    def prepare(self, cache_dir: Path) -> DataInfo:
        """Fills the cache with all that a run needs (tokenizer, both splits) and says what it is."""
        return self._load(Path(cache_dir))[2]

    def start(self, context: Context) -> "TextStream":
        check_mesh(context.mesh.shape, batch_splits(self.batch_size, self.sequence_length))
        tokenizer, held, info = self._load(Path(context.cache_dir))
        seed = context.seed if self.shuffle else FIXED_ORDER
        rows = [
            self._rows(part, seed=_seed(seed, number), pad_id=tokenizer.pad_id)
            for number, part in enumerate(held[self.split])
        ]
        data = {"corpus": info.corpus_hash, "tokenizer": tokenizer.fingerprint, **self._packing(), "seed": seed}
        return TextStream(self, context, tokenizer=tokenizer, rows=rows, info=info, data=data)

    def _load(self, cache_dir: Path) -> tuple[Tokenizer, dict[str, list[Any]], DataInfo]:
        """The tokenizer, what each split holds for each of the corpora, and what they are."""
        tokenizer = self.tokenizer_for(cache_dir)
        held = {
            split: [
                self._held(part, tokenizer=tokenizer, split=split, cache_dir=cache_dir)
                for part, _ in parts(self.corpus)
            ]
            for split in ("train", "validation")
        }
        train, validation = (
            [sum(getattr(t, name) for t in found) for name in ("num_bytes", "num_documents", "num_tokens")]
            for found in held.values()
        )
        info = DataInfo(
            corpus=type(self.corpus).__name__,
            corpus_hash=self.corpus.fingerprint(cache_dir),
            corpus_bytes=train[0] + validation[0],
            documents=train[1] + validation[1],
            train_bytes=train[0],
            train_documents=train[1],
            train_tokens=train[2],
            validation_bytes=validation[0],
            validation_documents=validation[1],
            validation_tokens=validation[2],
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
        )
        return tokenizer, held, info

    @abc.abstractmethod
    def _held(self, part: Any, *, tokenizer: Tokenizer, split: str, cache_dir: Path) -> Any:
        """A split of one corpus as tokens: with num_bytes, num_documents and num_tokens."""

    @abc.abstractmethod
    def _rows(self, held: Any, *, seed: int, pad_id: int) -> RowIndex: ...

    @abc.abstractmethod
    def _packing(self) -> dict[str, str]:
        """What of the settings decides which row is which, for a stream's state."""


@dataclasses.dataclass(frozen=True)
class TextSource(PackedSource):
    """Packed rows of a corpus, as batches for next-token prediction; the settings are those of ``PackedSource``."""

    corpus: Corpus
    tokenizer: TokenizerSpec
    batch_size: int
    sequence_length: int
    split: str = "train"
    shuffle: bool = True
    num_batches: int = 0

    def _held(self, part: Corpus, *, tokenizer: Tokenizer, split: str, cache_dir: Path) -> Tokens:
        return tokenised(part, tokenizer=tokenizer, split=split, cache_dir=cache_dir)

    def _rows(self, held: Tokens, *, seed: int, pad_id: int) -> Rows:
        return Rows(held, sequence_length=self.sequence_length, seed=seed, pad_id=pad_id)

    def _packing(self) -> dict[str, str]:
        settings = self.sequence_length, self.split, self.shuffle, self.num_batches
        return {"packing": name_of(FORMAT, packing.FORMAT, *settings)}


class TextStream:
    """Batches of a ``PackedSource`` (see ``research.core.types.Stream``).

    A batch holds [batch_size, sequence_length] arrays: ``tokens``, ``targets``, ``segment_ids`` (from 1 in
    each row; 0 is padding), ``positions`` (from 0 in each piece of a document), int32; and float32
    ``weights`` (1 where the target counts) and ``target_bytes`` (the target's UTF-8 bytes, if it counts).

    rows: those of each corpus of a mixture. data: what the data are, by name, for the stream's state.
    num_batches: batches of a stream in order; None where the stream is endless.
    """

    def __init__(
        self,
        source: PackedSource,
        context: Context,
        *,
        tokenizer: Tokenizer,
        rows: Sequence[RowIndex],
        info: DataInfo,
        data: Mapping[str, Any],
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self._sharding = batch_sharding(context.mesh)
        self._token_bytes = tokenizer.token_bytes.astype(np.float32)
        self._weights = [weight for _, weight in parts(source.corpus)]
        self._rows, self._data, self._seed = rows, dict(data), data["seed"]
        self.num_batches: int | None = None
        if not source.shuffle:
            wanted = source.num_batches * source.batch_size
            self._num_rows = min(wanted or len(self._index), len(self._index))
            self.num_batches = -(-self._num_rows // source.batch_size)
        # The state that this stream continues from: `row` rows had been drawn before `step`.
        self._origin = (0, 0)
        self._step = 0
        self.info = dataclasses.asdict(info)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        weakref.finalize(self, self._worker.shutdown, wait=False, cancel_futures=True)
        self._pending: tuple[int, Future] | None = None
        self._closed = False
        self._worker.submit(getattr, self, "_index")  # meanwhile the run's program is compiled

    def next(self, policy: Any, step: int) -> Batch:
        """The global batch of ``step``; the policy is not looked at. The next step's is built meanwhile."""
        row = self._row(step)
        pending, self._pending = self._pending, None
        host = pending[1].result() if pending and pending[0] == row else self._host_batch(row)
        self._step = step + 1
        following = self._row(self._step)
        if not self._closed:
            self._pending = (following, self._worker.submit(self._host_batch, following))

        def shard(name: str, whole: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.make_array_from_callback(
                whole.shape, self._sharding, lambda index: host[self._span(index)][name][:, index[1]]
            )

        return {name: shard(name, whole) for name, whole in self.source.batch_shapes().items()}

    def report(self) -> dict[str, Any]:
        return {}

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """The stream's batches from step 0: all of a stream in order, or the first ``limit``."""
        counts = [n for n in (limit, self.num_batches) if n is not None]
        if not counts:
            raise DataError("A shuffled stream is endless: say how many batches are wanted.")
        for step in range(min(counts)):
            yield self.next(None, step)

    def assemble(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows ``start`` to ``stop`` of the stream, on the host: a pure function of the two."""
        length = self.source.sequence_length
        out = empty_rows(stop - start, sequence_length=length, pad_id=self.tokenizer.pad_id)
        for at, row in enumerate(range(start, stop)):
            if self.source.shuffle:
                part, epoch, index = self._index[row]
            elif row < self._num_rows:
                # Evenly spaced, so that a few batches stand for the whole split.
                part, epoch, index = self._index[row * len(self._index) // self._num_rows]
            else:
                continue
            self._rows[part].fill(out, at, epoch=epoch, index=index)
        out["target_bytes"] = self._token_bytes[out["targets"]] * out["weights"]
        return out

    def get_state(self) -> dict[str, Any]:
        """The next step, the rows drawn before it, and what the data are."""
        return {"step": self._step, "row": self._row(self._step), "data": dict(self._data)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the state's rows. Raises DataError naming what is not as it was."""
        try:
            data, step, row = state["data"], int(state["step"]), int(state["row"])
            old = {name: data[name] for name in self._data}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"This is not the state of a text stream ({error!r}): resume from a checkpoint that this "
                "experiment wrote."
            ) from error
        changed = [f"the {name} (was {old[name]}, is {now})" for name, now in self._data.items() if old[name] != now]
        if changed:
            raise DataError(
                f"The data are not those of the checkpoint; changed: {', '.join(changed)}. Restore them, or "
                "start a new run."
            )
        self._origin, self._step, self._pending = (step, row), step, None

    def close(self) -> None:
        """Ends the background thread; the stream still answers, without working ahead."""
        self._closed, self._pending = True, None
        self._worker.shutdown(wait=True, cancel_futures=True)

    @functools.cached_property
    def _index(self) -> Any:
        """Made when first asked for: Grain takes a fifth of a second to import."""
        return _row_index(self._rows, self._weights, shuffle=self.source.shuffle, seed=self._seed)

    def _row(self, step: int) -> int:
        origin_step, origin_row = self._origin
        row = origin_row + (step - origin_step) * self.source.batch_size
        if row < 0:
            raise DataError(f"Step {step} lies before the stream's beginning.")
        return row

    def _host_batch(self, row: int) -> dict[tuple[int, int], dict[str, np.ndarray]]:
        """The rows that this host's devices hold, by span within the batch."""
        shape = self.source.batch_size, self.source.sequence_length
        spans = {self._span(index) for index in self._sharding.addressable_devices_indices_map(shape).values()}
        return {(start, stop): self.assemble(row + start, row + stop) for start, stop in sorted(spans)}

    def _span(self, index: tuple[slice, ...]) -> tuple[int, int]:
        start, stop, _ = index[0].indices(self.source.batch_size)
        return start, stop


def _seed(seed: int, number: int) -> int:
    """A 32-bit seed; hashed, because Grain adds the epoch to it and neighbours must not share epochs."""
    return int(name_of("shuffle", seed, number), 16) % 2**32


def _row_index(rows: Sequence[RowIndex], weights: Sequence[float], *, shuffle: bool, seed: int) -> Any:
    """A Grain data set from global row numbers to (corpus, epoch, row)."""
    import grain

    def one(number: int, count: int) -> Any:
        indices = grain.MapDataset.range(count)
        if shuffle:
            indices = indices.shuffle(seed=_seed(seed, number)).repeat()
        return indices.map_with_index(lambda i, index: (number, i // count, int(index)))

    parts = [one(number, len(part)) for number, part in enumerate(rows)]
    if len(parts) == 1:
        return parts[0]
    # Grain scales weights so that the smallest is 100 and cuts off fractions; rounded here, they stay true.
    scaled = [float(round(100 * weight / min(weights))) for weight in weights]
    return grain.MapDataset.mix(parts, weights=scaled)
