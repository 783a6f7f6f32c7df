"""TensorRT for RTX builds the W4A8 graph of every family, without a GPU, and its layers are those of the policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from fptq_export.build.engine import BuildRequest, build_engine
from fptq_export.build.profiles import LlmLimits, inputs_from_onnx, profile_for_inputs
from fptq_export.build.targets import Target
from fptq_export.files import read_json_model
from fptq_export.package.manifest import Manifest
from fptq_export.progress import NoProgress
from fptq_export.sites import read_sites
from tests.families.conftest import Quantize
from tests.families.registry import DECODERS, ENCODERS, Family
from tests.families.support_table import Record

_LIMITS = LlmLimits(max_batch_size=2, max_input_len=16, max_kv_len=16)


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.key)
def test_engine_is_built_with_every_linear_in_int4(
    family: Family, quantize: Quantize, record: Record, tmp_path: Path
) -> None:
    """Each linear of the policy is found in the engine's layer list with its INT4 codes."""
    with record.cell(family, "engine") as cell:
        rewritten = quantize(family)
        profile = profile_for_inputs(inputs_from_onnx(rewritten.lowered), _LIMITS)
        assert profile is not None
        layers = rewritten.policy.quantized()
        request = BuildRequest(
            onnx_path=rewritten.lowered,
            weights_dir=rewritten.lowered.parent,
            engine_path=tmp_path / "out.plan",
            log_path=tmp_path / "build.log",
            target=Target.TENSORRT_RTX,
            quantized={path: layer.in_features * layer.out_features for path, layer in layers.items()},
            profiles=(profile,),
            compute_capabilities=("8.9",),
            optimization_level=0,
        )
        report = build_engine(request, NoProgress())
        assert report.precision.quantized_linears == len(layers)
        assert request.engine_path.stat().st_size > 0
        cell.text = "built"


@pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.key)
def test_engine_of_the_road_holds_every_linear_in_int4(
    family: Family, request: pytest.FixtureRequest, record: Record
) -> None:
    """The engine that the road built, compared with its policy there, has every linear of the graph."""
    with record.cell(family, "engine") as cell:
        finished: Path = request.getfixturevalue(str(family.run))
        build = read_json_model(finished / "manifest.json", Manifest).stages["build"].summary
        assert build["quantized_linears"] == len(read_sites(finished / "sites.json").linears)
        assert build["verdicts"]["proven"] == build["quantized_linears"]
        assert set(build["verdicts"]) <= {"proven", "not_shown"}  # ESM-2 has a linear that its graph does without
        assert (finished.parent / "out.plan").stat().st_size > 0
        cell.text = "built"
