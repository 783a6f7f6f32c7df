"""The session of an engine against ONNX Runtime's on the same graph: bit for bit, in every form of cache and logits.

TensorRT is a double with ONNX Runtime inside (`fake_tensorrt`), so what differs is what the session does: which pointer
goes where, with which shape and type, and what is left in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from fptq_export.build.profiles import LlmLimits
from fptq_export.errors import UserError
from fptq_export.runtime import Limits, Sampling, Scheduler, Session
from fptq_export.runtime.engine_session import EngineCausalSession, opened_engine
from fptq_export.verify.ort_values import array_from_ort_value, ort_value_from_array
from fptq_export.verify.sessions import OnnxCache, OnnxCausalSession
from tests.runtime import fake_tensorrt
from tests.runtime.engines import FORMS, LIMITS, PROMPT, SLOTS, STEPS, VOCABULARY, logits_of, manifest, tokens
from tests.runtime.fake_cuda import DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE, FakeCudart
from tests.runtime.fake_tensorrt import FakeTensorRT

Opened = Callable[..., EngineCausalSession]

IDS_BYTES = 4 * 512
"""Of ids, mask, positions and slots of a step, with the room between them; the cache of this prompt has 2560."""


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_onnx_runtime(graphs: dict[str, Path], opened: Opened, form: str, batch: int) -> None:
    """A prompt and steps behind it, where one wrong pointer or a slot that nobody wrote changes all that follows."""
    ids = tokens(batch)
    expected = logits_of(OnnxCausalSession(graphs[form], threads=1), ids)
    for found, right in zip(logits_of(opened(graphs[form]), ids), expected, strict=True):
        np.testing.assert_array_equal(found, right)


def test_cache_does_not_leave_the_gpu(graphs: dict[str, Path], opened: Opened, cudart: FakeCudart) -> None:
    """A step copies logits to the host and ids to the GPU, and nothing else, in both forms of the cache."""
    for form in ("concat", "static"):
        session = opened(graphs[form])
        _, cache = session.prefill(tokens())
        cudart.copied.clear()
        session.decode(np.array([[7]]), cache)
        assert cudart.copied[DEVICE_TO_HOST] == VOCABULARY * np.dtype(np.float16).itemsize
        assert cudart.copied[HOST_TO_DEVICE] <= IDS_BYTES
        assert cudart.copied[DEVICE_TO_DEVICE] == 0


@pytest.mark.parametrize("form", ["concat", "static"])
def test_steps_use_the_same_blocks_again(
    graphs: dict[str, Path], opened: Opened, cudart: FakeCudart, form: str
) -> None:
    """A second text as long as the first allocates nothing: blocks of dropped caches are taken again."""
    session = opened(graphs[form])
    logits_of(session, tokens())
    before = cudart.mallocs
    logits_of(session, tokens())
    assert cudart.mallocs == before


@pytest.mark.parametrize("form", ["concat", "static"])
def test_cache_can_be_decoded_from_twice(graphs: dict[str, Path], opened: Opened, form: str) -> None:
    """Two texts go on from one prompt, in turn, and neither writes over the other."""
    one, other = tokens(), tokens()
    other[:, PROMPT:] = (one[:, PROMPT:] + 1) % VOCABULARY
    session = opened(graphs[form])
    expected = [logits_of(session, ids)[1:] for ids in (one, other)]
    caches = [session.prefill(one[:, :PROMPT])[1]] * 2
    for step in range(STEPS):
        for text, ids in enumerate((one, other)):
            logits, caches[text] = session.decode(ids[:, PROMPT + step, None], caches[text])
            np.testing.assert_array_equal(logits, expected[text][step])


def test_static_step_tells_tensorrt_nothing_it_knows(
    graphs: dict[str, Path], opened: Opened, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes stay, so a step sets none; and no address of a cache moves, so none of those is set."""
    session = opened(graphs["static"])
    logits, cache = session.prefill(tokens())
    _, cache = session.decode(np.array([[7]]), cache)
    said: list[str] = []
    context = fake_tensorrt.IExecutionContext
    for method in ("set_input_shape", "set_tensor_address"):
        monkeypatch.setattr(context, method, recorded(getattr(context, method), said))
    session.decode(np.array([[8]]), cache)
    assert not [name for name in said if name.startswith(("past", "present"))]
    assert np.isfinite(logits).all()


def recorded(method: Callable[..., bool], names: list[str]) -> Callable[..., bool]:
    """The same, and the name of each tensor it is told of is kept."""

    def call(context: Any, name: str, value: Any) -> bool:
        names.append(name)
        return method(context, name, value)

    return call


def test_bfloat16_cache_and_logits(graphs: dict[str, Path], opened: Opened) -> None:
    """Types that NumPy lacks go through: as a graph whose cache is rounded to BF16 between calls."""
    reference = OnnxCausalSession(graphs["concat"], threads=1)
    names = list(reference.prefill(tokens())[1].values)
    types = dict.fromkeys([*names, *(name.replace("past_key_values", "present") for name in names), "logits"], "BF16")
    ids = tokens()
    logits, cache = reference.prefill(ids[:, :PROMPT])
    expected = [rounded(logits)]
    for token in ids[:, PROMPT:].T:
        logits, cache = reference.decode(token[:, None], rounded_cache(cache))
        expected.append(rounded(logits))
    for found, right in zip(logits_of(opened(graphs["concat"], types=types), ids), expected, strict=True):
        np.testing.assert_array_equal(found, right)


def rounded(array: NDArray[Any]) -> NDArray[Any]:
    """To BF16 and back."""
    return array.astype(ml_dtypes.bfloat16).astype(array.dtype)


def rounded_cache(cache: OnnxCache) -> OnnxCache:
    """The same with values that BF16 has."""
    values = {name: ort_value_from_array(rounded(array_from_ort_value(value))) for name, value in cache.values.items()}
    return OnnxCache(values, cache.length)


def test_outputs_that_nobody_asked_for_are_written_aside(
    graphs: dict[str, Path], opened: Opened, tmp_path: Path
) -> None:
    """An engine that also gives ranges, as the monitor's does, writes no logits there."""
    model = onnx.load(graphs["concat"], load_external_data=True)
    model.graph.node.append(onnx.helper.make_node("Cast", ["position_ids"], ["range.0"], to=onnx.TensorProto.FLOAT))
    shape = [
        dim.dim_param for dim in next(v for v in model.graph.input if v.name == "input_ids").type.tensor_type.shape.dim
    ]
    model.graph.output.insert(0, onnx.helper.make_tensor_value_info("range.0", onnx.TensorProto.FLOAT, shape))
    onnx.save(model, tmp_path / "ranges.onnx")
    expected = logits_of(OnnxCausalSession(graphs["concat"], threads=1), tokens())
    for found, right in zip(logits_of(opened(tmp_path / "ranges.onnx"), tokens()), expected, strict=True):
        np.testing.assert_array_equal(found, right)


def test_the_narrowest_profile_runs_a_call(graphs: dict[str, Path], opened: Opened, tensorrt: FakeTensorRT) -> None:
    """With one profile for prompts and one for steps, each call runs in its own; the logits stay the same."""
    session = opened(graphs["concat"], (LIMITS, LlmLimits(2, 1, 24)))
    found = logits_of(session, tokens())
    (engine,) = tensorrt.engines
    calls = {context._profile: context._calls for context in engine._contexts}
    assert calls == {0: 1, 1: STEPS}
    for logits, right in zip(found, logits_of(opened(graphs["concat"]), tokens()), strict=True):
        np.testing.assert_array_equal(logits, right)


@pytest.mark.parametrize(
    ("form", "shape", "words"),
    [
        ("concat", (1, 17), r"input_ids is \[1, 17\], and the engine takes \[1, 1\] to \[2, 16\]"),
        ("concat", (3, 4), r"input_ids is \[3, 4\]"),
        ("static", (1, 17), r"input_ids is \[1, 17\]"),
        ("static", (1, 41), "its KV cache has 40 slots, and 41 tokens are asked of it"),
    ],
)
def test_prompt_outside_the_profiles_is_refused(
    graphs: dict[str, Path], opened: Opened, form: str, shape: tuple[int, int], words: str
) -> None:
    """With what the engine takes, before anything runs; and the session goes on."""
    session = opened(graphs[form])
    with pytest.raises(UserError, match=words) as caught:
        session.prefill(np.zeros(shape, np.int64))
    assert "--max-" in caught.value.hint
    assert np.isfinite(session.prefill(tokens())[0]).all()


@pytest.mark.parametrize(("form", "room"), [("concat", LIMITS.max_kv_len + 1), ("static", SLOTS)])
def test_text_longer_than_the_cache_is_refused(graphs: dict[str, Path], opened: Opened, form: str, room: int) -> None:
    """So many tokens fit, and the next one is named, not written behind the end."""
    session = opened(graphs[form])
    _, cache = session.prefill(tokens(count=15))
    while cache.length < room:
        _, cache = session.decode(np.array([[7]]), cache)
    with pytest.raises(UserError, match=rf"{room}|slots"):
        session.decode(np.array([[7]]), cache)


def test_cache_of_another_batch_is_refused(graphs: dict[str, Path], opened: Opened) -> None:
    """Else the engine would read behind its end."""
    session = opened(graphs["concat"])
    _, cache = session.prefill(tokens())
    with pytest.raises(UserError, match="tokens of 2 sequences are given behind a cache of 1"):
        session.decode(np.zeros((2, 1), np.int64), cache)


@pytest.mark.parametrize("call", ["create_execution_context", "execute_async_v3"])
def test_call_that_fails_says_why(graphs: dict[str, Path], opened: Opened, tensorrt: FakeTensorRT, call: str) -> None:
    """With TensorRT's words, and a step that failed can be tried again from the same cache."""
    session = opened(graphs["static"])
    if call == "execute_async_v3":
        _, cache = session.prefill(tokens())
        expected, _ = session.decode(np.array([[7]]), cache)
    tensorrt.engines[0]._refuses.add(call)
    with pytest.raises(UserError, match=r"could not be allocated|illegal memory access"):
        session.prefill(tokens())
    tensorrt.engines[0]._refuses.clear()
    if call == "execute_async_v3":
        np.testing.assert_array_equal(session.decode(np.array([[7]]), cache)[0], expected)


def test_closed_session_is_refused(graphs: dict[str, Path], tensorrt: FakeTensorRT, tmp_path: Path) -> None:
    """Neither prompt nor step reaches a stream that is gone; a cache that is still held is freed with it."""
    plan = fake_tensorrt.plan_of_graph(graphs["concat"], tmp_path / "out.plan", (LIMITS,))
    with opened_engine(manifest(), plan) as session:
        _, cache = session.prefill(tokens())
    with pytest.raises(UserError, match="open the session again"):
        session.prefill(tokens())
    with pytest.raises(UserError, match="open the session again"):
        session.decode(np.array([[7]]), cache)
    assert len(tensorrt.cudart.live) == 1
    del cache
    assert not tensorrt.cudart.live


def test_full_gpu_is_named(graphs: dict[str, Path], opened: Opened, cudart: FakeCudart) -> None:
    """Blocks that lie unused are freed first; what then finds no room is an error that says how much was wanted."""
    session = opened(graphs["concat"])
    logits_of(session, tokens(2))
    unused = sum(map(len, cudart.live.values()))
    cudart.room = unused
    held: list[Any] = []
    with pytest.raises(UserError, match=r"the GPU has no room for \d+ MiB more"):
        held.extend(session.prefill(tokens())[1] for _ in range(100))
    assert len(held) > 1
    cudart.room = 1 << 40


@pytest.fixture
def engine_of_run(finished_run: Path, tensorrt: FakeTensorRT, tmp_path: Path) -> Iterator[Session]:
    """The run's own W4A8 graph behind TensorRT, opened as a user does on a machine with a GPU."""
    plan = fake_tensorrt.plan_of_graph(finished_run / "run" / "model.w4a8.onnx", tmp_path / "out.plan", (LIMITS,))
    with Session.open(finished_run / "run", engine=plan) as session:
        yield session


def test_session_writes_the_text_of_onnx_runtime(engine_of_run: Session, finished_run: Path) -> None:
    """`Session.open` takes the engine where there is a GPU, and its text is that of the portable graph."""
    assert engine_of_run.backend == "tensorrt"
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=1, ignore_eos=True)
    portable = Session.open(finished_run / "run", backend="onnxruntime", kernels="stock", threads=1)
    expected = portable.generate("An", sampling)
    assert engine_of_run.generate("An", sampling).token_ids == expected.token_ids


@pytest.mark.parametrize(("form", "room"), [("concat", LIMITS.max_kv_len), ("static", SLOTS)])
def test_text_ends_where_the_cache_does(graphs: dict[str, Path], opened: Opened, form: str, room: int) -> None:
    """The last token that fits is given, with the reason, and the engine is not asked for one more."""
    model = opened(graphs[form])
    assert model.limits == Limits(LIMITS.max_input_len, room, LIMITS.max_batch_size)
    text = Session(model, limits=model.limits).generate(tokens(count=PROMPT)[0], Sampling(max_tokens=99))
    assert (text.finish_reason, len(text.token_ids)) == ("length", room - PROMPT + 1)


def test_limits_are_those_of_the_engine(engine_of_run: Session) -> None:
    """Not those of the run, whose last engine may be another one."""
    assert engine_of_run.limits == Limits(LIMITS.max_input_len, LIMITS.max_kv_len, LIMITS.max_batch_size)


def test_many_texts_do_not_mix(engine_of_run: Session) -> None:
    """Steps of eight texts in turn, from two threads, give each the tokens that it has alone."""
    prompts = [tokens(count=3 + length)[0].tolist() for length in range(8)]
    samplings = [Sampling(max_tokens=8, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(8)]
    alone = [engine_of_run.generate(*text).token_ids for text in zip(prompts, samplings, strict=True)]
    with Scheduler(engine_of_run, workers=2, max_active=5) as scheduler:
        handles = [scheduler.submit(*text) for text in zip(prompts, samplings, strict=True)]
        assert [handle.result().token_ids for handle in handles] == alone
