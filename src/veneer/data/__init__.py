"""Files become batches. Import from the submodules; this package stays empty so that importing it costs nothing.

from veneer.data.dataset import load, split      # load(data) -> Dataset; split(dataset, val, seed) -> Split
from veneer.data.template import Renderer        # Renderer(tokenizer, template=None, system=None)
from veneer.data.encode import encode            # encode(examples, renderer, max_len=...) -> Encodings
from veneer.data.pack import pack                # pack(samples, max_len) -> list[Encoded]
from veneer.data.loader import Loader            # Loader(samples, batch_size=8, accumulate=2, seed=0)
"""
