"""Ranks share windows in whole batches, each window once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.ranks import ALONE, OneProcess, share_of_rank
from fptq_export.errors import UserError


@dataclass
class Rank(OneProcess):
    """A rank that exchanges nothing."""

    rank: int = 0
    size: int = 1


@given(data=st.data(), ranks=st.integers(1, 9), batch_size=st.integers(1, 12))
def test_every_window_belongs_to_one_rank(data: st.DataObject, ranks: int, batch_size: int) -> None:
    """Shares follow each other without gap or overlap, none is empty, and all ranks use one batch size."""
    windows = data.draw(st.integers(ranks, 60))
    shares = [share_of_rank(windows, batch_size, Rank(rank, ranks)) for rank in range(ranks)]
    assert [index for share, _ in shares for index in range(windows)[share]] == list(range(windows))
    assert all(range(windows)[share] for share, _ in shares)
    assert len({size for _, size in shares}) == 1


@given(data=st.data(), ranks=st.integers(1, 9), batch_size=st.integers(1, 12))
def test_batches_are_those_of_one_process(data: st.DataObject, ranks: int, batch_size: int) -> None:
    """Where each rank gets a full batch, shares begin where a batch of one process begins: equal sums, equal bits."""
    windows = data.draw(st.integers(ranks * batch_size, ranks * batch_size + 60))
    for rank in range(ranks):
        share, size = share_of_rank(windows, batch_size, Rank(rank, ranks))
        assert size == batch_size
        assert share.start % batch_size == 0


def test_one_process_runs_all() -> None:
    """Nothing changes without other ranks, also where the batch is larger than the text."""
    assert share_of_rank(10, 4, ALONE) == (slice(0, 10), 4)
    assert share_of_rank(3, 4, ALONE) == (slice(0, 3), 3)


@pytest.mark.parametrize(("windows", "ranks"), [(0, 1), (1, 2), (7, 8)])
def test_fewer_windows_than_ranks_are_refused(windows: int, ranks: int) -> None:
    """A rank without work would take part in no sum."""
    with pytest.raises(UserError, match=f"{windows} windows of text for {ranks} processes"):
        share_of_rank(windows, 4, Rank(0, ranks))
