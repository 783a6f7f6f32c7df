"""Quantized checkpoints of tiny models, written from the documented layouts without any code of `calib.interchange`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

__all__ = ["AWQ_ORDER", "QuantizedCheckpoint", "random_codes", "write_quantized"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each nibble of an AWQ word holds, from the lowest bits."""

_LINEAR_WEIGHT = re.compile(r"\.(layers|h)\..*(_proj|c_attn|c_fc)\.weight$")
Tensors = dict[str, NDArray[Any]]
Codes = NDArray[np.int8]
Scales = NDArray[np.float16]


class QuantizedCheckpoint:
    """What a checkpoint was written from.

    Attributes:
        directory: Where it lies.
        codes: Linear path -> int8 [out, in].
        scales: Linear path -> float16 [out, groups].
    """

    def __init__(self, directory: Path, codes: Mapping[str, Codes], scales: Mapping[str, Scales]) -> None:
        self.directory = directory
        self.codes = codes
        self.scales = scales

    def edit_config(self, **changes: Any) -> None:
        """Change entries of `quantization_config`."""
        file = self.directory / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"].update(changes)
        file.write_text(json.dumps(config))

    def edit_tensors(self, change: Callable[[Tensors], None]) -> None:
        """Change tensors in place."""
        file = self.directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file, {"format": "pt"})


def write_quantized(source: Path, directory: Path, layout: str, group_size: int = 32) -> QuantizedCheckpoint:
    """Replace every weight of a decoder layer by random codes and scales; of a GPT-2, which stores [in, out], too.

    Args:
        source: Float checkpoint.
        directory: Where the quantized one goes.
        layout: `gptq`, `gptq_v2` or `awq`.
        group_size: Input channels that share a scale; -1 for all.
    """
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    random = np.random.default_rng(7)
    codes, scales = {}, {}
    for name in [name for name in tensors if _LINEAR_WEIGHT.search(name)]:
        path = name.removesuffix(".weight")
        stored = tensors.pop(name).shape
        out_features, in_features = reversed(stored) if ".h." in name else stored
        groups = 1 if group_size == -1 else in_features // group_size
        codes[path] = random_codes(random, out_features, in_features)
        scales[path] = random.uniform(0.01, 0.1, (out_features, groups)).astype(np.float16)
        size = in_features // groups
        parts = awq_parts(codes[path]) if layout == "awq" else gptq_parts(codes[path], size)
        zeros = {"gptq": 7, "gptq_v2": 8, "awq": 8}[layout]
        parts["qzeros"] = words_from_nibbles(np.full((groups, out_features), zeros), range(8))
        parts["scales"] = scales[path].T
        tensors.update({f"{path}.{part}": array for part, array in parts.items()})
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = _config(layout, group_size)
    (directory / "config.json").write_text(json.dumps(config))
    return QuantizedCheckpoint(directory, codes, scales)


def random_codes(random: np.random.Generator, out_features: int, in_features: int) -> Codes:
    """Codes that use all sixteen levels."""
    codes: Codes = random.integers(-8, 8, (out_features, in_features)).astype(np.int8)
    codes[0, :16] = np.arange(-8, 8)
    return codes


def gptq_parts(codes: Codes, group_size: int) -> Tensors:
    """`qweight` int32 [in/8, out] and `g_idx`."""
    columns = words_from_nibbles(codes.astype(np.int64) + 8, range(8))
    return {
        "qweight": columns.T,
        "g_idx": (np.arange(codes.shape[1]) // group_size).astype(np.int32),
    }


def awq_parts(codes: Codes) -> Tensors:
    """`qweight` int32 [in, out/8]."""
    return {"qweight": words_from_nibbles(codes.T.astype(np.int64) + 8, AWQ_ORDER)}


def words_from_nibbles(values: NDArray[Any], order: Any) -> NDArray[np.int32]:
    """[rows, 8n] in [0, 15] -> int32 [rows, n], one word at a time; nibble i holds value `order[i]` of its eight."""
    rows, columns = values.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for row in range(rows):
        for word in range(columns // 8):
            for nibble, column in enumerate(order):
                words[row, word] |= np.uint32(int(values[row, 8 * word + column]) << (4 * nibble))
    return words.view(np.int32)


def _config(layout: str, group_size: int) -> dict[str, Any]:
    if layout == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "damp_percent": 0.01,
        "checkpoint_format": layout,
    }
