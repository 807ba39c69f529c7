"""Every example runs, and what it claims holds: the claims are assertions inside it.

They run in this process, one after the other, so that torch is imported once and the tiny model is made once. A new
file in examples/ is under this test by existing.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in ("base.py", "pictures.py"))

TOLD = {  # a line that each must print, besides running to its end
    "diffusion_fashion.py": "with the adapters off the base paints the same pictures, bit for bit",
    "seed_000_variants.py": "the base answers as on the first day, bit for bit",
    "seed_001_lora_linear.py": "merge=False: A and B get no gradient at all",
    "seed_002_counts.py": "16,384 trained, 1.56 %",
    "seed_003_merge_and_save.py": "the same logits, bit for bit",
    "seed_003_monitoring.py": "|B - B0|",
    "seed_003_parameters.py": "all nine cells are the document's",
    "seed_003_peft.py": "trainable params: 14,336 || all params: 121,664 || trainable%: 11.7833",
    "seed_003_switching.py": "every row answers as if its adapter alone were active",
    "seed_003_trainer.py": "the same losses to the last digit",
    "seed_004_decomposition.py": "dW of rank 1, LoRA of rank 1: 100.0 %",
    "vision_classify.py": "every adapted model gives the base's features, bit for bit",
    "vision_language.py": "trained on the answers' tokens alone",
    "vision_detect.py": "the detector answers as before it, bit for bit",
}
NEEDS = {
    "seed_003_trainer.py": "accelerate",
    "seed_003_monitoring.py": "accelerate",
    "vision_classify.py": "PIL",
    "vision_detect.py": "pycocotools",
    "vision_language.py": "PIL",
    "diffusion_fashion.py": "diffusers",
}


def run(name: str, *arguments: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    before = sys.argv, list(sys.path)
    sys.argv, sys.path = [name, *arguments], [str(EXAMPLES), *sys.path]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a script of a user's has no filter that makes warnings errors
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv, sys.path = before[0], before[1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_and_holds(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(name)
    assert TOLD[name] in capsys.readouterr().out


def test_the_trainer_of_transformers_itself(capsys: pytest.CaptureFixture[str]) -> None:
    run("seed_003_trainer.py", "--plain")
    assert "the same losses to the last digit" in capsys.readouterr().out


def test_every_document_has_its_example() -> None:
    assert {name.split("_")[1] for name in SCRIPTS if name.startswith("seed_")} == {"000", "001", "002", "003", "004"}
    script = (EXAMPLES / "seed_003_peft.py").read_text()
    assert "from veneer.peft import LoraConfig, get_peft_model" in script
    assert not any(line.startswith("from peft") for line in script.splitlines())


@pytest.mark.slow
def test_on_a_real_model(real_smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("seed_003_peft.py", "--model", str(real_smollm2))
    assert "trainable params: 1,843,200 || all params: 136,358,208 || trainable%: 1.3517" in capsys.readouterr().out
