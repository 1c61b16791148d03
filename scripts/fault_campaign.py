"""Kill short runs in every way that machines do, resume them, and compare with unbroken ones.

    python scripts/fault_campaign.py --faults 220 --output logs/faults

A chain is one run that is broken, examined and resumed until it ends; then its weights, optimizer
and generators must be those of the unbroken run, bit for bit. After each fault:

* the newest usable checkpoint is no older than the last one that the run had finished (nothing is
  lost), except where the fault is damage to that very file;
* the resumed run says that it goes on from exactly that step (no silent restart);
* whatever ended without a signal ended with a message that names its cause.

``faults.csv`` has a line for each fault and ``README.md`` the counts. Runs are forked from one warm
process. Full and read-only disks are a tmpfs where this process may mount one (root), else a limit
on the size of files; the report says which. The clock is faked: ``time.time`` jumps by up to ten
years and the checkpoints get dates of any year.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

STEPS, EVERY = 12, 2
WORDS = ["the", "of", "and", "history", "city", "river", "is", "was", "in", "a", "king", "war"]
# name: (devices, nodes, settings)
SETTINGS = {
    "1-file": (1, 1, []),
    "1-parts": (1, 1, ["callbacks.checkpoint.format=sharded"]),
    "1-async": (1, 1, ["callbacks.checkpoint.asynchronous=true"]),
    "2-ddp": (2, 1, ["trainer.strategy=ddp"]),
    "2-fsdp2": (2, 1, ["trainer.strategy=fsdp2"]),
    "2-fsdp2-async": (2, 1, ["trainer.strategy=fsdp2", "callbacks.checkpoint.asynchronous=true"]),
    "4-hsdp": (2, 2, ["trainer.strategy=hsdp"]),
}
KINDS = (
    "kill one", "kill all", "kill writer", "full disk", "read-only", "truncated file",
    "flipped byte", "corrupt cache", "clock jump",
)  # fmt: skip
SAID = {
    "full disk": r"cannot write .*(No space left on device|File too large).* with resume=True",
    "read-only": r"cannot write .*(Read-only file system|Permission denied).* with resume=True",
    "truncated file": "no usable checkpoint in .*Restore one",
    "flipped byte": "no usable checkpoint in .*Restore one",
    # What the others say when a process is gone.
    "gone": "Connection closed by peer|Connection reset by peer|Broken pipe|gloo|TCPStore|store",
}


@dataclass
class Fault:
    """One line of the report."""

    chain: str
    setting: str
    ranks: int
    kind: str
    detail: str = ""
    codes: str = ""
    before: int = 0
    after: int = 0
    resumed_from: int = -1
    message: str = ""
    problem: str = ""


def main() -> int:
    """Command line; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=220, help="at least so many, over all")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="some of them, by commas")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of them, by commas")
    parser.add_argument("--jobs", type=int, default=2, help="chains at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the runs, emptied")
    options = parser.parse_args()
    started = time.monotonic()
    shutil.rmtree(options.scratch, ignore_errors=True)
    campaign = Campaign(options.scratch.absolute(), options.settings.split(","), options.seed)
    faults = campaign.run(options.faults, options.kinds.split(","), options.jobs)
    bad = write_report(options.output, faults, campaign, time.monotonic() - started)
    shutil.rmtree(options.scratch, ignore_errors=True)
    return 1 if bad else 0


class Campaign:
    """Unbroken runs, then chains of faults.

    Args:
        root: folder for everything.
        settings: names of :data:`SETTINGS`.
        seed: of what is drawn; the moments of kills by time differ from machine to machine.
    """

    def __init__(self, root: Path, settings: list[str], seed: int) -> None:
        self.root, self.settings, self.seed = root, settings, seed
        root.mkdir(parents=True)
        self.mounts = can_mount(root)
        write_corpus(root / "corpus")
        warm_up(self)
        self.expected: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        for name in settings:
            began = time.monotonic()
            launch = Launch(self, name, root / "whole" / name)
            codes = launch.wait(120)
            if any(codes):
                raise RuntimeError(f"the unbroken run {name} failed: {launch.said()}")
            self.seconds[name] = time.monotonic() - began
            self.expected[name] = digest(launch.checkpoints)

    def run(self, count: int, kinds: list[str], jobs: int) -> list[Fault]:
        """Chains until there are enough faults; each in a process of its own."""
        plans = list(self.plan(count, kinds))
        faults: list[Fault] = []
        running: dict[int, Path] = {}
        while plans or running:
            while plans and len(running) < jobs:
                number, name, chosen = plans.pop(0)
                folder = self.root / f"chain{number}"
                child = fork(lambda n=name, c=chosen, f=folder: chain(self, n, c, f))
                running[child] = folder
            child, status = os.wait()
            folder = running.pop(child)
            note = folder / "faults.json"
            if status or not note.exists():
                faults.append(Fault(folder.name, "", 0, "campaign", problem=f"status {status}"))
            else:
                faults += [Fault(**entry) for entry in json.loads(note.read_text())]
            print(f"{len(faults)} of {count} faults", [f.problem for f in faults if f.problem][-3:])
            sys.stdout.flush()
            unmount(folder)
            shutil.rmtree(folder, ignore_errors=True)
        return faults

    def plan(self, count: int, kinds: list[str]) -> Any:
        """Which faults hit which chain: each kind equally often, in any order."""
        draw = random.Random(self.seed)
        pool: list[str] = []
        number = made = 0
        while made < count:
            name = self.settings[number % len(self.settings)]
            length = draw.randint(3, 6)
            while len(pool) < length:
                pool += draw.sample(kinds, len(kinds))
            yield number, name, [pool.pop(0) for _ in range(length)]
            number, made = number + 1, made + length


class Launch:
    """The processes of a run, forked.

    Args:
        campaign: it belongs to.
        setting: a name of :data:`SETTINGS`.
        folder: of the run.
        before: done first in each process, with its rank.
        resume: go on.
    """

    def __init__(
        self,
        campaign: Campaign,
        setting: str,
        folder: Path,
        before: Callable[[int], None] = lambda rank: None,
        resume: bool = False,
    ) -> None:
        self.devices, nodes, settings = SETTINGS[setting]
        self.ranks = self.devices * nodes
        self.folder = folder
        disk = folder / "disk"  # of the run's files; what the processes say lies outside of it
        self.checkpoints = disk / "checkpoints" / "run"
        folder.mkdir(parents=True, exist_ok=True)
        cache = folder / "cache"
        overrides = [
            "experiment=smoke", "datamodule=text", "name=run", "trainer.accelerator=cpu",
            f"datamodule.data_files={campaign.root}/corpus/*.txt", f"datamodule.cache_dir={cache}",
            "datamodule.val_ratio=0.2", f"paths.root={disk}", f"trainer.max_steps={STEPS}",
            "trainer.val_check_interval=4", f"callbacks.checkpoint.every_n_steps={EVERY}",
            "callbacks.checkpoint.save_top_k=2", "trainer.log_every_n_steps=1",
            "model.config.resid_pdrop=0.1", "pruner.lora_start=0.5", "generate.max_new_tokens=1",
            "plot=false", f"trainer.devices={self.devices}", f"trainer.num_nodes={nodes}",
            "train.global_batch_size=8", f"datamodule.batch_size={4 // self.ranks}",
            "trainer.enable_progress_bar=false", f"resume={resume}", *settings,
        ]  # fmt: skip
        self._log = disk / "logs" / "run" / "run.log"
        self._begins = self._log.stat().st_size if self._log.exists() else 0
        port = free_port()
        self.processes = [
            fork(lambda r=rank: self._process(r, port, overrides, before))
            for rank in range(self.ranks)
        ]

    def _process(
        self, rank: int, port: int, overrides: list[str], before: Callable[[int], None]
    ) -> None:
        output = os.open(self.folder / f"rank{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if self.ranks > 1:
            place = {
                "RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_RANK": rank % self.devices,
                "LOCAL_WORLD_SIZE": self.devices, "GROUP_RANK": rank // self.devices,
                "TORCHELASTIC_RUN_ID": "faults", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            os.environ.update({key: str(value) for key, value in place.items()})
            from pytorch_lightning.utilities.rank_zero import rank_zero_only

            rank_zero_only.rank = rank  # it read the environment when it was imported
        from slope import configs
        from slope.training import run

        before(rank)
        run(configs.compose(overrides))

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL to one process, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def wait(self, seconds: float, poll: Callable[[float], None] = lambda now: None) -> list[int]:
        """Exit codes, negative for signals; when one has failed the others get three seconds."""
        began, end = time.monotonic(), time.monotonic() + seconds
        codes: dict[int, int] = {}
        while len(codes) < self.ranks:
            for process in set(self.processes) - set(codes):
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
                    if codes[process]:
                        end = min(end, time.monotonic() + 3)
            if time.monotonic() > end:
                self.kill()
            poll(time.monotonic() - began)
            time.sleep(0.01)
        return [codes[process] for process in self.processes]

    def resumed(self) -> int:
        """The step from which it said that it goes on; 0 if it said nothing."""
        text = self._log.read_bytes()[self._begins :].decode() if self._log.exists() else ""
        found = re.findall(r"going on from step (\d+) of", text)
        return int(found[-1]) if found else 0

    def said(self) -> list[str]:
        """The last line that each process wrote, its error if it had one."""
        lines = []
        for rank in range(self.ranks):
            text = (self.folder / f"rank{rank}.txt").read_text(errors="replace").strip()
            found = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*$", text, re.MULTILINE)
            lines.append(found[-1] if found else text.splitlines()[-1] if text else "")
        return lines


def chain(campaign: Campaign, setting: str, kinds: list[str], folder: Path) -> None:
    """Break one run again and again, resume it, compare its end."""
    draw = random.Random(f"{campaign.seed} {folder.name}")
    folder.mkdir()
    output = os.open(folder / "chain.txt", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    mounted = campaign.mounts and mount(folder / "disk")
    whole = campaign.seconds[setting]
    faults = []
    resume = False
    for number, kind in enumerate(kinds):
        fault = Fault(folder.name, setting, SETTINGS[setting][0] * SETTINGS[setting][1], kind)
        fault.before = newest(folder / "disk" / "checkpoints" / "run")
        faults.append(fault)
        # Kills by time are spread over what a run takes, which is shorter the later it resumes.
        moment = draw.uniform(0.2, 0.95) * whole * (1 - 0.5 * fault.before / STEPS)
        found = Break(campaign, setting, folder, fault, draw, moment, mounted, resume)()
        if resume:
            faults[-2].resumed_from = found
        resume = True
        if number + 1 == len(kinds) or fault.problem or fault.after >= STEPS:
            launch = Launch(campaign, setting, folder, resume=True)
            codes = launch.wait(120)
            judge_resume(fault, launch)
            if any(codes):
                fault.problem += f" the last resume failed: {launch.said()}"
            elif digest(launch.checkpoints) != campaign.expected[setting]:
                fault.problem += " other weights than those of the unbroken run"
            # What is left of the plan hits the next run of this chain.
            for name in ("checkpoints", "logs"):
                shutil.rmtree(folder / "disk" / name, ignore_errors=True)
            resume = False
    (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))


class Break:
    """Start or resume a run, break it in one way, and look at what is left."""

    def __init__(
        self,
        campaign: Campaign,
        setting: str,
        folder: Path,
        fault: Fault,
        draw: random.Random,
        moment: float,
        mounted: bool,
        resume: bool,
    ) -> None:
        self.campaign, self.setting, self.folder = campaign, setting, folder
        self.fault, self.draw, self.moment = fault, draw, moment
        self.mounted, self.resume = mounted, resume
        self.checkpoints = folder / "disk" / "checkpoints" / "run"
        self.rows = steps_logged(folder)
        self.launch: Launch | None = None

    def __call__(self) -> int:
        """Do all of it; the step from which the run that was broken had gone on, -1 if unknown."""
        kind = self.fault.kind
        if kind in ("truncated file", "flipped byte", "corrupt cache"):
            self.start().wait(60, self.at(self.moment, lambda launch: launch.kill()))
            self.damage()
        else:
            getattr(self, kind.replace(" ", "_").replace("-", "_"))()
        return self.examine()

    def start(self, before: Callable[[int], None] = lambda rank: None) -> Launch:
        """Start or resume the run."""
        self.launch = Launch(self.campaign, self.setting, self.folder, before, self.resume)
        return self.launch

    def at(self, moment: float, act: Callable[[Launch], Any]) -> Callable[[float], None]:
        """Something that the waiting process does once, at a moment."""
        done = []

        def poll(now: float) -> None:
            # A disk is not made read-only while a file is open for writing: it is tried again.
            if not done and now > moment and act(self.launch) is not False:
                done.append(True)

        self.fault.detail = self.fault.detail or f"after {moment:.2f} s"
        return poll

    # -- the kinds ---------------------------------------------------------------------------------

    def kill_one(self) -> None:
        """SIGKILL of one process at a moment."""
        rank = self.draw.randrange(self.fault.ranks)
        self.fault.detail = f"process {rank} after {self.moment:.2f} s"
        self.codes = self.start().wait(60, self.at(self.moment, lambda launch: launch.kill(rank)))

    def kill_all(self) -> None:
        """SIGKILL of all at once."""
        self.codes = self.start().wait(60, self.at(self.moment, lambda launch: launch.kill()))

    def kill_writer(self) -> None:
        """A process dies at a file operation, or in the middle of a file."""
        rank, number = self.draw.randrange(self.fault.ranks), self.draw.randint(1, 24)
        if "parts" not in self.setting and "fsdp2" not in self.setting and "hsdp" not in (
            self.setting
        ):  # fmt: skip
            rank = 0
        # A file of checkpoints ends there: the system kills whoever writes on.
        limit = self.draw.choice([None, self.draw.randint(1000, 200_000)])
        how = f"file operation {number}" if limit is None else f"byte {limit}"
        self.fault.detail = f"process {rank} at {how}"

        def before(own: int) -> None:
            if own == rank:
                die_in_write(self.checkpoints, number, limit)

        self.codes = self.start(before).wait(60)

    def full_disk(self) -> None:
        """There is room for less than the run will write."""
        if not self.mounted:
            self.limit_files()
            return
        left = self.draw.randint(0, 1_500_000)
        filler = self.folder / "disk" / "filler"
        free = shutil.disk_usage(filler.parent).free
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - left))
        self.fault.detail = f"tmpfs with {left} bytes left"
        self.codes = self.start().wait(60)
        filler.unlink()

    def limit_files(self) -> None:
        """Where nothing can be mounted: files cannot grow."""
        limit = self.draw.randint(1000, 200_000)
        self.fault.detail = f"no file beyond {limit} bytes"
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        self.codes = self.start(
            lambda rank: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        ).wait(60)

    def read_only(self) -> None:
        """The disk becomes read-only at a moment."""
        folder = self.folder / "disk"

        def close(launch: Launch | None) -> bool:
            if self.mounted:
                return remount(folder, "ro")
            for path in (folder, self.checkpoints.parent, self.checkpoints):
                if path.is_dir():
                    path.chmod(0o555)
            return True

        self.codes = self.start().wait(60, self.at(self.moment, close))
        if self.mounted:
            remount(folder, "rw")
        for path in (folder, self.checkpoints.parent, self.checkpoints):
            if path.is_dir():
                path.chmod(0o755)

    def clock_jump(self) -> None:
        """The clock jumps, then all are killed, then files have dates of any year."""
        jump, at = self.draw.uniform(-10, 10) * 3.15e7, self.moment / 2
        self.fault.detail = f"{jump:+.0f} s after {at:.2f} s, killed after {self.moment:.2f} s"

        def before(rank: int) -> None:
            clock, clock_ns, began = time.time, time.time_ns, time.monotonic()

            def off() -> float:
                return jump if time.monotonic() - began > at else 0.0

            time.time = lambda: clock() + off()
            time.time_ns = lambda: clock_ns() + int(off() * 1e9)

        self.codes = self.start(before).wait(60, self.at(self.moment, lambda launch: launch.kill()))
        for path in self.folder.rglob("*"):
            if path.is_file():
                when = self.draw.uniform(0, 4e9)
                os.utime(path, (when, when))

    def damage(self) -> None:
        """Damage one file of a run that was killed."""
        self.codes = [-signal.SIGKILL]
        caches = self.fault.kind == "corrupt cache"
        where = self.folder / "cache" if caches else self.checkpoints
        files = sorted(p for p in where.rglob("*") if p.is_file() and p.stat().st_size > 1)
        files = [p for p in files if p.suffix in (".ckpt", ".distcp", ".bin", ".json")]
        if self.fault.kind == "truncated file":  # the newest is what a crash would cut
            files = sorted(files, key=lambda p: p.stat().st_mtime_ns)[-3:]
        if not files:
            self.fault.detail += ", nothing to damage yet"
            return
        path = self.draw.choice(files)
        kept, good = newest(self.checkpoints), path.read_bytes()
        place = self.draw.randrange(len(good))
        if self.fault.kind == "truncated file" or (caches and self.draw.random() < 0.3):
            path.write_bytes(good[:place])
        else:
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << self.draw.randrange(8)])
                             + good[place + 1 :])  # fmt: skip
        self.fault.detail += f", {path.relative_to(self.folder)} at byte {place} of {len(good)}"
        if kept and newest(self.checkpoints) == 0:
            # All is gone: to refuse is right, and to go on once the file is back.
            refused = Launch(self.campaign, self.setting, self.folder, resume=True)
            self.codes = refused.wait(60)
            self.fault.message = refused.said()[0]
            if not all(code > 0 for code in self.codes):
                self.fault.problem += f" no refusal but {self.codes}"
            path.write_bytes(good)

    # -- the judgement -----------------------------------------------------------------------------

    def examine(self) -> int:
        """What is left must be what was there, and whoever failed must have said why."""
        fault, launch = self.fault, self.launch
        assert launch is not None
        fault.codes = " ".join(str(code) for code in self.codes)
        fault.after = newest(self.checkpoints)
        damaged = fault.kind in ("truncated file", "flipped byte")
        # Rows of a run whose last checkpoint was damaged stay until the next one has begun.
        wrote = steps_logged(self.folder) != self.rows
        finished = finished_saves(self.folder, "async" in self.setting) if wrote else 0
        if not damaged and fault.after < max(finished, fault.before):
            fault.problem += (
                f" lost: step {fault.after} is the newest, {fault.before} was before, {finished} "
                "must have been written"
            )
        killed = any(code == -signal.SIGKILL or code == -signal.SIGXFSZ for code in self.codes)
        for code, text in zip(self.codes, launch.said(), strict=False):
            if code <= 0 or fault.message:
                continue
            fault.message = text[:300]
            wanted = SAID.get(fault.kind)
            if fault.kind in ("kill one", "kill writer") or killed:
                wanted = SAID["gone"] if wanted is None else f"{wanted}|{SAID['gone']}"
            if wanted is None or not re.search(wanted, text):
                fault.problem += f" an unclear end: {text[:300]}"
        if fault.message and damaged and not re.search(SAID[fault.kind], fault.message):
            fault.problem += f" an unclear refusal: {fault.message}"
        found = launch.resumed()
        if not wrote and not found:
            return -1  # it did not come so far as to say it
        if found != fault.before:
            fault.problem += f" went on from step {found} while {fault.before} was the newest"
        return found


def judge_resume(fault: Fault, launch: Launch) -> None:
    """A resumed run must say where it goes on: at the newest checkpoint, never silently at 0."""
    fault.resumed_from = launch.resumed()
    if fault.resumed_from != fault.after:
        fault.problem += (
            f" resumed from step {fault.resumed_from} while {fault.after} was the newest"
        )


def steps_logged(folder: Path) -> list[int]:
    """Steps in metrics.csv."""
    path = folder / "disk" / "logs" / "run" / "metrics.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = [row["step"] for row in csv.DictReader(file)]
    return [int(step) for step in rows if step and step.isdigit()]


def finished_saves(folder: Path, in_background: bool) -> int:
    """The newest step whose checkpoint must be there, by what the metrics say.

    The row of a step is written before its checkpoint, and after those of all steps before; a
    checkpoint in the background is waited for when the next one begins.
    """
    steps = steps_logged(folder)
    if not steps:
        return 0
    newest_save = (max(steps) - 1) // EVERY * EVERY
    return max(0, newest_save - EVERY * in_background)


def newest(directory: Path) -> int:
    """Step of the newest usable checkpoint; 0 if there is none."""
    from slope.training import checkpoint

    try:
        found = checkpoint.find(directory)
    except RuntimeError:
        return 0
    return 0 if found is None else int(found.content["global_step"])


def digest(directory: Path) -> str:
    """SHA-256 of weights, optimizer, generators and step of the last checkpoint."""
    import torch

    from slope.training import checkpoint

    content = checkpoint.load(directory / checkpoint.LAST)
    made = hashlib.sha256()

    def add(value: Any) -> None:
        if torch.is_tensor(value):
            made.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                made.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            made.update(repr(value).encode())

    for key in ("global_step", "state_dict", "optimizer_states"):
        add(content[key])
    add(content["slope"]["rng"])
    return made.hexdigest()


def die_in_write(directory: Path, number: int, limit: int | None) -> None:
    """Die at the ``number``-th operation on a file of a folder, or at the byte of a file."""
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = str(arguments[0])
        reads = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if path.startswith(str(directory)) and not reads:
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


# -- the machine -----------------------------------------------------------------------------------


def fork(work: Callable[[], None]) -> int:
    """A child that does something and ends."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def warm_up(campaign: Campaign) -> None:
    """Import what a run imports, by doing one in a child and reading what it has imported."""
    note = campaign.root / "modules.json"
    name = next((s for s in campaign.settings if "fsdp2" in s), campaign.settings[0])

    def before(rank: int) -> None:
        from slope.training import program

        original = program.finish

        def finish(*arguments: Any) -> Any:
            result = original(*arguments)
            if rank == 0:
                note.write_text(json.dumps(sorted(sys.modules)))
            return result

        program.finish = finish

    import torch

    torch.set_num_threads(1)
    launch = Launch(campaign, name, campaign.root / "warm", before)
    if any(launch.wait(240)):
        raise RuntimeError(f"the first run failed: {launch.said()}")
    for module in json.loads(note.read_text()):
        if module.split(".")[0] in ("slope", "torch", "pytorch_lightning", "transformers",
                                    "lightning_fabric", "tokenizers", "torchmetrics", "numpy",
                                    "hydra", "omegaconf", "rich", "filelock"):  # fmt: skip
            with contextlib.suppress(Exception):
                importlib.import_module(module)


def write_corpus(folder: Path) -> None:
    """Small text files, always the same."""
    folder.mkdir()
    draw = random.Random(0)
    for number in range(12):
        text = " ".join(draw.choice(WORDS) for _ in range(120))
        (folder / f"{number}.txt").write_text(text + "\n")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def can_mount(root: Path) -> bool:
    """Whether this process may mount a tmpfs."""
    folder = root / "mount"
    return mount(folder) and unmount(folder.parent, "mount")


def mount(folder: Path) -> bool:
    """A tmpfs of 8 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    return _quiet("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))


def remount(folder: Path, how: str) -> bool:
    """Make a tmpfs ro or rw."""
    return _quiet("mount", "-o", f"remount,{how}", str(folder))


def unmount(folder: Path, name: str = "disk") -> bool:
    """Take a tmpfs away, if there is one."""
    where = folder / name
    return os.path.ismount(where) and _quiet("umount", "-l", str(where))


def _quiet(*words: str) -> bool:
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


# -- the report ------------------------------------------------------------------------------------


def write_report(folder: Path, faults: list[Fault], campaign: Campaign, seconds: float) -> int:
    """``faults.csv`` and ``README.md``; the number of faults with a problem."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "faults.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Fault)])
        writer.writeheader()
        writer.writerows(asdict(fault) for fault in faults)
    bad = [fault for fault in faults if fault.problem]
    struck = Counter(f.kind for f in faults)
    lines = [
        "# Fault campaign", "",
        f"{len(faults)} faults in {seconds / 60:.1f} minutes on {os.cpu_count()} cores "
        f"({platform.machine()}, Python {platform.python_version()}), seed {campaign.seed}; runs "
        f"of {STEPS} optimizer steps, a checkpoint every {EVERY}.", "",
        "Full and read-only disks: "
        + ("a tmpfs that is filled up, and remounted read-only while the run goes on."
           if campaign.mounts else "a limit on the size of files, and folders without permission."),
        "The clock is faked (`time.time`, and the dates of the files).", "",
        "| fault | number | of them on 1 / 2 / 4 processes | without loss | "
        "lost, restarted, other weights or unclear |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for kind in struck:
        of_it = [f for f in faults if f.kind == kind]
        by = Counter(f.ranks for f in of_it)
        fine = sum(not f.problem for f in of_it)
        lines.append(
            f"| {kind} | {len(of_it)} | {by[1]} / {by[2]} / {by[4]} | {fine} | "
            f"{len(of_it) - fine} |"
        )
    fine = len(faults) - len(bad)
    ends = Counter(
        "a signal"
        if "-9" in f.codes or "-25" in f.codes
        else "an error"
        if re.search(r"\b1\b", f.codes)
        else "nothing: it was done before"
        for f in faults
    )
    lines += [
        f"| all | {len(faults)} | | {fine} | {len(bad)} |", "",
        "Ended by " + ", ".join(f"{how}: {n}" for how, n in ends.most_common()) + ".", "",
        "Of each setting: "
        + ", ".join(f"{s}: {n}" for s, n in Counter(f.setting for f in faults).items()) + ".", "",
        "`faults.csv` has each of them: exit codes, the newest checkpoint before and after, the "
        "step from which the run went on, what it said. Again: `python scripts/fault_campaign.py "
        f"--faults {len(faults)} --seed {campaign.seed} --output <folder> --scratch <folder>`.",
    ]  # fmt: skip
    lines += [f"* {f.chain} {f.setting} {f.kind} ({f.detail}):{f.problem}" for f in bad]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return len(bad)


if __name__ == "__main__":
    sys.exit(main())
