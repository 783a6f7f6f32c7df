"""Block by block: every block sees what the quantized blocks before it give, and nothing the policy decides changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import calib.sequential
from calib.batches import CalibrationOptions, TokenBatches, token_batches
from calib.decide import PolicyOptions, decide_policy
from calib.fake_quant import apply_policy
from calib.given import Given, GivenWeights
from calib.hessians import hessian_writer, owners_from_sites
from calib.linears import linears_from_model
from calib.load import Checkpoint, checkpoint_from_directory, model_from_checkpoint, skeleton_from_checkpoint
from calib.observe import HessianSink, observe
from calib.sequential import Sequential, sequential_arrays
from calib.stats import Stats
from calib.stream import BlockStream
from fptq_export.errors import UserError
from fptq_export.policy import Policy, SequentialCodes
from fptq_export.progress import NoProgress
from fptq_export.sites import Linear, Sites
from tests.support.checkpoints import CountingProgress, llama_sites

WINDOWS, SEQ, BATCH, BATCH_BYTES = 5, 24, 2, 2 * 24 * 64 * 4
TOKENS = WINDOWS * SEQ
SUM_BOUND = 64 * TOKENS * 2.0**-24
"""Of mean x x^T, relative to its largest element: one float32 sum of 120 products against one in float64, and inputs
that two programs computed with some 64 sums in a row."""

Arrays = dict[str, NDArray[Any]]


def opt_sites(checkpoint: Checkpoint) -> Sites:
    """Every linear of a model with its own input, and no fold site."""
    linears = linears_from_model(skeleton_from_checkpoint(checkpoint))
    shapes = {path: linear.get_parameter("weight").shape for path, linear in linears.items()}
    return Sites(
        linears=tuple(
            Linear(
                path=path, node=path, weight=f"{path}.weight", weight_transposed=False, bias=None,
                in_features=shape[1], out_features=shape[0], input=path, site=None, no_site_reason="none is looked for",
            )
            for path, shape in shapes.items()
        ),
        fold_sites=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def batches() -> TokenBatches:
    return token_batches(CalibrationOptions(dataset="random", size=WINDOWS, seq=SEQ), None, 512)


def plan_of(checkpoint: Checkpoint, batches: TokenBatches, **options: Any) -> Sequential:
    return Sequential(lambda: model_from_checkpoint(checkpoint, torch.float32), batches, BATCH, **options)


@dataclass(frozen=True)
class Measured:
    """A model with its sites and what calibration knows of it."""

    checkpoint: Checkpoint
    sites: Sites
    stats: Stats
    hessians: Path

    def decide(self, plan: Sequential | None, **options: Any) -> tuple[Policy, Arrays]:
        """A policy with tiers of every kind."""
        wanted = PolicyOptions(**{"v0": 2.0, "v1": 3.5, "group_size": 16, "weight_method": "gptq", **options})
        policy, arrays = decide_policy(
            self.sites, self.stats, self.checkpoint, wanted, NoProgress(), self.hessians, plan
        )
        return policy, arrays.read_all()


def measure(checkpoint: Checkpoint, sites: Sites, batches: TokenBatches, hessians: Path) -> Measured:
    paths = [linear.path for linear in sites.linears]
    owners = owners_from_sites(sites, paths)
    sizes = {owner: sites.linear(owner).in_features for owner in owners.values()}
    with hessian_writer(hessians, sizes) as write:
        load = partial(model_from_checkpoint, checkpoint, torch.float32)
        stats = observe(load, batches, paths, NoProgress(), BATCH, HessianSink(owners, write))
    return Measured(checkpoint, sites, stats, hessians)


@pytest.fixture(scope="module")
def measured_llama(llama: Checkpoint, batches: TokenBatches, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(llama, llama_sites(llama), batches, tmp_path_factory.mktemp("llama") / "hessians.safetensors")


@pytest.fixture(scope="module")
def measured_opt(tiny_opt_dir: Path, batches: TokenBatches, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """LayerNorm with bias, linears with bias, a head tied to the embedding."""
    opt = checkpoint_from_directory(tiny_opt_dir, "tiny-opt")
    return measure(opt, opt_sites(opt), batches, tmp_path_factory.mktemp("opt") / "hessians.safetensors")


def second_moments(
    measured: Measured, policy: Policy, arrays: Arrays, quantized: str, batches: TokenBatches
) -> dict[str, NDArray[np.float64]]:
    """Mean x x^T of every linear, float64, in the whole model with the layers quantized that start with `quantized`."""
    model = model_from_checkpoint(measured.checkpoint, torch.float32)
    apply_policy(model, policy, arrays, measured.sites)
    float_model = model_from_checkpoint(measured.checkpoint, torch.float32)
    for path in policy.layers:
        if not path.startswith(quantized):
            model.set_submodule(path, float_model.get_submodule(path))
    moments: dict[str, NDArray[np.float64]] = {}

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double().numpy()
            moments[path] = moments.get(path, 0.0) + x.T @ x / TOKENS

        return hook

    for path in policy.layers:
        model.get_submodule(path).register_forward_pre_hook(watch(path))
    with torch.no_grad():
        for ids in torch.from_numpy(batches.tokens).split(BATCH):
            model(input_ids=ids, use_cache=False)
    return moments


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_blocks_see_inputs_of_the_quantized_blocks_before(
    family: str, request: pytest.FixtureRequest, batches: TokenBatches
) -> None:
    """H of block 0 is the float model's, of block 1 that of a model whose block 0 is quantized, of the head of both."""
    measured: Measured = request.getfixturevalue(f"measured_{family}")
    policy, arrays = measured.decide(None, exclude=())
    assert {layer.activation for layer in policy.layers.values()} >= {"static", "per_token"}
    seen: dict[str, torch.Tensor] = {}

    def quantize(path: str, hessian: torch.Tensor | None) -> Arrays:
        assert hessian is not None
        seen[path] = hessian
        return {name: arrays[name] for name in (f"{path}.weight_codes", f"{path}.weight_scales")}

    plan, progress = plan_of(measured.checkpoint, batches), CountingProgress()
    got = dict(sequential_arrays(policy, measured.sites, arrays, plan, quantize, progress))
    assert got.keys() == {name for name in arrays if ".weight_" in name}
    assert progress.done["quantize weights"] == progress.totals["quantize weights"] == len(seen)
    blocks = "model.layers" if family == "llama" else "model.decoder.layers"
    float_moments = second_moments(measured, policy, arrays, "none", batches)
    for here, before in ((f"{blocks}.0.", "none"), (f"{blocks}.1.", f"{blocks}.0."), ("lm_head", blocks)):
        quantized_before = before != "none"
        expected = second_moments(measured, policy, arrays, before, batches) if quantized_before else float_moments
        apart = []
        for path in (path for path in seen if path.startswith(here)):
            largest = expected[path].max()
            assert np.abs(seen[path].numpy() - expected[path]).max() <= SUM_BOUND * largest, path
            apart.append(float(np.abs(float_moments[path] - expected[path]).max() / largest))
        if quantized_before:
            assert max(apart) > 2 * SUM_BOUND, "quantized blocks must be told from float ones"


def test_decisions_are_those_of_the_float_model(measured_llama: Measured, batches: TokenBatches) -> None:
    """Codes of later blocks change; tiers, scales and equalization do not, and without the option nothing is added."""
    before, plain = measured_llama.decide(None)
    after, codes = measured_llama.decide(plan_of(measured_llama.checkpoint, batches))
    assert "sequential" not in before.model_dump_json()
    entry = SequentialCodes(weight_method="gptq", group_size=16, signed_scales=False)
    assert all(layer.sequential == entry for layer in after.quantized().values())
    cleared = {path: layer.model_copy(update={"sequential": None}) for path, layer in after.layers.items()}
    assert after.model_copy(update={"layers": cleared}) == before
    assert plain.keys() == codes.keys()
    differing = [name for name in plain if not np.array_equal(plain[name], codes[name])]
    assert differing
    assert all(".layers.1." in name and ".weight_" in name for name in differing)


def test_layers_say_whether_their_rounding_was_learned(measured_llama: Measured, batches: TokenBatches) -> None:
    """The head lies outside the blocks, and INT8 weights are rounded as they are."""
    plan = plan_of(measured_llama.checkpoint, batches, reconstruction_steps=12)
    policy, codes = measured_llama.decide(plan, exclude=(), precision=("down_proj$=w8a8",), weight_method="rtn")
    entries = {path: layer.sequential for path, layer in policy.layers.items()}
    steps = {path: None if entry is None else entry.reconstruction_steps for path, entry in entries.items()}
    assert steps.pop("lm_head") == 0
    assert all(count == (None if path.endswith("down_proj") else 12) for path, count in steps.items())
    _, rounded = measured_llama.decide(None, exclude=(), precision=("down_proj$=w8a8",), weight_method="rtn")
    changed = {name.rsplit(".", 1)[0] for name in codes if not np.array_equal(codes[name], rounded[name])}
    assert changed
    assert not any(path.endswith(("down_proj", "lm_head")) for path in changed)


def test_blocks_behind_the_last_quantized_one_do_not_run(
    measured_llama: Measured, batches: TokenBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their outputs are of no use; and a block that stays float is still passed."""
    passed: list[int] = []
    advance = BlockStream.advance

    def watched(stream: BlockStream, index: int, block: nn.Module) -> Iterator[int]:
        passed.append(index)
        return advance(stream, index, block)

    monkeypatch.setattr(BlockStream, "advance", watched)
    plan = plan_of(measured_llama.checkpoint, batches, reconstruction_steps=1)
    measured_llama.decide(plan, exclude=("layers.1", "lm_head"))
    assert passed == [0, 0]
    passed.clear()
    measured_llama.decide(plan, exclude=("layers.0", "lm_head"))
    assert passed == [0, 0, 1, 1]


def test_limit_of_memory_changes_no_bit(measured_llama: Measured, batches: TokenBatches, tmp_path: Path) -> None:
    """Hidden states on disk are those in memory, for both models; what a killed run left is not read; nothing stays."""
    spill = tmp_path / "spill"
    (spill / "quantized" / "after-1").mkdir(parents=True)
    (spill / "quantized" / "after-1" / "hidden-0.safetensors").write_text("of a run that was killed")
    plan = plan_of(measured_llama.checkpoint, batches, reconstruction_steps=2)
    _, free = measured_llama.decide(plan)
    _, codes = measured_llama.decide(replace(plan, max_memory=BATCH_BYTES, spill=spill))
    assert all(np.array_equal(free[name], codes[name]) for name in free)
    assert not spill.exists()


def test_a_linear_that_no_token_reaches_is_refused(
    measured_llama: Measured, batches: TokenBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert may be routed around once the router's input is quantized: no statistics must not become zeros."""

    def nothing(*_arguments: object) -> Mapping[str, torch.Tensor]:
        return {}

    monkeypatch.setattr(calib.sequential, "hessians_of_block", nothing)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn.* no token"):
        measured_llama.decide(plan_of(measured_llama.checkpoint, batches))


def test_model_with_codes_is_refused(measured_llama: Measured, batches: TokenBatches, tmp_path: Path) -> None:
    """Given codes are kept bit for bit: there is nothing to quantize in any order."""
    given = GivenWeights(Given(format="gptq", sources={}, layers={}), tmp_path / "given.safetensors")
    quantized = replace(measured_llama, checkpoint=replace(measured_llama.checkpoint, given=given))
    with pytest.raises(UserError, match=r"--sequential.*gptq checkpoint"):
        quantized.decide(plan_of(measured_llama.checkpoint, batches))
