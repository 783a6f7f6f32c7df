"""Where the weights of experts lie, one linear at a time, in either layout that checkpoints have.

transformers 5 stacks the experts of a layer. Files hold that stack, or a matrix for each expert and projection under
the names of the model's first release (`block_sparse_moe.experts.0.w1.weight`). transformers' own conversion mapping
says which matrix is which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)

from calib.tensor_files import TensorEntry
from fptq_export.errors import UserError
from fptq_export.experts.unstack import PROJECTIONS, stacked_rows
from fptq_export.stored_tensor import Rows

__all__ = ["entries_of_linears", "may_hold_experts"]

_MATRIX_RANK, _STACK_RANK = 2, 3
_HINT = "load the model in transformers and save it again with save_pretrained(..., save_original_format=False)"


def may_hold_experts(entries: Mapping[str, TensorEntry]) -> bool:
    """Whether it is worth while to build the model and look: a stack of matrices, or a list of experts."""
    return any(len(entry.shape) > _MATRIX_RANK or ".experts." in name for name, entry in entries.items())


def entries_of_linears(
    entries: Mapping[str, TensorEntry], model: Any, experts: Mapping[str, nn.Module]
) -> dict[str, TensorEntry]:
    """Name every tensor as the model with `UnstackedExperts` does.

    Args:
        entries: By the names of the files.
        model: As transformers builds it, on the meta device.
        experts: Torch path -> module of stacked experts.

    Raises:
        UserError: The weights of experts are stored in a way that this cannot take apart.
    """
    names = _Names.of_model(model, experts)
    result: dict[str, TensorEntry] = {}
    for key, entry in entries.items():
        result.update(names.linears(key, entry))
    return result


@dataclass(frozen=True)
class _Names:
    renamings: list[WeightRenaming]
    converters: list[WeightConverter]
    prefix: str
    tensors: dict[str, Any]
    """Name -> tensor, of the model with stacked experts."""
    stacked: Mapping[str, str]
    """Name of a stacked parameter -> path of the experts."""

    @classmethod
    def of_model(cls, model: Any, experts: Mapping[str, nn.Module]) -> _Names:
        mapping = get_model_conversion_mapping(model)
        return cls(
            [entry for entry in mapping if isinstance(entry, WeightRenaming)],
            [entry for entry in mapping if isinstance(entry, WeightConverter)],
            model.base_model_prefix,
            model.state_dict(),
            {f"{path}.{name}": path for path, module in experts.items() for name, _ in module.named_parameters()},
        )

    def linears(self, key: str, entry: TensorEntry) -> Iterator[tuple[str, TensorEntry]]:
        """What is stored under one name; a tensor that is no expert's is itself."""
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.tensors)
        path = self.stacked.get(name)
        if path is None:
            yield (key if pattern is not None else name), entry
            return
        if pattern is None:
            yield from self._of_stack(path, name, entry) if len(entry.shape) == _STACK_RANK else [(name, entry)]
            return  # of another shape than the config says, it is refused before any work
        sources, expert = self._sources(key, pattern)
        projections = PROJECTIONS[-1:] if name.endswith(".down_proj") else PROJECTIONS[:-1]
        if len(sources) == len(projections):
            yield f"{path}.{expert}.{projections[sources.index(pattern)]}.weight", entry
        else:  # gate and up in one matrix
            middle = entry.shape[0] // 2
            for projection, start in zip(projections, (0, middle), strict=True):
                part = replace(entry, shape=(middle, *entry.shape[1:]), rows=Rows(start, start + middle))
                yield f"{path}.{expert}.{projection}.weight", part

    def _of_stack(self, path: str, name: str, entry: TensorEntry) -> Iterator[tuple[str, TensorEntry]]:
        count, rows, columns = entry.shape
        down = name.endswith(".down_proj")
        intermediate, hidden = (columns, rows) if down else (rows // 2, columns)
        for expert in range(count):
            for projection in PROJECTIONS[-1:] if down else PROJECTIONS[:-1]:
                _, part = stacked_rows(projection, expert, intermediate, hidden)
                shape = (part.stop - part.start, columns)
                yield f"{path}.{expert}.{projection}.weight", replace(entry, shape=shape, rows=part)

    def _sources(self, key: str, pattern: str) -> tuple[list[str], int]:
        """Names that are merged into the stacked parameter, in order, and which expert a key is of."""
        converter = next(converter for converter in self.converters if pattern in converter.source_patterns)
        operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
        sources: list[str] = list(converter.source_patterns)
        plain = [(MergeModulelist, 0)] if len(sources) == 1 else [(MergeModulelist, 0), (Concatenate, 1)]
        numbered = re.escape(pattern).replace(r"\*", r"(\d+)")
        match = re.search(numbered, apply_renamings(key, self.renamings))
        if operations != plain or match is None or len(sources) > len(PROJECTIONS[:-1]):
            steps = ", ".join(kind.__name__ for kind, _ in operations)
            raise UserError(f"tensor {key!r}", f"cannot be taken apart: transformers converts it by {steps}", _HINT)
        return sources, int(match[1])
