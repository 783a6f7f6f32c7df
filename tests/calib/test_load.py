"""Opening a model: what is read is what is stored, and everything that cannot be opened says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    T5Config,
    ViTConfig,
)

import calib.hub
from calib.load import (
    Checkpoint,
    checkpoint_from_directory,
    checkpoint_from_model,
    disagreement_from_checkpoint,
    model_from_checkpoint,
    read_tensor,
    skeleton_from_checkpoint,
    tokenizer_from_checkpoint,
)
from calib.tensor_files import INDEX_FILE, WEIGHTS_FILE, TensorEntry
from fptq_export.errors import UserError, UserErrors
from fptq_export.progress import NoProgress
from tests.support.checkpoints import edit_config

IDS = torch.arange(40).reshape(2, 20)


def shard(directory: Path) -> dict[str, str]:
    """Split `model.safetensors` into two shards with an index; give its weight map."""
    with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    weight_map = {}
    for index, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        shard_name = f"model-{index + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in names}, directory / shard_name)
        weight_map.update(dict.fromkeys(names, shard_name))
    (directory / WEIGHTS_FILE).unlink()
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def open_model(model: object, workdir: Path, **options: Any) -> Checkpoint:
    options = {"trust_remote_code": False, **options}
    return checkpoint_from_model(str(model), workdir=workdir, progress=NoProgress(), **options)


def test_directory_gives_names_shapes_and_types(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Every parameter is listed with its file, type and shape, and the checkpoint is called after its directory."""
    checkpoint = open_model(tiny_llama_dir, tmp_path)
    entry = TensorEntry(tiny_llama_dir / WEIGHTS_FILE, "model.layers.1.mlp.down_proj.weight", "F32", (64, 128))
    assert checkpoint.tensors["model.layers.1.mlp.down_proj.weight"] == entry
    assert checkpoint.name == tiny_llama_dir.name
    assert len(checkpoint.tensors) == 21  # 9 a layer, embedding, last norm, head


@pytest.mark.parametrize("fixture", ["tiny_llama_dir", "tiny_opt_dir"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_model_is_the_one_transformers_loads(fixture: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Logits are bit for bit those of transformers: rotary buffers, tied heads, casts and dropout are right."""
    directory = request.getfixturevalue(fixture)
    expected: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    expected.eval()
    model: Any = model_from_checkpoint(checkpoint_from_directory(directory, "tiny"), dtype)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def test_tied_head_shares_the_embedding(tiny_opt_dir: Path) -> None:
    """A tied head is the embedding itself, not a copy or random numbers."""
    model: Any = model_from_checkpoint(checkpoint_from_directory(tiny_opt_dir, "opt"), torch.float32)
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_reading_a_tensor_copies_nothing(tmp_path: Path, llama: Checkpoint) -> None:
    """A tensor of 64 MB is mapped: the memory of this process alone does not grow by even an eighth of it."""
    size = 64 << 20
    file = tmp_path / "large.safetensors"
    save_arrays({"large": np.zeros(size // 2, np.float16)}, file)
    large = TensorEntry(file, "large", "F16", (size // 2,))
    process = psutil.Process()
    before = process.memory_full_info().uss
    tensor = read_tensor(Checkpoint(tmp_path, "large", llama.config, {"large": large}), "large")
    assert tensor.shape == large.shape
    assert process.memory_full_info().uss - before < size // 8


def test_shards_hold_the_same_tensors(tiny_llama_copy: Path, llama: Checkpoint) -> None:
    """A checkpoint in shards reads like the one file it was split from."""
    shard(tiny_llama_copy)
    sharded = checkpoint_from_directory(tiny_llama_copy, "sharded")
    assert sharded.tensors.keys() == llama.tensors.keys()
    for name in llama.tensors:
        assert torch.equal(read_tensor(sharded, name), read_tensor(llama, name)), name
    model_from_checkpoint(sharded, torch.float32)


def test_heads_that_files_name_otherwise_are_found(make_model_dir: Callable[[PretrainedConfig], Path]) -> None:
    """The head of GPT-NeoX (Pythia) is stored as `embed_out`; the model, and so the graph, calls it `lm_head`."""
    directory = make_model_dir(
        GPTNeoXConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64, vocab_size=512)
    )
    with safe_open(str(directory / "model.safetensors"), framework="pt") as stored:
        assert "embed_out.weight" in stored.keys()  # noqa: SIM118 (not a dict)
    checkpoint = checkpoint_from_directory(directory, "neox")
    assert checkpoint.tensors.keys() == skeleton_from_checkpoint(checkpoint).state_dict().keys()
    assert torch.equal(
        read_tensor(checkpoint, "lm_head.weight"), AutoModelForCausalLM.from_pretrained(directory).lm_head.weight
    )


def test_checkpoint_of_the_bare_model_gets_the_names_of_the_causal_one(tmp_path: Path) -> None:
    """Files that leave the base model's prefix out are known by full path, and load."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.model.save_pretrained(tmp_path)
    checkpoint = checkpoint_from_directory(tmp_path, "bare")
    entry = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    assert entry.key == "layers.0.mlp.up_proj.weight"
    assert torch.equal(read_tensor(checkpoint, "model.norm.weight"), model.model.norm.weight)
    assert disagreement_from_checkpoint(checkpoint).missing == ()


def test_tokenizer_is_read(llama: Checkpoint) -> None:
    """The tokenizer beside the weights encodes."""
    assert tokenizer_from_checkpoint(llama).decode(tokenizer_from_checkpoint(llama).encode("a b")) == "a b"


@pytest.mark.parametrize(
    "file", ["../evil.safetensors", "/etc/evil.safetensors", "a/../../evil.safetensors", "..\\evil", ""]
)
def test_index_may_not_leave_the_directory(tiny_llama_copy: Path, file: str) -> None:
    """An index that names a file elsewhere is refused before the file is opened."""
    weight_map = shard(tiny_llama_copy)
    write_index(tiny_llama_copy, {**weight_map, "model.norm.weight": file})
    with pytest.raises(UserErrors) as error:
        checkpoint_from_directory(tiny_llama_copy, "evil")
    assert [problem.path for problem in error.value.problems] == ['$.weight_map["model.norm.weight"]']


def test_all_missing_shards_are_named(tiny_llama_copy: Path) -> None:
    """One error lists every shard that is not there."""
    shards = set(shard(tiny_llama_copy).values())
    for name in shards:
        (tiny_llama_copy / name).unlink()
    with pytest.raises(UserErrors) as error:
        checkpoint_from_directory(tiny_llama_copy, "x")
    assert {problem.message for problem in error.value.problems} == {f"shard {name} is missing" for name in shards}


def test_index_that_promises_an_absent_tensor_is_refused(tiny_llama_copy: Path) -> None:
    """A tensor that its shard does not hold is named."""
    weight_map = shard(tiny_llama_copy)
    write_index(tiny_llama_copy, {**weight_map, "ghost": next(iter(weight_map.values()))})
    with pytest.raises(UserErrors, match="does not hold this tensor") as error:
        checkpoint_from_directory(tiny_llama_copy, "x")
    assert error.value.problems[0].path == '$.weight_map["ghost"]'


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"])
def test_broken_index_is_refused(tiny_llama_copy: Path, text: str) -> None:
    """An index that is not one is named, whatever is wrong with it."""
    shard(tiny_llama_copy)
    (tiny_llama_copy / INDEX_FILE).write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        checkpoint_from_directory(tiny_llama_copy, "x")


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_truncated_safetensors_is_refused(tiny_llama_copy: Path, kept: int) -> None:
    """A file that ends early is refused when it is opened, wherever it ends."""
    file = tiny_llama_copy / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="damaged or cut off") as error:
        checkpoint_from_directory(tiny_llama_copy, "x")
    assert error.value.where == str(file)


def test_pickled_weights_are_refused(tiny_llama_copy: Path) -> None:
    """A checkpoint with pickled weights only is not opened; the error says to convert it."""
    (tiny_llama_copy / WEIGHTS_FILE).rename(tiny_llama_copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="save_pretrained"):
        checkpoint_from_directory(tiny_llama_copy, "x")


def test_directory_without_weights_is_refused(tiny_llama_copy: Path) -> None:
    """A directory with a config alone says what is missing."""
    (tiny_llama_copy / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=WEIGHTS_FILE):
        checkpoint_from_directory(tiny_llama_copy, "x")


@pytest.mark.parametrize(
    ("break_config", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "no such file"),
        (lambda d: (d / "config.json").write_text("{"), "not a usable model config"),
        (lambda d: edit_config(d, model_type="no-such-model"), "no-such-model"),
        (lambda d: edit_config(d, hidden_size="large"), "hidden_size"),
        (lambda d: edit_config(d, num_attention_heads=7), "not a multiple"),
        (lambda d: edit_config(d, quantization_config={"quant_method": "gptq", "bits": 4}), "already quantized"),
        (lambda d: edit_config(d, transformers_weights="other.safetensors"), "bypass the checks"),
        (lambda d: ViTConfig().save_pretrained(d), "no causal language model"),
        (lambda d: T5Config().save_pretrained(d), "two graphs and no single one"),
    ],
    ids=[
        *("missing", "not JSON", "unknown type", "wrong type", "impossible", "quantized", "redirected", "not causal"),
        "encoder-decoder",
    ],
)
def test_unusable_config_is_refused(tiny_llama_copy: Path, break_config: Callable[[Path], object], words: str) -> None:
    """Each kind of bad config gives one error that names config.json and the cause."""
    break_config(tiny_llama_copy)
    with pytest.raises(UserError, match=words) as error:
        checkpoint_from_directory(tiny_llama_copy, "x")
    assert error.value.where == str(tiny_llama_copy / "config.json")


@pytest.mark.parametrize("code", [True, False])
def test_code_of_a_model_does_not_run_without_leave(tiny_llama_copy: Path, tmp_path: Path, code: bool) -> None:
    """A config that brings its own code is refused with the option that allows it, and the code has not run."""
    marker = tmp_path / "ran"
    (tiny_llama_copy / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass C: pass\n" if code else "")
    edit_config(tiny_llama_copy, model_type="own", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})
    with pytest.raises(UserError, match="--trust-remote-code"):
        checkpoint_from_directory(tiny_llama_copy, "x")
    assert not marker.exists()


def test_unknown_tensor_is_refused(llama: Checkpoint) -> None:
    """A name that the checkpoint does not hold is named."""
    with pytest.raises(UserError, match=r"no\.such\.tensor"):
        read_tensor(llama, "no.such.tensor")


def test_missing_tokenizer_is_refused(tiny_llama_copy: Path) -> None:
    """Without tokenizer files the error offers the way that needs none."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny_llama_copy / name).unlink()
    with pytest.raises(UserError, match="--calib-dataset random"):
        tokenizer_from_checkpoint(checkpoint_from_directory(tiny_llama_copy, "x"))


@pytest.mark.parametrize("text", ["{", '{"a": 1}'])
def test_damaged_tokenizer_is_refused(tiny_llama_copy: Path, text: str) -> None:
    """A tokenizer file that cannot be read is a user error."""
    (tiny_llama_copy / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        tokenizer_from_checkpoint(checkpoint_from_directory(tiny_llama_copy, "x"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no/such/directory/here", "no such directory"),
        ("/no-such-directory", "no such directory"),
        ("model.gguf", "no such file"),
        (__file__, "neither a directory nor a .gguf file"),
        ("no-such-organisation/no-such-model", "hub cannot be reached"),
        ("a--b..c", "not a hub id"),
    ],
)
def test_name_that_means_nothing_is_refused(tmp_path: Path, model: str, words: str) -> None:
    """Each kind of wrong MODEL says what was tried; the hub is offline here."""
    with pytest.raises(UserError, match=words):
        open_model(model, tmp_path)


@pytest.mark.parametrize("trusted", [True, False])
def test_hub_download_fetches_no_pickle_and_code_only_if_trusted(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """A hub id is downloaded by patterns that leave pickles out, and Python files unless they may run."""
    asked: list[str] = []

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        assert repo_id == "some/model"
        asked.extend(allow_patterns)
        return str(tiny_llama_dir)

    monkeypatch.setattr(calib.hub, "snapshot_download", download)
    checkpoint = open_model("some/model", tmp_path, trust_remote_code=trusted)
    assert checkpoint.name == "some/model"
    assert "*.safetensors" in asked
    assert ("*.py" in asked) == trusted
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (hub_errors.GatedRepoError, "gated"),
        (hub_errors.RepositoryNotFoundError, "no such model on the hub"),
        (hub_errors.LocalEntryNotFoundError, "cannot be reached"),
        (hub_errors.HfHubHTTPError, "refused the download"),
    ],
)
def test_hub_failures_are_user_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[Exception], words: str
) -> None:
    """Gated, absent, unreachable and failing repositories are told apart."""

    def fail(repo_id: str, allow_patterns: list[str]) -> str:
        error = failure.__new__(failure)
        Exception.__init__(error, f"{repo_id} {allow_patterns}")
        raise error

    monkeypatch.setattr(calib.hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=words):
        open_model("some/model", tmp_path)


def test_opening_a_directory_writes_nothing(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Neither the model's directory nor the working directory changes."""
    copy = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    before = sorted(copy.rglob("*"))
    open_model(copy, tmp_path / "work")
    assert sorted(copy.rglob("*")) == before
    assert not (tmp_path / "work").exists()
