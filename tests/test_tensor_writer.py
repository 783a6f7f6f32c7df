"""A file written tensor by tensor is the file that the library would have written, or there is no file."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from fptq_export.tensor_writer import TensorSpec, TensorWriter, tensor_writer

SPECS = {
    "codes": TensorSpec.of("uint8", 3, 5),
    "scales": TensorSpec.of("float16", 3),
    "ü": TensorSpec.of("float32", 2, 2),
    "empty": TensorSpec.of("float32", 0, 4),
}
DTYPES = st.sampled_from([np.dtype(name) for name in ("float32", "float16", "uint8", "int8")])


def values_from_spec(spec: TensorSpec, start: int) -> NDArray[np.generic]:
    return (np.arange(np.prod(spec.shape), dtype=np.float64) + start).reshape(spec.shape).astype(spec.dtype)


def write(path: Path, order: list[str]) -> None:
    with tensor_writer(path, SPECS) as writer:
        for name in order:
            writer.write(name, values_from_spec(SPECS[name], len(name)))


def test_library_reads_every_tensor(tmp_path: Path) -> None:
    """Names, types, shapes and values; a name that is not ASCII and a tensor without elements among them."""
    write(tmp_path / "file", list(SPECS))
    arrays = load_file(tmp_path / "file")
    assert arrays.keys() == SPECS.keys()
    for name, spec in SPECS.items():
        assert (arrays[name].dtype, arrays[name].shape) == (spec.dtype, spec.shape)
        np.testing.assert_array_equal(arrays[name], values_from_spec(spec, len(name)))


@given(st.lists(st.tuples(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, max_side=4)), max_size=6))
def test_any_mixture_of_types_and_shapes_is_readable(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[np.dtype[np.generic], tuple[int, ...]]]
) -> None:
    """Offsets and alignment hold for odd sizes next to wide types."""
    specs = {f"t{index}": TensorSpec(dtype, shape) for index, (dtype, shape) in enumerate(tensors)}
    path = tmp_path_factory.mktemp("any") / "file"
    with tensor_writer(path, specs) as writer:
        for index, (name, spec) in enumerate(specs.items()):
            writer.write(name, values_from_spec(spec, index))
    arrays = load_file(path)
    for index, (name, spec) in enumerate(specs.items()):
        np.testing.assert_array_equal(arrays[name], values_from_spec(spec, index))


def test_metadata_is_carried(tmp_path: Path) -> None:
    """Libraries look there for the framework that wrote the file."""
    with tensor_writer(tmp_path / "file", {}, {"format": "pt", "wörd": "ü"}):
        pass
    with safe_open(tmp_path / "file", framework="np") as file:
        assert file.metadata() == {"format": "pt", "wörd": "ü"}


def test_order_of_writing_does_not_show(tmp_path: Path) -> None:
    """Hashes of the file tell whether its content changed."""
    write(tmp_path / "first", list(SPECS))
    write(tmp_path / "second", list(reversed(SPECS)))
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_strided_view_is_stored_as_it_reads(tmp_path: Path) -> None:
    """A transposed array has another memory order."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    with tensor_writer(tmp_path / "file", {"t": TensorSpec.of("float32", 3, 2)}) as writer:
        writer.write("t", values.T)
    np.testing.assert_array_equal(load_file(tmp_path / "file")["t"], values.T)


@pytest.mark.parametrize(
    "values",
    [np.zeros((3, 5), np.int8), np.zeros((5, 3), np.uint8), np.zeros((3, 5, 1), np.uint8)],
    ids=["type", "shape", "dimensions"],
)
def test_tensor_that_was_announced_otherwise_is_refused(tmp_path: Path, values: NDArray[np.generic]) -> None:
    """It would overwrite its neighbours."""

    def attempt() -> None:
        with tensor_writer(tmp_path / "file", SPECS) as writer:
            writer.write("codes", values)

    with pytest.raises(ValueError, match=r"codes: .* instead of"):
        attempt()
    assert list(tmp_path.iterdir()) == []


def test_tensor_written_twice_is_refused(tmp_path: Path) -> None:
    """The second would silently replace the first."""
    with pytest.raises(ValueError, match="scales: written twice"):
        write(tmp_path / "file", ["scales", "scales"])


def test_file_that_lacks_a_tensor_does_not_appear(tmp_path: Path) -> None:
    """Zeros in its place would be read as values."""
    with pytest.raises(ValueError, match="2 tensors were not written, among them codes"):
        write(tmp_path / "file", ["scales", "ü"])
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_called_by_its_name() -> None:
    """The command line turns this error into words; one without its number would look like a bug of ours."""
    spec = TensorSpec.of("float32", 1 << 20)
    with pytest.raises(OSError, match="No space left") as error, Path("/dev/full").open("wb", buffering=0) as file:
        TensorWriter(file, {"t": spec}, {"t": 0}).write("t", np.zeros(spec.shape, np.float32))
    assert error.value.errno == errno.ENOSPC


def test_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    """Neither the file nor its temporary name survives an error in the work that fills it."""

    def attempt() -> None:
        with tensor_writer(tmp_path / "file", SPECS):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        attempt()
    assert list(tmp_path.iterdir()) == []


def write_draft(path: Path, names: list[str], written: tuple[str, ...] = ()) -> None:
    with tensor_writer(path, SPECS, draft=path.with_name("draft"), written=written) as writer:
        for name in names:
            writer.write(name, values_from_spec(SPECS[name], len(name)))


def test_a_draft_is_continued(tmp_path: Path) -> None:
    """What an earlier process wrote stays in it; complete, it is the file of one go, and the draft is gone."""
    write(tmp_path / "whole", list(SPECS))
    with pytest.raises(ValueError, match="not written"):
        write_draft(tmp_path / "file", ["ü", "codes"])
    assert not (tmp_path / "file").exists()
    write_draft(tmp_path / "file", ["scales", "empty"], written=("ü", "codes"))
    assert (tmp_path / "file").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "whole"]


def test_a_draft_without_written_tensors_begins_anew(tmp_path: Path) -> None:
    """Bytes of an older draft do not shine through."""
    (tmp_path / "draft").write_bytes(b"\xff" * 4096)
    write(tmp_path / "whole", list(SPECS))
    write_draft(tmp_path / "file", list(SPECS))
    assert (tmp_path / "file").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("name", ["ü", "codes"])
def test_a_tensor_of_the_draft_is_not_written_again(tmp_path: Path, name: str) -> None:
    """It is complete: writing it a second time is a mistake of the caller."""
    with pytest.raises(ValueError, match="not written"):
        write_draft(tmp_path / "file", ["ü", "codes"])
    with pytest.raises(ValueError, match=f"{name}: written twice"):
        write_draft(tmp_path / "file", [name], written=("ü", "codes"))
