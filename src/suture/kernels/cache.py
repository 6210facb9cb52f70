"""Machine code without a compiler at hand: loads what numba compiled once, and calls it.

Importing numba and making it ready takes most of a second, more than a small merge. So each kernel
is compiled once, its object code is kept in the user's cache, and later processes load it through
LLVM's loader alone. The cache is keyed by the source of the kernels, the processor and the versions
of the tools; what does not fit is compiled anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
import tempfile
import threading
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from suture.tensors.spec import cache_folder

_NUMBERS = {"i8": "q", "u8": "Q", "f8": "d"}
_FORMAT = b"suture-kernel-3\n"
_threads = threading.local()
_lock = threading.Lock()
announce: Callable[[], None] | None = None
"""Called before the first compilation of a process, which takes seconds."""


class Kernel:
    """A compiled function of ``kernels.loops`` or ``ranks``; takes numpy arrays and numbers.

    Args:
        name: of the function.
        signature: its parameters in numba's notation, such as ``"f4[:, ::1] f4[::1] i8 i8"``; an
            array must be contiguous and of exactly this dtype.
        scratch: how many float32 of scratch it needs, from the number of rows of its first
            parameter; it is handed in as the last one.

    Raises:
        TypeError: on a call whose arguments are not of the signature.
    """

    def __init__(
        self, name: str, signature: str, scratch: Callable[[int], int] | None = None
    ) -> None:
        self.name = name
        self.signature = signature
        self.scratch = scratch
        self._kinds = [_kind(w) for w in re.findall(r"[a-z]\d(?:\[[^]]*\])?", signature)]
        # Result, error; of an array two owners (none), size, item size, address, shape, strides.
        self._struct = struct.Struct("qq" + "".join(
            "q" * (5 + 2 * rank) if rank else _NUMBERS[dtype] for dtype, rank in self._kinds
        ))  # fmt: skip
        self._local = threading.local()
        self._function: Any = None

    def __call__(self, *args: Any) -> int:
        """Run it without the interpreter lock; returns its result, 0 where it has none."""
        function = self._function or self._load()
        if self.scratch is not None:
            args = (*args, self._scratch(getattr(args[0], "shape", (1,))[0]))
        if len(args) != len(self._kinds):
            raise TypeError(f"{self.name} takes {len(self._kinds)} arguments, not {len(args)}")
        result = self._result()
        flat: list[Any] = [ctypes.addressof(result), ctypes.addressof(result) + 8]
        for value, kind in zip(args, self._kinds, strict=True):
            if kind[1] == 0:
                flat.append(value)
                continue
            known = _arrays.get(id(value))
            if known is None or known[0]() is not value:
                known = _look_at(value)
            if known[1] != kind:
                raise TypeError(f"{self.name}: {known[1]} was given for {kind}")
            flat += known[2]
        status = function(self._struct.pack(*flat))
        if status:
            raise RuntimeError(f"{self.name} failed with status {status}")
        return int(result[0])

    def _result(self) -> Any:
        """Where the function puts its result, and an error it cannot have."""
        held = getattr(_threads, "result", None)
        if held is None:
            held = _threads.result = (ctypes.c_int64 * 2)()
        held[0] = 0
        return held

    def _scratch(self, rows: int) -> Any:
        assert self.scratch is not None
        size = self.scratch(rows)
        held = getattr(self._local, "held", None)
        if held is None or held.size < size:
            held = self._local.held = np.zeros(size, np.float32)
        return held

    def _load(self) -> Any:
        with _lock:
            if self._function is None:
                code = _cached(self.name) or _compiled(self)
                address = _engine().add(*code)
                self._function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p)(address)
        return self._function


_arrays: dict[int, tuple[weakref.ref[Any], tuple[str, int], tuple[int, ...]]] = {}
"""What a call needs to know of arrays that were used before; most are a thread's own buffers."""


def _look_at(value: Any) -> tuple[weakref.ref[Any], tuple[str, int], tuple[int, ...]]:
    facts = value.__array_interface__
    if facts["strides"] is not None:
        raise TypeError("a kernel was given an array that is not contiguous")
    address, kind = facts["data"][0], facts["typestr"]
    flat = (0, 0, value.size, value.itemsize, address, *value.shape, *value.strides)
    found = (weakref.ref(value), (kind[1:], value.ndim), flat)
    if len(_arrays) > 4096:
        _arrays.clear()
    _arrays[id(value)] = found
    return found


def _kind(word: str) -> tuple[str, int]:
    name, _, shape = word.partition("[")
    return name, shape.count(",") + 1 if shape else 0


@cache
def _engine() -> _Engine:
    return _Engine()


class _Engine:
    """LLVM's loader of object code."""

    def __init__(self) -> None:
        import llvmlite.binding as llvm

        self._llvm = llvm
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        # Numba's reference counts are compiled into every function that has arrays; with arrays
        # that numba does not own, nothing is ever counted, but the name must be there.
        self._unused = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
        address = ctypes.cast(self._unused, ctypes.c_void_p).value
        llvm.add_symbol("NRT_MemInfo_call_dtor", address)
        machine = llvm.Target.from_default_triple().create_target_machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)

    def add(self, symbol: str, code: bytes) -> int:
        """Load object code; the address of its function."""
        self._engine.add_object_file(self._llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        return int(self._engine.get_function_address(symbol))


@cache
def _folder() -> Path:
    """Where machine code for this processor and these sources is kept."""
    import llvmlite.binding as llvm

    source = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    facts = [llvm.get_default_triple(), llvm.get_host_cpu_name(),
             llvm.get_host_cpu_features().flatten(), str(llvm.llvm_version_info)]  # fmt: skip
    key = hashlib.sha256("\n".join(facts).encode() + source).hexdigest()[:24]
    return cache_folder() / "kernels" / key


def _cached(name: str) -> tuple[str, bytes] | None:
    try:
        found = (_folder() / f"{name}.o").read_bytes()
    except OSError:
        return None
    if not found.startswith(_FORMAT):
        return None
    digest, symbol, code = found[len(_FORMAT) :].split(b"\n", 2)
    if hashlib.sha256(symbol + b"\n" + code).hexdigest().encode() != digest:
        return None  # cut short, or changed
    return symbol.decode(), code


def _compiled(kernel: Kernel) -> tuple[str, bytes]:
    """Compile with numba and keep the object code."""
    global announce
    if announce is not None:
        announce()
        announce = None
    import llvmlite.binding as llvm
    from numba.core.registry import cpu_target
    from numba.core.sigutils import normalize_signature

    from suture.kernels import loops, ranks

    function = getattr(ranks if hasattr(ranks, kernel.name) else loops, kernel.name)
    wanted = f"({kernel.signature})"
    function.compile(wanted)
    # Another kernel that calls this one may have had it compiled for other types before.
    found = function.overloads[normalize_signature(wanted)[0]]  # type: ignore[no-untyped-call]
    text = found.library.get_llvm_str()
    needed = {line.split("@")[1].split("(")[0] for line in text.splitlines()
              if line.startswith("declare") and "@llvm." not in line}  # fmt: skip
    assert needed <= {"NRT_MemInfo_call_dtor", "memset", "memcpy"}, needed
    symbol = f"suture_{kernel.name}"
    inner = found.fndesc.llvm_func_name
    types = [str(a.type) for a in llvm.parse_assembly(text).get_function(inner).arguments]
    module = llvm.parse_assembly(text + _unpacker(symbol, inner, types))
    code = cpu_target.target_context.codegen()._tm.emit_object(module)
    _keep(kernel.name, symbol.encode() + b"\n" + code)
    return symbol, code


def _unpacker(symbol: str, inner: str, types: list[str]) -> str:
    """A function, as LLVM's text, that takes the parameters of another from memory.

    Handing over seventy of them one by one costs ctypes more than a small block's arithmetic. It
    has a name of its own, too: the loader must not take a copy of the kernel that another kernel
    holds, fitted to its calls, for the kernel itself.
    """
    pointer = "ptr" if types[0] == "ptr" else "i64*"
    lines, values = [f"define i32 @{symbol}({pointer} %args) {{"], []
    for i, kind in enumerate(types):
        lines += [f"  %p{i} = getelementptr i64, {pointer} %args, i64 {i}",
                  f"  %i{i} = load i64, {pointer} %p{i}, align 1"]  # fmt: skip
        if kind != "i64":
            cast = "bitcast" if kind == "double" else "inttoptr"
            lines.append(f"  %v{i} = {cast} i64 %i{i} to {kind}")
        values.append(f"{kind} %{'i' if kind == 'i64' else 'v'}{i}")
    lines += [f'  %status = call i32 @"{inner}"({", ".join(values)})', "  ret i32 %status", "}"]
    return "\n".join(["", *lines, ""])


def _keep(name: str, content: bytes) -> None:
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=_folder(), delete=False) as file:
            file.write(_FORMAT + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        Path(file.name).replace(_folder() / f"{name}.o")
    except OSError:
        return  # without a cache every process compiles for itself
