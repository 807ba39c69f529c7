"""Loading: folders are recognised, adapters are proved to act, and what cannot be right is refused in plain words."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from veneer.core.model import activate, adapters, disabled
from veneer.errors import CheckpointError, ProofFailed
from veneer.infer.load import Ready, load, source_of_folder
from veneer.infer.sampling import Sampling
from veneer.prove.answers import Subject
from veneer.prove.canary import canary_of
from veneer.prove.proof import Check, Proof


def quiet(line: str) -> None:
    pass


def proved(ready: Ready, folder: Path, name: str = "a") -> None:
    """Leave a proof with a canary beside the adapter, as a run does."""
    inputs = [{"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}]
    canary = canary_of(Subject.of(ready.model, name, inputs), ready.tokenizer)
    Proof([Check("P4", "Effect", True, "It differs.")], canary=canary, adapter="default").save(folder)


def test_an_adapters_folder_names_its_base_and_a_models_folder_is_one(
    tiny_folder: Path, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter("sql.v2")
    source = source_of_folder(str(folder))
    assert (source.base, source.adapter, source.name, source.task) == (
        str(tiny_folder), folder, "sql_v2", "causal_lm",
    )  # fmt: skip
    base = source_of_folder(str(tiny_folder))
    assert base.adapter is None and base.name is None
    assert source_of_folder(str(folder), base="other").base == "other"


def test_several_adapters_share_one_base(ready: Ready) -> None:
    assert adapters(ready.model) == ("a", "b")
    assert all("no canary to replay; it changes the base's logits" in said for said in ready.evidence.values())
    prompt = ready.prompt([{"role": "user", "content": "hello"}])
    base, a, b = ready.engine.generate([prompt] * 3, Sampling(max_tokens=8), [None, "a", "b"])
    assert len({tuple(x.tokens) for x in (base, a, b)}) == 3
    with disabled(ready.model):
        assert ready.engine.generate([prompt], Sampling(max_tokens=8))[0].tokens == base.tokens


def test_the_prompt_is_what_the_renderer_trains_with(ready: Ready) -> None:
    text = ready.tokenizer.decode(ready.prompt([{"role": "user", "content": "hi"}]))
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ready.engine.stop_ids == frozenset(ready.task.ends)


def test_a_canary_is_replayed_and_another_model_is_found_out(
    ready: Ready, make_adapter: Callable[..., Path], tiny_folder: Path
) -> None:
    folder = tiny_folder.parent / "a"
    proved(ready, folder)
    again = load([source_of_folder(str(folder))], say=quiet)
    assert again.evidence["a"].startswith("2 prompts are answered as when the adapter was proved")
    shutil.copy(folder / "proof.json", make_adapter("b", seed=9) / "proof.json")
    with pytest.raises(ProofFailed, match="b: The answers are not those of the proved adapter"):
        load([source_of_folder(str(tiny_folder.parent / "b"))], say=quiet)


def test_an_adapter_that_does_nothing_is_refused(make_adapter: Callable[..., Path]) -> None:
    with pytest.raises(ProofFailed, match="changes nothing: the model answers as its base does"):
        load([source_of_folder(str(make_adapter("dead", size=0.0)))], say=quiet)


def test_names_that_lead_nowhere_are_answered_in_a_line(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such model: no/where-at-all"):
        load([source_of_folder("no/where-at-all")], say=quiet)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        load([source_of_folder(str(tmp_path / "empty"))], say=quiet)


def test_a_base_that_was_cut_short_is_named(tiny_folder: Path) -> None:
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:900])
    with pytest.raises(CheckpointError, match="the model cannot be read: ") as caught:
        load([source_of_folder(str(tiny_folder))], say=quiet)
    assert caught.value.where == str(tiny_folder)


def test_a_base_of_its_own_template_and_system(tiny_folder: Path, make_adapter: Callable[..., Path]) -> None:
    source = dataclasses.replace(source_of_folder(str(make_adapter("a"))), system="Be brief.")
    ready = load([source], say=quiet)
    assert "Be brief." in ready.tokenizer.decode(ready.prompt([{"role": "user", "content": "hi"}]))


def test_asking_leaves_the_active_adapter_as_it_was(ready: Ready) -> None:
    activate(ready.model, "b")
    prompt = ready.prompt("once")
    before = ready.engine.generate([prompt], Sampling(max_tokens=5))[0].tokens
    ready.engine.generate([prompt, prompt], Sampling(max_tokens=5), ["a", None])
    assert ready.engine.generate([prompt], Sampling(max_tokens=5))[0].tokens == before
