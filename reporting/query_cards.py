"""Queries as a report shows them: what was wanted, and what came. Imports no Paddle."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

from reporting.marking import mark_shared, shorten
from reporting.page import Bilingual, Content, join
from retrieval.metrics import JudgedQuery

SHOWN_TITLES = 3  # of a query
SHOWN_HITS = 3  # and the first right one
CARD = Markup("<article><h3>{}</h3><dl>{}</dl></article>")
ROW = Markup("<div><dt>{}</dt>{}</div>")
TEXT = Markup('<dd class="{}">{} <span class="quiet">{}</span></dd>')


class Found(NamedTuple):
    """What a search found for a query."""

    name: Content  # of the search
    judged: JudgedQuery


def query_card(found: Sequence[Found]) -> Markup:
    """A query with its titles and what one or several searches found for it; words in common with it are marked."""
    query = found[0].judged.query
    rows = [ROW.format(Bilingual("wanted", "应召回"), join(_titles(found[0].judged)))]
    rows += [ROW.format(each.name, join(_hits(each.judged))) for each in found]
    return CARD.format(shorten(query), join(rows))


def _titles(judged: JudgedQuery) -> Iterator[Markup]:
    titles = sorted(judged.titles)
    for title in titles[:SHOWN_TITLES]:
        yield TEXT.format("", mark_shared(judged.query, title), "")
    if len(titles) > SHOWN_TITLES:
        more = len(titles) - SHOWN_TITLES
        yield TEXT.format("quiet", Bilingual(f"and {more:,} more", f"另有 {more:,} 条"), "")


def _hits(judged: JudgedQuery) -> Iterator[Markup]:
    """The first hits and the first right one, each with its rank and its score."""
    for rank, document in enumerate(judged.documents, 1):
        if rank <= SHOWN_HITS or rank == judged.first_rank:
            score = f"{judged.scores[rank - 1]:.4f}" if judged.scores else ""
            name = "good" if document in judged.titles else ""
            yield TEXT.format(name, Markup("{}. {}").format(rank, mark_shared(judged.query, document)), score)
    if judged.first_rank is None:
        count = len(judged.documents)
        nothing = Bilingual(f"no right answer in {count:,} documents", f"{count:,} 条文档中没有正确答案")
        yield TEXT.format("bad", nothing, "")
