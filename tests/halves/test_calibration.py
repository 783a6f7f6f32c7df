"""Calibration of the halves: block by block it sees what the whole model sees, position biases included."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from calib.batches import TokenBatches
from calib.halves import calibrated_model_from_checkpoint, paths_of_task, source_and_target
from calib.linears import LinearWeights, linears_from_model
from calib.load import checkpoint_from_directory, read_tensor, skeleton_from_checkpoint
from calib.observe import HessianSink, observe
from calib.stream import BlockStream
from fptq_export.progress import NoProgress
from fptq_export.tasks import SEQ2SEQ_DECODER, SEQ2SEQ_ENCODER, Task
from tests.support.halves import check_statistics, seq2seq_model
from tests.support.models import model_once, tiny_bart, tiny_t5

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]

WINDOWS = np.random.default_rng(0).integers(2, 512, (3, 14))


@pytest.fixture(scope="module")
def deep_dir(make_model_dir: ModelDirFactory) -> Path:
    """A T5 1.1 of two layers in each half."""
    return model_once(make_model_dir, tiny_t5(gated=True, layers=2))


@pytest.mark.parametrize(
    ("seq", "end", "start", "source", "target"),
    [
        (4, 9, 8, [0, 9], [8, 3]),
        (5, 9, 8, [0, 1, 9], [8, 4]),
        (4, [7, 9], 8, [0, 7], [8, 3]),
        (4, None, None, [0, 1], [2, 3]),
    ],
    ids=["even", "odd", "several ends", "no special tokens"],
)
def test_a_window_is_split_between_encoder_and_decoder(
    seq: int, end: Any, start: int | None, source: list[int], target: list[int]
) -> None:
    """The first half ends as a text does, the second starts as the decoder does; windows stay as they are."""
    from transformers import T5Config

    windows = np.arange(seq)[None]
    special: dict[str, Any] = {"eos_token_id": end, "decoder_start_token_id": start}
    found = source_and_target(windows, T5Config(**special))
    assert [part[0].tolist() for part in found] == [source, target]
    assert windows[0].tolist() == list(range(seq))


def _whole(directory: Path, task: Task, linears: list[str]) -> dict[str, NDArray[np.float32]]:
    """What each linear of a half reads, [tokens, in], when transformers runs the whole model on the windows at once."""
    model = seq2seq_model(directory)
    record: dict[str, NDArray[np.float32]] = {}
    for path in linears:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _module, args, path=path: record.update({path: args[0].reshape(-1, args[0].shape[-1]).numpy()})
        )
    source, target = source_and_target(WINDOWS, model.config)
    if task == SEQ2SEQ_ENCODER:
        source = WINDOWS
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(source), decoder_input_ids=torch.from_numpy(target))
    return record


@pytest.mark.parametrize("task", [SEQ2SEQ_ENCODER, SEQ2SEQ_DECODER])
@pytest.mark.parametrize("config", [partial(tiny_t5, gated=True, layers=2), tiny_bart], ids=["t5", "bart"])
def test_block_by_block_measures_what_the_whole_model_reads(
    make_model_dir: ModelDirFactory, config: Callable[[], PretrainedConfig], task: Task
) -> None:
    """Maxima and second moments; T5's second block is given the position bias that the first one made."""
    directory = model_once(make_model_dir, config())
    checkpoint = checkpoint_from_directory(directory, "model", task=task)
    linears = paths_of_task(checkpoint, linears_from_model(skeleton_from_checkpoint(checkpoint)))
    hessians: dict[str, torch.Tensor] = {}
    sink = HessianSink({path: path for path in linears}, hessians.__setitem__)
    load = partial(calibrated_model_from_checkpoint, checkpoint, torch.float32)
    batches = TokenBatches(WINDOWS, "test", "0")
    stats = observe(load, batches, linears, NoProgress(), 2, sink)
    inputs = _whole(directory, task, linears)
    assert stats.channel_absmax.keys() == inputs.keys() == set(linears)
    assert ("lm_head" in linears) == (task == SEQ2SEQ_DECODER)
    check_statistics(stats.channel_absmax, hessians, inputs, batches.count)


@pytest.mark.parametrize(("model", "runs"), [("deep_dir", 3), ("tiny_llama_dir", 1)])
def test_the_first_block_runs_once_more_only_where_others_read_its_outputs(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str, runs: int
) -> None:
    """T5's first block gives the position bias of each batch; a LLaMA's runs for one batch, to see what it returns."""
    task: Task | None = SEQ2SEQ_ENCODER if model == "deep_dir" else None
    checkpoint = checkpoint_from_directory(request.getfixturevalue(model), model, task=task)
    load = partial(calibrated_model_from_checkpoint, checkpoint, torch.float32)
    loaded: Any = load()
    path = "encoder.block" if task else "model.layers"
    kind: Any = type(loaded.get_submodule(path)[0])
    counted = MagicMock(side_effect=kind.forward)
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: counted(*args, **kwargs))
    BlockStream(load, torch.from_numpy(WINDOWS), 1, head=True)
    assert counted.call_count == runs


def test_a_file_may_hold_any_of_its_tied_tensors(deep_dir: Path, tmp_path: Path) -> None:
    """The embedding under the decoder's name only, as some converters write it, is found under all of its names."""
    copy = Path(shutil.copytree(deep_dir, tmp_path / "t5"))
    tensors = load_file(copy / "model.safetensors")
    tensors["decoder.embed_tokens.weight"] = embedding = tensors.pop("shared.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    checkpoint = checkpoint_from_directory(copy, "t5", task=SEQ2SEQ_DECODER)
    for weight in (read_tensor(checkpoint, "shared.weight"), LinearWeights.from_checkpoint(checkpoint).read("lm_head")):
        assert torch.equal(weight, embedding)
