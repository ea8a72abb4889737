# SPDX-License-Identifier: Apache-2.0
"""The error that a user can mend. Apart from ``types``, so that it can be had before JAX is loaded."""


class UserError(Exception):
    """Something the user can mend: one plain sentence saying what was given, what is allowed, what to do."""
