"""Run what was exported: the engine on a GPU, the portable graph in ONNX Runtime elsewhere."""

from fptq_export.runtime.generation import Completion, FinishReason, Piece
from fptq_export.runtime.limits import Limits
from fptq_export.runtime.ranges import RangeMonitor
from fptq_export.runtime.sampling import Sampling
from fptq_export.runtime.scheduler import Handle, Observer, Scheduler
from fptq_export.runtime.session import Session
from fptq_export.runtime.source import Backend
from fptq_export.runtime.text import ChatMessage, TextTokenizer

__all__ = [
    "Backend",
    "ChatMessage",
    "Completion",
    "FinishReason",
    "Handle",
    "Limits",
    "Observer",
    "Piece",
    "RangeMonitor",
    "Sampling",
    "Scheduler",
    "Session",
    "TextTokenizer",
]
