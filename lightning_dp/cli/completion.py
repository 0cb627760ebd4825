"""``lightning-dp completion SHELL``: what a shell has to be told to complete commands, options, recipes and files.

The script that a shell reads asks this module at each Tab, which says one candidate a line, or none where a file belongs.
Neither NumPy nor PyTorch is imported for it: options are read from the source text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from lightning_dp.cli.fit_help import option_names
from lightning_dp.cli.main import COMMANDS, LIGHTNINGS
from lightning_dp.cli.recipe_files import alike, fail, names

_BASH = """\
_lightning_dp() {
    local IFS=$'\\n'
    COMPREPLY=($(lightning-dp completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *. ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _lightning_dp lightning-dp
"""
_ZSH = """\
#compdef lightning-dp
_lightning_dp() {
    local -a found
    found=(${(f)"$(lightning-dp completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( ${#found} )); then compadd -- "${found[@]}"; else _files; fi
}
if [[ ${funcstack[1]} == _lightning_dp ]]; then _lightning_dp "$@"; else compdef _lightning_dp lightning-dp; fi
"""
_FISH = """\
function __lightning_dp
    set -l found (lightning-dp completion words -- (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c lightning-dp -f -a '(__lightning_dp)'
"""
SHELLS = {"bash": _BASH, "fish": _FISH, "zsh": _ZSH}

_HELP = """\
usage: lightning-dp completion SHELL

Prints what bash, zsh or fish has to read so that Tab completes commands, options, recipes and files.

  bash   lightning-dp completion bash >> ~/.bashrc
  zsh    lightning-dp completion zsh >> ~/.zshrc       (after the line with compinit)
  fish   lightning-dp completion fish > ~/.config/fish/completions/lightning-dp.fish
"""


def run(words: Sequence[str]) -> None:
    """Print a shell's script, or, for such a script, what a word may be completed to.

    Args:
        words: the command line after ``completion``.

    Raises:
        SystemExit: the shell is unknown (exit code 2).
    """
    asked = words[0] if words else "--help"
    if asked in ("-h", "--help"):
        print(_HELP, end="")
    elif asked in SHELLS:
        print(SHELLS[asked], end="")
    elif asked == "words":
        print("\n".join(candidates(words[2:])))
    else:
        fail(f"completion {asked!r}: expected one of {', '.join(SHELLS)}.{alike(asked, list(SHELLS))}")


def candidates(words: Sequence[str]) -> list[str]:
    """What the last of ``words`` may be completed to; nothing where a file or a number belongs.

    Args:
        words: after the program's name. bash gives ``--option=value`` as three words, other shells as one.

    Example:
        >>> candidates(["recipes", "sh"])
        ['show']
        >>> candidates(["fit", "--recipe=digits/cnn_eps8"])
        ['--recipe=digits/cnn_eps8']
    """
    *before, current = words or [""]
    if before and current == "=":  # bash, at the beginning of the value
        current = ""
    before = [word for word in before if word != "="]
    option, equals, value = current.partition("=") if current.startswith("--") else ("", "", "")
    if equals:
        return [f"{option}={one}" for one in _values([*before, option]) if one.startswith(value)]
    known = _values(before) if before else [*COMMANDS, *LIGHTNINGS, "--help", "--version"]
    if known is _OPTIONS:
        known = sorted({*options(before[0]), "--help"}) if current.startswith("-") else []
        known = known if "--trainer." not in known else [*known, *_of_trainer(current)]
    return sorted({one for one in known if one.startswith(current)})


_OPTIONS: list[str] = []
"""Stands for: an option of the command, if anything of it is known."""


def _values(before: Sequence[str]) -> list[str]:
    """What may follow these words."""
    command, last = before[0], before[-1]
    if last == "--recipe" or (command == "recipes" and before[1:] in (["show"], ["copy"])):
        return names()
    if command == "recipes":
        return ["copy", "list", "show"] if len(before) == 1 else []
    if command == "completion":
        return list(SHELLS) if len(before) == 1 else []
    if command == "report" and last == "--beside":
        from lightning_dp.reporting.facts import TASKS

        return list(TASKS)
    if command == "fit" and last == "--trainer.accelerator":
        return ["auto", "cpu", "gpu", "mps", "tpu"]
    return _OPTIONS


def options(command: str) -> list[str]:
    """The options of a command, read from its source text."""
    if command in LIGHTNINGS:
        return option_names(command)
    if command not in COMMANDS:
        return []
    module, function = COMMANDS[command].split(":")
    return sorted(set(_added((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"), function)))


def _added(source: str, function: str) -> Iterator[str]:
    """The options that a function adds to its parser, itself or by others of its module."""
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    waiting, seen = [function], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in functions:
            continue
        seen.add(name)
        for node in ast.walk(functions[name]):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name):
                waiting.append(node.func.id)
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                for one in node.args:
                    if isinstance(one, ast.Constant) and isinstance(one.value, str) and one.value.startswith("--"):
                        yield one.value


def _of_trainer(current: str) -> list[str]:
    """``--trainer.max_steps`` and so on, once that is what is being typed. Lightning's source is read, not imported."""
    if not current.startswith("--trainer."):
        return []
    found = find_spec("lightning")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        with suppress(OSError, SyntaxError, IndexError):
            source = (Path(place) / "pytorch" / "trainer" / "trainer.py").read_text(encoding="utf-8")
            signature = source[source.index("def __init__") :].split(") -> None:")[0]
            return [f"--trainer.{name}" for name in re.findall(r"^        (\w+):", signature, flags=re.MULTILINE)]
    return []
