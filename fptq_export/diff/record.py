"""What one system says of the text: logits of prefill and decode steps, and its own greedy tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.progress import Progress, Task
from fptq_export.verify.compare import PROMPT_TOKENS, LogitTotals
from fptq_export.verify.decode import checked_logits, forced, greedy
from fptq_export.verify.polygraphy_diff import diff_logits
from fptq_export.verify.sessions import CausalSession

__all__ = ["Comparison", "Course", "StoredLogits", "compared_with", "course_from_windows", "stored_logits"]


@dataclass(frozen=True)
class Course:
    """What every system is fed."""

    windows: NDArray[np.int64]
    """[n, S]: real text."""
    head: int
    """Tokens of a window in front of its decode steps, P; P + steps < S, so that every step has a next token."""
    steps: int

    @property
    def calls(self) -> int:
        """Units of progress: tokens that a system runs."""
        windows = len(self.windows)
        return int(self.windows.size) + (windows + 1) * self.steps

    def targets(self, window: NDArray[np.int64]) -> NDArray[np.int64]:
        """The token after each decode step of a window."""
        return window[self.head + 1 : self.head + 1 + self.steps]


@dataclass(frozen=True)
class StoredLogits:
    """Logits of the reference, on disk: so that its weights need not stay in memory beside a candidate's."""

    directory: Path
    tokens: tuple[int, ...]
    """Greedy tokens behind the head of the first window."""

    def prefill(self, index: int) -> NDArray[np.float32]:
        """[S, V] of a window."""
        return self._load(f"prefill-{index}")

    def decode(self, index: int) -> NDArray[np.float32]:
        """[steps, V] of a window."""
        return self._load(f"decode-{index}")

    def _load(self, name: str) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = np.load(self.directory / f"{name}.npy", allow_pickle=False)
        return logits


@dataclass(frozen=True)
class Comparison:
    """A candidate against the stored reference."""

    prefill: LogitTotals
    decode: LogitTotals
    prefill_psnr: float
    """Mean over windows, in decibel."""
    decode_psnr: float
    tokens: tuple[int, ...]
    """Greedy tokens of the candidate."""


def course_from_windows(windows: NDArray[np.int64], steps: int) -> Course:
    """Decode steps start behind at most `PROMPT_TOKENS` tokens of a window.

    Raises:
        UserError: The windows are too short for the steps.
    """
    head = min(PROMPT_TOKENS, windows.shape[1] - steps - 1)
    if head < 1:
        cause = f"{steps} steps and the tokens around them do not fit into windows of {windows.shape[1]} tokens"
        raise UserError("--decode-steps", cause, f"give at most {windows.shape[1] - 2}, or a larger --eval-seq")
    return Course(windows, head, steps)


def stored_logits(session: CausalSession, course: Course, directory: Path, progress: Progress) -> StoredLogits:
    """Run the reference and write its logits, float32: 4 x n x (S + steps) x V bytes."""
    with progress.task(f"{session.name}: reference", total=course.calls, unit="tokens") as task:
        for index, window in enumerate(course.windows):
            np.save(directory / f"prefill-{index}.npy", _prefill(session, window, f"window {index}"))
            task.advance(len(window))
            np.save(directory / f"decode-{index}.npy", _decode(session, window, course, task))
        tokens = _greedy(session, course, task)
    return StoredLogits(directory, tokens)


def compared_with(reference: StoredLogits, session: CausalSession, course: Course, progress: Progress) -> Comparison:
    """Run a candidate; the logits of one window, of both, are in memory.

    Raises:
        UserError: Logits are NaN or infinite, or the vocabularies differ.
    """
    prefill, decode = LogitTotals(), LogitTotals()
    psnr: list[tuple[float, float]] = []
    with progress.task(f"{session.name}: diff", total=course.calls, unit="tokens") as task:
        for index, window in enumerate(course.windows):
            rows = _prefill(session, window, f"window {index}")
            of_prefill = _add(prefill, reference.prefill(index), rows, window[1:])
            del rows
            task.advance(len(window))
            steps = _decode(session, window, course, task)
            psnr.append((of_prefill, _add(decode, reference.decode(index), steps, course.targets(window))))
        tokens = _greedy(session, course, task)
    means = np.mean(psnr, axis=0)
    return Comparison(prefill, decode, float(means[0]), float(means[1]), tokens)


def _add(
    totals: LogitTotals,
    reference: NDArray[np.float32],
    candidate: NDArray[np.float32],
    targets: NDArray[np.int64],
) -> float:
    """Add rows up; their PSNR. Polygraphy refuses other shapes before anything is added."""
    psnr = diff_logits(reference, candidate).psnr_db
    totals.add(reference, candidate, targets)
    return psnr


def _prefill(session: CausalSession, window: NDArray[np.int64], place: str) -> NDArray[np.float32]:
    """[S] -> logits [S, V]."""
    logits, _ = session.prefill(window[None])
    return checked_logits(session, place, logits, len(window))


def _decode(session: CausalSession, window: NDArray[np.int64], course: Course, task: Task) -> NDArray[np.float32]:
    """Logits [steps, V] of the tokens behind the head, fed one by one; the head's own are those of the prefill."""
    fed = window[course.head : course.head + course.steps].tolist()
    return forced(session, window[: course.head], fed, task)[1:]


def _greedy(session: CausalSession, course: Course, task: Task) -> tuple[int, ...]:
    tokens, _ = greedy(session, course.windows[0, : course.head], course.steps, task)
    return tuple(tokens)
