"""From a command line, files of options and runs to the options of a command: what wins, and what is refused."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from stablevm import cli
from stablevm.commands.arguments import parse
from stablevm.commands.config import RecipesConfig
from stablevm.commands.quiet import quietly
from stablevm.commands.table import COMMANDS, FOLDER_STEPS, Use
from stablevm.evaluation.config import EvaluateCheckpointConfig, EvaluateConfig
from stablevm.support import bars
from stablevm.support.errors import UserError
from stablevm.training.config import TrainConfig
from tests.helpers.runs import as_arguments

BY_NAME = {command.name: command for command in COMMANDS}
TRAIN, EVALUATE = BY_NAME["train"], BY_NAME["evaluate"]
NEEDED = ["--exp-name=run", "--data-dir=data"]


def options_of(*words, command=TRAIN):
    return parse(command, "test", words).options


def written(folder, text, name="mine.toml"):
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("command", [*COMMANDS, *FOLDER_STEPS], ids=lambda command: command.name)
def test_what_is_not_given_is_at_the_default_of_its_declaration(command):
    use = command.uses[0]
    places = {name: {"shell": "bash", "width": "0.1", "grid_size": "8"}.get(name, "some") for name in use.required}
    words = [value if command.spelt(name) == name.upper() else f"{command.spelt(name)}={value}"
             for name, value in places.items()]  # fmt: skip
    options = options_of(*words, command=command)
    for name, field in use.fields.items():
        if field.default is not dataclasses.MISSING:
            assert getattr(options, name) == field.default, name


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    path = written(
        tmp_path, 'data-dir = "data"\nbatch_size = 64\nlearning-rate = 1\nuse-proj-loss = true\nresolution = 8'
    )
    options = options_of("--config", path, "--exp-name=run", "--batch-size=32", "--no-use-proj-loss")
    assert (options.batch_size, options.use_proj_loss, options.resolution) == (32, False, 8)
    assert options.data_dir == Path("data") and type(options.learning_rate) is float
    assert options.epochs == TrainConfig.epochs


def test_a_file_is_toml_yaml_or_json(tmp_path):
    for name, text in {
        "mine.toml": 'loss-type = "stablevm"\nbank-capacity-per-class = "all"',
        "mine.yaml": "loss-type: stablevm\nbank-capacity-per-class: all",
        "mine.json": '{"loss_type": "stablevm", "bank_capacity_per_class": "all"}',
    }.items():
        options = options_of("--config", written(tmp_path, text, name), *NEEDED)
        assert (options.loss_type, options.bank_capacity_per_class) == ("stablevm", "all"), name


def test_a_file_has_tables_for_several_commands(tmp_path):
    path = written(
        tmp_path, '[about]\ntitle = "x"\n[train]\nepochs = 3\n[generate]\nnum-steps = 7\n[prepare.encode]\nvae = "ema"'
    )
    by_name = {command.name: command for command in COMMANDS}
    assert options_of("--config", path, *NEEDED).epochs == 3
    assert options_of("--config", path, "--ckpt=x", command=by_name["generate"]).num_steps == 7
    assert options_of("--config", path, "--data-dir=x", command=by_name["prepare encode"]).vae == "ema"
    with pytest.raises(UserError, match="holds options of train, generate, prepare, none of toy"):
        options_of("--config", path, command=by_name["toy"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("batch-sise = 3", "batch-sise: train has no such option; the nearest is batch-size"),
        ("batch-size = 'many'", 'batch_size: "many", expected an integer'),
        ("batch-size = 1.5", "batch_size: 1.5, expected an integer"),
        ("use-proj-loss = 1", "use_proj_loss: 1, expected true or false"),
        ("loss-type = 'x'", 'loss_type: "x", expected one of si, stablevm'),
        ("learning-rate = nan", "learning_rate: NaN, expected a number"),
        ("data-dir = ['a']", "data_dir: a list of 1, expected a path"),
        ("a = ", "Invalid value"),
        ("epochs = 1\n[generate]\nnum-steps = 1", "epochs: not in the table of any command"),
        ("[trane]\nepochs = 1", "trane: a table must have the name of a command"),
    ],
)
def test_what_a_file_has_wrong_is_one_line_that_names_it(text, message, tmp_path, capsys):
    path = written(tmp_path, text)
    assert cli.train(["--config", path, *NEEDED]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("mine.yaml", "a: [", "while parsing"),
        ("mine.yaml", "- 1", "expected options with their values, found a list of 1"),
        ("mine.yaml", "1: 2", "1: expected an option's name"),
        ("mine.json", "[]", "expected an object"),
        ("mine.ini", "a=1", "expected a file that ends in .toml, .yaml, .yml or .json"),
    ],
)
def test_what_is_no_file_of_options_is_one_line(name, text, message, tmp_path, capsys):
    assert cli.train(["--config", written(tmp_path, text, name), *NEEDED]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert cli.train(["--config", str(tmp_path / "gone"), *NEEDED]) == 2
    assert "no such file or recipe; the recipes are " in capsys.readouterr().err


def test_a_run_gives_its_options_to_another(tmp_path):
    run = TrainConfig(
        exp_name="first",
        output_dir=tmp_path,
        data_dir=Path("data"),
        learning_rate=3e-3,
        use_proj_loss=True,
        resume=True,
    )
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "config.json").write_text(json.dumps(run.to_dict() | {"resume_step": 5}))
    for where in (run.folder, run.folder / "config.json"):
        options = options_of("--config", str(where), "--exp-name=second")
        assert options == dataclasses.replace(run, exp_name="second", resume=False)
    earlier = {name: value for name, value in run.to_dict().items() if name != "encoder_resize"}
    (run.folder / "config.json").write_text(json.dumps(earlier))
    assert options_of("--config", str(run.folder)).encoder_resize == "antialiased", "as version 0.1 aligned"
    with pytest.raises(UserError, match=r"a folder without config\.json"):
        options_of("--config", str(tmp_path))


def test_a_file_of_ones_own_may_have_the_name_of_a_runs(tmp_path):
    path = written(tmp_path, '{"use_proj_loss": true, "resume": true}', "config.json")
    options = options_of("--config", path, *NEEDED, f"--output-dir={tmp_path}")
    assert options.resume and options.encoder_resize == TrainConfig.encoder_resize


def test_a_run_that_is_resumed_gives_its_options(tmp_path, capsys):
    run = TrainConfig(exp_name="cats", output_dir=tmp_path, data_dir=Path("data"), batch_size=4)
    run.folder.mkdir()
    (run.folder / "config.json").write_text(json.dumps(run.to_dict()))
    resumed = options_of("--resume", "--exp-name=cats", f"--output-dir={tmp_path}", "--log-steps=3")
    assert resumed == dataclasses.replace(run, resume=True, log_steps=3)
    assert cli.train(["--resume", "--exp-name=pats", f"--output-dir={tmp_path}"]) == 2
    assert f"--resume: {tmp_path}/pats is no run; the runs in {tmp_path} are cats" in capsys.readouterr().err


def test_evaluate_takes_samples_or_a_checkpoint():
    assert isinstance(options_of("x.npz", "--reference=r", command=EVALUATE), EvaluateConfig)
    asked = options_of("--ckpt=c", "--reference=r", "--num-steps=3", command=EVALUATE)
    assert isinstance(asked, EvaluateCheckpointConfig) and asked.sampling.num_steps == 3
    with pytest.raises(UserError, match="give SAMPLES or --ckpt, not both"):
        options_of("x.npz", "--ckpt=c", "--reference=r", command=EVALUATE)
    with pytest.raises(UserError, match="--vae, --num-steps: only with --ckpt"):
        options_of("x.npz", "--reference=r", "--num-steps=3", "--vae=x", command=EVALUATE)


@pytest.mark.parametrize("name, more", [("generate", []), ("evaluate", ["--reference=r"])])
def test_two_spellings_of_the_solver_may_not_contradict_each_other(name, more, tmp_path, capsys):
    words = [name, "--ckpt=c", *more, "--mode=ode", "--heun"]
    asked = options_of(*words[1:], "--solver=heun", command=BY_NAME[name])
    assert (asked if name == "generate" else asked.sampling).effective().solver == "heun"
    in_file = ["--config", written(tmp_path, 'solver = "euler"')]
    for given in (["--solver=euler"], ["--solver=dopri5"], in_file):
        assert cli.main([*words, *given]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --heun is the same as --solver heun, and --solver ") and error.count("\n") == 1


def test_a_file_for_another_use_is_refused_as_its_options_are(tmp_path):
    path = written(tmp_path, "num-steps = 3\ncfg-scale = 1.5")
    assert options_of("--ckpt=c", "--reference=r", "--config", path, command=EVALUATE).sampling.num_steps == 3
    with pytest.raises(UserError, match=r"mine\.toml: --num-steps, --cfg-scale: only with --ckpt; remove"):
        options_of("x.npz", "--reference=r", "--config", path, command=EVALUATE)


def test_what_is_missing_is_named_once(capsys):
    assert cli.main(["train"]) == 2
    error = capsys.readouterr().err
    assert "--exp-name, --data-dir: missing" in error and "stablevm train --help" in error and error.count("\n") == 1
    assert cli.evaluate([]) == 2
    assert "SAMPLES, --reference: missing" in capsys.readouterr().err


def test_help_has_groups_and_tells_each_default_once(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for group in TRAIN.groups:
        assert f"{group.title} options" in shown
    assert "(default: None)" not in shown and "(default: 256)" in shown and "(required)" in shown
    assert "Default: the data set's. --num-classes" in shown


def test_quiet_leaves_the_last_line_warnings_and_errors(tmp_path, capsys):
    folder = tmp_path / "digits"
    assert cli.main(["prepare", "digits", "-q", str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert cli.main(["data", "verify", str(folder / "train"), "--num-workers=0"]) == 0
    whole = capsys.readouterr().out.splitlines()
    assert cli.main(["data", "verify", "-q", str(folder / "train"), "--num-workers=0"]) == 0
    assert capsys.readouterr().out.splitlines() == whole[-1:]
    assert cli.main(["variance", "--quiet", f"--data-dir={tmp_path}", f"--output-dir={tmp_path / 'new'}"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and not told.out


def test_helpers_of_tests_write_options_as_users_do(tmp_path):
    config = TrainConfig(exp_name="run", data_dir=tmp_path, use_proj_loss=True, resolution=8)
    assert options_of(*as_arguments(config)) == config


def test_quiet_draws_no_bar_where_a_process_would_show_one():
    with quietly():
        assert bars.hidden(True) and bars.hidden(False)
    assert not bars.hidden(True) and bars.hidden(False)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, ("PASSIVE", "1000")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
        ({"GOMP_SPINCOUNT": "7"}, (None, "7")),
    ],
)
def test_threads_wait_patiently_unless_the_user_says_otherwise(chosen, expected, monkeypatch):
    """The variables are set before the command's module imports torch."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    seen = []
    look = Use(RecipesConfig, lambda options: seen.append(tuple(map(os.environ.get, names))))
    assert cli._entry(dataclasses.replace(BY_NAME["recipes"], make_uses=(lambda: look,)))([]) == 0
    assert seen == [expected]
