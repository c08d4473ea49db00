"""A WordPiece vocabulary for a model that is trained from scratch."""

from collections.abc import Iterable

from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer

from common.texts import wordpiece_tokenizer
from data import CLS, MASK, PAD, SEP, UNK


def build_vocabulary(texts: Iterable[str], size: int = 30000) -> list[str]:
    """A WordPiece vocabulary for a model from scratch: special tokens, all characters, then frequent word pieces.

    size: bounds the pieces beyond the characters. The same texts give the same vocabulary.
    """
    texts = list(texts)

    def train(first_tokens: list[str], size: int) -> list[str]:
        tokenizer = wordpiece_tokenizer(WordPiece(unk_token=UNK), do_lower_case=True)
        trainer = WordPieceTrainer(vocab_size=size, special_tokens=first_tokens, min_frequency=2, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        vocabulary = tokenizer.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    special_tokens = [PAD, CLS, SEP, MASK, UNK]  # [PAD] first: ERNIE's pad_token_id is 0
    # The trainer numbers the characters within words (##x) in the order of a hash table that differs in each process,
    # and breaks ties by these numbers; given as first tokens they keep their order.
    inner_characters = [token for token in train(special_tokens, 0) if token.startswith("##") and len(token) == 3]
    return train(special_tokens + sorted(inner_characters), size)
