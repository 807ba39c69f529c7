"""The page about a run: whole, self-contained, harmless, and made for every way in which a run can end."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from veneer.app.markup import Html, escape, join, tag
from veneer.app.report import write_report
from veneer.app.report.change import stacks_of
from veneer.app.report.outcome import outcome
from veneer.app.report.page import SECTIONS
from veneer.app.report.record import read
from veneer.app.svg import LEVELS, Heat, Series, bars, curves, heat_map, level, scale, smooth, thin, ticks
from veneer.train.run import Run
from veneer.train.settings import resolve

MODULES = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
VOID = {"meta", "input", "br", "link"}


# ---------------------------------------------------------------- a run, as the loop leaves one


def proof(passed: bool = True) -> dict[str, Any]:
    checks = [
        {
            "id": "P4",
            "title": "Effect",
            "passed": True,
            "statement": "It differs.",
            "figures": {"apart": 0.62},
            "brief": "",
        },
        {
            "id": "P6",
            "title": "Mixing",
            "passed": passed,
            "statement": "It adds up.",
            "figures": {"nan": "nan"},
            "brief": "",
        },
    ]
    left_out = [{"id": "P5", "title": "Merge", "reason": "The base is packed."}]
    return {
        "passed": passed,
        "checks": checks,
        "left_out": left_out,
        "canary": {"rows": [{}, {}]},
        "adapter": "default",
    }


def log_steps(run: Run, steps: int, val: bool = True, layers: int = 4) -> None:
    source = random.Random(0)
    for step in range(steps + 1):
        if step:
            loss = 2 + 1.5 * math.exp(-4 * step / steps) + source.gauss(0, 0.1)
            row = {"step": step, "loss": loss, "lr": 1e-3 * (1 - step / steps), "gnorm": 1 + source.random()}
            run.log_metrics(
                {**row, "tokens_per_second": 600.0, "trained_tokens_per_second": 250.0, "memory_bytes": 2e9}
            )
        if val and step % 10 == 0:
            run.log_metrics({"step": step, "val_loss": 3.5 - step / steps, "accuracy": step / steps})
        if step and step % 15 == 0:
            dw = {f"model.layers.{i}.{m}": step * (i + 1) / 100 for i in range(layers) for m in MODULES}
            run.log_metrics({"step": step, "dw": dw})


def log_facts(run: Run) -> None:
    run.log_event({"event": "model", "text": "a model", "trainable": 4096, "frozen": 43168})
    run.log_event({"event": "plan", "text": "60 steps", "per_epoch": 20})
    run.log_event({"event": "warning", "step": 12, "text": "7 over 256 tokens dropped"})
    pair = {"prompt": "list the files", "expected": "ls", "before": "I would be glad to", "after": "ls"}
    run.log_event({"event": "samples", "samples": [pair] * 8})
    histogram = [[1, 10, 3], [11, 20, 9], [21, 30, 1]]
    facts = {"rows": 13, "samples": 13, "tokens": 200, "trained_tokens": 80, "counts": {"dropped": 7}}
    lengths = {"longest": 28, "p50": 14, "p99": 28, "histogram": histogram}
    preview = [[["user: hi\nbot: ", False, 4], ["hello<end>", True, 2]]]
    split = {"validation_ids": ["a", "b"]}
    run.write_json("data.json", {"split": split, "train": {**facts, "lengths": lengths}, "preview": preview})


Make = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    def make(
        status: str = "done", *, val: bool = True, steps: int = 60, proved: bool | None = True, **info: Any
    ) -> Run:
        settings = {"model": "some/model", "data": "rows.jsonl", "max_len": 25, "lr": 1e-3, "steps": steps}
        run = Run.create(resolve(mapping=settings), root=tmp_path)
        log_facts(run)
        log_steps(run, steps, val)
        if proved is not None:
            run.write_json("proof.json", proof(proved))
        argv = ["/usr/bin/veneer", "train", "some/model", "my rows.jsonl"]
        run.update(status=status, ended=run.info["started"] + 135, device="cpu, 1 thread", argv=argv, **info)
        run.close()
        return run

    return make


class Page(HTMLParser):
    """A page taken apart; raises where tags do not close in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.open, self.tags, self.attributes = source, [], [], []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, key: str) -> list[str]:
        return [value or "" for name, value in self.attributes if name == key]


def page_of(run: Run | Path) -> Page:
    return Page(write_report(run if isinstance(run, Path) else run.folder).read_text("ascii"))


# ---------------------------------------------------------------- the page as a whole


def test_the_page_stands_beside_the_run(make_run: Make) -> None:
    run = make_run()
    path = write_report(str(run.folder))
    assert path == run.folder / "report.html"
    once = path.read_bytes()
    assert write_report(run.folder).read_bytes() == once  # made of the run alone, so it can be made again


def test_every_part_is_there(make_run: Make) -> None:
    run = make_run()
    sorted_out = {"classes": ["cat", "dog"], "counts": [[3, 1], [0, 4]]}  # a classifier's run has this one, too
    run.path("detail.json").write_text(json.dumps({"confusion": sorted_out}))
    run.log_event({"event": "pictures", "step": 0, "file": "gone.png", "prompts": ["a dog"]})
    run.close()
    page = page_of(run)
    assert [id for id, _, _ in SECTIONS if id not in page.ids] == []
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.values("href")} <= set(page.ids)
    assert set(page.values("aria-labelledby")) <= set(page.ids)
    assert page.values("lang") == ["en"]
    for words in (
        "Held-out loss fell from 3.500 to 2.500 in 60 steps. All 2 proofs hold.", "lora on model", "2 min 15 s",
        "8.7 % of all parameters", "3 passes over the data", "list the files", "I would be glad to", "2 more",
        "The base is packed.", "Its answers to 2 prompts are kept", "The largest is 2.4, in model.layers.3.",
        "2 rows were held out", "40.0 %", "7 dropped", "Dashed: max_len 25.", "7 over 256 tokens dropped",
        "Longest sample.", "veneer train some/model 'my rows.jsonl'", "config.yaml", "Accuracy", "torch",
    ):  # fmt: skip
        assert words in page.text, words


def test_nothing_is_loaded_from_anywhere(make_run: Make) -> None:
    page = page_of(make_run())
    outside = re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"http://www\.w3\.org/2000/svg", "", page.source))
    assert [url for url in outside if not url.startswith("//")] == []
    assert not re.search(r"url\(|@import|@font-face", page.source)
    assert not page.values("src") and "link" not in page.tags and "iframe" not in page.tags
    assert all(link.startswith("#") for link in page.values("href"))


def test_only_our_script_may_run(make_run: Make) -> None:
    page = page_of(make_run())
    script = re.search(r"<script>(.*?)</script>", page.source, re.DOTALL)
    assert script and page.tags.count("script") == 1
    policy = next(value for value in page.values("content") if "default-src" in value)
    assert base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy


def test_pictures_and_tables_speak(make_run: Make) -> None:
    page = page_of(make_run())
    pictures = re.findall(r"<svg [^>]*>", page.source)
    assert pictures and all(('role="img"' in p and "aria-label=" in p) or "aria-hidden" in p for p in pictures)
    assert "Training loss goes from" in " ".join(page.values("aria-label"))
    assert "Mean by module: q_proj" in " ".join(page.values("aria-label"))
    assert page.tags.count("th") > 10 and set(page.values("scope")) == {"row", "col"}


def test_the_page_works_in_both_themes(make_run: Make) -> None:
    source = page_of(make_run()).source
    assert "@dark" not in source
    light = re.search(r":root \{(.*?)\n\}", source, re.DOTALL)
    dark = re.search(r":root\[data-theme=dark\] \{(.*?)\}", source, re.DOTALL)
    assert light and dark
    colours = {
        theme: dict(re.findall(r"--(\w+): (#\w{6})", found))
        for theme, found in (("light", light[1]), ("dark", dark[1]))
    }
    assert colours["light"].keys() == colours["dark"].keys()
    pairs = [("ink", "ground"), ("ink", "card"), ("soft", "ground"), ("soft", "card"), ("good", "goodground")]
    pairs += [
        ("bad", "badground"),
        ("warn", "warnground"),
        ("markink", "mark"),
        ("train", "card"),
        ("ink", "badground"),
    ]
    pairs += [("soft", "line")]
    for theme, found in colours.items():
        for letters, ground in pairs:
            assert contrast(found[letters], found[ground]) >= 4.5, f"{theme}: {letters} on {ground}"


def contrast(one: str, two: str) -> float:
    """WCAG 2, relative luminance."""

    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(two)))
    return (light + 0.05) / (dark + 0.05)


# ---------------------------------------------------------------- how a run can end


@pytest.mark.parametrize(
    "options,badge,sentence",
    [
        ({}, "Done", "Held-out loss fell from 3.500 to 2.500 in 60 steps. All 2 proofs hold."),
        ({"proved": None}, "Done", "Held-out loss fell from 3.500 to 2.500 in 60 steps. Nothing was proved."),
        ({"proved": False}, "Not proved", "Training ended, but its result does not hold: proof P6 failed."),
        ({"status": "failed", "proved": None}, "Failed", "The run failed at step 60 of 60."),
        ({"status": "stopped", "proved": None}, "Stopped", "The run was stopped at step 60 of 60, and can go on."),
        ({"status": "training", "proved": None}, "Training", "The run has not ended; it is at step 60 of 60."),
        (
            {"status": "training", "proved": None, "pid": 0x3FFFFF},
            "Dead",
            "The run's process vanished at step 60 of 60.",
        ),
    ],
)
def test_the_outcome_comes_first(make_run: Make, options: dict[str, Any], badge: str, sentence: str) -> None:
    run = make_run(**options)
    found = outcome(read(run.folder))
    assert (found.badge, found.sentence) == (badge, sentence)
    page = page_of(run)
    assert page.tags.index("h1") < page.tags.index("section")
    assert sentence in page.text


def test_a_run_without_held_out_rows_says_what_it_cannot_know(make_run: Make) -> None:
    page = page_of(make_run(val=False))
    assert re.search(r"Training loss fell from 3\.\d+ to 2\.\d+; nothing was held out to check it on\.", page.text)
    assert "over-fitting would not show here" in page.text


def test_a_run_that_learned_nothing_is_no_success(make_run: Make) -> None:
    run = make_run()
    run.log_metrics({"step": 60, "val_loss": 9.0})
    rows = [json.dumps({**row, "val_loss": 3.0 + row["step"]}) for row in run.metrics("val_loss")]
    run.close()
    run.path("metrics.jsonl").write_text("\n".join(rows))
    found = outcome(read(run.folder))
    assert (found.tone, found.badge) == ("warn", "No gain")


@pytest.mark.parametrize(
    "error",
    [
        "the loss is nan at step 3\n  - row rows.jsonl:88\nat: runs/a\ndo: lower lr",
        {"what": "the loss is nan at step 3", "where": "runs/a", "fix": "lower lr", "problems": ["row rows.jsonl:88"]},
    ],
)
def test_a_failure_says_what_where_and_what_to_do(make_run: Make, error: Any) -> None:
    page = page_of(make_run("failed", proved=None, error=error))
    assert "What the loss is nan at step 3 row rows.jsonl:88 Where runs/a Do lower lr" in page.text
    assert "alert" in page.values("role")
    assert "The run failed before there was anything to prove." in page.text


def test_a_failed_proof_is_told_once_in_its_own_words(make_run: Make) -> None:
    page = page_of(make_run("failed", proved=False, error="the result is not what it claims to be"))
    assert "What It adds up. Where proof P6, Mixing" in page.text
    assert "1 of 2 hold" in page.text and "Fails" in page.text


@pytest.mark.parametrize(
    "name", ["run.json", "config.yaml", "metrics.jsonl", "events.jsonl", "data.json", "proof.json"]
)
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "garbage", "another shape"])
def test_whatever_is_damaged_the_rest_is_shown(make_run: Make, name: str, damage: str) -> None:
    run = make_run()
    path = run.path(name)
    content = path.read_text()
    damages = {"empty": "", "half": content[: len(content) // 2], "garbage": "\x00{]", "another shape": "[1, 2]\n3\n"}
    path.unlink() if damage == "gone" else path.write_text(damages[damage])
    page = page_of(run)
    held = {"metrics.jsonl": "proofs", "proof.json": "learning"}.get(name, "learning")
    assert held in page.ids


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    assert "Veneer report" in page_of(tmp_path).source


def test_losses_that_are_no_numbers_are_left_out_of_the_curve_and_named_in_the_table(make_run: Make) -> None:
    run = make_run("failed", proved=None)
    run.log_metrics({"step": 61, "loss": float("nan"), "lr": 1e-3})
    run.close()
    page = page_of(run)
    assert "not a number" in page.text
    assert not re.search(r'd="[^"]*(nan|inf)', page.source)


# ---------------------------------------------------------------- text from outside


NASTY = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}\u2028\u00e9\U0001f600<!--"


def test_text_from_a_run_can_only_become_letters(make_run: Make) -> None:
    run = make_run("failed", proved=None, error={"what": NASTY, "where": NASTY, "fix": NASTY, "problems": [NASTY]})
    run.update(name=NASTY, device=NASTY, argv=[NASTY, NASTY], versions={NASTY: NASTY})
    run.log_event({"event": NASTY, "text": NASTY})
    run.log_event({"event": "samples", "samples": [dict.fromkeys(("prompt", "before", "after", "expected"), NASTY)]})
    run.log_metrics({"step": 60, "dw": {f"layers.0.{NASTY}": 1.0, f"{NASTY}": 2.0}})
    run.log_metrics({"step": 60, "val_loss": 1.0, NASTY: 0.5})
    check = {"id": NASTY, "title": NASTY, "passed": False, "statement": NASTY, "figures": {NASTY: 1.0}}
    run.write_json("proof.json", {"checks": [check], "left_out": [{"id": NASTY, "title": NASTY, "reason": NASTY}]})
    lengths = {"histogram": [[1, 9, 1]], "p50": 1, "longest": 9}
    facts = {
        "tokens": 9,
        "trained_tokens": 3,
        "counts": {NASTY: 1},
        "lengths": lengths,
        "preview": [[[NASTY, True, 1]]],
    }
    run.write_json("data.json", facts)
    config = run.path("config.yaml").read_text().replace('"rows.jsonl"', json.dumps(NASTY))
    run.path("config.yaml").write_text(config)
    run.close()
    page = page_of(run)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 20
    assert page.source.isascii()


def test_tag_escapes_text_and_keeps_markup() -> None:
    assert tag("td", "a < b", tag("b", "&"), None) == "<td>a &lt; b<b>&amp;</b></td>"
    assert tag("a", href='"x"', data_x=1, hidden=True, title=None, class_="y") == (
        '<a href="&quot;x&quot;" data-x="1" hidden class="y"></a>'
    )
    assert join(["<", Html("<br>"), 3], ", ") == "&lt;, <br>, 3"
    assert isinstance(tag("b", "x"), Html) and isinstance(escape(3), Html)


# ---------------------------------------------------------------- plots


def test_a_long_run_has_a_small_page_with_all_its_peaks() -> None:
    source = random.Random(0)
    points = [(float(k), 2 + source.random()) for k in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    kept = thin(points)
    assert len(kept) <= 510
    assert {points[0], points[-1], (54_321.0, 9.0), min(points, key=lambda p: p[1])} <= set(kept)
    assert kept == sorted(kept)
    assert len(curves([Series("loss", points)], label="x")) < 60_000


def test_smoothing_keeps_a_constant_and_stays_within_the_values() -> None:
    assert {round(y, 9) for _, y in smooth([(float(k), 3.0) for k in range(100)])} == {3.0}
    source = random.Random(0)
    points = [(float(k), source.random()) for k in range(100)]
    assert all(0 <= y <= 1 for _, y in smooth(points))
    assert smooth(points)[0] == points[0]


@pytest.mark.parametrize("low,high", [(0, 1), (2.1, 3.7), (0, 141), (1e-6, 9e-6), (-5, 5), (3, 3)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found and all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
    assert all(len(f"{tick:g}") <= 6 for tick in found)


def test_a_few_giants_make_the_scale_logarithmic() -> None:
    assert scale([1.0, 1.1, 0.9, 500.0]).log
    assert not scale([1.0, 1.1, 0.9, 5.0]).log
    giants = [(float(k), 1000.0 if k == 3 else 1.0) for k in range(9)]
    assert "1,000" in curves([Series("norm", giants)], label="x")


def test_plots_of_nothing_and_of_one_point() -> None:
    assert "Nothing was recorded" in curves([Series("loss", [])], label="x")
    assert 'class="dots train"' in curves([Series("loss", [(1.0, 2.0)])], label="x")
    assert "<rect" in bars([0, 10], [0], label="x", x_name="tokens")


def test_heat_levels_rise_with_the_value() -> None:
    found = [level(k / 100, 1.0) for k in range(101)]
    assert found == sorted(found) and len(set(found)) == LEVELS
    heat = Heat(["q", "v"], ["0"], [[0.0], [None]], 0.0, lambda i, j: "cell")
    assert heat.levels() == "0."
    assert 'class="qnone"' in heat_map(heat, label="x")


def test_layers_are_laid_out_by_stack_block_and_module() -> None:
    names = [f"{side}.block.{i}.layer.{k}.q" for side in ("encoder", "decoder") for i in (0, 1, 10) for k in (0, 1)]
    stacks = stacks_of([*names, "lm_head"])
    assert [(s.name, s.modules, s.blocks) for s in stacks] == [
        ("encoder.block", ["layer.0.q", "layer.1.q"], ["0", "1", "10"]),
        ("decoder.block", ["layer.0.q", "layer.1.q"], ["0", "1", "10"]),
        ("other layers", ["lm_head"], [""]),
    ]
    assert stacks[0].sites[1] == [f"encoder.block.{i}.layer.1.q" for i in (0, 1, 10)]
    assert stacks_of(["0", "2"])[0].sites == [["0", "2"]]


def test_a_wide_model_still_fits_a_page(make_run: Make) -> None:
    run = make_run()
    run.log_metrics({"step": 60, "dw": {f"model.layers.{i}.{m}": 1.0 for i in range(126) for m in MODULES}})
    run.close()
    page = page_of(run)
    assert len(page.source) < 600_000
    assert "model.layers.125.mlp.down_proj" in page.source
