# SPDX-License-Identifier: Apache-2.0
"""The errors that the command answers with a sentence. Apart from ``types``, so that they can be had before JAX is
loaded."""


class UserError(Exception):
    """Something the user can mend: one plain sentence saying what was given, what is allowed, what to do."""


class Passing(UserError):
    """Something that may pass by itself, such as a bucket that does not answer: the same run may be tried again."""


class Crashed(UserError):
    """A mistake of the code's, or of the machine's, told to all hosts alike."""


class Interrupted(BaseException):
    """A run that saved and left because it was asked to, by the signal ``signum``."""

    def __init__(self, name: str, *, step: int, signum: int) -> None:
        super().__init__(f"{name} was interrupted: it is saved at step {step}; the same command goes on from there.")
        self.signum = signum
