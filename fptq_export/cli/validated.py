"""Options of a command line, checked by the model they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fptq_export.errors import Problem, UserErrors

__all__ = ["validated"]

OptionsT = TypeVar("OptionsT", bound=BaseModel)


def validated(model: type[OptionsT], values: Mapping[str, Any], verb: str) -> OptionsT:
    """Make the options of a verb.

    Args:
        model: Its fields are named as the options are, with underscores.
        values: What was given.
        verb: Whose `--help` lists what options take.

    Raises:
        UserErrors: Every option with a value it does not take.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [Problem(f"--{str(item['loc'][0]).replace('_', '-')}", _message(item)) for item in error.errors()]
        raise UserErrors("options", problems, f"see fptq-export {verb} --help") from None


def _message(item: Mapping[str, Any]) -> str:
    if item["type"] != "literal_error":
        return str(item["msg"])
    return f"choose from {item['ctx']['expected'].replace(chr(39), '').replace(' or ', ', ')}"
