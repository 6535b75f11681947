"""`unsc completion`: a script for the shell that knows every command and option."""

from __future__ import annotations

from .main import COMMANDS, KINDS, options_parser

_SCRIPT = """\
_unsc() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" choices=""
    case "$COMP_CWORD:${{COMP_WORDS[1]}}:${{COMP_WORDS[2]}}" in
        1:*) choices="{commands}" ;;
{cases}
    esac
    if [[ "$word" == -* || "$COMP_CWORD" -le 2 ]]; then
        COMPREPLY=($(compgen -W "$choices" -- "$word"))
    fi
    local IFS=$'\n'
    [[ ${{#COMPREPLY[@]}} -gt 0 ]] || COMPREPLY=($(compgen -f -- "$word"))
}}
complete -o filenames -F _unsc unsc
"""


def script(shell: str) -> str:
    """The script of a shell, "bash" or "zsh"; other words complete to files."""
    kinds = {**{command: " ".join(names) for command, names in KINDS.items()}, "completion": "bash zsh"}
    cases = [f'        2:{command}:*) choices="{names}" ;;' for command, names in kinds.items()]
    for command, names in KINDS.items():
        for kind in names:
            options = " ".join(options_parser(command, kind).option_names())
            cases.append(f'        *:{command}:{kind}) choices="{options}" ;;')
    bash = _SCRIPT.format(commands=" ".join(COMMANDS), cases="\n".join(cases))
    return bash if shell == "bash" else f"autoload -Uz bashcompinit && bashcompinit\n{bash}"
