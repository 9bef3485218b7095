"""The committed studies: all of them sound, with a price, and running at tiny scale."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hiper_lab import runs, train

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
ABLATIONS = sorted(EXPERIMENTS.glob("ablation_*.yaml"))
RECIPES = sorted(EXPERIMENTS.glob("*_qwen2.5_*.yaml"))
TINY = "experiments/tiny_published.yaml"
SMALL = {
    "iterations": 1, "episodes": 2, "max_turns": 3, "warmup_iterations": 0, "eval_games": 0,
    "max_new_tokens": 8, "minibatch_turns": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _from_the_root(root, monkeypatch):
    monkeypatch.chdir(root)


def test_every_experiment_is_a_valid_configuration(root):
    files = sorted(EXPERIMENTS.glob("*.yaml"))
    assert len(RECIPES) == 4 and len(ABLATIONS) == 7
    for file in files:
        assert runs.configurations(file)


def test_the_tiny_recipe_is_the_published_one_but_for_its_scale():
    (tiny,), (whole,) = (
        runs.configurations(f).values() for f in (TINY, "experiments/alfworld_qwen2.5_1.5b.yaml")
    )
    assert (tiny.credit, tiny.ppo) == (whole.credit, whole.ppo)
    same = ["reward_scale", "critic", "advantage_scale", "epochs", "critic_epochs", "lr_final",
            "max_grad_norm", "minibatch_turns"]  # fmt: skip
    assert [getattr(tiny, name) for name in same] == [getattr(whole, name) for name in same]


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_is_the_same_arms_at_both_scales_and_trains(path):
    whole, tiny = runs.configurations(path), runs.configurations(path, SMALL, TINY)
    assert list(whole) == list(tiny) and len({run.split("-seed")[0] for run in whole}) > 1
    assert {config.model for config in tiny.values()} == {"tiny"}
    # some arm is the published recipe, to compare the others with
    (published,) = runs.configurations("experiments/alfworld_qwen2.5_1.5b.yaml").values()
    assert published in whole.values()
    *_, report = train.train(list(tiny.values())[-1])  # of the last arm, the least like it
    assert report.metrics["policy/trained"] == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_at_tiny_scale(path):
    tiny = SMALL | {"model": "tiny", "critic_model": "", "max_prompt_tokens": 2048}
    (config,) = runs.configurations(path, tiny).values()
    *_, report = train.train(replace(config, env="household", eval_split="seen"))
    assert report.metrics["iteration"] == 1


@pytest.mark.slow
def test_an_ablation_runs_in_the_training_notebook(tmp_path):
    """What the files' headers say, with one of the runs, small."""
    plan = runs.read_sweep("experiments/ablation_heads.yaml", SMALL | {"eval_games": 2}, TINY)
    table = runs.sweep(replace(plan, runs={"two-seed6": plan.runs["two-seed6"]}), tmp_path)
    assert table["arm"].tolist() == ["two"] and (table["state"] == "finished").all()


def test_the_table_of_budgets_is_what_the_command_prints(capsys):
    text = (EXPERIMENTS / "README.md").read_text()
    for command in re.findall(r"^    python -m hiper_lab.runs (budget .*)$", text, re.MULTILINE):
        arguments = [
            str(file) for word in command.split() for file in sorted(Path().glob(word)) or [word]
        ]
        assert runs.main(arguments) == 0
        assert capsys.readouterr().out in text, f"{command} prints something else now"
