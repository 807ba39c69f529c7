"""Small models, values that move in every part of an adapter, and a process that dies when told."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn


def llama(seed: int = 0, **changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": 40, "attention_bias": True, **changes})
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=32)).eval()


def bert(seed: int = 0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=40, num_labels=3)).eval()


def mixtral(seed: int = 0) -> nn.Module:
    """Experts as stacks: gate_up_proj (E, 2 mlp, dim) and down_proj (E, dim, mlp)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=40, num_local_experts=3)
    return MixtralForCausalLM(config).eval()


class Experts(nn.Module):
    """Two stacks stored as (E, in, out), which the module says of itself, and every expert at work."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 24) / 4)
        self.down = nn.Parameter(torch.randn(3, 24, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(torch.einsum("bi,eio->ebo", x, self.up))
        return torch.einsum("ebo,eoi->bi", h, self.down)


class ExpertNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.embed(x).mean(1))


def experts(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ExpertNet().eval()


class ConvNet(nn.Module):
    """A stem, a convolution of the given kind, and a head."""

    def __init__(self, dims: int, groups: int = 1, padding_mode: str = "zeros", dilation: int = 1) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.stem = conv(4, 8, 1)
        self.body = conv(8, 12, 3, stride=2, padding=1, groups=groups, padding_mode=padding_mode, dilation=dilation)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.stem(x))).flatten(2).mean(-1))


def convnet(dims: int = 2, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return ConvNet(dims, **options).eval()


class Bag(nn.Module):
    """An embedding and a linear layer, without anything from transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.out = nn.Linear(16, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x).cumsum(1))


def bag(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Bag().eval()


NETS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "conv1d": lambda: convnet(1),
    "conv2d": convnet,
    "conv3d": lambda: convnet(3),
    "grouped": lambda: convnet(2, groups=4),
    "grouped1d": lambda: convnet(1, groups=2),
    "bag": bag,
    "mixtral": mixtral,
    "experts": experts,
}


def batch(net: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if net in ("llama", "gpt2", "bert", "bag", "mixtral", "experts"):
        return torch.randint(0, 40, (2, 7), generator=generator)
    dims = {"conv1d": 1, "grouped1d": 1, "conv3d": 3}.get(net, 2)
    return torch.randn(2, 4, *(6,) * dims, generator=generator)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def spread(parameters: list[nn.Parameter], seed: int = 7) -> None:
    """Random values everywhere: with B = 0 every test of an adapter passes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p) * 0.3)


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that is killed at its `step`-th call into the file system; False if it finished."""
    child = os.fork()
    if child == 0:
        left = step

        def hook(event: str, _: object) -> None:
            nonlocal left
            if event.startswith(("os.", "shutil.", "open", "fcntl.", "ctypes.")):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
