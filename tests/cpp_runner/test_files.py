"""Files of the C++ runner against the real Polygraphy: bytes that it writes, calls that it reads."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import load_json, save_json

from fptq_export.runtime.sampling import Sampling
from tests.cpp_runner.conftest import Outcome, Runner, outcome_of
from tests.cpp_runner.model import Spec, completion, keys_and_values, logits, write_plan

PROMPT = [5, 9, 30, 2]


def arrays() -> OrderedDict[str, NDArray[Any]]:
    """Every type that an engine and NumPy share, and every shape that the format writes in another way."""
    rng = np.random.default_rng(0)
    return OrderedDict[str, NDArray[Any]](
        {
            "input_ids": rng.integers(-(2**62), 2**62, (3, 5)),
            "int32": rng.integers(-5, 5, (7,), np.int32),
            "int8": rng.integers(-128, 128, (2, 3, 1, 5)).astype(np.int8),
            "uint8": np.arange(255, dtype=np.uint8),
            "flags": np.array([True, False]),
            "half": rng.standard_normal((1234, 1)).astype(np.float16),
            "float": np.array([np.nan, np.inf, -0.0], np.float32),
            "scalar": np.array(1.5, np.float32),
            "past_key_values.0.key": np.zeros((1, 2, 0, 4), np.float16),
            '\u00e4 "\\/\n\x7f': np.zeros((1,) * 9, np.int8),
        }
    )


def test_inputs_are_written_as_polygraphy_writes_them(tests_program: Path, tmp_path: Path) -> None:
    """Read and written again: byte by byte the same, for two calls in one file."""
    calls = [arrays(), OrderedDict(only=np.arange(4))]
    save_json(calls, str(tmp_path / "in.json"))
    done = outcome_of([str(tests_program), "rewrite", str(tmp_path / "in.json"), str(tmp_path / "out.json")])
    assert done.code == 0, done.err
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "in.json").read_bytes()
    assert list(tmp_path.glob("*.partial")) == []


def test_outputs_are_written_as_polygraphy_writes_them(tests_program: Path, tmp_path: Path) -> None:
    """The same for the results of a runner, with its time."""
    save_json([arrays()], str(tmp_path / "in.json"))
    results = RunResults([("runner", [IterationResult(arrays(), runtime=0.012345, runner_name="runner")])])
    results.save(str(tmp_path / "expected.json"))
    words = [str(tests_program), "outputs", str(tmp_path / "in.json"), str(tmp_path / "out.json"), "0.012345"]
    done = outcome_of(words)
    assert done.code == 0, done.err
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


def test_arrays_in_fortran_order_are_read(tests_program: Path, tmp_path: Path) -> None:
    """NumPy saves a transposed array as it lies in memory; it comes out in C order with the same elements."""
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4).T
    save_json([OrderedDict(x=array)], str(tmp_path / "in.json"))
    save_json([OrderedDict(x=np.ascontiguousarray(array))], str(tmp_path / "expected.json"))
    assert outcome_of([str(tests_program), "rewrite", str(tmp_path / "in.json"), str(tmp_path / "out.json")]).code == 0
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


def prefill_feed(spec: Spec) -> OrderedDict[str, NDArray[Any]]:
    """Every input of the double for PROMPT, as `fptq-export diff --save-io` writes them."""
    slots = spec.past + spec.input if spec.static else 0
    feed = OrderedDict[str, NDArray[Any]](
        input_ids=np.array([PROMPT]),
        attention_mask=np.ones((1, slots or len(PROMPT)), np.int64),
        position_ids=np.arange(len(PROMPT))[None],
    )
    if spec.static:
        feed["write_indices"] = np.zeros(1, np.int64)
    for layer in range(spec.layers):
        for kind in ("key", "value"):
            shape = (1, spec.heads, slots, spec.head_size)
            feed[f"past_key_values.{layer}.{kind}"] = np.zeros(shape, np.float16)
    return feed


def inferred(on_double: Runner, tmp_path: Path, spec: Spec, feed: OrderedDict[str, NDArray[Any]]) -> Outcome:
    """`infer` of one call; its outputs are in `out.json`."""
    save_json([feed], str(tmp_path / "in.json"))
    plan = write_plan(tmp_path / "out.plan", spec)
    files = ("--load-inputs", tmp_path / "in.json", "--save-outputs", tmp_path / "out.json")
    return on_double("infer", plan, *files)


@pytest.mark.parametrize("spec", [Spec(), Spec(static=True, logits="last")], ids=["concat", "static"])
def test_outputs_of_a_call_are_read_by_polygraphy(on_double: Runner, tmp_path: Path, spec: Spec) -> None:
    """Logits and the whole cache, in the order of the engine, as `RunResults` of one runner."""
    done = inferred(on_double, tmp_path, spec, prefill_feed(spec))
    assert done.code == 0, done.err
    ((name, (result,)),) = RunResults.load(str(tmp_path / "out.json"))
    assert name == "fptq-run"
    outputs = dict(result.items())
    np.testing.assert_array_equal(outputs["logits"][0, -1], logits(PROMPT, spec))
    for layer in range(spec.layers):
        for kind, word in enumerate(("key", "value")):
            cache = outputs[f"present.{layer}.{word}"][0, :, : len(PROMPT)]
            np.testing.assert_array_equal(cache, keys_and_values(PROMPT, spec, layer, kind))
    assert result.runtime > 0


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"input_ids": np.array([PROMPT], np.float32)}, "input_ids: is float32, and the engine takes int64"),
        ({"input_ids": np.array(PROMPT)}, "input_ids: is 4, and the engine takes 2 dimensions"),
        ({"position_ids": np.zeros((1, 9), np.int64)}, "position_ids is 1x9, and the engine takes 1x1 to 2x8"),
        ({"token_type_ids": np.zeros((1, 4), np.int64)}, "token_type_ids: is no input of this engine"),
        ({"attention_mask": None}, "attention_mask: is missing among the inputs"),
        ({"attention_mask": np.ones((1, 4), np.float64)}, "is an array of NumPy type <f8"),
        ({"attention_mask": "text"}, "is no array in Polygraphy's format"),
    ],
    ids=["type", "rank", "shape", "unknown", "missing", "float64", "text"],
)
def test_inputs_that_do_not_fit_are_refused(
    on_double: Runner, tmp_path: Path, change: dict[str, Any], cause: str
) -> None:
    """One sentence that names the input, exit code 1, no file."""
    feed = prefill_feed(Spec())
    for name, value in change.items():
        if value is None:
            del feed[name]
        else:
            feed[name] = value
    done = inferred(on_double, tmp_path, Spec(), feed)
    assert done.code == 1
    assert cause in done.err.splitlines()[0]
    assert not (tmp_path / "out.json").exists()


def test_prompts_and_answers_in_files(on_double: Runner, tmp_path: Path) -> None:
    """`generate` reads the rows of input_ids and writes all answers in one array, -1 behind a shorter one."""
    spec = Spec()
    stop = completion(PROMPT, spec, Sampling(max_tokens=5))[1]
    prompts = np.array([PROMPT, [4, 3, 2, 1]], np.int32)
    save_json([OrderedDict(input_ids=prompts)], str(tmp_path / "in.json"))
    files = ("--load-inputs", tmp_path / "in.json", "--save-outputs", tmp_path / "out.json")
    plan = write_plan(tmp_path / "out.plan", spec)
    done = on_double("generate", plan, *files, "--max-tokens", 5, "--stop-ids", stop)
    assert done.code == 0, done.err
    expected = [completion(prompt.tolist(), spec, Sampling(max_tokens=5), stop=stop) for prompt in prompts]
    ((_, (result,)),) = load_json(str(tmp_path / "out.json"))
    width = max(map(len, expected))
    assert result["output_ids"].tolist() == [ids + [-1] * (width - len(ids)) for ids in expected]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "is no JSON"),
        ("[]", "has no inputs"),
        ('[{"x": {"array": "QUJD", "polygraphy_class": "ndarray"}}]', "x: is no .npy file"),
        ('[{"x": {"tensor": "QUJD", "polygraphy_class": "Tensor"}}]', "only torch reads"),
        ('[{"y": 1}]', "y: is no array in Polygraphy's format"),
        ("[1]", "is no object"),
    ],
)
def test_damaged_input_files_are_refused(on_double: Runner, tmp_path: Path, text: str, cause: str) -> None:
    """A file that is not Polygraphy's is an error that names the file."""
    (tmp_path / "in.json").write_text(text)
    plan = write_plan(tmp_path / "out.plan", Spec())
    done = on_double("generate", plan, "--load-inputs", tmp_path / "in.json")
    assert done.code == 1
    assert str(tmp_path / "in.json") in done.err
    assert cause in done.err.splitlines()[0]
