"""Composition: find the mixture of adapters that solves a new task, from a handful of examples.

result = compose.search(base, hub, load_task("few_shot.jsonl"))
hub.add_mixture(result.mixture, "my-task", result.meta)
"""

from compose.candidates import Candidate
from compose.heldout import evaluate_held_out as evaluate
from compose.method import DEFAULT, Method
from compose.result import Result
from compose.search import BUDGET, compose, search

__all__ = ["BUDGET", "DEFAULT", "Candidate", "Method", "Result", "compose", "evaluate", "search"]
