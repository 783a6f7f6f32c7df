"""Block by block gives what the whole model gives, bit for bit, in the memory of one block."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from calib.stream import BlockStream, blocks_path

WINDOWS, SEQ, BATCH = 5, 12, 2
LAYERS = 3
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
GATED: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GATED),
    "mistral, sliding window": ("MistralConfig", {**GATED, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", GATED),
    "qwen3": ("Qwen3Config", {**GATED, "head_dim": 8}),
    "gemma2, alternating windows": ("Gemma2Config", {**GATED, "head_dim": 8, "sliding_window": 4}),
    "gemma3, two rotary bases": ("Gemma3TextConfig", {**GATED, "head_dim": 8, "sliding_window": 4}),
    "phi3": ("Phi3Config", {**GATED, "pad_token_id": 0}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 64}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 64, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 48}),
    "falcon": ("FalconConfig", {**SIZES, "num_kv_heads": 1}),
    "stablelm": ("StableLmConfig", GATED),
    "olmo2": ("Olmo2Config", GATED),
    "mixtral": ("MixtralConfig", {**GATED, "num_local_experts": 4}),
}


def model_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.eval()
    return model


def make_model(family: str = "llama", **options: Any) -> PreTrainedModel:
    name, arguments = FAMILIES[family]
    return model_from_config(getattr(transformers, name)(**{**arguments, **options}))


def random_tokens() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 64, (WINDOWS, SEQ)))


def inputs_of_linears(module: nn.Module, prefix: str, record: dict[str, list[torch.Tensor]]) -> None:
    for path, linear in module.named_modules(prefix=prefix):
        if isinstance(linear, nn.Linear):
            linear.register_forward_pre_hook(lambda _, args, path=path: record.setdefault(path, []).append(args[0]))


def whole(model: PreTrainedModel) -> dict[str, list[torch.Tensor]]:
    record: dict[str, list[torch.Tensor]] = {}
    inputs_of_linears(model, "", record)
    with torch.inference_mode():
        for ids in random_tokens().split(BATCH):
            model(input_ids=ids, use_cache=False)
    return record


def streamed(family: str) -> dict[str, list[torch.Tensor]]:
    record: dict[str, list[torch.Tensor]] = {}
    stream = BlockStream(lambda: make_model(family), random_tokens(), BATCH, head=True)
    for index in range(stream.count):
        block = stream.load_block(index)
        inputs_of_linears(block, f"{stream.path}.{index}", record)
        assert sum(stream.advance(index, block)) == WINDOWS * SEQ
    stream.run_rest(lambda model: inputs_of_linears(model, "", record))
    return record


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_reads_what_it_reads_in_the_whole_model(family: str) -> None:
    """Masks, rotary tables and hidden states that differ would calibrate another model."""
    expected, got = whole(make_model(family)), streamed(family)
    assert expected.keys() == got.keys()
    for path, batches in expected.items():
        assert len(batches) == len(got[path]), path
        assert all(torch.equal(x, y) for x, y in zip(batches, got[path], strict=True)), path


def test_blocks_run_in_float32_whatever_is_stored() -> None:
    """Half-precision activations would lose small channels; the result is that of a float32 model."""

    def stored() -> PreTrainedModel:
        model: Any = make_model()
        return model.to(torch.bfloat16)  # type: ignore[no-any-return]

    stream = BlockStream(stored, random_tokens(), WINDOWS, head=False)
    block = stream.load_block(0)
    (output,) = stream.replay(0, block)
    reference: list[torch.Tensor] = []
    model: Any = stored()
    model.to(torch.float32)
    blocks: Any = model.get_submodule("model.layers")
    blocks[0].register_forward_hook(lambda _, __, y: reference.append(y))
    with torch.inference_mode():
        model(input_ids=random_tokens(), use_cache=False)
    assert output.dtype == torch.float32
    assert torch.equal(output, reference[0])


def test_replay_leaves_the_stream_where_it_is() -> None:
    """A block that is looked at twice (statistics, then quantized weights) reads the same inputs twice."""
    stream = BlockStream(make_model, random_tokens(), BATCH, head=False)
    block = stream.load_block(0)
    first, second = list(stream.replay(0, block)), list(stream.replay(0, block))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    list(stream.advance(0, block))
    assert not torch.equal(next(stream.replay(1, stream.load_block(1))), first[0])


def test_experts_are_not_taken_for_blocks() -> None:
    """The longest list is not the list of blocks when a block holds more experts than the model has blocks."""
    assert blocks_path(make_model("mixtral", num_local_experts=8)) == "model.layers"


def test_model_without_blocks_runs_whole() -> None:
    """Nothing to stream is no error: all linears are seen by the last pass."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 8)
            self.linear = nn.Linear(8, 8)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            assert not use_cache
            result: torch.Tensor = self.linear(self.embedding(input_ids))
            return result

    record: dict[str, list[torch.Tensor]] = {}
    stream: Any = BlockStream(Plain, random_tokens(), BATCH, head=True)  # type: ignore[arg-type]
    assert (stream.path, stream.count) == (None, 0)
    stream.run_rest(lambda model: inputs_of_linears(model, "", record))
    assert [len(batch) for batch in record["linear"]] == [2, 2, 1]


@pytest.mark.parametrize("layers", [1, 4])
def test_only_one_block_lives(layers: int) -> None:
    """Memory follows the largest block: what is loaded for a block is gone when the next one is loaded."""
    loaded: list[weakref.ref[nn.Module]] = []

    def load() -> PreTrainedModel:
        model = make_model(num_hidden_layers=layers)
        loaded.append(weakref.ref(model))
        return model

    stream = BlockStream(load, random_tokens(), BATCH, head=False)
    for index in range(stream.count):
        block = stream.load_block(index)
        assert sum(parameter.numel() for parameter in block.parameters() if parameter.device.type == "cpu") > 0
        list(stream.advance(index, block))
    del block
    gc.collect()
    assert len(loaded) == layers + 2
    assert [model() for model in loaded] == [None] * len(loaded)
