"""The command line: exit codes, one message per error, the first line before torch."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import slope.training
from slope import cli, plotting
from slope.configs import compose

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("SLOPE_TRACEBACK", "RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that `slope.training.run` was called with."""
    called: list[Any] = []

    def run(cfg: Any) -> dict[str, Any]:
        called.append(cfg)
        return {"interrupted": True} if cfg.name == "interrupted" else {}

    monkeypatch.setattr(slope.training, "run", run, raising=False)
    return called


def test_interrupted_run_ends_with_the_shell_code_of_an_interrupt(runs: list[Any]) -> None:
    assert cli.main(["train", "experiment=smoke", "name=interrupted"]) == 130


def test_train_calls_the_program(runs: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "experiment=smoke", "name=first", "trainer.max_steps=3"]) == 0
    assert capsys.readouterr().out == "slope: train experiment=smoke name=first\n"
    (cfg,) = runs
    assert (cfg.name, cfg.trainer.max_steps) == ("first", 3)


def test_only_the_first_process_speaks(
    runs: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["train", "experiment=smoke"]) == 0
    assert capsys.readouterr().out == ""
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "nothing to train; add experiment=demo"),
        (["train", "experiment=dem"], "did you mean experiment=demo"),
        (["train", "experiment=demo", "pruner.lora_rnk=1"], "did you mean 'pruner.lora_rank'"),
        (["train", "experiment=demo", "pruner.pruned_matrix=statc-weight"], "is unknown"),
        (["train", "--cfg", "experiment=dem"], "did you mean experiment=demo"),
        (["config", "seeed=1"], "did you mean 'seed'"),
        (["train", "experiment=demo", "--unknown"], "unrecognized arguments: --unknown"),
        (["trian"], "unknown command 'trian'; did you mean 'train'"),
        (["foo"], "unknown command 'foo'. Commands: train, finetune, "),
        (["train", "experiment=compare/smoke"], "type `slope compare experiment=compare/smoke`"),
        (["train", "-m", "experiment=smoke", "seed=1,2"], "for seed in 1 2; do slope train"),
        (["train", "--multirun", "experiment=smoke"], "slope compare experiment=compare/small"),
        (["train", "--cfg", "job"], "nothing to train"),
        (["train", "--cfg", "job", "experiment=dem"], "did you mean experiment=demo"),
        (["plot"], "required: RUN"),
        (["plot", "a", "--output", "a.pdf"], "--output a.pdf must end in .png or .svg"),
        (["plot", "a", "--against", "epochs"], "invalid choice: 'epochs'"),
        (["report"], "required: RUN"),
        (["completion", "powershell"], "invalid choice: 'powershell'"),
    ],
)
def test_wrong_command_line_is_exit_code_2(
    arguments: list[str], message: str, runs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not runs


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_an_unknown_option_of_any_command_is_exit_code_2_on_stderr(
    command: str, runs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--no-such-option"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "error: " in captured.err and "Traceback" not in captured.err
    assert not runs


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("a corpus too short"), "slope: error: a corpus too short\n"),
        (FileNotFoundError("no such run"), "slope: error: no such run\n"),
        (RuntimeError("the disk is full"), "slope: error: the disk is full\n"),
        (KeyError("x"), "slope: error: KeyError: 'x' (SLOPE_TRACEBACK=1 shows where)\n"),
        (
            ModuleNotFoundError("No module named 'wandb'", name="wandb"),
            'slope: error: wandb is not installed; type: pip install "slope-llm[train]"\n',
        ),
    ],
)
def test_failure_is_exit_code_1_and_one_message(
    error: Exception,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(cfg: object) -> None:
        raise error

    monkeypatch.setattr(slope.training, "run", fail, raising=False)
    assert cli.main(["train", "experiment=smoke"]) == 1
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("by_option", [True, False])
def test_traceback_on_demand(
    by_option: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(cfg: object) -> None:
        raise ValueError("here")

    monkeypatch.setattr(slope.training, "run", fail, raising=False)
    if not by_option:
        monkeypatch.setenv("SLOPE_TRACEBACK", "1")
    assert cli.main(["train", "experiment=smoke", *(["--traceback"] if by_option else [])]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_exit_code_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(cfg: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(slope.training, "run", stop, raising=False)
    assert cli.main(["train", "experiment=smoke"]) == 130
    assert "Ctrl-C" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--help"], [f"\n  {command} " for command in cli.COMMANDS]),
        (["train", "--help"], ["experiment=owt/gpt2s", "--cfg", "+key=value", "--traceback"]),
        (["config", "--list"], ["experiment:\n", "  owt/gpt2s-flash\n", "optimizer:\n  adamw\n"]),
        (["--version"], [f"slope {slope.__version__}\n"]),
    ],
)
def test_help(arguments: list[str], texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in texts)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: slope {command}" in out
    assert f"\n  slope {command} " in out.partition("examples:")[2]


def test_every_module_of_a_command_is_listed() -> None:
    names = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert set(cli.COMMANDS) == names - {"__init__", "common"}


def test_nothing_to_train_lists_no_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train"]) == 2
    assert "compare/" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_no_command_prints_help_on_stderr_and_is_wrong(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    wrong = capsys.readouterr()
    assert wrong.out == "" and wrong.err.startswith("usage: slope")
    assert cli.main([*arguments, "--help"]) == 0
    assert capsys.readouterr() == (wrong.err, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["config"],
        ["train", "--cfg"],
        ["train", "--cfg", "job"],  # Hydra's spelling
        ["config", "--json"],
        ["train", "--cfg", "--json"],
    ],
)
def test_printed_configuration_is_the_resolved_one(
    arguments: list[str], runs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, "experiment=demo", "name=x"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    cfg = compose(["experiment=demo", "name=x"])
    assert printed == OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert printed.paths.log_dir == "./logs/x"
    assert not runs


def test_the_configuration_and_the_choices_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "experiment=demo", "name=x", "--json"]) == 0
    cfg = OmegaConf.to_container(compose(["experiment=demo", "name=x"]), resolve=True)
    assert json.loads(capsys.readouterr().out) == cfg
    assert cli.main(["config", "--list", "--json"]) == 0
    assert "adamw" in json.loads(capsys.readouterr().out)["optimizer"]


def test_a_run_as_json_leaves_standard_output_to_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(cfg: Any) -> dict[str, Any]:
        print("a table")
        return {"val_loss": 800.0, "val_perplexity": float("inf")}

    monkeypatch.setattr(slope.training, "run", run, raising=False)
    assert cli.main(["train", "experiment=smoke", "name=x", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "run": "./logs/x",
        "checkpoints": "./checkpoints/x",
        "summary": {"val_loss": 800.0, "val_perplexity": None},
    }
    assert captured.err == "slope: train experiment=smoke name=x\na table\n"
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "experiment=smoke", "name=x", "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_an_interrupted_run_as_json(runs: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "experiment=smoke", "name=interrupted", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["summary"] == {"interrupted": True}


def test_every_command_has_json_but_the_one_that_prints_a_script(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lacking = set()
    for command in cli.COMMANDS:
        # `bench` has its options behind the name of a measurement
        assert cli.main([command, *(["layer"] if command == "bench" else []), "--help"]) == 0
        if " --json" not in capsys.readouterr().out.partition("examples:")[0]:
            lacking.add(command)
    assert lacking == {"completion"}


def test_plot_finds_a_run_by_name_or_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("logs/mine")
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step\n")

    def draw(log_dir: Path, against: str) -> list[Path]:
        return [log_dir / f"{against}.png", log_dir / f"{against}.svg"]

    monkeypatch.setattr(plotting, "plot_run", draw)
    for given in ("mine", "logs/mine"):
        assert cli.main(["plot", given, "--against", "time"]) == 0
        assert capsys.readouterr().out == "logs/mine/time.png\nlogs/mine/time.svg\n"
    assert cli.main(["plot", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "runs": ["logs/mine"],
        "files": ["logs/mine/steps.png", "logs/mine/steps.svg"],
    }
    assert cli.main(["plot", "mine", "logs/mine"]) == 2
    assert "a run is named twice" in capsys.readouterr().err


def test_plot_draws_several_runs_into_one_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path("logs", name).mkdir(parents=True)
        Path("logs", name, "metrics.csv").write_text("step,train/loss\n1,5\n2,4\n")
    assert cli.main(["plot", "a", "b"]) == 0
    assert capsys.readouterr().out == "runs.png\nruns.svg\n"
    assert cli.main(["plot", "a", "b"]) == 1
    assert "'runs.png' exists; give --force to replace it" in capsys.readouterr().err
    assert cli.main(["plot", "a", "b", "--force"]) == 0
    capsys.readouterr()
    assert cli.main(["plot", "a", "--output", "a.svg"]) == 0
    assert capsys.readouterr().out == "a.png\na.svg\n"
    assert cli.main(["plot", "a", "--output", "none/a.svg"]) == 1
    assert "no folder 'none' for --output none/a.svg; make it." in capsys.readouterr().err
    assert not Path("none").exists()


@pytest.mark.parametrize("command", ["plot", "report", "eval"])
def test_a_result_that_could_not_be_written_is_found_first(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("logs", "a").mkdir(parents=True)
    Path("logs", "a", "metrics.csv").write_text("step,train/loss\n1,5\n2,4\n")
    words = ["--tasks", "none"] if command == "eval" else []
    name = "a.md" if command == "eval" else "a.svg"
    assert cli.main([command, "a", "--output", f"file/{name}", *words]) == 1
    assert (
        f"'file' is no folder; give another --output than file/{name}." in capsys.readouterr().err
    )
    Path("closed").mkdir()
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != Path("closed") and access(path, mode)
    )
    assert cli.main([command, "a", "--output", f"closed/{name}", *words]) == 1
    assert "nothing may be written into 'closed'; give another" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plot", "report"])
def test_a_run_that_is_not_there_is_a_failure(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "other"]) == 1
    assert "no metrics.csv in other or logs/other; give a run's folder." in capsys.readouterr().err
    Path("logs/mine").mkdir(parents=True)
    Path("logs/mine/metrics.csv").write_text("step\n")
    assert cli.main([command, "other"]) == 1
    captured = capsys.readouterr()
    assert "no metrics.csv in other or logs/other; runs under logs/: mine." in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_failure_of_any_command_is_exit_code_1_on_stderr(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: list[str]) -> int:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(import_module(f"slope.cli.{command}"), "run", fail)
    assert cli.main([command]) == 1
    assert capsys.readouterr() == ("", "slope: error: the disk is full\n")


# What a shell does when Tab is pressed behind a line; prints the completions.
_TAB = {
    "bash": """
source ./script
COMP_LINE=$1; COMP_POINT=${#1}; read -ra COMP_WORDS <<< "${1//=/ = }"
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
_slope; printf '%s\\n' "${COMPREPLY[@]}"
""",
    "zsh": """
source ./script
words=(${=1}); [[ $1 == *' ' ]] && words+=(''); CURRENT=$#words
COMP_LINE=$1 COMP_POINT=$#1 compgen -F _slope -- "$words[-1]" | grep -e "^$words[-1]"; true
""",
    "fish": "source ./script; complete -C $argv[1] | string replace -r '\\t.*' ''; true",
}


@pytest.fixture(scope="module")
def completion_scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script of every shell, runs and checkpoints."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "scripts").mkdir()
    for shell in _TAB:
        with (folder / "scripts" / shell).open("w") as file, contextlib.redirect_stdout(file):
            assert cli.main(["completion", shell]) == 0
    for made in ("logs/first", "logs/fine=0.1", "logs/f$(touch bad)", "checkpoints/final"):
        (folder / made).mkdir(parents=True)
    (folder / "logs/file").touch()
    return folder


@pytest.mark.parametrize("shell", _TAB)
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("slope ins", {"inspect"}),
        ("slope plot --out", {"--output"}),
        ("slope train --cf", {"--cfg"}),
        ("slope train --li", set()),  # its help names `slope config --list`
        ("slope completion fi", {"fish"}),
        ("slope train experiment=dem", {"experiment=demo"}),
        ("slope  plot  a --against ", {"steps", "tokens", "time"}),
        ("slope export my-run --format h", {"hf"}),
        ("slope export --sparsify ", {"magnitude", "wanda", "zeros"}),
        ("slope eval my-run --dtype f", {"float32", "float16"}),
        ("slope bench t", {"train"}),
        ("slope bench layer --dtype ", {"bf16", "fp16", "fp32"}),
        ("slope bench train --preci", {"--precision"}),
        ("slope plot f", {"first", "fine=0.1"}),
        ("slope report --json fi", {"first", "fine=0.1"}),
        ("slope inspect fi", {"final"}),
        ("slope export fi", {"final"}),
    ],
)
def test_a_shell_completes(
    shell: str, line: str, completed: set[str], completion_scripts: Path, tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "tab").write_text(_TAB[shell].replace("./script", f"./scripts/{shell}"))
    done = subprocess.run(
        [shell, tmp_path / "tab", line],
        capture_output=True,
        text=True,
        cwd=completion_scripts,
        env={**os.environ, "HOME": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    if shell == "bash" and "=" in line:  # which ends a word
        completed = {word.rpartition("=")[2] for word in completed}
    assert set(done.stdout.split()) == completed
    assert not (completion_scripts / "bad").exists()  # which a folder's name would make


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_all_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command in cli.COMMANDS:
        start = f"    {command}\\ " if shell != "fish" else f'__slope_behind "{command} '
        behind = "".join(line for line in script.splitlines(True) if start in line)
        assert "help" in behind
    assert ("bashcompinit" in script) == (shell == "zsh")


# Prints "heavy" to stdout when torch, Lightning or transformers is first looked for, then stops.
_WATCH = """
import runpy, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "pytorch_lightning", "transformers", "datasets"):
            print("heavy", name, flush=True)
            raise SystemExit(0)
sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_watched(*overrides: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", _WATCH, str(ROOT / "training" / "run.py"), *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=600,
        check=False,
    )


def test_first_line_comes_before_torch_is_imported() -> None:
    done = run_watched("experiment=smoke", "name=x")
    assert done.stdout.splitlines()[0] == "slope: train experiment=smoke name=x"


def test_unknown_key_is_found_before_torch_is_imported() -> None:
    done = run_watched("experiment=smoke", "pruner.patern=2:4")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'pruner.pattern'" in done.stderr


def test_a_terminal_without_a_letter_still_gets_the_answer(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main(["--version"]) == 0
    print("±")
    terminal.flush()
    assert terminal.buffer.getvalue().endswith(b"?\n")
