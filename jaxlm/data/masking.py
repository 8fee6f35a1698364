"""Personal data and secrets, replaced by what they were: `<EMAIL>`, `<PHONE>`, `<SECRET>`, …

Patterns find what has a form: addresses of mail and machines, telephone and card numbers, keys.
Names and postal addresses have none and stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable


def _card(match: re.Match[str]) -> str:
    """Luhn's check digit (ISO/IEC 7812-1, annex B)."""
    digits = [int(c) for c in match[0] if c.isdigit()]
    doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
    return "<CARD>" if (sum(digits[::-2]) + sum(doubled)) % 10 == 0 else match[0]


def _address(match: re.Match[str]) -> str:
    try:
        public = ipaddress.ip_address(match[0]).is_global
    except ValueError:
        public = False
    return "<IP_ADDRESS>" if public else match[0]


_PATTERNS: tuple[tuple[str, str | Callable[[re.Match[str]], str], re.Pattern[str]], ...] = (
    (
        "secret",
        "<SECRET>",
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"
            r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
            r"|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_[A-Za-z0-9_]{40,}\b"
            r"|\bglpat-[A-Za-z0-9_-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}"
            r"|\bAIza[A-Za-z0-9_-]{35}\b|\bsk-[A-Za-z0-9_-]{20,}|\bhf_[A-Za-z0-9]{30,}\b"
            r"|\bey[JK][A-Za-z0-9_-]{10,}\.ey[JK][A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
            r"|\b[sr]k_live_[A-Za-z0-9]{20,}\b|\bpypi-[A-Za-z0-9_-]{50,}",
            re.S,
        ),
    ),
    (
        "assigned secret",
        r"\g<1><SECRET>\g<3>",
        re.compile(
            r"((?:password|passwd|secret|api_?key|access_?token)[\"']?\s*[:=]\s*[\"'])"
            r"([^\s\"']{8,})([\"'])",
            re.I,
        ),
    ),
    (
        "mail address",
        "<EMAIL>",
        re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    ),
    ("card number", _card, re.compile(r"\b\d(?:[ -]?\d){12,18}\b")),
    (
        "telephone number",
        "<PHONE>",
        re.compile(
            r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(0\))?[ .-]?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
            r"|\(?\d{3}\)?[ .-]\d{3}[.-]\d{4}|0\d{1,4}-\d{1,4}-\d{4}|0[789]0[ -]?\d{4}[ -]?\d{4})"
            r"(?![\w-])"
        ),
    ),
    ("machine address", _address, re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")),
)


def mask(text: str) -> tuple[str, Counter[str]]:
    """The text without them, and how many of each kind there were."""
    found: Counter[str] = Counter()
    for kind, instead, pattern in _PATTERNS:
        new = pattern.sub(instead, text)
        if new != text:
            before = len(pattern.findall(text))
            found[kind] += before - (len(pattern.findall(new)) if callable(instead) else 0)
            text = new
    return text, found
