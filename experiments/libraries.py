"""A data source: the Python code of the libraries that jaxlm itself stands on, without their tests.

Use as `data.sources=("stdlib", "libraries.py:code")`: 41 MB of text in all that every installation
has, the same under the same constraints.txt.
"""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from jaxlm.data.record import Document

LICENCES = {
    "jax": "Apache-2.0",
    "flax": "Apache-2.0",
    "optax": "Apache-2.0",
    "orbax-checkpoint": "Apache-2.0",
    "grain": "Apache-2.0",
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "matplotlib": "LicenseRef-matplotlib",
}
_LONGEST = 1_000_000  # bytes; above it are tables of numbers


def code() -> Iterator[Document]:
    for name, licence in LICENCES.items():
        distribution = metadata.distribution(name)
        for path in sorted(distribution.files or (), key=str):
            tested = {"test", "tests", "testing", "_test"} & {*path.parts}
            if path.suffix != ".py" or tested or path.stem.endswith("_test"):
                continue
            file = Path(str(path.locate()))
            text = file.read_text("utf-8") if file.stat().st_size <= _LONGEST else ""
            if text.strip():
                yield Document(
                    text, path=str(path), text_licence=licence, package_licence=licence,
                    attribution=f"{name} {distribution.version}",
                )  # fmt: skip
