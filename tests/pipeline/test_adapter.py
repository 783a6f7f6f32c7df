"""`--adapter` on the road: the merged model is what is calibrated, compared with and resumed from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fptq_export.errors import UserError
from fptq_export.files import read_json_model
from fptq_export.options import RunOptions
from fptq_export.pipeline.task_options import check_task_options
from fptq_export.tasks import HALF_DIRECTORIES, Half
from fptq_export.verify.report import VerifyReport
from tests.pipeline.conftest import SMALL, Command
from tests.support.adapters import lora_adapter


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA of query and down projections. Not to be changed: copy it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    return lora_adapter(tiny_llama_dir, tmp_path_factory.mktemp("adapter"), **settings)


def stages_up_to_date(err: str) -> list[str]:
    return [line.split(":")[0] for line in err.splitlines() if "up to date" in line]


def _merged_by_peft(base: Path, adapter: Path, directory: Path) -> Path:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, directory / name)
    return directory


def _perplexity(run: Path) -> float:
    return read_json_model(run / "verify.json", VerifyReport).reference_perplexity.perplexity


def test_run_is_that_of_the_model_that_peft_merged(
    run_copy: Path, tiny_llama_dir: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    """Calibration, and what verification compares with, see the merged model: all as if it had been given as MODEL."""
    before = load_file(run_copy / "policy.safetensors"), _perplexity(run_copy)
    merged = _merged_by_peft(tiny_llama_dir, adapter, tmp_path / "merged")
    found = []
    for words in ((tiny_llama_dir, "--adapter", adapter), (merged,)):
        for arguments in (("calibrate", *words, "-o", run_copy, *SMALL), ("verify", run_copy)):
            outcome = command(*arguments)
            assert outcome.code == 0, outcome.err
        found.append((load_file(run_copy / "policy.safetensors"), _perplexity(run_copy)))
    (arrays, perplexity), (expected, expected_perplexity) = found
    assert perplexity == expected_perplexity != before[1]
    assert arrays.keys() == expected.keys()
    assert all(torch.equal(array, expected[name]) for name, array in arrays.items())
    for name in ("q_proj", "o_proj"):
        codes = f"model.layers.0.self_attn.{name}.weight_codes"
        assert torch.equal(arrays[codes], before[0][codes]) == (name == "o_proj")


def test_run_resumes_and_an_edited_adapter_is_merged_again(
    run_copy: Path, tiny_llama_dir: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    """Nothing is merged twice; another adapter, or none, is another model."""
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    words = ("calibrate", tiny_llama_dir, "-o", run_copy, *SMALL)
    assert command(*words, "--adapter", own).code == 0
    again = command(*words, "--adapter", own)
    assert stages_up_to_date(again.err) == ["load", "merge", "calibrate", "policy"]
    stages = json.loads((run_copy / "manifest.json").read_text())["stages"]
    assert stages["merge"]["summary"]["merged"] == 4
    tensors = load_file(own / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, own / "adapter_model.safetensors")
    edited = command(*words, "--adapter", own)
    assert edited.code == 0, edited.err
    assert stages_up_to_date(edited.err) == []
    without = command(*words)
    assert without.code == 0, without.err
    assert stages_up_to_date(without.err) == []
    assert "merge" not in json.loads((run_copy / "manifest.json").read_text())["stages"]


def test_adapter_that_does_not_fit_is_refused_first(
    run_copy: Path, tiny_opt_dir: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    """Before a weight is read; the run directory stays as it was. `--dry-run` shows what merging would write."""
    before = {path.name: path.stat().st_mtime_ns for path in run_copy.iterdir() if path.name != "manifest.json"}
    outcome = command("calibrate", tiny_opt_dir, "-o", run_copy, "--adapter", adapter, *SMALL)
    assert outcome.code == 1
    assert "no linear of this name" in outcome.err
    outcome = command("calibrate", tiny_opt_dir, "-o", run_copy, "--adapter", tmp_path / "nowhere", *SMALL)
    assert outcome.code == 1
    assert "no such directory" in outcome.err
    after = {path.name: path.stat().st_mtime_ns for path in run_copy.iterdir() if path.name != "manifest.json"}
    assert after == before
    plan = command(tiny_opt_dir, "-o", run_copy, "--adapter", adapter, "--dry-run")
    assert " merge " in plan.out


@pytest.mark.parametrize("task", HALF_DIRECTORIES)
def test_halves_of_encoder_decoders_take_no_adapter(task: Half) -> None:
    """Neither would hold all that the adapter changes."""
    options = RunOptions.model_validate({"model": "m", "output": "o", "adapter": "a"})
    with pytest.raises(UserError, match=r"--adapter: given for the .* of an encoder-decoder: it may belong to both"):
        check_task_options(options, task)
