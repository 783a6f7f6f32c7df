"""Which of several text models answers a request."""

from __future__ import annotations

import hashlib
import random
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fptq_export.errors import UserError

__all__ = ["ROUTE", "ROUTES_FILE", "ROUTE_HEADER", "Choice", "Route", "Routes"]

ROUTES_FILE: Final = "routes.json"
ROUTE: Final = "route"
"""Input that names the model that is wanted."""
ROUTE_HEADER: Final = "fptq-route"
"""The same as metadata of a gRPC call, which the server hands on as a parameter of the request where it is told to. Of
HTTP it hands on no headers to `generate` (Triton 24.10)."""
_HASH_BYTES = 8
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Route(_Model):
    """A text model in the same repository."""

    model: Name
    share: float = Field(gt=0.0, allow_inf_nan=False)
    """Its part of the requests, over the sum of all."""


class Choice(_Model):
    """The model that answers, and why."""

    model: str
    reason: Literal["asked", "share"]


class Routes(_Model):
    """`routes.json`: what a router does."""

    routes: tuple[Route, ...] = Field(min_length=1)
    shadow: Name | None = None
    """A model that gets every request too; its answer goes to the comparison log and to nobody else."""
    comparison_log: str | None = None
    """File that gets a line for each request."""
    log_texts: bool = False
    """Whether prompts and answers stand in that file."""

    @model_validator(mode="after")
    def _names_once(self) -> Routes:
        names = [route.model for route in self.routes]
        if len(set(names)) < len(names):
            raise ValueError("a model has two shares")
        if self.shadow is not None and self.comparison_log is None:
            raise ValueError("a shadow's answers are seen in a comparison log only, and none is named")
        return self

    def choose(self, request_id: str, asked: str | None) -> Choice:
        """The model for a request.

        Args:
            request_id: Requests of one id go one way, so that a retry meets the same model; without an id it is drawn.
            asked: A model that the client wants.

        Raises:
            UserError: There is no route to the wanted model.
        """
        if asked:
            if asked not in {route.model for route in self.routes}:
                names = ", ".join(route.model for route in self.routes)
                raise UserError("route", f"there is none to {asked!r}", f"take one of {names}, or leave it out")
            return Choice(model=asked, reason="asked")
        point = (_fraction(request_id) if request_id else random.random()) * sum(route.share for route in self.routes)
        for route in self.routes:
            if point < route.share:
                return Choice(model=route.model, reason="share")
            point -= route.share
        return Choice(model=self.routes[-1].model, reason="share")  # rounding left a crumb


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on a text alone, evenly spread."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()[:_HASH_BYTES]
    return int.from_bytes(digest, "big") / float(256**_HASH_BYTES)
