# SPDX-License-Identifier: Apache-2.0
"""A library that cannot be loaded. Only worker processes import this."""

import os

if "JAX_PLATFORMS" not in os.environ:
    os._exit(3)
