"""What a practitioner would write in PyTorch for the workloads of the GPU benchmark, each a function of no arguments.

Mixed precision by `autocast` in bfloat16, images in channels-last memory, cuDNN free to choose its convolutions, loss
and penalty in float32. Weights are random: only the time is compared. PyTorch and torchvision are imported where they
are used.
"""

import copy
from collections.abc import Callable
from typing import Any

Step = Callable[[], Any]

RATE, MOMENTUM, STRENGTH, TEMPERATURE = 0.01, 0.9, 0.01, 4.0


def images(count: int, side: int) -> tuple[Any, Any]:
    """Returns images of noise [count, 3, side, side] in channels-last memory and labels of a thousand classes."""
    import torch  # pyright: ignore[reportMissingImports]

    pixels = torch.rand(count, 3, side, side).contiguous(memory_format=torch.channels_last)
    return pixels, torch.randint(0, 1000, (count,))


def fine_tuning(name: str, count: int, side: int, *, penalty: bool, compiled: bool) -> Step:
    """Returns a step of fine-tuning by SGD with momentum, L2-SP over all parameters if asked."""
    import torch  # pyright: ignore[reportMissingImports]
    import torchvision  # pyright: ignore[reportMissingImports]

    net = getattr(torchvision.models, name)(weights=None).to(memory_format=torch.channels_last)
    anchors = [parameter.detach().clone() for parameter in net.parameters()]
    forward = torch.compile(net) if compiled else net
    optimizer = torch.optim.SGD(net.parameters(), RATE, MOMENTUM)
    pixels, labels = images(count, side)
    device = pixels.device.type

    def step() -> Any:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            logits = forward(pixels)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        if penalty:
            pairs = zip(net.parameters(), anchors, strict=True)
            loss = loss + STRENGTH / 2 * sum((new - old).square().sum() for new, old in pairs)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def distillation(student: str, teacher: str, count: int, side: int) -> Step:
    """Returns a step that distils one network of torchvision into another (Hinton et al. 2015)."""
    import torch  # pyright: ignore[reportMissingImports]
    import torchvision  # pyright: ignore[reportMissingImports]

    build = torchvision.models
    own = getattr(build, student)(weights=None).to(memory_format=torch.channels_last)
    wise = getattr(build, teacher)(weights=None).to(memory_format=torch.channels_last).eval()
    optimizer = torch.optim.SGD(own.parameters(), RATE, MOMENTUM)
    pixels, labels = images(count, side)
    device, functional = pixels.device.type, torch.nn.functional

    def step() -> Any:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                targets = wise(pixels)
            logits = own(pixels)
        logits, targets = logits.float(), targets.float()
        soft = functional.kl_div(
            functional.log_softmax(logits / TEMPERATURE, 1),
            functional.log_softmax(targets / TEMPERATURE, 1),
            reduction="batchmean",
            log_target=True,
        )
        loss = 0.1 * functional.cross_entropy(logits, labels) + 0.9 * TEMPERATURE**2 * soft
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def simclr(count: int) -> Step:
    """Returns a SimCLR step of ResNet-18 with a stem for images of 32×32; the two views are given."""
    import torch  # pyright: ignore[reportMissingImports]
    import torchvision  # pyright: ignore[reportMissingImports]

    net = torchvision.models.resnet18(weights=None)
    net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    net.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 128))
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), RATE, MOMENTUM)
    pixels, _ = images(2 * count, 32)
    off = ~torch.eye(2 * count, dtype=torch.bool)
    target = torch.cat([torch.arange(count) + count - 1, torch.arange(count)])

    def step() -> Any:
        optimizer.zero_grad()
        with torch.autocast(pixels.device.type, torch.bfloat16):
            z = net(pixels)
        z = torch.nn.functional.normalize(z.float(), dim=1)
        loss = torch.nn.functional.cross_entropy((z @ z.T / 0.5)[off].view(2 * count, -1), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def nt_xent(one: Any, other: Any, *, temperature: float) -> Step:
    """Returns value and gradient of NT-Xent by the whole matrix, of two arrays [N, D]."""
    import torch  # pyright: ignore[reportMissingImports]

    first, second = (torch.as_tensor(copy.copy(view)).requires_grad_() for view in (one, other))
    size = len(first)
    off = ~torch.eye(2 * size, dtype=torch.bool)
    target = torch.cat([torch.arange(size) + size - 1, torch.arange(size)])

    def step() -> Any:
        first.grad = second.grad = None
        z = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
        loss = torch.nn.functional.cross_entropy((z @ z.T / temperature)[off].view(2 * size, -1), target)
        loss.backward()
        return loss.detach()

    return step
