"""Read a folder that :func:`slope.save_pretrained` wrote; everything is checked before it is used.

Only JSON and safetensors are read: nothing is unpickled, no code of the folder is run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slope.backends import get_backend
from slope.export.layout import (
    CONFIG_FILE,
    FORMAT,
    INDEX_FILE,
    READABLE_VERSIONS,
    SLOPE_FILE,
    WEIGHTS_FILE,
    decode,
    expected_shapes,
    join,
    layer_from,
)
from slope.export.save import sha256
from slope.layers import carry_hooks
from slope.linear import SlopeLinear, dense_weight
from slope.methods import PrunedLinear

_KINDS = {"bitmask": "uint8", "column_mask": "uint8", "shape": "int64"}  # all else is float


def load_pretrained(
    directory: str | Path,
    model: nn.Module | None = None,
    *,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    verify: bool = False,
    training: bool = True,
) -> nn.Module:
    """Load a model that :func:`slope.save_pretrained` wrote, bit for bit, masks included.

    On the CPU the weights are mapped into memory, so they are read when they are first used.

    Args:
        directory: the exported folder.
        model: for a model that `transformers` does not know: an instance with the same layers,
            dense or sparse, whose tensors are replaced; it may be on the meta device. What is
            frozen in it stays frozen, and hooks stay. Without it the model is built from
            `config.json`.
        device: where the tensors go.
        backend: who computes the products of the sparse layers.
        verify: read the weights at once and compare their SHA-256 with those of the export. Without
            it shapes and masks are checked, but not each value.
        training: False saves the time that choosing column masks takes; only training reads them,
            and at a ``column_mask_interval`` of 1 it chooses them anew.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        RuntimeError: if torch has no such device.
        ValueError: if a file is damaged, foreign or of an unknown version, or does not fit the
            model, or the backend is unknown. `model` has not been changed then.
    """
    directory = Path(directory)
    get_backend(backend)  # a name that is unknown is no damage of the file
    _check_device(torch.device(device))
    description = read_description(directory)
    weights = Weights(directory, device)
    if verify:
        _verify(directory, description, weights)
    layers = _layers(description, weights, backend)
    if model is None:
        model = _build(directory, description)
    elif not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; it must be an nn.Module.")

    plain = _plain_names(model, layers, description, weights)
    for name, layer in layers.items():
        shapes = expected_shapes(layer, description["layers"][name])
        tensors = {leaf: weights.get_tensor(join(name, leaf)) for leaf in shapes}
        decode(name, layer, tensors, training)

    for name, layer in layers.items():
        _put_layer(model, name, layer)
    for name in plain:
        _put_tensor(model, name, weights.get_tensor(name))
    for alias, name in description["tied"].items():
        parent, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_parameter(name))
    _move_the_rest(model, torch.device(device))
    return model.eval()


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"device='{device}' is not there: torch sees {torch.cuda.device_count()} GPUs; type "
            "device='cpu', or 'cuda:0' where there is one."
        )


def read_description(directory: Path) -> dict[str, Any]:
    """Content of `slope.json`, checked."""
    path = directory / SLOPE_FILE
    if not directory.is_dir():
        raise FileNotFoundError(
            f"no folder '{directory}'; give the one that slope.save_pretrained wrote."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"'{directory}' holds no {SLOPE_FILE}, so slope.save_pretrained did not write it; a "
            "dense model loads with its own from_pretrained(), then slope.sparsify(model); a "
            "trainer's checkpoint of a sparse model with safetensors.torch.load_model(), into a "
            "model sparsified as in its run."
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged ({error}); export the model again.") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"'{path}' does not describe a {FORMAT!r} export; is it another tool's?")
    version = description.get("format_version")
    if version not in READABLE_VERSIONS:
        raise ValueError(
            f"'{path}' has format_version {version!r}; this version of slope reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}. Upgrade with pip install --upgrade "
            "slope-llm."
        )
    if version == 1:
        description.setdefault("files", {})  # it had no checksums
    kinds: dict[str, Any] = {"layers": dict, "tied": dict, "buffers": list, "files": dict}
    kinds["vocabulary"] = (int, type(None))
    kinds["vocabulary_sha256"] = (str, type(None))  # not in files written before it was there
    for key, kind in kinds.items():
        if not isinstance(description.get(key), kind):
            raise ValueError(
                f"'{path}' is damaged: {key!r} is {str(description.get(key))[:40]}; export the "
                "model again."
            )
    names = [*description["tied"].values(), *description["buffers"]]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"'{path}' is damaged: a name is no text; export the model again.")
    return description


class Weights:
    """The safetensors files of a folder, open for reading, with the shapes of their headers.

    Args:
        directory: an export, or a folder of `transformers`.
        device: where tensors go.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged, or the index and the shards differ.
    """

    def __init__(self, directory: Path, device: torch.device | str) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = directory / WEIGHTS_FILE
        index: dict[str, str] | None = None
        if not self.path.is_file() and (directory / INDEX_FILE).is_file():
            self.path = directory / INDEX_FILE
            index = _read_index(self.path)
        elif not self.path.is_file() and any(directory.glob("model-*.safetensors")):
            self.path = directory / INDEX_FILE  # of the shards that are there
        self._files: dict[str, Any] = {}
        self.files = [self.path.name] if index is None else sorted(set(index.values()))
        for name in self.files:
            path = directory / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"'{path}' is missing; the folder is incomplete, copy or make it again."
                )
            try:
                opened = safe_open(path, framework="pt", device=str(device))
            except SafetensorError as error:
                raise ValueError(
                    f"'{path}' is truncated or no safetensors file ({error}); copy or export it "
                    "again."
                ) from error
            keys = set(opened.keys())
            listed = keys if index is None else {key for key in index if index[key] == name}
            if listed - keys or self._files.keys() & keys:
                wrong = sorted(listed - keys or self._files.keys() & keys)[0]
                raise ValueError(
                    f"'{self.path}' and its shards do not belong together: tensor {wrong!r} is "
                    + ("not in" if wrong in listed - keys else "a second time in")
                    + f" '{name}'; copy or make the folder again."
                )
            self._files |= dict.fromkeys(keys, opened)
        self.names = self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from the header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def get_tensor(self, name: str) -> Tensor:
        """A tensor; on the CPU it is mapped, not read."""
        return self._files[name].get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, from the header."""
        sliced = self._files[name].get_slice(name)
        return sliced[:0].dtype if len(sliced.get_shape()) else self.get_tensor(name).dtype


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name; no file is outside the folder."""
    try:
        index: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(name).name != name for name in index.values()):
            raise ValueError("a shard is in another folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged ({error}); copy or make it again.") from error
    return index


def _verify(directory: Path, description: dict[str, Any], weights: Weights) -> None:
    files = description["files"]
    for path in (directory / Path(name).name for name in files):
        if path.is_file() and sha256(path) != files[path.name]:
            raise ValueError(
                f"'{path}' is not the file that was exported (its SHA-256 differs from that in "
                f"{SLOPE_FILE}); copy or export it again."
            )
    there = {*weights.files, *(path.name for path in directory.glob("model*.safetensors"))}
    foreign = sorted(there ^ files.keys())
    if foreign and description["format_version"] > 1:
        raise ValueError(
            f"'{directory / foreign[0]}' is in the folder or in {SLOPE_FILE}, but not in both: two "
            "exports are mixed up, copy or export it again."
        )


def _layers(description: dict[str, Any], weights: Weights, backend: str) -> dict[str, SlopeLinear]:
    """The sparse layers without storage; their tensors in the file have the right shapes."""
    layers = {}
    for name, entry in description["layers"].items():
        values = join(name, "compressed")
        if values not in weights.names:
            raise ValueError(
                f"'{weights.path}' has no tensor {values!r}, but {SLOPE_FILE} lists layer "
                f"{name!r}; the two do not belong together."
            )
        _check_kind(weights, values, "float")
        try:
            layer = layer_from(entry, weights.dtype(values), backend)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"{SLOPE_FILE} is damaged at layer {name!r} ({type(error).__name__}: {error}); "
                "export the model again."
            ) from error
        shapes = expected_shapes(layer, entry)
        for leaf, shape in shapes.items():
            _check_shape(weights, join(name, leaf), shape)
            _check_kind(weights, join(name, leaf), _KINDS.get(leaf, "float"))
        layers[name] = layer
    return layers


def _check_kind(weights: Weights, name: str, kind: str) -> None:
    dtype = weights.dtype(name)
    found = "float" if dtype.is_floating_point else str(dtype).removeprefix("torch.")
    if found != kind:
        raise ValueError(
            f"tensor {name!r} of '{weights.path}' is {dtype}, not {kind}; the file is damaged or "
            "of another tool."
        )


def _check_shape(weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    if name not in weights.names:
        raise ValueError(f"'{weights.path}' has no tensor {name!r}; the file is incomplete.")
    if weights.shape(name) != shape:
        raise ValueError(
            f"tensor {name!r} of '{weights.path}' has shape {weights.shape(name)}, but {shape} is "
            "needed; the file and the model do not belong together."
        )


def _build(directory: Path, description: dict[str, Any]) -> nn.Module:
    """The model that `config.json` describes, parameters on the meta device."""
    import transformers

    architecture = description.get("architecture")
    if not (directory / CONFIG_FILE).is_file():
        what = f"'{directory}' holds no {CONFIG_FILE}"
        raise FileNotFoundError(
            f"{what}, which {architecture} is built from; it is incomplete, copy it again."
            if hasattr(transformers, str(architecture))
            else f"{what}: the exported {architecture} is no model of transformers. Build one and "
            "type slope.load_pretrained(directory, model=model)."
        )
    options = {}
    attention = description.get("attn_implementation")
    if attention in ("eager", "sdpa"):  # others need packages that may not be here
        options["attn_implementation"] = attention
    kind = model_class(architecture)
    config = read_config(directory, **options)
    try:
        with parameters_on_meta():
            model = kind(config)
        if (directory / "generation_config.json").is_file():
            generation = transformers.GenerationConfig.from_pretrained(directory)
            model.generation_config = generation
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"'{directory}' describes no {kind.__name__} ({reason(error)}); copy its {CONFIG_FILE} "
            "and generation_config.json again."
        ) from error
    return model


def read_config(directory: Path, **options: Any) -> Any:
    """The configuration of a folder; no code of it is run.

    Raises:
        ValueError: if it is damaged, or of no model that `transformers` knows.
    """
    import transformers

    path = directory / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = transformers.CONFIG_MAPPING
        if not isinstance(content, dict) or content.get("model_type") not in known:
            found = content.get("model_type") if isinstance(content, dict) else content
            raise ValueError(
                f"model_type is {found!r}, which transformers {transformers.__version__} does not "
                "know: pip install --upgrade transformers"
            )
        return transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"'{path}' cannot be used ({reason(error)}); if it is damaged, copy it again."
        ) from error


def reason(error: BaseException) -> str:
    """First line of an error of another library."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ")[:200] if lines else type(error).__name__


def model_class(name: Any) -> Any:
    """The model of `transformers` with this name.

    Raises:
        ValueError: if there is none.
    """
    import transformers

    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"transformers {transformers.__version__} has no model {name!r}; build it yourself and "
            "type slope.load_pretrained(directory, model=model)."
        )
    return kind


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made in this thread get parameters without storage; buffers are computed as usual.

    The meta device alone would lose buffers that a constructor computes and never saves.
    """
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    register: Any = nn.modules.module.register_module_parameter_registration_hook
    handle = register(to_meta)
    try:
        yield
    finally:
        handle.remove()


def _plain_names(
    model: nn.Module,
    layers: dict[str, SlopeLinear],
    description: dict[str, Any],
    weights: Weights,
) -> list[str]:
    """Names of the tensors outside sparse layers; checks that file and model agree on all."""
    stored = {
        join(name, leaf)
        for name, layer in layers.items()
        for leaf in expected_shapes(layer, description["layers"][name])
    }
    inside: set[str] = set()
    for name, layer in layers.items():
        inside |= {join(name, key) for key in _layer_in(model, name, layer).state_dict()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in description["buffers"]:
        try:
            shapes[name] = tuple(model.get_buffer(name).shape)
        except AttributeError as error:
            raise ValueError(f"the model has no buffer {name!r}, which was saved.") from error
    restored = shapes.keys() | inside
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in restored:
            raise ValueError(
                f"buffer {name!r} of the model is on the meta device and not in the export; build "
                "the model on the CPU."
            )
    tied = description["tied"]
    needed = shapes.keys() - inside - tied.keys()
    present = weights.names - stored
    if needed != present or not tied.keys() <= shapes.keys() or not set(tied.values()) <= needed:
        missing = sorted(needed - present)
        foreign = sorted((present - needed) | (tied.keys() - shapes.keys()))
        raise ValueError(
            f"'{weights.path}' does not fit the model {type(model).__name__}: missing in the file "
            f"{missing[:3] or 'nothing'}, unknown to the model {foreign[:3] or 'nothing'} "
            f"({len(missing)} and {len(foreign)} in all)."
        )
    parameters = dict(model.named_parameters())
    for name in needed:
        _check_shape(weights, name, shapes[name])
        if name in parameters and parameters[name].is_floating_point():
            _check_kind(weights, name, "float")
    return sorted(needed)


def _layer_in(model: nn.Module, name: str, layer: SlopeLinear) -> nn.Module:
    """The layer of the model that gives way to ``layer``."""
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"the model {type(model).__name__} has no layer {name!r}, which was saved as sparse."
        ) from error
    if isinstance(old, SlopeLinear):
        shape: tuple[int, ...] = (old.out_features, old.in_features)
    elif isinstance(old, nn.Linear) or type(old).__name__ == "Conv1D":
        shape = tuple(dense_weight(old).shape)
    elif isinstance(old, PrunedLinear):
        raise ValueError(
            f"layer {name!r} of the model is a PrunedLinear (method {old.method.name}), whose "
            "method the export does not have; load into the dense model, before slope.sparsify()."
        )
    else:
        raise ValueError(
            f"layer {name!r} of the model is a {type(old).__name__}, which cannot be sparse."
        )
    if shape != (layer.out_features, layer.in_features):
        raise ValueError(
            f"layer {name!r} of the model is {shape[0]} x {shape[1]}, the saved one "
            f"{layer.out_features} x {layer.in_features}."
        )
    return old


def _put_layer(model: nn.Module, name: str, layer: SlopeLinear) -> None:
    old = model.get_submodule(name)
    carry_hooks(old, layer)
    frozen = {key for key, parameter in old.named_parameters() if not parameter.requires_grad}
    for key, parameter in layer.named_parameters():
        # Its values are the weight of a dense layer.
        parameter.requires_grad_(not frozen & {key, "weight" if key == "values" else key})
    if name:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        return
    assert isinstance(model, SlopeLinear)  # the root itself: it cannot be replaced, so take over
    model.__dict__.update(layer.__dict__)


def _put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, leaf)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, leaf, tensor)


def _move_the_rest(model: nn.Module, device: torch.device) -> None:
    """Buffers that a constructor computed (causal masks) follow the parameters."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device != device:
                setattr(module, name, buffer.to(device))
