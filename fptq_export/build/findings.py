"""What a look at an engine's layers found: who runs each linear or convolution, and what is wrong with that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fptq_export.errors import PrecisionError

if TYPE_CHECKING:
    from fptq_export.build.layer_list import EngineLayer

__all__ = ["Findings", "PrecisionProblem", "refuse_problems"]


@dataclass(frozen=True)
class PrecisionProblem:
    """One thing that an engine runs otherwise than its policy says."""

    paths: tuple[str, ...]
    """Linears or convolutions it is about; empty where it is about weights of nobody."""
    message: str
    """Names them too."""

    def __str__(self) -> str:
        """The message."""
        return self.message


@dataclass(frozen=True)
class Findings:
    """Who holds the codes of each path, and every problem."""

    holders: Mapping[str, Sequence[EngineLayer]]
    problems: Sequence[PrecisionProblem]


def refuse_problems(problems: Sequence[PrecisionProblem]) -> None:
    """Raise a PrecisionError that lists every problem; nothing where there is none."""
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise PrecisionError(f"the engine does not run what the policy says, so it is not published:{lines}")
