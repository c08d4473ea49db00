"""What export_model.py --format sentence-transformers writes: names and values of PyTorch, equal vectors and tokens.

That SentenceTransformer gives the model's vectors was checked by hand: PyTorch isn't in the tests' environment.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import export_model
from base_model import SemanticIndexBase
from common.errors import InputError
from common.options import POOLINGS
from encoding.hub_card import hub_card
from encoding.sentence_transformers_export import export_sentence_transformers, write_tokenizer
from helpers import ROOT, VARIED_TEXTS, new_model, small_tokenizer
from modeling.checkpoint import create_model, load_checkpoint, save_checkpoint
from modeling.hugging_face import to_pytorch
from modeling.sentence_transformers_folder import module_weights, read_sentence_transformers_folder
from modeling.tokenizer_files import read_tokenizer

HUGGING_FACE = ROOT / "tests" / "data" / "hugging_face"  # written by PyTorch
FORMAT = ["--format", "sentence-transformers"]


def saved(folder: Path, model_folder: Path, **options: object) -> Path:
    """A checkpoint of random weights."""
    save_checkpoint(folder, *new_model(model_folder, **options))
    return folder


@pytest.mark.parametrize("output_emb_size", [0, 16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_folder_gives_the_model_s_vectors_and_settings(
    model_folder: Path, tmp_path: Path, pooling: str, output_emb_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved(tmp_path / "model_1", model_folder, pooling=pooling, output_emb_size=output_emb_size)
    output = tmp_path / "output"
    for _ in range(2):  # the second replaces the first
        assert export_model.main(["--params_path", str(checkpoint), "--output_path", str(output), *FORMAT]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("largest difference between the model and the folder read again: ")
        assert lines[1] == f"wrote {output}"
    model, again = load_checkpoint(checkpoint), load_checkpoint(output)
    assert capsys.readouterr().err == ""
    texts = ["水稻的产量", "桥梁", "论糖尿病影响因素研究"]
    vectors = model.model.embed(*model.tokenizer(texts))
    np.testing.assert_allclose(again.model.embed(*again.tokenizer(texts)), vectors, atol=1e-6, rtol=0)
    assert (again.model.config.pooling, again.model.config.output_emb_size) == (pooling, output_emb_size)
    assert again.tokenizer.max_seq_length == model.tokenizer.max_seq_length
    told = read_sentence_transformers_folder(output)
    assert (told.pooler is not None, told.dense is not None) == (pooling == "cls", output_emb_size > 0)


@pytest.mark.parametrize("name", ["bert", "ernie", "roberta"])
def test_pytorch_s_weights_come_out_as_they_went_in(tmp_path: Path, name: str) -> None:
    """With their names, shapes and bits; the config has what the vectors depend on."""
    loaded = create_model(SemanticIndexBase, model_name_or_path=str(HUGGING_FACE / name), output_emb_size=0)
    save_checkpoint(tmp_path / "model_1", *loaded)
    (tmp_path / "output").mkdir()
    assert export_sentence_transformers(load_checkpoint(tmp_path / "model_1"), tmp_path / "output") == 0
    written = load_file(tmp_path / "output" / "model.safetensors")
    if name == "bert":
        file = HUGGING_FACE / name / "model.safetensors"
        original = {key.removeprefix("bert."): array for key, array in load_file(file).items()}
        for key, array in written.items():
            np.testing.assert_array_equal(array, original[key], err_msg=key)
    assert "encoder.layer.0.attention.self.query.weight" in written
    given = json.loads((HUGGING_FACE / name / "config.json").read_text())
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    for field in (
        "model_type",
        "hidden_act",
        "layer_norm_eps",
        "pad_token_id",
        "max_position_embeddings",
        "vocab_size",
    ):
        assert config[field] == given[field], field


def test_the_pooler_and_the_reduction_are_dense_modules(model_folder: Path, tmp_path: Path) -> None:
    """With PyTorch's shape of a weight, [out, in]; the pooler has the tanh."""
    checkpoint = saved(tmp_path / "model_1", model_folder, pooling="cls", output_emb_size=16)
    assert export_model.main(["--params_path", str(checkpoint), "--output_path", str(tmp_path / "out"), *FORMAT]) == 0
    assert load_file(tmp_path / "out" / "3_Reduction" / "model.safetensors")["linear.weight"].shape == (16, 32)
    pooler = json.loads((tmp_path / "out" / "2_Pooler" / "config.json").read_text())
    assert pooler["activation_function"] == "torch.nn.modules.activation.Tanh"
    weights = load_checkpoint(checkpoint).model.state_dict()
    for name, array in module_weights(tmp_path / "out").items():
        np.testing.assert_array_equal(array, weights[name].numpy(), err_msg=name)


@pytest.mark.parametrize("split_symbols", [True, False])
@pytest.mark.parametrize("do_lower_case", [True, False])
def test_tokenizer_json_tokenizes_as_we_do(tmp_path: Path, do_lower_case: bool, split_symbols: bool) -> None:
    """Also symbols, at which BERT's own tokenizer doesn't split."""
    tokenizer = small_tokenizer(512, {"do_lower_case": do_lower_case, "split_symbols": split_symbols})
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [encoding.ids for encoding in other.encode_batch(VARIED_TEXTS)] == tokenizer.tokenize(VARIED_TEXTS)


@pytest.mark.parametrize("missing", [(), ("vocab.txt", "tokenizer_config.json")])
@pytest.mark.parametrize("split_symbols", [True, False])
def test_the_tokenizer_comes_back_as_it_went_out(tmp_path: Path, split_symbols: bool, missing: tuple[str, ...]) -> None:
    """Also without the files that sentence-transformers leaves out, or changes, when it saves the folder again."""
    tokenizer = small_tokenizer(64, {"split_symbols": split_symbols})
    write_tokenizer(tmp_path, tokenizer)
    for name in missing:
        (tmp_path / name).unlink()
    again = read_tokenizer(tmp_path, 64, is_pytorch=True)
    assert again.splits_symbols == split_symbols
    assert again.tokenize(VARIED_TEXTS) == tokenizer.tokenize(VARIED_TEXTS)


def test_a_readme_and_a_model_card_are_written(model_folder: Path, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "model_1", model_folder)
    assert export_model.main(["--params_path", str(checkpoint), "--output_path", str(tmp_path / "out"), *FORMAT]) == 0
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert readme == hub_card(load_checkpoint(checkpoint))
    card = json.loads((tmp_path / "out" / "model_card.json").read_text())
    assert card["fingerprint"] == load_checkpoint(checkpoint).fingerprint
    assert card["largest_difference"] == {"sentence-transformers": 0.0}


def test_a_backbone_that_pytorch_s_form_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="nezha: can't be written in PyTorch's form; need BERT, ERNIE"):
        to_pytorch({}, SimpleNamespace(model_type="nezha"))
