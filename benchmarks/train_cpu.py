"""The demo's model trained on two CPU cores, beside PEFT with transformers' Trainer: real tokens a second, learning.

    python benchmarks/train_cpu.py [--steps 60] [--json FILE] [CANDIDATE ...]

SmolLM2-135M-Instruct in fp32 learns the demo's shell commands: 4 rows a step, answers trained, r = 16 on all linears,
one learning rate, schedule and tokenisation for all.

    trainer        PEFT in transformers' Trainer: rows in random order, padded, loss from whole logits
    by length      the same with Trainer's grouping of rows by length, its best setting here
    plain step     veneer train with padding, plain blocks and the loss from whole logits; it sorts rows by length
    fused          veneer train with fused blocks, which keep less and are a little slower at this width on a CPU
    veneer         veneer train as it is: no padding, the loss on trained tokens only, blocks as its rule says: plain

Every candidate is a process of its own with two threads that waits for its turn; they take their steps one at a time,
in turn, so that what else the machine does meets all alike. A ratio is the median over rounds of tokens per second of a
step by that of `trainer` in the same round. Tokens are those of the rows, never padding. The seconds are those of a
step: batch, forward, backward, optimiser and the logging of each loop; evaluations are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "train_cpu.json"
ROWS, RANK, RATE, WARMUP, LONGEST = 4, 16, 1.6e-3, 4, 256
SYSTEM = "Answer with one shell command."
CANDIDATES = ("trainer", "by length", "plain step", "fused", "veneer")


class Turns:
    """The child's side: wait for a turn, measure it, say what came of it."""

    def __init__(self) -> None:
        self.begun = self.cpu = 0.0

    def say(self, **row: Any) -> None:
        print(json.dumps(row), file=sys.__stdout__, flush=True)

    def wait(self) -> None:
        self.say(ready=True)
        if not sys.stdin.readline():
            raise SystemExit
        self.restart()

    def restart(self) -> None:
        self.begun, self.cpu = time.perf_counter(), time.process_time()

    def took(self, **row: Any) -> None:
        seconds, cpu = time.perf_counter() - self.begun, time.process_time() - self.cpu
        self.say(seconds=seconds, cpu=cpu, **row)


# ------------------------------------------------------------------ Veneer


def veneer_run(name: str, args: argparse.Namespace, turns: Turns) -> None:
    import veneer
    from veneer.assets import data_file, model_folder
    from veneer.tasks import causal_lm
    from veneer.tasks.causal_lm import CausalLM
    from veneer.train import prepare

    causal_lm.SHOWN_TOKENS = 1  # answers are not what is measured
    if name == "plain step":
        prepare.tell_attention = lambda *_: False
        CausalLM.prepare = lambda *_: "loss from whole logits"
    seen = 0

    def listen(event: dict[str, Any]) -> None:
        nonlocal seen
        if event["event"] == "eval":
            turns.say(val=event["val_loss"], step=event["step"], seen=seen)
            if event["step"] == args.steps:
                turns.wait()
        if event["event"] == "save" and event["step"] == 0:
            turns.wait()
        elif event["event"] in ("eval", "save"):
            turns.restart()
        if event["event"] == "step":
            turns.took(tokens=event["tokens"] - seen, loss=event["loss"])
            seen = event["tokens"]
            if event["step"] < args.steps:  # after the last one the evaluation comes first
                turns.wait()

    with tempfile.TemporaryDirectory() as folder:
        val = Path(folder) / "val.jsonl"
        val.write_text("".join(data_file("shell", "val").read_text().splitlines(keepends=True)[: args.held_out]))
        veneer.train(
            str(model_folder("smollm2")), str(data_file("shell", "train")), val=str(val), report=listen,
            out=f"{folder}/run", r=RANK, alpha=2 * RANK, lr=RATE, steps=args.steps, batch_size=ROWS,
            eval_every=args.every, system=SYSTEM, warmup=WARMUP, max_len=LONGEST,
            fuse={"veneer": "auto", "fused": "on"}.get(name, "off"),
        )  # fmt: skip


# ------------------------------------------------------------------ PEFT and Trainer


def encoded() -> tuple[Any, list[Any], list[Any]]:
    """The tokenizer, and the rows as Veneer encodes them."""
    from transformers import AutoTokenizer

    from veneer.assets import data_file, model_folder
    from veneer.data.dataset import load
    from veneer.data.template import Renderer
    from veneer.tasks.causal_lm import CausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2"))
    task = CausalLM(tokenizer, renderer=Renderer(tokenizer, None, SYSTEM))
    parts = (load(str(data_file("shell", part)), kinds=CausalLM.kinds) for part in ("train", "val"))
    train, val = (task.encode(part.examples, max_len=LONGEST).samples for part in parts)
    return tokenizer, train, val


def trainer_run(name: str, args: argparse.Namespace, turns: Turns) -> None:
    import torch
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from peft import LoraConfig, get_peft_model
    from veneer.assets import model_folder

    tokenizer, train, val = encoded()
    val = val[: args.held_out]
    model = AutoModelForCausalLM.from_pretrained(model_folder("smollm2"), dtype=torch.float32)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    pad, counted = DataCollatorForSeq2Seq(tokenizer), list[int]()

    def collate(rows: list[dict[str, Any]]) -> Any:
        batch = pad(rows)
        counted.append(int(batch["attention_mask"].sum()))
        return batch

    class Turned(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.say(val=held_out_loss(model, pad, val), step=0, seen=0)
            turns.wait()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            done = state.global_step
            turns.took(tokens=counted[done - 1], loss=None)
            if done % args.every == 0:
                turns.say(val=held_out_loss(model, pad, val), step=done, seen=sum(counted[:done]))
            turns.wait()

    by_length = {"train_sampling_strategy": "group_by_length"} if name == "by length" else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=ROWS, max_steps=args.steps, learning_rate=RATE, warmup_steps=WARMUP,
            lr_scheduler_type="cosine", weight_decay=0.0, max_grad_norm=1.0, report_to="none", save_strategy="no",
            logging_strategy="no", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, seed=0,
            remove_unused_columns=False, **by_length,
        )  # fmt: skip
        Trainer(model, arguments, data_collator=collate, train_dataset=as_rows(train), callbacks=[Turned()]).train()


def as_rows(samples: Sequence[Any]) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(s.input_ids), "attention_mask": [1] * len(s), "labels": list(s.labels)} for s in samples]


def held_out_loss(model: Any, pad: Callable[..., Any], samples: Sequence[Any]) -> float:
    import torch
    import torch.nn.functional as F

    total, rows = 0.0, as_rows(samples)
    model.eval()
    with torch.no_grad():
        for at in range(0, len(rows), 8):
            batch = pad([dict(row) for row in rows[at : at + 8]])
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    model.train()
    return total / sum(s.trained_tokens for s in samples)


# ------------------------------------------------------------------ all of them, in turn


class Child:
    """A candidate in a process of its own, standing still between its turns."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.rows, self.held_out = name, list[dict[str, Any]](), list[dict[str, Any]]()
        env = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # who waits, sleeps
        env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        same = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in ("steps", "every", "held_out")]
        command = [sys.executable, "-W", "ignore", __file__, "--child", name, *same]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env
        )
        self.listen()

    def turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.listen()

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            row = json.loads(line) if line.startswith("{") else {}
            if "ready" in row:
                return
            if "val" in row:
                self.held_out.append(row)
            elif "seconds" in row:
                self.rows.append(row)
        self.log.seek(0)
        raise SystemExit(f"{self.name} ended early:\n{self.log.read()[-3000:]}")

    def result(self) -> dict[str, Any]:
        return {
            "name": self.name, "held_out": self.held_out,
            **{key: [row[key] for row in self.rows] for key in ("seconds", "cpu", "tokens", "loss")},
        }  # fmt: skip


def ratios(found: Sequence[dict[str, Any]], key: str = "seconds", skip: int = 3) -> dict[str, float]:
    """Tokens per second by those of the first candidate, the median over rounds; the first rounds warm up."""
    first = found[0]
    base = [n / s for n, s in zip(first["tokens"], first[key], strict=True)]
    return {
        row["name"]: statistics.median(
            n / s / b for n, s, b in list(zip(row["tokens"], row[key], base, strict=True))[skip:]
        )
        for row in found
    }


def arithmetic() -> dict[str, float]:
    """What leaving out padding, and the head where nothing is trained, can save of a step's products at most."""
    import random

    _, train, _ = encoded()
    draw, sizes = random.Random(0), [len(s) for s in train]
    batches = [draw.sample(sizes, ROWS) for _ in range(2000)]
    padded = statistics.fmean(ROWS * max(batch) / sum(batch) for batch in batches)
    trained = sum(s.trained_tokens for s in train) / sum(sizes)
    blocks = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    head = 49152 * 576
    return {"padding": padded, "trained": trained, "head": (blocks + head) / (blocks + head * trained)}


def write(path: Path, found: list[dict[str, Any]]) -> None:
    import torch
    import transformers

    import peft

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    record = {"versions": versions, "device": platform.machine(), "threads": 2, "rows": found}
    record["arithmetic"] = arithmetic()
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("candidates", nargs="*", choices=[[], *CANDIDATES])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=15)
    parser.add_argument("--held-out", type=int, default=48, help="rows")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=CANDIDATES)
    args = parser.parse_args()
    if args.child:
        kind = trainer_run if args.child in ("trainer", "by length") else veneer_run
        kind(args.child, args, Turns())
        return
    children = [Child(name, args) for name in args.candidates or CANDIDATES]
    for number in range(args.steps):
        for place in range(len(children)):
            children[(place + number) % len(children)].turn()
        took = ", ".join(f"{child.name} {child.rows[-1]['seconds']:.2f} s" for child in children)
        print(f"round {number + 1}: {took}", flush=True)
        if (number + 1) % args.every == 0 or number + 1 == args.steps:
            write(args.json, [child.result() for child in children])
    for child in children:
        child.process.terminate()
    most = arithmetic()
    print(f"products saved at most: padding x {most['padding']:.2f}, the head x {most['head']:.2f}")
    found = [child.result() for child in children]
    by_wall, by_cpu = ratios(found), ratios(found, "cpu")
    for row in found:
        last = row["held_out"][-1]
        print(
            f"{row['name']:12} {sum(row['tokens']) / sum(row['seconds']):7.1f} tokens/s  x {by_wall[row['name']]:.2f} "
            f"(processor seconds: x {by_cpu[row['name']]:.2f})  "
            f"held-out loss {last['val']:.4f} at {last['seen']:,} tokens"
        )


if __name__ == "__main__":
    main()
