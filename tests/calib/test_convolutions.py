"""What convolutions run: quantized unless the graph or a pattern says no, and edited entries are checked whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calib.convolutions import completed_convolutions, convolution_arrays, convolution_problems, decide_convolutions
from calib.precision import chosen_precisions
from calib.stats import Stats
from fptq_export.errors import UserError
from fptq_export.numerics import static_scale
from fptq_export.policy import ConvolutionPolicy, Policy, Rule
from fptq_export.sites import Convolution, Sites

SHAPE = (8, 4, 3, 3)
SITES = Sites(
    linears=(),
    fold_sites=(),
    convolutions=tuple(
        Convolution(
            path=path, node=path, op_type="Conv", weight=path, weight_shape=SHAPE, input="x", float_reason=reason
        )
        for path, reason in (("down", None), ("up", None), ("odd", "its weight is computed in the graph"))
    ),
)
MAXIMA = {"down": np.array([2.5], np.float32), "up": np.array([0.0], np.float32)}


def decided(*precision: str) -> dict[str, ConvolutionPolicy]:
    """Entries for these patterns."""
    choices = chosen_precisions(SITES.paths(), (), precision)
    return decide_convolutions(SITES, Stats(MAXIMA, 1, "made up"), choices)


def policy(**changes: ConvolutionPolicy) -> Policy:
    """The decided policy with other entries."""
    return Policy(model="test", rule=Rule(), layers={}, convolutions={**decided(), **changes})


def test_scale_covers_the_largest_input() -> None:
    """max|x| / 127; an input that was always zero has a positive scale."""
    entries = decided()
    assert entries["down"].activation_scale == static_scale(2.5)
    assert entries["up"].activation_scale == static_scale(0.0) > 0
    assert "max|x| 2.5" in entries["down"].reason


def test_float_convolutions_keep_their_reason() -> None:
    """That of the graph, and that of the pattern."""
    entries = decided("down=float")
    assert {path: entry.precision for path, entry in entries.items()} == {"down": "float", "up": "w8a8", "odd": "float"}
    assert entries["odd"].reason == "its weight is computed in the graph"
    assert "down=float" in entries["down"].reason
    assert entries["down"].activation_scale is None


def test_weight_that_is_not_finite_is_refused() -> None:
    """Before its codes are written; the convolution is named."""
    weight = np.full(SHAPE, np.inf, np.float32)
    with pytest.raises(UserError, match="convolution down: its weight is not finite"):
        list(convolution_arrays(policy(), SITES, lambda _name: weight))


@pytest.mark.parametrize(
    ("path", "update", "place", "message"),
    [
        ("odd", {"precision": "w8a8"}, "$.convolutions.odd.precision", "cannot be quantized (its weight is computed"),
        ("down", {"precision": "float"}, "$.convolutions.down.activation_scale", "set it to null"),
        ("down", {"weight_shape": (1,)}, "$.convolutions.down.weight_shape", "the graph has [8, 4, 3, 3]"),
    ],
)
def test_edit_that_cannot_be_carried_out_is_listed(path: str, update: dict[str, Any], place: str, message: str) -> None:
    """With its JSON path."""
    edited = policy(**{path: decided()[path].model_copy(update=update)})
    (problem,) = convolution_problems(edited, SITES, MAXIMA)
    assert problem.path == place
    assert message in problem.message


def test_convolution_that_was_not_measured_cannot_become_int8() -> None:
    """There is no scale for it."""
    (problem,) = convolution_problems(policy(), SITES, {"up": MAXIMA["up"]})
    assert "was not measured" in problem.message


def test_sound_edits_are_completed() -> None:
    """An open scale gets its closed form, a given one is kept, a float entry stays."""
    entries = decided()
    opened = entries["down"].model_copy(update={"activation_scale": None})
    given = entries["up"].model_copy(update={"activation_scale": 0.5})
    edited = policy(down=opened, up=given)
    assert list(convolution_problems(edited, SITES, MAXIMA)) == []
    completed = completed_convolutions(edited, MAXIMA)
    assert completed["down"] == entries["down"]
    assert completed["up"].activation_scale == 0.5
    assert completed["odd"] == entries["odd"]
