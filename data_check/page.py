"""The HTML report of a data check. Imports no Paddle."""

from collections.abc import Sequence

from markupsafe import Markup

from data_check.check import DataCheck
from data_check.rules import Finding
from encoding.token_statistics import COVERED
from reporting.page import Bilingual, Content, Section, details, join, paragraph, table, text_list, write_report

TITLE = Bilingual("Check of the data", "数据检查")
COLUMN_NAMES = {  # of files, in Chinese
    "queries": "query",
    "titles": "标题",
    "hard negatives": "难负例",
    "documents": "文档",
}


def write_page(path: str, check: DataCheck) -> None:
    """Writes the report. Raises InputError if the file can't be written."""
    broken = len(check.broken)
    about = Bilingual(f"{broken} findings need a look.", f"有 {broken} 项需要查看。")
    sections = [
        Section(Bilingual("Files", "文件"), _files(check)),
        Section(Bilingual("Findings", "发现"), _findings(check.findings)),
        Section(Bilingual("Examples", "示例"), _examples([finding for finding in check.findings if finding.count])),
    ]
    if check.lengths:
        sections.append(Section(Bilingual("Lengths", "长度"), _lengths(check)))
    if check.batches:
        sections.append(Section(Bilingual("Suspected false negatives", "可能的假负例"), _batches(check)))
    write_report(path, TITLE, paragraph(about, name="bad" if broken else "good"), sections)


def _files(check: DataCheck) -> Markup:
    head = [
        Bilingual("file", "文件"),
        Bilingual("column", "列"),
        Bilingual("texts", "文本数"),
        Bilingual("distinct", "不同文本数"),
    ]
    rows = [
        (file.path, Bilingual(name, COLUMN_NAMES[name]), f"{len(column):,}", f"{check.distinct[str(column)]:,}")
        for file in check.files
        for name, column in file.columns.items()
    ]
    return table(head, rows, text_columns=2)


def _rule(finding: Finding) -> Markup:
    """The rule of a finding, marked if it is broken."""
    mark = "bad" if finding.is_broken else ""
    return Markup('<span class="{}">{}</span>').format(mark, Bilingual(finding.rule.title, finding.rule.title_cn))


def _where(path: str, column: str) -> Content:
    return join([path, ", ", Bilingual(column, COLUMN_NAMES[column])]) if column else path


def _findings(findings: Sequence[Finding]) -> Markup:
    """A table of what was found, and the rules of which nothing breaks any."""
    head: list[Content] = [
        Bilingual("what", "内容"),
        Bilingual("where", "位置"),
        Bilingual("number", "数量"),
        Bilingual("of", "总数"),
        "%",
    ]
    rows = [
        (
            _rule(finding),
            _where(finding.path, finding.column),
            f"{finding.count:,}",
            f"{finding.total:,}",
            f"{100 * finding.share:.2f}",
        )
        for finding in findings
        if finding.count
    ]
    found = {finding.rule for finding in findings if finding.count}
    absent = dict.fromkeys(finding.rule for finding in findings if finding.rule not in found)
    names = join((Bilingual(rule.title, rule.title_cn) for rule in absent), "; ")
    quiet = paragraph(Bilingual("Not found: ", "没有发现："), names, name="quiet")
    return join([table(head, rows, text_columns=2), quiet])


def _examples(findings: Sequence[Finding]) -> Markup:
    parts = (
        details(
            join([_rule(finding), ", ", _where(finding.path, finding.column)]),
            paragraph(Bilingual(finding.rule.remedy, finding.rule.remedy_cn)),
            text_list(finding.examples),
        )
        for finding in findings
    )
    return join(parts)


def _lengths(check: DataCheck) -> Markup:
    share = f"{100 * COVERED:.0f} %"
    fitting = Bilingual(f"--max_seq_length that {share} fit into", f"能容纳 {share} 的 --max_seq_length")
    head = [Bilingual("column", "列"), Bilingual("checked", "检查时的长度"), fitting]
    return table(
        head,
        [(_where(advice.path, advice.column), str(advice.given), str(advice.suggested)) for advice in check.lengths],
    )


def _batches(check: DataCheck) -> Markup:
    head = [
        Bilingual("pairs in a batch", "每个 batch 的 Pair 数"),
        Bilingual("negatives", "负例数"),
        Bilingual("suspected ones without the mask", "不用掩码时可能的假负例"),
        Bilingual("with the mask", "使用掩码时"),
    ]
    rows = [
        (f"{batch.batch_size:,}", f"{batch.negatives:,}", f"{batch.without_mask:,.1f}", f"{batch.with_mask:,.1f}")
        for batch in check.batches
    ]
    return table(head, rows)
