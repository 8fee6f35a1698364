"""A data source: the Japanese manual pages of Debian, as they are written (roff), without comments.

    apt-get download manpages-ja manpages-ja-dev    # and unpack each: dpkg-deb -x FILE.deb pages/

Use as `data.sources=("manpages.py:japanese",)`: 14 MB of text in 1,728 pages. The folder is pages/
beside where the command runs, or MANPAGES. Licences differ from page to page and are not stated in
one place.
"""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

from jaxlm.data.record import Document
from jaxlm.schema import UserError

PAGES = os.environ.get("MANPAGES", "pages")


def japanese() -> Iterator[Document]:
    root = Path(PAGES) / "usr/share/man/ja"
    if not root.is_dir():
        raise UserError(f"MANPAGES: expected a folder with usr/share/man/ja, got {PAGES!r}")
    for path in sorted(root.rglob("*.gz")):
        if path.is_symlink():  # another name of the same page
            continue
        lines = gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines(True)
        text = "".join(line for line in lines if not line.startswith(('.\\"', "'\\\"")))
        if text.strip():
            yield Document(text, path=path.relative_to(PAGES).as_posix(), language="ja")
