"""Numbers and model text as people read them, on pages and in plots."""

from __future__ import annotations

SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
# Control characters are spelt out, as neither XML nor HTML can carry them.
CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


def clean(value: object) -> str:
    """Text with control characters spelt out and lone surrogates replaced by '?'."""
    return str(value).encode("utf-8", "replace").decode("utf-8").translate(CONTROLS)


def token(value: object) -> str:
    """One token's text, its blanks visible."""
    return short(value, 16).replace(" ", "␣")


def short(value: object, width: int) -> str:
    """Text on one line, its end cut off."""
    shown = clean(value).replace("\n", "↵").replace("\t", "⇥")
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def count(value: float | None) -> str | None:
    """18300 → '18.3k'; three significant digits."""
    if value is None:
        return None
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{float(f'{value / size:.3g}'):g}{unit}"
    return f"{float(f'{value:.3g}'):g}"


def power(value: float | None, digits: int = 2) -> str | None:
    """3e11 → '3×10¹¹', for FLOPs."""
    if value is None:
        return None
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    ten = "10" + str(int(exponent)).translate(SUPERSCRIPT)
    return ten if mantissa == "1" else f"{mantissa}×{ten}"


def fixed(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:.{digits}f}".replace("-", "−")


def general(value: float | None, digits: int = 4) -> str | None:
    """So many significant digits; a power of ten where plain digits would be more or fewer."""
    if value is None:
        return None
    shown = f"{value:.{digits}g}"
    return power(value, digits) if "e" in shown else shown.replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str | None:
    return None if share is None else f"{100 * share:.{digits}f} %".replace("-", "−")


def interval(bounds: list[float] | None, digits: int = 3) -> str | None:
    """'0.41 … 0.55'."""
    return None if not bounds else f"{fixed(bounds[0], digits)} … {fixed(bounds[1], digits)}"


def seconds(value: float | None) -> str | None:
    if value is None:
        return None
    if value < 99.5:
        return f"{value:.3g} s"
    minutes = value / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def size(number_of_bytes: float | None) -> str | None:
    """Bytes in powers of 1000."""
    return None if number_of_bytes is None else f"{count(number_of_bytes)}B".replace("BB", "GB")
