"""Histograms are measured on exactly the inputs of linears, and their ranges reach the static layers alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from calib.batches import CalibrationOptions, TokenBatches, token_batches
from calib.decide import PolicyOptions, decide_policy
from calib.histograms import Histogram
from calib.load import Checkpoint, model_from_checkpoint
from calib.observe import observe
from calib.ranges import RangeCalibrator, calibrated_range
from calib.stats import Stats, read_stats, write_stats
from fptq_export import numerics
from fptq_export.errors import UserError
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites

LAYER = "model.layers.0"
Q, O_PROJ, DOWN = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"


def tokens(size: int, seed: int = 0) -> TokenBatches:
    return token_batches(CalibrationOptions(dataset="random", size=size, seq=16, seed=seed), None, 512)


@pytest.fixture(scope="module")
def paths(sites: Sites) -> list[str]:
    return [linear.path for linear in sites.linears if linear.path != "lm_head"]


@pytest.fixture(scope="module")
def stats(llama: Checkpoint, paths: list[str]) -> Stats:
    """Measured on the tiny LLaMA, with histograms."""
    model = model_from_checkpoint(llama, torch.float32)
    return observe(lambda: copy.deepcopy(model), tokens(6), paths, NoProgress(), batch_size=2, histograms=True)


def test_histograms_count_every_value_once(stats: Stats, paths: list[str], llama: Checkpoint) -> None:
    """Tokens times channels values, none above the maximum; one input, one histogram for q, k and v."""
    assert list(stats.histograms) == paths
    for path, histogram in stats.histograms.items():
        assert histogram.counts.sum() == stats.tokens * stats.channel_absmax[path].size, path
        assert (histogram.used - 1) * histogram.width <= stats.absmax(path) < histogram.used * histogram.width
    assert np.array_equal(stats.histograms[Q].counts, stats.histograms[Q.replace("q_proj", "v_proj")].counts)


def test_histograms_do_not_depend_on_batches(stats: Stats, paths: list[str], llama: Checkpoint) -> None:
    """The first block reads the same floats in any batch: its histogram is the same, bit for bit."""
    model: Any = model_from_checkpoint(llama, torch.float32)
    other = observe(lambda: copy.deepcopy(model), tokens(6), paths, NoProgress(), batch_size=6, histograms=True)
    assert np.array_equal(other.histograms[Q].counts, stats.histograms[Q].counts)
    assert other.histograms[Q].exponent == stats.histograms[Q].exponent


def test_nothing_is_counted_unless_asked(llama: Checkpoint, paths: list[str], tmp_path: Path) -> None:
    """The statistics of a run with absmax are what they were."""
    model = model_from_checkpoint(llama, torch.float32)
    plain = observe(lambda: copy.deepcopy(model), tokens(1), paths[:1], NoProgress())
    write_stats(plain, tmp_path / "stats.safetensors")
    assert load_file(tmp_path / "stats.safetensors").keys() == {f"{paths[0]}.input_absmax"}


def test_histograms_are_read_back_equal(stats: Stats, tmp_path: Path) -> None:
    """Counts and exponents survive the file."""
    write_stats(stats, tmp_path / "stats.safetensors")
    again = read_stats(tmp_path / "stats.safetensors")
    assert again.channel_absmax.keys() == stats.channel_absmax.keys()
    for path, histogram in stats.histograms.items():
        assert again.histograms[path].exponent == histogram.exponent
        assert np.array_equal(again.histograms[path].counts, histogram.counts)


def test_runs_with_and_without_histograms_do_not_merge(stats: Stats) -> None:
    """Half a histogram would choose a range from half the text."""
    merged = stats.merge(stats)
    assert np.array_equal(merged.histograms[DOWN].counts, 2 * stats.histograms[DOWN].counts)
    with pytest.raises(UserError, match="only one of the runs"):
        stats.merge(Stats(stats.channel_absmax, stats.tokens, "plain"))


@pytest.mark.parametrize("damage", ["short", "float", "negative", "no exponent"])
def test_damaged_histograms_are_refused(stats: Stats, tmp_path: Path, damage: str) -> None:
    """Counts that cannot be counts are named, not used."""
    path = tmp_path / "stats.safetensors"
    write_stats(stats, path)
    from safetensors import safe_open

    with safe_open(str(path), framework="np") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    name = f"{DOWN}.input_histogram"
    changes = {"short": arrays[name][:5], "float": arrays[name].astype(np.float32), "negative": -arrays[name]}
    if damage == "no exponent":
        del arrays[f"{name}_exponent"]
    else:
        arrays[name] = changes[damage]
    save_file(arrays, path, metadata)
    with pytest.raises(UserError, match="not calibration statistics"):
        read_stats(path)


def policy_of(sites: Sites, stats: Stats, llama: Checkpoint, **options: Any) -> Any:
    policy, _ = decide_policy(sites, stats, llama, PolicyOptions(**options), NoProgress())
    return policy


@pytest.mark.parametrize(
    ("name", "precision"), [("percentile", ()), ("mse", ()), ("mse", ("proj=w8a8",)), ("entropy", ())]
)
def test_static_scales_are_those_of_the_range(
    sites: Sites, stats: Stats, llama: Checkpoint, name: RangeCalibrator, precision: tuple[str, ...]
) -> None:
    """Range / 127, with the calibrator and the clipped share in the reason; q, k and v stay equal."""
    policy = policy_of(sites, stats, llama, range_calibrator=name, percentile=99.0, precision=precision)
    layers = policy.quantized()
    assert {layer.activation for layer in layers.values()} == {"static"}
    for path in (Q, O_PROJ, DOWN):
        layer = layers[path]
        chosen = calibrated_range(stats.histograms[path], stats.absmax(path), name, 99.0)
        assert layer.activation_scale == float(numerics.static_scale(chosen.absmax))
        assert layer.input_absmax == stats.absmax(path)
        assert f"by {name}" in layer.reason
        assert f"clips {chosen.clipped:.3g} of the values" in layer.reason
    scales = {policy.layers[Q.replace("q_proj", f"{name}_proj")].activation_scale for name in "qkv"}
    assert len(scales) == 1


def test_other_tiers_keep_their_scales(sites: Sites, stats: Stats, llama: Checkpoint) -> None:
    """An equalized input has its closed form, and says why; a per-token one has none."""
    low = {"v0": 0.0, "v1": 1e6}
    usual, other = (policy_of(sites, stats, llama, range_calibrator=name, **low) for name in ("absmax", "mse"))
    for path, layer in other.quantized().items():
        assert layer.activation_scale == usual.layers[path].activation_scale
    assert (other.layers[Q].activation, other.layers[O_PROJ].activation) == ("lae_static", "per_token")
    assert other.layers[Q].reason.endswith("not by mse: its histogram is from before equalization")
    assert other.layers[O_PROJ] == usual.layers[O_PROJ]


def test_missing_histograms_are_refused(sites: Sites, stats: Stats, llama: Checkpoint) -> None:
    """Statistics without histograms cannot give another range than the largest magnitude."""
    plain = Stats(stats.channel_absmax, stats.tokens, "plain")
    with pytest.raises(UserError, match="no histogram"):
        policy_of(sites, plain, llama, range_calibrator="mse")


@pytest.mark.parametrize("percentile", [0.0, 101.0, float("nan")])
def test_percentiles_that_make_no_sense_are_refused(percentile: float) -> None:
    """Named by its option."""
    with pytest.raises(UserError, match="--percentile"):
        PolicyOptions(percentile=percentile)


def test_a_scale_that_clips_changes_the_codes() -> None:
    """What is above the range becomes code 127; what is below gets finer steps."""
    values = np.array([0.5, 1.0, 100.0], np.float32)
    histogram = Histogram.from_values(torch.from_numpy(np.repeat(values, [5000, 5000, 1])), 100.0)
    chosen = calibrated_range(histogram, 100.0, "percentile", 99.0)
    codes = numerics.quantize_activation(values, numerics.static_scale(chosen.absmax))
    assert codes[2] == 127
    assert codes[0] > 50
