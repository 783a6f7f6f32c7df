"""What `fptq-export triton --router` is asked to do."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from fptq_export.triton.serving.routing import Route, Routes

__all__ = ["RouterOptions"]


class RouterOptions(BaseModel):
    """Options, checked. Field names are the option names of the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repository: Path
    router: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the model."""
    route: tuple[str, ...] = Field(min_length=1)
    """`MODEL=SHARE`, each a text model of the repository."""
    shadow: str | None = None
    """A text model that gets every request too, for the comparison log alone."""
    comparison_log: Path | None = None
    log_texts: bool = False
    version: PositiveInt | None = None
    keep_versions: PositiveInt = 1
    max_active: PositiveInt = 64
    """Requests that are on their way at once."""
    max_queue: PositiveInt = 256
    """Requests that may wait behind them; more are refused."""

    @model_validator(mode="after")
    def _routes_are_possible(self) -> RouterOptions:
        self.routes()
        return self

    def routes(self) -> Routes:
        """What the model reads.

        Raises:
            ValueError: A route is not of the form `MODEL=SHARE`, or they do not go together.
        """
        parts = [text.partition("=") for text in self.route]
        wrong = [name for name, equals, share in parts if not equals or not _is_number(share)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not of the form MODEL=SHARE, as in smollm2-w4a8=90")
        log = None if self.comparison_log is None else str(self.comparison_log.absolute())
        return Routes(
            routes=tuple(Route(model=name, share=float(share)) for name, _, share in parts),
            shadow=self.shadow,
            comparison_log=log,
            log_texts=self.log_texts,
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
