"""What is known of GPUs, and how they are named on a command line: `h200`, `4090x2`, `24GB`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from turbolm.config import Gpu, Hardware
from turbolm.errors import ConfigError, nearest
from turbolm.planner.speed import GPU, Rates

_GIB = 1 << 30
_CONTEXT = 600_000_000  # bytes that a process's CUDA context takes: measured on an H200
_USABLE = 0.98  # of a card's nominal size, where no more is known of it
_PLAIN_CAPABILITY = (8, 0)  # the oldest that turbolm's kernels run on
_SIZE = re.compile(r"(\d{1,4})\s*gi?b?", re.IGNORECASE)
_COUNTED = re.compile(r"(.+?)[x×](\d{1,2})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Card:
    """Data-sheet figures, without sparsity; memory as the driver reports it."""

    title: str
    memory: float  # GiB
    bandwidth: float  # TB/s
    operations: float  # TFLOP/s in bfloat16, summed in float32
    capability: tuple[int, int]


#: Sources: NVIDIA's data sheets of the data-center cards, its architecture papers of the others.
CARDS: dict[str, Card] = {
    "h200": Card("NVIDIA H200", 139.8, 4.8, 989, (9, 0)),
    "h100": Card("NVIDIA H100 SXM", 79.1, 3.35, 989, (9, 0)),
    "h100-nvl": Card("NVIDIA H100 NVL", 93.1, 3.9, 835, (9, 0)),
    "h100-pcie": Card("NVIDIA H100 PCIe", 79.1, 2.0, 756, (9, 0)),
    "h20": Card("NVIDIA H20", 95.1, 4.0, 148, (9, 0)),
    "a100": Card("NVIDIA A100 80 GB", 79.1, 2.039, 312, (8, 0)),
    "a100-40gb": Card("NVIDIA A100 40 GB", 39.4, 1.555, 312, (8, 0)),
    "l40s": Card("NVIDIA L40S", 44.4, 0.864, 362, (8, 9)),
    "a6000": Card("NVIDIA RTX A6000", 47.4, 0.768, 154.8, (8, 6)),
    "5090": Card("NVIDIA RTX 5090", 31.3, 1.792, 209.5, (12, 0)),
    "4090": Card("NVIDIA RTX 4090", 23.5, 1.008, 165.2, (8, 9)),
    "3090": Card("NVIDIA RTX 3090", 23.6, 0.936, 71, (8, 6)),
    "a10": Card("NVIDIA A10", 22.1, 0.6, 125, (8, 6)),
    "l4": Card("NVIDIA L4", 22.0, 0.3, 121, (8, 9)),
}
#: As drivers call those whose name is another.
_DRIVER_NAMES = {
    "h100": ("H100 80GB HBM3",),
    "a100": ("A100-SXM4-80GB", "A100 80GB PCIe"),
    "a100-40gb": ("A100-SXM4-40GB", "A100-PCIE-40GB"),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a model might run."""

    name: str
    """As it was given: `h200x2`."""
    title: str
    hardware: Hardware
    rates: Rates | None  # of one GPU, or of the CPU; None: nothing is known of its speed

    @property
    def num_gpus(self) -> int:
        return len(self.hardware.gpus)


def parse_machine(text: str) -> Machine:
    """`h200`, `4090x2`, `24GB`, `80GBx4` → that many cards. ConfigError for cards that are not known."""
    given = text.strip().lower()
    match = _COUNTED.fullmatch(given)
    kind, count = (match[1].strip(), int(match[2])) if match else (given, 1)
    size = _SIZE.fullmatch(kind)
    if (kind not in CARDS and not size) or count < 1 or (size and int(size[1]) < 1):
        raise ConfigError(
            f"the GPU '{text}' isn't known.{nearest(kind, CARDS)} Give one of {', '.join(CARDS)}, or a size such as "
            "24GB; with x2, x4 and so on behind it for several"
        )
    if kind in CARDS:
        card = CARDS[kind]
        rates = Rates(card.bandwidth * 1e12, card.operations * 1e12, GPU)
        return _cards(given, card.title, int(card.memory * _GIB), card.capability, count, rates)
    assert size is not None
    memory = int(int(size[1]) * _GIB * _USABLE)
    return _cards(given, f"{int(size[1])} GB card", memory, _PLAIN_CAPABILITY, count, None)


def more_cards(machine: Machine, count: int) -> Machine:
    """The same cards, `count` of them."""
    match = _COUNTED.fullmatch(machine.name)
    return parse_machine(f"{match[1] if match else machine.name}x{count}")


def found_gpus(gpus: Sequence[Gpu]) -> Machine:
    """This machine's, as they are now; the speed of those that the table knows."""
    card = _card_named(gpus[0].name)
    rates = Rates(card.bandwidth * 1e12, card.operations * 1e12, GPU) if card else None
    return Machine("here", _counted(gpus[0].name, len(gpus)), _hardware(tuple(gpus)), rates)


def _card_named(name: str) -> Card | None:
    """By the driver's name."""
    short = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    for key, names in _DRIVER_NAMES.items():
        if short in names:
            return CARDS[key]
    return next((card for card in CARDS.values() if card.title == f"NVIDIA {short}"), None)


def found_cpu(hardware: Hardware, rates: Rates | None) -> Machine:
    """This machine's CPU and memory, as they are now."""
    return Machine("cpu", f"this CPU ({hardware.cpu})", replace(hardware, gpus=(), gpu_native_error=None), rates)


def _cards(name: str, title: str, memory: int, capability: tuple[int, int], count: int, rates: Rates | None) -> Machine:
    gpu = Gpu(title, memory, max(0, memory - _CONTEXT), capability)
    return Machine(name, _counted(title, count), _hardware((gpu,) * count), rates)


def _counted(title: str, count: int) -> str:
    return f"one {title}" if count == 1 else f"{count} x {title}"


def _hardware(gpus: tuple[Gpu, ...]) -> Hardware:
    return Hardware("", "x86_64", 1, (), 0, 0, gpus=gpus)
