"""Networks of the original libraries with lively random weights, and what they give."""

import numpy as np
import torch


def lively(net, seed=0):
    """Fills parameters and running statistics with values that show whether each is used; returns the net."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0, generator=draw)
            elif name.endswith("running_mean"):
                value.normal_(0, 0.3, generator=draw)
            elif name.endswith("weight") and value.ndim == 1:
                value.uniform_(0.5, 1.5, generator=draw)
            elif value.ndim == 1 or "token" in name or "pos" in name:
                if value.is_floating_point():
                    value.normal_(0, 0.3, generator=draw)
            elif value.ndim > 1:
                value.normal_(0, (1.5 / value[0].numel()) ** 0.5, generator=draw)
    return net


def images(shape, seed=1):
    """Images [B, H, W, C] of floats."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(net, x, *, train, modules=()):
    """The logits, and what the modules named give: [B, H, W, C] where they are maps."""
    found, handles = {}, []
    for name in modules:
        hook = lambda _, __, out, name=name: found.__setitem__(name, out[0] if isinstance(out, tuple) else out)  # noqa: E731
        handles.append(net.get_submodule(name).register_forward_hook(hook))
    net.train(train)
    with torch.no_grad():
        out = net(torch.from_numpy(x).permute(0, 3, 1, 2))
    for handle in handles:
        handle.remove()
    found = {name: value.permute(0, 2, 3, 1) if value.ndim == 4 else value for name, value in found.items()}
    return getattr(out, "logits", out).numpy(), {name: value.numpy() for name, value in found.items()}


def error(ours, theirs):
    """The largest difference over the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()
