"""The frozen base in 4 and 8 bits, behind the three functions of `core/weight.py`.

storage.py   what a storage is, and the recipe that says how a layer is stored
nf4.py int8.py fp8.py     one storage each: pack, unpack, multiply forwards and backwards
eight.py     what the two with 8 bits share
linear.py    the product with a packed matrix as one autograd function that keeps no dense W
layer.py     a layer that holds packed weights: its class changes in place, as in core/host.py
stack.py     experts in one parameter, as a tensor that is packed inside
model.py     quantize and dequantize a model
foreign.py   layers that others packed: bitsandbytes, torchao, GPTQ, AWQ
hf.py        loading through transformers, tensor by tensor
cuda.py      the Triton kernels
"""
