"""Calibration keeps exact maxima of exactly the inputs that linears read."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn

import calib.observe
from calib.batches import CalibrationOptions, TokenBatches, token_batches
from calib.hessians import Hessians, hessian_writer, owners_from_sites
from calib.load import Checkpoint, model_from_checkpoint
from calib.observe import HessianSink, observe
from calib.stats import Stats, read_stats, write_stats
from calib.stream import LoadModel
from fptq_export.errors import UserError
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites
from tests.support.checkpoints import CountingProgress

LAYERS, WINDOWS, SEQ = 2, 6, 16


def random_tokens(seed: int = 0, size: int = WINDOWS) -> TokenBatches:
    return token_batches(CalibrationOptions(dataset="random", size=size, seq=SEQ, seed=seed), None, 512)


@pytest.fixture
def model(llama: Checkpoint) -> Any:
    return model_from_checkpoint(llama, torch.float32)


def again(model: Any) -> LoadModel:
    """Open a model in memory as a file is opened: anew with each call."""
    return lambda: copy.deepcopy(model)


@pytest.fixture(scope="session")
def paths(sites: Sites) -> list[str]:
    return [linear.path for linear in sites.linears if linear.path != "lm_head"]


def same(first: Stats, second: Stats) -> bool:
    return all(np.array_equal(first.channel_absmax[path], second.channel_absmax[path]) for path in first.channel_absmax)


def test_maxima_are_those_of_every_input_seen(model: Any, paths: list[str]) -> None:
    """Bit for bit the largest |x| of each channel, taken from a record of every input."""
    batches = random_tokens()
    record: dict[str, list[NDArray[np.float32]]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, inputs, path=path: record[path].append(inputs[0].numpy().copy())
        )
        for path in paths
    ]
    with torch.inference_mode():
        for ids in torch.from_numpy(batches.tokens).split(2):
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    stats = observe(again(model), batches, paths, NoProgress(), batch_size=2)
    assert list(stats.channel_absmax) == paths
    assert stats.tokens == WINDOWS * SEQ
    for path in paths:
        inputs = np.concatenate([x.reshape(-1, x.shape[-1]) for x in record[path]])
        assert stats.channel_absmax[path].dtype == np.float32
        assert np.array_equal(stats.channel_absmax[path], np.abs(inputs).max(axis=0)), path


def test_negative_extremes_count(model: Any, paths: list[str]) -> None:
    """A channel whose largest magnitude is negative is not missed: negating the embedding's norm changes nothing."""
    stats = observe(again(model), random_tokens(), paths[:3], NoProgress(), batch_size=1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.neg_()
    assert same(stats, observe(again(model), random_tokens(), paths[:3], NoProgress(), batch_size=1))


def test_merging_two_runs_is_one_run_over_both(model: Any, paths: list[str]) -> None:
    """Max of maxima: statistics of two halves merge to those of the whole, in either order."""
    whole = random_tokens()
    halves = [TokenBatches(tokens, "half", "") for tokens in np.split(whole.tokens, 2)]
    first, second = (observe(again(model), half, paths, NoProgress(), batch_size=1) for half in halves)
    together = observe(again(model), whole, paths, NoProgress(), batch_size=1)
    assert same(first.merge(second), together)
    assert same(second.merge(first), together)
    assert first.merge(second).tokens == together.tokens
    assert not same(first, together)


def test_shared_inputs_are_reduced_once(model: Any, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v read one tensor, gate and up another: four reductions a layer and pass, not seven."""
    calls = 0
    reduce = calib.observe._channel_absmax

    def counting(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return reduce(x)

    monkeypatch.setattr(calib.observe, "_channel_absmax", counting)
    observe(again(model), random_tokens(), paths, NoProgress(), batch_size=WINDOWS)
    assert calls == 4 * LAYERS


def test_head_does_not_run_unless_it_is_observed(model: Any, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The head costs a quarter of a small model: it runs only when its input is asked for."""
    ran: list[int] = []
    forward = nn.Linear.forward

    def counting(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if linear.out_features == 512:
            ran.append(len(x))
        return forward(linear, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    observe(again(model), random_tokens(), paths, NoProgress())
    assert ran == []
    stats = observe(again(model), random_tokens(), [*paths, "lm_head"], NoProgress(), batch_size=WINDOWS)
    assert sum(ran) > 0
    assert stats.channel_absmax["lm_head"].shape == (64,)


def test_progress_counts_tokens(model: Any, paths: list[str]) -> None:
    """The bar ends where it said it would, after all blocks, also when the last batch is smaller."""
    progress = CountingProgress()
    observe(again(model), random_tokens(), paths, progress, batch_size=4)
    assert progress.done == progress.totals == {"calibrate": WINDOWS * SEQ * LAYERS}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activation_that_is_not_finite_names_its_layer(model: Any, paths: list[str], value: float) -> None:
    """A NaN or Inf stops calibration at the first linear that reads it."""
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[5] = value
    with pytest.raises(UserError, match="NaN or Inf") as error:
        observe(again(model), random_tokens(), paths, NoProgress())
    assert error.value.where == "layer model.layers.1.mlp.gate_proj"


def test_linear_that_never_runs_is_refused(model: Any, paths: list[str]) -> None:
    """A linear without an input has no range: it is named rather than given zeros."""
    model.model.unused = nn.Linear(64, 64)
    with pytest.raises(UserError, match="never ran") as error:
        observe(again(model), random_tokens(), [*paths, "model.unused"], NoProgress())
    assert error.value.where == "layer model.unused"


def test_statistics_of_different_models_do_not_merge() -> None:
    """Other layers or other shapes are refused, with the layer that differs."""
    stats = Stats({"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}, 1, "x")
    for other in ({"a": np.ones(4, np.float32)}, {**stats.channel_absmax, "b": np.ones(8, np.float32)}):
        with pytest.raises(UserError, match="layer b"):
            stats.merge(Stats(other, 1, "y"))


def test_statistics_are_read_back_equal(tmp_path: Path) -> None:
    """File and memory agree, and equal statistics give equal bytes."""
    stats = Stats({"b.c": np.array([1.5, 0.0], np.float32), "a": np.array([3e38], np.float32)}, 7, "two words, ü")
    for name in ("first", "second"):
        write_stats(stats, tmp_path / name)
    again = read_stats(tmp_path / "first")
    assert same(stats, again)
    assert again.channel_absmax.keys() == stats.channel_absmax.keys()
    assert (again.tokens, again.description) == (stats.tokens, stats.description)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


@pytest.mark.parametrize("kind", ["missing", "empty", "cut off", "other tensors", "other version"])
def test_file_that_is_no_statistics_is_refused(tmp_path: Path, kind: str) -> None:
    """Whatever is wrong with the file, one error names it and the way back."""
    path = tmp_path / "stats.safetensors"
    write_stats(Stats({"a": np.ones(4, np.float32)}, 1, "x"), path)
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "other tensors":
        save_file({"a": np.ones(4, np.float32)}, path)
    else:
        path.write_bytes(path.read_bytes().replace(b'schema_version\\":1', b'schema_version\\":9'))
    with pytest.raises(UserError, match="calibrat") as error:
        read_stats(path)
    assert error.value.where == str(path)


def test_unobserved_layer_has_no_range() -> None:
    """Asking for a layer that was not observed is an error, not zero."""
    with pytest.raises(UserError, match="layer b"):
        Stats({"a": np.ones(4, np.float32)}, 1, "x").absmax("b")


def test_hessian_is_the_second_moment_of_the_input(model: Any, sites: Sites, paths: list[str], tmp_path: Path) -> None:
    """Mean over all tokens of x x^T, in every batch and for every linear, against float64 over recorded inputs."""
    batches = random_tokens()
    record: dict[str, list[NDArray[np.float64]]] = {path: [] for path in paths}
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, inputs, path=path: record[path].append(
                inputs[0].double().numpy().reshape(-1, inputs[0].shape[-1])
            )
        )
    with torch.inference_mode():
        for ids in torch.from_numpy(batches.tokens).split(2):
            model(input_ids=ids)
    for path in paths:
        model.get_submodule(path)._forward_pre_hooks.clear()
    owners = owners_from_sites(sites, paths)
    sizes = {owner: sites.linear(owner).in_features for owner in dict.fromkeys(owners.values())}
    with hessian_writer(tmp_path / "hessians.safetensors", sizes) as write:
        observe(again(model), batches, paths, NoProgress(), 2, HessianSink(owners, write))
    assert len(sizes) == 4 * LAYERS
    stored = Hessians(tmp_path / "hessians.safetensors", sites)
    for path in paths:
        x = np.concatenate(record[path])
        assert len(x) == batches.count
        # A float32 sum of n terms, each a rounded product: (n + 1) half ulps of the sum of magnitudes (Higham 3.1).
        bound = (len(x) + 2) * 2.0**-24 * (np.abs(x).T @ np.abs(x)) / len(x)
        assert (np.abs(stored.read(path).numpy() - x.T @ x / len(x)) <= bound).all(), path


def test_a_block_is_gone_before_the_next_one_is_loaded(model: Any, paths: list[str]) -> None:
    """Two blocks in float32 at once would double the peak of a calibration."""
    loaded: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []

    def load() -> Any:
        alive.append(sum(reference() is not None for reference in loaded))
        again = copy.deepcopy(model)
        loaded.extend(weakref.ref(block) for block in again.model.layers)
        return again

    observe(load, random_tokens(), paths, NoProgress())
    # While the first pass records, the model it runs on is alive, its blocks emptied.
    recording = alive.index(LAYERS)
    assert [count for index, count in enumerate(alive) if index != recording] == [0] * (len(alive) - 1)
