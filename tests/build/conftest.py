"""Small lowered graphs, named as the rewrites name them, and a progress that remembers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.support.onnx_graphs import GraphBuilder

if TYPE_CHECKING:
    from fptq_export.build.engine import BuildRequest
    from fptq_export.progress import Task

GOLDEN = Path(__file__).parents[1] / "golden" / "build"
CHANNELS = 256
GROUP_SIZE = 64


@dataclass(frozen=True)
class LoweredGraph:
    """A graph on disk with its external weights, and what the policy says about it."""

    path: Path
    quantized: dict[str, int]


class Tape(GraphBuilder):
    """Nodes and initializers of a lowered graph in the making."""

    def int4(self, name: str, shape: tuple[int, int]) -> str:
        """Add random INT4 codes."""
        packed = self.random.integers(0, 256, np.prod(shape) // 2, dtype=np.uint8)
        self.initializers.append(helper.make_tensor(name, TensorProto.INT4, shape, packed.tobytes(), raw=True))
        return name

    def static_qdq(self, x: str, path: str) -> str:
        """INT8 per tensor, in float32."""
        scale = self.constant(f"{path}.activation_scale", np.float32(0.05))
        zero = self.constant(f"{path}.zero_point", np.int8(0))
        wide = self.op("Cast", [x], f"{path}/Cast", to=TensorProto.FLOAT)
        codes = self.op("QuantizeLinear", [wide, scale, zero], f"{path}/QuantizeLinear")
        return self.op("DequantizeLinear", [codes, scale, zero], f"{path}/DequantizeLinear")

    def per_token_qdq(self, x: str, path: str) -> str:
        """INT8 with one scale a token, in float32."""
        wide = self.op("Cast", [x], f"{path}/Cast", to=TensorProto.FLOAT)
        axes = self.constant(f"{path}.axes", np.array([-1], np.int64))
        peak = self.op("ReduceMax", [self.op("Abs", [wide], f"{path}/Abs"), axes], f"{path}/ReduceMax")
        guarded = self.op("Max", [peak, self.constant(f"{path}.eps", np.float32(1e-8))], f"{path}/Max")
        scale = self.op("Div", [guarded, self.constant(f"{path}.levels", np.float32(127))], f"{path}/Div")
        codes = self.op("Round", [self.op("Div", [wide, scale], f"{path}/Div_1")], f"{path}/Round")
        bounds = [self.constant(f"{path}.bound_{end}", np.float32(end)) for end in (-128, 127)]
        return self.op("Mul", [self.op("Clip", [codes, *bounds], f"{path}/Clip"), scale], f"{path}/Mul")

    def linear(self, x: str, path: str, shape: tuple[int, int], per_token: bool, group: int, barrier: bool) -> str:
        """A quantized linear as the native lowering writes it; without the barrier it is the forbidden pattern."""
        quantized = self.per_token_qdq(x, path) if per_token else self.static_qdq(x, path)
        codes = self.int4(f"{path}.weight_codes", shape)
        scales = self.random.uniform(0.01, 0.02, (shape[0] // group, shape[1])).astype(np.float16)
        blocks = [codes, self.constant(f"{path}.weight_scales", scales)]
        weight = self.op("DequantizeLinear", blocks, f"{path}/DequantizeLinear_1", axis=0, block_size=group)
        quantized = self.op("Cast", [quantized], f"{path}/Cast_1", to=TensorProto.FLOAT16)
        if barrier:
            lowest = self.constant(f"{path}.lowest", np.float16(-65504))
            quantized = self.op("Max", [quantized, lowest], f"{path}/Max_1")
        return self.op("MatMul", [quantized, weight], f"{path}/MatMul")

    def rms_norm(self, x: str, path: str, channels: int) -> str:
        """RMSNorm computed in float32."""
        wide = self.op("Cast", [x], f"{path}/Cast", to=TensorProto.FLOAT)
        axes = self.constant(f"{path}.axes", np.array([-1], np.int64))
        mean = self.op("ReduceMean", [self.op("Mul", [wide, wide], f"{path}/Mul"), axes], f"{path}/ReduceMean")
        root = self.op("Sqrt", [mean], f"{path}/Sqrt")
        narrow = self.op(
            "Cast", [self.op("Div", [wide, root], f"{path}/Div")], f"{path}/Cast_1", to=TensorProto.FLOAT16
        )
        return self.op("Mul", [narrow, self.constant(f"{path}.weight", np.ones(channels, np.float16))], f"{path}/Mul_1")


@dataclass(frozen=True)
class Recipe:
    """What a test graph looks like: a norm, then linears that read it side by side."""

    linears: dict[str, bool] = field(default_factory=lambda: {"layer.q_proj": False, "layer.k_proj": False})
    """Torch path -> whether its activation is quantized token by token."""
    dims: tuple[str | int, ...] = ("batch", "sequence")
    group_size: int = GROUP_SIZE
    barrier: bool = True
    out_features: int = 128
    summed: bool = False
    """One output, the sum of the linears: TensorRT fuses linears whose outputs stay inside the graph."""


def write_graph(recipe: Recipe, directory: Path) -> LoweredGraph:
    tape = Tape()
    shape = (CHANNELS, recipe.out_features)
    normed = tape.rms_norm("x", "layer.input_layernorm", CHANNELS)
    outputs = [
        tape.linear(normed, path, shape, per_token, recipe.group_size, recipe.barrier)
        for path, per_token in recipe.linears.items()
    ]
    if recipe.summed:
        outputs = [functools.reduce(lambda a, b: tape.op("Add", [a, b], f"sum/{b}"), outputs)]
    graph = helper.make_graph(
        tape.nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [*recipe.dims, CHANNELS])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [*recipe.dims, shape[1]]) for name in outputs],
        tape.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    path = directory / "lowered.onnx"
    (directory / "weights.data").unlink(missing_ok=True)  # onnx appends to a data file that is there
    onnx.save(model, str(path), save_as_external_data=True, location="weights.data", size_threshold=1024)
    return LoweredGraph(path, dict.fromkeys(recipe.linears, shape[0] * shape[1]))


@dataclass
class Recorder:
    """Progress that keeps every number, and may call back on each."""

    seen: list[float] = field(default_factory=list)
    on_update: Callable[[], None] = lambda: None

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "") -> Iterator[Task]:
        """Open a task."""
        yield self

    def advance(self, amount: float = 1.0) -> None:
        """Not used by the build."""
        raise AssertionError("the build sets what is done, it does not add to it")

    def update(self, completed: float, total: float | None = None) -> None:
        """Remember what is done."""
        self.seen.append(completed)
        self.on_update()


@pytest.fixture
def golden() -> Path:
    """Folder of recorded builder logs."""
    return GOLDEN


@pytest.fixture
def recorder() -> Recorder:
    """A progress that remembers."""
    return Recorder()


@pytest.fixture
def make_recipe() -> type[Recipe]:
    """Describes a test graph."""
    return Recipe


@pytest.fixture
def make_graph(tmp_path: Path) -> Callable[[Recipe], LoweredGraph]:
    """Writes a test graph."""
    return lambda recipe: write_graph(recipe, tmp_path)


@pytest.fixture
def make_request(tmp_path: Path) -> Callable[..., BuildRequest]:
    """Writes the graph of a recipe and asks for its engine; other fields of the request by keyword."""
    from fptq_export.build.engine import BuildRequest
    from fptq_export.build.profiles import Profile, ShapeRange
    from fptq_export.build.targets import Target

    def request(recipe: Recipe | None = None, **changes: Any) -> BuildRequest:
        recipe = recipe or Recipe()
        graph = write_graph(recipe, tmp_path)
        low, best, high = (
            (*(dim if isinstance(dim, int) else size for dim in recipe.dims), CHANNELS) for size in (1, 4, 8)
        )
        dynamic = any(isinstance(dim, str) for dim in recipe.dims)
        fields: dict[str, Any] = {
            "onnx_path": graph.path,
            "weights_dir": tmp_path,
            "engine_path": tmp_path / "engine" / "out.plan",
            "log_path": tmp_path / "build.log",
            "target": Target.TENSORRT_RTX,
            "quantized": graph.quantized,
            "profiles": (Profile((ShapeRange("x", low, best, high),)),) if dynamic else (),
        }
        return BuildRequest(**(fields | changes))

    return request
