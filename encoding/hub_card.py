"""The model card that hubs show: README.md of a folder in the form of sentence-transformers."""

import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from common.errors import InputError
from common.logs import log
from common.options import DEFAULT_MODEL
from modeling.checkpoint import LoadedCheckpoint
from modeling.hub import HUB_COPIES
from modeling.model_cache import named_repository
from modeling.training_progress import STATE_FILE, read_progress

TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction"]
PATHS = ("model_name_or_path", "from_scratch", "init_from_ckpt")
# Options without effect: name -> the option without which, or with which, it has none.
NEEDS = {"amp_dtype": "use_amp", "chunk_numbers": "use_gradient_cache"}
REPLACED = {"epochs": "max_steps", "symmetric_pairs": "no_false_negative_mask", "model_name_or_path": "from_scratch"}
LINE_LENGTH = 100  # of the command
PLAIN_USAGE = """vectors = model.encode(["a query", "a title"])
print(vectors @ vectors.T)"""
USAGE_WITH_PREFIXES = """query = model.encode_query("a query")  # puts the query's prefix before it
titles = model.encode_document(["a title", "another title"])
print(titles @ query)"""


def hub_card(loaded: LoadedCheckpoint) -> str:
    """The card in Markdown: what the model is, how to use it, and what its checkpoint tells of the training."""
    progress = _progress(loaded)
    name = loaded.weights.resolve().parent.name
    header = yaml.safe_dump(_metadata(name, progress), sort_keys=False, allow_unicode=True)
    training = _training(progress) if progress else ""
    return f"---\n{header}---\n\n# {name}\n\n{_description(loaded)}{training}"


def _progress(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """What the checkpoint tells of its training; empty if that is nothing."""
    folder = loaded.weights.parent
    if not (folder / STATE_FILE).is_file():
        return {}
    try:
        return read_progress(folder)
    except InputError as error:
        log(f"{error}; the model card tells nothing of the training")
        return {}


def _metadata(name: str, progress: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that hubs read, without what isn't known."""
    metadata: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": TAGS,
    }
    if not progress:
        return metadata
    if base := base_model(progress["run_config"]):
        metadata["base_model"] = base
    if scores := evaluation_of(progress):
        digest = progress["evaluator"].get("SHA-256 of the evaluation pairs")
        result = {
            "task": {"type": "sentence-similarity"},
            "dataset": {"name": f"evaluation pairs, SHA-256 {digest}", "type": "unknown"},
            "metrics": [{"type": metric, "value": value} for metric, value in scores.items()],
        }
        metadata |= {"metrics": list(scores), "model-index": [{"name": name, "results": [result]}]}
    return metadata


def base_model(run_config: Mapping[str, Any]) -> str | None:
    """The name on the hub of the model that a training started from; None if it isn't sure that it is there.

    `models/ernie` may be a folder: a name of this form counts only if the hub's cache holds the model.
    """
    name = run_config["model_name_or_path"]
    if run_config["from_scratch"] or run_config["init_from_ckpt"] or os.path.exists(name):
        return None
    if name in HUB_COPIES:
        return HUB_COPIES[name]
    repository = named_repository(name)
    return repository.name if repository and repository.snapshot() else None


def evaluation_of(progress: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the checkpoint's step in percent, by name; empty if it wasn't evaluated."""
    reports = (progress["evaluator"] or {}).get("reports", ())
    report = next((each for each in reports if each.startswith(f"global step {progress['step']},")), "")
    return {name: float(value) for name, value in re.findall(r"\t([a-z]+@\d+)=([\d.]+)", report)}


def _description(loaded: LoadedCheckpoint) -> str:
    config, backbone = loaded.model.config, loaded.model.ptm.config
    prefixes = {role: prefix for role, prefix in config.prefixes.items() if prefix}
    listed = "".join(f"- prefix of a {role}: `{prefix!r}`\n" for role, prefix in prefixes.items())
    length, size = loaded.tokenizer.max_seq_length, loaded.model.embedding_size
    return f"""A dual encoder for semantic indexing. It turns a text of up to {length} tokens into a unit vector of
{size} components; the cosine of two vectors says how similar the texts are.

- encoder: {backbone.model_type}, {backbone.num_hidden_layers} layers of {backbone.hidden_size}
- pooling: {config.pooling}
{listed}
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
{USAGE_WITH_PREFIXES if prefixes else PLAIN_USAGE}
```
"""


def _training(progress: Mapping[str, Any]) -> str:
    """The section on the training: steps, data, command and metrics."""
    run_config = progress["run_config"]
    scores = evaluation_of(progress)
    rows = "".join(f"| {name} | {value} |\n" for name, value in scores.items())
    table = f"\n| metric | percent |\n|---|---|\n{rows}" if scores else ""
    return f"""
## Training

{progress["step"]} steps with in-batch negatives, on {run_config["number of processes"]} process(es). SHA-256 of the
file of pairs: `{run_config["SHA-256 of the training file"]}`.

```sh
{training_command(run_config)}
```
{table}"""


def training_command(run_config: Mapping[str, Any]) -> str:
    """The command of a training with this configuration. FILE is for the pairs, whose name isn't recorded.

    A folder's absolute path, which is nobody else's business, is cut to its name.
    """
    words = ["python train_batch_neg.py", "--train_set_file FILE"]
    words += [_option(name, value) for name, value in run_config.items() if _has_effect(name, run_config)]
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < LINE_LENGTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def _has_effect(name: str, run_config: Mapping[str, Any]) -> bool:
    """Whether an entry is an option that the command needs."""
    value = run_config[name]
    if " " in name or value is None or (value is False and name != "symmetric_pairs"):
        return False
    if name == "model_name_or_path" and run_config["init_from_ckpt"] and value == DEFAULT_MODEL:
        return False
    if name in NEEDS and not run_config[NEEDS[name]]:
        return False
    return name not in REPLACED or not run_config[REPLACED[name]]


def _option(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    text = os.path.basename(value) if name in PATHS and os.path.isabs(value) else str(value)
    return f"--{name} {shlex.quote(text)}"
