"""What is fed to everything that reads what others wrote, and what it may answer.

A target takes a source of random numbers and returns a word for what happened. Whatever it raises
is a defect: it lets nothing through but the exceptions that the function documents.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slope
from slope import configs
from slope.data import cache_format, prepare
from slope.training import checkpoint

PIECES = [
    "pruner", "trainer", "datamodule", "model", ".", "=", "+", "++", "~", "rules", "pattern",
    "2:4", ":", "n", "m", "0", "-1", "1e400", "nan", "999999999999999999999", "null", "true", "[",
    "]", "{", "}", ",", "'", '"', "\\", "${", "${oc.env:HOME}", "${name}", "}", "$", "@", "/", "..",
    "../../x", "name", "resume", "lora_rank", "max_steps", " ", "\n", "\t", "\0",
    "é", "汉", "\ud800",
    "*", "?", "!", "%", "&", "|", "<", "a" * 300,
]  # fmt: skip
EVIL = [
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, float("nan"), float("inf"), "", "x",
    "../../../etc/passwd", "/etc/passwd", "..", "a\0b", [], {}, [[]], {"a": None}, [1, 2, 3], "2:4",
    "0:0", "9:4", "1:1048576", b"\xff",
]  # fmt: skip


def soup(draw: random.Random, longest: int = 8) -> str:
    """Words, signs and nonsense."""
    return "".join(draw.choice(PIECES) for _ in range(draw.randint(0, longest)))


def mangle(draw: random.Random, data: bytes) -> bytes:
    """Bytes that a disk, a network or a person changed."""
    how = draw.randrange(6)
    place = draw.randrange(len(data) + 1)
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + bytes(draw.randrange(256) for _ in range(draw.randint(1, 40)))
    if how == 2:
        return data + data[place:]
    if how == 3:
        return data[:place] + data[place + draw.randint(1, 64) :]
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8) if data else 0):
        at = draw.randrange(len(changed))
        changed[at] = draw.choice([0, 255, changed[at] ^ 1 << draw.randrange(8)])
    return bytes(changed)


def twist(draw: random.Random, value: Any, evil: list[Any] = EVIL) -> Any:
    """A nested value of which one place is another value, or is gone."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if draw.random() < 0.05:
            return {(soup(draw, 2) if k == key else k): v for k, v in value.items()}
        return {k: twist(draw, v, evil) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        if draw.random() < 0.15:
            return value[:at] + value[at + 1 :]
        return [*value[:at], twist(draw, value[at], evil), *value[at + 1 :]]
    return draw.choice(evil)


# -- the targets -----------------------------------------------------------------------------------


def config_parser(draw: random.Random) -> str:
    """``slope config`` and every command that takes settings."""
    keys = sorted(configs._known_keys(configs.compose(["name=x"])))
    words = []
    for _ in range(draw.randint(1, 4)):
        kind = draw.randrange(4)
        value = soup(draw, 4) if draw.random() < 0.5 else str(draw.choice(EVIL))
        if kind == 0:
            words.append(soup(draw))
        elif kind == 1:
            words.append(f"{draw.choice(configs.groups())}={value}")
        else:
            words.append(f"{draw.choice(['', '', '+', '++', '~'])}{draw.choice(keys)}={value}")
    try:
        configs.compose(words)
    except ValueError as error:
        assert len(str(error)) > 20, "no reason given"
        return "refused"
    return "taken"


def layer_rules(draw: random.Random) -> str:
    """Patterns, ranks and rules of ``slope.sparsify``."""
    options: dict[str, Any] = {}

    def pattern() -> str:
        return draw.choice([soup(draw, 3), f"{draw.randint(-1, 9)}:{draw.randint(-1, 64)}"])

    names = ["*", "up", "down", "lm_head", "nothing", "[", "up|down", "(", "\\", ""]
    if draw.random() < 0.7:
        options["pattern"] = pattern()
    if draw.random() < 0.7:
        options["rules"] = [
            (draw.choice([*names, soup(draw, 2)]), draw.choice(["dense", "2:4", pattern()]))
            for _ in range(draw.randint(0, 3))
        ]
    if draw.random() < 0.3:
        options["adapter_rank"] = draw.choice([*EVIL[:11], 3])
    if draw.random() < 0.3:
        options[draw.choice(["skip", "rules", "pattern", "column_mask_interval"])] = draw.choice(
            EVIL
        )
    with torch.device("meta"):
        model = Mlp()
    try:
        slope.sparsify(model, slope.SparsityConfig(**options))
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 10, "no reason given"
        return "refused"
    return "taken"


class Readers:
    """Targets that read files, each from its own good copy.

    Args:
        root: folder for the copies; nothing may be written outside of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.here = root / "here"
        self._make_cache(root / "good_cache")
        self._make_checkpoints(root / "good_file", root / "good_parts")
        self._make_export(root / "good_export")

    def targets(self) -> dict[str, Callable[[random.Random], str]]:
        """All of this module, by name."""
        return {
            "config parser": config_parser,
            "layer rules": layer_rules,
            "token cache": self.token_cache,
            "checkpoint file": self.checkpoint_file,
            "sharded checkpoint": self.sharded_checkpoint,
            "safetensors importer": self.importer,
        }

    def token_cache(self, draw: random.Random) -> str:
        """A damaged cache is refused; a forged one (right checksum) too, or it has the tokens."""
        with self._copy("good_cache") as folder:
            path = draw.choice(sorted(folder.iterdir()))
            if path.name == "meta.json" and draw.random() < 0.7:
                meta = json.loads(path.read_bytes())
                meta.pop("checksum")
                meta = twist(draw, meta, [value for value in EVIL if not isinstance(value, bytes)])
                if isinstance(meta, dict):
                    meta["checksum"] = hashlib.sha256(cache_format.canonical(meta)).hexdigest()
                path.write_text(json.dumps(meta))
            elif draw.random() < 0.1:
                path.unlink()
            else:
                path.write_bytes(mangle(draw, path.read_bytes()))
            try:
                found = cache_format.open_cache(folder, self.key, verify=draw.random() < 0.5)
                for split in cache_format.SPLITS:
                    found.dataset(split, 8)[0]
                found.tokenizer()
            except (cache_format.UnusableCacheError, FileNotFoundError) as error:
                assert str(error), "no reason given"
                return "refused"
            return "taken"

    def checkpoint_file(self, draw: random.Random) -> str:
        """A damaged file is refused; a forged one (right footer) runs nothing."""
        with self._copy("good_file") as folder:
            path = folder / "last.ckpt"
            good = path.read_bytes()
            how = draw.randrange(4)
            if how == 0:
                path.write_bytes(mangle(draw, good))
            elif how == 1:
                sign(path, mangle(draw, good[: -checkpoint.FOOTER_BYTES]))
            elif how == 2:
                data = io.BytesIO()
                torch.save({"state_dict": Bomb(folder.parent / "exploded")}, data)
                sign(path, data.getvalue())
            else:
                data = io.BytesIO()
                torch.save(twist(draw, checkpoint.load(path)), data)
                sign(path, data.getvalue())
            outcome = self._load(folder)
            assert not (folder.parent / "exploded").exists(), "code of a checkpoint was run"
            assert outcome == "refused" or how in (1, 3) or path.read_bytes() == good
            return outcome

    def sharded_checkpoint(self, draw: random.Random) -> str:
        """The same of parts and of the index; no path of it leads out of its folder."""
        with self._copy("good_parts") as folder:
            path = folder / "last.ckpt"
            index, _ = checkpoint._read(path)
            part = next((folder / "parts_3").iterdir())
            how = draw.randrange(4)
            if how == 0:
                target = draw.choice([path, part])
                good = target.read_bytes()
                target.write_bytes(mangle(draw, good))
            elif how == 1:
                index["parts"] = twist(draw, index["parts"])
            elif how == 2:  # a part and its checksum
                data = mangle(draw, part.read_bytes())
                part.write_bytes(data)
                index["parts"]["files"][part.name] = [len(data), hashlib.sha256(data).hexdigest()]
            else:
                index = twist(draw, index)
            if how:
                data = io.BytesIO()
                torch.save(index, data)
                sign(path, data.getvalue(), checkpoint.IN_PARTS)
            outcome = self._load(folder)
            assert outcome == "refused" or how or target.read_bytes() == good
            checkpoint.claim(folder, fresh=False)
            return outcome

    def importer(self, draw: random.Random) -> str:
        """``slope.load_pretrained``."""
        with self._copy("good_export") as folder:
            path = draw.choice(sorted(folder.iterdir()))
            if path.suffix == ".json" and draw.random() < 0.7:
                plain = [value for value in EVIL if not isinstance(value, bytes)]
                path.write_text(json.dumps(twist(draw, json.loads(path.read_text()), plain)))
            elif draw.random() < 0.1:
                path.unlink()
            else:
                path.write_bytes(mangle(draw, path.read_bytes()))
            try:
                slope.load_pretrained(folder, model=Mlp(), verify=draw.random() < 0.5)
            except (ValueError, FileNotFoundError) as error:
                assert len(str(error)) > 20, "no reason given"
                return "refused"
            return "taken"

    # -- the good copies ---------------------------------------------------------------------------

    def _make_cache(self, folder: Path) -> None:
        corpus = self.root / "corpus"
        corpus.mkdir(parents=True)
        for number in range(6):
            (corpus / f"{number}.txt").write_text("the king of the river " * (number + 8))
        data = prepare(
            {"dataset": "text", "data_files": f"{corpus}/*.txt", "tokenizer": "bpe:300",
             "cache_dir": str(self.root / "caches"), "val_ratio": 0.3, "max_length": 8},
            progress=False,
        )  # fmt: skip
        self.key = data.fingerprint
        shutil.copytree(data.cache_dir, folder)

    def _make_checkpoints(self, one: Path, parts: Path) -> None:
        values = torch.arange(24.0).reshape(4, 6)
        content = {
            "global_step": 3,
            "state_dict": {"a": values, "b": torch.ones(3, dtype=torch.uint8)},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": values}}}],
            "slope": {"state": {"copies": [], "dropped": []}},
        }
        checkpoint.save(content, one / "last.ckpt")
        checkpoint._save_in_parts(content, parts / "last.ckpt", checkpoint.After(), None)

    def _make_export(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = Mlp()
        slope.sparsify(model, slope.SparsityConfig(adapter_rank=2))
        slope.save_pretrained(model, folder)

    @contextlib.contextmanager
    def _copy(self, name: str) -> Iterator[Path]:
        shutil.rmtree(self.here, ignore_errors=True)
        folder = self.here / "it"
        shutil.copytree(self.root / name, folder)
        with nothing_outside(self.root):
            yield folder

    def _load(self, folder: Path) -> str:
        try:
            content = checkpoint.load(folder / "last.ckpt")
        except checkpoint.CorruptCheckpointError as error:
            assert "last.ckpt" in str(error)
            try:
                checkpoint.find(folder)
            except RuntimeError as refusal:
                assert "Restore one from a copy" in str(refusal)
                return "refused"
            raise AssertionError("find() takes what load() refuses") from error
        assert isinstance(content, dict)
        return "taken"


class Mlp(nn.Module):
    """Three linear layers; the last is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16, bias=False)
        self.lm_head = nn.Linear(16, 16, bias=False)
        self.lm_head.weight = self.embedding.weight


class Bomb:
    """What must not be unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def sign(path: Path, data: bytes, magic: bytes = checkpoint.MAGIC) -> None:
    """Write a checkpoint file with a right footer."""
    path.write_bytes(data + magic + hashlib.sha256(data).digest())


_watched: list[Path] = []
_written: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate")
    if not _watched or not (event in changes or event == "open"):
        return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    path = arguments[0]
    if isinstance(path, str | bytes | os.PathLike):
        _written.append(os.fsdecode(path))


sys.addaudithook(_hook)


@contextlib.contextmanager
def nothing_outside(root: Path) -> Iterator[None]:
    """Fail if a file outside of a folder is written, made, renamed or removed."""
    _written.clear()
    _watched.append(root)
    try:
        yield
    finally:
        _watched.pop()
    allowed = (str(root), tempfile.gettempdir() + "/torchinductor", os.devnull)
    outside = [path for path in _written if not os.path.abspath(path).startswith(allowed)]
    assert not outside, f"written outside of the folder: {outside[:3]}"
