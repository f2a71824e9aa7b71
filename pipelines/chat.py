"""Chat with a model in the terminal, each token coloured by the precision that it was computed at.

    python pipelines/chat.py                                       SmolLM2, from its PyPI package
    python pipelines/chat.py --model DIR --scheduler static --switch-step 40
    python pipelines/chat.py --scheduler outputs/store/train_learned/KEY
    echo "Why is the sky blue?" | python pipelines/chat.py --scheduler high

Each line is a message; an empty one, or the end of the input, ends the conversation. The first run of a model
quantises it, once. Without a GPU it decodes on dequantised weights, where bits save no time.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator

from pipelines.interrupts import INTERRUPTED, heard, leave_at_once

if __name__ == "__main__":
    leave_at_once()
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from transformers.utils import logging as transformers_logging

import pmpd
from pmpd.artifacts import StoreError
from pmpd.decode import ContextError
from pmpd.generate import check_request
from pmpd.kernels import CudaUnavailableError
from pmpd.records import FP16_BITS, average_bits
from pmpd.schedulers import Scheduler

COLOURS = {16: "39", 8: "34", 7: "94", 6: "36", 5: "96", 4: "32", 3: "33", 2: "31", 1: "35"}
"""ANSI colour of each precision: from cold to warm as it falls; 16 bits in the terminal's own."""


def painted(text: str, bits: int, colour: bool) -> str:
    """``text`` in the colour of ``bits``."""
    return f"\x1b[{COLOURS[bits]}m{text}\x1b[0m" if colour and text else text


def messages(prompt: str) -> Iterator[str]:
    """Lines of the standard input up to an empty one; asked for by ``prompt`` if it is a terminal."""
    while True:
        if sys.stdin.isatty():
            sys.stdout.write(prompt)
            sys.stdout.flush()
        line = sys.stdin.readline().encode(errors="replace").decode().strip()  # bytes of another encoding: "?"
        if not line:
            return
        yield line


def answer(model: pmpd.Model, turns: list[str], scheduler: Scheduler, max_new_tokens: int, colour: bool) -> str:
    """Write the answer as it comes, then what it took; returns its text.

    Raises:
        ContextError: the conversation is too long for the model; nothing was written.
    """
    pieces: list[pmpd.Piece] = []
    started = time.perf_counter()
    first = started
    for piece in model.generate(turns, scheduler=scheduler, max_new_tokens=max_new_tokens):
        first = first if pieces else time.perf_counter()
        pieces.append(piece)
        sys.stdout.write(painted(piece.text, piece.bits, colour))
        sys.stdout.flush()
    seconds = time.perf_counter() - first
    steps = [piece.bits for piece in pieces[1:]]
    rate = f"{len(steps) / seconds:.1f} tokens/s, {average_bits(steps):.2f} bits on average" if steps else "one token"
    start = f"{1e3 * (first - started):.0f} ms to the first at {pieces[0].bits} bits"
    sys.stdout.write(f"\n[{len(pieces)} tokens, {start}, then {rate}]\n")
    return "".join(piece.text for piece in pieces)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, .gguf, package:NAME, hub id; default: smollm2")
    parser.add_argument("--nested", help="folder of its nested model; default: found or made")
    parser.add_argument("--store", help="folder that keeps nested models; default: in the user's cache")
    parser.add_argument(
        "--scheduler", default="static", help="fp16, high, low, static, 4:4@21,3, or a trained one's folder"
    )
    parser.add_argument("--switch-step", type=int, help="of static; default: a third of --max-new-tokens")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--high-bits", type=int, default=4)
    parser.add_argument("--low-bits", type=int, default=3)
    parser.add_argument("--max-bits", type=int, help="keep no precision above; default: on a GPU --high-bits, else all")
    parser.add_argument("--keep-fp16", action="store_true", help="on a GPU too, keep the unquantised weights")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--prompt", help="how a conversation is written; default: the tokenizer's chat template")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--no-calibration", action="store_true", help="quantise by plain k-means: sooner, and worse")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Ends with one line, not a traceback, on a mistake of the user's."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own next names
    colour = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    try:
        check_request(args.scheduler, args.max_new_tokens, args.switch_step)  # not after minutes of quantising
        model = pmpd.load(
            args.model,
            nested=args.nested,
            store=args.store,
            calibration=None if args.no_calibration else "samples",
            high_bits=args.high_bits,
            low_bits=args.low_bits,
            device=args.device,
            keep_fp16=True if args.keep_fp16 or args.scheduler == "fp16" else None,
            max_bits=args.max_bits,
            prompt=args.prompt,
            trust_remote_code=args.trust_remote_code,
        )
        scheduler = model.scheduler(args.scheduler, args.max_new_tokens, args.switch_step)
        sys.stdout.write(f"{args.model} on {model.device}: {model.engine}\n")
        names = ((b, f"{b} bits" if b != FP16_BITS else "16 bits (unquantised)") for b in reversed(model.bits))
        sys.stdout.write("legend: " + "  ".join(painted(name, bits, colour) for bits, name in names) + "\n")
        turns: list[str] = []
        for message in messages("> "):
            turns.append(message)
            try:
                turns.append(answer(model, turns, scheduler, args.max_new_tokens, colour))
            except ContextError as error:
                sys.stdout.write(f"[no answer: {error}. The next message starts a new conversation]\n")
                turns.clear()
    except (ValueError, StoreError, CudaUnavailableError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    with heard():
        main()
