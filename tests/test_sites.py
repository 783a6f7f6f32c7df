from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fptq_export.errors import UserError, UserErrors
from fptq_export.sites import FoldSite, Linear, Producer, Sites, UnmatchedLinear, read_sites, write_sites

LINEAR = Linear(
    path="model.fc",
    node="model.fc/MatMul",
    weight="model.fc.weight",
    weight_transposed=False,
    bias=None,
    in_features=4,
    out_features=2,
    input="x",
    site="model.norm",
    no_site_reason=None,
)
SITE = FoldSite(
    id="model.norm",
    kind="offset_norm",
    channels=4,
    producers=(Producer(initializer="model.norm.weight", axis=0, offset=1.0),),
    consumers=("model.fc",),
)
SITES = Sites(
    linears=(LINEAR,),
    fold_sites=(SITE,),
    unmatched=(UnmatchedLinear(path="model.router", in_features=4, out_features=8, reason="called twice"),),
)


def test_sites_survive_the_round_trip(tmp_path: Path) -> None:
    """Everything trace found comes back equal."""
    write_sites(SITES, tmp_path / "sites.json")
    assert read_sites(tmp_path / "sites.json") == SITES


def test_lookups_find_by_path_and_id() -> None:
    """Linears are found by torch path, sites by id; what is not there is a KeyError with its name."""
    assert SITES.linear("model.fc") is LINEAR
    assert SITES.site("model.norm") is SITE
    with pytest.raises(KeyError, match=r"model\.router"):
        SITES.linear("model.router")
    with pytest.raises(KeyError, match=r"model\.fc"):
        SITES.site("model.fc")


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda document: document.update(schema_version=2), r"\$\.schema_version"),
        (lambda document: document["fold_sites"][0].update(kind="softmax"), r"\$\.fold_sites\[0\]\.kind"),
        (lambda document: document["linears"][0].pop("node"), r"\$\.linears\[0\]\.node"),
        (lambda document: document["linears"][0].update(colour=1), r"\$\.linears\[0\]\.colour"),
    ],
    ids=["version", "kind", "missing", "unknown"],
)
def test_wrong_files_are_refused_at_their_place(tmp_path: Path, change: Any, path: str) -> None:
    """A file of another version or with wrong fields is refused with the JSON path."""
    document = json.loads(SITES.model_dump_json())
    change(document)
    (tmp_path / "sites.json").write_text(json.dumps(document))
    with pytest.raises(UserErrors, match=path):
        read_sites(tmp_path / "sites.json")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """The error names the file and says which stage is missing."""
    with pytest.raises(UserError, match=r"sites\.json: no such file"):
        read_sites(tmp_path / "sites.json")
