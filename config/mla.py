"""Multi-head latent attention: all heads' keys and values are made from one latent, which is what is cached."""
attention = "mla"
out_dir = "{out_dir}/mla"
