"""Completion in a shell: the script is run by the shell itself, with the words that a user has typed so far."""

import shutil
import subprocess
import sys

import pytest

from stablevm import cli
from stablevm.recipes.listing import recipe_names

TYPED = r"""
try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _stablevm; echo "${COMPREPLY[*]}"; }
"""
CASES = {  # words typed so far: some of the completions, and some that must not be among them
    ("tr",): (["train"], ["toy"]),
    ("prepare", ""): (["convert", "encode", "pack", "digits"], ["train"]),
    ("train", "--data-d"): (["--data-dir"], ["--data_dir"]),
    ("train", "--data_d"): (["--data_dir"], ["--data-dir"]),
    ("prepare", "encode", "--no_fl"): (["--no_flip"], []),
    ("train", "--loss-type", ""): (["si", "stablevm"], ["--exp-name"]),
    ("train", "--proj_weight_schedule", "hard_"): (["hard_high"], []),
    ("train", "--loss-type", "=", "st"): (["stablevm"], ["si"]),
    ("train", "--loss_type", "="): (["si", "stablevm"], []),
    ("train", "--config", ""): ([*recipe_names(), "mine.toml"], []),
    ("train", "--config", "mi"): (["mine.toml"], recipe_names()),
    ("train", "--data-dir", "da"): (["data"], []),
    ("train", "--batch-size", ""): ([], ["--exp-name"]),
    ("train", "--resume", "--exp"): (["--exp-name"], []),
    ("train", "-q", "--no-q"): ([], ["--no-quiet"]),
    ("evaluate", "mi"): (["mine.toml"], []),
    ("recipes", ""): (recipe_names(), ["mine.toml"]),
    ("completion", ""): (["bash", "zsh", "tcsh"], []),
}


def script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_steps_options_in_both_spellings_and_values(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "mine.toml").touch()
    lines = ["try stablevm " + " ".join(f"'{word}'" for word in words) for words in CASES]
    program = "\n".join([script("bash", capsys), TYPED, *lines])
    done = subprocess.run(["bash", "--norc"], input=program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    for (words, (among, others)), line in zip(CASES.items(), done.stdout.splitlines(), strict=True):
        found = line.split()
        assert set(among) <= set(found) and not set(others) & set(found), (words, found)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_each_shell_can_read_its_script(shell, tmp_path, capsys):
    text = script(shell, capsys)
    assert "hard_high" in text and all(name in text for name in recipe_names())
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "script").write_text(text)
    clean = {"bash": ["--norc"], "zsh": ["-f"], "tcsh": ["-f"]}[shell]
    done = subprocess.run([shell, *clean, str(tmp_path / "script")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_script_comes_without_loading_torch():
    code = "import sys; from stablevm.cli import main; main(['completion', 'bash']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
