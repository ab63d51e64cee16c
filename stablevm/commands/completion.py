"""The command `stablevm completion`, which prints a script for completion in a shell.

A user may type either spelling of an option (--data-dir, --data_dir), and a recipe or a file after --config; the
parser's own scripts know neither.
"""

from collections.abc import Iterable
from typing import get_args

from stablevm.commands.arguments import COMMON
from stablevm.commands.config import Shell
from stablevm.commands.spellings import Option, options_in
from stablevm.commands.table import COMMANDS, PURPOSES, Command
from stablevm.recipes.listing import recipe_names

FILES, SWITCH = "<files>", "<switch>"  # in place of words: any file, and no value at all

_BASH = r"""# Completion of stablevm's commands and options, written by `stablevm completion`.

_stablevm_next() {  # what may follow a command: steps, options, and words without a name
  case "$1" in
@NEXT@
  esac
}

_stablevm_value() {  # the values of an option
  case "$1 $2" in
@VALUES@
  esac
}

_stablevm() {
  local cur="${COMP_WORDS[COMP_CWORD]}" prev="" command="" found="" word=""
  if (( COMP_CWORD > 1 )); then
    prev="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}"
  fi
  case "$command" in
    @GROUPS@) (( COMP_CWORD > 2 )) && command="$command ${COMP_WORDS[2]}" ;;
  esac
  # --option=value comes as three words
  if [[ "$cur" == "=" ]]; then cur=""; elif [[ "$prev" == "=" ]]; then prev="${COMP_WORDS[COMP_CWORD-2]}"; fi
  if [[ "$prev" == --* ]]; then
    word="${prev#--}"
    prev="--${word//_/-}"
  fi
  [[ "$prev" == -* ]] && found="$(_stablevm_value "$command" "$prev")"
  if [[ "$prev" != -* || "$found" == "@SWITCH@" ]]; then
    found="$(_stablevm_next "$command")"
    # the other spelling of options, once an underscore is typed
    if [[ "$cur" == --*_* ]]; then found="${found//-/_}"; found="${found//__/--}"; fi
    [[ "$cur" == -* ]] && found="${found//@FILES@/}"
  fi
  local IFS=$' \t\n'
  COMPREPLY=($(compgen -W "${found//@FILES@/}" -- "$cur"))
  if [[ "$found" == *"@FILES@"* ]]; then
    IFS=$'\n'
    COMPREPLY+=($(compgen -f -- "$cur"))
    compopt -o filenames 2>/dev/null
  fi
}
"""
_REGISTER = "complete -F _stablevm stablevm"
_ZSH = f"autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit\n{_REGISTER}"


def print_script(shell: Shell) -> None:
    """Print the script for the shell."""
    texts = {"bash": lambda: f"{_bash()}\n{_REGISTER}", "zsh": lambda: f"{_bash()}\n{_ZSH}", "tcsh": _tcsh}
    print(texts[shell]())


def _bash() -> str:
    """The functions with the tables of all commands."""
    following = {"": _first_words()}
    following |= {word: dict.fromkeys(_behind(word)) for word in PURPOSES}
    following |= {command.name: dict.fromkeys(_following(command)) for command in COMMANDS}
    values: dict[str, list[str]] = {f'*" {name}"': [text] for name, text in _common().items()}
    by_text: dict[str, list[str]] = {}
    for command in COMMANDS:
        for spelling, option in options_in(command.groups)[0].items():
            if text := _value(option):
                by_text.setdefault(text, []).append(f'"{command.name} {spelling}"')
    patterns = [(" | ".join(names), text) for text, names in by_text.items()]
    patterns += [(pattern, text) for pattern, (text,) in values.items()]
    return (
        _BASH.replace("@NEXT@", "\n".join(_case(f'"{name}"', " ".join(words)) for name, words in following.items()))
        .replace("@VALUES@", "\n".join(_case(*pattern) for pattern in patterns))
        .replace("@GROUPS@", " | ".join(PURPOSES))
        .replace("@FILES@", FILES)
        .replace("@SWITCH@", SWITCH)
    )


def _case(pattern: str, text: str) -> str:
    return f'    {pattern}) echo "{text}" ;;'


def _first_words() -> dict[str, None]:
    return dict.fromkeys(command.name.split()[0] for command in COMMANDS)


def _behind(word: str) -> list[str]:
    """The steps behind the first word of commands of two words."""
    return [command.name.split()[1] for command in COMMANDS if command.name.split()[0] == word]


def _following(command: Command) -> Iterable[str]:
    """The options of a command, with what its words without a name may be."""
    named, places = options_in([*command.groups, COMMON])
    yield from (text for place in places if (text := _recipes() if command.name == "recipes" else _value(place)))
    yield from named
    yield "--help"


def _common() -> dict[str, str]:
    """The values of the options of every command."""
    return {
        spelling: f"{_recipes()} {FILES}" if option.spelt == "--config" else _value(option)
        for spelling, option in options_in([COMMON])[0].items()
    }


def _value(option: Option) -> str:
    """The words that are values of an option, or the sign for files or for none."""
    return SWITCH if option.is_switch else FILES if option.may_be_path else " ".join(option.words)


def _recipes() -> str:
    return " ".join(recipe_names())


def _tcsh() -> str:
    """One rule of tcsh for each option; the first that fits counts, and it knows no options of one command alone."""
    values: dict[str, dict[str, None]] = {}  # the words after an option, of all commands that have it
    names = dict.fromkeys(["--help", *options_in([COMMON])[0]])
    for command in COMMANDS:
        for spelling, option in options_in(command.groups)[0].items():
            names[spelling] = None
            if not option.is_switch:
                values.setdefault(spelling, {}).update(dict.fromkeys(_value(option).split()))
    steps = {word: " ".join(_behind(word)) for word in PURPOSES}
    rules = [f"n@{word}@({text})@" for word, text in steps.items()]
    rules += [f"n@recipes@({_recipes()})@", f"n@completion@({' '.join(get_args(Shell))})@"]
    rules += [f"n@--config@`echo {_recipes()}; ls`@"]
    for name, words in values.items():
        rules.append(f"n@{_either(name)}@{'f' if FILES in words else '(' + ' '.join(words) + ')'}@")
    rules += [f"p@1@({' '.join(_first_words())})@"]
    rules += [f"c@--@({' '.join(name[2:] for name in names if name.startswith('--'))})@"]
    return "complete stablevm " + " ".join(f"'{rule}'" for rule in rules)


def _either(name: str) -> str:
    """The pattern of tcsh for both spellings of an option."""
    return f"--{name[2:].replace('-', '[-_]')}" if name.startswith("--") else name
