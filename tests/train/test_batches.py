"""From rows to batches: like lengths together, cut and padded without changing an answer."""

import pytest
import torch

from surgeon.errors import DataError
from surgeon.train import Row, kind_of, load_tokenizer
from surgeon.train.batches import encode, epoch_order

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", *(f"w{i}" for i in range(24))]


def test_every_row_is_in_one_batch_of_an_epoch_and_lengths_are_alike(model, tokenizer, tiny_rows):
    examples = encode(model, tokenizer, tiny_rows(500, 1), 16)
    batches = epoch_order(examples, 8, seed=0, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert batches == epoch_order(examples, 8, seed=0, epoch=0) != epoch_order(examples, 8, seed=0, epoch=1)
    padded = sum(len(batch) * max(len(examples[i].input_ids) for i in batch) for batch in batches)
    assert padded < 1.1 * sum(len(e.input_ids) for e in examples)


def test_long_texts_are_cut_to_what_the_base_can_take(model, tokenizer):
    (example,) = encode(model, tokenizer, [Row("good " * 100, 1)], 1000)
    assert len(example.input_ids) == 16
    assert example.input_ids[-1] == WORDS.index("[SEP]")


def test_padding_does_not_change_an_answer(model, tokenizer):
    rows = [Row("good", 1), Row("w1 w2 w3 w4 w5 w6 bad", 0)]
    examples = encode(model, tokenizer, rows, 16)
    model.eval()
    batch, device = kind_of(model).batch, torch.device("cpu")
    together = model(**batch(examples, 0, device)).logits
    alone = model(**batch(examples[:1], 0, device)).logits
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-6)


def test_a_missing_or_broken_tokenizer_is_told(tmp_path):
    with pytest.raises(DataError, match=r"there is no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)
