"""RoPE rotates half of each head. The cache is that of MHA."""
rope_fraction = 0.5
out_dir = "{out_dir}/partial_rope"
