"""Engine of a run: lowering, optimization profile, build, and the proof of its precision."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

from fptq_export.build.engine import BuildReport, BuildRequest, build_engine, expected_from_request
from fptq_export.build.engine_facts import EngineFacts, PluginFacts, ranges_from_profiles
from fptq_export.build.gpus import driver_of_machine
from fptq_export.build.int8_convolutions import Int8Convolution
from fptq_export.build.memory_pools import mem_pools_from_option
from fptq_export.build.profiles import (
    ExplicitShapes,
    LlmLimits,
    Profile,
    inputs_from_onnx,
    profile_for_inputs,
    shapes_from_option,
)
from fptq_export.build.proof import Proof, proof_from_layers
from fptq_export.build.targets import Target
from fptq_export.files import PARTIAL_SUFFIX, sha256_from_file, write_json_model
from fptq_export.options import RunOptions
from fptq_export.packing import padded_shape
from fptq_export.pipeline.plugin import check_signed_scales, plugin_libraries
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.task_options import check_cache, check_length
from fptq_export.plugin import plugin_info
from fptq_export.policy import LayerPolicy, Policy, read_policy
from fptq_export.progress import Progress
from fptq_export.rewrite import Lowered, lower_for_plugin, lower_for_tensorrt
from fptq_export.sites import Sites, read_sites

__all__ = ["build", "check_profile"]


def build(
    directory: RunDirectory, engine: Path, target: Target, options: RunOptions, progress: Progress
) -> dict[str, Any]:
    """Build the engine of `model.w4a8.onnx`; it gets its name only after its layers matched the policy."""
    policy = read_policy(directory.policy)
    check_signed_scales(policy, options)
    int4 = {path: layer for path, layer in policy.quantized().items() if layer.precision != "w8a8"}
    int8 = {path: layer for path, layer in policy.quantized().items() if layer.precision == "w8a8"}
    sites = read_sites(directory.sites)
    libraries = plugin_libraries(options, target)
    # Packed weights are a copy: it goes where the run has room, under a name that is cleaned up after a kill.
    with tempfile.TemporaryDirectory(dir=directory.path, prefix=".lowered", suffix=PARTIAL_SUFFIX) as scratch:
        graph = Path(scratch) / "lowered.onnx"
        lower = _lower if libraries else _lower_natively
        lowered = lower(directory.w4a8, graph, options)
        profile = _profile(graph, sites, options)
        request = BuildRequest(
            onnx_path=graph,
            weights_dir=graph.parent if libraries else directory.path,
            engine_path=engine,
            log_path=directory.build_log,
            target=target,
            quantized=_int4_codes(int4, lowered),
            int8={path: layer.in_features * layer.out_features for path, layer in int8.items()},
            convolutions=_int8_convolutions(policy, sites, lowered),
            profiles=(profile,) if profile is not None else (),
            compute_capabilities=options.compute_capability if target is Target.TENSORRT_RTX else (),
            optimization_level=options.builder_optimization_level,
            memory_pools=mem_pools_from_option(options.mem_pool_size or ""),
            plugin=lowered.plugin,
            fused=lowered.fused,
            plugin_library=next(iter(libraries), None),
            # Nothing is carried for an engine without a layer that needs it.
            embed_plugin=options.embed_plugin and bool(lowered.plugin),
        )
        report = build_engine(request, progress)
    proof = _proof(report, request, policy, sites, directory)
    write_json_model(proof, directory.proof)
    return _summary(report, lowered, policy, proof)


def _proof(report: BuildReport, request: BuildRequest, policy: Policy, sites: Sites, directory: RunDirectory) -> Proof:
    """Every entry of the policy, matched to the layers of the engine that was just published."""
    return proof_from_layers(
        report.layers,
        expected_from_request(request),
        policy,
        {item.path: item.node for item in sites.linears} | {item.path: item.node for item in sites.convolutions},
        source=directory.build_log.name,
        policy_sha256=sha256_from_file(directory.policy),
        engine=_facts(report, request),
    )


def _facts(report: BuildReport, request: BuildRequest) -> EngineFacts:
    return EngineFacts(
        target=str(report.target),
        library_version=report.library_version,
        compute_capabilities=report.compute_capabilities or _gpu_of_build(report.target),
        profiles=ranges_from_profiles(request.profiles),
        plugin_layers=report.precision.plugin_layers,
        plugin=_plugin_facts(request) if report.precision.plugin_layers else None,
    )


def _gpu_of_build(target: Target) -> tuple[str, ...]:
    """TensorRT builds for the first GPU of the machine, and says nothing about it."""
    gpus = driver_of_machine().gpus if target is Target.TENSORRT else ()
    return tuple(gpu.compute_capability for gpu in gpus[:1])


def _plugin_facts(request: BuildRequest) -> PluginFacts | None:
    library = request.plugin_library
    if library is None:
        return None
    info = plugin_info(library)
    return PluginFacts(
        version=info.version,
        layout_version=info.layout_version,
        architectures=info.architectures,
        tensorrt_headers=info.tensorrt_headers,
        sha256=sha256_from_file(library),
        embedded=request.embed_plugin,
    )


def _summary(report: BuildReport, lowered: Lowered, policy: Policy, proof: Proof) -> dict[str, Any]:
    """Figures of a build for the manifest and the table at the end."""
    quantized = policy.quantized().values()
    return {
        "engine": proof.engine.model_dump(mode="json"),
        "verdicts": proof.verdicts(),
        "target": str(report.target),
        "library_version": report.library_version,
        "compute_capabilities": report.compute_capabilities,
        "engine_layers": len(report.layers),
        "layers_by_type": report.precision.layers_by_type,
        "quantized_linears": report.precision.quantized_linears,
        "int8_linears": sum(layer.precision == "w8a8" for layer in quantized),
        "int8_convolutions": len(policy.quantized_convolutions()),
        "float_convolutions": report.float_convolutions,
        "int4_constants": report.precision.int4_constants,
        "unfused": report.precision.unfused,
        "plugin_layers": report.precision.plugin_layers,
        "plugin_linears": report.precision.plugin_linears,
        "not_in_plugin": lowered.left_alone,
        "warnings": report.warnings,
    }


def _lower(w4a8: Path, graph: Path, options: RunOptions) -> Lowered:
    return lower_for_plugin(w4a8, graph, _cache_length(options), fuse_projections=options.fuse_projections)


def _lower_natively(w4a8: Path, graph: Path, options: RunOptions) -> Lowered:
    return lower_for_tensorrt(w4a8, graph, _cache_length(options))


def _cache_length(options: RunOptions) -> int:
    """Slots of a static cache: as many tokens as the growing cache may have after a call."""
    return options.max_kv_len + options.max_input_len


def _int8_convolutions(policy: Policy, sites: Sites, lowered: Lowered) -> dict[str, Int8Convolution]:
    """What the layer list must show of each quantized convolution, as it is in the lowered graph."""
    quantized = policy.quantized_convolutions()
    found = {item.path: item for item in sites.convolutions if item.path in quantized}
    return {
        path: Int8Convolution(
            lowered.convolutions.get(path, item.weight_shape),
            transposed=item.op_type == "ConvTranspose" and path not in lowered.convolutions,
        )
        for path, item in found.items()
    }


def _int4_codes(layers: Mapping[str, LayerPolicy], lowered: Lowered) -> dict[str, int]:
    """INT4 codes of each linear of the engine, by path; packed weights are padded to whole tiles.

    Every INT4 layer of the policy is in exactly one of them: alone, or in a fused one.
    """
    fused_path = {path: fused for fused, paths in lowered.fused.items() for path in paths}
    sizes: dict[str, tuple[int, int]] = {}
    for path, layer in layers.items():
        joint = fused_path.get(path, path)
        out_features, _ = sizes.get(joint, (0, 0))
        sizes[joint] = (out_features + layer.out_features, layer.in_features)
    return {path: prod(padded_shape(*size) if path in lowered.plugin else size) for path, size in sizes.items()}


def check_profile(graph: Path, options: RunOptions) -> None:
    """Refuse a graph for whose inputs no optimization profile is known, before anything long starts.

    Raises:
        UserErrors: Names every dimension that nothing is known about.
    """
    _profile(graph, Sites(linears=(), fold_sites=()), options)


def _profile(graph: Path, sites: Sites, options: RunOptions) -> Profile | None:
    texts = {"--minShapes": options.min_shapes, "--optShapes": options.opt_shapes, "--maxShapes": options.max_shapes}
    inputs = inputs_from_onnx(graph)
    if options.max_kv_len != RunOptions.model_fields["max_kv_len"].default:
        check_cache([item.name for item in inputs])
    lengths = (_length(name, sites, options) for name in ("max_input_len", "max_kv_len"))
    limits = LlmLimits(options.max_batch_size, *lengths)
    explicit = ExplicitShapes(*(shapes_from_option(name, text) if text else {} for name, text in texts.items()))
    return profile_for_inputs(inputs, limits, explicit)


def _length(name: Literal["max_input_len", "max_kv_len"], sites: Sites, options: RunOptions) -> int:
    """The limit that was asked for; by default no more than the graph takes."""
    wanted: int = getattr(options, name)
    if sites.max_sequence is not None and wanted == RunOptions.model_fields[name].default:
        return min(wanted, sites.max_sequence)
    check_length(f"--{name.replace('_', '-')}", wanted, sites)
    return wanted
