"""Turn any model sparse in place, and back.

``sparsify`` replaces ``nn.Linear`` and transformers' ``Conv1D`` by :class:`slope.SlopeLinear`, and
by :class:`slope.PrunedLinear` for the methods that SLoPe is compared with. Dense by default:
embeddings and norms (no linear layers), tied weights, output heads (what
``get_output_embeddings()`` gives, and the last linear layer of each module that is called as one of
``_HEAD_NAMES``), and block 0's QKV (arXiv:2405.16325, section 3), known by ``_QKV_NAMES`` in the
first ``nn.ModuleList`` of a model with an embedding. Other layers that read an embedding, as the
projections of OPT-350m and ALBERT, or T5's q, k and v, are sparse unless skip or rules name them.
"""

from __future__ import annotations

import difflib
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from slope.adapters import resolve_rank
from slope.config import SparsityConfig
from slope.layers import (
    adapted_layers,
    carry_hooks,
    is_linear,
    is_linear_like,
    obstacle,
    pruned_layers,
)
from slope.linear import AdaptedLinear, SlopeLinear, check_divides, dense_weight
from slope.masks import random_row_keep_mask, row_keep_mask, top_n, transposable_keep_mask
from slope.methods import Method, PrunedLinear, make_method
from slope.pattern import NMPattern
from slope.sparsity import SparsityReport, report_with

_QKV_NAMES = {
    "c_attn", "q_attn", "q_proj", "k_proj", "v_proj", "qkv_proj", "query", "key", "value",
    "query_key_value", "qkv", "wqkv", "in_proj", "wq", "wk", "wv",
}  # fmt: skip
# Of language models; then of transformers' models for classification, ranking and questions.
_HEAD_NAMES = {
    "lm_head", "embed_out", "output_head", "head",
    "classifier", "classification_head", "score", "qa_outputs", "seq_relationship",
}  # fmt: skip


def sparsify(
    model: nn.Module,
    config: SparsityConfig | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> SparsityReport:
    """Make the linear layers of ``model`` sparse, in place; call before making the optimizer.

    Args:
        model: any module with ``nn.Linear`` or transformers' ``Conv1D`` layers; may be on the meta
            device, then only shapes are converted.
        config: settings; None takes 2:4 without adapters.
        calibration: for ``mask="wanda"`` alone: batches, each called as ``model(**batch)``.

    Returns:
        A report that names every linear layer and why it stayed dense; those of subclasses and
        with computed weights too, but not the projections inside ``nn.MultiheadAttention``.

    Raises:
        ValueError: if no layer matched, a skip pattern or rule matches nothing, a size is not
            divisible by m, an adapter's rank does not fit, a bias is no parameter, calibration
            batches are missing or not wanted, or the model is sparse already, lazy, or wrapped
            for training. Nothing has been changed then.
    """
    config = _checked(config)
    if any(True for _ in adapted_layers(model)):
        raise ValueError(
            "the model is sparse already; call slope.densify(model) first to sparsify it anew."
        )
    _check_unwrapped(model)
    if is_linear(model):
        raise ValueError(
            "a bare linear layer cannot be replaced in place; write "
            "layer = slope.SlopeLinear.from_linear(layer)."
        )
    _check_calibration(model, config, calibration)
    linears = {name: module for name, module in model.named_modules() if is_linear_like(module)}
    _check_initialised(linears)
    _check_patterns_match(linears, config)
    plan = {name: _decide(model, name, module, config) for name, module in linears.items()}
    chosen = {name: pattern for name, (pattern, _) in plan.items() if pattern is not None}
    if not chosen:
        raise ValueError(_no_layers(linears, {name: why for name, (_, why) in plan.items()}))
    for name, pattern in chosen.items():
        weight = dense_weight(linears[name])
        out_features, in_features = weight.shape
        if config.unstructured_sparsity is None:
            check_divides(in_features, out_features, pattern, name)
        bias = linears[name].bias
        if bias is not None and not isinstance(bias, nn.Parameter):
            raise ValueError(
                f"layer {name!r} has a bias that is no Parameter, which nobody could train; call "
                "torch.nn.utils.prune.remove(layer, 'bias') or make it one first, or exclude it "
                f"with skip=[{name!r}] or rules=[[{name!r}, 'dense']]."
            )
        if weight.device.type != "meta" and torch.isnan(weight).any():
            raise ValueError(f"the weight of layer {name!r} holds NaN; initialise it first.")
        if config.adapter_rank:
            _check_rank(config.adapter_rank, in_features, out_features, name)
    norms: dict[str, Tensor] = {}
    if calibration is not None:
        from slope.methods.wanda import wanda_scores

        norms = wanda_scores(model, {name: linears[name] for name in chosen}, calibration)
    masks = {
        name: _static_mask(name, linears[name], pattern, config, norms.get(name))
        for name, pattern in chosen.items()
    }
    method = None if config.compressed else make_method(config)
    for name, pattern in chosen.items():
        new = _sparse_from(name, linears[name], pattern, config, method, masks[name])
        _replace(model, name, new)
    return report_with(model, {name: reason for name, (_, reason) in plan.items()})


def densify(model: nn.Module, fold_adapters: bool = False) -> nn.Module:
    """Replace every sparse layer by the dense one it came from, with zeros; in place.

    A :class:`slope.PrunedLinear` leaves the weight of its forward. What its method pruned of inputs
    and gradients is not in a weight, so a layer of those methods then reads the whole input.

    Args:
        model: a sparse model.
        fold_adapters: add active adapters into the dense weight; else an active adapter is an
            error, since dropping it would change the outputs.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no sparse layers, or an active adapter would be lost.
    """
    layers = list(adapted_layers(model))
    if not layers:
        raise ValueError(
            "densify() found neither SlopeLinear nor PrunedLinear; the model is dense already."
        )
    if not fold_adapters:
        _check_no_active_adapter(layers, "densify")
    for name, layer in layers:
        _replace(model, name, _dense_from(layer))
    return model


def compress_weights(model: nn.Module, fold_adapters: bool = False) -> nn.Module:
    """Replace every :class:`slope.PrunedLinear` by what is to be shipped after training; in place.

    A layer whose forward weight is n:m along d_in becomes a :class:`slope.SlopeLinear` of that mask
    and keeps its adapter. Any other becomes the dense layer it came from, as by :func:`densify`:
    the methods that prune inputs or gradients, masks along d_out or without a pattern, and layers
    in their dense last phase.

    Args:
        model: a model sparsified with another method than SLoPe's.
        fold_adapters: add active adapters into the weights that become dense; else such an adapter
            is an error, since dropping it would change the outputs.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no such layer, or an active adapter would be lost.
    """
    layers = list(pruned_layers(model))
    if not layers:
        raise ValueError(
            "compress_weights() found no PrunedLinear; SlopeLinear is compressed already."
        )
    to_dense = [(name, layer) for name, layer in layers if not compressible(layer)]
    if not fold_adapters:
        _check_no_active_adapter(to_dense, "compress_weights")
    made = {
        name: _compressed_from(layer) if compressible(layer) else _dense_from(layer)
        for name, layer in layers
    }
    for name, new in made.items():
        _replace(model, name, new)
    return model


def layer_generator(seed: int, name: str, purpose: str) -> torch.Generator:
    """Random stream of one layer: equal for the same seed, whatever else the model draws."""
    # A CPU generator reads 32 bits of its seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{purpose}:{name}".encode()))


def _checked(config: Any) -> SparsityConfig:
    if config is None:
        return SparsityConfig()
    if isinstance(config, SparsityConfig):
        return config
    options: Mapping[Any, Any] = {"pattern": "2:4"}
    if isinstance(config, Mapping):
        options = config
    elif isinstance(config, str | NMPattern):
        options = {"pattern": str(config)}
    typed = ", ".join(f"{name}={value!r}" for name, value in options.items())
    raise ValueError(f"config={config!r} must be a SparsityConfig; write SparsityConfig({typed}).")


def _no_layers(linears: Mapping[str, nn.Module], reasons: Mapping[str, str | None]) -> str:
    """The error where nothing can become sparse: what was found, why not, what to do."""
    found = Counter(type(module).__name__ for module in linears.values())
    listed = ", ".join(f"{kind} x{count}" for kind, count in found.items()) or "none"
    text = f"sparsify() matched no layers. Linear-like modules found: {listed}. "
    if not linears:
        return text + (
            "It converts nn.Linear and transformers' Conv1D; build the model of these, or leave "
            "it dense."
        )
    shown = "; ".join(f"{name or 'model'}: {why}" for name, why in list(reasons.items())[:4])
    text += f"They stay dense because: {shown}."
    if all(obstacle(module) for module in linears.values()):
        return text  # each says itself what to do
    return text + " Change skip or rules."


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _check_unwrapped(model: nn.Module) -> None:
    """Turn down what others have made of a dense model and would not follow."""
    wrappers = nn.parallel.DistributedDataParallel, nn.DataParallel
    if isinstance(model, wrappers) or getattr(model, "_is_accelerate_prepared", False):
        raise ValueError(
            "the model is prepared for training already, and its optimizer would go on with the "
            "dense weights; call slope.sparsify(model) before the optimizer is made, and before "
            "DistributedDataParallel(model) or accelerator.prepare()."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            "the model has adapters of peft, which would be pruned with it; call "
            "slope.sparsify(model) before get_peft_model(), or on model.merge_and_unload()."
        )


def _check_initialised(linears: Mapping[str, nn.Module]) -> None:
    for name, module in linears.items():
        if any(map(torch.nn.parameter.is_lazy, module.parameters(recurse=False))):
            raise ValueError(
                f"layer {name!r} is lazy and has no weight yet; call the model on an example first."
            )


def _check_patterns_match(linears: Mapping[str, nn.Module], config: SparsityConfig) -> None:
    names = [name for name in linears if name]
    for kind, pattern, dense in [("skip", p, True) for p in config.skip] + [
        ("rule", r[0], r[1] == "dense") for r in config.rules
    ]:
        matched = [name for name in names if _matches(name, pattern)]
        reasons = [obstacle(linears[name]) for name in matched]
        if not dense and matched and all(reasons):
            raise ValueError(
                f"rule {pattern!r} matches no layer that can be sparse: {matched[0]}: {reasons[0]}."
            )
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(
                f"{kind} {pattern!r} matches no linear layer. Layers of this model are named like "
                f"{', '.join(near)}."
            )


def _decide(
    model: nn.Module, name: str, module: nn.Module, config: SparsityConfig
) -> tuple[NMPattern | None, str | None]:
    """Pattern of one layer, or None and the reason why it stays dense."""
    for pattern in config.skip:
        if _matches(name, pattern):
            return None, f"skip={pattern!r}"
    why = obstacle(module)
    if why is not None:
        return None, why
    tied = _tied_to(model, name, module)
    if tied:
        return None, f"weight is tied to {tied}"
    for pattern, target in config.rules:
        if _matches(name, pattern):
            if target == "dense":
                return None, f"rule {pattern!r}"
            return NMPattern.parse(target), None
    if _is_head(model, name, module):
        return None, "output head"
    if _is_first_projection(model, name):
        return None, "first linear layer after the embedding"
    return NMPattern.parse(config.pattern), None


def _tied_to(model: nn.Module, name: str, module: nn.Module) -> str | None:
    weight_name = f"{name}.weight" if name else "weight"
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is module.weight and other != weight_name:
            return other
    return None


def _is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    get_head = getattr(model, "get_output_embeddings", None)
    if callable(get_head) and get_head() is module:
        return True
    parts = name.split(".")
    for end, part in enumerate(parts, 1):
        if part in _HEAD_NAMES:
            head = model.get_submodule(".".join(parts[:end]))
            return module is [m for m in head.modules() if is_linear_like(m)][-1]
    return False


def _is_first_projection(model: nn.Module, name: str) -> bool:
    """True for Q, K, V of block 0: the first linear layers that read the embedding."""
    if name.rpartition(".")[2].lower() not in _QKV_NAMES:
        return False
    if not any(isinstance(module, nn.Embedding) for module in model.modules()):
        return False
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return name.startswith(f"{path}.0." if path else "0.")
    return False


def _check_rank(rank: int | float, in_features: int, out_features: int, name: str) -> None:
    resolved = resolve_rank(rank, in_features)
    largest = min(in_features, out_features)
    if resolved > largest:
        ratio = f", rank {resolved}," if resolved != rank else ""
        raise ValueError(
            f"adapter_rank={rank}{ratio} does not fit layer {name!r} of {out_features} x "
            f"{in_features}; choose a rank from 1 to {largest}, for example adapter_rank={largest}."
        )


def _check_calibration(model: nn.Module, config: SparsityConfig, calibration: Any) -> None:
    if config.mask != "wanda":
        if calibration is not None:
            raise ValueError(
                f"calibration with mask={config.mask!r} has no meaning: only Wanda masks read "
                "batches; choose mask='wanda' or leave calibration away."
            )
        return
    if calibration is None:
        raise ValueError(
            "mask='wanda' needs batches to measure the inputs' norms: "
            "sparsify(model, config, calibration=batches), each called as model(**batch)."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "mask='wanda' cannot calibrate a model on the meta device, which holds no weights; "
            "load them first, or choose mask='magnitude'."
        )


def _static_mask(
    name: str,
    linear: nn.Module,
    pattern: NMPattern,
    config: SparsityConfig,
    norms: Tensor | None,
) -> Tensor | None:
    """Mask (O, I) that the options ask for; None if the layer or its method is to choose."""
    weight = dense_weight(linear)
    if weight.device.type == "meta":
        return None
    if config.mask == "random":
        generator = layer_generator(config.seed, name, "mask")
        rows, columns = weight.shape
        if config.reduction_dim:
            keep_mask = random_row_keep_mask((rows, columns), pattern, generator)
        else:
            keep_mask = random_row_keep_mask((columns, rows), pattern, generator).t()
        return keep_mask.contiguous().to(weight.device)
    if config.mask == "transposable":
        return transposable_keep_mask(weight, pattern)
    if config.mask == "wanda":
        assert norms is not None
        return row_keep_mask(weight.abs() * norms.to(weight), pattern)
    return None


def _sparse_from(
    name: str,
    linear: nn.Module,
    pattern: NMPattern,
    config: SparsityConfig,
    method: Method | None,
    keep_mask: Tensor | None,
) -> AdaptedLinear:
    layer: AdaptedLinear
    if method is None:
        layer = SlopeLinear.from_linear(
            linear,
            keep_mask,
            pattern,
            config.column_mask_interval,
            config.backend,
            config.prune_backward,
        )
    else:
        layer = PrunedLinear(linear, method, pattern, keep_mask)
    if config.mask_rescale:
        with torch.no_grad():
            layer.stored().mul_((pattern.m / pattern.n) ** 0.5)
    if config.adapter_rank:
        layer.add_adapter(
            resolve_rank(config.adapter_rank, layer.in_features),
            config.adapter_scale,
            layer_generator(config.seed, name, "adapter"),
            config.adapter_init,
        )
    return layer


def _check_no_active_adapter(layers: Iterable[tuple[str, AdaptedLinear]], caller: str) -> None:
    for name, layer in layers:
        if layer.adapter is not None and layer.adapter.active:
            raise ValueError(
                f"layer {name!r} has an active adapter that a dense layer would lose; call "
                f"{caller}(model, fold_adapters=True)."
            )


def compressible(layer: PrunedLinear) -> bool:
    """Whether the forward's weight is n:m along d_in, so that a :class:`slope.SlopeLinear` fits."""
    return layer.method.row_pruned and not layer.dense


def _compressed_from(layer: PrunedLinear) -> SlopeLinear:
    keep_mask, _ = layer.masks()
    if not layer.weight.is_meta:
        # S-STE keeps fewer where magnitudes tie; the places that are missing hold zeros.
        magnitude = layer.weight.detach().abs().masked_fill(keep_mask, math.inf)
        keep_mask = top_n(magnitude, layer.pattern, dim=1)
    compressed = SlopeLinear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        pattern=layer.pattern,
        device="meta",
        dtype=layer.weight.dtype,
        # The others' input gradient takes the forward's weight.
        prune_backward=getattr(layer.method, "prune_backward", False),
    )
    if not layer.weight.is_meta:
        compressed.to_empty_sparse(layer.weight.device)
        compressed.set_dense(layer.to_dense(), keep_mask)
    compressed.values.requires_grad_(layer.weight.requires_grad)
    compressed.origin, compressed.bias, compressed.adapter = layer.origin, layer.bias, layer.adapter
    return compressed.train(layer.training)


def _dense_from(layer: AdaptedLinear) -> nn.Module:
    weight = layer.to_dense()
    if layer.adapter is not None and layer.adapter.active:
        weight = weight + layer.adapter.delta().detach()
    linear: nn.Module
    if layer.origin == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            linear = Conv1D(layer.out_features, layer.in_features)
        weight = weight.t().contiguous()
    else:
        linear = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
    linear.weight = nn.Parameter(weight, requires_grad=layer.stored().requires_grad)
    linear.bias = layer.bias
    return linear.train(layer.training)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    carry_hooks(model.get_submodule(name), new)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
