"""Every kind of file, and the rules for URLs, each against a file made by someone else's writer."""

import bz2
import csv
import gzip
import http.server
import io
import json
import lzma
import tarfile
import threading
import zipfile

import pytest

from jaxlm.data import formats, places, suffixes
from jaxlm.data.documents import UNSTATED, Reading, Tally, read
from jaxlm.schema import UserError


def refusal(*sources, **how):
    with pytest.raises(UserError) as e:
        list(read(sources, reading=Reading(**how)))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_name_says_format_and_compression():
    assert suffixes.split("a.JSONL.gz") == (".jsonl", ".gz")
    assert suffixes.split("x-1.0.tar.gz") == (".tar.gz", "")
    assert suffixes.split("photo.jpg.gz") == ("", ".gz")
    assert suffixes.is_known("a.rs") and suffixes.is_known("a.txt.zst")
    assert not suffixes.is_known("a.whl") and suffixes.is_known("a.whl", alone=True)


# ----------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("suffix, pack", [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressed_text_is_the_text(suffix, pack, tmp_path):
    (tmp_path / f"a.txt.{suffix}").write_bytes(pack.compress("今日は\n".encode() * 3))
    [document] = read([str(tmp_path)])
    assert document.text == "今日は\n" * 3


def test_zstandard_text_is_the_text(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(b"one\n"), zstandard.compress(b"two\n")]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert [d.text for d in read([str(tmp_path)])] == ["one\ntwo\n"]
    (tmp_path / "a.txt.zst").write_bytes(frames[0][:-3])
    assert "a.txt.zst is not a whole file" in refusal(str(tmp_path))


def test_a_bomb_is_left_where_it_explodes(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "SMALL_BYTES", 1 << 20)
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1 << 18)
    good = b'{"text": "fine"}\n'
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(good * 3 + b"0" * (20 << 20)))
    tally, texts = Tally(), []
    with pytest.raises(UserError, match="decompression bomb"):
        texts += [d.text for d in read([str(tmp_path)], tally=tally)]
    assert tally.listed[-1].place.endswith("x.jsonl.gz:4")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.txt", b"0" * (20 << 20))
    assert "decompression bomb" in refusal(str(tmp_path / "b.zip"))


# ---------------------------------------------------------------------------------------- tables


def test_a_table_gives_its_text_column_with_what_it_says_of_itself(tmp_path):
    with open(tmp_path / "r.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["review", "language", "licence", "label"])
        rows.writerow(["Good,\n“very” good", "en", "MIT", 1])
        rows.writerow(["良い", "ja", "", 0])
        rows.writerow(["", "", "", 0])
    one, two = read([str(tmp_path)], reading=Reading(text_field="review"))
    assert (one.text, one.language, one.text_licence) == ("Good,\n“very” good", "en", "MIT")
    assert (two.text, two.text_licence, two.path) == ("良い", UNSTATED, f"{tmp_path}/r.csv:4")
    assert "no string field 'text' (got 'review'" in refusal(str(tmp_path))


def test_parquet_and_arrow_are_read_in_batches(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"text {i}" for i in range(300)]
    table = pa.table({"text": texts, "n": list(range(300)), "lang": ["en"] * 300})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    with pa.ipc.new_stream(tmp_path / "b.arrow", table.schema) as f:  # as datasets saves them
        f.write_table(table)
    got = list(read([str(tmp_path)]))
    assert [d.text for d in got] == texts * 2 and {d.language for d in got} == {"en"}
    assert got[299].path == f"{tmp_path}/a.parquet:300"
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:500])
    assert "a.parquet" in refusal(str(tmp_path))


# ---------------------------------------------------------------------------------------- markup


PAGE = """<html lang="ja-JP"><head><title>t</title></head><body><nav><a href="/">menu</a></nav>
<article><h1>見出し</h1><p>これは本文の最初の段落で、十分に長い文章です。読めるはずです。</p>
<p>二つ目の段落もここにあり、抽出されなければなりません。</p></article></body></html>"""


def test_a_page_gives_its_text_and_declared_language(tmp_path):
    pytest.importorskip("trafilatura")
    (tmp_path / "a.html").write_text(PAGE)
    [document] = read([str(tmp_path)])
    assert document.language == "ja"
    assert "二つ目の段落" in document.text and "<p>" not in document.text


def test_warc_pages_carry_address_and_date(tmp_path):
    pytest.importorskip("warcio")
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    with open(tmp_path / "a.warc.gz", "wb") as f:
        writer = WARCWriter(f, gzip=True)
        for kind in ("text/html", "image/png"):
            head = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.0")
            writer.write_record(
                writer.create_warc_record(
                    "https://example.org/a",
                    "response",
                    payload=io.BytesIO(PAGE.encode()),
                    http_headers=head,
                )
            )
    [document] = read([str(tmp_path)])
    assert document.url == "https://example.org/a" and document.date.startswith("20")
    assert "最初の段落" in document.text


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="en">
<siteinfo><sitename>Wikipedia</sitename>
<base>https://en.wikipedia.org/wiki/Main_Page</base></siteinfo>
<page><title>A cat</title><ns>0</ns><revision><timestamp>2026-01-02T03:04:05Z</timestamp>
<text>A '''cat''' is an [[animal|animal]].{{cite web|url=x}} &lt;ref&gt;n&lt;/ref&gt;</text>
</revision></page>
<page><title>Talk:A</title><ns>1</ns><revision><text>chat</text></revision></page>
<page><title>Kitty</title><ns>0</ns><redirect title="A cat"/>
<revision><text>#R</text></revision></page>
</mediawiki>"""


def test_a_wikipedia_dump_gives_articles_without_markup(tmp_path):
    pytest.importorskip("mwparserfromhell")
    path = tmp_path / "enwiki.xml.bz2"
    path.write_bytes(bz2.compress(DUMP.encode()))
    [cat] = read([str(path)])
    assert cat.text.startswith("A cat\n\nA cat is an animal.") and "cite" not in cat.text
    assert (cat.language, cat.text_licence) == ("en", "CC-BY-SA-4.0")
    assert cat.url == "https://en.wikipedia.org/wiki/A_cat" and cat.date.startswith("2026-01-02")
    (tmp_path / "cut.xml").write_text(DUMP[:-40])
    assert "not whole XML" in refusal(str(tmp_path / "cut.xml"))


# ----------------------------------------------------------------------------------------- books


def test_a_gutenberg_book_loses_its_covers(tmp_path):
    (tmp_path / "b.txt").write_text(
        "The Project Gutenberg eBook of Emma\n\nTitle: Emma\nAuthor: Jane Austen\n"
        "Release date: August 1, 1994 [eBook #158]\nLanguage: English\n\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\nEmma Woodhouse, handsome\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***\nlicence text\n"
    )
    [book] = read([str(tmp_path)])
    assert book.text == "Emma Woodhouse, handsome\n"
    assert (book.language, book.date) == ("en", "August 1, 1994")
    assert book.attribution == "Jane Austen, Emma, Project Gutenberg"


AOZORA = """羅生門
芥川龍之介

-------------------------------------------------------
【テキスト中に現れる記号について】

《》：ルビ
（例）下人《げにん》
-------------------------------------------------------

　ある日の｜暮方《くれがた》の事である。［＃「暮方」に傍点］一人の下人《げにん》が、
※［＃「口＋世」、U+546D、1-2］と言った。

底本：「芥川龍之介全集1」ちくま文庫
1997（平成9）年11月4日作成
"""


@pytest.mark.parametrize("encoding", ["utf-8", "cp932"])
def test_an_aozora_book_loses_ruby_notes_and_colophon(encoding, tmp_path):
    (tmp_path / "r.txt").write_bytes(AOZORA.replace("\n", "\r\n").encode(encoding))
    [book] = read([str(tmp_path)])
    assert book.text == "ある日の暮方の事である。一人の下人が、\n呭と言った。\n"
    assert (book.language, book.date) == ("ja", "1997-11-04")
    assert book.attribution == "芥川龍之介, 羅生門, 青空文庫"


# -------------------------------------------------------------------------------------- packages


def tar(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as t:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            t.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def test_a_debian_package_states_the_licence_of_its_files(tmp_path):
    copyright = (
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\n"
        "Files: debian/*\nLicense: GPL-3+\n\nFiles: *\nLicense: GPL-2+ or CC-BY-SA-3.0\n text\n"
    )
    members = {
        "./usr/share/doc/book/a.txt": "Chapter one",
        "./usr/share/doc/book/copyright": copyright,
        "./usr/share/other/b.txt": "Elsewhere",
    }
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar(members)}
    deb = b"!<arch>\n"
    for name, body in parts.items():
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body
        deb += b"\n" * (len(body) % 2)
    (tmp_path / "book_1_all.deb").write_bytes(deb)
    one, two = read([str(tmp_path / "*.deb")])
    assert (one.text, two.text) == ("Chapter one", "Elsewhere")
    assert one.text_licence == one.package_licence == "GPL-2.0-or-later OR CC-BY-SA-3.0"
    assert one.attribution == "Debian package book"
    assert one.path == f"{tmp_path}/book_1_all.deb!usr/share/doc/book/a.txt"
    assert [d.text for d in read([f"{tmp_path}/*.deb!*/other/*"])] == ["Elsewhere"]
    (tmp_path / "book_1_all.deb").write_bytes(deb[:200])
    assert "is not a whole file" in refusal(str(tmp_path / "book_1_all.deb"))


def test_a_wheels_licence_is_not_its_texts(tmp_path):
    with zipfile.ZipFile(tmp_path / "m-1-py3-none-any.whl", "w") as z:
        z.writestr("m/reviews.csv", "text,label\nGood,1\n")
        z.writestr("m-1.dist-info/METADATA", "Name: m\nVersion: 1\nLicense: MIT\n\nAbout\n")
        z.writestr("m-1.dist-info/top_level.txt", "m\n")
    [document] = read([str(tmp_path / "m-1-py3-none-any.whl")])
    assert (document.text, document.text_licence) == ("Good", UNSTATED)
    assert (document.package_licence, document.attribution) == ("MIT", "PyPI package m 1")


def test_an_npm_package_is_a_tarball(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        about = json.dumps({"name": "@a/b", "version": "1", "license": "Apache-2.0"})
        for name, text in {"package/package.json": about, "package/d/x.txt": "Text"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            t.addfile(info, io.BytesIO(text.encode()))
    (tmp_path / "b.tgz").write_bytes(out.getvalue())
    [document] = read([f"{tmp_path}/b.tgz!package/d/*"])
    assert (document.text, document.package_licence) == ("Text", "Apache-2.0")
    assert document.attribution == "npm package @a/b 1"


# ------------------------------------------------------------------------------------------ URLs


def test_a_bucket_is_listed_and_read(tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    for name, text in {"a.jsonl": '{"text": "one"}\n', "b/c.txt": "two", "d.png": "x"}.items():
        fs.pipe(f"/bucket/{name}", text.encode())
    assert [d.text for d in read(["memory://bucket"])] == ["one", "two"]
    assert [d.path for d in read(["memory://bucket/*.jsonl"])] == ["memory:///bucket/a.jsonl:1"]
    assert "no such file" in refusal("memory://bucket/none.txt")


def test_what_a_url_may_not_name(tmp_path):
    (tmp_path / "a.txt").write_text("here")
    assert "set data.file_urls" in refusal(f"file://{tmp_path}/a.txt")
    [document] = read([f"file://{tmp_path}/a.txt"], reading=Reading(file_urls=True))
    assert document.text == "here"
    assert "cannot read ftp://" in refusal("ftp://host/a.txt")
    assert "cannot read zip::" in refusal("zip::https://host/a.txt")


@pytest.mark.parametrize(
    "address, public",
    [
        *[(a, False) for a in ("127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.1.1", "0.0.0.0")],
        *[(a, False) for a in ("::1", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "224.0.0.1")],
        *[(a, False) for a in ("64:ff9b::a00:1", "2002:a00:1::", "100.64.0.1")],
        *[(a, True) for a in ("8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8")],
    ],
)
def test_which_addresses_are_public(address, public):
    assert places.is_public(address) is public


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"secret")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"])
def test_no_url_reaches_this_machine(host):
    pytest.importorskip("aiohttp")
    with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = refusal(f"http://{host}:{server.server_port}/a.txt")
        server.shutdown()
    assert "cannot read http" in line and not server.asked


# -------------------------------------------------------------------------------------- bad input


def test_nul_is_no_text(tmp_path):
    rows = ['{"text": "a"}'] * 1999 + [json.dumps({"text": "a\0b"})]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    tally = Tally()
    assert len(list(read([str(tmp_path)], tally=tally))) == 1999
    assert [(u.place, u.reason) for u in tally.listed] == [
        (f"{tmp_path}/x.jsonl:2000", "NUL character")
    ]
