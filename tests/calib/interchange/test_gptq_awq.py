"""GPTQ and AWQ checkpoints: codes and scales are read bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from calib.interchange import columns, convert
from calib.interchange.source import nibbles_from_int32
from calib.load import Checkpoint, model_from_checkpoint, read_tensor
from fptq_export.packing import int4_from_packed
from tests.calib.interchange.conftest import ReadBack, logits
from tests.support.quantized import QuantizedCheckpoint, write_quantized

Quantized = Callable[..., QuantizedCheckpoint]


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_codes_and_scales_keep_every_bit(
    quantized: Quantized, read_back: ReadBack, layout: str, group_size: int
) -> None:
    """Every level of every code, in the right channel; one scale a row becomes groups that share it."""
    checkpoint = quantized(layout, group_size)
    given = read_back(checkpoint.directory).given
    assert given is not None
    assert given.layers.keys() == checkpoint.codes.keys()
    for path, codes in checkpoint.codes.items():
        packed, scales = given.read(path)
        assert np.array_equal(int4_from_packed(packed), codes)
        repeats = scales.shape[1] // checkpoint.scales[path].shape[1]
        assert scales.tobytes() == np.repeat(checkpoint.scales[path], repeats, axis=1).tobytes()
        assert given.layers[path].activation is None


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_float_model_is_codes_times_scales(quantized: Quantized, read_back: ReadBack, layout: str) -> None:
    """What is traced and compared with holds exactly the weights that the policy quantizes to."""
    checkpoint = quantized(layout)
    model = model_from_checkpoint(read_back(checkpoint.directory), torch.float32)
    for path, codes in checkpoint.codes.items():
        scales = np.repeat(checkpoint.scales[path].astype(np.float64), 32, axis=1)
        assert np.array_equal(model.get_parameter(f"{path}.weight").detach().numpy(), codes * scales)
    assert np.isfinite(logits(model)).all()


def test_conv1d_gets_its_float_weight_as_it_stores_it(gpt2: Checkpoint, read_back: ReadBack, tmp_path: Path) -> None:
    """GPT-2 stores [in, out]: a square weight written as [out, in] would be another model without an error."""
    checkpoint = write_quantized(gpt2.directory, tmp_path / "gptq", "gptq")
    model = model_from_checkpoint(read_back(checkpoint.directory), torch.float32)
    assert len(checkpoint.codes) == 4
    for path, codes in checkpoint.codes.items():
        weight = codes * np.repeat(checkpoint.scales[path].astype(np.float64), 32, axis=1)
        assert np.array_equal(model.get_parameter(f"{path}.weight").detach().numpy(), weight.T)


def test_every_stored_tensor_is_read_once(
    quantized: Quantized, read_back: ReadBack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes, scales and the float weight come from one reading: unpacking is what a conversion spends its time on."""
    names: Counter[str] = Counter()

    def counted(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        names[name] += 1
        return read_tensor(checkpoint, name)

    for module in (columns, convert):
        monkeypatch.setattr(module, "read_tensor", counted)
    checkpoint = quantized("gptq")
    read_back(checkpoint.directory)
    assert set(names) == set(load_file(checkpoint.directory / "model.safetensors"))
    assert set(names.values()) == {1}


def test_symmetric_checkpoint_without_zero_points_is_read(quantized: Quantized, read_back: ReadBack) -> None:
    """`qzeros` say nothing where codes are symmetric; tools that leave them out are read."""
    checkpoint = quantized("gptq")

    def drop_zero_points(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("qzeros")]:
            del tensors[name]

    checkpoint.edit_tensors(drop_zero_points)
    assert read_back(checkpoint.directory).given is not None


def test_static_groups_in_activation_order_are_read(quantized: Quantized, read_back: ReadBack) -> None:
    """`desc_act` alone is no reason to refuse: with static groups g_idx is in order."""
    checkpoint = quantized("gptq")
    checkpoint.edit_config(desc_act=True, static_groups=True)
    assert read_back(checkpoint.directory).given is not None


@settings(max_examples=50)
@given_by(st.lists(st.integers(0, 15), min_size=8, max_size=64).filter(lambda values: len(values) % 8 == 0))
def test_nibbles_are_the_bits_of_the_word(values: list[int]) -> None:
    """Also in the sign bit of the word: nibble i is bits 4i to 4i + 3."""
    words = [sum(value << (4 * i) for i, value in enumerate(values[at : at + 8])) for at in range(0, len(values), 8)]
    packed = torch.from_numpy(np.array(words, np.uint32).view(np.int32))
    assert nibbles_from_int32(packed).tolist() == values
