# SPDX-License-Identifier: Apache-2.0
"""The ``gcloud`` command: what it answers, and what kind of failure a failure is.

A wrong reading costs a run or leaks a machine: "not found" is said only where gcloud says NOT_FOUND, and a login that
ran out, a time-out or a lost network say nothing about what there is. gcloud adds "This command is authenticated as" to
every refusal, so that this word proves nothing.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.executor import Refused, Stop, Unreachable

QUIET = {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1", "CLOUDSDK_CORE_DISABLE_FILE_LOGGING": "1"}  # its log has all words
LOGIN = re.compile(
    r"problem (refreshing|reauthenticating)|Reauthentication|active account selected|gcloud auth login|UNAUTHENTICATED|"
    r"invalid_grant|rapt_required"
)
NETWORK = re.compile(
    r"Unable to find the server|Failed to resolve|Max retries exceeded|Connection (aborted|refused|reset)|"
    r"Name or service not known|network is unreachable|timed out",
    re.IGNORECASE,
)
DENIED = re.compile(r"PERMISSION_DENIED|SERVICE_DISABLED|Permission .* denied")
NO_ROOM = re.compile(r"RESOURCE_EXHAUSTED|Quota (limit )?'|no more capacity|Insufficient .*capacity", re.IGNORECASE)


class NotFound(Exception):
    """There is no such resource."""


class Exists(Exception):
    """There is one of that name already."""


@dataclass(frozen=True)
class Gcloud:
    """timeout: seconds that one command may take. project: None is gcloud's own setting. secrets: words that go into
    no message."""

    project: str | None = None
    timeout: float = 120.0
    secrets: tuple[str, ...] = ()

    def words(self, *words: str) -> list[str]:
        """The command's words, ready to be run or shown."""
        return ["gcloud", *words, *(["--project", self.project] if self.project else []), "--quiet"]

    def run(self, *words: str) -> str:
        """Its output. Raises NotFound, Exists, Refused, Unreachable, or Stop for words that it does not take."""
        command = self.words(*words)
        if shutil.which(command[0]) is None:
            raise Stop("The command gcloud is not here: install the Google Cloud CLI (cloud.google.com/sdk).")
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=self.timeout,
                env=os.environ | QUIET,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Unreachable(f"gcloud did not answer within {self.timeout:g} s") from None
        if done.returncode:
            told = done.stderr
            for secret in self.secrets:
                told = told.replace(secret, "ACCOUNT")
            raise failure(done.returncode, told)
        return done.stdout

    def json(self, *words: str) -> Any:
        """What it prints as JSON."""
        said = self.run(*words, "--format=json")
        try:
            return json.loads(said or "null")
        except ValueError:
            raise Unreachable(f"gcloud answered what is not JSON: {brief(said)}") from None


def failure(code: int, said: str) -> Exception:
    """The kind of failure behind an exit status and what was said on standard error."""
    told = brief(said)
    if NETWORK.search(said):  # a token cannot be refreshed without it either
        return Unreachable(told)
    if LOGIN.search(said):
        return Unreachable(told, mend="log in again with `gcloud auth login`")
    if re.search(r"\bNOT_FOUND\b", said):
        return NotFound(told)
    if re.search(r"\bALREADY_EXISTS\b", said):
        return Exists(told)
    if NO_ROOM.search(said):
        return Refused(told)
    if DENIED.search(said):
        return Unreachable(told, mend="give this account the role roles/tpu.admin and enable the TPU API")
    if re.search(r"\bINVALID_ARGUMENT\b", said):
        return Refused(told, lasting=True)
    if code == 2:  # its own word for words that it does not take
        return Stop(f"gcloud does not take this command ({told}): update it with `gcloud components update`.")
    return Unreachable(told)


def brief(said: str) -> str:
    """What gcloud says on one line, without the account that it names."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("WARNING")]
    text = re.sub(r"\.? ?This command is authenticated as .*", "", " ".join(lines)).removeprefix("ERROR: ")
    return text if len(text) <= 300 else f"{text[:297]}..."


def shown(words: Sequence[str]) -> str:
    """A command for people to read; a service account is not shown."""
    import shlex

    return shlex.join(re.sub(r"^(--service-account=).*", r"\1ACCOUNT", word) for word in words)
