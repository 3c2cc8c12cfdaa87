import contextlib
import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked_world import run_world
from tetrad.trainer import cli, config


def refusal(schema, *arguments: str) -> str:
    with pytest.raises(config.ConfigError) as error:
        config.parse(schema, list(arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_later_arguments_win_over_the_file_and_the_file_over_defaults(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("out: x\nseed: 3\nschedule: {lr: 0.5}\ndata: {fields: {prompt: '{q}'}}\n")
    cfg = config.parse(config.SFT, [str(file), "seed=4", "data.path=y", "data.fields.response={a}"])
    assert (cfg.out, cfg.seed, cfg.schedule.lr, cfg.batch_size) == ("x", 4, 0.5, 32)
    assert cfg.data == config.Data(path="y", fields={"prompt": "{q}", "response": "{a}"})


@pytest.mark.parametrize("text", ["find: hen plum", "[hi", "${oops}", "0x10", "{a} {b}", "a=b", ""])
def test_text_is_taken_as_it_stands(text) -> None:
    arguments = ["out=x", "model=m", f"prompt={text}", f"prompts.fields.prompt=Q: {text}"]
    cfg = config.parse(config.Generate, arguments)
    assert cfg.prompt == text and cfg.prompts.fields["prompt"] == f"Q: {text}"
    fields = ["data.fields.responses=['{a}', '{b}']", "data.fields.ranks=[1, 2]"]
    cfg = config.parse(config.RM, ["out=x", *fields])
    assert cfg.data.fields == {"responses": ["{a}", "{b}"], "ranks": [1, 2]}


@pytest.mark.parametrize(
    "argument",
    ["minibatch_size=0", "save_every=0", "keep=0", "kl_estimator=k9", "clip_range=-1", "gamma=2",
     "ppo_epochs=0", "sampling.rows_at_once=-1", "ptx_ratio=0", "sampling.temperature=-1"],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_at_the_door(argument) -> None:
    start = argument.replace("=", " is ")
    said = refusal(config.PPO, "out=x", "reward=r", argument)
    assert said.startswith(start) and "it must" in said


def test_the_written_config_reads_back_the_same(tmp_path) -> None:
    cfg = config.parse(config.PPO, ["out=x", "reward=r", "ptx_coef=27.8", "no_eos_score=-1"])
    file = tmp_path / "config.yaml"
    file.write_text(config.as_yaml(cfg))
    assert config.parse(config.PPO, [str(file)]) == cfg


def test_unknown_keys_name_the_nearest(tmp_path) -> None:
    said = refusal(config.PPO, "out=x", "reward=r", "kl_coeff=1")
    assert said == "kl_coeff=1: unknown key kl_coeff; the nearest is kl_coef"
    assert "nearest is parallel.tp" in refusal(config.SFT, "out=x", "parallel.tpp=2")
    assert "set one of its keys" in refusal(config.SFT, "out=x", "parallel=2")
    file = tmp_path / "a.yaml"
    file.write_text("out: x\nschedule: {learning_rate: 1}\n")
    assert "unknown key schedule.learning_rate" in refusal(config.SFT, str(file))


def test_wrong_types_and_missing_values_are_one_line(tmp_path) -> None:
    assert "parallel.tp" in refusal(config.SFT, "out=x", "parallel.tp=two")
    assert refusal(config.PPO, "out=x") == "missing reward; give reward=…"
    assert "no config file nothing.yaml" in refusal(config.SFT, "nothing.yaml")
    file = tmp_path / "a.yaml"
    file.write_text("out: [\n")
    assert str(file) in refusal(config.SFT, str(file))
    file.write_text("- 1\n")
    assert "not a mapping" in refusal(config.SFT, str(file))


COMMAND_OF = {"sft": "sft", "rm": "rm", "ppo": "ppo", "plan": "plan"}


@pytest.mark.parametrize("recipe", sorted(p.name for p in config.RECIPES.glob("*.yaml")))
def test_every_recipe_fits_its_command(recipe) -> None:
    name = next(c for c in COMMAND_OF if c in recipe.removesuffix(".yaml").split("_"))
    schema = getattr(config, cli.COMMANDS[name][1])
    config.parse(schema, [recipe, "out=x", *(["reward=r"] if name == "ppo" else [])])


def readme_commands() -> list[str]:
    text = (Path(__file__).parents[2] / "README.md").read_text().replace("\\\n", " ")
    blocks = text.split("```")[1::2]
    return [line for b in blocks for line in b.splitlines() if line.startswith("tetrad ")]


@pytest.mark.parametrize("line", readme_commands())
def test_the_commands_of_the_readme_fit(line) -> None:
    _, command, *arguments = shlex.split(line)
    config.parse(getattr(config, cli.COMMANDS[command][1]), arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sftt"], "tetrad sftt: unknown command sftt; the nearest is sft"),
        (["sft", "out={tmp}", "kl=1"], "unknown key kl"),
        (["sft", "out={tmp}", "data.path={tmp}/no.jsonl"], "no.jsonl: no such file"),
        (["sft", "out={tmp}", "data.path={tmp}/bad.jsonl"], "bad.jsonl:2: "),
        (["sft", "out={tmp}", "parallel.tp=2"], "tp 2 x pp 1 does not divide the 1 processes"),
        (["ppo", "out={tmp}", "reward=r", "prompts.path={tmp}/a.jsonl"], "model.init is missing"),
        (["generate", "out={tmp}", "model={tmp}", "prompt=hi"], "no checkpoint in"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(arguments, message, tmp_path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "a"}\n')
    (said,) = run_world(1, command_line, [a.format(tmp=tmp_path) for a in arguments])
    assert message in said and len(said.splitlines()) == 1, said


def command_line(arguments: list[str]) -> str:
    """What `tetrad arguments` prints on stderr before it exits with 2."""
    sys.argv = ["tetrad", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    return stderr.getvalue().strip()


def test_slips_in_the_arguments_are_told_before_anything_heavy_is_imported() -> None:
    code = "import sys; from tetrad.trainer import cli; sys.argv[1:] = ['sft', 'kl=1']\n"
    code += "try: cli.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
