"""``slope config``: what a run would be done with."""

from __future__ import annotations

from slope import configs
from slope.cli import common

ABOUT = "print the configuration of a run, or list all recipes"
_EPILOG = f"""\
{common.OVERRIDES}
examples:
  slope config experiment=owt/gpt2s pruner=slope
  slope config experiment=demo --json
  slope config --list
"""


def run(arguments: list[str]) -> int:
    """Print a resolved configuration, or the choices of every group."""
    parser = common.parser("config", "Print the resolved configuration of a run as YAML.", _EPILOG)
    parser.add_argument("overrides", nargs="*", metavar="override", help="see below")
    parser.add_argument("--list", action="store_true", help="list the choices of every group")
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    options = parser.parse_intermixed_args(arguments)
    if not options.list:
        return common.print_config(options.overrides, options.traceback, options.json)
    choices = {group: list(configs.choices(group)) for group in configs.groups()}
    if options.json:
        print(common.as_json(choices))
        return 0
    for group, names in choices.items():
        print(f"{group}:")
        for name in names:
            print(f"  {name}")
    return 0
