"""Why a text is not begun, where a server must tell one reason from the other. Every other reason is a `UserError`."""

from __future__ import annotations

from fptq_export.errors import UserError

__all__ = ["PromptTooLongError", "QueueFullError", "ShuttingDownError"]


class PromptTooLongError(UserError):
    """The model takes no prompt of that length."""


class QueueFullError(UserError):
    """As many texts wait as may; one that is sent later will be taken."""


class ShuttingDownError(UserError):
    """No more texts are taken here."""
