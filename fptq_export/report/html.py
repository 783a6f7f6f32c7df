"""A report as one page that loads nothing: styles, script and pictures are in it, and its policy forbids the rest."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fptq_export.report.blocks import Report

__all__ = ["html_from_report"]

_TEMPLATES = Path(__file__).with_name("templates")


def html_from_report(report: Report) -> str:
    """The page. Every text is escaped; the pictures, which matplotlib wrote and escaped, are not."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        report=report,
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
        kind=lambda block: type(block).__name__,
        markup=Markup,
    )
