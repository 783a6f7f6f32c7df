"""Options of runs whose MODEL is an ONNX graph: each has a meaning there, or is refused."""

from __future__ import annotations

from fptq_export.options import RunOptions
from fptq_export.pipeline.onnx_options import MEANINGLESS


def test_every_option_has_a_meaning_for_graphs_or_none() -> None:
    """A new option is put on one of the two lists on purpose; it is not ignored."""
    used = {
        *("model", "output", "engine", "target", "policy", "v0", "v1", "equalizer", "smoothquant_alpha", "group_size"),
        *("weight_method", "exclude", "precision", "calib_data", "eval_data", "batch_size", "verify", "min_cosine"),
        *("max_batch_size", "max_input_len", "max_kv_len", "min_shapes", "opt_shapes", "max_shapes"),
        *("compute_capability", "builder_optimization_level", "plugin", "fuse_projections", "mem_pool_size", "keep"),
        *("embed_plugin", "emit_range_outputs"),
    }
    assert used | MEANINGLESS.keys() == RunOptions.model_fields.keys()
    assert not used & MEANINGLESS.keys()
