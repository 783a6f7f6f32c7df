"""Engines of the tiny LLaMA in every form, texts for them, and runs of a session over a text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fptq_export.build.engine_facts import EngineFacts, PluginFacts
from fptq_export.build.profiles import LlmLimits
from fptq_export.rewrite.graph_form import GraphForm

__all__ = ["FORMS", "LIMITS", "PROMPT", "SLOTS", "STEPS", "VOCABULARY", "logits_of", "manifest", "tokens"]

LIMITS = LlmLimits(max_batch_size=2, max_input_len=16, max_kv_len=24)
SLOTS = LIMITS.max_kv_len + LIMITS.max_input_len
FORMS = {
    "concat": GraphForm(),
    "last": GraphForm(logits="last"),
    "int8": GraphForm(kv_dtype="int8"),
    "static": GraphForm(kv_cache="static"),
    "static-last": GraphForm(kv_cache="static", logits="last"),
}
PROMPT, STEPS = 6, 4
VOCABULARY = 512


def manifest(*, plugin_layers: int = 0, embedded: bool = False) -> Any:
    """As much of a manifest as is read.

    Args:
        plugin_layers: Layers of the engine that run in the plugin.
        embedded: Whether the engine carries it.
    """
    plugin = PluginFacts(
        version="1", layout_version=1, architectures=(89,), tensorrt_headers="10.14", sha256="", embedded=embedded
    )
    facts = EngineFacts(
        target="tensorrt-rtx",
        library_version="1.7.1.116",
        compute_capabilities=("8.9",),
        plugin_layers=plugin_layers,
        plugin=plugin if plugin_layers else None,
    )
    build = SimpleNamespace(summary={"engine": facts.model_dump(mode="json")})
    return SimpleNamespace(options=SimpleNamespace(logits="all"), stages={"build": build})


def tokens(batch: int = 1, count: int = PROMPT + STEPS) -> NDArray[np.int64]:
    """Random text, [batch, count]."""
    return np.random.default_rng(batch).integers(0, VOCABULARY, (batch, count))


def logits_of(session: Any, ids: NDArray[np.int64], prompt: int = PROMPT) -> list[NDArray[np.float32]]:
    """Logits of a prompt, and of each token behind it."""
    logits, cache = session.prefill(ids[:, :prompt])
    found = [logits]
    for token in ids[:, prompt:].T:
        logits, cache = session.decode(token[:, None], cache)
        found.append(logits)
    return found
