"""Every linear of every family is found, with the fold sites that its architecture has."""

from __future__ import annotations

import pytest

from tests.families.conftest import Trace
from tests.families.registry import FAMILIES, Family
from tests.families.support_table import Record


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_linears_and_sites_are_those_of_the_architecture(family: Family, trace: Trace, record: Record) -> None:
    """No linear is missed; each has the sites of the registry, one without a site says why; routers stay float."""
    with record.cell(family, "sites") as cell:
        sites = trace(family).sites
        assert tuple(linear.path for linear in sites.unmatched) == family.outside
        found = [(site.kind, " ".join(map(_last, site.consumers))) for site in sites.fold_sites]
        assert found == list(family.sites)
        reasons = {linear.path: linear.no_site_reason or "" for linear in sites.linears if linear.site is None}
        for path, reason in reasons.items():
            assert [words for end, words in family.no_site.items() if path.endswith(end) and words in reason], reason
        assert all(any(path.endswith(end) for path in reasons) for end in family.no_site)
        routers = [linear.path for linear in sites.linears if linear.float_reason is not None]
        assert len(routers) == len(family.routers)
        assert all(path.endswith(end) for path, end in zip(routers, family.routers, strict=True))
        cell.text = f"{len(sites.site_by_consumer())} of {len(sites.linears)}"


def _last(path: str) -> str:
    return path.rpartition(".")[2]
