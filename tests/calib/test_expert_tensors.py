"""Both layouts in which files hold experts give the same model, one linear at a time."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.checks import check_checkpoint
from calib.load import Checkpoint, checkpoint_from_directory, model_from_checkpoint, read_tensor
from calib.load import skeleton_from_checkpoint as skeleton
from fptq_export.errors import UserError, UserErrors
from fptq_export.progress import NoProgress
from fptq_export.stored_tensor import StoredTensor
from tests.support.checkpoints import edit_config
from tests.support.experts import EXPERTS, stacked_model, tiny_mixtral, tiny_qwen3_moe
from tests.support.models import model_once

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]

FLOAT32_SUM = 32 * 128**0.5 * 2.0**-24
"""Two float32 programs for one model, relative to the largest logit, as in `tests.support.traced`."""
UP = "model.layers.0.mlp.experts.2.up_proj.weight"
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module", params=[tiny_mixtral, tiny_qwen3_moe], ids=["mixtral", "qwen3-moe"])
def per_expert(request: pytest.FixtureRequest, make_model_dir: ModelDirFactory) -> Path:
    """A matrix for each expert and projection, as the models were released."""
    return model_once(make_model_dir, request.param())


@pytest.fixture(scope="module")
def stacked(per_expert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, all experts of a layer in two tensors."""
    directory = tmp_path_factory.mktemp("stacked")
    stacked_model(per_expert, torch.float32).save_pretrained(directory, save_original_format=False)
    return directory


def opened(directory: Path) -> Checkpoint:
    return checkpoint_from_directory(directory, "experts")


def test_layouts_differ_on_disk(per_expert: Path, stacked: Path) -> None:
    """The tests below compare two layouts and not one with itself."""
    ranks = [
        {tensor.dim() for tensor in load_file(path / "model.safetensors").values()} for path in (per_expert, stacked)
    ]
    assert ranks == [{1, 2}, {1, 2, 3}]


def test_both_layouts_hold_the_tensors_of_the_model(per_expert: Path, stacked: Path) -> None:
    """Names and shapes are those of the model with experts as linears, and every tensor is equal, bit for bit."""
    first, second = opened(per_expert), opened(stacked)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton(first).state_dict().items()}
    for checkpoint in (first, second):
        assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == shapes
    for name in shapes:
        assert torch.equal(read_tensor(first, name), read_tensor(second, name)), name


def test_model_is_that_of_transformers(per_expert: Path, stacked: Path) -> None:
    """The same logits as transformers' own loading and running of the same files, in either layout."""
    with torch.inference_mode():
        expected = stacked_model(per_expert, torch.float32)(input_ids=IDS).logits
        for directory in (per_expert, stacked):
            model: Any = model_from_checkpoint(opened(directory), torch.float32)
            given = model(input_ids=IDS).logits
            assert (given - expected).abs().max() <= FLOAT32_SUM * expected.abs().max()


def test_weights_of_the_model_are_a_memory_map(stacked: Path) -> None:
    """In the stored type nothing is copied: experts of a layer lie in one storage, that of the stack."""
    model: Any = model_from_checkpoint(opened(stacked), torch.float32)
    experts = model.model.layers[0].mlp.experts
    assert len({expert.down_proj.weight.untyped_storage().data_ptr() for expert in experts}) == 1


def test_tied_head_is_the_embedding(make_model_dir: ModelDirFactory) -> None:
    """Files without `lm_head.weight` give a head that shares the embedding."""
    config = tiny_mixtral()
    config.tie_word_embeddings = True
    model: Any = model_from_checkpoint(opened(model_once(make_model_dir, config)), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_part_is_read_alone(stacked: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    """The rows of one expert, read by numpy for the graph as by torch for calibration, in each type of checkpoints."""
    shutil.copytree(stacked, tmp_path / "model")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(stacked / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    checkpoint = opened(tmp_path / "model")
    stored = checkpoint.tensors[UP].stored
    assert isinstance(stored, StoredTensor)
    assert stored.rows is not None
    assert np.array_equal(stored.read().astype(np.float32), read_tensor(checkpoint, UP).float().numpy())


def test_lost_expert_is_found_before_any_work(per_expert: Path, tmp_path: Path) -> None:
    """A file that lacks a matrix of one expert is refused: transformers would stack three and leave one undefined."""
    directory = tmp_path / "model"
    shutil.copytree(per_expert, directory)
    tensors = load_file(directory / "model.safetensors")
    lost = opened(per_expert).tensors[UP].key
    del tensors[lost]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserErrors, match=re.escape(UP)):
        check_checkpoint(opened(directory), NoProgress(), needs_tokenizer=False)
    with pytest.raises(UserError, match="does not hold it"):
        read_tensor(opened(directory), UP)


def test_other_number_of_experts_is_found(stacked: Path, tmp_path: Path) -> None:
    """A config with one expert more than the files hold is refused; the error names the expert."""
    directory = tmp_path / "model"
    shutil.copytree(stacked, directory)
    edit_config(directory, num_local_experts=EXPERTS + 1, num_experts=EXPERTS + 1)
    with pytest.raises(UserErrors, match=rf"no file holds it.*experts.{EXPERTS}.gate_proj.weight"):
        check_checkpoint(opened(directory), NoProgress(), needs_tokenizer=False)


def test_dense_checkpoint_is_left_alone(tiny_llama_dir: Path) -> None:
    """A model without experts keeps the names and the way of loading that it had."""
    checkpoint = opened(tiny_llama_dir)
    assert not checkpoint.unstacked
    assert all(entry.key == name and entry.rows is None for name, entry in checkpoint.tensors.items())
