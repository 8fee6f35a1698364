"""A document and its provenance, and a record that could not become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

UNSTATED = "LicenseRef-unstated"


@dataclass(frozen=True)
class Document:
    """One text and its provenance. Licences are SPDX ids or `LicenseRef-…`."""

    text: str
    source: str = ""  # the entry of `data.sources`, or what the record itself says
    path: str = ""  # file, 'file:line' inside a larger file, or module and item
    language: str = ""  # BCP 47 ('en', 'ja'), 'python' for code, '' unknown
    text_licence: str = UNSTATED
    package_licence: str = UNSTATED  # of what carried the text; often not the text's own
    date: str = ""
    attribution: str = ""
    url: str = ""  # where the text was published


class Unusable(NamedTuple):
    place: str  # 'file:line'
    reason: str  # one of few, counted
    detail: str = ""
