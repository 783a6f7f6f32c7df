"""Memory of calibration and policy does not grow with the number of layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from calib.batches import CalibrationOptions, token_batches
from calib.decide import PolicyOptions, decide_policy
from calib.load import checkpoint_from_directory, model_from_checkpoint, stored_dtype
from calib.observe import observe
from fptq_export.policy import write_policy
from fptq_export.progress import NoProgress
from tests.bench.random_llama import LlamaShape, write_random_llama
from tests.support.checkpoints import llama_sites
from tests.support.process_memory import PeakAnonymous

FEW, MANY = 2, 14
HIDDEN, INTERMEDIATE = 512, 1376
BLOCK_BYTES = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
"""One decoder block in float32: 12.6 MB."""
ALLOWED_BYTES = 2 * BLOCK_BYTES
"""Both runs hold one block; the heap may keep one more, freed or not yet taken in the run with few layers. A run that
kept its layers would grow by MANY - FEW = 12 blocks in float32, or 6 in the BF16 of the checkpoint."""


def peak_bytes(directory: Path, layers: int) -> int:
    """Peak anonymous memory of calibration and policy of a random model."""
    model = directory / str(layers)
    write_random_llama(model, LlamaShape(layers, HIDDEN, INTERMEDIATE, heads=8, vocab=256))
    with PeakAnonymous() as peak:
        checkpoint = checkpoint_from_directory(model, "random")
        sites = llama_sites(checkpoint)
        tokens = token_batches(CalibrationOptions(dataset="random", size=2, seq=8), None, 256)
        linears = [linear.path for linear in sites.linears if linear.path != "lm_head"]
        dtype = stored_dtype(checkpoint)
        stats = observe(lambda: model_from_checkpoint(checkpoint, dtype), tokens, linears, NoProgress())
        policy, arrays = decide_policy(sites, stats, checkpoint, PolicyOptions(), NoProgress())
        write_policy(policy, arrays, model / "policy.json")
    return peak.bytes


def test_peak_is_flat_in_the_number_of_layers(tmp_path: Path) -> None:
    """Twelve more layers cost less than two: what a block needed is given back before the next one comes."""
    # Freed blocks go back to the system at once, so that the heap of the process adds no noise.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.calib.test_streaming_memory", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout.splitlines()[-1])
    assert few > BLOCK_BYTES
    assert many - few < ALLOWED_BYTES


if __name__ == "__main__":
    peak_bytes(Path(sys.argv[1]), 1)  # imports and first calls
    sys.stdout.write(json.dumps([peak_bytes(Path(sys.argv[1]), layers) for layers in (FEW, MANY)]))
