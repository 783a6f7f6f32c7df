"""What `proof.json` says: for every entry of the policy, the engine layer that runs it and both operands."""

from __future__ import annotations

from collections.abc import Iterator

from fptq_export.build.proof import Proof
from fptq_export.report.blocks import Block, Note, Notes, Table, Text
from fptq_export.report.numbers import plural

__all__ = ["proof_blocks"]


def proof_blocks(proof: Proof) -> Iterator[Block]:
    """Verdicts, problems, a row for each layer, and what a layer list cannot show."""
    counted = ", ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in proof.verdicts().items())
    yield Text(f"Read from {proof.source}: {plural(len(proof.layers), 'layer')} of the policy, {counted}.")
    if proof.problems:
        yield Notes(tuple(Note("warning", problem) for problem in proof.problems))
    rows = [
        (
            entry.layer,
            entry.policy,
            entry.weights,
            entry.activation,
            entry.verdict.replace("_", " "),
            ", ".join(entry.engine_layers) or "–",
        )
        for entry in proof.layers
    ]
    titles = ("layer", "policy", "weights", "inputs", "verdict", "engine layers")
    yield Table.of_texts("table-proof-layers", "Every entry of the policy in the engine", titles, rows)
    yield Text("What a layer list cannot show: " + "; ".join(proof.limits) + ".")
