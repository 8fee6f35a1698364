"""Text out of markup: HTML, WARC and WET archives, Wikipedia dumps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxlm.data.extras import library
from jaxlm.data.record import UNSTATED, Document, Unusable

MAX_PAGE_BYTES = 16 * 1024**2
Records = Iterator[Document | Unusable]


def html_file(f: BinaryIO, name: str) -> Records:
    raw = f.read(MAX_PAGE_BYTES + 1)
    if len(raw) > MAX_PAGE_BYTES:
        yield Unusable(name, "page too long", f"above {MAX_PAGE_BYTES:,} bytes")
        return
    text, language = html(raw)
    yield Document(text, path=name, language=language)


def html(raw: bytes) -> tuple[str, str]:
    """(main text, declared language) of a page."""
    tree = library("trafilatura").load_html(raw)
    if tree is None:
        return "", ""
    language = str(tree.get("lang") or tree.get("xml:lang") or "").split("-")[0].lower()
    text = library("trafilatura").extract(
        tree, favor_recall=True, include_comments=False, deduplicate=False
    )
    return (text + "\n" if text else ""), language


def warc(f: BinaryIO, name: str) -> Records:
    """Pages of a WARC file, texts of a WET file; the number of the record stands for the line."""
    reader = library("warcio.archiveiterator").ArchiveIterator
    failure = library("warcio.exceptions").ArchiveLoadFailed
    try:
        for number, record in enumerate(reader(f), 1):
            if record.rec_type in ("response", "conversion"):
                yield from _warc_record(record, f"{name}:{number}")
    except failure as e:
        raise OSError(f"not a whole WARC file: {e}") from e


def _warc_record(record: Any, place: str) -> Records:
    headers = record.rec_headers
    page = record.rec_type == "response"
    if page and "html" not in str(record.http_headers and record.http_headers["Content-Type"]):
        return
    raw = record.content_stream().read(MAX_PAGE_BYTES + 1)
    if len(raw) > MAX_PAGE_BYTES:
        yield Unusable(place, "page too long", f"above {MAX_PAGE_BYTES:,} bytes")
        return
    try:
        text, language = html(raw) if page else (raw.decode(), "")
    except UnicodeDecodeError as e:
        yield Unusable(place, "not UTF-8", f"byte 0x{raw[e.start]:02x}")
        return
    yield Document(
        text,
        path=place,
        language=language,
        date=str(headers.get_header("WARC-Date") or ""),
        url=str(headers.get_header("WARC-Target-URI") or ""),
    )


def wikipedia(f: BinaryIO, name: str) -> Records:
    """Articles of a MediaWiki XML dump; its number stands for the line.

    Memory: one page at a time. Redirects and pages of other name spaces are no articles.
    """
    from xml.etree import ElementTree

    parser = library("mwparserfromhell")
    site, language, base, number = "", "", "", 0
    try:
        events = ElementTree.iterparse(f, events=("start", "end"))
        _, root = next(events)
        language = root.get("{http://www.w3.org/XML/1998/namespace}lang", "")
        if not root.tag.endswith("mediawiki"):
            raise OSError(f"not a MediaWiki dump: <{root.tag}>")
        for event, element in events:
            if event != "end":
                continue
            tag = element.tag.rpartition("}")[2]
            if tag == "sitename":
                site = element.text or ""
            elif tag == "base":
                base = (element.text or "").rpartition("/")[0]
            elif tag == "page":
                number += 1
                document = _article(element, parser, f"{name}:{number}", (site, language, base))
                root.clear()
                if document:
                    yield document
    except ElementTree.ParseError as e:
        raise OSError(f"not whole XML: {e}") from e


def _article(page: Any, parser: Any, place: str, wiki: tuple[str, str, str]) -> Document | None:
    def value(name: str) -> str:
        return next((e.text or "" for e in page.iter() if e.tag.rpartition("}")[2] == name), "")

    redirect = any(e.tag.rpartition("}")[2] == "redirect" for e in page)
    if redirect or value("ns") != "0":
        return None
    site, language, base = wiki
    title = value("title")
    text = parser.parse(value("text")).strip_code()
    text = re.sub(r"^(?:thumb|サムネイル)\|.*$", "", text, flags=re.M).strip()
    return Document(
        f"{title}\n\n{text}\n" if text else "",
        path=place,
        language=language,
        text_licence="CC-BY-SA-4.0" if site == "Wikipedia" else UNSTATED,
        date=value("timestamp"),
        attribution=f"{site} contributors" if site else "",
        url=f"{base}/{title.replace(' ', '_')}" if base else "",
    )
