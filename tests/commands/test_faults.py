"""What can't be parsed is one line: what was given, what is expected, and the nearest that is known; status 2."""

import random

import pytest

from stablevm import cli
from stablevm.commands import arguments
from stablevm.commands.arguments import parse
from stablevm.commands.table import COMMANDS, FOLDER_STEPS
from stablevm.support.errors import UserError

TRAIN = "stablevm train"
WORDS = ", ".join(dict.fromkeys(command.name.split()[0] for command in COMMANDS))
UNPARSED = {
    "train --learning-speed=3": f"--learning-speed: {TRAIN} has no such option; the nearest is --learning-rate",
    "train --learning_speed 3": f"--learning_speed: {TRAIN} has no such option; the nearest is --learning-rate",
    "train --no-batch-size": f"--no-batch-size: {TRAIN} has no such option; the nearest is --batch-size",
    "train --quite": f"--quite: {TRAIN} has no such option; the nearest is --quiet",
    "train -help": f"-help: {TRAIN} has no such option; the nearest is --help",
    "train -x": f"-x: {TRAIN} has no such option; {TRAIN} --help lists them",
    "train --zzz": f"--zzz: {TRAIN} has no such option; {TRAIN} --help lists them",
    "train --loss-type x": "--loss-type x: expected one of si, stablevm",
    "train --loss_type=": '--loss-type "": expected one of si, stablevm',
    "train --batch-size many": "--batch-size many: expected an integer",
    "train --batch-size=1.5": "--batch-size 1.5: expected an integer",
    "train --learning-rate fast": "--learning-rate fast: expected a number",
    "train --bank-capacity-per-class some": "--bank-capacity-per-class some: expected an integer or all",
    "train --batch-size": "--batch-size: expected an integer after it",
    "train --batch-size --epochs 3": "--batch-size: expected an integer after it",
    "train --data-dir": "--data-dir: expected a path after it",
    "train --resume yes": "--resume yes: a switch takes no value; give --resume or --no-resume",
    "train --no-resume=1": "--no-resume 1: a switch takes no value; give --resume or --no-resume",
    "train -q=1": "-q 1: a switch takes no value",
    "train exp-name=x": f"exp-name=x: {TRAIN} takes only options; did you mean --exp-name?",
    "train x": f"x: {TRAIN} takes only options; {TRAIN} --help lists them",
    "train -- x": f"x: {TRAIN} takes only options; {TRAIN} --help lists them",
    "train x\x1b[1m": f"x\\x1b[1m: {TRAIN} takes only options; {TRAIN} --help lists them",
    "evaluate a b": "b: stablevm evaluate takes only SAMPLES and options; stablevm evaluate --help lists them",
    "completion fsh": "SHELL fsh: expected one of bash, zsh, tcsh",
    "toy --eval-times 0.1 x": "--eval-times x: expected a number",
    "toy --eval-tims 0.1": "--eval-tims: stablevm toy has no such option; the nearest is --eval-times",
    "trian --batch-size 3": "trian: stablevm has no such command; did you mean train?",
    "encode --data-dir x": "encode: stablevm has no such command; did you mean prepare encode?",
    "--batch-size 3": f"--batch-size: expected first one of {WORDS}",
    "prepare cnvert": "cnvert: stablevm prepare has no such step; did you mean convert?",
    "prepare zzz": "zzz: stablevm prepare has no such step; expected one of convert, encode, pack, features, digits",
    "data verfy x": "verfy: stablevm data has no such action; did you mean verify?",
}  # fmt: skip


def refusal(status, capsys):
    told = capsys.readouterr()
    assert status == 2 and not told.out
    assert told.err.startswith("error: ") and told.err.count("\n") == 1, told.err
    return told.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("line", UNPARSED)
def test_what_can_not_be_parsed_is_one_line(line, capsys):
    assert refusal(cli.main(line.split()), capsys) == UNPARSED[line]


@pytest.mark.parametrize(
    "script, line, expected",
    [
        (cli.train, "--seeed 3", "--seeed: train.py has no such option; the nearest is --seed"),
        (cli.generate, "--ckp x", "--ckp: generate.py has no such option; the nearest is --ckpt"),
        (cli.generate, "--mode odd", "--mode odd: expected one of ode, sde, stablevs"),
        (cli.evaluate, "x --metrics", "--metrics: evaluate.py has no such option; "),
        (cli.toy, "--seed one", "--seed one: expected an integer"),
        (cli.toy, "-e cfm --deed 1", "--deed: gmm_exp.py has no such option; the nearest is --seed"),
        (cli.dataset_tools, "convrt", "convrt: dataset_tools.py has no such step; did you mean convert?"),
        (cli.dataset_tools, "convert --sorce x",
         "--sorce: dataset_tools.py convert has no such option; the nearest is --source"),
    ],
)  # fmt: skip
def test_the_published_scripts_name_themselves(script, line, expected, capsys):
    assert refusal(script(line.split()), capsys).startswith(expected)


@pytest.mark.parametrize("command", [*COMMANDS, *FOLDER_STEPS], ids=lambda command: command.name)
def test_each_refusal_of_the_parser_has_words(command, monkeypatch):
    """The words are found without the parser, so lines of random words are given to both."""
    monkeypatch.setattr(arguments, "_unboxed", lambda text: pytest.fail(text))
    stream = random.Random(3)
    names = [command.spelt(name) for name in command.fields]
    known = [name for name in names if name.startswith("--")]
    others = [
        "--no-resume",
        "--zz",
        "-q",
        "-x",
        "--",
        "x",
        "7",
        "-7",
        "-.5",
        "1e3",
        "",
        "=",
        "bash",
        "--seed=",
        "no-",
        "-",
    ]
    refused = 0
    for _ in range(16):
        line = [stream.choice([*others, *stream.choices(known or others, k=8)]) for _ in range(stream.randrange(1, 5))]
        line = [f"{word}=3" if word in known and stream.random() < 0.3 else word for word in line]
        try:
            parse(command, "test", line)
        except UserError as error:
            refused += 1
            assert str(error) and "\n" not in str(error)
    assert refused > 4
