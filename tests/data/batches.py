# SPDX-License-Identifier: Apache-2.0
# What tests of packed sources say of their batches.

import numpy as np

NAMES = {"tokens", "targets", "weights", "segment_ids", "positions", "target_bytes"}


def as_numpy(batch) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in batch.items()}


def assert_same(first, second) -> None:
    assert set(first) == set(second) == NAMES
    for name in NAMES:
        np.testing.assert_array_equal(np.asarray(first[name]), np.asarray(second[name]), err_msg=name)
