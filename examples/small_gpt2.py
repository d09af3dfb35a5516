"""Make a small GPT-2 with random weights and a byte-level BPE tokenizer trained on a text file.

It stands in for a real model where none can be downloaded: the commands run, the numbers mean
nothing.

    python examples/small_gpt2.py OUT_FOLDER --text FILE
"""

from __future__ import annotations

import argparse

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gradloc.files import replacing_folder

END = "<|endoftext|>"


def main() -> None:
    """Train the tokenizer, make the model, save both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    parser.add_argument("--text", required=True)
    parser.add_argument("--vocabulary", type=int, default=4096)
    options = parser.parse_args()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train(
        [options.text],
        trainers.BpeTrainer(
            vocab_size=options.vocabulary,
            special_tokens=[END],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=96,
        n_layer=4,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with replacing_folder(options.output) as folder:
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"a GPT-2 of {len(tokenizer)} tokens and 4 blocks written to {options.output}")


if __name__ == "__main__":
    main()
