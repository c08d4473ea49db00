"""The page on which a search is tried in a browser."""

import re
from pathlib import Path

from reporting.page import read_theme, source_hash
from serving.http_messages import HttpAnswer

PAGE_FILE = Path(__file__).with_name("page.html")
THEME = "/* reporting/theme.css */\n"  # where the page has it


def read_page() -> HttpAnswer:
    """The page, with headers under which a browser runs nothing but its own script and asks nobody but this service."""
    content = PAGE_FILE.read_text(encoding="utf-8").replace(THEME, read_theme())
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of(content, "script"),
        "style-src": _hash_of(content, "style"),
        "connect-src": "'self'",
        "img-src": "data:",  # its icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",  # the address holds the query
        "X-Content-Type-Options": "nosniff",
    }
    return HttpAnswer(content.encode(), content_type="text/html; charset=UTF-8", headers=headers)


def _hash_of(content: str, element: str) -> str:
    """The `source_hash` of an inline element."""
    found = re.search(f"<{element}>(.*?)</{element}>", content, re.DOTALL)
    if found is None:
        raise ValueError(f"{PAGE_FILE} has no {element}")
    return source_hash(found[1])
