"""An edited policy is replayed as it says, or refused with everything that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from calib.decide import PolicyOptions, decide_policy, replay_policy
from calib.load import Checkpoint
from calib.stats import Stats
from fptq_export import numerics
from fptq_export.errors import UserError, UserErrors
from fptq_export.packing import int4_from_packed
from fptq_export.policy import Policy, arrays_path, read_policy, write_policy
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites, UnmatchedLinear

LAYER = "model.layers.0"
Q, K, V, ATTENTION_OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
UP, DOWN = f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj"
Q_RANGE = 40.0
Document = dict[str, Any]
Edit = Callable[[Document], object]


@pytest.fixture
def path(tmp_path: Path, sites: Sites, make_stats: Callable[[dict[str, float]], Stats], llama: Checkpoint) -> Path:
    """A policy on disk: q, k, v of layer 0 equalized, its down_proj per token, the head float, the rest static."""
    stats = make_stats({"layers.0.self_attn.q_proj": Q_RANGE, "layers.0.mlp.down_proj": 500.0})
    policy, arrays = decide_policy(sites, stats, llama, PolicyOptions(), NoProgress())
    write_policy(policy, arrays, tmp_path / "policy.json")
    return tmp_path / "policy.json"


@pytest.fixture
def replay(path: Path, sites: Sites, llama: Checkpoint) -> Callable[[Edit], tuple[Policy, dict[str, NDArray[Any]]]]:
    """Edit the file, then replay it."""

    def run(edit: Edit) -> tuple[Policy, dict[str, NDArray[Any]]]:
        document = json.loads(path.read_text())
        edit(document)
        path.write_text(json.dumps(document))
        policy, arrays = replay_policy(path, sites, llama, NoProgress())
        return policy, arrays.read_all()

    return run


Replay = Callable[[Edit], tuple[Policy, dict[str, NDArray[Any]]]]


def change(layer: str, **entries: Any) -> Edit:
    return lambda document: document["layers"][layer].update(entries)


def change_all(layers: tuple[str, ...], **entries: Any) -> Edit:
    return lambda document: [document["layers"][layer].update(entries) for layer in layers]


def test_unedited_policy_is_replayed_bit_for_bit(replay: Replay, path: Path) -> None:
    """Without an edit policy and arrays are the stored ones, the codes computed again from the checkpoint."""
    before, stored = read_policy(path), load_file(arrays_path(path))
    policy, arrays = replay(lambda document: None)
    assert policy == before
    assert arrays.keys() == stored.keys()
    assert all(np.array_equal(arrays[name], stored[name]) for name in stored)


def test_scale_set_to_null_is_filled_in(replay: Replay) -> None:
    """A new tier with a null scale gets the closed form of that tier, and the reason says who chose it."""
    policy, arrays = replay(change_all((Q, K, V), activation="static", activation_scale=None))
    assert policy.layers[Q].activation_scale == float(numerics.static_scale(Q_RANGE))
    assert policy.layers[Q].reason.startswith("set by hand to static; by the rule: max|x| 40")
    assert f"{LAYER}.input_layernorm.equalization" not in arrays


def test_codes_follow_the_edit(replay: Replay, path: Path) -> None:
    """Codes of layers that are no longer equalized change; those of untouched layers do not."""
    stored = load_file(arrays_path(path))
    _, arrays = replay(change_all((Q, K, V), activation="per_token", activation_scale=None))
    assert not np.array_equal(arrays[f"{Q}.weight_codes"], stored[f"{Q}.weight_codes"])
    assert np.array_equal(arrays[f"{UP}.weight_codes"], stored[f"{UP}.weight_codes"])


def test_equalizing_a_gated_site_changes_its_producer(replay: Replay, path: Path, sites: Sites) -> None:
    """Moving down_proj to lae_static divides up_proj's rows: its codes change too, and s is stored."""
    stored = load_file(arrays_path(path))
    _, arrays = replay(change(DOWN, activation="lae_static"))
    s = numerics.equalization_from_absmax(stored[f"{DOWN}.input_absmax"]).astype(np.float32)
    assert np.array_equal(arrays[f"{sites.linear(DOWN).site}.equalization"], s)
    assert not np.array_equal(arrays[f"{UP}.weight_scales"], stored[f"{UP}.weight_scales"])


def test_scale_chosen_by_hand_is_kept(replay: Replay) -> None:
    """A static scale of the user's own is used as it stands."""
    policy, _ = replay(change(UP, activation_scale=0.25))
    assert policy.layers[UP].activation_scale == 0.25


def test_group_size_and_method_can_be_changed(replay: Replay) -> None:
    """Another group size gives other arrays; another method other scales."""
    policy, arrays = replay(change(UP, group_size=16, weight_method="mse"))
    assert arrays[f"{UP}.weight_scales"].shape == (128, 4)
    assert int4_from_packed(arrays[f"{UP}.weight_codes"]).shape == (128, 64)
    assert policy.layers[UP].weight_method == "mse"


def test_layer_can_be_set_to_float(replay: Replay) -> None:
    """A float layer has no arrays but its maxima, and its reason no longer claims a tier."""
    float_entries = {"activation": None, "activation_scale": None, "group_size": None, "weight_method": None}
    policy, arrays = replay(change(ATTENTION_OUT, precision="float", **float_entries))
    assert f"{ATTENTION_OUT}.weight_codes" not in arrays
    assert f"{ATTENTION_OUT}.input_absmax" in arrays
    assert policy.layers[ATTENTION_OUT].reason == "set by hand: keeps the float precision"


def test_words_of_the_user_are_kept(replay: Replay) -> None:
    """A reason that a person wrote is not overwritten."""
    policy, _ = replay(change(ATTENTION_OUT, activation="per_token", activation_scale=None, reason="measured better"))
    assert policy.layers[ATTENTION_OUT].reason == "measured better"


def test_replaying_twice_changes_nothing_more(replay: Replay, path: Path) -> None:
    """A replayed policy is complete: replayed again it is the same."""
    policy, arrays = replay(change_all((Q, K, V), activation="static", activation_scale=None))
    write_policy(policy, arrays, path)
    again, arrays_again = replay(lambda document: None)
    assert again == policy
    assert all(np.array_equal(arrays[name], arrays_again[name]) for name in arrays)


STALE_STATIC = float(numerics.static_scale(Q_RANGE))
NONSENSE: dict[str, tuple[Edit, str, str]] = {
    "unknown layer": (
        lambda d: d["layers"].update({"model.ghost": d["layers"][Q]}), '$.layers["model.ghost"]', "no such linear",
    ),
    "missing layer": (lambda d: d["layers"].pop(Q), f'$.layers["{Q}"]', "missing"),
    "group size that does not divide": (
        change(Q, group_size=128), f'$.layers["{Q}"].group_size', "128 does not divide 64",
    ),
    "unsupported group size": (change(Q, group_size=8), f'$.layers["{Q}"].group_size', "8 is not supported"),
    "no group size": (change(Q, group_size=None), f'$.layers["{Q}"].group_size', "needs one"),
    "no method": (change(Q, weight_method=None), f'$.layers["{Q}"].weight_method', "needs one"),
    "no tier": (change(UP, activation=None), f'$.layers["{UP}"].activation', "needs one"),
    "fold without a site": (
        change(ATTENTION_OUT, activation="lae_static", activation_scale=None),
        f'$.layers["{ATTENTION_OUT}"].activation', "comes from a reshape",
    ),
    "half of a site": (
        change(K, activation="static", activation_scale=None),
        f'$.layers["{K}"].activation', f"{Q}, {V} reads the same",
    ),
    "scale of a per-token layer": (
        change(DOWN, activation_scale=0.5), f'$.layers["{DOWN}"].activation_scale', "set it to null",
    ),
    "left-over scale": (
        change(Q, activation_scale=STALE_STATIC), f'$.layers["{Q}"].activation_scale', "scale of static, left over",
    ),
    "scale that vanishes": (change(UP, activation_scale=1e-40), f'$.layers["{UP}"].activation_scale', "normal float32"),
    "scale that overflows": (change(UP, activation_scale=1e39), f'$.layers["{UP}"].activation_scale', "normal float32"),
    "other shape": (change(Q, in_features=128), f'$.layers["{Q}"].in_features', "is 128, but the traced model has 64"),
    "other site": (change(Q, site="model.norm"), f'$.layers["{Q}"].site', "model.norm"),
    "invented range": (change(Q, input_absmax=41.0), f'$.layers["{Q}"].input_absmax', "not for editing"),
    "float with a tier": (change(Q, precision="float"), f'$.layers["{Q}"].activation', "set it to null"),
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_with_its_path(replay: Replay, name: str) -> None:
    """Each kind of bad edit is found, at its JSON path, with what to do."""
    edit, where, words = NONSENSE[name]
    with pytest.raises(UserErrors) as error:
        replay(edit)
    found = {problem.path: problem.message for problem in error.value.problems}
    assert words in found.get(where, ""), found


def test_all_problems_come_at_once(replay: Replay) -> None:
    """Three bad entries in three layers give one error with three paths."""

    def edit(document: Document) -> None:
        document["layers"][UP]["group_size"] = 48
        document["layers"][DOWN]["activation_scale"] = 1.0
        document["layers"].pop("lm_head")

    with pytest.raises(UserErrors) as error:
        replay(edit)
    assert {problem.path for problem in error.value.problems} == {
        f'$.layers["{UP}"].group_size', f'$.layers["{DOWN}"].activation_scale', '$.layers.lm_head',
    }  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (change(Q, activation="int4"), f'$.layers["{Q}"].activation'),
        (change(Q, activation_scale=-1.0), f'$.layers["{Q}"].activation_scale'),
        (change(Q, typo=1), f'$.layers["{Q}"].typo'),
        (lambda d: d.pop("rule"), "$.rule"),
        (lambda d: d.update(schema_version=2), "$.schema_version"),
    ],
)
def test_schema_errors_carry_paths_too(replay: Replay, edit: Edit, where: str) -> None:
    """What the schema itself refuses is reported in the same form."""
    with pytest.raises(UserErrors) as error:
        replay(edit)
    assert where in {problem.path for problem in error.value.problems}


def test_layer_that_was_not_measured_cannot_be_quantized(
    path: Path, sites: Sites, llama: Checkpoint, make_stats: Callable[[dict[str, float]], Stats]
) -> None:
    """Taking in the head, which calibration did not see, asks for calibration instead of guessing a range."""
    stats = make_stats({})
    seen = {name: absmax for name, absmax in stats.channel_absmax.items() if name != "lm_head"}
    policy, arrays = decide_policy(sites, Stats(seen, 1, "x"), llama, PolicyOptions(), NoProgress())
    head = policy.layers[UP].model_copy(update={"in_features": 64, "out_features": 512, "site": "model.norm"})
    write_policy(policy.model_copy(update={"layers": {**policy.layers, "lm_head": head}}), arrays, path)
    with pytest.raises(UserErrors, match="calibrate again without excluding it") as error:
        replay_policy(path, sites, llama, NoProgress())
    assert error.value.problems[0].path == "$.layers.lm_head.precision"


def test_linear_that_trace_could_not_match_cannot_be_quantized(path: Path, sites: Sites, llama: Checkpoint) -> None:
    """Its entry may stay float, and only that."""
    odd = UnmatchedLinear(path="model.odd", in_features=64, out_features=8, reason="computed by Einsum")
    document = json.loads(path.read_text())
    document["layers"]["model.odd"] = {**document["layers"][UP], "out_features": 8}
    path.write_text(json.dumps(document))
    with pytest.raises(UserErrors, match="computed by Einsum"):
        replay_policy(path, sites.model_copy(update={"unmatched": (odd,)}), llama, NoProgress())
    document["layers"]["model.odd"] = {**document["layers"]["lm_head"], "out_features": 8}
    path.write_text(json.dumps(document))
    policy, _ = replay_policy(path, sites.model_copy(update={"unmatched": (odd,)}), llama, NoProgress())
    assert policy.layers["model.odd"].precision == "float"


def test_policy_without_any_quantized_layer_is_refused(replay: Replay) -> None:
    """All float is an export of the original model: it is refused."""
    empty = {"activation": None, "activation_scale": None, "group_size": None, "weight_method": None}
    with pytest.raises(UserErrors, match="nothing to quantize"):
        replay(lambda d: [layer.update(precision="float", **empty) for layer in d["layers"].values()])


@pytest.mark.parametrize("kind", ["missing", "cut off", "wrong length", "wrong type", "not finite", "negative"])
def test_bad_arrays_are_refused(path: Path, sites: Sites, llama: Checkpoint, kind: str) -> None:
    """Maxima that are missing, damaged or changed are refused by file name, not used."""
    file = arrays_path(path)
    arrays = load_file(file)
    name = f"{Q}.input_absmax"
    if kind == "missing":
        file.unlink()
    elif kind == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        values: dict[str, NDArray[Any]] = {
            "wrong length": np.ones(63, np.float32), "wrong type": np.ones(64, np.float64),
            "not finite": np.full(64, np.nan, np.float32), "negative": -np.ones(64, np.float32),
        }  # fmt: skip
        save_file({**arrays, name: values[kind]}, file)
    with pytest.raises(UserError, match="calibrate again") as error:
        replay_policy(path, sites, llama, NoProgress())
    assert error.value.where == str(file)


@pytest.mark.parametrize("text", ["", "{", "not json", "[]", "null"])
def test_file_that_is_no_policy_is_refused(path: Path, sites: Sites, llama: Checkpoint, text: str) -> None:
    """Whatever stands in the file, one error names it."""
    path.write_text(text)
    with pytest.raises(UserError) as error:
        replay_policy(path, sites, llama, NoProgress())
    assert error.value.where == str(path)
