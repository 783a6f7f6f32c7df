"""Why an engine will not load, in the words of `fptq-export doctor`; and the real library, up to the missing GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fptq_export.build.gpus import driver_of_machine
from fptq_export.doctor.machine import machine_of_here
from fptq_export.doctor.plan import PlanQuestion, report_on_plan
from fptq_export.files import sha256_from_file
from fptq_export.runtime.sampling import Sampling
from tests.cpp_runner.conftest import SANITIZERS, Outcome, Runner, built, outcome_of
from tests.cpp_runner.model import Spec, completion, write_plan

IDS = ("--ids", "1,2", "--max-tokens", "3")


@dataclass(frozen=True)
class Engine:
    """A plan of the double with the records of a real run."""

    plan: Path
    run: Path

    def edit(self, change: Callable[[dict[str, Any]], object], *, proof: bool = True) -> None:
        """Change what is recorded of the engine, in the manifest and, unless told otherwise, in the proof."""
        manifest = json.loads((self.run / "manifest.json").read_text())
        build = manifest["stages"]["build"]
        change(build["summary"]["engine"])
        if proof:
            content = json.loads((self.run / "proof.json").read_text())
            content["engine"] = build["summary"]["engine"]
            (self.run / "proof.json").write_text(json.dumps(content))
        for record in build["outputs"]:
            if record["path"].endswith("out.plan"):
                record["sha256"] = sha256_from_file(self.plan)
            if record["path"] == "proof.json" and proof:
                record["sha256"] = sha256_from_file(self.run / "proof.json")
        (self.run / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def engine(finished_run: Path, tmp_path: Path) -> Engine:
    """The double's plan in the place of the engine of the tiny LLaMA."""
    found = Engine(write_plan(tmp_path / "out.plan", Spec()), tmp_path / "run")
    found.run.mkdir()
    for name in ("manifest.json", "proof.json"):
        shutil.copyfile(finished_run / "run" / name, found.run / name)
    found.edit(lambda facts: facts)
    return found


def with_plugin(facts: dict[str, Any], *, embedded: bool = False) -> None:
    """The engine needs the plugin, or carries it."""
    facts["plugin_layers"] = 4
    facts["plugin"] = {
        "version": "1.2",
        "layout_version": 1,
        "architectures": [80],
        "tensorrt_headers": "10.14",
        "sha256": "",
        "embedded": embedded,
    }


def test_engine_in_order_is_checked_and_runs(on_double: Runner, engine: Engine) -> None:
    """Every check is ok, the proof is counted as Python counts it, and tokens come out."""
    checked = on_double("check", engine.plan)
    assert checked.code == 0, checked.out + checked.err
    lines = checked.out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("ok")] == [
        "file:",
        "manifest:",
        "proof:",
        "library:",
        "plugin:",
        "GPU:",
        "opened:",
    ]
    python = report_on_plan(PlanQuestion(engine.plan, engine.run), machine_of_here())
    (proven,) = (check.text.partition(" (")[0] for check in python.checks if check.what == "proof")
    assert f"proof: {proven}\n" in checked.out
    assert on_double("generate", engine.plan, *IDS).tokens == [completion([1, 2], Spec(), Sampling(max_tokens=3))]


def test_same_words_as_doctor_for_a_changed_file(on_double: Runner, engine: Engine) -> None:
    """The engine, or the manifest, is not the one that was recorded: both tools say it alike."""
    content = bytearray(engine.plan.read_bytes())
    content[30] ^= 1  # a byte of the header that says nothing
    engine.plan.write_bytes(content)
    python = report_on_plan(PlanQuestion(engine.plan, engine.run), machine_of_here())
    (text,) = (check.text for check in python.checks if check.what == "manifest" and check.status == "problem")
    refused = on_double("generate", engine.plan, "--run", engine.run, *IDS)
    assert refused.code == 1
    assert refused.err.splitlines()[0] == f"{engine.plan}: {text}"


def refused(on_double: Runner, engine: Engine, *words: str, **double: Any) -> str:
    """The first line of a refusal to generate; `check` must call it a problem too."""
    done = on_double("generate", engine.plan, *IDS, *words, double=double)
    assert (done.code, done.out) == (1, "")
    checked = on_double("check", engine.plan, *words, double=double)
    assert checked.code == 1
    return done.err.splitlines()[0]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "it is not an engine: it is empty"),
        (b"{}", "JSON text"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        (bytes(64), "filled with zeros"),
        (b"vtrt" + bytes(20), "only 24 bytes long"),
        (b"\x08\x09" * 40, "of no kind that TensorRT writes"),
    ],
)
def test_file_that_is_no_engine_is_named(on_double: Runner, engine: Engine, content: bytes, cause: str) -> None:
    """What it is instead, as far as its first bytes say."""
    engine.plan.write_bytes(content)
    assert cause in refused(on_double, engine)


def test_truncated_and_missing_files_are_named(on_double: Runner, engine: Engine) -> None:
    """The header says how long the file was."""
    size = engine.plan.stat().st_size
    engine.plan.write_bytes(engine.plan.read_bytes()[:-5])
    assert f"it is truncated: {size - 5} bytes, its header says {size}" in refused(on_double, engine)
    engine.plan.unlink()
    assert "no such file" in refused(on_double, engine)
    assert "is a directory" in on_double("check", engine.run).out


@pytest.mark.parametrize(
    ("double", "cause"),
    [
        ({"library_version": "1.8.0.3"}, "is 1.8.0.3: only the version that built an engine is sure to load it"),
        ({"target": "tensorrt", "library_version": "11.1.0.106"}, "is tensorrt 11.1.0.106, which does not load it"),
        ({"compute_capability": "9.0"}, "and here is a double (9.0)"),
    ],
    ids=["version", "flavour", "GPU"],
)
def test_other_machine_is_named(on_double: Runner, engine: Engine, double: dict[str, str], cause: str) -> None:
    """Another version, the other flavour of TensorRT, a GPU it was not built for."""
    assert cause in refused(on_double, engine, **double)


def test_missing_gpu_is_one_sentence(on_double: Runner, engine: Engine) -> None:
    """It is said after everything that can be said without one."""
    done = on_double("generate", engine.plan, *IDS, double={"gpu": False})
    assert (done.code, done.out) == (1, "")
    assert done.err == "GPU: no NVIDIA GPU is visible, and an engine is loaded into one\n"


def test_plugin_is_asked_for_and_compared(on_double: Runner, engine: Engine) -> None:
    """Missing, no library of ours, another version, none in the engine; the same one is taken."""
    engine.edit(with_plugin)
    library = engine.plan.parent / "libfptq_trt.so"
    words = ("--plugin", str(library))
    assert "4 of its layers run in the plugin, which is missing" in refused(on_double, engine)
    library.write_text("not ours")
    assert "is not a plugin library of fptq-export" in refused(on_double, engine, *words)
    library.write_text('{"version": "1.1", "layout_version": 1}')
    assert "version 1.2 (packed layout 1); here is version 1.1 (packed layout 1)" in refused(on_double, engine, *words)
    library.write_text('{"version": "1.2", "layout_version": 1}')
    assert on_double("generate", engine.plan, *IDS, *words).code == 0
    assert "which it does not carry" in refused(on_double, engine, "--plugin", "embedded")


def test_engine_that_carries_its_plugin_asks_for_none(on_double: Runner, engine: Engine) -> None:
    """The manifest says so: its code may run, no option is needed, the words are doctor's, and a file is refused."""
    write_plan(engine.plan, Spec(carries_plugin=True))
    engine.edit(lambda facts: with_plugin(facts, embedded=True))
    expected = completion([1, 2], Spec(), Sampling(max_tokens=3))
    for given in ((), ("--plugin", "embedded")):
        assert on_double("generate", engine.plan, *IDS, *given).tokens == [expected]
    python = report_on_plan(PlanQuestion(engine.plan, engine.run, "8.0"), machine_of_here())
    (text,) = (check.text for check in python.checks if check.what == "plugin")
    assert f"plugin: {text}\n" in on_double("check", engine.plan).out
    assert "would not be used" in refused(on_double, engine, "--plugin", str(engine.plan))


def test_code_in_an_engine_runs_only_where_that_is_asked_for(on_double: Runner, engine: Engine, tmp_path: Path) -> None:
    """Without a manifest, or with one of before it was recorded, `--plugin embedded` says that the file is trusted."""
    write_plan(engine.plan, Spec(carries_plugin=True))
    engine.edit(lambda facts: facts.update(plugin_layers=4, plugin=None))
    alone = write_plan(tmp_path / "alone" / "out.plan", Spec(carries_plugin=True))
    for plan in (engine.plan, alone):
        assert on_double("generate", plan, *IDS).code == 1
        assert on_double("generate", plan, *IDS, "--plugin", "embedded").code == 0
    assert "brings code that may not run" in on_double("generate", alone, *IDS).err


def test_changed_records_are_named(on_double: Runner, engine: Engine) -> None:
    """A manifest that is not what the proof says, a proof that is not what the manifest says, and damage."""
    engine.edit(lambda facts: facts.update(compute_capabilities=["8.9"]), proof=False)
    assert "its engine is not that of proof.json" in refused(on_double, engine)
    engine.edit(lambda facts: facts.update(library_version="1.8.0.0"))
    assert "it says that 1.8.0.0 built the engine, whose header says 1.7.1.116" in refused(on_double, engine)
    engine.edit(lambda facts: facts.pop("library_version"))
    assert "it was changed" in refused(on_double, engine)
    (engine.run / "proof.json").write_text("{}")
    assert "it was changed" in refused(on_double, engine)
    (engine.run / "manifest.json").write_text('{"stages": {')
    assert "is no JSON: it is damaged" in refused(on_double, engine)
    assert "cannot be opened" in refused(on_double, engine, "--run", str(engine.run.parent / "other"))


def test_engine_without_a_manifest_is_known_by_its_header(on_double: Runner, tmp_path: Path) -> None:
    """The header alone says which library it needs."""
    plan = write_plan(tmp_path / "alone.plan", Spec())
    assert on_double("generate", plan, *IDS).code == 0
    done = on_double("generate", plan, *IDS, double={"library_version": "1.6.0.0"})
    assert "only the version that built an engine" in done.err


@pytest.fixture(scope="module")
def program() -> Path:
    """`fptq-run` itself."""
    return built("fptq-run", SANITIZERS)


def run(program: Path, *words: object) -> Outcome:
    """Run it: the library that it opens leaves memory of its own behind, and CUDA needs the gap of the shadow."""
    return outcome_of([str(program), *map(str, words)], ASAN_OPTIONS="detect_leaks=0:protect_shadow_gap=0")


def test_real_engine_and_library_up_to_the_missing_gpu(program: Path, finished_run: Path, rtx_library: Path) -> None:
    """TensorRT for RTX is opened and is the version that built the engine; what is missing is a GPU."""
    if driver_of_machine().gpus:
        pytest.skip("there is a GPU here: test_real_engine_runs is the one for it")
    plan = finished_run / "out.plan"
    checked = run(program, "check", plan, "--library", rtx_library)
    assert checked.code == 1
    assert "problem" not in checked.out, checked.out
    assert f" is {rtx_library}" in checked.out
    done = run(program, "generate", plan, "--library", rtx_library, *IDS)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("GPU: no NVIDIA ")


def test_library_that_is_not_there_or_is_another_is_named(program: Path, finished_run: Path) -> None:
    """A file that is missing, and a library without TensorRT's functions."""
    plan = finished_run / "out.plan"
    missing = run(program, "check", plan, "--library", "/nowhere/libnvinfer.so.11")
    assert missing.code == 1
    assert "/nowhere/libnvinfer.so.11: cannot be loaded" in missing.err
    other = run(program, "check", plan, "--library", "libm.so.6")
    assert other.code == 1
    assert "libm.so.6: has no function getInferLibMajorVersion" in other.err


@pytest.mark.gpu
def test_real_engine_runs(program: Path, finished_run: Path, rtx_library: Path) -> None:
    """On a GPU: greedy tokens equal those of the Python session on the same engine's graph."""
    from fptq_export.runtime import Session

    plan = finished_run / "out.plan"
    done = run(program, "generate", plan, "--library", rtx_library, "--ids", "1,2,3", "--max-tokens", 8)
    if "compiled with headers" in done.err:
        pytest.skip(done.err)
    assert done.code == 0, done.err
    with Session.open(finished_run / "run", backend="onnxruntime") as session:
        expected = session.generate([1, 2, 3], Sampling(max_tokens=8, ignore_eos=True))
    assert done.tokens == [list(expected.token_ids)]
