"""One contender of `bench_calibration` in a process of its own: its figures go into a JSON file.

    python -m tests.bench.calibration_contenders NAME --model DIR --workdir DIR ... --json FILE

The first figure is the time of the imports, so they stand in the functions and this module is light.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["CONTENDERS", "TOKENS_FILE", "Figures", "argument_parser"]

TOKENS_FILE = "tokens.npz"
_SITES_FILE = "sites.json"
_KIBIBYTE = 1024
"""Unit of ru_maxrss on Linux."""


@dataclass(frozen=True)
class Figures:
    """What one run took, from the checkpoint on disk to quantized weights; imports apart."""

    import_seconds: float
    wall_seconds: float
    cpu_seconds: float
    """Of all threads, in user and kernel mode: other work on the machine changes it little."""
    import_peak_bytes: int
    peak_bytes: int
    """Largest resident memory of the process, as the kernel keeps it."""


Run = Callable[[argparse.Namespace], Callable[[], object]]
"""Imports, and gives what is to be timed."""


def prepare(options: argparse.Namespace) -> Callable[[], object]:
    """Write what all contenders share: a float checkpoint, its fold sites, and the calibration tokens."""
    import numpy as np

    from calib.batches import CalibrationOptions, token_batches
    from calib.load import checkpoint_from_model, tokenizer_from_checkpoint
    from fptq_export.progress import NoProgress
    from fptq_export.trace import trace

    def run() -> None:
        options.workdir.mkdir(parents=True, exist_ok=True)
        checkpoint = checkpoint_from_model(
            options.model, workdir=options.workdir, trust_remote_code=False, progress=NoProgress()
        )
        sites = options.workdir / _SITES_FILE
        if not sites.is_file():
            weights = {name: entry.stored for name, entry in checkpoint.tensors.items()}
            trace(checkpoint.config, weights, "fp16", options.workdir / "model.onnx", sites, NoProgress())
        sizes = CalibrationOptions(dataset=options.calib_dataset, size=options.calib_size, seq=options.calib_seq)
        tokenizer = None if options.calib_dataset == "random" else tokenizer_from_checkpoint(checkpoint)
        tokens = token_batches(sizes, tokenizer, checkpoint.config.get_text_config().vocab_size).tokens
        np.savez(options.workdir / TOKENS_FILE, input_ids=tokens)
        (options.workdir / "directory.json").write_text(json.dumps(str(checkpoint.directory)), encoding="utf-8")

    return run


def ours(options: argparse.Namespace, method: Literal["rtn", "gptq"], *, signed: bool) -> Callable[[], object]:
    """Calibration and policy of `fptq-export`, as the command line runs them: both files of each are written."""
    from calib.load import checkpoint_from_directory
    from calib.ranks import ALONE
    from fptq_export.options import RunOptions
    from fptq_export.pipeline.calibration import calibrate, decide, needs_hessians
    from fptq_export.pipeline.run_directory import RunDirectory
    from fptq_export.progress import NoProgress
    from fptq_export.sites import read_sites

    def run() -> None:
        directory = RunDirectory(options.workdir / f"run-{method}")
        directory.path.mkdir(exist_ok=True)
        wanted = RunOptions(
            model=str(_directory(options)),
            output=directory.path,
            group_size=options.group_size,
            weight_method=method,
            signed_scales=signed,
            calib_dataset=str(options.workdir / TOKENS_FILE),
            calib_size=options.calib_size,
            calib_seq=options.calib_seq,
        )
        checkpoint = checkpoint_from_directory(_directory(options), "bench")
        sites = read_sites(options.workdir / _SITES_FILE)
        hessians = directory.hessians if needs_hessians(wanted) else None
        calibrate(checkpoint, sites, wanted, hessians, "bench", ALONE, NoProgress())
        decide(checkpoint, sites, wanted, directory, hessians, NoProgress())

    return run


def modelopt_awq(options: argparse.Namespace, batch_size: int) -> Callable[[], object]:
    """INT4 AWQ of NVIDIA Model Optimizer on the FP32 model, its defaults but for the group size.

    It leaves scales and ranges in the model; codes are made when a checkpoint is exported, which is not timed.
    """
    import copy

    import modelopt.torch.quantization as mtq
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    config: Any = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if entry.get("quantizer_name") == "*weight_quantizer":
            entry["cfg"]["block_sizes"] = {-1: options.group_size, "type": "static"}

    def run() -> None:
        model = AutoModelForCausalLM.from_pretrained(_directory(options), dtype=torch.float32).eval()
        with np.load(options.workdir / TOKENS_FILE) as arrays:
            tokens = torch.from_numpy(arrays["input_ids"])

        def forward_loop(module: Callable[..., Any]) -> None:
            with torch.inference_mode():
                for ids in tokens.split(batch_size):
                    module(input_ids=ids, use_cache=False)

        mtq.quantize(model, config, forward_loop)

    return run


CONTENDERS: dict[str, Run] = {
    "prepare": prepare,
    "ours rtn": lambda options: ours(options, "rtn", signed=False),
    "ours gptq, signed scales": lambda options: ours(options, "gptq", signed=True),
    "ModelOpt INT4 AWQ, batch 4": lambda options: modelopt_awq(options, 4),
    "ModelOpt INT4 AWQ, batch 1": lambda options: modelopt_awq(options, 1),
}
"""`prepare` comes first; 4 windows a batch is what ours chooses for windows of 512 tokens."""


def argument_parser() -> argparse.ArgumentParser:
    """Options that the bench hands on to its contenders."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--workdir", type=Path, default=Path("work"), help="kept between runs (default: work)")
    parser.add_argument("--calib-dataset", default="builtin", help="as fptq-export takes it (default: builtin)")
    parser.add_argument("--calib-size", type=int, default=64, help="windows (default: 64)")
    parser.add_argument("--calib-seq", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--group-size", type=int, default=64, help="input channels a weight scale (default: 64)")
    parser.add_argument("--threads", type=int, default=2, help="of every contender (default: 2)")
    return parser


def measured(run: Run, options: argparse.Namespace) -> Figures:
    """Run one contender once; the process must be new."""
    start = time.perf_counter()
    import torch

    torch.set_num_threads(options.threads)
    timed = run(options)
    import_peak, imported, cpu = _peak_bytes(), time.perf_counter(), time.process_time()
    timed()
    end = time.perf_counter()
    return Figures(imported - start, end - imported, time.process_time() - cpu, import_peak, _peak_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, parents=[argument_parser()])
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    figures = measured(CONTENDERS[options.name], options)
    options.json.write_text(json.dumps(asdict(figures)), encoding="utf-8")
    return 0


def _directory(options: argparse.Namespace) -> Path:
    return Path(json.loads((options.workdir / "directory.json").read_text(encoding="utf-8")))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE


if __name__ == "__main__":
    sys.exit(main())
