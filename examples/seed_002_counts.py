"""Document 002's numbers: 1024 x 1024 at r = 8 is 16,384 parameters, 1.56 %; an adapter starts as nothing; merging
costs nothing afterwards. And the count that document 003 prints.

    trainable params: 4,194,304 || all params: 6,244,558,848 || trainable%: 0.067       (document 003, for chatglm3-6b)

No model has both numbers. Counted here from shapes, on the meta device, where six billion parameters weigh nothing:

    4,194,304        Llama-7B, q_proj and v_proj, r = 8: 32 blocks x 2 x 8 (4096 + 4096)
    6,244,558,848    ChatGLM3-6B, query_key_value, r = 4: 6,243,584,000 + 28 x 4 (4096 + 4608)

And the document's own config (r = 16 on q, k, v and o) fits neither: ChatGLM3 has one query_key_value in place of three
projections, so PEFT and Veneer refuse its target_modules.
"""

from __future__ import annotations

import torch
from base import arguments, batches, load, rows
from torch import nn

import veneer
from veneer import LoRA
from veneer.errors import TargetError
from veneer.peft import LoraConfig, get_peft_model


def main() -> None:
    args = arguments(__doc__).parse_args()
    one_matrix()
    zero_start(args.model)
    four_million()


def one_matrix() -> None:
    d, k, r = 1024, 1024, 8
    net = nn.ModuleDict({"query": nn.Linear(d, k, bias=False)})
    report = veneer.attach(net, LoRA(rank=r, alpha=16, targets=["query"]))
    original = d * k
    assert original == 1_048_576 and report.trainable == d * r + r * k == 16_384
    print(f"{d} x {k} = {original:,}; r = {r}: {report.trainable:,} trained, {100 * report.trainable / original:.2f} %")

    x = torch.randn(2, d)
    before = net["query"](x)
    assert torch.equal(before, nn.functional.linear(x, net["query"].weight))
    print("B = 0, so the layer starts as it was: equal to the last bit")

    with torch.no_grad():
        for parameter in net["query"].lora.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    adapted = net["query"](x)
    veneer.merge(net)
    apart = (net["query"](x) - adapted).abs().max().item()
    print(f"merged: W + s B A in the layer itself, differing by at most {apart:.1e}; no adapter runs any more")
    assert apart < 1e-4
    veneer.unmerge(net)


def zero_start(name: str) -> None:
    model, tokenizer = load(name)
    batch = batches(tokenizer, rows(name, 4))[0]
    with torch.no_grad():
        base = model(**batch).logits
        report = veneer.attach(model, LoRA(rank=8, alpha=16, targets=["q_proj", "k_proj"]))  # the document's choice
        assert torch.equal(model(**batch).logits, base)
    print(f"{type(model).__name__}: {report}; its logits are still the base's, bit for bit")


# ---------------------------------------------------------------- document 003's count


class Block(nn.Module):
    """One block of ChatGLM3-6B: multi-query attention with two groups, a SwiGLU, two norms."""

    def __init__(self, hidden: int = 4096, inner: int = 13696, groups: int = 2, head: int = 128) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden)
        self.query_key_value = nn.Linear(hidden, hidden + 2 * groups * head, bias=True)
        self.dense = nn.Linear(hidden, hidden, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(hidden)
        self.dense_h_to_4h = nn.Linear(hidden, 2 * inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, hidden, bias=False)


def chatglm3() -> nn.Module:
    model = nn.Module()
    model.word_embeddings = nn.Embedding(65024, 4096)
    model.layers = nn.ModuleList(Block() for _ in range(28))
    model.final_layernorm = nn.RMSNorm(4096)
    model.output_layer = nn.Linear(4096, 65024, bias=False)
    return model


def llama_7b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False))  # the defaults are Llama-7B's


def four_million() -> None:
    print("\ndocument 003 prints 4,194,304 of 6,244,558,848 (0.067 %). Counted:")
    with torch.device("meta"):
        cases = [
            ("Llama-7B, q and v, r = 8", llama_7b(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"])),
            ("ChatGLM3-6B, query_key_value, r = 4", chatglm3(), LoraConfig(r=4, target_modules=["query_key_value"])),
            ("the document's config on Llama-7B", llama_7b(), the_documents()),
            (
                "its nearest kin on ChatGLM3-6B",
                chatglm3(),
                LoraConfig(r=16, target_modules=["query_key_value", "dense"]),
            ),
        ]
        counts = []
        for what, model, config in cases:
            counts.append(get_peft_model(model, config).get_nb_trainable_parameters())
            trained, total = counts[-1]
            print(f"  {what:36} {trained:>12,} of {total:>13,}  {100 * trained / total:.4f} %")
        assert counts[0][0] == 4_194_304 and counts[1][1] == 6_244_558_848
        assert counts[1][0] == 974_848, "so the share that belongs to that total is 0.0156 %, not 0.067 %"
        assert [trained for trained, _ in counts[2:]] == [16_777_216, 7_569_408]
        try:
            get_peft_model(chatglm3(), the_documents())
        except TargetError as error:
            print(f"the document's own config on ChatGLM3-6B:\n{error}")


def the_documents() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"], lora_dropout=0.1)


if __name__ == "__main__":
    main()
