"""Evaluations during training, which decide on the best model."""

import hashlib
import json
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from ann_util import IndexOptions
from base_model import SemanticIndexBase
from common.distributed import broadcast_object
from common.files import atomic_write, prepare_file
from common.logs import log
from data import TextTokenizer, ranking_by_query, read_scored_hits, write_hits
from encoding.text_encoder import Encoder
from reporting.evaluation_report import Result, write_evaluation_report
from reporting.page import Bilingual
from retrieval.corpus import Corpus
from retrieval.hybrid_search import VECTOR, hits_of, search
from retrieval.metrics import Evaluation, evaluate, format_lines, judge_hits, metrics
from retrieval.pipeline import encode_queries, open_or_build_index

BEST_REPORT_FILE = "model_best_report.html"  # in recall_result_dir


@dataclass
class Evaluator:
    """Recalls and evaluates as recall.py and evaluate.py do, and keeps the history of evaluations.

    batch_size: texts of max_seq_length tokens; embedding_parent: folder in which the corpus's vectors are kept during
    an evaluation; recall_result_file, evaluate_result: file names of the hits and of all evaluations' metrics.
    """

    corpus: Corpus
    positives: dict[str, set[str]]
    _: KW_ONLY
    batch_size: int
    recall_num: int
    index_options: IndexOptions
    embedding_parent: Path
    recall_result_dir: str | Path
    recall_result_file: str
    evaluate_result: str
    best_metric: str
    last_step: int = field(default=0, init=False)
    score: float = field(default=0.0, init=False)  # `best_metric` of the evaluation that was recorded last
    evals_without_improvement: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._result_file = Path(self.recall_result_dir, self.recall_result_file)
        self._report_file = Path(self.recall_result_dir, self.evaluate_result)
        self._best_report_file = Path(self.recall_result_dir, BEST_REPORT_FILE)
        pairs = json.dumps({query: sorted(titles) for query, titles in self.positives.items()})
        self.conditions = {  # scores can be compared only if these are equal
            "best_metric": self.best_metric,
            "recall_num": self.recall_num,
            "SHA-256 of the corpus": self.corpus.sha256,
            "SHA-256 of the evaluation pairs": hashlib.sha256(pairs.encode()).hexdigest(),
        }
        self._scoring_options = self.index_options._asdict()  # scores differ slightly with these
        del self._scoring_options["hnsw_max_elements"]
        self._reports: list[str] = []
        self._best: float | None = None

    def prepare_files(self) -> None:
        """Creates the folders of the result files. Raises InputError if they couldn't be written."""
        for file in (self._result_file, self._report_file, self._best_report_file):
            prepare_file(file)

    def __call__(self, model: SemanticIndexBase, tokenizer: TextTokenizer, step: int, epoch: int) -> Evaluation:
        """Evaluates the model on all ranks together; rank 0 writes both result files.

        Doesn't change this object, so that it can be interrupted: call `record` with the result. Raises InputError.
        """
        encoder = Encoder(model.embed, tokenizer, model.embedding_size, self.batch_size)
        queries, k = list(self.positives), self.recall_num
        vectors = encode_queries(encoder, queries)
        evaluation = None
        with open_or_build_index(
            encoder, vectors, k, corpus=self.corpus, options=self.index_options, parent=self.embedding_parent
        ) as document_index:
            if document_index:
                found = search(document_index, queries, vectors, k, VECTOR)
                hits = list(hits_of(found, document_index.documents, queries))
                evaluation = evaluate(self.positives, ranking_by_query(hits), k)
                write_hits(self._result_file, hits)
                with atomic_write(self._report_file) as file:
                    file.writelines(line + "\n" for line in [*self._reports, _report(step, epoch, evaluation)])
        return broadcast_object(evaluation)

    def record(self, evaluation: Evaluation, step: int, epoch: int) -> None:
        """Adds an evaluation to the history; `score` and `is_best` then refer to it."""
        self._reports.append(_report(step, epoch, evaluation))
        self.last_step, self.score = step, metrics(evaluation)[self.best_metric]
        self.evals_without_improvement += 1
        if self._best is None or self.score > self._best:
            self._best, self.evals_without_improvement = self.score, 0

    @property
    def is_best(self) -> bool:
        """Whether the last evaluation is better than all before it."""
        return self.evals_without_improvement == 0

    def write_report(self) -> None:
        """Writes the report on the last evaluation, from the hits that it wrote. Raises InputError if it can't.

        It isn't in the model's folder, since it holds texts of the evaluation pairs, and models are passed on.
        """
        judgement = judge_hits(self.positives, read_scored_hits(self._result_file), self.recall_num)
        name = Bilingual(f"model_best, step {self.last_step}", f"model_best，第 {self.last_step} 步")
        write_evaluation_report(self._best_report_file, Result(name, judgement), bm25=None)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return {
            **self.conditions,
            "index_options": self._scoring_options,
            "last_step": self.last_step,
            "best": self._best,
            "evals_without_improvement": self.evals_without_improvement,
            "reports": list(self._reports),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over the history in the `state` of an evaluator with the same conditions; logs other index options."""
        earlier = state.get("index_options", {})  # version 2.0.0 didn't save them
        for name, value in self._scoring_options.items():
            if earlier.get(name, value) != value:
                log(f"--{name} {value}: the evaluations before used {earlier[name]}, so scores may differ slightly")
        self.last_step, self._best = state["last_step"], state["best"]
        self._reports = list(state["reports"])
        # Version 1 called it without_gain.
        self.evals_without_improvement = state.get("evals_without_improvement", state.get("without_gain", 0))


def _report(step: int, epoch: int, evaluation: Evaluation) -> str:
    return f"global step {step}, epoch {epoch}\t" + "\t".join(format_lines(evaluation))
