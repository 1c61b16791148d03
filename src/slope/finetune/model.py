"""From a checkpoint to a model with a new head: BERT's encoder with its masks and values."""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

import slope
from slope.data.tokenizer import other_word
from slope.deploy.source import from_transformers
from slope.export.lora import lora_beside
from slope.finetune.config import Settings
from slope.finetune.features import WordPieces, load_word_pieces
from slope.layers import adapted_layers, pruned_layers
from slope.methods.static import StaticWeight
from slope.training import initial

log = logging.getLogger(__name__)

_VOCABULARY_PADDING = 128  # rows that an embedding may have beyond its vocabulary


def load_encoder(settings: Settings, pieces: WordPieces) -> Any:
    """The encoder of a checkpoint, sparse as it was trained.

    Layers of a method that changes its mask become layers of the mask they ended with, compressed
    where it is n:m along d_in. With ``dense`` all layers become dense, with zeros to start from.

    Args:
        settings: ``init_from``, ``dense`` and ``max_length`` are read.
        pieces: the tokenizer that it has to fit.

    Returns:
        A ``BertModel`` in training mode, on the CPU.

    Raises:
        FileNotFoundError: if there is nothing to start from.
        ValueError: if it is no BERT, or does not fit the tokenizer or the length.
    """
    weights = initial.read(settings.init_from)
    model, vocabulary = _model(weights)
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family != "bert":
        raise ValueError(
            f"init_from={settings.init_from} is a {family} model, and only BERT can be "
            "fine-tuned; give the checkpoint of an experiment=bert/... run."
        )
    _check_fits(settings, pieces, model.config, vocabulary)
    _check_words(settings, pieces, weights)
    pruned = next((layer for _, layer in pruned_layers(model)), None)
    if settings.dense and any(True for _ in adapted_layers(model)):
        slope.densify(model, fold_adapters=True)
    elif pruned is not None and not isinstance(pruned.method, StaticWeight):
        slope.compress_weights(model, fold_adapters=True)
    log.info("%s: %s", weights.path, slope.sparsity_report(model).summary())
    encoder = model.base_model.float().train()
    if encoder.pooler is None:
        log.info("it has no pooler; GLUE's head gets a new one.")
    return encoder


def _model(weights: initial.Weights) -> tuple[Any, int | None]:
    """The pretrained model, and the entries of its tokenizer where they are known."""
    if weights.content is not None:
        from slope.models import build_model

        saved = weights.content["slope"]["signature"]
        vocabulary, length = int(saved["vocabulary"]), int(saved["datamodule.max_length"])
        model = build_model(initial.model_section(weights.content), vocabulary, length)
        initial.restore(model, weights)
        return model, vocabulary
    if (weights.path / "slope.json").is_file():
        return slope.load_pretrained(weights.path), None
    return _from_transformers(weights.path), None


def _from_transformers(path: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if config.model_type != "bert":
        return transformers.AutoModel.from_config(config)  # said to be none by the caller
    if lora_beside(path) is not None:
        return from_transformers(path)  # the class that was exported: adapters go by its names
    kind: Any = transformers.BertModel
    model, info = kind.from_pretrained(path, output_loading_info=True, local_files_only=True)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(
            f"init_from={path} is incomplete: it has no {', '.join(missing[:3])} "
            f"({len(missing)} tensors are missing)."
        )
    if info["missing_keys"]:
        model.pooler = None  # new weights are the head's business
    return model


def _check_fits(
    settings: Settings, pieces: WordPieces, config: Any, vocabulary: int | None
) -> None:
    rows, positions = config.vocab_size, config.max_position_embeddings
    fits = pieces.size == vocabulary or (
        vocabulary is None and rows - _VOCABULARY_PADDING < pieces.size <= rows
    )
    if not fits:
        raise ValueError(
            f"tokenizer '{pieces.path}' has {pieces.size:,} entries and the checkpoint "
            f"{settings.init_from} was trained with {vocabulary or rows:,}; type "
            "tokenizer=<the one that it was trained with>."
        )
    if settings.max_length > positions:
        raise ValueError(
            f"max_length={settings.max_length} is longer than the checkpoint's {positions} "
            f"positions; set max_length={positions} or start from a checkpoint of longer sequences."
        )


def _check_words(settings: Settings, pieces: WordPieces, weights: initial.Weights) -> None:
    """See that word pieces have the numbers that the checkpoint was trained with.

    A run's checkpoint holds its tokenizer; of a folder, the one that lies in it is compared.
    """
    from tokenizers import Tokenizer

    ours = theirs = pieces.backend.get_vocab()
    if weights.content is not None:
        if plain := weights.content["slope"].get("tokenizer"):
            theirs = Tokenizer.from_str(plain["json"]).get_vocab()
    else:
        with suppress(FileNotFoundError):
            theirs = load_word_pieces(None, settings.init_from).backend.get_vocab()
    other = other_word(ours, theirs)
    if other is not None:
        raise ValueError(
            f"tokenizer '{pieces.path}' does not fit the checkpoint {settings.init_from}: "
            f"{other!r} is its entry {ours[other]} and was {theirs.get(other, 'none')} when the "
            "checkpoint was trained; type tokenizer=<the one that it was trained with>."
        )


def with_head(encoder: nn.Module, head: str, outputs: int) -> Any:
    """A model of transformers around a copy of the encoder; the rest is drawn at random.

    Args:
        encoder: from :func:`load_encoder`.
        head: name of the class.
        outputs: of its last layer; one is a regression.
    """
    import transformers

    config: Any = copy.deepcopy(encoder.config)
    config.num_labels = outputs
    if head == "BertForSequenceClassification":
        config.problem_type = "regression" if outputs == 1 else "single_label_classification"
    model = getattr(transformers, head)(config)
    fresh, model.bert = model.bert, copy.deepcopy(encoder)
    if fresh.pooler is None or model.bert.pooler is None:
        model.bert.pooler = fresh.pooler
    return model.train()
