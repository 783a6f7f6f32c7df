"""The file of Hessians is a safetensors file, complete or absent, and says what it does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from calib.hessians import Hessians, hessian_writer, owners_from_sites
from fptq_export.errors import UserError
from fptq_export.sites import Sites

SIZES = {"a": 3, "layer.b": 1, "ü": 2}


def matrix(size: int) -> torch.Tensor:
    return torch.arange(size * size, dtype=torch.float32).reshape(size, size)


def write(path: Path) -> None:
    with hessian_writer(path, SIZES) as store:
        for name in reversed(SIZES):
            store(name, matrix(SIZES[name]) + SIZES[name])


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    """An independent reader sees the same names, shapes and bits, in whatever order they came."""
    write(tmp_path / "hessians.safetensors")
    arrays = load_file(tmp_path / "hessians.safetensors")
    assert set(arrays) == {f"{name}.hessian" for name in SIZES}
    for name, size in SIZES.items():
        assert torch.equal(arrays[f"{name}.hessian"], matrix(size) + size)


def test_linears_of_one_input_share_a_matrix(sites: Sites) -> None:
    """q, k and v read one tensor: one matrix in the file, found from each of them."""
    paths = [linear.path for linear in sites.linears if linear.path != "lm_head"]
    owners = owners_from_sites(sites, paths)
    attention = "model.layers.1.self_attn"
    assert {owners[f"{attention}.{name}_proj"] for name in "qkv"} == {f"{attention}.q_proj"}
    assert owners[f"{attention}.o_proj"] == f"{attention}.o_proj"
    assert "lm_head" not in owners


def test_owner_is_one_that_is_observed(sites: Sites) -> None:
    """With q excluded the matrix is kept under k."""
    paths = [linear.path for linear in sites.linears if not linear.path.endswith("q_proj")]
    assert owners_from_sites(sites, paths)["model.layers.0.self_attn.v_proj"] == "model.layers.0.self_attn.k_proj"


def test_reading_gives_a_copy(sites: Sites, tmp_path: Path) -> None:
    """Methods change the matrix in place; the file must not change with it."""
    linear = sites.linears[0]
    with hessian_writer(tmp_path / "h.safetensors", {linear.path: 2}) as store:
        store(linear.path, matrix(2))
    hessians = Hessians(tmp_path / "h.safetensors", sites)
    hessians.read(linear.path).zero_()
    assert torch.equal(hessians.read(linear.path), matrix(2))


def test_matrix_is_found_from_every_linear_that_reads_the_tensor(sites: Sites, tmp_path: Path) -> None:
    """The first linear of an input may keep its float type later; the matrix is still that of its neighbours."""
    attention = "model.layers.0.self_attn"
    with hessian_writer(tmp_path / "h.safetensors", {f"{attention}.k_proj": 2}) as store:
        store(f"{attention}.k_proj", matrix(2))
    hessians = Hessians(tmp_path / "h.safetensors", sites)
    assert all(torch.equal(hessians.read(f"{attention}.{name}_proj"), matrix(2)) for name in "qkv")
    with pytest.raises(UserError, match="does not cover it"):
        hessians.read(f"{attention}.o_proj")


@pytest.mark.parametrize("kind", ["missing", "cut off", "empty", "no such layer"])
def test_what_is_not_there_is_named(sites: Sites, tmp_path: Path, kind: str) -> None:
    """One error with the file or the layer, and the way back."""
    path = tmp_path / "h.safetensors"
    write(path)
    if kind == "missing":
        path.unlink()
    elif kind != "no such layer":
        path.write_bytes(path.read_bytes()[:-1] if kind == "cut off" else b"")
    with pytest.raises(UserError, match="calibrate") as error:
        Hessians(path, sites).read("c")
    assert error.value.where == ("layer c" if kind == "no such layer" else str(path))
