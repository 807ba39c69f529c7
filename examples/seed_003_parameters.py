"""Document 003's table of r and alpha by task and size of model, as veneer.recommend answers it.

Its function falls back to r=16 in silence when a word is misspelt; `recommend` says what was meant. And a rank is a
third of the answer: recommend adds targets, learning rate, batch and epochs, each with its reason, and says when an
adapter is the wrong tool.
"""

from __future__ import annotations

from base import arguments

import veneer
from veneer.errors import ConfigError


def get_lora_config_by_task(task_type: str, model_size: str) -> dict[str, int]:
    """The document's: choose LoRA's settings by task and size of model."""
    configs = {
        "classification": {
            "small": {"r": 8, "alpha": 16},
            "medium": {"r": 16, "alpha": 32},
            "large": {"r": 32, "alpha": 64},
        },
        "generation": {
            "small": {"r": 16, "alpha": 32},
            "medium": {"r": 32, "alpha": 64},
            "large": {"r": 64, "alpha": 128},
        },
        "complex_reasoning": {
            "small": {"r": 32, "alpha": 64},
            "medium": {"r": 64, "alpha": 128},
            "large": {"r": 128, "alpha": 256},
        },
    }
    return configs.get(task_type, {}).get(model_size, {"r": 16, "alpha": 32})


def main() -> None:
    args = arguments(__doc__).parse_args()
    sizes = ("small", "medium", "large")
    print(f"{'':20}" + "".join(f"{size:>14}" for size in sizes))
    for task in ("classification", "generation", "complex_reasoning"):
        cells = []
        for size in sizes:
            advice, document = veneer.recommend(task, size), get_lora_config_by_task(task, size)
            assert (advice["r"], advice["alpha"]) == (document["r"], document["alpha"]), (task, size)
            cells.append(f"r {advice['r']}, a {advice['alpha']:g}")
        print(f"{task:20}" + "".join(f"{cell:>14}" for cell in cells))
    print("all nine cells are the document's\n")

    assert get_lora_config_by_task("reasonning", "large") == {"r": 16, "alpha": 32}  # a quarter of what was meant
    try:
        veneer.recommend("reasonning", "large")
    except ConfigError as error:
        print(f"a misspelt task, the document: r=16 without a word; here:\n{error}\n")

    print(veneer.recommend("generation", "8B", rows=2000, memory="24GB", device="cuda"))
    if args.model != "tiny":
        from base import folder_of

        print()
        print(veneer.recommend("generation", folder_of(args.model), rows=761))


if __name__ == "__main__":
    main()
