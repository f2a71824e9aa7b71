"""Tiny random language models with a tiny tokenizer, made offline in a fraction of a second.

Every family is a class of its own in transformers, so the library is tested on the module names,
biases and tied weights that real checkpoints have. Weights are random but not small: attention and
logits differ between prompts and between precisions.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

VOCAB_SIZE = 300
CONTEXT = 512
HIDDEN = 64
INTERMEDIATE = 96
LAYERS = 2
HEADS = 4

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Starts with the BOS token, as Llama-style templates do, so that a second one would show."""

_TEXT = (
    "The quick brown fox jumps over the lazy dog. A model reads the prompt at a high precision, then it writes "
    "the answer and the precision falls. Summarise the following text in one sentence. The answer is in the text."
)

_WIDTHS = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_COMMON = {**_WIDTHS, "intermediate_size": INTERMEDIATE, "max_position_embeddings": CONTEXT}

# family -> (model type, config values). "llama" stands for Vicuna and MobileLLaMA, "stablelm" for zephyr.
_FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {**_COMMON, "num_key_value_heads": HEADS}),
    "llama_gqa": ("llama", {**_COMMON, "num_key_value_heads": 2, "num_hidden_layers": 3, "tie_word_embeddings": True}),
    "phi": ("phi", {**_COMMON, "partial_rotary_factor": 0.5}),
    "stablelm": ("stablelm", {**_COMMON, "num_key_value_heads": HEADS, "use_qkv_bias": True}),
    "qwen2": ("qwen2", {**_COMMON, "num_key_value_heads": 2}),
    "mistral": ("mistral", {**_COMMON, "num_key_value_heads": 2, "sliding_window": None}),
    "gemma": ("gemma", {**_COMMON, "num_key_value_heads": 1, "head_dim": 32}),
    "gpt_neox": ("gpt_neox", _COMMON),
    "opt": (
        "opt",
        {**_WIDTHS, "ffn_dim": INTERMEDIATE, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": HIDDEN},
    ),
    "gpt2": ("gpt2", {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}),
}

FAMILIES = tuple(sorted(set(_FAMILIES) - {"gpt2"}))
"""Families the library supports; ``gpt2`` can be made too, and is refused (its layers are not ``nn.Linear``)."""


def tiny_tokenizer(*, add_bos: bool = True, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of :data:`VOCAB_SIZE` tokens, trained on a sentence: it encodes any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_TEXT] * 4, trainer)
    assert backend.get_vocab_size() == VOCAB_SIZE
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model_dir(
    tmp_path: Path,
    family: str = "llama",
    seed: int = 0,
    *,
    add_bos: bool = True,
    chat_template: str | None = CHAT_TEMPLATE,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A folder ``tmp_path/<family>-<seed>`` with config, safetensors weights and tokenizer.

    Two blocks (``llama_gqa``: three, with tied embeddings), hidden size 64, 300 tokens, context 512.
    """
    model_type, values = _FAMILIES[family]
    tokenizer = tiny_tokenizer(add_bos=add_bos, chat_template=chat_template)
    values = dict(values)
    if num_layers is not None:
        values["n_layer" if family == "gpt2" else "num_hidden_layers"] = num_layers
    config = AutoConfig.for_model(
        model_type,
        **values,
        vocab_size=VOCAB_SIZE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.15,
        init_std=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts these at zero, which would hide a lost bias
                torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    folder = tmp_path / f"{family}-{seed}"
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return folder
