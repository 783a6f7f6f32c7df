"""The pipeline: the only room that knows every stage and their order."""

from fptq_export.pipeline.halves import runs_from_options
from fptq_export.pipeline.road import ROAD, VERBS, run_road

__all__ = ["ROAD", "VERBS", "run_road", "runs_from_options"]
