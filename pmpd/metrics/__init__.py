"""Numbers from texts and logits, and how sure they are: ROUGE-L, BERTScore, BLEU, perplexity, paired bootstrap."""

from pmpd.metrics.bertscore import EncoderError, bertscore_f1, encoder_folder
from pmpd.metrics.bleu import bleu_signature, bleu_statistics, corpus_bleu, corpus_sacrebleu
from pmpd.metrics.perplexity import perplexity, token_nll
from pmpd.metrics.rouge import rouge_l
from pmpd.metrics.statistics import (
    bootstrap_statistic,
    paired_statistic_difference,
    smallest_detectable_drop_statistic,
)

__all__ = [
    "EncoderError",
    "bertscore_f1",
    "bleu_signature",
    "bleu_statistics",
    "bootstrap_statistic",
    "corpus_bleu",
    "corpus_sacrebleu",
    "encoder_folder",
    "paired_statistic_difference",
    "perplexity",
    "rouge_l",
    "smallest_detectable_drop_statistic",
    "token_nll",
]
