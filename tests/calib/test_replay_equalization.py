"""An edited equalization table is carried out without calibration, or refused with the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from calib.choose_equalization import EqualizerOptions
from calib.decide import PolicyOptions, decide_policy
from calib.equalizers import SiteStatistics, scale_from_formula
from calib.load import Checkpoint
from calib.replay import replay_policy
from calib.stats import Stats
from fptq_export import numerics
from fptq_export.errors import UserError, UserErrors
from fptq_export.policy import Policy, SiteEqualization, arrays_path, read_policy, write_policy
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites
from tests.support.hessians import write_hessians

LAYER = "model.layers.0"
QKV = tuple(f"{LAYER}.self_attn.{name}_proj" for name in "qkv")
NORM, UP, DOWN = f"{LAYER}.input_layernorm", f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj"
Document = dict[str, Any]
Edit = Callable[[Document], object]
Replayed = tuple[Policy, dict[str, NDArray[Any]]]


@pytest.fixture
def make_policy(
    tmp_path: Path, sites: Sites, make_stats: Callable[[dict[str, float]], Stats], llama: Checkpoint
) -> Callable[[str], Path]:
    """Give a function that writes a policy equalized in one way; no Hessians lie beside it."""

    def make(equalizer: str) -> Path:
        hessians = tmp_path / "elsewhere.safetensors"
        write_hessians(hessians, sites)
        stats = make_stats({"layers.0.self_attn.q_proj": 40.0})
        wanted = PolicyOptions(group_size=16, equalization=EqualizerOptions(equalizer))  # type: ignore[arg-type]
        policy, arrays = decide_policy(sites, stats, llama, wanted, NoProgress(), hessians)
        write_policy(policy, arrays, tmp_path / "policy.json")
        return tmp_path / "policy.json"

    return make


@pytest.fixture
def replay(tmp_path: Path, sites: Sites, llama: Checkpoint) -> Callable[[Edit], Replayed]:
    def run(edit: Edit) -> Replayed:
        path = tmp_path / "policy.json"
        document = json.loads(path.read_text())
        edit(document)
        path.write_text(json.dumps(document))
        policy, arrays = replay_policy(path, sites, llama, NoProgress())
        return policy, arrays.read_all()

    return run


Replay = Callable[[Edit], Replayed]


def set_entry(site: str, entry: Document | None, **layer: Any) -> Edit:
    """Change (or remove) the entry of a site, and something in the layers that read the norm."""

    def edit(document: Document) -> None:
        if entry is None:
            del document["equalization"][site]
        else:
            document["equalization"][site] = entry
        for path in QKV if layer else ():
            document["layers"][path].update(layer)

    return edit


@pytest.mark.parametrize("equalizer", ["lae", "smoothquant", "awq", "search"])
def test_unedited_policy_is_replayed_bit_for_bit(
    make_policy: Callable[[str], Path], replay: Replay, equalizer: str
) -> None:
    """S is computed again from maxima, weights and root mean squares, without Hessians, to the same bits."""
    path = make_policy(equalizer)
    before, stored = read_policy(path), load_file(arrays_path(path))
    policy, arrays = replay(lambda document: None)
    assert policy == before
    assert arrays.keys() == stored.keys()
    assert all(np.array_equal(arrays[name], stored[name]) for name in stored)


def test_an_edited_parameter_is_carried_out(make_policy: Callable[[str], Path], replay: Replay) -> None:
    """Another ratio: s follows from the stored root mean squares, scale and codes from s."""
    path = make_policy("awq")
    stored = load_file(arrays_path(path))
    policy, arrays = replay(set_entry(NORM, {"method": "awq", "ratio": 0.9}, activation_scale=None))
    statistics = SiteStatistics(stored[f"{QKV[0]}.input_absmax"], rms=stored[f"{NORM}.input_rms"])
    s = scale_from_formula(SiteEqualization(method="awq", ratio=0.9), statistics)
    assert np.array_equal(arrays[f"{NORM}.equalization"], s)
    expected = numerics.static_scale(float((statistics.absmax.astype(np.float64) / s).max()))
    assert {policy.layers[path].activation_scale for path in QKV} == {float(expected)}
    assert not np.array_equal(arrays[f"{QKV[0]}.weight_codes"], stored[f"{QKV[0]}.weight_codes"])


def test_another_method_may_be_chosen_by_hand(make_policy: Callable[[str], Path], replay: Replay) -> None:
    """From awq to lae, on static layers: the closed form of LAE fills the scale."""
    make_policy("awq")
    policy, arrays = replay(set_entry(NORM, {"method": "lae"}, activation_scale=None))
    assert policy.layers[QKV[0]].activation_scale == float(numerics.static_scale(numerics.equalized_absmax(40.0)))
    assert f"{NORM}.input_rms" not in arrays


def test_a_removed_entry_folds_nothing(make_policy: Callable[[str], Path], replay: Replay) -> None:
    """The site is float again and the scale is that of the input as it is."""
    make_policy("search")
    policy, arrays = replay(set_entry(NORM, None, activation_scale=None))
    assert f"{NORM}.equalization" not in arrays
    assert policy.layers[QKV[0]].activation_scale == float(numerics.static_scale(40.0))


def test_the_tier_at_an_equalized_site_is_free(make_policy: Callable[[str], Path], replay: Replay) -> None:
    """One layer of a site may be per token beside static ones: both read x / s."""
    make_policy("search")
    tokenwise = {"activation": "per_token", "activation_scale": None}
    policy, arrays = replay(lambda document: document["layers"][QKV[1]].update(tokenwise))
    assert [policy.layers[path].activation for path in QKV] == ["static", "per_token", "static"]
    assert f"{NORM}.equalization" in arrays


def test_hessians_beside_the_policy_give_what_is_not_stored(
    make_policy: Callable[[str], Path], replay: Replay, sites: Sites
) -> None:
    """A site that gets its first root-mean-square method by hand takes it from diag H."""
    path = make_policy("lae")
    write_hessians(path.with_name("hessians.safetensors"), sites)
    stored = load_file(path.with_name("hessians.safetensors"))
    _, arrays = replay(set_entry(NORM, {"method": "awq", "ratio": 0.5}, activation_scale=None))
    expected = np.sqrt(np.diagonal(stored[f"{QKV[0]}.hessian"]))
    assert np.array_equal(arrays[f"{NORM}.input_rms"], expected)


@pytest.mark.parametrize(
    ("edit", "place", "message"),
    [
        (set_entry(NORM, {"method": "awq", "ratio": 0.5}), f'$.equalization["{NORM}"].method', "root mean squares"),
        (set_entry("nowhere.norm", {"method": "lae"}), '$.equalization["nowhere.norm"]', "no such fold site"),
        (set_entry("model.norm", {"method": "lae"}), '$.equalization["model.norm"]', "no quantized layer reads it"),
        (
            set_entry(NORM, {"method": "smoothquant", "alpha": 0.5}, activation="lae_static", activation_scale=None),
            f'$.layers["{QKV[0]}"].activation',
            "equalized by smoothquant: set it to static",
        ),
        (
            set_entry(NORM, {"method": "smoothquant", "alpha": 0.3}),
            f'$.layers["{QKV[0]}"].activation_scale',
            "an earlier one",
        ),
        (set_entry(NORM, None), f'$.layers["{QKV[0]}"].activation_scale', "left over"),
        (set_entry(NORM, {"method": "smoothquant"}), f'$.equalization["{NORM}"]', "smoothquant needs alpha"),
        (set_entry(NORM, {"method": "none"}), f'$.equalization["{NORM}"].method', "Input should be"),
    ],
    ids=["no rms", "no site", "unread", "tier", "stale scale", "stale after removal", "no alpha", "no method"],
)
def test_a_wrong_table_is_refused_with_its_place(
    make_policy: Callable[[str], Path], replay: Replay, edit: Edit, place: str, message: str
) -> None:
    """Each mistake has a JSON path and says what is the matter; nothing is quantized."""
    make_policy("lae")
    with pytest.raises(UserErrors) as error:
        replay(edit)
    found = {problem.path: problem.message for problem in error.value.problems}
    assert message in found[place], found


def test_a_scale_left_over_from_another_ratio_is_seen(make_policy: Callable[[str], Path], replay: Replay) -> None:
    """The old scale is no closed form of m alone: it is recognised by the s that was stored."""
    make_policy("awq")
    with pytest.raises(UserErrors, match="not the scale after this equalization"):
        replay(set_entry(NORM, {"method": "awq", "ratio": 0.9}))


def test_a_scale_of_ones_own_is_kept(make_policy: Callable[[str], Path], replay: Replay) -> None:
    """A value that follows from no equalization is a person's choice."""
    make_policy("awq")
    policy, _ = replay(set_entry(NORM, {"method": "awq", "ratio": 0.9}, activation_scale=0.125))
    assert policy.layers[QKV[0]].activation_scale == 0.125


@pytest.mark.parametrize("kind", ["equalization", "input_rms"])
def test_damaged_site_arrays_are_refused(
    make_policy: Callable[[str], Path], sites: Sites, llama: Checkpoint, kind: str
) -> None:
    """Arrays of another model, or changed ones, are named and not used."""
    path = make_policy("search")
    arrays = load_file(arrays_path(path))
    save_file({**arrays, f"{NORM}.{kind}": np.full(64, np.nan, np.float32)}, arrays_path(path))
    with pytest.raises(UserError, match=f"{NORM}.{kind} is not 64 finite"):
        replay_policy(path, sites, llama, NoProgress())
