"""A bad checkpoint is refused before long work, with everything that is wrong at once; a good one is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PretrainedConfig

from calib.checks import FLOAT16_MAX, GraphDtype, check_checkpoint
from calib.load import checkpoint_from_directory
from calib.tensor_files import WEIGHTS_FILE
from fptq_export.errors import UserError, UserErrors
from fptq_export.progress import NoProgress
from tests.support.checkpoints import CountingProgress, edit_config

DOWN, UP, NORM = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
Edit = Callable[[dict[str, torch.Tensor]], object]


def edit_weights(directory: Path, edit: Edit) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS_FILE)


def check(directory: Path, dtype: GraphDtype = "float16", *, needs_tokenizer: bool = True) -> None:
    checkpoint = checkpoint_from_directory(directory, "tiny")
    check_checkpoint(checkpoint, NoProgress(), dtype=dtype, needs_tokenizer=needs_tokenizer)


def problems(directory: Path, dtype: GraphDtype = "float16") -> dict[str, str]:
    """Path -> message of everything the check finds."""
    with pytest.raises(UserErrors) as error:
        check(directory, dtype)
    return {problem.path: problem.message for problem in error.value.problems}


@pytest.mark.parametrize("fixture", ["tiny_llama_dir", "tiny_opt_dir", "smollm2_dir"])
def test_good_checkpoint_passes_and_every_tensor_is_read(fixture: str, request: pytest.FixtureRequest) -> None:
    """A whole checkpoint is left alone, and progress counts each of its tensors once."""
    checkpoint = checkpoint_from_directory(request.getfixturevalue(fixture), "good")
    progress = CountingProgress()
    check_checkpoint(checkpoint, progress)
    assert progress.done == {"check weights": len(checkpoint.tensors)}


def test_nan_and_inf_are_found_wherever_they_are(tiny_llama_copy: Path) -> None:
    """One error names every tensor with a NaN or an Inf of either sign."""

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN][-1, -1] = float("nan")
        tensors[UP][3, 5] = float("-inf")
        tensors[NORM][0] = float("inf")

    edit_weights(tiny_llama_copy, poison)
    expected = {f'$["{DOWN}"]': "holds NaN", f'$["{UP}"]': "holds Inf", f'$["{NORM}"]': "holds Inf"}
    assert problems(tiny_llama_copy) == expected


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_weight_beyond_float16_is_refused_for_float16_only(tiny_llama_copy: Path, sign: float) -> None:
    """What float16 cannot hold stops a float16 export; bfloat16 and float32 take it."""
    edit_weights(tiny_llama_copy, lambda tensors: tensors[DOWN][0].fill_(sign * 70000.0))
    assert list(problems(tiny_llama_copy)) == [f'$["{DOWN}"]']
    check(tiny_llama_copy, "bfloat16")
    check(tiny_llama_copy, "float32")


def test_largest_float16_passes(tiny_llama_copy: Path) -> None:
    """65504 itself is a float16."""
    edit_weights(tiny_llama_copy, lambda tensors: tensors[DOWN][0].fill_(FLOAT16_MAX))
    check(tiny_llama_copy)


def test_config_with_fewer_layers_is_refused(tiny_llama_copy: Path) -> None:
    """Weights that the config does not describe are all named, not silently dropped."""
    edit_config(tiny_llama_copy, num_hidden_layers=1)
    found = problems(tiny_llama_copy)
    assert len(found) == 9
    assert all(path.startswith('$["model.layers.1.') for path in found)


def test_config_with_more_layers_is_refused(tiny_llama_copy: Path) -> None:
    """Weights that no file holds are all named, not drawn at random."""
    edit_config(tiny_llama_copy, num_hidden_layers=3)
    found = problems(tiny_llama_copy)
    assert len(found) == 9
    assert "no file holds it" in found[f'$["{UP.replace("layers.1", "layers.2")}"]']


def test_shape_and_absence_are_reported_together(tiny_llama_copy: Path) -> None:
    """A wrong shape and a missing tensor come in one error, the shape with both sizes."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN] = tensors[DOWN][:, :96]
        del tensors[NORM]

    edit_weights(tiny_llama_copy, damage)
    found = problems(tiny_llama_copy)
    assert found.keys() == {f'$["{DOWN}"]', f'$["{NORM}"]'}
    assert "[64, 96]" in found[f'$["{DOWN}"]']
    assert "[64, 128]" in found[f'$["{DOWN}"]']


def test_config_no_model_can_be_built_from_is_refused(tiny_llama_copy: Path) -> None:
    """A config that reads but does not build gives one error that names config.json."""
    edit_config(tiny_llama_copy, hidden_act="no-such-function")
    with pytest.raises(UserError, match="no-such-function") as error:
        check(tiny_llama_copy)
    assert error.value.where == str(tiny_llama_copy / "config.json")


def test_model_without_linears_is_refused(make_model_dir: Callable[[PretrainedConfig], Path]) -> None:
    """An embedding and a head alone leave nothing to quantize."""
    directory = make_model_dir(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=0, num_attention_heads=4, vocab_size=512)
    )
    with pytest.raises(UserError, match="no linear layer"):
        check(directory)


def test_tokenizer_is_asked_for_only_when_text_is_read(tiny_llama_copy: Path) -> None:
    """Random tokens and token ids do without a tokenizer."""
    (tiny_llama_copy / "tokenizer.json").unlink()
    check(tiny_llama_copy, needs_tokenizer=False)
    with pytest.raises(UserError, match="holds no tokenizer"):
        check(tiny_llama_copy)
