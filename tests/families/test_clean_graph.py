"""What `clean_up` leaves is as small as the library can make it."""

from __future__ import annotations

from collections import Counter

import pytest
from onnxscript.rewriter import rewrite

from fptq_export.graph_io import load_graph
from tests.families.conftest import Trace
from tests.families.registry import FAMILIES, Family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_patterns_that_are_looked_for_once_have_nothing_left_to_find(family: Family, trace: Trace) -> None:
    """The second round of `clean_up` runs without the library's patterns: no family has a node that they would drop."""
    model = load_graph(trace(family).model)
    before = Counter(node.op_type for node in model.graph)
    assert Counter(node.op_type for node in rewrite(model).graph) == before
