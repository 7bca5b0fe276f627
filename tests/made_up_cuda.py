"""A made-up CUDA for torch: tensors that say `cuda:0` and hold their values on the CPU.

Torch's dispatcher and autocast treat them as they treat tensors on a GPU, so that code for GPUs
runs where there is none. `install` changes torch for the rest of the process, so it is for
processes of their own. Two things are counted with the line of adversa that caused them:

- operations that mix a GPU's tensor with one of the CPU, which CUDA refuses;
- waits: what stops the host until the GPU has done all it was given. A value that Python reads
  (`item`, `tolist`, `bool`, `numpy`), a size that depends on values (`nonzero`, a mask as an
  index), a copy from the device, one from memory that is not pinned, `synchronize`.

Autograd's engine wants a device, so a backward pass gives every leaf of the graph a small random
gradient on the leaf's own device: figures that come out mean nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PACKAGE = str(Path(__file__).resolve().parents[1] / "adversa")
READS = {"_local_scalar_dense", "equal"}
SIZES = {"nonzero", "masked_select", "unique_dim", "_unique2", "bincount", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy"}


@dataclass
class Counts:
    """What happened since the last `clear`: number of times by (what, where)."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    mixed: Counter[tuple[str, str]] = field(default_factory=Counter)

    def clear(self) -> None:
        self.waits.clear()
        self.mixed.clear()

    def wait(self, what: str) -> None:
        self.waits[what, place()] += 1


COUNTS = Counts()


def place() -> str:
    """The nearest line of adversa among the callers."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{name.removeprefix(PACKAGE)[1:]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


class GPUTensor(torch.Tensor):
    """Says `cuda:0`. held: its values, on the CPU. pinned memory is a CPU tensor (see PINNED)."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> GPUTensor:
        made: GPUTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device("cuda", 0),
        )
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(function, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Operations that make a tensor on the GPU have none among their arguments."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_cuda(kwargs.get("device")) or any(
            isinstance(t, GPUTensor) for t in tree_leaves((args, kwargs))
        ):
            return dispatch(function, args, kwargs)
        return function(*args, **kwargs)


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


PINNED: set[int] = set()  # storages of CPU tensors that are pinned, by address


def is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in PINNED


def dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
        with Mode():
            made = function.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
    name = function.overloadpacket.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, GPUTensor)]
    here = [t for t in tensors if not isinstance(t, GPUTensor)]
    look(name, args, kwargs, there, here)
    back = name == "_local_scalar_dense" or (
        name == "_to_copy" and kwargs.get("device") is not None and not is_cuda(kwargs["device"])
    )
    answer = function(*tree_map(held, args), **tree_map(held, on_cpu(kwargs)))
    if name == "copy_":
        return args[0]
    known = {id(t.held): t for t in there}  # of operations in place
    return answer if back else tree_map(lambda t: wrapped(t, known), answer)


def on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    changed = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    return changed | ({"device": torch.device("cpu")} if kwargs.get("device") is not None else {})


def held(value: Any) -> Any:
    return value.held if isinstance(value, GPUTensor) else value


def wrapped(value: Any, known: dict[int, GPUTensor]) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, GPUTensor):
        return value
    return known.get(id(value)) if id(value) in known else GPUTensor(value)


def look(
    name: str,
    args: Any,
    kwargs: dict[str, Any],
    there: list[GPUTensor],
    here: list[torch.Tensor],
) -> None:
    """Count what an operation is not allowed, or waits for."""
    if there and name not in COPIES | INDEXING and any(t.dim() for t in here):
        COUNTS.mixed[name, place()] += 1
    if there and name in READS:
        COUNTS.wait("a value is read")
    if there and name in SIZES:
        COUNTS.wait(f"{name}: a size depends on values")
    if name in INDEXING and isinstance(args[0], GPUTensor):
        index = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
        if any(not isinstance(t, GPUTensor) and t.dim() for t in index):
            COUNTS.wait("an index is copied to the device")
        if any(t.dtype in (torch.bool, torch.uint8) for t in index):
            COUNTS.wait("a mask is an index")
    if name in COPIES:
        target = args[0] if name == "copy_" else None
        source = args[1] if name == "copy_" else args[0]
        to_gpu = isinstance(target, GPUTensor) or is_cuda(kwargs.get("device"))
        to_cpu = (
            isinstance(source, GPUTensor)
            and not to_gpu
            and (target is not None or kwargs.get("device") is not None)
        )
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
        if isinstance(source, GPUTensor) and to_cpu and (waits or target is None):
            COUNTS.wait("a copy from the device")
        if not isinstance(source, GPUTensor) and to_gpu and (waits or not is_pinned(source)):
            COUNTS.wait("a copy to the device, from memory that is not pinned or blocking")


# ---- what Python asks of torch -----------------------------------------------------------------


class Event:
    """A torch.cuda.Event: everything has happened already; waiting for it is counted."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        COUNTS.wait("an event is waited for")

    def wait(self, stream: Any = None) -> None: ...


def leaves(node: Any) -> Iterator[torch.Tensor]:
    """Of the graph behind a tensor."""
    seen: dict[int, Any] = {}  # held, for a node that is let go may give its id to the next
    todo = [node]
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen:
            continue
        seen[id(node)] = node
        if hasattr(node, "variable"):
            yield node.variable
        todo += [n for n, _ in node.next_functions]


def gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(leaf) * 1e-3


def backward(tensors: Any, *_: Any, **__: Any) -> None:
    with torch.no_grad():
        for t in [tensors] if isinstance(tensors, torch.Tensor) else tensors:
            for leaf in set(leaves(t.grad_fn)):
                leaf.grad = gradient(leaf) if leaf.grad is None else leaf.grad + gradient(leaf)


def grad(outputs: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    found = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    known = {id(leaf) for t in found for leaf in leaves(t.grad_fn)}
    asked = [inputs] if isinstance(inputs, torch.Tensor) else inputs
    assert all(id(t) in known for t in asked), "an input is no leaf of the graph"
    with torch.no_grad():
        return tuple(gradient(t) for t in asked)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
) -> torch.Tensor:
    """Of F.scaled_dot_product_attention, whose kernels for CUDA are not there."""
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    return ((query * scale) @ key.transpose(-1, -2)).softmax(-1).to(value.dtype) @ value


def install() -> Counts:
    """For the rest of this process."""
    torch._C._ensureCUDADeviceGuardSet()
    nothing = torch.zeros(16, dtype=torch.uint8)
    for name, answer in {
        "_lazy_init": None,
        "is_available": True,
        "is_initialized": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_name": "a made-up GPU",
        "get_device_capability": (9, 0),
        "manual_seed": None,
        "manual_seed_all": None,
        "get_rng_state": nothing,
        "set_rng_state": None,
        "set_device": None,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "is_bf16_supported": True,
    }.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.synchronize = lambda *_: COUNTS.wait("synchronize")
    torch.cuda.Event = Event  # type: ignore[assignment,misc]
    torch.backends.cudnn.enabled = False
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.Tensor.backward = backward  # type: ignore[assignment,method-assign]
    torch.autograd.backward = backward  # type: ignore[assignment]
    torch.autograd.grad = grad  # type: ignore[assignment]
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]

    def pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        found = tensor.clone()
        PINNED.add(found.untyped_storage().data_ptr())
        return found

    torch.Tensor.pin_memory = pin_memory  # type: ignore[assignment,method-assign]
    torch.Tensor.is_pinned = is_pinned  # type: ignore[assignment,method-assign]
    plain_tensor, plain_list, plain_generator = torch.tensor, torch.Tensor.tolist, torch.Generator

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        found = plain_tensor(data, **kwargs)
        return found if device is None else found.to(device)

    def tolist(self: torch.Tensor) -> Any:
        return plain_list(self.cpu() if isinstance(self, GPUTensor) else self)

    class Generator(plain_generator):  # type: ignore[misc,valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return plain_generator.__new__(cls, device="cpu")

        def __init__(self, device: Any = "cpu") -> None: ...

    torch.tensor, torch.Tensor.tolist = tensor, tolist  # type: ignore[assignment,method-assign]
    GPUTensor.tolist = tolist  # type: ignore[method-assign]
    torch.Generator = Generator  # type: ignore[misc]
    Mode().__enter__()
    return COUNTS
