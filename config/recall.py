"""Two small layers that learn associative recall: first run python data/recall/prepare.py.

The embedding table starts at a standard deviation of 1. At the default of 0.02 the second layer
hardly sees the tokens beside the output of the first, and nothing is learned for a long time.
"""
out_dir = "{out_dir}/recall"
dataset = "recall"
block_size = 128
n_layer = 2
n_head = 8
n_embd = 64
tie_embeddings = False
embed_std = 1.0
optimizer = "muon"
learning_rate = 1e-2
tokens_per_step = 2**13
max_steps = 1000
eval_interval = 100
