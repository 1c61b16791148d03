"""``slope bench infer``: prompts and decoding of shortened models, dense and with adapters."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import slope
from slope.bench import models
from slope.bench.experiment import TIMES, Experiment, Lab
from slope.bench.models import RANKS, ModelCase
from slope.bench.options import COMPILER_HELP, add_choice, counts, positive, ratios
from slope.bench.results import Row, number
from slope.bench.timing import Call

_DENSE = "dense"
_FUSED = " + fuse"
_LONGEST = 2048  # tokens of a prompt in one sequence; more are several sequences
_GRAPHS = 8  # that blocks of one model may need, compiled; torch's own limit is for all contenders


class Contender(NamedTuple):
    """What is measured.

    Attributes:
        rank: of adapters, as a ratio of d_in; None is the dense model.
        fused: whether projections that read the same input are one product.
    """

    rank: float | None
    fused: bool


class InferBench(Experiment):
    """The forward of a model in bf16, for prompts and for one token of each of T sequences."""

    name = "infer"
    about = "prompt processing and decoding of shortened models in bf16, at several adapter ranks"
    case = ModelCase
    columns = ("phase", "tokens", "rank_ratio", *TIMES, "tokens_per_s", "gb_per_s")
    index = ("model", "layers", "phase", "tokens", "mode")
    kinds = ("model", "phase", "contender", "mode")
    note = (
        "Each cell: median time, how many times as fast as dense, and GB/s of the linear layers' "
        "weights, adapters included, read once per call."
    )
    ylabel = "dense time / time"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.ranks = ratios(options.ranks, RANKS)
        prompts = (2048, 16384) if self.on_gpu else (32,)
        decoded = (1, 4, 16, 64) if self.on_gpu else (1, 4)
        self.sizes = [("prompt", t) for t in counts(options.prompt, prompts, "prompt")]
        self.sizes += [("decode", t) for t in counts(options.tokens, decoded, "tokens")]
        compiled = " + compile" if options.compile else ""
        kinds: dict[str, float | None] = {_DENSE: None}
        kinds |= {f"slope r={100 * rank:.4g}%": rank for rank in self.ranks}
        self.contenders = {
            name + fused + compiled: Contender(rank, bool(fused))
            for name, rank in kinds.items()
            for fused in (("", _FUSED) if options.fuse else ("",))
        }
        self.dense = [name for name, each in self.contenders.items() if each.rank is None]

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Models, ranks, tokens."""
        add_choice(parser)
        parser.add_argument("--ranks", metavar="R,…", help="of adapters, as ratios of d_in")
        parser.add_argument("--prompt", metavar="T,…", help="tokens, in sequences of up to 2048")
        parser.add_argument("--tokens", metavar="T,…", help="sequences that decode one token each")
        parser.add_argument(
            "--context", type=positive, metavar="N",
            help="tokens in a static key/value cache while decoding; default: no cache",
        )  # fmt: skip
        parser.add_argument(
            "--compile", action="store_true", help="all contenders with torch.compile, by block"
        )
        parser.add_argument(
            "--fuse", action="store_true",
            help="each contender also with projections of the same input as one product",
        )  # fmt: skip
        parser.add_argument("--compiler", help=COMPILER_HELP)

    def cases(self) -> Sequence[ModelCase]:
        """Every model at every depth."""
        return models.model_cases(self.options, self.on_gpu)

    def measure(self, case: ModelCase, lab: Lab) -> Iterator[Row]:
        """Every contender in turns, for each number of tokens."""
        made: dict[str, nn.Module] = {}

        def prepare(name: str, phase: str, tokens: int) -> Call:
            if name not in made:
                made[name] = self._build(case, lab.device, self.contenders[name])
            return self._call(made[name], phase, tokens)

        for done, (phase, tokens) in enumerate(self.sizes):
            if done and lab.late:
                size = {"phase": phase, "tokens": tokens}
                yield size | {"contender": self.dense[0], "failed": "no time left"}
                continue
            torch.compiler.reset()  # a graph is for one number of tokens
            factories = {
                name: (lambda name=name, size=(phase, tokens): prepare(name, *size))
                for name in self.contenders
            }
            with torch._dynamo.config.patch(
                recompile_limit=_GRAPHS * len(factories), fail_on_recompile_limit_hit=True
            ):
                rows = lab.compare(factories, self.dense)
            for row in rows:
                name, time = row["contender"], row.get("median_us")
                if time:
                    row["tokens_per_s"] = tokens / time * 1e6
                    row["gb_per_s"] = _bytes_read(made[name]) / time * 1e-3
                rank = self.contenders[name].rank
                yield {"phase": phase, "tokens": tokens, "rank_ratio": rank} | row

    def _build(self, case: ModelCase, device: torch.device, what: Contender) -> nn.Module:
        config = None if what.rank is None else slope.SparsityConfig(adapter_rank=what.rank)
        context = self.options.context or 0
        model = models.build(case, context + 1, device, torch.bfloat16, config)
        model.eval().requires_grad_(False)
        if what.fused:
            ids = models.random_tokens(model, 1, 1, device)
            slope.fuse_projections(model, input_ids=ids, use_cache=False)
        if self.options.compile:
            with torch.inference_mode():  # frozen layers make their operands in eager mode
                model(input_ids=models.random_tokens(model, 1, 1, device), use_cache=False)
            for block in models.blocks_of(model, case.layers):
                block.compile(backend=models.compiler(self.options, self.on_gpu), dynamic=False)
        return model

    def _call(self, model: nn.Module, phase: str, tokens: int) -> Call:
        device = next(model.parameters()).device
        config: Any = model.config
        sequences = tokens
        if phase == "prompt":
            longest = min(_LONGEST, config.max_position_embeddings)
            sequences = -(-tokens // longest)
            if tokens % sequences:
                raise ValueError(
                    f"--prompt {tokens} does not divide into {sequences} sequences of up to "
                    f"{longest} tokens; type --prompt {sequences * longest}."
                )
        ids = models.random_tokens(model, sequences, tokens // sequences, device)
        if phase == "decode" and self.options.context:
            return torch.inference_mode()(_with_cache(model, ids, self.options.context))
        return torch.inference_mode()(
            lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)
        )

    def cell(self, row: Row) -> str:
        """Time, speed-up, bytes per second."""
        text = f"{number(row['median_us'] / 1e3, 3)} ms"
        if row.get("speed_up") is not None and row["contender"] not in self.dense:
            text += f", {number(row['speed_up'])}×"
        return f"{text}, {number(row['gb_per_s'], 0)} GB/s"

    def point(self, row: Row) -> tuple[str, str, Any, float | None]:
        """Speed-up over models and tokens."""
        x = f"{row['model']}, {row['layers']} blocks, {row['tokens']}"
        speed = row.get("speed_up") if row["contender"] not in self.dense else None
        return f"{row['phase']}, {row['mode']}", row["contender"], x, speed


def _with_cache(model: nn.Module, ids: Tensor, context: int) -> Callable[[], object]:
    """One token after ``context`` others, again and again at the same place of the cache."""
    from transformers import StaticCache

    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=context + 1)
    layers: Any = cache.layers
    # transformers 5.24 gave the argument its new name.
    renamed = "cache" in inspect.signature(model.forward).parameters
    options = {"cache" if renamed else "past_key_values": cache, "logits_to_keep": 1}
    with torch.inference_mode():
        model(input_ids=ids.expand(-1, context), **options)

    def step() -> object:
        for layer in layers:
            layer.cumulative_length.fill_(context)
        return model(input_ids=ids, **options)

    return step


def _bytes_read(model: nn.Module) -> int:
    """Bytes of the linear layers' weights as a forward reads them, adapters included."""
    total = 0
    for module in model.modules():
        if isinstance(module, slope.SlopeLinear):
            total += module.values.nbytes + module.metadata.nbytes
            total += sum(p.nbytes for p in module.adapter.parameters()) if module.adapter else 0
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            weight = module.weight
            assert isinstance(weight, Tensor)
            total += weight.nbytes
    return total
