"""Files become batches. Import from the submodules; this package stays empty so that importing it costs nothing.

| from | comes | by |
| --- | --- | --- |
| dataset | checked examples of one format, parted for validation | `load(data)`, `split(dataset, val, seed)` |
| template | the text and tokens of a conversation, the same in training and in use | `Renderer(tokenizer)` |
| encode, labelled | samples with labels, and what became of the rows | `encode(examples, renderer, max_len=...)` |
| preview | what is trained, to be looked at | `preview(samples, tokenizer)` |
| pack, isolation | several samples in a row; proof that they do not mix | `pack(samples, max_len)`, `check(model)` |
| loader, batch | the samples of each step, resumable; tensors | `Loader(samples, 16)`, `batches(samples, 4)` |

Nothing up to and including `dataset` imports torch, transformers or numpy: data is checked before anything loads.
"""
