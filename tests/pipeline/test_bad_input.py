"""Bad input: one clear error with exit code 1, no traceback, before any long work, and nothing is lost."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pipeline.conftest import SMALL, Command, Outcome

Damage = Callable[[Path], object]


def assert_user_error(outcome: Outcome, *fragments: str) -> None:
    """Exit code 1, one error with a next step, every fragment in it, no traceback."""
    assert outcome.code == 1, outcome.err
    assert outcome.err.count("error: ") == 1
    assert "->" in outcome.err
    assert "Traceback" not in outcome.err
    for fragment in fragments:
        assert fragment in outcome.err, outcome.err


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weight(directory: Path, name: str, value: float) -> None:
    """Overwrite one number of a weight."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})


def remove_tokenizer(directory: Path) -> None:
    """Leave the weights and the config only."""
    for path in directory.glob("tokenizer*"):
        path.unlink()


def truncate(directory: Path) -> None:
    """Cut the weights file in half."""
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WEIGHT = "model.layers.1.mlp.down_proj.weight"
DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "weights missing": (lambda model: (model / "model.safetensors").unlink(), ("model.safetensors",)),
    "weights truncated": (truncate, ("model.safetensors",)),
    "config missing": (lambda model: (model / "config.json").unlink(), ("config.json",)),
    "config not JSON": (lambda model: (model / "config.json").write_text("{"), ("config.json",)),
    "config disagrees": (lambda model: edit_config(model, intermediate_size=96), ("down_proj", "128", "96")),
    "NaN weight": (lambda model: edit_weight(model, WEIGHT, float("nan")), (WEIGHT, "NaN")),
    "infinite weight": (lambda model: edit_weight(model, WEIGHT, float("inf")), (WEIGHT,)),
    "weight too large for FP16": (lambda model: edit_weight(model, WEIGHT, 1e6), (WEIGHT, "bf16")),
    "tokenizer missing": (remove_tokenizer, ("tokenizer",)),
    "encoder-decoder of speech": (
        lambda model: edit_config(
            model, model_type="speech_to_text", architectures=["Speech2TextForConditionalGeneration"]
        ),
        ("config.json", "speech_to_text", "neither text nor windows of mel features"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused_before_any_long_work(
    name: str, tiny_llama_copy: Path, tmp_path: Path, command: Command
) -> None:
    """The error names the file or tensor; no graph was traced."""
    damage, fragments = DAMAGES[name]
    damage(tiny_llama_copy)
    outcome = command(tiny_llama_copy, "-o", tmp_path / "run", *SMALL)
    assert_user_error(outcome, *fragments)
    assert not (tmp_path / "run" / "model.onnx").exists()


def test_no_valid_group_size_is_refused(make_model_dir: Any, tmp_path: Path, command: Command) -> None:
    """A model whose every K is odd times 8 has nothing to quantize, and the error says why."""
    from transformers import LlamaConfig

    model = make_model_dir(
        LlamaConfig(
            hidden_size=40,
            num_hidden_layers=1,
            num_attention_heads=5,
            num_key_value_heads=5,
            intermediate_size=56,
            vocab_size=512,
            tie_word_embeddings=False,
            head_dim=8,
        )
    )
    assert_user_error(command(model, "-o", tmp_path / "run", *SMALL), "group size")


def test_a_model_without_a_linear_to_quantize_is_refused_before_calibration(
    make_model_dir: Any, tmp_path: Path, command: Command
) -> None:
    """An unknown model calls every linear twice: the reason is given, and no statistics are collected."""
    from tests.support.unknown_architecture import UnknownConfig

    model = make_model_dir(UnknownConfig(("called twice",)))
    assert_user_error(command(model, "-o", tmp_path / "run", *SMALL), "no layer can be quantized", "calls it 2 times")
    assert not (tmp_path / "run" / "stats.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "fragment"), [("", "text.txt"), ("too short", "text.txt")], ids=["empty", "shorter than a window"]
)
def test_calibration_text_without_a_window_is_refused(
    content: str,
    fragment: str,
    finished_run: Path,
    tiny_llama_dir: Path,
    run_copy: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    """Empty or too short text stops calibration; what earlier stages wrote stays."""
    text = tmp_path / "text.txt"
    text.write_text(content)
    outcome = command(tiny_llama_dir, "-o", run_copy, "--calib-dataset", text, *SMALL)
    assert_user_error(outcome, fragment)
    assert (run_copy / "model.onnx.data").read_bytes() == (finished_run / "run" / "model.onnx.data").read_bytes()


def test_an_unknown_dataset_names_the_valid_ones(tiny_llama_dir: Path, run_copy: Path, command: Command) -> None:
    """A name that cannot be resolved lists what can."""
    outcome = command(tiny_llama_dir, "-o", run_copy, "--calib-dataset", "no/such-dataset", *SMALL)
    assert_user_error(outcome, "no/such-dataset", "builtin", "random")


@pytest.mark.parametrize("target", ["model.onnx.data", "policy.safetensors", "model.w4a8.onnx.data"])
def test_a_full_disk_is_reported_and_the_run_resumes(
    target: str, tiny_llama_dir: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space left while a large file is written: the message says so, nothing is half-written, a rerun completes."""
    run = tmp_path / "run"
    write = ir.external_data.convert_tensors_to_external

    def full(tensors: Any, base: Any, name: Any, *args: Any, **options: Any) -> Any:
        if str(name) == f".{target}.partial":
            (Path(base) / name).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(Path(base) / name))
        return write(tensors, base, name, *args, **options)

    def full_policy(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir.external_data, "convert_tensors_to_external", full)
    if target == "policy.safetensors":
        monkeypatch.setattr("fptq_export.tensor_writer.TensorWriter.write", full_policy)
    outcome = command(tiny_llama_dir, "-o", run, *SMALL)
    assert_user_error(outcome, "disk is full")
    assert not (run / target).exists()
    assert not [path for path in run.iterdir() if path.name.endswith(".partial")]
    monkeypatch.undo()
    assert command(tiny_llama_dir, "-o", run, *SMALL).code == 0


def test_an_output_below_a_file_is_refused(tiny_llama_dir: Path, tmp_path: Path, command: Command) -> None:
    """-o below something that is no directory."""
    (tmp_path / "file").write_text("")
    assert_user_error(command(tiny_llama_dir, "-o", tmp_path / "file" / "run", *SMALL), "another path")


def test_an_unwritable_output_is_refused(tiny_llama_dir: Path, command: Command) -> None:
    """-o where the system lets nobody write."""
    assert_user_error(command(tiny_llama_dir, "-o", "/sys/fptq-export", *SMALL), "/sys")


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("--weight-method", "awq3"), ("--weight-method", "rtn")),
        (("--dtype", "fp8"), ("--dtype", "fp16")),
        (("--target", "cuda"), ("--target", "tensorrt-rtx")),
        (("--group-size", "48"), ("--group-size",)),
        (("--calib-szie", "4"), ("--calib-szie", "--calib-size")),
        (("--max-ppl-increase", "a lot"), ("--max-ppl-increase",)),
        (("--v0", "200"), ("--v0", "--v1")),
        (("--v1", "inf"), ("--v1",)),
        (("--exclude", "("), ("(",)),
        (("--exclude", "no_such_layer"), ("no_such_layer",)),
        (("--policy", "missing.json"), ("missing.json",)),
        (("--device", "gpu"), ("--device", "cuda")),
        (("--device", "cuda:99"), ("--device cuda:99", "GPU")),
        (("--max-memory", "lots"), ("--max-memory",)),
        (("--max-memory", "-1GiB"), ("--max-memory",)),
        (("--engine", "x.plan", "--mem-pool-size", "workspace:lots"), ("workspace",)),
        (("--engine", "x.plan", "--compute-capability", "nine"), ("nine",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wrong_value_is_refused_by_option_name(
    words: tuple[str, ...],
    fragments: tuple[str, ...],
    tiny_llama_dir: Path,
    run_copy: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error names the option and, where there is a list, what it takes."""
    monkeypatch.chdir(tmp_path)
    assert_user_error(command(tiny_llama_dir, "-o", run_copy, *SMALL, *words), *fragments)


def test_a_policy_edited_into_nonsense_lists_every_mistake_with_its_path(
    tiny_llama_dir: Path, run_copy: Path, command: Command
) -> None:
    """Three mistakes in three layers come in one error, each with its JSON path; the file is left as it is."""
    path = run_copy / "policy.json"
    policy = json.loads(path.read_text())
    first, second, third = list(policy["layers"])[:3]
    policy["layers"][first]["group_size"] = -4
    policy["layers"][second]["activation"] = "psychic"
    policy["layers"][third]["weight_method"] = 3
    path.write_text(json.dumps(policy))
    outcome = command(tiny_llama_dir, "-o", run_copy, "--policy", path, *SMALL)
    assert_user_error(outcome, *(f'$.layers["{layer}"]' for layer in (first, second, third)))
    assert json.loads(path.read_text()) == policy


def test_a_policy_that_contradicts_the_graph_is_refused(tiny_llama_dir: Path, run_copy: Path, command: Command) -> None:
    """Values of the right type that cannot be done: LAE without a fold site, a group size that does not divide."""
    path = run_copy / "policy.json"
    policy = json.loads(path.read_text())
    policy["layers"]["model.layers.0.self_attn.o_proj"].update(activation="lae_static", activation_scale=None)
    policy["layers"]["model.layers.1.mlp.down_proj"]["group_size"] = 48
    path.write_text(json.dumps(policy))
    outcome = command(tiny_llama_dir, "-o", run_copy, "--policy", path, *SMALL)
    assert_user_error(outcome, "o_proj", "fold site", "down_proj", "48")


def test_random_tokens_need_no_tokenizer(tiny_llama_copy: Path, tmp_path: Path, command: Command) -> None:
    """Data-free calibration works on a checkpoint without a tokenizer when nothing else reads text."""
    remove_tokenizer(tiny_llama_copy)
    words = ("-o", tmp_path / "run", "--calib-dataset", "random", "--no-verify", *SMALL)
    assert command(tiny_llama_copy, *words).code == 0


def test_a_tokenizer_is_asked_for_by_the_verbs_that_read_text(
    tiny_llama_copy: Path, tmp_path: Path, command: Command
) -> None:
    """A trace reads none; calibration does, and the way without text that is named is a whole one."""
    remove_tokenizer(tiny_llama_copy)
    assert command("trace", tiny_llama_copy, "-o", tmp_path / "run").code == 0
    words = ("-o", tmp_path / "run", *SMALL)
    outcome = command(tiny_llama_copy, *words)
    assert_user_error(outcome, "holds no tokenizer", "--calib-dataset random --no-verify")
    assert command("calibrate", tiny_llama_copy, *words, "--calib-dataset", "random").code == 0


def test_token_ids_need_no_tokenizer(tiny_llama_copy: Path, tmp_path: Path, command: Command) -> None:
    """Calibration on ids reads no text either, so a checkpoint without a tokenizer is not refused for want of one."""
    remove_tokenizer(tiny_llama_copy)
    ids = tmp_path / "ids.npz"
    np.savez(ids, input_ids=np.random.default_rng(0).integers(0, 512, (2, 80)))
    done = command(tiny_llama_copy, "-o", tmp_path / "run", "--calib-dataset", ids, "--no-verify", *SMALL)
    assert done.code == 0, done.err


def test_activations_that_overflow_name_the_layer(tiny_llama_copy: Path, tmp_path: Path, command: Command) -> None:
    """Weights that are finite and produce infinite activations are found in calibration, not in the engine."""
    path = tiny_llama_copy / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"):
        tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, path, metadata={"format": "pt"})
    outcome = command(tiny_llama_copy, "-o", tmp_path / "run", "--dtype", "fp32", *SMALL)
    assert_user_error(outcome, "down_proj")


def test_the_manifest_cannot_be_misread(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """A damaged manifest is reported with its path, not taken for an empty one."""
    (run_copy / "manifest.json").write_text('{"schema_version": 7}')
    assert_user_error(command(tiny_llama_dir, "-o", run_copy, *SMALL), "manifest.json", "schema_version")
    assert np.fromfile(run_copy / "model.onnx.data", np.uint8).size > 0
