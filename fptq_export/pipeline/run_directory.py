"""Names of the files in a run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fptq_export.errors import UserError

__all__ = ["RunDirectory"]


@dataclass(frozen=True)
class RunDirectory:
    """A run directory: what `-o` names."""

    path: Path

    @property
    def merged(self) -> Path:
        """The model with its adapter merged, a Hugging Face directory; only with `--adapter`."""
        return self.path / "merged"

    @property
    def rotated(self) -> Path:
        """The rotated model, a Hugging Face directory; only with `--rotate`."""
        return self.path / "rotated"

    @property
    def model(self) -> Path:
        """The traced graph in float."""
        return self.path / "model.onnx"

    @property
    def embeddings(self) -> Path:
        """The embedding of every token, where the graph reads embeddings."""
        return self.path / "embeddings.safetensors"

    @property
    def sites(self) -> Path:
        """Linears and fold sites of the graph."""
        return self.path / "sites.json"

    @property
    def stats(self) -> Path:
        """Calibration statistics."""
        return self.path / "stats.safetensors"

    @property
    def hessians(self) -> Path:
        """Second moments of the inputs of linears; written where the weight method needs them."""
        return self.path / "hessians.safetensors"

    @property
    def calibration_state(self) -> Path:
        """What a calibration that is not finished has measured; a folder."""
        return self.path / "calibration-state"

    @property
    def block_state(self) -> Path:
        """Hidden states above the memory limit while weights are quantized block by block; a folder."""
        return self.path / "block-state"

    @property
    def policy(self) -> Path:
        """The readable half of the policy."""
        return self.path / "policy.json"

    @property
    def auto(self) -> Path:
        """What `--policy auto` weighed; written by it alone."""
        return self.path / "auto.json"

    @property
    def pareto(self) -> Path:
        """The same as a picture, where matplotlib is installed."""
        return self.path / "pareto.svg"

    @property
    def qdq(self) -> Path:
        """The graph in standard Q/DQ operators; its weights are those of `w4a8`."""
        return self.path / "model.qdq.onnx"

    @property
    def w4a8(self) -> Path:
        """The graph with one `fptq` node for each quantized linear."""
        return self.path / "model.w4a8.onnx"

    @property
    def range_outputs(self) -> Path:
        """What each row of the output `range_monitor` is; only with `--emit-range-outputs`."""
        return self.path / "range_outputs.json"

    @property
    def verify(self) -> Path:
        """What verification measured."""
        return self.path / "verify.json"

    @property
    def eval(self) -> Path:
        """What `fptq-export eval` measured."""
        return self.path / "eval.json"

    @property
    def diff(self) -> Path:
        """What `fptq-export diff` measured."""
        return self.path / "diff.json"

    @property
    def debug(self) -> Path:
        """What `fptq-export debug` found."""
        return self.path / "debug.json"

    @property
    def activations(self) -> Path:
        """What `fptq-export stats` measured."""
        return self.path / "stats.json"

    @property
    def activations_plot(self) -> Path:
        """The same as a picture, where matplotlib is installed."""
        return self.path / "stats.svg"

    @property
    def monitor(self) -> Path:
        """What `fptq-export monitor` found."""
        return self.path / "monitor.json"

    @property
    def build_log(self) -> Path:
        """TensorRT's verbose log, which the layer check reads."""
        return self.path / "build.log"

    @property
    def proof(self) -> Path:
        """For every entry of the policy, the engine layer that runs it and the precision of both operands."""
        return self.path / "proof.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time; the directory is created.

        Raises:
            UserError: Another run works here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.path / ".lock", blocking=False).acquire()
        except Timeout:
            cause = "another run is working here"
            raise UserError(str(self.path), cause, "wait for it, or choose another -o") from None
        with lock:
            yield
