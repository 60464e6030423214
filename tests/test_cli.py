"""The `ygglight` command: fast where it must be, and one clear line where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import ygglight
from ygglight_launcher import VERBS, main, recipes

SCRIPT = Path(sys.executable).with_name("ygglight")

# A user's own file: module, strategy and data in the folder where the command is typed.
MINE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader
from ygglight.strategies import OneDeviceStrategy

class Net(LightningModule):
    def __init__(self, model: str = "a", width: int = 2):
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width} must be at least 1")
        self.layer = torch.nn.Linear(4, width)
    def training_step(self, batch):
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Own(Net):
    def train_dataloader(self):
        return DataLoader(torch.randn(4, 4))

class Data(LightningDataModule):
    def __init__(self, tokenizer: str | None = None):
        super().__init__()
        self.tokenizer = tokenizer
    def train_dataloader(self):
        print("tokenizer", self.tokenizer)
        return DataLoader(torch.randn(4, 4))

class Report:
    predicted_peak_bytes, max_batch = 3, 16
    def table(self): return "the plan"
    def to_json(self): return '{"actions": {}}'

class Planner(OneDeviceStrategy):
    several_devices_name = "adacc_ddp"
    def __init__(self, memory_budget: str | float | None = None, **kwargs):
        super().__init__(**kwargs)
        if memory_budget == "much":
            raise ValueError("cannot read the size 'much'")
        if memory_budget == "bug":
            None + 1
    def plan_only(self, trainer, model, datamodule=None, *, max_batch=False):
        assert trainer.callbacks is not None and not trainer.loggers and trainer.checkpoint_callback is None
        return Report()
"""

CONFIG: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "strategy": {"class_path": "mine.Planner", "init_args": {"memory_budget": 0.5}},
    },
    "model": {"class_path": "mine.Net"},
    "data": {"class_path": "mine.Data"},
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a config in the current folder, beside the user's `mine.py`."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "argv", ["ygglight"])  # what Lightning would hand to other ranks
    yield "mine.yaml"
    sys.modules.pop("mine", None)


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of the command, run in this process."""
    try:
        code = main(words)
    except SystemExit as exit_:  # argparse
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def error_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says when it refuses: exit code 2, no traceback."""
    code, _, err = run(*words, capsys=capsys)
    assert code == 2, err
    assert "Traceback" not in err
    return next(line for line in err.splitlines() if line.startswith("ygglight"))


# -- without Lightning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--version"], ["recipes"], ["--help"], ["nonsense"]])
def test_light_verbs_answer_at_once_and_without_lightning(words: list[str]) -> None:
    code = (
        "import json, sys, ygglight_launcher\n"
        f"ygglight_launcher.main({words!r})\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"ygglight", "lightning", "torch", "jsonargparse", "yaml"} & set(
        json.loads(done.stdout.splitlines()[-1])
    )
    times = []
    for _ in range(3):  # the best of three: other processes share these cores
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ygglight_launcher", *words], capture_output=True, check=False)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


@pytest.mark.skipif(not SCRIPT.exists(), reason="the console script is not installed in this environment")
def test_the_console_script_is_the_launcher() -> None:
    done = subprocess.run([SCRIPT, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"ygglight {ygglight.__version__}"


def test_python_m_ygglight() -> None:
    done = subprocess.run([sys.executable, "-m", "ygglight", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"ygglight {ygglight.__version__}"


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        code, out, _ = run(*words, capsys=capsys)
        assert code == 0
        assert all(f"  {verb} " in out for verb in VERBS)


def test_unknown_verb_gets_suggestions_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("fti", capsys=capsys)
    assert code == 2 and "'fti'; did you mean 'fit'?" in err and "usage:" in err
    code, _, err = run("xyzzy", capsys=capsys)
    assert code == 2 and "did you mean" not in err and "usage:" in err


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("recipes", capsys=capsys)
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["SYSTEM", "VERB", "MODEL", "NEEDS", "RECIPE"]
    assert any(line.split()[:3] == ["adacc", "fit", "smollm2_lora"] for line in lines)
    assert "gguf" in out and "Run one:   ygglight fit --config adacc/" in out


def test_a_reader_that_stops_early_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -u -m ygglight_launcher recipes | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("SYSTEM") and not done.stderr


def test_recipes_of_one_system(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "adacc", capsys=capsys)[0] == 0
    assert "'acc'; there are some for: adacc" in error_of("recipes", "acc", capsys=capsys)


@pytest.mark.parametrize("recipe", recipes.list_recipes(), ids=lambda recipe: recipe.name)
def test_every_recipe_tells_how_it_is_run(recipe: recipes.Recipe) -> None:
    assert recipe.command == f"ygglight {recipe.verb} --config {recipe.name}"
    assert recipe.needs, "a line `# needs: ...` among the opening comments"
    assert recipe.verb in VERBS


@pytest.mark.parametrize("recipe", recipes.list_recipes(), ids=lambda recipe: recipe.name)
def test_every_recipe_parses(recipe: recipes.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the signatures of the classes it names, which are then not built."""
    from ygglight.cli.run import YggLightCLI

    class ParseOnly(YggLightCLI):
        def instantiate_classes(self) -> None: ...

        def _run_subcommand(self, subcommand: str) -> None: ...

    monkeypatch.setattr(sys, "argv", ["ygglight"])
    cli = ParseOnly(recipe.verb, [recipe.verb, "--config", recipe.name])
    strategy = cli.config[recipe.verb].trainer.strategy
    if strategy != "auto":  # a recipe that only trains a draft or a predictor needs no strategy of ours
        assert not isinstance(strategy, str), "the mapping form: a name works only once ygglight is imported"
        assert strategy.class_path.startswith("ygglight.strategies.")
    model, data = cli.config[recipe.verb].model.init_args, cli.config[recipe.verb].data.init_args
    if "tokenizer" in data:  # a decode log holds no text
        assert data.tokenizer == model.get("model", model.get("target"))


def test_a_recipe_is_found_by_name_with_or_without_ending() -> None:
    path = str(recipes.recipes_dir() / "adacc" / "fit_smollm2.yaml")
    assert recipes.resolve("adacc/fit_smollm2.yaml") == recipes.resolve("adacc/fit_smollm2") == path
    words = ["fit", "--config", "adacc/fit_smollm2", "--config=adacc/fit_smollm2", "-c", "adacc/fit_smollm2", "--x=1"]
    assert recipes.resolve_arguments(words) == ["fit", "--config", path, f"--config={path}", "-c", path, "--x=1"]


def test_a_file_wins_over_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "adacc").mkdir()
    (tmp_path / "adacc" / "fit_smollm2.yaml").write_text("trainer: {}\n")
    assert recipes.resolve("adacc/fit_smollm2.yaml") == "adacc/fit_smollm2.yaml"
    for inline in ("{trainer: {}}", "trainer: {}", "a:\n  b: 1"):
        assert recipes.resolve(inline) == inline


def test_an_unknown_recipe_names_the_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    said = error_of("fit", "--config", "adacc/fit_smolm.yaml", capsys=capsys)
    assert "no such file, and no recipe of that name; did you mean 'adacc/fit_smollm2.yaml'" in said
    assert "there are adacc/fit_smollm2.yaml," in error_of("fit", "--config=zzz", capsys=capsys)


def test_recipes_of_a_wheel_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "ygglight"
    (package / "recipes" / "adacc").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "recipes" / "adacc" / "fit_other.yaml").write_text("# ygglight fit --config adacc/fit_other.yaml\n")
    code = "from ygglight_launcher import recipes; print([r.name for r in recipes.list_recipes()])"
    path = os.pathsep.join([str(package.parent), str(Path(recipes.__file__).parents[1])])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "['adacc/fit_other.yaml']"


# -- LightningCLI ----------------------------------------------------------------------------------------------------


def test_fits_a_users_own_module(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("fit", "--config", config, "--model.model=here", capsys=capsys)
    assert code == 0, err
    assert "tokenizer here" in out, "data.tokenizer takes model.model when it is left empty"


def test_a_tokenizer_that_is_given_stays(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tokenizer other" in run("fit", "--config", config, "--data.tokenizer=other", capsys=capsys)[1]


def test_a_module_may_bring_its_own_data(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {key: value for key, value in CONFIG.items() if key != "data"} | {"model": {"class_path": "mine.Own"}}
    Path("own.yaml").write_text(yaml.safe_dump(own))
    assert run("fit", "--config", "own.yaml", capsys=capsys)[0] == 0


def test_a_second_run_into_the_same_folder_passes(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning's own default refuses to overwrite the saved config."""
    logger = (
        '--trainer.logger={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: ., version: "0"}}'
    )
    for _ in range(2):
        assert run("fit", "--config", config, logger, capsys=capsys)[0] == 0
    assert list(Path().rglob("config.yaml"))


def test_print_config(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("fit", "--config", config, "--print_config", capsys=capsys)
    printed = yaml.safe_load(out)
    assert code == 0
    assert (
        printed["trainer"]["strategy"]["class_path"] == "mine.Planner" and printed["model"]["init_args"]["width"] == 2
    )


def test_help_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("fit", "--help", capsys=capsys)
    assert code == 0 and "ygglight" in out and "--trainer.strategy" in out


BUDGET = "--trainer.strategy.memory_budget"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # constructors, whose errors jsonargparse would bury under "Union subtypes"
        ([f"{BUDGET}=much"], "ygglight: error: cannot read the size 'much'"),
        (["--model.width=0"], "ygglight: error: width=0 must be at least 1"),
        # the connector
        (["--trainer.devices=2"], "Planner runs on one device, but the Trainer was given 2: set devices=1, or use"),
        (["--trainer.num_nodes=2"], "num_nodes=2: set num_nodes=1, or use strategy='adacc_ddp'"),
        # strategy names
        (["--trainer.strategy=adac"], "no such strategy; did you mean 'adacc'"),
        (["--trainer.strategy=adacc_deepspeed"], "'adacc_deepspeed' is not offered"),
        (["--trainer.strategy=mine.Planner"], "a class is given as a mapping, {class_path: mine.Planner"),
        # the parser
        (["--bogus=1"], "nrecognized arguments: --bogus=1"),
        (["--model.width=wide"], 'Parser key "model"'),
    ],
)
def test_bad_input_is_one_clear_error(
    config: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # MINE stands for code of ours here: what ygglight raises is told apart by its package.
    import ygglight_launcher

    monkeypatch.setattr(ygglight_launcher, "HOUSE", ("ygglight", "ygglight_launcher", "mine"))
    assert said in error_of("fit", "--config", config, *words, capsys=capsys)


def test_a_bug_keeps_its_traceback(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`None + 1` in a file of ours is a TypeError too, but nobody raised it to tell a user something."""
    import ygglight_launcher

    monkeypatch.setattr(ygglight_launcher, "HOUSE", ("ygglight", "ygglight_launcher", "mine"))
    with pytest.raises(TypeError, match="unsupported operand"):
        main(["fit", "--config", config, f"{BUDGET}=bug"])


def test_errors_of_others_keep_their_traceback(config: str) -> None:
    with pytest.raises(ValueError, match="width=0"):  # `mine` is the user's, not ours
        main(["fit", "--config", config, "--model.width=0"])


def test_the_traceback_can_be_asked_for(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YGGLIGHT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such file"):
        main(["fit", "--config", "nothing"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flag", ["--trainer.callbacks+=theirs.Watch", "--data=theirs.Data", "--model=theirs.Net"])
def test_objects_of_pytorch_lightning_are_named(config: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs.py").write_text(
        "import pytorch_lightning as pl\n"
        "class Watch(pl.Callback): ...\n"
        "class Data(pl.LightningDataModule): ...\n"
        "class Net(pl.LightningModule): ...\n"
    )
    try:
        code, _, err = run("fit", "--config", config, flag, capsys=capsys)
    finally:
        sys.modules.pop("theirs", None)
    assert code == 2 and f"{flag.partition('=')[2]} is built on `pytorch_lightning`" in err


# -- plan, demo, doctor ----------------------------------------------------------------------------------------------


def test_plan_prints_and_writes(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = "--trainer.callbacks={class_path: lightning.pytorch.callbacks.ModelCheckpoint}"
    code, out, err = run("plan", "--config", config, callbacks, "--json", "plan.json", "--max-batch", capsys=capsys)
    assert code == 0, err
    assert "the plan" in out
    assert json.loads(Path("plan.json").read_text()) == {"actions": {}}
    assert sorted(path.name for path in Path().iterdir() if path.name != "__pycache__") == [
        "mine.py", "mine.yaml", "plan.json",
    ]  # fmt: skip


def test_plan_without_max_batch(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "largest" not in run("plan", "--config", config, capsys=capsys)[1]


def test_plan_refuses_early(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs a strategy that plans" in error_of(
        "plan", "--config", config, "--trainer.strategy=auto", capsys=capsys
    )
    assert "no such folder" in error_of("plan", "--config", config, "--json=not/here.json", capsys=capsys)


def test_demo_runs_what_the_table_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "a_demo.py").write_text("def run(short, out): print('demo', short, out.is_dir(), out)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("ygglight.cli.demo.DEMOS", {"one": "a_demo:run", "two": "a_demo:run"})
    assert run("demo", "--out", "pictures", capsys=capsys)[1].count("demo True True pictures/") == 2
    assert "demo False True demo_out/two" in run("demo", "two", "--long", capsys=capsys)[1]
    assert "no demo of 'tow'; did you mean 'two'? (there are: one, two)" in error_of("demo", "tow", capsys=capsys)


def test_doctor_reports(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from ygglight.compat import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "peft" else object())
    code, out, _ = run("doctor", capsys=capsys)
    assert code == 0
    for expected in ("ygglight ", "torch ", "lightning ", "cpu ", "act_codec", "CLUSTERS", "adacc_ddp", "recipes in"):
        assert expected in out
    assert "missing extra lora (peft): pip install 'ygglight[lora]'" in out
    assert out.count("missing extra") == 1
