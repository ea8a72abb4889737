# SPDX-License-Identifier: Apache-2.0
# What tests of packed sources say of their batches.

import json

import numpy as np

NAMES = {"tokens", "targets", "weights", "segment_ids", "positions", "target_bytes"}


def as_numpy(batch) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in batch.items()}


def assert_same(first, second) -> None:
    assert set(first) == set(second) == NAMES
    for name in NAMES:
        np.testing.assert_array_equal(np.asarray(first[name]), np.asarray(second[name]), err_msg=name)


def assert_resumes(source, context, k: int) -> None:
    """A stream that continues from another's state at step k gives what that one gives."""
    stream, ahead = source.start(context), []
    for step in range(k + 3):
        if step == k:
            state = json.loads(json.dumps(stream.get_state()))
        ahead.append(as_numpy(stream.next(None, step)))
    resumed = source.start(context)
    resumed.set_state(state)
    assert resumed.get_state() == state and len(json.dumps(state)) < 500
    for step in range(k, k + 3):
        assert_same(resumed.next(None, step), ahead[step])
    assert resumed.get_state() == stream.get_state()
