"""Books as Project Gutenberg and Aozora Bunko publish them, without covers, ruby and notes."""

from __future__ import annotations

import re

from jaxlm.data.record import UNSTATED, Document

MAX_BYTES = 8 * 1024**2  # no such book is larger

_START = re.compile(r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*$", re.M)
_END = re.compile(
    r"^(?:\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK|End of (?:the )?Project )", re.M
)
_LANGUAGES = {"english": "en", "french": "fr", "german": "de", "japanese": "ja", "spanish": "es"}
_AOZORA_END = re.compile(r"^底本[:：]", re.M)


def opened(raw: bytes, path: str) -> Document | None:
    """The book in a file's bytes, or None if it is none."""
    if b"PROJECT GUTENBERG" in raw:
        return _gutenberg(raw.decode("utf-8", errors="replace"), path) if _is_utf8(raw) else None
    for encoding in ("utf-8", "cp932"):  # Aozora's files are Shift JIS
        if "底本".encode(encoding) in raw:
            try:
                return _aozora(raw.decode(encoding), path)
            except UnicodeDecodeError:
                continue
    return None


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _gutenberg(text: str, path: str) -> Document | None:
    start = _START.search(text)
    if start is None:
        return None
    head, body = text[: start.start()], text[start.end() :]
    end = _END.search(body)

    def stated(name: str) -> str:
        found = re.search(rf"^{name}: *(.+?)\s*$", head, re.M)
        return found[1] if found else ""

    title, author = stated("Title"), stated("Author")
    reserved = "copyrighted Project Gutenberg" in text or "COPYRIGHTED Project Gutenberg" in text
    return Document(
        (body[: end.start()] if end else body).strip() + "\n",
        path=path,
        language=_LANGUAGES.get(stated("Language").lower(), ""),
        text_licence=UNSTATED if reserved else "LicenseRef-public-domain-US",
        date=stated("Release [Dd]ate").partition(" [")[0],
        attribution=", ".join(filter(None, (author, title, "Project Gutenberg"))),
    )


def _aozora(text: str, path: str) -> Document | None:
    """Aozora Bunko's markup: aozora.gr.jp/annotation."""
    text = text.replace("\r\n", "\n")
    end = _AOZORA_END.search(text)
    if end is None:
        return None
    colophon, text = text[end.start() :], text[: end.start()]
    lines = text.splitlines()
    title, author = (*lines[:2], "", "")[:2]
    rules = [i for i, line in enumerate(lines[:80]) if re.fullmatch(r"-{10,}", line)]
    body = lines[rules[1] + 1 :] if len(rules) > 1 else lines[2:]
    text = "\n".join(body)
    text = re.sub(r"※［＃[^］]*?U\+([0-9A-F]{4,5})[^］]*］", lambda m: chr(int(m[1], 16)), text)
    text = re.sub(r"※?［＃[^］]*］", "", text)
    text = re.sub(r"《[^》\n]*》", "", text).replace("｜", "")
    published = re.search(r"(\d{4})（[^）]*）年(\d{1,2})月(\d{1,2})日作成", colophon)
    return Document(
        text.strip() + "\n",
        path=path,
        language="ja",
        date="{}-{:0>2}-{:0>2}".format(*published.groups()) if published else "",
        attribution=", ".join(filter(None, (author, title, "青空文庫"))),
    )
