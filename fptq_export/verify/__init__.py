"""Verify: the float model against its quantized graph -> `verify.json`."""

from __future__ import annotations

from fptq_export.verify.compare import compare_sessions
from fptq_export.verify.decode import CacheBound, prove_cache
from fptq_export.verify.perplexity import windows_from_ids
from fptq_export.verify.polygraphy_diff import diff_sessions
from fptq_export.verify.report import VerifyReport, gate, gate_cache, ratio_from_option
from fptq_export.verify.sessions import CausalSession, OnnxCausalSession

__all__ = [
    "CacheBound",
    "CausalSession",
    "OnnxCausalSession",
    "VerifyReport",
    "compare_sessions",
    "diff_sessions",
    "gate",
    "gate_cache",
    "prove_cache",
    "ratio_from_option",
    "windows_from_ids",
]
