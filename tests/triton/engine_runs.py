"""Runs with an engine for Triton's TensorRT backend: none is built here, so the manifest tells of one that was."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, Literal

from fptq_export.build.engine_facts import InputRange, ranges_from_profiles
from fptq_export.build.profiles import LlmLimits, inputs_from_graph, profile_for_inputs
from fptq_export.cli import main
from fptq_export.graph_io import load_graph
from fptq_export.rewrite.fix_cache_length import FixCacheLength
from fptq_export.triton.protobuf import config_from_text, text_from_config

__all__ = ["LIMITS", "engine_run", "stand_in"]

LIMITS = LlmLimits(max_batch_size=4, max_input_len=32, max_kv_len=64)
_MANIFEST = "manifest.json"
_SLOTS = LIMITS.max_kv_len + LIMITS.max_input_len


def engine_run(
    finished_run: Path, target: Path, kv_cache: Literal["concat", "static"], *words: str, **facts: Any
) -> Path:
    """A copy of the finished run that says its engine was built by TensorRT, with profiles for `LIMITS`.

    Args:
        finished_run: The finished run of the tiny LLaMA.
        target: Where the copy goes.
        kv_cache: `static` rewrites the graph.
        words: Options of `rewrite`.
        facts: What else the manifest says of the engine.
    """
    shutil.copytree(finished_run / "run", target)
    shutil.copy(finished_run / "out.plan", target)
    stage = json.loads((target / _MANIFEST).read_text(encoding="utf-8"))["stages"]["build"]
    if kv_cache == "static" or words:
        assert main(["rewrite", str(target), "--kv-cache", kv_cache, *words]) == 0
        logging.disable(logging.NOTSET)
    profiles = [[item.model_dump(mode="json") for item in profile] for profile in _profiles(target)]
    engine = {"target": "tensorrt", "library_version": "10.16.0", "compute_capabilities": ["8.9"], "profiles": profiles}
    stage["summary"]["engine"] |= engine | facts
    for record in stage["outputs"]:
        record["path"] = Path(record["path"]).name
    manifest = json.loads((target / _MANIFEST).read_text(encoding="utf-8"))
    manifest["stages"]["build"] = stage
    (target / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return target


def stand_in(model: Path, run: Path) -> None:
    """Put ONNX Runtime in the engine's place; everything else of the config stays, so the server checks it."""
    path = model / "config.pbtxt"
    config = config_from_text(path.read_text(encoding="utf-8"), str(path))
    config.platform, config.backend, config.default_model_filename = "", "python", ""
    config.instance_group[0].kind = config.instance_group[0].KIND_CPU
    config.optimization.ClearField("cuda")
    states = {state.input_name: list(state.dims) for state in config.sequence_batching.state}
    if states:
        del config.sequence_batching.state[:]
        del config.model_warmup[:]
    config.parameters["states"].string_value = json.dumps(states)
    path.write_text(text_from_config(config), encoding="utf-8")
    version = model / "1"
    (version / "model.plan").unlink()
    shutil.copy(Path(__file__).parent / "plan_double.py", version / "model.py")
    for name in ("model.w4a8.onnx", "model.w4a8.onnx.data"):
        shutil.copy(run / name, version)


def _profiles(run: Path) -> tuple[tuple[InputRange, ...], ...]:
    model = load_graph(run / "model.w4a8.onnx")
    FixCacheLength(_SLOTS)(model)
    profile = profile_for_inputs(inputs_from_graph(model.graph, "graph"), LIMITS)
    assert profile is not None
    return ranges_from_profiles((profile,))
