"""The demo's report, from the files of a run that is made up here."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tetrad.trainer import config, report

NASTY = 'a <script>alert("1")</script> $\\frac$\n \u0017'  # markup, mathematics, control
POLICIES = ("base", "sft", "ppo", "ppo_ptx")


def made_up_run(out: Path, measured: bool) -> Path:
    """Two steps of each stage and two prompts; nothing but gold `measured`, or everything."""
    win_rate, loss, kl = (0.91, 1.5, 9.44) if measured else (None, "nan", "inf")
    stages = {
        "base": config.Pretrain(out="base"),
        "sft": config.SFT(out="sft"),
        "rm": config.RM(out="rm"),
        "ppo": config.PPO(out="ppo", reward="rm"),
        "ppo_ptx": config.PPO(out="ppo_ptx", reward="rm", ptx_coef=0.3),
    }
    for name, stage in stages.items():
        rows = [
            {"step": i, "loss": loss, "accuracy": 0.5, "score": loss, "kl": kl} for i in range(2)
        ]
        (out / name).mkdir(parents=True)
        (out / name / "config.yaml").write_text(config.as_yaml(stage))
        (out / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (out / name / "summary.json").write_text('{"steps": 2}')
    (out / "config.yaml").write_text(
        config.as_yaml(config.Demo(seed=7, scale=1.0 if measured else 0.05))
    )
    gold = {"base": 0.12, "sft": 0.53, "ppo": 0.87, "ppo_ptx": 0.81}
    summary = {
        "seconds": 125.4,
        "world_size": 2,
        "rm": {"heldout_accuracy": 0.764},
        "gold": gold,
        "win_rate_vs_sft": {name: win_rate for name in POLICIES if name != "sft"},
        "kl": {"ppo": kl, "ppo_ptx": kl},
        "pretrain_loss": {name: loss for name in POLICIES},
    }
    (out / "summary.json").write_text(json.dumps(summary))
    answers = [
        {"prompt": "name a bird.\n", "kind": kind, "answer": "hen."}
        | {name: {"response": NASTY, "gold": gold[name]} for name in POLICIES}
        for kind in ("brainstorm", "closed_qa")
    ]
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = made_up_run(tmp_path_factory.mktemp("run"), measured=True)
    assert report.write(out) == out / "report.html"
    return out


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return (run / "report.html").read_text()


def text(page: str) -> str:
    """What a reader sees, spaces evened out."""
    visible = re.sub("<[^>]*>", " ", re.sub("<style>.*?</style>", "", page, flags=re.S))
    return " ".join(visible.split())


def test_the_page_needs_no_other_file_and_no_script(page: str) -> None:
    assert "<script" not in page and "url(" not in page and "@import" not in page
    sources = re.findall(r'(?:src|href)="([^"]{,22})', page)
    assert len(sources) == 4 and set(sources) == {"data:image/png;base64,"}


def test_what_a_model_wrote_is_text(page: str) -> None:
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in page
    assert "\u0017" not in page and "�" in page
    assert "$\\frac$<span" in page  # then the newline, as a sign


def test_tags_are_closed_and_images_described(page: str) -> None:
    class Checked(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "img":
                assert dict(attrs)["alt"]
            elif tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checked = Checked()
    checked.feed(page)
    assert not checked.open


def test_the_headline_numbers(page: str) -> None:
    seen = text(page)
    assert "0.12 → 0.53 → 0.87 PPO-ptx 0.81" in seen
    assert "PPO wins against SFT 91 %" in seen and "agrees with labelers 76 %" in seen
    assert "KL from SFT to PPO 9.4 nats" in seen and "too short" not in seen
    assert "Time 2 min 5 s all stages, on 2 processes" in seen


def test_the_command_that_repeats_the_run(page: str) -> None:
    command = "torchrun --nproc-per-node 2 --no-python tetrad demo out=runs/demo seed=7"
    assert f"<pre>{command}</pre>" in page


def test_figures_are_files_too(run: Path) -> None:
    drawn = {p.stem: p.read_bytes() for p in (run / "figures").iterdir()}
    assert set(drawn) == {"overview", "gold", "ppo", "pretraining", "stages"}
    width, height = (int.from_bytes(drawn["overview"][i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1600, 500)  # what the README has room for


def test_a_run_that_could_not_measure_everything(tmp_path: Path) -> None:
    page = report.write(made_up_run(tmp_path, measured=False)).read_text()
    seen = text(page)
    assert "PPO wins against SFT n/a PPO-ptx n/a; base n/a" in seen
    assert "KL from SFT to PPO n/a" in seen and "Alignment tax of PPO n/a" in seen
    assert not re.search(r"\b(nan|inf|None)\b", seen)
    assert "scale=0.05 : too short to learn much" in seen
