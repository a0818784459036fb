"""Everything that is neither a program nor the decoder. It imports neither."""
