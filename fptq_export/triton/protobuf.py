"""Triton's own messages, from `tritonclient`; and their text form."""

from __future__ import annotations

from typing import Any

from fptq_export.errors import UserError

__all__ = ["config_from_text", "data_type", "model_config_module", "text_from_config"]


def model_config_module() -> Any:
    """`tritonclient.grpc.model_config_pb2`.

    Raises:
        UserError: tritonclient is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        hint = "pip install 'fptq-export[triton]'"
        raise UserError("tritonclient", f"cannot be imported ({error})", hint) from None
    return model_config_pb2


def data_type(name: str) -> int:
    """`FP16` -> the number of TYPE_FP16."""
    return int(model_config_module().DataType.Value(f"TYPE_{name}"))


def text_from_config(config: Any) -> str:
    """The text of `config.pbtxt`."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def config_from_text(text: str, where: str) -> Any:
    """Read a `config.pbtxt`.

    Raises:
        UserError: It is no model config.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, model_config_module().ModelConfig())
    except text_format.ParseError as error:
        raise UserError(where, f"is no model config ({error})", "remove the model, and write it again") from None
