"""``slope generate``: text from a checkpoint."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slope.cli import common

ABOUT = "continue prompts with a trained model"
EPILOG_CHECKPOINT = """\
CHECKPOINT is the name of a run, a .ckpt file, a folder of save_pretrained or of `slope export`, a
folder of transformers with safetensors, or a .ckpt of the authors' published GPT-2 code.
"""
_EPILOG = f"""\
{EPILOG_CHECKPOINT}
Text goes to standard output, everything else to standard error. One prompt is written as it is
generated; the prompts of a file are generated in batches.

examples:
  slope generate my-run --prompt 'The history of'
  slope generate exported/ --prompts-file prompts.txt --batch-size 16 --temperature 0 --json
"""
DTYPES = ("float32", "bfloat16", "float16")


def parse(arguments: list[str]) -> Namespace:
    """Read the command line."""
    parser = common.parser("generate", "Continue prompts with a trained model.", _EPILOG)
    add_source(parser)
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="may be given several times")
    add("--prompts-file", type=Path, metavar="FILE", help="a prompt per line; - is standard input")
    add("--batch-size", type=int, metavar="N", help="of several prompts, at once; default: 8")
    add("--max-new-tokens", type=int, metavar="N",
        help="default: 128, or what the context leaves after the prompt")  # fmt: skip
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy; default: 0.8")
    add("--top-k", type=int, metavar="K", help="0 means all tokens; default: 50")
    add("--top-p", type=float, metavar="P", help="share of probability; default: 1")
    add("--seed", type=int, default=0, metavar="N",
        help="of the draws, which depend on --batch-size too; default: 0")  # fmt: skip
    add("--fold", action="store_true", help="make the model dense, adapters added into the weights")
    add("--device", type=common.device, default="auto",
        help="cpu, cuda or cuda:N; default: cuda if there is one")  # fmt: skip
    add("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_intermixed_args(arguments)
    if options.prompt is None and options.prompts_file is None:
        parser.error("give --prompt TEXT or --prompts-file FILE")
    if options.prompt is not None and options.prompts_file is not None:
        parser.error("give --prompt TEXT or --prompts-file FILE, not both")
    for name in ("top_k", "top_p"):
        if getattr(options, name) is not None and options.temperature == 0:
            parser.error(
                f"--{name.replace('_', '-')} goes with a --temperature above 0: with 0 the most "
                "likely token is taken"
            )
    if options.batch_size is None:
        options.batch_size = 8
    elif options.batch_size < 1:
        parser.error(f"--batch-size {options.batch_size} must be at least 1")
    elif len(options.prompt or ()) == 1:
        parser.error("--batch-size goes with several prompts: give --prompt again, or leave it out")
    return options


def run(arguments: list[str]) -> int:
    """Load, generate and print."""
    options = parse(arguments)
    prompts = options.prompt or _read_prompts(options.prompts_file)

    from slope.deploy.generate import Sampling, batches, encode, generate

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    given = {name: getattr(options, name) for name in names}
    try:
        sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        return common.usage_error(error, options.traceback)
    source = open_source(options, training=False)
    if source.tokenizer is None:
        raise ValueError(
            f"'{source.path}' comes without a tokenizer; type --tokenizer <a tokenizer.json, or a "
            "folder that holds one>."
        )
    # All of them, before the first is generated.
    _, rooms = encode(source.model, source.tokenizer, prompts, sampling)
    model = prepared(source.model, options)
    stream = len(prompts) == 1 and not options.json
    results: list[dict[str, Any]] = []
    seconds = 0.0
    for number, batch in enumerate(batches(prompts, rooms, options.batch_size)):
        chosen = sampling.of_batch(number)
        done = generate(model, source.tokenizer, batch, chosen, _write if stream else None)
        seconds += done.seconds
        for prompt, text, tokens in zip(batch, done.texts, done.tokens, strict=True):
            results.append({"prompt": prompt, "text": text, "tokens": tokens})
            if not (stream or options.json):
                print(f"{prompt}{text}\n", flush=True)
    if stream:
        print()
    tokens = sum(result["tokens"] for result in results)
    if options.json:
        facts: dict[str, Any] = {"source": str(source.path), "device": str(model.device)}
        facts |= {"dtype": str(model.dtype).removeprefix("torch."), "sampling": asdict(sampling)}
        totals = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        print(common.as_json(facts | {"results": results} | totals))
    print(
        f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s on {model.device}",
        file=sys.stderr,
    )
    return 0


def add_source(parser: ArgumentParser, nargs: str | None = None) -> None:
    """The options that say which model is meant."""
    parser.add_argument("checkpoint", nargs=nargs, metavar="CHECKPOINT", help="see below")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="instead of the one that comes with it"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="convert the weights; default: as they are stored"
    )
    parser.add_argument(
        "--heads", type=int, metavar="N", help="attention heads of a published .ckpt"
    )


def open_source(options: Namespace, training: bool = True) -> Any:
    """Load what the options of :func:`add_source` say, in the dtype asked for."""
    import torch

    from slope.deploy import source

    with source.quiet_transformers():
        found = source.open_source(
            options.checkpoint,
            tokenizer=options.tokenizer,
            heads=options.heads,
            training=training,
        )
    if options.dtype is not None:
        source.cast(found.model, getattr(torch, options.dtype))
    return found


def _read_prompts(path: Path) -> list[str]:
    name = "standard input" if str(path) == "-" else f"'{path}'"
    if str(path) != "-" and not path.is_file():
        raise FileNotFoundError(f"no file {name} with prompts.")
    try:
        # -sig: editors of Windows put a mark at the beginning.
        text = (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode(
            "utf-8-sig"
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8 ({error}); convert it with iconv.") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{name} holds no prompt; write one per line.")
    return prompts


def prepared(model: Any, options: Namespace) -> Any:
    """The model where it is to run, frozen."""
    import torch

    import slope

    if options.fold:
        slope.densify(model, fold_adapters=True)
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(torch.device(name))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"--device {name} cannot be used ({reason}); type --device cpu.") from (
            error
        )
    # Frozen values need not be compared with what was prepared from them.
    return model.requires_grad_(False)


def _write(text: str) -> None:
    print(text, end="", flush=True)
