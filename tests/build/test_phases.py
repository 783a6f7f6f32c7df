from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fptq_export.build.phases import PhaseProgress


def test_inner_phase_fills_one_step_of_its_parent() -> None:
    """Half of an inner phase, in the second of four steps, is 1.5 / 4."""
    phases = PhaseProgress()
    phases.start("build", None, 4)
    phases.complete_step("build", 0)
    phases.start("inner", "build", 2)
    phases.complete_step("inner", 0)
    assert phases.fraction() == 1.5 / 4


def test_end_of_outermost_phase_is_all() -> None:
    """The bar ends at 100 % although TensorRT reports no last step."""
    phases = PhaseProgress()
    phases.start("build", None, 6)
    phases.start("inner", "build", 3)
    phases.finish("inner")
    assert phases.fraction() < 1.0
    phases.finish("build")
    assert phases.fraction() == 1.0


def test_unknown_phase_is_left_alone() -> None:
    """A step or an end of a phase that never began changes nothing."""
    phases = PhaseProgress()
    phases.start("build", None, 2)
    phases.complete_step("other", 1)
    phases.finish("other")
    assert phases.fraction() == 0.0


NAMES = st.sampled_from(["a", "b", "c", "d"])
EVENTS = st.one_of(
    st.tuples(st.just("start"), NAMES, st.integers(0, 5)),
    st.tuples(st.just("step"), NAMES, st.integers(0, 9)),
    st.tuples(st.just("finish"), NAMES, st.just(0)),
)


@given(st.lists(EVENTS, max_size=40))
def test_fraction_never_falls_and_stays_in_range(events: list[tuple[str, str, int]]) -> None:
    """Whatever order phases come in, opened twice or left open, the bar moves forward within 0 and 1."""
    phases = PhaseProgress()
    phases.start("build", None, 3)
    last = 0.0
    for kind, name, number in events:
        if kind == "start":
            phases.start(name, "build" if name == "a" else chr(ord(name) - 1), number)
        elif kind == "step":
            phases.complete_step(name, number)
        else:
            phases.finish(name)
        assert last <= phases.fraction() <= 1.0
        last = phases.fraction()
