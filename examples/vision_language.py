"""A model that reads pictures and words learns to answer: LoRA in the language model, in the vision tower, or both.

    python examples/vision_language.py                            a tiny LLaVA, made on the spot
    python examples/vision_language.py --targets language         the language model alone
    python examples/vision_language.py --model FOLDER_OR_HUB_ID   LLaVA, Qwen-VL ...

Rows are conversations with pictures:

    {"image": "coat.png", "question": "What is it?", "answer": "a coat"}
    {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image><image>Which is older?"}, ...]}

Trained are the tokens of the answers alone. The script shows which they are, trains, proves and asks the model about
pictures it has not seen. The tiny model has a few layers of random weights on each side, so it learns colours only.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from base import _tiny_tokenizer, arguments

import veneer
from veneer.data.types import IGNORE

COLOURS = {"red": (220, 40, 30), "green": (40, 200, 60), "blue": (40, 70, 220), "white": (240, 240, 240)}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)


def tiny_llava() -> str:
    """The folder of a LLaVA at toy width, with its processor."""
    import transformers
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = _tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    pixels = kind(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pixels, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=256, bos_token_id=257, eos_token_id=258,
        initializer_range=0.1,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=image))
    folder = tempfile.mkdtemp(prefix="tiny-llava-")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        name = list(COLOURS)[rng.integers(len(COLOURS))]
        picture = rng.integers(0, 40, (28, 28, 3)) + np.array(COLOURS[name]) * rng.uniform(0.7, 0.9)
        made.append({"image": picture.astype(np.uint8), "question": "Which colour is it?", "answer": name})
    return made


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--targets", default="all-linear", help="all-linear, language, vision or a pattern")
    parser.add_argument("--steps", type=int, default=120)
    asked = parser.parse_args()
    base = tiny_llava() if asked.model == "tiny" else asked.model
    said: list[dict[str, Any]] = []
    rate = 1e-2 if asked.model == "tiny" else "auto"
    run = veneer.train(
        base, rows(64, seed=0), task="image-text", targets=asked.targets, r=8, lr=rate,
        steps=asked.steps, batch_size=8, val=16, eval_every=asked.steps // 2, out=tempfile.mkdtemp() + "/run",
        report=said.append,
    )  # fmt: skip
    for event in said:
        if event["event"] in ("note", "model", "data", "proof"):
            print(f"{event['event']}: {event.get('text', '')}")
    shown(base)
    losses = [row["val_loss"] for row in run.metrics("val_loss")]
    print(f"held-out loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    for each in next(event for event in said if event["event"] == "samples")["samples"]:
        print(
            f"  {each['prompt']} expected {each['expected']!r}, before {each['before'][:12]!r}, after {each['after']!r}"
        )
    assert losses[-1] < losses[0], "nothing was learned"
    print("trained on the answers' tokens alone")


def shown(base: str) -> None:
    """One row as the loss sees it."""
    from transformers import AutoProcessor

    from veneer.data.dataset import load
    from veneer.data.template import Renderer
    from veneer.data.types import Illustrated
    from veneer.tasks.image_text import ImageText

    processor = AutoProcessor.from_pretrained(base)
    task = ImageText(processor, None, Renderer(ImageText.speaker(processor)))
    [sample] = task.encode(load(rows(1, seed=2), kinds=(Illustrated,)).examples).samples
    trained = [token for token, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORE]
    print(f"a row of {len(sample)} tokens, {len(trained)} of them trained: {processor.tokenizer.decode(trained)!r}")
    assert task.known_renderer.tokenizer.image_token not in processor.tokenizer.decode(trained)


if __name__ == "__main__":
    main()
