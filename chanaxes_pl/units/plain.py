"""A network whose weights can be cut: weights that are computed are written out, and attention is made of layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm

from chanaxes_pl.network.batches import FAILURES
from chanaxes_pl.network.cloning import clone
from chanaxes_pl.network.hooks import same_outputs
from chanaxes_pl.network.layers import CONVOLUTIONS, WRAPPERS
from chanaxes_pl.network.sampling import ARGUMENTS, Convolutions

# The hooks by which torch.nn.utils computed a weight before there were parametrizations: class → how to write it out.
_HOOKS = {
    "WeightNorm": remove_weight_norm,
    "SpectralNorm": remove_spectral_norm,
}
# Outputs of a convolution and of the plain one that takes its place differ by rounding alone.
_SHARE = 1e-4


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` or one of :data:`WRAPPERS` holds, whose tensors have other names."""
    inside = model.module if isinstance(model, WRAPPERS) else getattr(model, "_orig_mod", None)
    return unwrapped(inside) if isinstance(inside, nn.Module) else model


def plain(model: nn.Module) -> nn.Module:
    """Return a model that computes the same with plain weights: the model itself, or a copy if some are not.

    Parametrizations, such as ``weight_norm``, ``spectral_norm`` and the masks of ``torch.nn.utils.prune``, are written
    into the weights. A convolution of a class of its own that computes a weight from its own, as weight
    standardisation does, becomes a plain one. Each :class:`torch.nn.MultiheadAttention` becomes a
    :class:`PlainAttention`.

    Args:
        model: model; it does not change.
    """
    names = not_plain(model)
    if not names:
        return model
    copied = clone(model)
    for name in names:
        module = copied.get_submodule(name)
        if (replaced := _replaced(module)) is not None:
            home, _, leaf = name.rpartition(".")
            setattr(copied.get_submodule(home), leaf, replaced)
            continue
        training = module.training
        module.eval()
        if parametrize.is_parametrized(module):
            _write_out(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif _computes(hook):
                _HOOKS[type(hook).__name__](module, getattr(hook, "name"))  # noqa: B009
        module.train(training)
    return copied


def not_plain(model: nn.Module) -> list[str]:
    """Return the names of the modules that :func:`plain` replaces, or whose weights it writes out."""
    return [
        name
        for name, module in model.named_modules()
        if _replaced(module) is not None
        or parametrize.is_parametrized(module)
        or any(_computes(hook) for hook in module._forward_pre_hooks.values())
    ]


def _write_out(module: nn.Module) -> None:
    """Replace the parametrizations of a module by what they compute.

    torch's own remove_parametrizations would change the class of the module, which a copy shares with its original.
    """
    held: Any = module.parametrizations
    values = {leaf: getattr(module, leaf).detach().clone() for leaf in held}
    trained = {leaf: any(tensor.requires_grad for tensor in held[leaf].parameters()) for leaf in held}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for leaf, value in values.items():
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=trained[leaf]))


def _computes(hook: Any) -> bool:
    """Return whether a hook computes a weight from other tensors."""
    return isinstance(hook, prune.BasePruningMethod) or (
        type(hook).__name__ in _HOOKS and type(hook).__module__.startswith("torch.nn.utils")
    )


def _replaced(module: nn.Module) -> nn.Module | None:
    """Return what stands for a module in a plain network; ``None`` if it stays."""
    if type(module) is nn.MultiheadAttention:
        usual = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
        return PlainAttention(module) if usual else None
    kind = next((kind for kind in CONVOLUTIONS if isinstance(module, kind)), None)
    if kind is None or type(module).forward is kind.forward:
        return None
    assert isinstance(module, CONVOLUTIONS)
    return _convolution(module, kind)


def _convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, kind: type[nn.Module]) -> nn.Module | None:
    """Return a plain convolution with the weight that a layer computes, if that is all that its class changes."""
    sides = [2 + step * (width - 1) for step, width in zip(layer.dilation, layer.kernel_size, strict=True)]
    weight, drawn = layer.weight, torch.Generator().manual_seed(0)
    example = torch.randn(2, layer.in_channels, *sides, generator=drawn).to(weight)
    other = 3 - 2 * example
    training = layer.training
    try:
        with torch.no_grad():
            with Convolutions() as seen:
                gave = layer.eval()(example)
            gave_other = layer(other)
    except torch.OutOfMemoryError:
        raise
    except FAILURES:
        return None
    finally:
        layer.train(training)
    if len(seen.calls) != 1:
        return None
    given: list[Any] = [seen.calls[0][1].get(name) for name in ARGUMENTS]
    read, computed, bias, *rest = given
    own = [layer.stride, layer.padding, layer.dilation, layer.groups]
    if (
        read is not example
        or computed is weight
        or computed.shape != weight.shape
        or bias is not layer.bias
        or rest != own
    ):
        return None
    new = kind(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        *rest,
        bias is not None,
        device="meta",
        dtype=weight.dtype,
    )
    new.weight = nn.Parameter(computed.detach().clone(), requires_grad=weight.requires_grad)
    if layer.bias is not None:
        new.bias = layer.bias
    with torch.no_grad():  # it may do more with its output, or make its weight of its input
        same = same_outputs(new(example), gave, _SHARE) and same_outputs(new(other), gave_other, _SHARE)
    return new.train(training) if same else None


class PlainAttention(nn.Module):
    """Multi-head attention made of two Linear layers; it has any number of heads, of any width.

    It takes and gives what :class:`torch.nn.MultiheadAttention` does, whose weights it holds.

    Args:
        attention: module with one weight for queries, keys and values.

    Attributes:
        in_proj: layer from the stream to queries, keys and values.
        out_proj: layer from the heads' outputs to the stream.
        head_dim: channels of a head's queries, keys and values.
        scale: factor of the logits, which stays if heads get narrower.
    """

    #: None, which makes torch's Transformer layers call this module rather than a kernel for the usual sizes.
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        like: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
        self.in_proj = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, **like)
        self.in_proj.weight = weight
        if bias is not None:
            self.in_proj.bias = bias
        out = attention.out_proj
        self.out_proj = nn.Linear(out.in_features, out.out_features, out.bias is not None, **like)
        self.out_proj.weight, self.out_proj.bias = out.weight, out.bias
        self.head_dim = attention.head_dim
        self.scale = 1 / math.sqrt(attention.head_dim)
        self.batch_first = attention.batch_first
        self.dropout = attention.dropout
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see :class:`torch.nn.MultiheadAttention`."""
        # Without branches that depend on a shape, so that torch.fx can trace what comes with the batch first.
        swaps = not self.batch_first and query.ndim == 3
        if query is key and key is value:
            q, k, v = self.in_proj(query).chunk(3, -1)
        else:
            weights = self.in_proj.weight.chunk(3)
            biases = (None, None, None) if self.in_proj.bias is None else self.in_proj.bias.chunk(3)
            q, k, v = (F.linear(*each) for each in zip((query, key, value), weights, biases, strict=True))
        q, k, v = self._by_head(q, swaps), self._by_head(k, swaps), self._by_head(v, swaps)
        mask = _mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            logits = q @ k.mT * self.scale
            shares = F.dropout((logits if mask is None else logits + mask).softmax(-1), dropout)
            heads, shown = shares @ v, shares.mean(-3) if average_attn_weights else shares
        else:
            heads, shown = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale), None
        output = self.out_proj(heads.transpose(-2, -3).flatten(-2))
        return output.transpose(0, 1) if swaps else output, shown

    def _by_head(self, part: Tensor, swaps: bool) -> Tensor:
        """Return queries, keys or values as ``[B, heads, tokens, head_dim]``."""
        part = part.transpose(0, 1) if swaps else part
        return part.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3)


def _mask(attend: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """Return what is added to the logits ``[B, heads, queries, keys]``; ``None`` if nothing is."""
    total = None
    if attend is not None:
        total = _added(attend, like)
        if attend.ndim == 3:  # one for each image and head
            total = total.unflatten(0, (len(like), -1))
    if padding is not None:
        per_key = _added(padding if padding.ndim > 1 else padding[None], like)[:, None, None]
        total = per_key if total is None else total + per_key
    return total


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)
