from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fptq_export.errors import UserError, UserErrors
from fptq_export.policy import (
    GROUP_SIZES,
    LayerPolicy,
    Policy,
    PolicyArrays,
    Rule,
    arrays_path,
    group_size_for,
    policy_json_schema,
    read_policy,
    write_policy,
)
from tests.support.process_memory import is_mapped

LAYER = LayerPolicy(
    precision="w4a8",
    activation="lae_static",
    reason="15 < v < 150",
    in_features=64,
    out_features=32,
    input_absmax=40.0,
    activation_scale=0.042,
    group_size=16,
    weight_method="rtn",
    site="model.norm",
)
HEAD = LayerPolicy(precision="float", activation=None, reason="excluded", in_features=64, out_features=512)
POLICY = Policy(model="tiny", rule=Rule(v0=10.0), layers={"fc": LAYER, "lm_head": HEAD})
ARRAYS = {"fc.weight_scales": np.linspace(0, 1, 128, dtype=np.float16).reshape(32, 4)}


def _edited(directory: Path, **changes: Any) -> Path:
    """A policy file with fields of the layer `fc` replaced."""
    path = directory / "policy.json"
    write_policy(POLICY, ARRAYS, path)
    document = json.loads(path.read_text())
    document["layers"]["fc"].update(changes)
    path.write_text(json.dumps(document))
    return path


def test_policy_survives_the_round_trip(tmp_path: Path) -> None:
    """Both halves come back equal: entries, order of layers, dtypes and bits of the arrays."""
    path = tmp_path / "policy.json"
    write_policy(POLICY, ARRAYS, path)
    assert read_policy(path) == POLICY
    assert list(read_policy(path).layers) == ["fc", "lm_head"]
    stored = PolicyArrays(arrays_path(path)).read("fc.weight_scales")
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, ARRAYS["fc.weight_scales"])


def test_equal_policies_are_equal_bytes(tmp_path: Path) -> None:
    """Hashes of the file tell whether the policy changed."""
    for name in ("a.json", "b.json"):
        write_policy(POLICY, ARRAYS, tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_transposed_arrays_are_stored_as_they_read(tmp_path: Path) -> None:
    """The library writes memory as it lies: a strided view must be made contiguous first."""
    path = tmp_path / "policy.json"
    write_policy(POLICY, {"t": ARRAYS["fc.weight_scales"].T}, path)
    np.testing.assert_array_equal(PolicyArrays(arrays_path(path)).read("t"), ARRAYS["fc.weight_scales"].T)


def test_readable_half_is_written_last(tmp_path: Path) -> None:
    """If the arrays cannot be written, no policy.json stands without them."""
    arrays_path(tmp_path / "policy.json").mkdir()
    with pytest.raises(OSError, match=r"policy\.safetensors"):
        write_policy(POLICY, ARRAYS, tmp_path / "policy.json")
    assert not (tmp_path / "policy.json").exists()


def test_every_wrong_field_is_listed_with_its_path(tmp_path: Path) -> None:
    """One read tells all: unknown words, negative numbers, words where numbers belong, fields that do not exist."""
    path = _edited(
        tmp_path,
        precision="w3a8",
        activation="dynamic",
        group_size=-16,
        in_features="many",
        activation_scale=0,
        colour=1,
    )
    with pytest.raises(UserErrors) as error:
        read_policy(path)
    assert {problem.path for problem in error.value.problems} == {
        f"$.layers.fc.{field}"
        for field in ("precision", "activation", "group_size", "in_features", "activation_scale", "colour")
    }
    assert str(path) in str(error.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
def test_numbers_that_are_no_scales_are_refused(tmp_path: Path, number: float) -> None:
    """JSON as Python writes it knows NaN and Infinity; a scale is neither."""
    with pytest.raises(UserErrors, match=r"\$\.layers\.fc\.activation_scale"):
        read_policy(_edited(tmp_path, activation_scale=number))


def test_missing_field_is_named(tmp_path: Path) -> None:
    """A layer without its reason is refused at that layer."""
    path = _edited(tmp_path)
    document = json.loads(path.read_text())
    del document["layers"]["lm_head"]["reason"]
    path.write_text(json.dumps(document))
    with pytest.raises(UserErrors, match=r"\$\.layers\.lm_head\.reason"):
        read_policy(path)


def test_policy_of_a_later_version_is_refused(tmp_path: Path) -> None:
    """A file of another schema version is not read by guess."""
    path = _edited(tmp_path)
    document = json.loads(path.read_text()) | {"schema_version": 2}
    path.write_text(json.dumps(document))
    with pytest.raises(UserErrors, match=r"\$\.schema_version"):
        read_policy(path)


def test_missing_arrays_are_user_errors(tmp_path: Path) -> None:
    """A lost file, a lost array and an array of another shape each say which."""
    path = tmp_path / "policy.json"
    write_policy(POLICY, ARRAYS, path)
    arrays = PolicyArrays(arrays_path(path))
    assert "fc.weight_scales" in arrays
    with pytest.raises(UserError, match=r"policy\.safetensors: array 'fc\.weight_codes' is missing"):
        arrays.read("fc.weight_codes")
    with pytest.raises(UserError, match=r"'fc\.weight_scales' is \[32, 4\], but policy\.json asks for \[32, 8\]"):
        arrays.read("fc.weight_scales", (32, 8))
    with pytest.raises(UserError, match=r"elsewhere\.safetensors: no such file"):
        PolicyArrays(tmp_path / "elsewhere.safetensors")


def test_truncated_arrays_are_a_user_error(tmp_path: Path) -> None:
    """A policy.safetensors that was cut off names itself."""
    path = tmp_path / "policy.json"
    write_policy(POLICY, ARRAYS, path)
    whole = arrays_path(path).read_bytes()
    arrays_path(path).write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"policy\.safetensors: damaged"):
        PolicyArrays(arrays_path(path))


@pytest.mark.parametrize(
    ("in_features", "wanted", "expected"),
    [(4096, 128, 128), (576, 128, 64), (1536, 128, 128), (48, 128, 16), (96, 64, 32), (4096, 32, 32), (100, 128, None)],
)
def test_group_size_divides_the_channels(in_features: int, wanted: int, expected: int | None) -> None:
    """The wanted size if it divides, else the largest supported one below it, else none."""
    assert group_size_for(in_features, wanted) == expected


def test_group_sizes_are_listed_largest_first() -> None:
    """`group_size_for` takes the first that fits."""
    assert tuple(sorted(GROUP_SIZES, reverse=True)) == GROUP_SIZES


def test_bits_per_weight_count_the_scales() -> None:
    """A group of 16 shares one 16-bit scale: 5 bits a weight; a float layer has no such figure."""
    assert LAYER.bits_per_weight == 5.0
    assert HEAD.bits_per_weight is None


def test_quantized_layers_and_equalized_sites() -> None:
    """Float layers are not quantized; only `lae_static` layers equalize their site, each site once."""
    static = LAYER.model_copy(update={"activation": "static", "site": "other"})
    policy = POLICY.model_copy(update={"layers": {"a": LAYER, "b": LAYER, "c": static, "d": HEAD}})
    assert list(policy.quantized()) == ["a", "b", "c"]
    assert policy.equalized_sites() == ("model.norm",)


def test_schema_names_what_an_editor_needs() -> None:
    """The published JSON Schema knows every field of a layer, its tiers, and that there are no others."""
    layer = policy_json_schema()["$defs"]["LayerPolicy"]
    assert set(layer["properties"]) == set(LayerPolicy.model_fields)
    assert layer["additionalProperties"] is False
    (tiers, _null) = layer["properties"]["activation"]["anyOf"]
    assert tiers["enum"] == ["static", "lae_static", "per_token"]


def test_policies_are_frozen() -> None:
    """A stage cannot change what another stage decided."""
    with pytest.raises(ValueError, match="frozen"):
        LAYER.activation = "static"


def test_arrays_that_were_read_leave_no_pages_behind(tmp_path: Path) -> None:
    """An open file keeps the pages of all that was read: at the end of a rewrite, the whole policy."""
    write_policy(POLICY, ARRAYS, tmp_path / "policy.json")
    file = arrays_path(tmp_path / "policy.json")
    arrays = PolicyArrays(file)
    array = arrays.read("fc.weight_scales")
    np.testing.assert_array_equal(array, ARRAYS["fc.weight_scales"])
    assert not is_mapped(file)
