"""A cache like that of Gemma 4 E2B (https://huggingface.co/google/gemma-4-E2B), at toy size.

Borrowed are its local layers with a few global ones (here three to one, as four layers have no room
for more), one key/value head, and layers that reuse the keys and values of a layer below of their
kind (there more than half of the layers, the last ones; here the second of the local ones). Not
borrowed are its wider heads and its partial rotation in global layers, its per-layer embeddings and
its MLP.
"""
n_kv_head = 1
window = 64
global_every = 4
kv_share = 2
out_dir = "{out_dir}/gemma_like"
