"""One number from TensorRT's nested build phases."""

from __future__ import annotations

__all__ = ["PhaseProgress"]


class PhaseProgress:
    """Tracks phases as `IProgressMonitor` reports them, and says which fraction of the build is done.

    A phase has a number of equal steps; a phase inside it fills the step its parent is at. Phases side by side count
    as far as the furthest of them. TensorRT does not know how long a step takes, so the fraction orders time, it does
    not measure it.
    """

    def __init__(self) -> None:
        self._parent: dict[str, str | None] = {}
        self._steps: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._furthest = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins inside its parent; None is the build itself."""
        self._parent[phase] = parent
        self._steps[phase] = max(steps, 1)
        self._done[phase] = 0

    def complete_step(self, phase: str, step: int) -> None:
        """Step number `step` (from 0) of a phase is done."""
        if phase in self._done:
            self._done[phase] = step + 1

    def finish(self, phase: str) -> None:
        """A phase ends; the outermost one ends the build."""
        if self._parent.pop(phase, "unknown") is None:
            self._furthest = 1.0
        self._done.pop(phase, None)

    def fraction(self) -> float:
        """0 to 1; never falls, though a phase may be opened again."""
        self._furthest = max(self._furthest, self._inside(None))
        return self._furthest

    def _inside(self, phase: str | None) -> float:
        """Fraction of a phase, or of the whole build for None."""
        inner = max((self._inside(child) for child, parent in self._parent.items() if parent == phase), default=0.0)
        if phase is None:
            return inner
        return min(1.0, (self._done[phase] + inner) / self._steps[phase])
