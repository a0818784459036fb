"""Multi-head latent attention: one cached vector replaces the keys and values of all heads."""
attention = "mla"
out_dir = "{out_dir}/mla"
