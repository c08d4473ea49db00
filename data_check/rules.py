"""The rules of a data check, with what to do about what breaks them, in English and Chinese. Imports no Paddle."""

from dataclasses import dataclass, field
from typing import NamedTuple

EXAMPLES = 10  # of what breaks a rule
LONGEST_EXAMPLE = 80  # characters
A_FEW = 0.001  # of the lines, which is noise
MANY = 10  # titles of a query or queries of a title; of more, many are likely to be wrong, or general answers


class Rule(NamedTuple):
    """What lines or texts shouldn't be, why, and what to do.

    allowed: the share of them that doesn't break the rule, as data without a fault have some.
    """

    name: str
    title: str
    title_cn: str
    remedy: str
    remedy_cn: str
    allowed: float = 0.0


@dataclass
class Finding:
    """How often a rule is broken in a file.

    column: in which of its columns, "" for lines and pairs; count: the lines or texts that break the rule, of total;
    examples: the first EXAMPLES of them.
    """

    rule: Rule
    path: str
    column: str
    count: int = 0
    total: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)

    @property
    def where(self) -> str:
        """The file, and the column if it is about one."""
        return f"{self.path}, {self.column}" if self.column else self.path

    @property
    def share(self) -> float:
        """Of the lines or texts, from 0 to 1."""
        return self.count / self.total if self.total else float(self.count > 0)

    @property
    def is_broken(self) -> bool:
        """Whether there are more than the rule allows."""
        return self.share > self.rule.allowed


def shortened(text: str) -> str:
    """A text as an example: in quotes, with escapes for what can't be seen, and not longer than LONGEST_EXAMPLE."""
    return repr(text if len(text) <= LONGEST_EXAMPLE else text[: LONGEST_EXAMPLE - 1] + "…")


UNREADABLE = Rule(
    "unreadable",
    "the file isn't text in UTF-8",
    "文件不是 UTF-8 文本",
    "convert it as the message says; nothing else of it was checked",
    "按提示转换；该文件的其他内容未检查",
)
ENCODING = Rule(
    "encoding",
    "lines that can't be decoded",
    "无法解码的行",
    "convert the file with iconv, or repair or remove these lines (--skip_bad_lines leaves them out)",
    "用 iconv 转换文件，或修复、删除这些行（--skip_bad_lines 会跳过它们）",
)
DAMAGED = Rule(
    "damaged",
    "lines with characters that a wrong conversion left",
    "含有转码错误留下的字符的行",
    "convert the source of the file again; the original characters are lost here",
    "重新转换原始文件；这里的原字符已经丢失",
    A_FEW,
)
FORM = Rule(
    "form",
    "signs that a column isn't text: a header, labels, ids, quotes, JSON",
    "某列不像文本：表头、标签、编号、引号或 JSON",
    "do what the message says",
    "按提示处理",
)
COLUMNS = Rule(
    "columns",
    "lines without a query or a title, or with too many columns",
    "缺少 query 或标题，或列数过多的行",
    "write query<TAB>title[<TAB>hard negative]... in each line, or one document in each line of the corpus",
    "每行写 query<TAB>标题[<TAB>难负例]……；召回库每行一篇文档",
)
SEPARATOR = Rule(
    "separator",
    "lines with something else where a tab should be",
    "本应是 tab 的位置写成了其他分隔符的行",
    "replace it by a tab: a full-width or wide space, a picture of a tab (␉), or a backslash and a t",
    "换成 tab：全角空格、其他宽空格、␉ 符号，或反斜杠加 t",
)
INVISIBLE = Rule(
    "invisible",
    "lines with control or zero-width characters",
    "含控制字符或零宽字符的行",
    "remove them; most tokenizers drop them, but other programs don't",
    "删除这些字符；多数分词器会忽略它们，但其他程序不会",
    A_FEW,
)
HTML = Rule(
    "html",
    "lines with HTML entities or tags",
    "含 HTML 实体或标签的行",
    "replace entities (Python: html.unescape) and remove tags",
    "还原实体（Python：html.unescape），去掉标签",
    A_FEW,
)
REPEATED_PAIRS = Rule(
    "repeated_pairs",
    "pairs that repeat an earlier one",
    "与前面重复的 Pair",
    "remove them: they count twice in the training and in the metrics",
    "删除：它们在训练和指标中会被重复计算",
    0.01,
)
REPEATED_DOCUMENTS = Rule(
    "repeated_documents",
    "documents that repeat an earlier one",
    "与前面重复的文档",
    "nothing needs to be done: recall.py takes each once; fewer lines are read faster",
    "无需处理：recall.py 只取一次；删除后读取更快",
    0.05,
)
NEAR_DUPLICATES = Rule(
    "near_duplicates",
    "texts that are near-duplicates of an earlier one",
    "与前面某条文本近似重复的文本",
    "if the examples say the same, keep one of them: as negatives of each other they are false",
    "如果示例的意思相同，只保留一条：它们不应互为负例",
    0.05,
)
LEAKED = Rule(
    "leaked",
    "texts that the training has",
    "训练集中已有的文本",
    "remove them from the training: metrics on what a model has seen are too good",
    "从训练集中删除：在模型见过的文本上评估，指标会偏高",
)
NEARLY_LEAKED = Rule(
    "nearly_leaked",
    "texts of which the training has near-duplicates",
    "训练集中有近似重复的文本",
    "look at the examples, and remove what says the same from the training",
    "查看示例，从训练集中删除意思相同的文本",
    0.01,
)
SHARED_TITLES = Rule(
    "shared_titles",
    "titles that the training has with other queries",
    "训练集中以其他 query 出现过的标题",
    "usual where both come from one corpus; for a test on new documents, split the pairs by title",
    "两者来自同一召回库时很常见；如果要测试新文档，应按标题划分",
    0.5,
)
OWN_TITLES = Rule(
    "own_titles",
    "pairs whose title is the query itself",
    "标题就是 query 本身的 Pair",
    "remove them: they teach nothing, and a query's own text is no answer to it",
    "删除：学不到东西，而且 query 本身不算答案",
)
MANY_TITLES = Rule(
    "many_titles",
    f"pairs whose query has more than {MANY} titles",
    f"query 的标题超过 {MANY} 个的 Pair",
    "check that the query is specific enough, and that all its titles answer it",
    "确认 query 足够具体，且每个标题都是它的答案",
    0.01,
)
MANY_QUERIES = Rule(
    "many_queries",
    f"pairs whose title has more than {MANY} queries",
    f"标题的 query 超过 {MANY} 个的 Pair",
    "check that the title isn't a general answer; the mask of false negatives needs to be on, as it is by default",
    "确认标题不是笼统的答案；需要打开假负例掩码（默认打开）",
    0.05,
)
FALSE_HARD_NEGATIVES = Rule(
    "false_hard_negatives",
    "hard negatives that are a title of their query, or nearly one",
    "与 query 的某个标题相同或近似的难负例",
    "remove them; exact ones are masked in training, near ones aren't",
    "删除；完全相同的在训练中会被掩码，近似的不会",
)
NOT_IN_CORPUS = Rule(
    "not_in_corpus",
    "titles that the corpus lacks, with the nearest document that it has",
    "召回库中没有的标题，及其中最接近的文档",
    "write the whole title with its keywords, as in the corpus, or add it there; it can't be found otherwise",
    "标题要与召回库完全一致（包括关键词），或把它加入召回库；否则不可能被召回",
)
CUT = Rule(
    "cut",
    "texts that are cut to --max_seq_length (of a sample)",
    "被截断到 --max_seq_length 的文本（抽样）",
    "use the suggested --max_seq_length, or put what matters first",
    "使用建议的 --max_seq_length，或把重要内容放在前面",
    0.05,
)
UNKNOWN = Rule(
    "unknown",
    "tokens that the vocabulary lacks (of a sample)",
    "词表中没有的 token（抽样）",
    "use a model whose vocabulary fits the language",
    "换用词表适合该语言的模型",
    0.05,
)
