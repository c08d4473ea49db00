"""Makes the model folders and tensors beside this file, with PyTorch and transformers, which the tests don't need.

python tests/data/hugging_face/make.py     (written with torch 2.13.0 and transformers 5.23.0)

Each model is random. `expected.safetensors` in its folder has a padded batch and what PyTorch computes for it in
float32: `sequence`, the last layer, and `pooled`. The three folders hold different forms of files:

bert: BertModel, model.safetensors, vocab.txt
ernie: ErnieForPreTraining (prefix `ernie.`, heads), pytorch_model.bin, task types, vocab.txt
roberta: RobertaModel with BERT's vocabulary, pytorch_model.bin of the format before PyTorch 1.6, tokenizer.json alone

tensors: views of storages in all types of numbers, in both formats of PyTorch, and their values
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, ErnieConfig, ErnieForPreTraining, RobertaConfig, RobertaModel

HERE = Path(__file__).resolve().parent
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = "水稻玉米小麦大豆棉花苹果土壤库桥梁隧道糖尿病高血压图书馆钢材产量品质现状影响因素检测方法评价管理对策应用"
PIECES = ["the", "wheat", "##s", "rice", "##ed", "a", "b", "##b"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}


def save_model(
    folder: Path, model: torch.nn.Module, encoder: torch.nn.Module, vocabulary: list[str], file: str
) -> None:
    """Writes config.json, the weights and the expected outputs; the batch has rows of 12, 7 and 3 tokens."""
    folder.mkdir(exist_ok=True)
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or name.endswith("bias"):  # transformers sets them to 1 and 0
            torch.nn.init.normal_(parameter, float("LayerNorm.weight" in name), 0.1)
    model.eval()
    pad_id = vocabulary.index("[PAD]")
    input_ids = torch.randint(5, len(vocabulary), (3, 12))
    input_ids[1, 7:] = input_ids[2, 3:] = pad_id
    token_type_ids = torch.zeros_like(input_ids)
    with torch.no_grad():
        outputs = encoder(input_ids, attention_mask=(input_ids != pad_id).long(), token_type_ids=token_type_ids)
    expected = {"input_ids": input_ids, "token_type_ids": token_type_ids}
    expected |= {"sequence": outputs.last_hidden_state.contiguous(), "pooled": outputs.pooler_output}
    save_file(expected, folder / "expected.safetensors")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if file == "model.safetensors":
        save_file(weights, folder / file, {"format": "pt"})
    else:
        torch.save(model.state_dict(), folder / file, _use_new_zipfile_serialization=file == "pytorch_model.bin")
        (folder / file).rename(folder / "pytorch_model.bin")


def save_vocabulary(folder: Path, vocabulary: list[str]) -> None:
    """Writes vocab.txt."""
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")


def save_tensors() -> None:
    """Writes tensors.bin, tensors_legacy.bin and tensors.safetensors."""
    matrix = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 8
    types = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64, "long": torch.int64}
    types |= {"int": torch.int32, "short": torch.int16, "char": torch.int8, "byte": torch.uint8, "bool": torch.bool}
    views = {
        "matrix": matrix,
        "transposed": matrix.t(),
        "part": matrix[1:3, 2:5],
        "every_second": matrix[::2, 1::2],
        "parameter": torch.nn.Parameter(matrix[:, 0].clone()),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "positions": torch.arange(5).expand(1, -1),
        **{name: (matrix * 8 - 7).to(dtype) for name, dtype in types.items() if name not in ("byte", "bool")},
        **{name: (matrix * 8).to(types[name]) for name in ("byte", "bool")},
    }
    torch.save(views, HERE / "tensors.bin")
    torch.save(views, HERE / "tensors_legacy.bin", _use_new_zipfile_serialization=False)
    save_file({name: view.detach().clone().contiguous() for name, view in views.items()}, HERE / "tensors.safetensors")


def main() -> None:
    """Writes all files."""
    torch.manual_seed(0)
    vocabulary = [*SPECIAL, *dict.fromkeys(CHARACTERS), *PIECES]
    common = {**SIZES, "vocab_size": len(vocabulary), "use_cache": True}
    bert = BertModel(BertConfig(**common, type_vocab_size=2, layer_norm_eps=1e-3, hidden_act="gelu"))
    save_model(HERE / "bert", bert, bert, vocabulary, "model.safetensors")
    save_vocabulary(HERE / "bert", vocabulary)
    task = {"use_task_id": True, "task_type_vocab_size": 3, "type_vocab_size": 4}
    ernie = ErnieForPreTraining(ErnieConfig(**common, **task, layer_norm_eps=1e-3, hidden_act="relu"))
    save_model(HERE / "ernie", ernie, ernie.ernie, vocabulary, "pytorch_model.bin")
    save_vocabulary(HERE / "ernie", vocabulary)
    vocabulary = ["[UNK]", "[PAD]", *vocabulary[2:]]  # RoBERTa counts positions from pad_token_id + 1 on
    roberta = RobertaModel(RobertaConfig(**common, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5))
    save_model(HERE / "roberta", roberta, roberta, vocabulary, "legacy")
    tokens = {token: token_id for token_id, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(HERE / "roberta" / "tokenizer.json"))
    save_tensors()


if __name__ == "__main__":
    main()
