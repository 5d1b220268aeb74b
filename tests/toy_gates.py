"""Gates as a run of many iterations would find them: a test has no time to wait for that."""

from __future__ import annotations

from m3po.algorithms import M3PO


def open_gates(algorithm: M3PO, gain: float = 1.0) -> M3PO:
    """Say that plans are worth something, of each task, so that they are made and acted on from the next step on."""
    algorithm.gates.gain.fill_(gain)
    algorithm.behaviour.rotate()
    return algorithm
