"""Fast paths for training. The core works without them; `veneer.fuse(model)` puts them on a model.

pieces.py   what the GPU's kernels compute, in plain torch: the specification, and what a CPU runs
cuda.py     the same for a GPU, held to pieces.py by tests
group.py    linear layers that read one input, with their adapters: forwards and backwards by hand
block.py    a decoder block as two autograd functions, or as one that keeps its input only
fuse.py     which blocks of a model can run so: proved on each, changed in place, reported
image_*.py  the same for diffusers' UNets: pieces, blocks, parts, families; cuda_image.py their twin for GPUs
loss.py     cross entropy on a frozen head, its gradient taken in the logits' own memory
"""
