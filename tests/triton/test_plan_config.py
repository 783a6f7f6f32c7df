"""The config of an engine says what the engine is, and the real server reads it so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from fptq_export.errors import UserError
from fptq_export.triton.options import TritonOptions
from fptq_export.triton.protobuf import config_from_text
from fptq_export.triton.run import run_triton
from tests.support.triton_server import TritonServer
from tests.triton.engine_runs import LIMITS, engine_run

HEADS, HEAD_SIZE, VOCABULARY = 2, 16, 512
SLOTS = LIMITS.max_kv_len + LIMITS.max_input_len
CACHE = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
PRESENT = [name.replace("past_key_values", "present") for name in CACHE]


@pytest.fixture(scope="session")
def concat_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a growing cache."""
    return engine_run(finished_run, tmp_path_factory.mktemp("concat") / "tiny", "concat")


@pytest.fixture(scope="session")
def static_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a static cache."""
    return engine_run(finished_run, tmp_path_factory.mktemp("static") / "tiny", "static")


def written(run: Path, repository: Path, **options: Any) -> Any:
    """The config of the engine's model."""
    run_triton(TritonOptions(source=run, repository=repository, **options), "fptq-export triton")
    name = options.get("name", run.name)
    path = repository / f"{name}-plan" / "config.pbtxt"
    return config_from_text(path.read_text(encoding="utf-8"), str(path))


def shapes(tensors: Any) -> dict[str, list[int]]:
    """Name -> dims."""
    return {tensor.name: list(tensor.dims) for tensor in tensors}


def test_growing_cache_is_input_and_output(concat_run: Path, tmp_path: Path) -> None:
    """Every dimension but the batch, lengths open; batches of the profile's size."""
    config = written(concat_run, tmp_path / "models", max_queue_delay=250, instances=2)
    past = [HEADS, -1, HEAD_SIZE]
    tokens = {name: [-1] for name in ("input_ids", "attention_mask", "position_ids")}
    assert shapes(config.input) == tokens | dict.fromkeys(CACHE, past)
    assert shapes(config.output) == {"logits": [-1, VOCABULARY]} | dict.fromkeys(PRESENT, past)
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", LIMITS.max_batch_size)
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, config.instance_group[0].KIND_GPU)
    assert not config.optimization.cuda.graphs


def test_types_are_the_engines(concat_run: Path, tmp_path: Path) -> None:
    """Tokens INT64, cache and logits FP16."""
    config = written(concat_run, tmp_path / "models")
    kinds = {tensor.name: tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type for tensor in config.input}
    names = {item.name: kinds["input_ids"].values_by_number[item.data_type].name for item in config.input}
    assert names["input_ids"] == "TYPE_INT64"
    assert {names[name] for name in CACHE} == {"TYPE_FP16"}


def test_warm_up_lies_inside_the_profile(concat_run: Path, tmp_path: Path) -> None:
    """A prompt and a decode step, whose mask covers cache and tokens."""
    config = written(concat_run, tmp_path / "models")
    prompt, decode = (1 + LIMITS.max_input_len) // 2, 1
    for sample, tokens in zip(config.model_warmup, (prompt, decode), strict=True):
        sizes = {name: list(item.dims) for name, item in sample.inputs.items()}
        assert sample.batch_size == 1
        assert sizes["input_ids"] == sizes["position_ids"] == [tokens]
        assert sizes["attention_mask"] == [LIMITS.max_kv_len // 2 + tokens]
        assert sizes[CACHE[0]] == [HEADS, LIMITS.max_kv_len // 2, HEAD_SIZE]


def test_static_cache_is_state_of_the_server(static_run: Path, tmp_path: Path) -> None:
    """One buffer a sequence, written in place, zero at first; neither an input nor an output."""
    config = written(static_run, tmp_path / "models", variant="stateful", max_sequences=8)
    batching = config.sequence_batching
    assert [(state.input_name, state.output_name) for state in batching.state] == list(zip(CACHE, PRESENT, strict=True))
    for state in batching.state:
        assert state.use_same_buffer_for_input_output
        assert list(state.dims) == list(state.initial_state[0].dims) == [HEADS, SLOTS, HEAD_SIZE]
        assert state.initial_state[0].zero_data
    assert batching.oldest.max_candidate_sequences == 8
    assert shapes(config.input) == {
        "input_ids": [-1],
        "attention_mask": [SLOTS],
        "position_ids": [-1],
        "write_indices": [1],
    }
    assert list(config.input[3].reshape.shape) == []
    assert config.input[3].HasField("reshape")
    assert shapes(config.output) == {"logits": [-1, VOCABULARY]}


def test_decode_step_of_a_static_cache_is_captured(static_run: Path, tmp_path: Path) -> None:
    """A CUDA graph of one token, of the shapes that the server sends."""
    config = written(static_run, tmp_path / "models")
    (spec,) = config.optimization.cuda.graph_spec
    sizes = {name: list(item.dim) for name, item in spec.input.items()}
    assert config.optimization.cuda.graphs
    assert sizes["input_ids"] == sizes["position_ids"] == sizes["write_indices"] == [1]
    assert sizes["attention_mask"] == [SLOTS]
    assert sizes[CACHE[0]] == [HEADS, SLOTS, HEAD_SIZE]


@pytest.mark.parametrize("variant", ["stateless", "stateful"])
def test_server_takes_the_config_and_lacks_only_tensorrt(
    server: TritonServer, repository: Path, static_run: Path, variant: str
) -> None:
    """The wheel's server has no TensorRT backend. That, and nothing else, is what it says."""
    written(static_run, repository, name=f"plan-{variant}", variant=variant)
    reply = server.load(f"plan-{variant}-plan")
    assert reply.status == 400
    assert "unable to find backend library for backend 'tensorrt'" in reply.document["error"]


def test_server_takes_the_config_of_a_growing_cache(server: TritonServer, repository: Path, concat_run: Path) -> None:
    """As above."""
    written(concat_run, repository, name="plan-concat")
    assert "unable to find backend library for backend 'tensorrt'" in server.load("plan-concat-plan").document["error"]


@pytest.mark.parametrize(
    ("name", "right", "wrong", "message"),
    [
        ("misspelled", "TYPE_INT64", "TYPE_INTEGER", "failed to read text proto"),
        ("negative", "max_batch_size: 4", "max_batch_size: -1", "'max_batch_size' must be non-negative"),
        (
            "preferring",
            "dynamic_batching {",
            "dynamic_batching { preferred_batch_size: 9",
            "preferred size must be",
        ),
    ],
)
def test_server_refuses_a_broken_config(
    server: TritonServer, repository: Path, concat_run: Path, name: str, right: str, wrong: str, message: str
) -> None:
    """So what it takes says something; and it lives on."""
    written(concat_run, repository, name=name)
    path = repository / f"{name}-plan" / "config.pbtxt"
    text = path.read_text(encoding="utf-8")
    assert right in text
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    assert server.load(f"{name}-plan").status == 500
    assert message in server.log_text()
    assert server.is_live()


def test_growing_cache_is_no_state(concat_run: Path, tmp_path: Path) -> None:
    """Refused with the reason, before anything is written."""
    with pytest.raises(UserError, match="grows with every call"):
        written(concat_run, tmp_path / "models", variant="stateful")
    assert not (tmp_path / "models").exists()


def test_engine_of_tensorrt_for_rtx_is_refused(finished_run: Path, tmp_path: Path) -> None:
    """Triton's backend does not load it; the hint names what it loads, and the variant that needs no engine."""
    with pytest.raises(UserError, match="tensorrt-rtx") as error:
        written(finished_run / "run", tmp_path / "models")
    assert "--target tensorrt" in error.value.hint
    assert "--variant cpu" in error.value.hint


def test_engine_that_was_changed_is_refused(concat_run: Path, tmp_path: Path) -> None:
    """Another file than the manifest records."""
    engine = tmp_path / "out.plan"
    engine.write_bytes(b"another engine")
    with pytest.raises(UserError, match="is not the engine"):
        written(concat_run, tmp_path / "models", engine=engine)


def test_needs_are_written_down(concat_run: Path, tmp_path: Path) -> None:
    """Version of TensorRT and compute capability, for whoever chooses the container."""
    written(concat_run, tmp_path / "models")
    report = json.loads((tmp_path / "models" / "triton.json").read_text(encoding="utf-8"))
    assert report["needs"][:2] == ["TensorRT 10.16.0", "a GPU of compute capability 8.9"]


@pytest.mark.parametrize("kv_cache", ["concat", "static"])
def test_engine_that_says_what_it_clips_has_its_batch_among_the_dimensions(
    server: TritonServer, repository: Path, finished_run: Path, tmp_path: Path, kv_cache: Literal["concat", "static"]
) -> None:
    """Triton wants the batch in front of every output or of none; warm-up and CUDA graph are of one text."""
    run = engine_run(finished_run, tmp_path / "run", kv_cache, "--emit-range-outputs")
    name = f"plan-ranged-{kv_cache}"
    config = written(run, repository, name=name)
    past = [-1, HEADS, SLOTS if kv_cache == "static" else -1, HEAD_SIZE]
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert shapes(config.input)["input_ids"] == [-1, -1]
    assert shapes(config.input)[CACHE[0]] == past
    assert shapes(config.output)["range_monitor"] == [8, 3]
    decode = config.model_warmup[-1]
    sizes = {tensor: list(item.dims) for tensor, item in decode.inputs.items()}
    assert decode.batch_size == 1
    assert sizes["input_ids"] == sizes["position_ids"] == [1, 1]
    assert sizes[CACHE[0]] == [1, HEADS, SLOTS if kv_cache == "static" else LIMITS.max_kv_len // 2, HEAD_SIZE]
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == [0] * (kv_cache == "static")
    assert "unable to find backend library for backend 'tensorrt'" in server.load(f"{name}-plan").document["error"]
    with pytest.raises(UserError, match="no-emit-range-outputs"):
        written(run, repository, name=f"{name}-state", variant="stateful")
