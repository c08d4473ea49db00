"""The frame of a report, and its parts: sections, tables, lists of texts. Imports no Paddle.

A report is one file. A browser runs nothing in it but its own script, and asks nobody for anything. It follows the
system's light or dark colours, is in English or Chinese as the browser is, and has a button for the other language.
Whatever isn't `Markup` is escaped.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup, escape

from common.files import atomic_write

FOLDER = Path(__file__).parent
FRAME = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{plain_title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<button id="language" type="button" hidden>{other_language}</button>
</header>
{about}
<nav><ul>{contents}</ul></nav>
<main>
{sections}
</main>
<script>{script}</script>
</body>
</html>
""")


@dataclass(frozen=True)
class Bilingual:
    """A text of a report in English and Chinese, of which the reader sees one. Both are escaped."""

    en: str
    zh: str

    def __html__(self) -> Markup:
        """What `Markup` puts in place of it."""
        return Markup('<span lang="en">{}</span><span lang="zh-CN">{}</span>').format(self.en, self.zh)


Content = str | Markup | Bilingual  # what a part of a report shows


class Section(NamedTuple):
    """A part of a report, which its contents name."""

    title: Bilingual
    content: Markup


def paragraph(*contents: Content, name: str = "") -> Markup:
    """A paragraph. name: a class of report.css, such as quiet, good or bad."""
    return Markup('<p class="{}">{}</p>').format(name, join(contents))


def heading(text: Content) -> Markup:
    """The heading of a part of a section."""
    return Markup("<h3>{}</h3>").format(text)


def join(contents: Iterable[Content], separator: str = "") -> Markup:
    """The contents after each other."""
    return Markup(separator).join(escape(content) for content in contents)


def table(head: Sequence[Content], rows: Iterable[Sequence[Content]], text_columns: int = 1) -> Markup:
    """A table, which scrolls by itself where the window is too narrow.

    text_columns: number of columns, from the left, that hold texts; the others hold numbers, aligned to the right.
    """

    def line(tag: str, cells: Sequence[Content]) -> Markup:
        names = ["" if column < text_columns else "number" for column in range(len(cells))]
        cell = Markup(f'<{tag} class="{{}}">{{}}</{tag}>')
        return Markup("<tr>{}</tr>").format(join(map(cell.format, names, cells)))

    form = Markup('<div class="scroll"><table><thead>{}</thead><tbody>{}</tbody></table></div>')
    return form.format(line("th", head), join(line("td", row) for row in rows))


def text_list(texts: Iterable[Content]) -> Markup:
    """A list of texts, such as examples from a file."""
    return Markup('<ul class="texts">{}</ul>').format(join(map(Markup("<li>{}</li>").format, texts)))


def details(summary: Content, *parts: Content) -> Markup:
    """Parts that are shown after a click on the summary."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, join(parts))


def render(title: Bilingual, about: Content, sections: Sequence[Section]) -> str:
    """The HTML of a report. about: what it is of, below the title."""
    style, script = (Markup(_read(*names)) for names in (("theme.css", "report.css"), ("report.js",)))
    policy = {
        "default-src": "'none'",
        "script-src": source_hash(script),
        "style-src": source_hash(style),
        "img-src": "data:",  # its icon
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    section_form = Markup('<section id="section-{}"><h2>{}</h2>{}</section>\n')
    entry_form = Markup('<li><a href="#section-{}">{}</a></li>')
    return FRAME.format(
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        plain_title=title.en,
        title=title,
        other_language=Bilingual("中文", "English"),
        about=about,
        contents=join(entry_form.format(number, section.title) for number, section in enumerate(sections)),
        sections=join(section_form.format(number, *section) for number, section in enumerate(sections)),
        style=style,
        script=script,
    )


def write_report(path: str | Path, title: Bilingual, about: Content, sections: Sequence[Section]) -> None:
    """Writes what `render` returns. Raises InputError if the file can't be written."""
    with atomic_write(path) as file:
        file.write(render(title, about, sections))


def read_theme() -> str:
    """The colours and the font of reports and of the search page, as CSS."""
    return _read("theme.css")


def _read(*names: str) -> str:
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names)


def source_hash(content: str) -> str:
    """The source expression for an inline script or style (Content Security Policy Level 3, section 2.3.1)."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
