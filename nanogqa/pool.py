"""Changes the number of key/value heads of an attention layer: tensors in, tensors out.

Fewer heads: `first`, `mean` and `aligned` turn each group of heads into one. More heads: `copies`.
Everything here is linear algebra on the weights of one layer.

Dimension letters, as in model.py:
    H query heads   K key/value heads   D width of a head   C width of the layer's input
    n heads in a group of heads that become one
"""
from dataclasses import dataclass

import torch

SMALLEST = 1e-30  # of divisors: pruned weights may all be zero


@dataclass
class Heads:
    """The weights of one attention layer, one matrix per head.

    Query head h reads key/value head h // (H / K). A bias of q, k or v is one more column, at the
    end of C, for inputs that end in a 1. o has no bias.
    """
    q: torch.Tensor  # (H, D, C)
    k: torch.Tensor  # (K, D, C)
    v: torch.Tensor  # (K, D, C)
    o: torch.Tensor  # (H, C, D)


def split_heads(weights, prefix, config):
    """The Heads of the attention layer whose weights start with prefix, in float64."""
    projections = []
    for name in ("q_proj", "k_proj", "v_proj"):
        x = weights[f"{prefix}{name}.weight"].double()
        if config.qkv_bias:
            bias = weights[f"{prefix}{name}.bias"].double()
            x = torch.cat((x, bias[:, None]), dim=1)
        projections.append(x.unflatten(0, (-1, config.head_dim)))
    o = weights[f"{prefix}o_proj.weight"].double()           # (C, H D)
    o = o.unflatten(1, (-1, config.head_dim)).permute(1, 0, 2)
    return Heads(*projections, o)


def join_heads(heads, prefix, config):
    """The float32 weights of an attention layer, by name: the inverse of split_heads."""
    weights = {}
    for name, x in (("q_proj", heads.q), ("k_proj", heads.k), ("v_proj", heads.v)):
        weight = x[..., :config.n_embd].flatten(0, 1)
        weights[f"{prefix}{name}.weight"] = weight.float().contiguous()
        if config.qkv_bias:
            weights[f"{prefix}{name}.bias"] = x[..., -1].flatten().float()
    o = heads.o.permute(1, 0, 2).flatten(1)
    weights[f"{prefix}o_proj.weight"] = o.float().contiguous()
    return weights


# -- copies, first, mean -----------------------------------------------------------------------

def copies(heads, n_kv_head):
    """More key/value heads, n_kv_head in all: equal copies of the old ones. The same function."""
    times = n_kv_head // len(heads.k)
    k = heads.k.repeat_interleave(times, 0)
    v = heads.v.repeat_interleave(times, 0)
    return Heads(heads.q, k, v, heads.o)


def first(heads, n_kv_head):
    """Keeps the first key/value head of each group of neighbors."""
    k = neighbors(heads.k, n_kv_head)[:, 0]
    v = neighbors(heads.v, n_kv_head)[:, 0]
    return Heads(heads.q, k, v, heads.o)


def mean(heads, n_kv_head):
    """Averages the key/value heads of each group of neighbors (arXiv 2305.13245, section 2.1)."""
    k = neighbors(heads.k, n_kv_head).mean(1)
    v = neighbors(heads.v, n_kv_head).mean(1)
    return Heads(heads.q, k, v, heads.o)


def neighbors(x, n_groups):
    """(K, D, C) -> (n_groups, n, D, C)."""
    return x.unflatten(0, (n_groups, len(x) // n_groups))


# -- aligned -----------------------------------------------------------------------------------

def aligned(heads, n_kv_head, qk_norm=False, moment=None):
    """Groups key/value heads, rotates the heads of each group to agree, then averages them.

    The weights of a head leave its bases open: keys and values can change their basis without any
    change of the layer's function, if the queries and the output projection change with them.
    After Jin et al., arXiv 2412.20677, who rotate each plane of the keys, and the values.

    moment, (C, C), is the mean of x x^T over inputs x of the layer: directions count as much as
    the inputs use them. None: all directions count alike.
    With qk_norm, RMSNorm stands between the keys and RoPE. Its weights do not commute with
    rotations, so only the sign of a plane can change.
    """
    if moment is None:
        return align_equally(heads, n_kv_head, qk_norm)
    # With R R = moment, (W R)(W R)^T is the mean of (W x)(W x)^T over the inputs x. So to align the
    # weights W R is to align the outputs W x.
    root, inverse = square_root(moment)
    weighted = Heads(heads.q @ root, heads.k @ root, heads.v @ root, heads.o)
    new = align_equally(weighted, n_kv_head, qk_norm)
    return Heads(new.q @ inverse, new.k @ inverse, new.v @ inverse, new.o)


def square_root(moment):
    """The symmetric square root of a symmetric positive matrix, and the inverse of that root."""
    eigenvalues, basis = torch.linalg.eigh(moment)
    smallest = max(1e-6 * eigenvalues[-1].item(), SMALLEST)
    roots = eigenvalues.clamp(min=smallest).sqrt()
    return (basis * roots) @ basis.T, (basis / roots) @ basis.T


def align_equally(heads, n_kv_head, qk_norm):
    """aligned, for inputs whose directions count alike."""
    heads_per_kv = len(heads.q) // len(heads.k)
    keys = to_planes(heads.k, qk_norm)
    used_keys = keys * query_strength(heads, qk_norm)[..., None]
    used_values = value_strength(heads) @ heads.v

    new_q, new_k, new_v, new_o = [], [], [], []
    for group in groups_of_heads(used_keys, used_values, n_kv_head):
        shared_key, factors = share_keys(keys[:, group], used_keys[:, group], qk_norm)
        basis, size = share_values(heads.v[group], used_values[group])
        new_k.append(shared_key)
        new_v.append(basis * size)
        for i, j in enumerate(group):
            for h in range(j * heads_per_kv, (j + 1) * heads_per_kv):
                new_q.append(rotate_query(heads.q[h], factors[:, i]))
                # o v, what the head writes per input, is projected on the shared rows of the values
                new_o.append(heads.o[h] @ heads.v[j] @ basis.T / size)
    return Heads(torch.stack(new_q), torch.stack(new_k), torch.stack(new_v), torch.stack(new_o))


# Keys. RoPE rotates plane i of a head, its rows (i, i + D/2), by an angle. With the two rows as one
# complex number, a score is the sum over planes of Re(conj(q) k), and RoPE multiplies q and k by
# complex numbers. So in any plane, k / u and conj(u) q have the scores of k and q for any complex
# number u.

def to_planes(x, qk_norm):
    """(heads, D, C) -> (D/2, heads, C), complex. With qk_norm (D/2, heads, 2C), real.

    The real form lists both rows of a plane one after the other: only a sign can be factored out.
    """
    half = x.size(1) // 2
    if qk_norm:
        planes = torch.cat((x[:, :half], x[:, half:]), -1)
    else:
        planes = torch.complex(x[:, :half], x[:, half:])
    return planes.transpose(0, 1)


def from_planes(planes, qk_norm):
    """The (D, C) rows of one head from its (D/2, C) complex or (D/2, 2C) real planes."""
    if qk_norm:
        return torch.cat(planes.chunk(2, -1))
    return torch.cat((planes.real, planes.imag))


def query_strength(heads, qk_norm):
    """(D/2, K): the norm of all queries that read a key/value head, in each plane."""
    planes = to_planes(heads.q, qk_norm)                             # (D/2, H, C)
    squares = planes.abs().square().sum(-1)                          # (D/2, H)
    per_kv_head = squares.unflatten(1, (len(heads.k), -1))           # (D/2, K, H/K)
    return per_kv_head.sum(-1).sqrt()


def share_keys(keys, used_keys, qk_norm):
    """One key head for the n heads of a group, and how each old head follows from it.

    keys, (D/2, n, C), are the group's keys; used_keys are those times the strength of their
    queries. Returns the (D, C) rows of the shared head, and (D/2, n) factors u such that in each
    plane, key j is about u_j times the shared key.
    """
    # In each plane, the best rank-1 approximation of the (n, C) used keys. Its right singular
    # vector is the direction that holds most of them, its left one has the phase of each head.
    left, _, right = torch.linalg.svd(used_keys, full_matrices=False)
    phases = torch.sgn(left[:, :, 0])                                # (D/2, n)
    directions = right[:, 0]                                         # (D/2, C)
    norms = keys.abs().square().sum(-1).sqrt()                       # (D/2, n)
    scale = norms.square().mean(1).sqrt().clamp(min=SMALLEST)        # (D/2,)
    factors = phases
    if not qk_norm:  # the norm would undo a change of length
        factors = phases * (norms / scale[:, None])
    return from_planes(directions * scale[:, None], qk_norm), factors


def rotate_query(q, factors):
    """The (D, C) queries conj(u) q of a head whose keys u k became the shared keys k."""
    half = len(q) // 2
    planes = torch.complex(q[:half], q[half:]) * factors[:, None].conj()
    return torch.cat((planes.real, planes.imag))


# Values. The layer's output depends on o v alone. So any invertible matrix can multiply v, if its
# inverse multiplies o.

def value_strength(heads):
    """(K, D, D) matrices S: |S v x|^2 is the sum of |o v x|^2 over the query heads that read v."""
    o = heads.o.unflatten(0, (len(heads.k), -1))                     # (K, H/K, C, D)
    gram = torch.einsum("jrcd,jrce->jde", o, o)                      # (K, D, D)
    eigenvalues, basis = torch.linalg.eigh(gram)
    roots = eigenvalues.clamp(min=0).sqrt()
    return (basis * roots[:, None]).transpose(1, 2)


def share_values(values, used_values):
    """A basis and a size for the values that share a head: values and used_values are (n, D, C).

    The basis is (D, C): orthonormal rows that span most of used_values, then rows of zeros where
    D > C. Multiplied by the size, its rows have the root mean square of values.
    """
    width = values.size(1)
    _, _, right = torch.linalg.svd(used_values.flatten(0, 1), full_matrices=False)
    size = values.square().mean().sqrt() * values.size(-1) ** 0.5
    basis = right[:width]                                            # (D or C, C)
    missing = width - len(basis)  # a head that is wider than its inputs
    return torch.nn.functional.pad(basis, (0, 0, 0, missing)), size.clamp(min=SMALLEST)


# -- which heads become one --------------------------------------------------------------------

def groups_of_heads(used_keys, used_values, n_groups):
    """n_groups lists of key/value heads that lose little when each list becomes one head."""
    n_heads, width = used_values.shape[:2]
    key_gram = used_keys @ used_keys.mH                                           # (D/2, K, K)
    value_gram = torch.einsum("iac,jbc->iajb", used_values, used_values)          # (K, D, K, D)
    all_keys = key_gram.diagonal(dim1=1, dim2=2).real.sum().clamp(min=SMALLEST)
    all_values = value_gram.flatten(2).flatten(0, 1).trace().clamp(min=SMALLEST)

    def kept(group):
        """The share of all keys plus the share of all values that one head for group keeps."""
        # squared singular values of the matrices that share_keys and share_values decompose
        keys = torch.linalg.eigvalsh(key_gram[:, group][:, :, group])             # (D/2, n)
        gram = value_gram[group][:, :, group].reshape(len(group) * width, -1)
        values = torch.linalg.eigvalsh(gram)                                      # (n D,)
        return (keys[:, -1].sum() / all_keys + values[-width:].sum() / all_values).item()

    return best_partition(n_heads, n_groups, kept)


def best_partition(n_heads, n_groups, kept):
    """Splits range(n_heads) into n_groups sorted lists of equal length; kept(list) scores a list.

    Starts with neighbors. Exchanges two heads of different lists as long as that raises the sum
    of the scores. The result is a local optimum.
    """
    size = n_heads // n_groups
    groups = []
    for start in range(0, n_heads, size):
        groups.append(list(range(start, start + size)))
    known = {}

    def value(group):
        key = tuple(sorted(group))
        if key not in known:
            known[key] = kept(list(key))
        return known[key]

    improved = True
    while improved:
        improved = False
        for a in range(n_heads):
            for b in range((a // size + 1) * size, n_heads):
                left, right = groups[a // size], groups[b // size]
                new_left, new_right = left.copy(), right.copy()
                new_left[a % size], new_right[b % size] = right[b % size], left[a % size]
                # more than rounding errors, which could exchange the same two heads forever
                if value(new_left) + value(new_right) > value(left) + value(right) + 1e-6:
                    groups[a // size], groups[b // size] = new_left, new_right
                    improved = True
    return [sorted(group) for group in groups]
