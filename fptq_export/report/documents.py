"""What a run directory holds: every file is read through its own schema, and may be absent."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fptq_export.build.proof import Proof
from fptq_export.debug.report import DebugReport
from fptq_export.diff.report import DiffReport
from fptq_export.evaluate.report import EvalReport
from fptq_export.files import read_json_model
from fptq_export.package.manifest import Manifest, manifest_of_run
from fptq_export.pipeline.onnx_options import is_onnx_model
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.policy import Policy, PolicyArrays, arrays_path, read_policy
from fptq_export.roofline.measured import CostTable, read_cost_table
from fptq_export.sites import Sites, read_sites
from fptq_export.tasks import is_half
from fptq_export.verify.encoder_report import EncoderReport, report_from_file
from fptq_export.verify.graph_report import GraphReport
from fptq_export.verify.report import VerifyReport

if TYPE_CHECKING:
    from calib.auto.report import AutoReport

__all__ = ["RunDocuments", "read_documents"]

Verified = VerifyReport | EncoderReport | GraphReport
DocumentT = TypeVar("DocumentT")


@dataclass(frozen=True)
class RunDocuments:
    """The documents of one run; None where a file is not there."""

    directory: Path
    manifest: Manifest
    sites: Sites | None = None
    policy: Policy | None = None
    arrays: PolicyArrays | None = None
    verified: Verified | None = None
    evaluated: EvalReport | None = None
    debugged: DebugReport | None = None
    diffed: DiffReport | None = None
    proof: Proof | None = None
    auto: AutoReport | None = None
    costs: CostTable | None = None
    """Measured decode times, where the user gave some."""

    def command(self, verb: str, *words: str) -> str:
        """`fptq-export VERB DIR ...`, as a shell takes it."""
        return shlex.join(["fptq-export", verb, str(self.directory), *words])

    def command_from_model(self, verb: str) -> str:
        """The same for the verbs that start from the model."""
        return shlex.join(["fptq-export", verb, self.manifest.options.model, "-o", str(self.directory)])

    @property
    def predicts_text(self) -> bool:
        """Whether verbs for language models apply: not to encoders, halves of encoder-decoders and ONNX graphs."""
        other = is_half(self.manifest.options.task) or is_onnx_model(self.manifest.options)
        return not other and (self.verified is None or isinstance(self.verified, VerifyReport))

    @property
    def model_name(self) -> str:
        """Last part of the model's path or hub id."""
        return Path(self.manifest.options.model).name


def read_documents(directory: Path, cost_table: Path | None = None) -> RunDocuments:
    """Read what is there.

    Args:
        directory: A run directory.
        cost_table: Measured decode times; None takes the table that the run was given, if it is still there.

    Raises:
        UserError: It is no run directory, or a file in it cannot be read; names the file.
    """
    manifest = manifest_of_run(directory)
    files = RunDirectory(directory)
    arrays = arrays_path(files.policy)
    given = manifest.options.cost_table
    return RunDocuments(
        directory=directory,
        manifest=manifest,
        sites=_if_there(files.sites, read_sites),
        policy=_if_there(files.policy, read_policy),
        arrays=_if_there(arrays, PolicyArrays),
        verified=_if_there(files.verify, report_from_file),
        evaluated=_if_there(files.eval, lambda path: read_json_model(path, EvalReport)),
        debugged=_if_there(files.debug, lambda path: read_json_model(path, DebugReport)),
        diffed=_if_there(files.diff, lambda path: read_json_model(path, DiffReport)),
        proof=_if_there(files.proof, lambda path: read_json_model(path, Proof)),
        auto=_if_there(files.auto, _read_auto),
        costs=read_cost_table(cost_table) if cost_table else _if_there(given, read_cost_table) if given else None,
    )


def _if_there(path: Path, read: Callable[[Path], DocumentT]) -> DocumentT | None:
    return read(path) if path.is_file() else None


def _read_auto(path: Path) -> AutoReport:
    from calib.auto.report import read_auto_report  # its package loads torch

    return read_auto_report(path)
