"""The key/value cache: what the layers keep of earlier tokens while a text grows.

Dimension letters: B batch   T new tokens   S tokens attended to (cached and new)
"""
import copy

import torch


class KVCache:
    """The cached tensors of all layers, for up to max_length tokens in each of batch_size rows.

    The caller allocates it; the model keeps no state between calls. The cache also holds the
    position: layers append at the same place, and GPT.forward increases length after the last one.

    Rows of different lengths are padded on the left: padding, (B,), is the number of padded places
    in each row. A static cache is for torch.compile: its length is a tensor, and attention reads
    all places under a mask, so that one graph serves every step.
    """

    def __init__(self, config, batch_size, max_length, like=None, padding=None, static=False):
        """like: a tensor that gives the cache its device and dtype; None: the defaults."""
        if like is None:
            like = torch.empty(0)
        if not 1 <= max_length <= config.block_size:
            raise ValueError(f"a cache of {max_length} tokens: it must be 1 to "
                             f"block_size={config.block_size}")
        self.device, self.max_length = like.device, max_length
        self.padding, self.static = padding, static
        self.layers = []  # of each layer: a list of tensors (B, heads, max_length, width)
        for layer in config.cached():
            sizes = [(batch_size, layer.heads, max_length, width) for width in layer.widths]
            self.layers.append([like.new_zeros(size) for size in sizes])
        self.length = like.new_zeros((), dtype=torch.long) if static else 0  # tokens, with padding

    @property
    def nbytes(self):
        return sum(x.nbytes for tensors in self.layers for x in tensors)

    def places(self, T):
        """Cache indices of the next T tokens, (T,). Raises ValueError if they do not fit."""
        if not self.static and self.length + T > self.max_length:
            # a slice assignment past the end silently drops tokens; index_copy_ raises
            raise ValueError(f"the cache holds {self.length} of at most {self.max_length} tokens: "
                             f"{T} more do not fit")
        return self.length + torch.arange(T, device=self.device)

    def keys(self, T):
        """Cache indices of the S tokens that append returns for T new ones, (S,)."""
        S = self.max_length if self.static else self.length + T
        return torch.arange(S, device=self.device)

    def positions(self, T):
        """Positions of the next T tokens, (1 or B, T), from 0 for a row's first unpadded one."""
        if self.padding is None:
            return self.places(T)[None]
        return (self.places(T) - self.padding[:, None]).clamp(min=0)

    def append(self, layer, *new):
        """Writes a layer's new tensors, (B, heads, T, width) each; returns all that it holds."""
        end = self.length + new[0].size(2)
        for kept, x in zip(self.layers[layer], new, strict=True):
            if self.static:
                kept.index_copy_(2, self.places(x.size(2)), x)
            else:
                kept[:, :, self.length:end] = x
        return [kept if self.static else kept[:, :, :end] for kept in self.layers[layer]]

    def rewind(self, length):
        """Forgets all but the first length tokens."""
        self.length += length - self.length  # in place: a static length keeps its address

    def rows(self, index):
        """A cache of some rows: copies of those in a list, or a slice, which shares its memory."""
        other = copy.copy(self)
        other.layers = [[x[index] for x in tensors] for tensors in self.layers]
        if self.padding is not None:
            other.padding = self.padding[index]
        other.length = self.length + 0  # a separate tensor where it is one
        return other
