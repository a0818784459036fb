"""The key/value cache: what the layers keep of earlier tokens while a text grows.

Dimension letters: B batch   T new tokens   S tokens attended to (cached and new)
"""
import copy

import torch


class KVCache:
    """The cached tensors of all layers, for up to max_length tokens in each of batch_size rows.

    The caller allocates it; the model keeps no state between calls. The cache also holds the
    position: layers append at the same place, and GPT.forward increases length after the last one.

    A layer with a window of W tokens has room for no more. Its tensors are rings: the token at
    place p of its row is at index p mod W.

    Rows of different lengths are padded on the left. The caller then sets .padding to the number of
    padded places in each row, (B,). So a token's place in its row counts the padding, and its
    position does not.

    A static cache is for torch.compile: its length is a tensor, and attention reads all places
    under a mask, so that one graph serves every step.
    """

    def __init__(self, config, batch_size, max_length, like=None, static=False):
        """like: a tensor that gives the cache its device and dtype; None: the defaults."""
        if like is None:
            like = torch.empty(0)
        if not 1 <= max_length <= config.block_size:
            raise ValueError(f"a cache of {max_length} tokens: it must be 1 to "
                             f"block_size={config.block_size}")
        self.device, self.max_length = like.device, max_length
        self.padding, self.static = None, static
        self.has_rings = False
        self.layers = []  # of each layer: a list of tensors (B, heads, room, width)
        for spec in config.cache_specs():
            tensors = []
            if spec.source is None:
                room = self.room_for(spec.window)
                self.has_rings = self.has_rings or self.is_ring(room)
                for width in spec.widths:
                    tensors.append(like.new_zeros(batch_size, spec.heads, room, width))
            self.layers.append(tensors)
        self.length = like.new_zeros((), dtype=torch.long) if static else 0  # tokens, with padding

    @property
    def nbytes(self):
        return sum(x.nbytes for tensors in self.layers for x in tensors)

    def room_for(self, window):
        """Tokens of each row that a layer with this window has room for."""
        return min(window or self.max_length, self.max_length)

    def is_ring(self, room):
        return room < self.max_length

    def places(self, T):
        """Places of the next T tokens in their rows, (T,). Raises ValueError if they do not fit,
        unless the cache is static."""
        if not self.static and self.length + T > self.max_length:
            # a slice assignment past the end silently drops tokens (static: see write_indices)
            raise ValueError(f"the cache holds {self.length} of at most {self.max_length} tokens: "
                             f"{T} more do not fit")
        return self.length + torch.arange(T, device=self.device)

    def key_places(self, T, window=None):
        """Places of the S tokens that append returns for T new ones, (S,); below 0: none yet."""
        room = self.room_for(window)
        if T > 1 and self.is_ring(room):
            return torch.cat((self.places_held(room, self.length), self.places(T)))
        return self.places_held(room, self.length + T)

    def places_held(self, room, length):
        """Place of the token at each index of a layer after length tokens; below 0: none."""
        filled = room if self.static else min(room, length)
        newest = length - 1
        # index i holds the newest place p <= newest for which p mod room = i
        return newest - (newest - torch.arange(filled, device=self.device)) % room

    def positions(self, T):
        """Positions of the next T tokens, (1 or B, T), from 0 for a row's first unpadded one."""
        if self.padding is None:
            return self.places(T)[None]
        return (self.places(T) - self.padding[:, None]).clamp(min=0)

    def append(self, index, *new):
        """Writes the new tensors of the layer at index, (B, heads, T, width) each; returns those to
        attend to."""
        return [self.write(stored, x) for stored, x in zip(self.layers[index], new, strict=True)]

    def write(self, stored, x):
        """Writes x, (B, heads, T, width), into stored, (B, heads, room, width). Returns the S
        tokens that x may attend to, (B, heads, S, width).

        In a ring, the last of several tokens overwrite what the first ones attend to. So what was
        there before is returned as a copy, followed by x.
        """
        T, room = x.size(2), stored.size(2)
        if T > 1 and self.is_ring(room):
            seen = torch.cat((self.written(stored, self.length), x), dim=2)
            stored.index_copy_(2, self.write_indices(T, room)[-room:], x[:, :, -room:])
            return seen
        if self.static:
            stored.index_copy_(2, self.write_indices(T, room), x)
        else:
            start = self.length % room
            stored[:, :, start:start + T] = x
        return self.written(stored, self.length + T)

    def write_indices(self, T, room):
        """Indices at which the next T tokens are written, (T,). Past max_length they are room, out
        of range for index_copy_: on a CPU it raises IndexError or RuntimeError; on CUDA a failed
        assertion makes the GPU unusable for the process, so callers check first."""
        places = self.places(T)
        return torch.where(places < self.max_length, places % room, room)

    def written(self, stored, length):
        """The part of stored that holds something once length tokens were written; static: all."""
        return stored if self.static else stored[:, :, :length]

    def rewind(self, length):
        """Forgets all but the first length tokens. Raises ValueError if there are fewer, or once a
        ring has overwritten tokens, except for length 0."""
        if length > self.length:
            raise ValueError(f"the cache holds {int(self.length)} tokens, fewer than {length}")
        rooms = [x.size(2) for tensors in self.layers for x in tensors]
        if self.has_rings and 0 < length < self.length and self.length > min(rooms):
            raise ValueError(f"a layer with a window has forgotten what precedes token {length}: "
                             "rewind to 0")
        self.set_length(length)

    def set_length(self, length):
        """Sets the number of tokens held without checking that they are there. The tensor of a
        static cache is changed in place, since compiled graphs read it at its address."""
        if self.static:
            self.length.fill_(length)
        else:
            self.length = length

    def select_rows(self, index):
        """Keeps the rows listed in index, which may repeat some. Copies one tensor at a time."""
        for tensors in self.layers:
            for i in range(len(tensors)):
                tensors[i] = tensors[i][index]
        if self.padding is not None:
            self.padding = self.padding[index]

    def rows(self, index):
        """A cache of some rows: copies for a list of indices; for a slice, views of its memory."""
        other = copy.copy(self)
        other.layers = [[x[index] for x in tensors] for tensors in self.layers]
        if self.padding is not None:
            other.padding = self.padding[index]
        if self.static:
            other.length = self.length.clone()
        return other
