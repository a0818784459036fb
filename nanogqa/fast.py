"""Faster replacements for modules of model.py, whose results match.

accelerate(model) is for training and evaluation and keeps parameters and their names;
prepare_for_decoding(model) is for sampling. A model in which nothing was replaced is the reference
that the tests compare them with.
"""
import ctypes
import platform
import sys

import torch
from torch import nn
from torch.nn import functional as F


def accelerate(model):
    """Replaces modules of model with faster ones that share its parameters; returns model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, adopt(FastLinear, child))
            elif type(child) is nn.RMSNorm:
                setattr(parent, name, adopt(FastRMSNorm, child))
    model.head_loss = ChunkedHeadLoss()
    return model


def adopt(cls, module):
    """A module of the class cls, which extends that of module, with module's own parameters."""
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    return new


# -- products in float32 on CPUs -------------------------------------------------------------------

# PyTorch sends float32 products to MKL. oneDNN, which PyTorch ships as well, was 1.2 to 2.2 times
# as fast on an AMD EPYC; results/cpu_float32.py times a step with both. On Intel: not measured.
# _linear_pointwise is a private operator (torch.compile uses it), so it is looked up first.
ONEDNN = platform.machine() in ("x86_64", "AMD64") and hasattr(
    torch.ops.mkldnn, "_linear_pointwise")


def float32_on_cpu(x):
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and not torch.is_autocast_enabled("cpu")


if ONEDNN:
    library = torch.library.Library("nanogqa", "DEF")
    library.define("onednn_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")

    @torch.library.impl(library, "onednn_product", "CompositeExplicitAutograd")
    def eager_product(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @torch.library.register_fake("nanogqa::onednn_product", lib=library)
    def shape_of_product(x, weight, bias):
        return x.new_empty(*x.shape[:-1], weight.size(0))


def onednn_product(x, weight, bias=None):
    """x @ weight.T + bias by oneDNN, for a plain or a packed weight.

    torch.compile accepts the private operator for constant weights only, so it gets an operator of
    our own. In eager mode that would cost a detour through Python.
    """
    if torch.compiler.is_compiling():
        return torch.ops.nanogqa.onednn_product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """F.linear and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = onednn_product(grad, weight.t())
        grad_weight, grad_bias = None, None
        if ctx.needs_input_grad[1]:  # False where trainable leaves it out; likewise below
            grad_weight = onednn_product(rows.t(), x.flatten(0, -2).t())
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


def linear(x, weight, bias=None):
    """x @ weight.T + bias over the last dimension."""
    if ONEDNN and float32_on_cpu(x):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class FastLinear(nn.Linear):
    def forward(self, x):
        # oneDNN took 17 times as long on an input with gaps between its rows
        return linear(x.contiguous(), self.weight, self.bias)


# -- RMSNorm ---------------------------------------------------------------------------------------

def normalize(x, eps):
    """(r x, r) with r = (mean(x^2) + eps)^-1/2 over the last dimension, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    r = r.square_().div_(x.size(-1)).add_(eps).rsqrt_()
    return x * r, r


class RMSNormFunction(torch.autograd.Function):
    """y = n w, where n = r x and r = (mean(x^2) + eps)^-1/2.

    The gradients are dx = r (g w - n mean(g w n)) and dw = sum(g n). In float32 on a CPU PyTorch
    runs a chain of a dozen small operations instead; with oneDNN's products this brings a training
    step from 39 to 27 ms (results/cpu_float32.py).
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        n, r = normalize(x, eps)
        ctx.save_for_backward(n, r, weight)
        return n * weight

    @staticmethod
    def backward(ctx, grad):
        n, r, weight = ctx.saved_tensors
        gn = grad * n
        mean = (gn @ weight).div_(weight.numel()).unsqueeze(-1)
        grad_x = (grad * weight).addcmul_(n, mean, value=-1).mul_(r)
        return grad_x, gn.flatten(0, -2).sum(0), None


class FastRMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, also under autocast, where nn.RMSNorm gives float32."""

    def forward(self, x):
        on_cpu = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if on_cpu and not torch.is_grad_enabled():  # nothing to differentiate
            return (normalize(x, self.eps)[0] * self.weight).to(x.dtype)
        if float32_on_cpu(x):
            return RMSNormFunction.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


# -- the loss --------------------------------------------------------------------------------------

class ChunkedHeadLoss(nn.Module):
    """model.HeadLoss without the logits of all rows at once.

    With 50,304 ids they would take most of a step's memory: in chunks a step peaks at 1,023 MiB
    where transformers takes 2,062 (results/README.md). torch 2.13 has F.linear_cross_entropy for
    this, but this project supports torch from 2.9 on.
    """

    def forward(self, x, weight, targets, n_targets):
        return ChunkedCrossEntropy.apply(
            x.flatten(0, 1), weight, targets.flatten(), n_targets, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy in nats of the logits x @ weight.T, summed and divided by n_targets.

    x is (N, C), weight (V, C), targets (N,); targets of -1 are left out. Gradients are computed in
    the forward pass: that of a row's logits is (softmax - one-hot target) / n_targets.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, n_targets, gradients):
        wants_grad_weight = gradients and ctx.needs_input_grad[1]  # unless trainable leaves it out
        total = x.new_zeros((), dtype=torch.float32)
        grad_x, grad_weight = None, None
        if gradients:
            grad_x = torch.empty_like(x)
        if wants_grad_weight:
            grad_weight = torch.zeros_like(weight)
        share = (targets >= 0) / n_targets                              # (N,), a row's part
        logits_at_once = 2**23 if x.device.type == "cpu" else 2**28
        n = max(1, logits_at_once // weight.size(0))
        for start in range(0, len(x), n):
            chunk = slice(start, start + n)
            target = targets[chunk, None].clamp(min=0)                  # (n, 1)
            part = share[chunk, None]                                   # (n, 1)
            logits = linear(x[chunk], weight)                           # (n, V)
            top, likeliest = logits.max(dim=-1, keepdim=True)
            below = top.float() - logits.gather(1, target).float()      # target's logit below top
            p = logits.float().softmax(dim=-1)
            del logits
            # -log p(target) = below - log p(likeliest): p(target) may underflow to 0, but the
            # largest of V probabilities is at least 1 / V
            # not +=: compiled by torch 2.11, an output written in place has no gradient
            total = total + ((below - p.gather(1, likeliest).log()) * part).sum()
            if gradients:
                p = p.scatter_add_(1, target, torch.full_like(below, -1.0)).to(top.dtype)
                grad_x[chunk] = linear(p, weight.t()) * part
            if wants_grad_weight:
                grad_weight += linear(p.t(), (x[chunk] * part).to(x.dtype).t())
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad)                        # in place: used once
        return grad_x.mul_(grad), grad_weight, None, None, None


# -- decoding --------------------------------------------------------------------------------------

class PackedLinear(nn.Module):
    """A linear layer for float32 or bfloat16 inference on a CPU.

    Its weight has the blocked layout that oneDNN reads fastest for inputs of `rows` rows.
    """

    def __init__(self, weight, bias, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = bias

    def forward(self, x):
        return onednn_product(x, self.weight, self.bias)


def packs(device, dtype):
    """Whether prepare_for_decoding packs weights for this device and dtype."""
    if not ONEDNN or device.type != "cpu":
        return False
    if dtype == torch.bfloat16:  # without AVX-512 its products would be emulated
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def prepare_for_decoding(model, rows):
    """Packs the weights of model for that many rows where it is faster; returns model.

    It can no longer be trained, saved or moved. The plain weights are freed, except an embedding
    table that is also the head, which is read in both layouts.
    """
    accelerate(model)
    weight = model.embed.weight
    if packs(weight.device, weight.dtype):
        pack(model, rows)
    if weight.device.type == "cpu":
        keep_freed_memory()  # for prompts; the plain weights have gone back to Linux already
    return model


def pack(model, rows):
    """Replaces the linear layers of model, and the head, by packed ones for that many rows."""
    # never list all linear layers at once: the list would keep every plain weight alive
    for parent in [m for m in model.modules() if not isinstance(m, nn.Linear)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "kv_b_proj":  # MLA reads it as matrices too
                setattr(parent, name, PackedLinear(child.weight, child.bias, rows))
    if model.lm_head is None:
        model.lm_head = PackedLinear(model.embed.weight, None, rows)


# -- memory ----------------------------------------------------------------------------------------

def keep_freed_memory(keep=True):
    """Makes glibc keep large blocks that are freed, so that the next step or prompt reuses them.

    Otherwise they go back to Linux and are requested again page by page, which takes half of the
    time of a large loss head on a CPU (a step with 50,304 ids takes 857 instead of 1,286 ms).
    keep=False sets the thresholds that glibc begins with.
    """
    blocks, heap = 2**17, 2**17
    if keep:
        blocks, heap = 2**30, 2**31 - 1
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        # M_MMAP_THRESHOLD: smaller blocks use the heap. Older versions take 32 MiB at most.
        if not libc.mallopt(-3, blocks):
            libc.mallopt(-3, 2**25)
        libc.mallopt(-1, heap)  # M_TRIM_THRESHOLD: a larger end of the heap is returned
