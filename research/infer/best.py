# SPDX-License-Identifier: Apache-2.0
"""The best of several samples: by mean log-probability, or by a scorer."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from research.infer.engine import Result

Scorer = Callable[[Result], float]


def mean_log_prob(result: Result) -> float:
    """Nats per token under the distribution drawn from; a sequence of none counts as certain."""
    return float(np.mean(result.log_probs)) if result.log_probs else 0.0


def best_of(results: Iterable[Result], score: Scorer = mean_log_prob) -> dict[int, Result]:
    """The best sample of each request, of which an engine has made several (``Request.samples``); of equals the
    first."""
    by_request: dict[int, list[Result]] = defaultdict(list)
    for result in results:
        by_request[result.request].append(result)
    return {
        number: max(sorted(samples, key=lambda one: one.sample), key=score) for number, samples in by_request.items()
    }
