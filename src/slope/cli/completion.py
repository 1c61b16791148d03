"""``slope completion``: what a shell needs to complete ``slope`` commands."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from importlib import import_module
from string import Template

from slope import configs
from slope.cli import common

ABOUT = "print the completion script of a shell"
_EPILOG = """\
What is completed: commands, their options, recipes such as experiment=demo, and files.

examples:
  slope completion bash > ~/.local/share/bash-completion/completions/slope
  slope completion fish > ~/.config/fish/completions/slope.fish
  echo 'eval "$(slope completion zsh)"' >> ~/.zshrc
"""
_BASH = Template("""\
_slope() {
  local word="$${COMP_LINE:0:$$COMP_POINT}" words
  word="$${word##* }"
  case "$$COMP_CWORD $${COMP_WORDS[1]}" in
    1\\ *) words="$commands" ;;
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


def run(arguments: list[str]) -> int:
    """Print the script."""
    parser = common.parser("completion", "Print the completion script of a shell.", _EPILOG)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to print it for")
    shell = parser.parse_intermixed_args(arguments).shell

    from slope.cli import COMMANDS

    words = {command: _words(command) for command in COMMANDS}
    if shell == "fish":
        print(_fish(words))
        return 0
    cases = "\n".join(
        f'    *\\ {name}) words="{" ".join(known)}" ;;' for name, known in words.items()
    )
    script = _BASH.substitute(commands=" ".join(words), cases=cases)
    print(_ZSH + script if shell == "zsh" else script, end="")
    return 0


def _words(command: str) -> list[str]:
    """The options and choices that a command's help names, and the recipes if it takes any."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        import_module(f"slope.cli.{command}").run(["--help"])
    text, overridden, after = printed.getvalue().partition(common.OVERRIDES)
    words = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text + after))
    for choices in re.findall(r"^  \{([\w,-]+)\}", text, re.MULTILINE):
        words.update(choices.split(","))
    if overridden:
        words.update(f"{g}={name}" for g in configs.groups() for name in configs.choices(g))
    return sorted(words)


def _fish(words: dict[str, list[str]]) -> str:
    lines = []
    for command, known in words.items():
        about = shlex.quote(import_module(f"slope.cli.{command}").ABOUT)
        lines.append(f"complete -c slope -f -n __fish_use_subcommand -a {command} -d {about}")
        behind = f"complete -c slope -n '__fish_seen_subcommand_from {command}'"
        for word in known:
            lines.append(f"{behind} {'-l' if word[:2] == '--' else '-a'} {word.removeprefix('--')}")
    return "\n".join(lines)
