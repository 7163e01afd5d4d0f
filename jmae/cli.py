"""jmae COMMAND [ARGUMENT ...]
jmae COMMAND --help | --help | --version

Each command is a module of its own: `jmae train` is `python -m jmae.train`. A command has the flags that its help
names. So the text of the module answers --help and misspelt flags, before anything slow (JAX) is imported.
"""

import ast
import re
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from jmae import __version__
from jmae.errors import InputError, exit_code, nearest

HERE = Path(__file__).parent
COMMANDS = {
    "quickstart": ("quickstart", "from a folder of normal and one of new scans to a report, in one command"),
    "prepare": ("data.prepare", "write the manifest of folders of scans, or of a public data set"),
    "check": ("data.check", "open every file of a manifest and list what is wrong"),
    "slices": ("data.slices", "cut the volumes of a manifest into slices"),
    "train": ("train", "train a system, go on with an interrupted run, evaluate the test split"),
    "evaluate": ("evaluate", "score a split with a trained run: figures, maps, report"),
    "predict": ("predict", "score new scans: map, overlay, score, p-value"),
    "report": ("report", "compare several runs on one page"),
    "gallery": ("gallery", "draw the synthetic anomalies on an image"),
    "weights": ("weights", "convert published weights"),
    "export": ("export", "write a trained run as StableHLO, to be used without jmae"),
    "papers": ("papers", "the published tables row by row: prepare, train, evaluate, ours beside the paper's"),
    "plan": ("plan", "time and memory of a recipe on accelerators that this machine may lack"),
    "doctor": ("doctor", "versions, devices and memory; what is wrong and how to mend it"),
}
"""The module of each command and its sentence in `jmae --help`."""
OWN = {
    "systems": "which system takes which data, and its presets",
    "completion": "print the completion script of bash or zsh; jmae completion --help says where to keep it",
}
"""Commands that need no module of their own."""
KEEP = """jmae completion bash|zsh: print the script with which a shell completes commands, flags and recipes

Give these two lines once. The next shell that you open completes jmae.

bash    jmae completion bash > ~/.jmae-completion.bash
        echo '. ~/.jmae-completion.bash' >> ~/.bashrc

zsh     jmae completion zsh > ~/.jmae-completion.zsh
        echo '. ~/.jmae-completion.zsh' >> ~/.zshrc

For the present shell alone: eval "$(jmae completion bash)". Fish has no script."""
BASH = """\
_jmae() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words=""
    if [ "$COMP_CWORD" = 1 ]; then words="{commands}"
    elif [ "${{word:0:1}}" = "-" ]; then
        case ${{COMP_WORDS[1]}} in
{flags}
        esac
    elif [ "${{COMP_WORDS[COMP_CWORD-1]}}" = "--config" ]; then words="{recipes}"
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _jmae jmae"""
ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit"


def run() -> NoReturn:
    """The console command."""
    sys.exit(exit_code(main))


def main(argv: list[str]) -> int:
    command, *words = argv or ["--help"]
    if command in ("--help", "-h"):
        print(overview())
    elif command == "--version":
        print(f"jmae {__version__}")
    elif command in OWN and {"--help", "-h"} & {*words}:
        print(KEEP if command == "completion" else f"jmae {command}: {OWN[command]}")
    elif command == "systems":
        print(systems())
    elif command == "completion":
        print(completion(words))
    elif command not in COMMANDS:
        near = nearest(command, [*COMMANDS, *OWN])
        raise InputError(f"{command!r} is no command: did you mean {near}? jmae --help lists all")
    elif {"--help", "-h"} & {*words}:
        print((command == "prepare" and usage_of_set(words[0])) or usage(command))
    else:
        check_flags(command, words)
        if command in ("train", "evaluate", "predict", "export"):
            from jmae import command_words

            command_words.refuse_mistakes(command, words)
        sys.argv[1:] = [*words, *["--debug"] * ("--debug" in sys.argv)]
        runpy.run_module(f"jmae.{COMMANDS[command][0]}", run_name="__main__", alter_sys=True)
    return 0


def overview() -> str:
    """The list of commands."""
    lines = {name: sentence for name, (_, sentence) in COMMANDS.items()} | OWN
    listed = [f"  {name:<12}{sentence}" for name, sentence in lines.items()]
    head = "jmae: unsupervised anomaly detection in medical images. For research, not for clinical use."
    return "\n".join([head, "", *listed, "", "jmae COMMAND --help explains a command; jmae --version"])


def systems() -> str:
    """A paragraph of each recipe: the system's name, its data, its presets and its paper."""
    from jmae import recipe  # most commands answer without it

    lines = []
    for name in recipe.SYSTEMS:
        names = runpy.run_path(str(recipe.RECIPES / f"{name}.py"))
        (paper, *_) = re.findall(r"arXiv\s[\d.]+\d", names["__doc__"])
        title = names["__doc__"].partition("\n")[0].rstrip(".")
        facts = [title, " ".join(paper.split()), f"--config {name}:PRESET with {', '.join(names['PRESETS'])}"]
        lines += [f"{name:<12}{names['TAKES']}", *(f"{'':<12}{fact}" for fact in facts), ""]
    return "\n".join(
        [*lines, "small: own data on two CPU cores. paper: the paper's protocol, on a GPU. phantom: built-in."]
    )


def usage(command: str) -> str:
    """The help of a command: the docstring of its module, read without importing it."""
    place = HERE / COMMANDS[command][0].replace(".", "/")
    files = (place.with_suffix(".py"), place / "__main__.py", place / "__init__.py")
    texts = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) for file in files if file.is_file())
    text = next(filter(None, texts))
    for name, (module, _) in COMMANDS.items():
        text = re.sub(rf"python -m jmae\.{re.escape(module)}\b", f"jmae {name}", text)
    return text


def usage_of_set(name: str) -> str:
    """The help of `jmae prepare NAME`: the docstring of the module that reads the set; "" for another name."""
    package = HERE / "data" / "prepare"
    body = ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body
    tables = {ast.unparse(one.target): one.value for one in body if isinstance(one, ast.AnnAssign) and one.value}
    own_flags, aliases = (ast.literal_eval(tables[name]) for name in ("DATASETS", "ALIASES"))
    if (name := aliases.get(name.lower(), name.lower())) not in own_flags:
        return ""
    text = ast.get_docstring(ast.parse((package / f"{name}.py").read_text(encoding="utf-8")))
    optional = [f"[--{flag} VALUE]" for flag in own_flags[name] if flag not in ("normal", "test")]
    lines = [" ".join([f"jmae prepare {name} --root DIR --out DIR", *optional])]
    example = f"jmae prepare {name} --root downloads/{name} --out data/{name}"
    if name == "folders":
        lines = [f"jmae prepare {name} --normal DIR --test DIR --out DIR", *lines]
        example = f"jmae prepare {name} --normal normals --test new --out data/mine"
    shared = re.findall(r"^--patient .*?(?=\n\n)", usage("prepare"), re.MULTILINE | re.DOTALL)
    more = "jmae prepare --help lists the other layouts and data sets."
    return "\n\n".join(["\n".join(lines), f"{text}", f"For example: {example}", *shared, more])


def flags(command: str) -> list[str]:
    """The flags that a command's help names."""
    return sorted({"debug", "help", *re.findall(r"--([a-z][\w-]*)", usage(command))})


def check_flags(command: str, words: list[str]) -> None:
    """Raises InputError for a flag that the command's help does not name, and for a recipe that is not there."""
    known = flags(command)
    for i, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            continue
        if name.partition(".")[0] not in known or (name not in known and not name.startswith("config.")):
            near = f"config.{name}" if is_key(command, name) else nearest(name, known)
            raise InputError(f"--{name} is unknown: did you mean --{near}? jmae {command} --help lists all")
        if name == "config" and (value := value if equals else "".join(words[i + 1 : i + 2])):
            from jmae import recipe

            recipe.find(value)


def is_key(command: str, name: str) -> bool:
    """Whether `--config.NAME` is a flag of a command, for some system of the library."""
    from jmae import recipe

    declared = (recipe.declarations(system, volumes=volumes) for system in recipe.SYSTEMS for volumes in (False, True))
    forms = ("KEY", f"{name.partition('.')[0]}.KEY", name)
    return any(name in keys for keys in declared) and any(f"--config.{one}" in usage(command) for one in forms)


def completion(words: list[str]) -> str:
    """The completion script of bash, which zsh can read, too."""
    if words not in (["bash"], ["zsh"]):
        raise InputError("name the shell: jmae completion bash, or jmae completion zsh")
    from jmae import recipe

    lines = [f'            {name}) words="{" ".join(f"--{flag}" for flag in flags(name))}";;' for name in COMMANDS]
    script = BASH.format(commands=" ".join([*COMMANDS, *OWN]), flags="\n".join(lines), recipes=" ".join(recipe.SYSTEMS))
    return script if words == ["bash"] else f"{ZSH}\n{script}"
