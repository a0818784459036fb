"""A cache like that of Gemma 4 E2B (https://huggingface.co/google/gemma-4-E2B), at toy size.

It borrows local layers with a few global ones (here three to one), one key/value head, and layers
that reuse the keys and values of a layer below of the same kind (in Gemma the last layers, more
than half of them; here the second of the local ones). It leaves out Gemma's wider heads and partial
rotation in global layers, its per-layer embeddings and its MLP.
"""
n_kv_head = 1
window = 64
global_every = 4
kv_share = 2
out_dir = "{out_dir}/gemma_like"
