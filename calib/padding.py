"""Rows of token ids that are shorter than others end with `PADDING`, which is no token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fptq_export.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["PADDING", "model_inputs", "real_tokens", "rows_of_tokens"]

PADDING = -1


def real_tokens(tokens: torch.Tensor) -> torch.Tensor | None:
    """Where there is a token, bool of the same shape; None where everywhere."""
    real = tokens != PADDING
    return None if bool(real.all()) else real


def model_inputs(tokens: torch.Tensor, config: PreTrainedConfig | None) -> dict[str, torch.Tensor]:
    """What a model is called with: ids with its padding token, and a mask where there is padding.

    Args:
        tokens: int64 [rows, seq].
        config: Names the padding token.
    """
    real = real_tokens(tokens)
    if real is None:
        return {"input_ids": tokens}
    return {
        "input_ids": tokens.masked_fill(~real, getattr(config, "pad_token_id", None) or 0),
        "attention_mask": real.to(torch.int64),
    }


def rows_of_tokens(path: str, x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The rows of an input [..., in] that belong to tokens; all of it where nothing is padded.

    Args:
        path: Of the linear that reads it, for errors.
        x: The input.
        real: Where there are tokens, bool [rows, seq]; None where everywhere.

    Raises:
        UserError: The input does not have a row for each token.
    """
    if real is None:
        return x
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) != real.numel():
        cause = f"reads {len(rows)} rows for {real.numel()} tokens, so nobody can say which of them are padding"
        raise UserError(f"layer {path}", cause, "calibrate on windows of one length: an .npz of token ids")
    return rows[real.reshape(-1).to(x.device)]
