"""What a file's name says: its format, how it is compressed, the language of source code."""

from __future__ import annotations

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
PROSE = (".txt", ".md", ".rst", ".tex")
RECORDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
MARKUP = (".html", ".htm", ".xhtml", ".warc", ".wet")
ARCHIVES = (".deb", ".whl", ".zip", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".tar")
"""Read only when named themselves: a folder may hold any archive."""
ALONE = (*ARCHIVES, ".xml")

CODE = {
    ".py": "python",
    ".pyi": "python",
    ".js": "javascript",
    ".mjs": "javascript",
    ".jsx": "javascript",
    ".ts": "typescript",
    ".tsx": "typescript",
    ".c": "c",
    ".h": "c",
    ".cc": "cpp",
    ".cpp": "cpp",
    ".hpp": "cpp",
    ".cu": "cuda",
    ".rs": "rust",
    ".go": "go",
    ".java": "java",
    ".kt": "kotlin",
    ".scala": "scala",
    ".cs": "csharp",
    ".swift": "swift",
    ".rb": "ruby",
    ".php": "php",
    ".pl": "perl",
    ".pm": "perl",
    ".lua": "lua",
    ".r": "r",
    ".jl": "julia",
    ".hs": "haskell",
    ".ml": "ocaml",
    ".ex": "elixir",
    ".erl": "erlang",
    ".clj": "clojure",
    ".sql": "sql",
    ".sh": "shell",
}
CODE_LANGUAGES = frozenset(CODE.values())


def split(name: str) -> tuple[str, str]:
    """(format suffix, compression suffix) of a name; '' for what is not known.

    'a.jsonl.gz' → ('.jsonl', '.gz'). An archive's own compression is part of its format.
    """
    name = name.lower()
    for suffix in ARCHIVES:
        if name.endswith(suffix):
            return suffix, ""
    packed = next((s for s in COMPRESSED if name.endswith(s)), "")
    name = name.removesuffix(packed)
    for suffix in (*PROSE, *RECORDS, *MARKUP, ".xml", *CODE):
        if name.endswith(suffix):
            return suffix, packed
    return "", packed


def is_known(name: str, alone: bool = False) -> bool:
    """Whether a file is read: found in a folder, or (`alone`) named itself."""
    suffix, _ = split(name)
    return bool(suffix) and (alone or suffix not in ALONE)


def known() -> str:
    """What can be read, for a message."""
    return " ".join((*PROSE, *RECORDS, *MARKUP, *ALONE, "source code")) + (
        f" (each also {' '.join(COMPRESSED)})"
    )
