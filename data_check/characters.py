"""Characters that a text shouldn't hold, and what stands where a tab should. Imports no Paddle."""

import re
from html.entities import html5

from common.texts import REPLACEMENT_CHARACTER
from data_check.rules import DAMAGED, HTML, INVISIBLE, Rule

# UTF-8 read as GBK (锟斤拷 is the replacement character twice), memory of Visual C++ (烫烫烫), UTF-8 read as Latin-1.
WRONGLY_CONVERTED = rf"{REPLACEMENT_CHARACTER}|锟斤拷|烫烫烫|â€|[ÃÂ][\x80-\xbf]"
# Controls but for the tab, zero-width characters, marks of direction. Joiners (U+200C, U+200D) belong to some scripts.
NOT_TO_SEE = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
ENTITY = r"&(?:[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});"
TAG = r"</?(?:a|b|br|div|em|font|i|img|li|p|span|strong|sub|sup|table|td|tr|u|ul)(?:\s[^<>]{0,200})?/?>"
SUSPECT = re.compile(
    rf"{NOT_TO_SEE[:-1]}{REPLACEMENT_CHARACTER}锟烫âÃÂ&<]"
)  # any character that one of them begins with
PROBLEMS = re.compile(
    f"(?P<damaged>{WRONGLY_CONVERTED})|(?P<invisible>{NOT_TO_SEE})|(?P<entity>{ENTITY})|(?P<tag>{TAG})", re.IGNORECASE
)
RULES = {"damaged": DAMAGED, "invisible": INVISIBLE, "entity": HTML, "tag": HTML}
NOT_TABS = re.compile(r"\\t|\u2409|[\u2001\u2003\u3000]+| {3,}")  # as people type or convert them


def problems_of(line: str) -> set[Rule]:
    """The rules about characters that a line without its line end breaks."""
    if not SUSPECT.search(line):  # nearly always, and faster
        return set()
    return {
        RULES[match.lastgroup]
        for match in PROBLEMS.finditer(line)
        if match.lastgroup and (match.lastgroup != "entity" or _is_entity(match[0]))
    }


def _is_entity(text: str) -> bool:
    return text[1] == "#" or text[1:] in html5


def has_other_separator(line: str) -> bool:
    """Whether a line without a tab has something between two texts that is meant as one."""
    return "\t" not in line and bool(NOT_TABS.search(line.strip()))
