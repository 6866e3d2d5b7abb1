"""How right a prediction is, and how sure a mean over rows is. No torch here.

A metric takes (prediction, reference) and returns a number from 0 to 1; it is registered under its name.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from hubkit.errors import UsageError

Metric = Callable[[str, str], float]
METRICS: dict[str, Metric] = {}

RESAMPLES = 2000
CHUNK = 1 << 22  # resampled indices held at a time


def metric(name: str) -> Callable[[Metric], Metric]:
    def register(function: Metric) -> Metric:
        METRICS[name] = function
        return function

    return register


def find_metric(name: str) -> Metric:
    """The metric registered as `name`; UsageError if there is none."""
    if name not in METRICS:
        raise UsageError(f"There is no metric {name!r}.", f"Use {', '.join(METRICS)}.")
    return METRICS[name]


@metric("exact_match")
def exact_match(prediction: str, reference: str) -> float:
    """Equality after the normalisation of the reference LoraHub: strip, lower, no full stops."""
    return float(_normalised(prediction) == _normalised(reference))


def _normalised(text: str) -> str:
    return text.strip().lower().replace(".", "")


@metric("choice")
def choice(prediction: str, reference: str) -> float:
    """Exact match of the choice that the model finds likeliest; `evaluate` ranks the choices for it."""
    return exact_match(prediction, reference)


@metric("rougeL")
def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure (Lin 2004), without stemming, by Google's `rouge-score`."""
    return _rouge_scorer().score(reference, prediction)["rougeL"].fmeasure


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # its import pulls in nltk

    return RougeScorer(["rougeL"], use_stemmer=False)


@metric("token_f1")
def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, as SQuAD (Rajpurkar et al. 2016) computes it."""
    ours, theirs = _words(prediction), _words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def majority_rate(references: Sequence[str], name: str = "exact_match") -> float:
    """The score of answering every row with the most frequent reference: what a model must beat to know
    anything."""
    constant = Counter(references).most_common(1)[0][0]
    score = find_metric(name)
    return float(np.mean([score(constant, reference) for reference in references]))


def bootstrap_interval(values: Sequence[float], *, seed: int = 42, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` over rows (Efron 1979).

    When all rows have one value it has no width: it says nothing about rows that were not drawn.
    """
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK // len(data))
    means = [
        data[generator.integers(len(data), size=(min(step, RESAMPLES - done), len(data)))].mean(axis=1)
        for done in range(0, RESAMPLES, step)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Mean of (ours - theirs) over the same rows, with its bootstrap interval."""

    mean: float
    interval: tuple[float, float]

    @property
    def supported(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval[0] > 0 or self.interval[1] < 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "supported": self.supported}


def paired_difference(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 42) -> Difference:
    """Compare two systems on the same rows. Much narrower than the difference of two separate intervals,
    since what makes a row hard is hard for both."""
    if len(ours) != len(theirs) or not ours:
        raise UsageError(f"{len(ours)} scores can't be paired with {len(theirs)}.", "Score the same rows twice.")
    gaps = np.subtract(ours, theirs)
    return Difference(float(gaps.mean()), bootstrap_interval(gaps.tolist(), seed=seed))
