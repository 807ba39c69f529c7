"""The learning-rate rule: its anchors, its directions, and the sweep it was tried on."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from veneer.advise.lr import HIGHEST, LOWEST, learning_rate
from veneer.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("params", "settings", "said"),
    [  # what people use, which the rule must come within a factor of 1.6 of
        (7e9, {"rank": 16, "alpha": 32}, 2e-4),  # Axolotl
        (7e9, {"rank": 64, "alpha": 16}, 2e-4),  # QLoRA
        (65e9, {"rank": 64, "alpha": 16}, 1e-4),  # QLoRA
        (8e9, {"rank": 32, "alpha": 32}, 2.86e-4),  # Tinker
        (70e9, {"rank": 32, "alpha": 32}, 1.66e-4 / 1.3),  # Tinker, a little lower
        (1.2e9, {"rank": 64, "alpha": 128}, 3e-4),  # torchtune
        (8e9, {"method": "full"}, 2e-5),  # the usual rate of full fine-tuning
        (22.7e6, {"method": "full", "task": "sequence_classification"}, 5e-5),  # BERT's
    ],
)
def test_near_what_people_use(params: float, settings: dict[str, Any], said: float) -> None:
    assert abs(math.log(learning_rate(params, **settings).value / said)) < math.log(1.7)


def test_directions() -> None:
    def rate(params: float = 8e9, **settings: Any) -> float:
        return learning_rate(params, **settings).value

    sizes = [rate(p) for p in (1e8, 1e9, 8e9, 7e10)]
    assert sizes == sorted(sizes, reverse=True)
    strengths = [rate(alpha=a) for a in (8, 16, 32, 64, 256)]
    assert strengths == sorted(strengths, reverse=True)
    assert rate(rank=4, alpha=32) == rate(rank=64, alpha=32)  # at one alpha the rank does not count
    assert rate(rank=64) < rate(rank=16)  # but alpha is twice the rank when nobody says
    assert rate(rank=16, alpha=32, scaling="rslora") == rate(rank=16, alpha=128)  # by s r
    assert rate(rank=64, alpha=16, scaling="rslora") == rate(rank=64, alpha=128)
    assert rate(method="full") < rate(method="freeze") < rate()
    assert rate(task="sequence_classification") < rate()
    assert rate(steps=50, rows=400) > rate(steps=5000, rows=40_000) == rate()
    assert rate(steps=25, rows=40) < rate()


def test_the_reason_names_every_factor() -> None:
    value, reason = learning_rate(135e6, 64, 128, "rslora", task="sequence_classification", steps=20, rows=400)
    for word in ("2.0e-4 for 8 B", "135 M", "alpha 128 x sqrt(r = 64)", "classifier", "20 steps"):
        assert word in reason
    assert LOWEST <= value <= HIGHEST


def test_rates_stay_in_bounds() -> None:
    assert learning_rate(1e6, alpha=0.01).value == HIGHEST
    assert learning_rate(1e15, alpha=1e6, method="full").value == LOWEST


@pytest.mark.parametrize(
    "wrong",
    [{"params": 0}, {"params": float("nan")}, {"rank": 0}, {"alpha": -1}, {"scaling": "rslor"}, {"combine": "door"},
     {"method": "fool"}, {"rows": 0}, {"steps": -1}],
    ids=str,
)  # fmt: skip
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no learning rate"):
        learning_rate(**{"params": 8e9, **wrong})


def sweep() -> tuple[Any, dict[str, dict[float, float]]]:
    """The recorded sweep: setting -> rate -> held-out loss, mean over seeds."""
    spec = importlib.util.spec_from_file_location("learning_rate_benchmark", ROOT / "benchmarks" / "learning_rate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in json.loads((ROOT / "benchmarks" / "results" / "learning_rate.json").read_text()):
        found[row["setup"]][row["rate"]].append(row["loss"])
    return module, {name: {r: sum(v) / len(v) for r, v in rates.items()} for name, rates in found.items()}


def test_the_rule_is_near_the_optimum_of_the_recorded_sweep() -> None:
    """Within a factor of 3 of the best rate in every setting, and within 0.13 of its loss where there are 40 steps."""
    module, points = sweep()
    rows = json.loads((ROOT / "benchmarks" / "results" / "learning_rate.json").read_text())
    assert len({row["setup"] for row in rows}) >= 20
    for setup in module.FULL:
        rates = points[setup.name]
        best, least = module.best(rates)
        rule = module.rule(setup)
        near = min(rates, key=lambda r: abs(math.log(r / rule)))
        assert 1 / 3 < rule / best < 3, (setup.name, rule, best)
        if setup.batch < 64:  # those are 11 steps long
            assert rates[near] - least < 0.13, (setup.name, rates[near], least)


def test_the_findings_the_rule_quotes() -> None:
    module, points = sweep()
    best = {name: module.best(rates)[0] for name, rates in points.items()}
    assert max(best[f"r{r} a32"] for r in (4, 16, 64, 128)) / min(best[f"r{r} a32"] for r in (4, 16, 64, 128)) < 1.1
    slope = math.log(best["r128 a256"] / best["r16 a8"]) / math.log(256 / 8)
    assert slope == pytest.approx(-0.53, abs=0.02)
    assert best["r16 a32"] / best["full"] == pytest.approx(10.1, abs=0.1)
    assert best["freeze last 2"] / best["r16 a32"] == pytest.approx(0.53, abs=0.01)
    assert best["r16 a32 dora"] / best["r16 a32"] == pytest.approx(1.2, abs=0.05)
    least = {name: min(rates.values()) for name, rates in points.items()}
    assert least["r16 a32"] < least["r16 a32 q,k,v,o"]  # all layers beat attention alone
    gap = {batch: least[f"r16 a32{batch}"] - least[f"full{batch}"] for batch in ("", " batch 64")}
    assert 0 < gap[""] < gap[" batch 64"]  # large batches hurt the adapter more
