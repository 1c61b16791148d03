"""``slope completion``: what a shell needs to complete ``slope`` commands."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from string import Template

from slope import configs
from slope.cli import common

ABOUT = "print the completion script of a shell"
_EPILOG = """\
What is completed: commands, their options and the choices of these, recipes such as
experiment=demo, the runs under logs/ and checkpoints/, and files.

examples:
  slope completion bash > ~/.local/share/bash-completion/completions/slope
  slope completion fish > ~/.config/fish/completions/slope.fish
  slope completion zsh > ~/.slope-completion; echo '. ~/.slope-completion' >> ~/.zshrc
"""
_NAMED_IN = {"RUN": "logs", "CHECKPOINT": "checkpoints"}
_BASH = Template("""\
# compgen expands what it gets: a folder whose name is no run's, such as $$(reboot), is left out.
_slope_names() {
  local folder
  for folder in "$$1"/*/; do
    folder="$${folder%/}"
    case "$${folder##*/}" in
      *[![:alnum:]_.+@=-]*) ;;
      *) printf '%s\\n' "$${folder##*/}" ;;
    esac
  done
}
_slope() {
  local line="$${COMP_LINE:0:$$COMP_POINT}" word words=""
  word="$${line##* }"
  line="$${line% *} "
  while [ "$$line" != "$${line//  / }" ]; do line="$${line//  / }"; done
  case "$${line#* }" in
    "") words="$commands" ;;
$cases
  esac
  COMPREPLY=($$(compgen -W "$$words" -- "$$word"))
  # Where "=" ends a word, the shell completes only what stands behind it.
  case "$$COMP_WORDBREAKS" in *=*) COMPREPLY=("$${COMPREPLY[@]#"$${word%"$${word##*=}"}"}") ;; esac
}
complete -o default -F _slope slope
""")
# zsh runs bash's script.
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
_FISH = r"""
function __slope_behind
    string match -q -- $argv (string join ' ' -- (commandline -opc)[2..-1] '')
end
function __slope_names
    for folder in $argv/*/
        string replace -f -r '.*/([\w.+@=-]+)/$' '$1' -- $folder
    end
end"""


@dataclass(frozen=True)
class _Known:
    """What a command's help says of its arguments.

    ``words`` are options, choices and recipes; ``values`` the choices behind an option that takes a
    value, none if it takes a file or a number; ``folder`` holds the names that it takes, if any.
    """

    words: list[str]
    values: dict[str, list[str]]
    folder: str | None


def run(arguments: list[str]) -> int:
    """Print the script."""
    parser = common.parser("completion", "Print the completion script of a shell.", _EPILOG)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to print it for")
    shell = parser.parse_intermixed_args(arguments).shell

    known = _all_known()
    if shell == "fish":
        print(_fish(known))
    else:
        print((_ZSH if shell == "zsh" else "") + _bash(known), end="")
    return 0


def _all_known() -> dict[str, _Known]:
    """Of every command, and of every measurement of ``bench``."""
    from slope.cli import COMMANDS
    from slope.cli.bench import EXPERIMENTS

    known = {command: _ask(command) for command in COMMANDS}
    known["bench"] = _Known([*EXPERIMENTS, "--help"], {}, None)
    return known | {f"bench {name}": _ask(f"bench {name}") for name in EXPERIMENTS}


def _ask(command: str) -> _Known:
    name, *rest = command.split()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        import_module(f"slope.cli.{name}").run([*rest, "--help"])
    text, overridden, after = printed.getvalue().partition(common.OVERRIDES)
    words = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text + after))
    for choices in re.findall(r"^  \{(\S+)\}", text, re.MULTILINE):
        words.update(choices.split(","))
    if overridden:
        words.update(f"{g}={name}" for g in configs.groups() for name in configs.choices(g))
    values = {
        option: value[1:-1].split(",") if value[0] == "{" else []
        for option, value in re.findall(r"^  (--[\w-]+) (\S+)", text, re.MULTILINE)
    }
    taken = re.search(rf"^  ({'|'.join(_NAMED_IN)})\b", text, re.MULTILINE)
    return _Known(sorted(words), values, _NAMED_IN[taken[1]] if taken else None)


def _behind(command: str) -> str:
    """The pattern of what stands between ``slope`` and the word that is completed."""
    return "bench " if command == "bench" else f"{command} *"


def _bash(known: Mapping[str, _Known]) -> str:
    cases = []
    for command, takes in known.items():
        pattern = _behind(command).replace(" ", "\\ ")
        alike: dict[str, list[str]] = {}
        for option, choices in takes.values.items():
            alike.setdefault(" ".join(choices), []).append(f"{pattern}{option}\\ ")
        for choices, patterns in alike.items():
            cases.append(f'    {"|".join(patterns)}) words="{choices}" ;;')
        names = [f"$(_slope_names {takes.folder})"] if takes.folder else []
        cases.append(f'    {pattern}) words="{" ".join(takes.words + names)}" ;;')
    commands = " ".join(command for command in known if " " not in command)
    return _BASH.substitute(commands=commands, cases="\n".join(cases))


def _fish(known: Mapping[str, _Known]) -> str:
    lines = [_FISH.strip()]
    for command, takes in known.items():
        if " " not in command:
            about = shlex.quote(import_module(f"slope.cli.{command}").ABOUT)
            lines.append(f"complete -c slope -f -n __fish_use_subcommand -a {command} -d {about}")
        behind = f"complete -c slope -n '__slope_behind \"{_behind(command)}\"'"
        lines += [f"{behind} {_fish_word(word, takes.values)}" for word in takes.words]
        if takes.folder:
            lines.append(f"{behind} -a '(__slope_names {takes.folder})'")
    return "\n".join(lines)


def _fish_word(word: str, values: Mapping[str, Sequence[str]]) -> str:
    """The end of fish's ``complete`` for a word, with what may stand behind it."""
    if not word.startswith("--"):
        return f"-a {word}"
    if word not in values:
        return f"-l {word[2:]}"
    return f"-l {word[2:]} " + (f"-x -a '{' '.join(values[word])}'" if values[word] else "-r")
