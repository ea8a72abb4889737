# SPDX-License-Identifier: Apache-2.0
"""What several hosts agree on, as far as one process can tell; ``tests/launch/test_two_hosts.py`` has two."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from research.core.types import UserError
from research.train import hosts


def test_one_process_does_the_plain_thing(tmp_path):
    with pytest.raises(KeyError), hosts.together():
        raise KeyError("not changed")
    marker = object()
    assert hosts.from_first(lambda: marker) is marker and hosts.gathered("me") == ["me"]
    assert hosts.in_turn(lambda: marker, folder=tmp_path / "cache") is marker and not (tmp_path / "cache").exists()
    assert hosts.first() and not hosts.several() and int(hosts.largest(15)) == 15


def test_a_mesh_that_leaves_a_host_idle_is_refused(monkeypatch):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(process_index=index) for index in (0, 0, 2, 2)]))
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(UserError, match="The mesh of 4 devices leaves host 1 of 3 without one"):
        hosts.check(mesh)
    mesh.devices[1].process_index = 1
    hosts.check(mesh)
