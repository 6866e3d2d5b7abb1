"""Filling the plan table for a card: by measuring on it, or by a cost model alone. See docs/kernel-gpu.md.

`workloads.py` says for what, `candidates.py` which plans, `cost.py`, `cost_training.py` and `grids.py` what each should
take on which of `cards.py`, `measure.py` what it takes, `journal.py` keeps that, `session.py` spends the time,
`distil.py` makes rules of it.
"""
