"""Writes a Chinese literature-search dataset made from the word lists in examples/terms.

DIR/recall/corpus.csv holds one document a line: a title immediately followed by its comma-joined keywords.
DIR/recall/{train,dev,test}.csv hold `query<TAB>document`. Every document of the three is in the corpus, and no document
or query of dev and test is in train or in each other. The same options give the same bytes everywhere.
"""

import argparse
import random
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, number_in_range, run
from common.errors import InputError
from common.files import atomic_write

TERMS_DIR = Path(__file__).resolve().parent / "terms"
REGIONS_FILE = "regions.txt"

# A slot of a title pattern and the section of a field's word list that fills it.
SLOT_SECTIONS = {
    "O": "objects",
    "P": "objects",
    "A": "aspects",
    "B": "aspects",
    "F": "factors",
    "G": "factors",
    "M": "methods",
    "N": "methods",
    "R": "regions",
}

# Chosen so that BM25 ranks the right document first for half to two thirds of the test queries (examples/README.md).
TITLE_SYNONYM_RATE = 0.15
QUERY_SYNONYM_RATE = 0.42
DROP_RATE = 0.2
NO_KEYWORDS_RATE = 0.15
KEYWORD_RATE = 0.75
MAX_FAMILY = 24
SAME_ASPECT_RATE = 0.8
MAX_IDLE_FAMILIES = 1000  # families in a row without a new document before the lists count as used up
MAX_QUERY_TRIES = 50

Item = TypeVar("Item")
Term = tuple[str, ...]  # the spellings of one term, the usual one first


class Kind(NamedTuple):
    """What a title says about its slots, in several wordings that mean the same, and how people ask for it."""

    weight: int
    titles: tuple[str, ...]
    queries: tuple[str, ...]


class Field(NamedTuple):
    """One file of word lists: the kinds of its style and its terms by section."""

    name: str
    kinds: tuple[Kind, ...]
    sections: dict[str, list[Term]]


class Word(NamedTuple):
    """A term in the spelling that a document uses."""

    term: Term
    spelling: str


class Document(NamedTuple):
    """A line of the corpus and what its queries are made of."""

    text: str
    kind: Kind
    words: dict[str, Word]  # by slot
    extra_keywords: tuple[Word, ...]


REVIEW = Kind(
    2,
    ("{O}{A}研究进展", "{O}{A}的研究现状与展望", "{O}的{A}研究综述"),
    ("{O}{A}综述", "{O}{A}国内外研究现状", "{O}的{A}最新进展", "{A} {O} 综述"),
)
COMPARE = Kind(
    3,
    ("{O}与{P}{A}的比较研究", "{O}和{P}{A}对比分析", "{O}与{P}的{A}差异"),
    ("{P}和{O}的{A}比较", "{O} {P} {A}", "{P}{O}{A}的不同", "比较{O}与{P}的{A}"),
)
FACTOR = Kind(
    10,
    ("{F}对{O}{A}的影响", "{F}对{O}{A}影响的研究", "{F}影响{O}{A}的机理", "{F}作用下{O}{A}的变化规律"),
    ("{F}对{O}{A}的作用", "{O}{A} {F}", "{F}如何影响{O}的{A}", "{O}的{A}受{F}影响", "研究了{F}与{O}{A}的关系"),
)
TWO_FACTORS = Kind(
    4,
    ("{F}和{G}对{O}{A}的影响", "{F}与{G}对{O}{A}的交互作用"),
    ("{G}与{F}如何影响{O}{A}", "{F} {G} {O}{A}", "{O}{A}与{G}和{F}的关系"),
)
TWO_ASPECTS = Kind(
    5,
    ("{F}对{O}{A}和{B}的影响", "{F}对{O}{A}及{B}的影响"),
    ("{F}对{O}{B}与{A}的作用", "{O}{A} {B} {F}", "{F}改变{O}的{B}和{A}"),
)
METHOD = Kind(
    8,
    ("基于{M}的{O}{A}研究", "{M}在{O}{A}研究中的应用", "基于{M}的{O}{A}分析", "应用{M}研究{O}的{A}"),
    ("用{M}分析{O}的{A}", "{O}{A} {M}", "{M}{O}{A}", "采用{M}对{O}的{A}进行分析", "怎样用{M}研究{O}{A}"),
)
METHOD_FACTOR = Kind(
    4,
    ("基于{M}的{F}对{O}{A}的影响研究", "{F}对{O}{A}影响的{M}分析"),
    ("{M}分析{F}对{O}{A}的作用", "{F} {O}{A} {M}", "用{M}研究{O}的{A}与{F}"),
)
REGION = Kind(
    8,
    ("{R}{O}{A}现状及对策", "{R}{O}{A}的现状分析", "{O}{A}现状与对策研究——以{R}为例", "{R}{O}{A}存在的问题及建议"),
    ("{R}{O}{A}", "{R}{O}的{A}有哪些问题", "{O}{A} {R}", "{R}{O}{A}的问题与解决办法"),
)
SURVEY = Kind(
    7,
    ("{R}{O}{A}特征及影响因素", "{R}{O}{A}的调查研究", "{R}{O}{A}特征分析"),
    ("{R}{O}{A}", "{O}{A} {R}", "{R}的{O}{A}有何特点", "调查{R}{O}的{A}"),
)
REGION_METHOD = Kind(
    6,
    ("基于{M}的{R}{O}{A}研究", "{R}{O}{A}分析——基于{M}", "基于{M}的{R}{O}{A}评价"),
    ("{R}{O}{A} {M}", "用{M}评价{R}{O}{A}", "{M} {R} {O} {A}", "{R}的{O}{A}如何"),
)
REGION_FACTOR = Kind(
    6,
    ("{F}对{R}{O}{A}的影响", "{R}{F}对{O}{A}影响的实证研究"),
    ("{F}影响{R}{O}{A}", "{R} {F} {O}{A}", "{R}的{O}{A}与{F}"),
)
BACKGROUND = Kind(
    9,
    ("{F}背景下{O}{A}研究", "{F}视角下的{O}{A}", "{F}与{O}{A}的关系", "{F}对{O}{A}的影响"),
    ("{F}{O}{A}", "{O}{A} {F}", "{F}给{O}的{A}带来什么", "从{F}看{O}{A}", "{F}环境中的{O}{A}"),
)
RELATION = Kind(
    5, ("{O}{A}与{B}的关系研究", "{O}{A}与{B}的相关性分析"), ("{O}{B}和{A}的联系", "{O} {A} {B}", "{B}与{O}{A}有关吗")
)
IMPROVEMENT = Kind(
    9,
    ("基于{M}的{O}{A}优化", "基于{M}的{O}{A}研究", "{M}在{O}{A}优化中的应用", "采用{M}改进{O}的{A}"),
    ("用{M}提高{O}的{A}", "{O}{A} {M}", "{M}{O}{A}", "{M}用于{O}时的{A}", "怎样用{M}优化{O}{A}"),
)
METHOD_PAIR = Kind(
    4,
    ("融合{M}与{N}的{O}{A}研究", "结合{M}和{N}的{O}{A}分析"),
    ("{N}与{M}结合研究{O}{A}", "{M} {N} {O}{A}", "{O}{A} {N} {M}"),
)
ESSAY = Kind(
    6,
    ("论{O}的{A}", "试论{O}的{A}", "{O}{A}探析", "浅谈{O}的{A}"),
    ("{O}{A}", "{O}有怎样的{A}", "{A} {O}", "谈{O}的{A}"),
)
PERSPECTIVE = Kind(
    10,
    ("{F}视野下{O}的{A}", "从{F}看{O}的{A}", "{F}视域中的{O}{A}研究", "{F}与{O}的{A}"),
    ("{F}{O}{A}", "{O}{A} {F}", "{F}角度的{O}{A}", "{O}的{A}和{F}", "以{F}解读{O}{A}"),
)
ESSAY_PAIR = Kind(
    6, ("论{O}的{A}与{B}", "{O}的{A}及其{B}", "浅析{O}的{A}和{B}"), ("{O}{B}和{A}", "{O} {A} {B}", "{O}的{B}与{A}")
)
TREATMENT = Kind(
    10,
    ("{F}对{O}患者{A}的影响", "{F}治疗{O}的临床观察及对{A}的影响", "{F}用于{O}患者的疗效及对{A}的影响"),
    ("{F}治疗{O} {A}", "{O}用{F}后{A}的变化", "{F}能否改善{O}的{A}", "{O}{A} {F}", "{O}病人{A}与{F}"),
)
COMBINED_TREATMENT = Kind(
    6,
    ("{F}联合{G}治疗{O}对患者{A}的影响", "{F}联合{G}对{O}患者{A}的影响"),
    ("{G}加{F}治疗{O} {A}", "{F} {G} {O} {A}", "{O}病人{G}合并{F}后的{A}"),
)
CARE = Kind(
    10,
    ("{F}对{O}患者{A}的影响", "{F}在{O}患者护理中的应用及对{A}的影响", "{F}用于{O}患者对{A}的改善效果"),
    ("{F}护理{O} {A}", "{O}用{F}后{A}的变化", "{F}能否改善{O}的{A}", "{O}{A} {F}", "{O}病人{A}与{F}"),
)
COMBINED_CARE = Kind(
    6,
    ("{F}联合{G}对{O}患者{A}的影响", "{F}结合{G}在{O}患者护理中的应用及对{A}的影响"),
    ("{G}加{F}护理{O} {A}", "{F} {G} {O} {A}", "{O}病人{G}合并{F}后的{A}"),
)
TWO_OUTCOMES = Kind(
    6,
    ("{F}对{O}患者{A}和{B}的影响", "{F}对{O}患者{A}及{B}的影响"),
    ("{F}对{O}{B}与{A}的作用", "{O} {F} {A} {B}", "{O}病人的{B}和{A} {F}"),
)
EXAMINATION = Kind(
    7,
    ("{M}评估{O}患者{A}的价值", "{M}在{O}患者{A}评估中的应用", "基于{M}的{O}患者{A}分析"),
    ("{M}{O}{A}", "{O}{A} {M}", "用{M}判断{O}的{A}", "{M}能评价{O}病人的{A}吗"),
)
CASE_SURVEY = Kind(
    4, ("{R}{O}患者{A}调查分析", "{R}{O}患者{A}现状及影响因素"), ("{R}{O}{A}", "{O}病人{A} {R}", "{R}{O}{A}如何")
)
CORRELATION = Kind(
    4,
    ("{O}患者{A}与{B}的相关性研究", "{O}患者{A}与{B}的关系"),
    ("{O}{B}和{A}的联系", "{O} {A} {B}", "{B}与{O}病人{A}有关吗"),
)

STYLES = {
    "experiment": (FACTOR, TWO_FACTORS, TWO_ASPECTS, METHOD, METHOD_FACTOR, COMPARE, REVIEW),
    "fieldwork": (FACTOR, TWO_ASPECTS, METHOD, SURVEY, REGION_METHOD, REGION_FACTOR, COMPARE, REVIEW),
    "engineering": (IMPROVEMENT, METHOD_PAIR, FACTOR, TWO_ASPECTS, METHOD_FACTOR, COMPARE, REVIEW),
    "clinical": (TREATMENT, COMBINED_TREATMENT, TWO_OUTCOMES, EXAMINATION, CASE_SURVEY, CORRELATION, REVIEW),
    "care": (CARE, COMBINED_CARE, TWO_OUTCOMES, EXAMINATION, CASE_SURVEY, CORRELATION, REVIEW),
    "social": (BACKGROUND, REGION, REGION_METHOD, REGION_FACTOR, METHOD, RELATION, COMPARE, REVIEW),
    "humanities": (PERSPECTIVE, ESSAY, ESSAY_PAIR, METHOD, COMPARE, REVIEW),
}


def read_sections(path: Path) -> dict[str, list[Term]]:
    """Reads a word list: `[section]` lines, then one `term` or `term=synonym=synonym` a line.

    Empty lines and lines that start with `#` are ignored.
    """
    sections: dict[str, list[Term]] = {}
    terms: list[Term] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            terms = sections.setdefault(line.strip("[]"), [])
        else:
            terms.append(tuple(line.split("=")))
    return sections


def read_fields(terms_dir: Path = TERMS_DIR) -> list[Field]:
    """Reads all fields in the order of their file names; every field shares the regions."""
    regions = read_sections(terms_dir / REGIONS_FILE)["regions"]
    fields = []
    for path in sorted(terms_dir.glob("*.txt")):
        if path.name == REGIONS_FILE:
            continue
        sections = read_sections(path)
        ((style,),) = sections.pop("style")
        fields.append(Field(path.stem, STYLES[style], {**sections, "regions": regions}))
    return fields


# Of the random module only Random.random() is promised to give the same numbers in every Python version.


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    """A random item; all are equally likely."""
    return items[int(rng.random() * len(items))]


def pick_skewed(rng: random.Random, items: Sequence[Item]) -> Item:
    """Picks early items more often, with density -ln(position): a third of the picks falls on the first tenth."""
    return items[int(rng.random() * rng.random() * len(items))]


def shuffled(rng: random.Random, items: Iterable[Item]) -> list[Item]:
    """The items in random order."""
    return sorted(items, key=lambda _: rng.random())


def pick_kind(rng: random.Random, kinds: tuple[Kind, ...]) -> Kind:
    """A random kind of title, by weight."""
    return pick(rng, [kind for kind in kinds for _ in range(kind.weight)])


def slots_of(kind: Kind) -> list[str]:
    """The letters of a kind's slots, in the order of its first title."""
    return re.findall(r"{(\w)}", kind.titles[0])


def other_spelling(rng: random.Random, word: Word, rate: float) -> str:
    """With probability `rate` another spelling of the same term, if there is one."""
    others = [spelling for spelling in word.term if spelling != word.spelling]
    return pick(rng, others) if others and rng.random() < rate else word.spelling


def as_written(rng: random.Random, term: Term) -> Word:
    """A term as a title spells it."""
    return Word(term, other_spelling(rng, Word(term, term[0]), TITLE_SYNONYM_RATE))


def make_document(rng: random.Random, field: Field, kind: Kind, topic: dict[str, Term]) -> Document | None:
    """Fills the slots of a title of `kind`, those in `topic` as given; None if a term came up twice."""
    terms = {slot: topic.get(slot) or pick_skewed(rng, field.sections[SLOT_SECTIONS[slot]]) for slot in slots_of(kind)}
    if len(set(terms.values())) < len(terms):
        return None
    words = {slot: as_written(rng, term) for slot, term in terms.items()}
    title = pick(rng, kind.titles).format(**{slot: word.spelling for slot, word in words.items()})
    if rng.random() < NO_KEYWORDS_RATE:
        return Document(title, kind, words, ())
    keywords = [word for slot, word in words.items() if rng.random() < KEYWORD_RATE]
    candidates = [pick_skewed(rng, field.sections[pick(rng, ("methods", "aspects", "factors"))]) for _ in range(2)]
    extras = [Word(term, term[0]) for term in candidates[: pick(rng, (0, 1, 1, 2))] if term not in terms.values()]
    spellings = dict.fromkeys(word.spelling for word in keywords + extras)
    return Document(title + ",".join(spellings), kind, words, tuple(extras))


def make_documents(rng: random.Random, fields: list[Field], count: int) -> list[Document]:
    """Makes `count` documents with different meanings and texts, in families that share an object and often an aspect.

    Raises InputError if the word lists don't yield so many.
    """
    documents: list[Document] = []
    meanings: set[tuple] = set()
    texts: set[str] = set()
    idle_families = 0
    while len(documents) < count:
        if idle_families == MAX_IDLE_FAMILIES:
            raise InputError(
                f"--documents {count}: {TERMS_DIR} yields only {len(documents)}; ask for fewer or add terms"
            )
        idle_families += 1
        field = pick(rng, fields)
        topic = {"O": pick_skewed(rng, field.sections["objects"]), "A": pick_skewed(rng, field.sections["aspects"])}
        for _ in range(1 + int(rng.random() * MAX_FAMILY)):
            shared = topic if rng.random() < SAME_ASPECT_RATE else {"O": topic["O"]}
            document = make_document(rng, field, pick_kind(rng, field.kinds), shared)
            if document is None:
                continue
            # Wordings of one kind mean the same, and so do A-and-B and B-and-A.
            meaning = (document.kind, field.name, frozenset(word.term for word in document.words.values()))
            if meaning in meanings or document.text in texts or len(documents) == count:
                continue
            meanings.add(meaning)
            texts.add(document.text)
            documents.append(document)
            idle_families = 0
    return documents


def make_query(rng: random.Random, document: Document) -> str:
    """Words a query for `document` as a phrase or a list of words: some are synonyms, one is left out or a keyword."""
    spellings = {slot: other_spelling(rng, word, QUERY_SYNONYM_RATE) for slot, word in document.words.items()}
    droppable = [slot for slot in spellings if slot != "O"] if len(spellings) > 2 else []
    if not droppable or rng.random() >= DROP_RATE:
        if rng.random() < 0.75:
            return pick(rng, document.kind.queries).format(**spellings)
    else:
        del spellings[pick(rng, droppable)]
        if document.extra_keywords and rng.random() < 0.5:
            spellings["extra"] = other_spelling(rng, pick(rng, document.extra_keywords), QUERY_SYNONYM_RATE)
    return pick(rng, (" ", "")).join(shuffled(rng, spellings.values()))


def words_of(query: str) -> str:
    """The same for queries that differ only in the order of their words and in the spaces between them."""
    return "".join(sorted(query.replace(" ", "")))


def make_pairs(rng: random.Random, documents: list[Document], count: int, taken: set[str]) -> list[tuple[str, str]]:
    """Makes `count` pairs of a query and its document, cycling through `documents`; no two with the same words.

    taken: `words_of` queries that don't come up. Raises InputError if the documents don't yield so many.
    """
    pairs: dict[tuple[str, str], tuple[str, str]] = {}
    for number in range(count):
        document = documents[number % len(documents)]
        for _ in range(MAX_QUERY_TRIES):
            query = make_query(rng, document)
            words = words_of(query)
            if words not in taken and (words, document.text) not in pairs:
                break
        else:
            raise InputError(
                f"{len(documents)} documents yield {len(pairs)} of {count} pairs; ask for fewer, or more --documents"
            )
        pairs[words, document.text] = (query, document.text)
    return list(pairs.values())


def make_dataset(documents: int, train_pairs: int, dev_pairs: int, test_pairs: int, seed: int) -> dict[str, list[str]]:
    """The lines of each file, by file name.

    Each dev and test pair takes its own document. Train cycles through the other documents, with new queries each time.
    Raises InputError if the word lists don't yield so many.
    """
    if documents <= dev_pairs + test_pairs:
        needed = dev_pairs + test_pairs + 1
        raise InputError(
            f"--documents {documents}: too few for these --dev_pairs and --test_pairs; give {needed} or more"
        )
    rng = random.Random(seed)
    corpus = make_documents(rng, read_fields(), documents)
    order = shuffled(rng, corpus)
    test = make_pairs(rng, order[:test_pairs], test_pairs, set())
    taken = {words_of(query) for query, _ in test}
    dev = make_pairs(rng, order[test_pairs : test_pairs + dev_pairs], dev_pairs, taken)
    taken.update(words_of(query) for query, _ in dev)
    train = make_pairs(rng, order[test_pairs + dev_pairs :], train_pairs, taken)
    splits = {"train.csv": train, "dev.csv": dev, "test.csv": test}
    files = {name: [f"{query}\t{text}" for query, text in pairs] for name, pairs in splits.items()}
    files["corpus.csv"] = [document.text for document in shuffled(rng, corpus)]
    return files


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="the files go to its folder recall")
    parser.add_argument("--documents", type=number_in_range(1), default=6000, help="lines of corpus.csv")
    parser.add_argument("--train_pairs", type=number_in_range(1), default=6000, help="lines of train.csv")
    parser.add_argument("--dev_pairs", type=number_in_range(1), default=300, help="lines of dev.csv")
    parser.add_argument("--test_pairs", type=number_in_range(1), default=500, help="lines of test.csv")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another dataset")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the four files and prints how long they are."""
    args = build_parser().parse_args(argv)
    dataset = make_dataset(args.documents, args.train_pairs, args.dev_pairs, args.test_pairs, args.seed)
    for name, lines in dataset.items():
        path = args.output_dir / "recall" / name
        with atomic_write(path) as file:
            file.writelines(f"{line}\n" for line in lines)
        print(f"{path}: {len(lines)} lines")
    return 0


if __name__ == "__main__":
    run(main)
