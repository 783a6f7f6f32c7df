"""`--logits`: what the caller of the written graphs sees, from an earlier run on."""

from __future__ import annotations

from pathlib import Path

import onnx

from fptq_export.files import read_json_model
from fptq_export.verify.report import VerifyReport
from tests.pipeline.conftest import Command


def report_of(run: Path) -> VerifyReport:
    """What the run measured."""
    return read_json_model(run / "verify.json", VerifyReport)


def test_the_last_token_is_proven_on_the_form_with_all(run_copy: Path, command: Command) -> None:
    """No figure is lost: those of the form with all logits are the earlier run's, and the file's rows are its rows."""
    before = report_of(run_copy)
    assert command("rewrite", run_copy, "--logits", "last").code == 0
    outcome = command("verify", run_copy)
    assert outcome.code == 0, outcome.err
    graph = onnx.load(run_copy / "model.w4a8.onnx", load_external_data=False).graph
    assert [dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim][1] == 1
    after = report_of(run_copy)
    assert before.last_token is None
    assert after.last_token is not None
    assert after.last_token.within_bound
    assert after.model_dump(exclude={"last_token"}) == before.model_dump(exclude={"last_token"})
