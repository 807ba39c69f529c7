"""Document 003's PEFT script, with nothing changed but the line it imports from.

The document ends with an output that no run of it can give:

    trainable params: 4,194,304 || all params: 6,244,558,848 || trainable%: 0.067

`seed_002_counts.py` works out which models those numbers come from.
"""

from __future__ import annotations

from base import arguments, folder_of
from transformers import AutoModelForCausalLM

from veneer.peft import LoraConfig, get_peft_model  # the document: from peft import LoraConfig, get_peft_model


def main() -> None:
    args = arguments(__doc__).parse_args()

    # load the base model
    model = AutoModelForCausalLM.from_pretrained(folder_of(args.model))

    # configure LoRA
    lora_config = LoraConfig(
        r=16,  # rank
        lora_alpha=32,  # scaling factor
        target_modules=["q_proj", "v_proj", "k_proj", "o_proj"],  # target modules
        lora_dropout=0.1,  # dropout rate
        bias="none",  # biases
        task_type="CAUSAL_LM",  # task type
    )

    # apply LoRA
    base = model
    model = get_peft_model(model, lora_config)

    # look at the trainable parameters
    model.print_trainable_parameters()

    # what the document does not say: nothing was wrapped, so the model is still itself
    print(f"same object: {model is base}; still a {type(model).__name__}, and a {type(model).__mro__[1].__name__}")
    layer = model.model.layers[0].self_attn.q_proj
    print(f"q_proj is a {type(layer).__name__} of {tuple(layer.weight.shape)} with A and B beside its weight:")
    for name, parameter in layer.named_parameters():
        print(f"  {name:24} {tuple(parameter.shape)!s:12} {'trained' if parameter.requires_grad else 'frozen'}")
    trained, total = model.get_nb_trainable_parameters()
    by_hand = sum(16 * (p.in_features + p.out_features) for n, p in model.named_modules() if n.endswith(ENDINGS))
    assert trained == by_hand, (trained, by_hand)
    print(f"by hand: sum of r (in + out) over q, k, v and o is {by_hand:,}, {100 * by_hand / total:.4f} % of {total:,}")


ENDINGS = ("q_proj", "k_proj", "v_proj", "o_proj")


if __name__ == "__main__":
    main()
