"""The memory that kernels see: buffers in global memory, shared and local memory, and what every byte may be used for.

A :class:`Space` has a shadow byte for each byte: whether it exists, was ever written, may be written, was read, is the
target of a copy in flight. An access that its shadow does not allow is an error that says what was wrong.
"""

from __future__ import annotations

import numpy as np

from .module import PtxError

__all__ = ["GLOBAL_BASE", "LOCAL_WINDOW", "SHARED_WINDOW", "Buffer", "Memory", "Space"]

# First generic address of each space. They are far apart: a wrong offset does not reach another space.
GLOBAL_BASE = 0x7020_0000_0000
SHARED_WINDOW = 0x7E00_0000_0000
LOCAL_WINDOW = 0x7D00_0000_0000

EXISTS, WRITTEN, WRITABLE, READ, IN_FLIGHT = 1, 2, 4, 8, 16

_VIEWS = {1: (np.uint8, 1), 2: (np.uint16, 1), 4: (np.uint32, 1), 8: (np.uint64, 1), 16: (np.uint64, 2)}
_VIEWS[32] = (np.uint64, 4)


def _repeated(flags: int, width: int) -> np.unsignedinteger:
    dtype = _VIEWS[width][0]
    return dtype(int.from_bytes(bytes([flags]) * min(width, 8), "little"))


# The last but one argument of a check, by width.
LOADABLE = {width: _repeated(EXISTS | WRITTEN, width) for width in _VIEWS}
STORABLE = {width: _repeated(EXISTS | WRITABLE, width) for width in _VIEWS}
FLYING = {width: _repeated(IN_FLIGHT, width) for width in _VIEWS}
NOW_WRITTEN = {width: _repeated(WRITTEN, width) for width in _VIEWS}
NOW_READ = {width: _repeated(READ, width) for width in _VIEWS}


def view(data: np.ndarray, width: int) -> np.ndarray:
    """Bytes as elements of a width, those of 16 and 32 bytes as rows of uint64."""
    dtype, columns = _VIEWS[width]
    elements = data.view(dtype)
    return elements if columns == 1 else elements.reshape(-1, columns)


class Space:
    """Bytes and their shadow. Offsets are int64 arrays in units of the access width, already checked for the bound."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.resize(size)

    def resize(self, size: int) -> None:
        size = -(-size // 32) * 32
        data, shadow = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        if hasattr(self, "data"):
            data[: self.data.size], shadow[: self.data.size] = self.data, self.shadow
        self.data, self.shadow, self.size = data, shadow, size
        self.views = {width: view(data, width) for width in _VIEWS}
        self.shadows = {width: view(shadow, width) for width in _VIEWS}

    def load(self, places: np.ndarray, width: int, mark: bool) -> np.ndarray | None:
        """The elements, or None if one may not be loaded."""
        shadow = self.shadows[width][places]
        wanted = LOADABLE[width]
        if np.bitwise_and.reduce(shadow, axis=None) & wanted != wanted:
            return None
        if mark:
            self.shadows[width][places] = shadow | NOW_READ[width]
        return self.views[width][places]

    def store(self, places: np.ndarray, width: int, values: np.ndarray) -> bool:
        """Stores the elements. False, and nothing is stored, if one element may not be stored."""
        shadow = self.shadows[width][places]
        wanted = STORABLE[width]
        if np.bitwise_and.reduce(shadow, axis=None) & wanted != wanted:
            return False
        if np.bitwise_or.reduce(shadow, axis=None) & FLYING[width]:
            return False
        self.shadows[width][places] = shadow | NOW_WRITTEN[width]
        self.views[width][places] = values
        return True

    def complaint(self, start: int, width: int, store: bool) -> str | None:
        """The reason that forbids an access to `width` bytes at byte `start`, which are inside the space."""
        shadow = self.shadow[start : start + width]
        if not (shadow & EXISTS).all():
            return "out of bounds"
        if (shadow & IN_FLIGHT).any():
            return "the bytes are the target of a cp.async that was not waited for"
        if store:
            return None if (shadow & WRITABLE).all() else "a store to a read-only buffer"
        missing = np.flatnonzero(~shadow & WRITTEN)
        return f"an uninitialised read ({missing.size} of {width} bytes were never written)" if missing.size else None


class Buffer:
    """An array in global memory. A kernel gets its `address`."""

    def __init__(self, memory: Memory, name: str, start: int, size: int, dtype: np.dtype, shape: tuple) -> None:
        self.memory, self.name, self.start, self.size, self.dtype, self.shape = memory, name, start, size, dtype, shape

    def __int__(self) -> int:
        return self.address

    @property
    def address(self) -> int:
        return GLOBAL_BASE + self.start

    @property
    def written(self) -> np.ndarray:
        """bool per byte: whether it was ever written, by a kernel or by the allocation."""
        return (self.memory.space.shadow[self.start : self.start + self.size] & WRITTEN).astype(bool)

    @property
    def read_bytes(self) -> int:
        """The number of bytes that kernels have read at least once."""
        return int(np.count_nonzero(self.memory.space.shadow[self.start : self.start + self.size] & READ))

    def bytes(self) -> np.ndarray:
        """A copy of its bytes, written or not."""
        return self.memory.space.data[self.start : self.start + self.size].copy()

    def numpy(self) -> np.ndarray:
        """A copy in its dtype and shape. An element that no kernel wrote is an error."""
        missing = np.flatnonzero(~self.written)
        if missing.size:
            raise PtxError(
                f"Buffer.numpy: every element must have been written, got {missing.size} bytes of {self.name!r} that "
                f"were not, the first at {missing[0]} (element {missing[0] // self.dtype.itemsize})"
            )
        return self.bytes().view(self.dtype).reshape(self.shape)

    def set(self, array: np.ndarray) -> None:
        """New contents, of the same size."""
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        if raw.size != self.size:
            raise PtxError(f"Buffer.set: {self.name!r} has {self.size} bytes, got {raw.size}; allocate another")
        self.memory.space.data[self.start : self.start + self.size] = raw
        self.memory.space.shadow[self.start : self.start + self.size] |= WRITTEN


class Memory:
    """Global memory: buffers with gaps between them, that outlive a launch."""

    GAP = 4096

    def __init__(self) -> None:
        self.space = Space("global", 1 << 16)
        self.used = self.GAP
        self.buffers: list[Buffer] = []
        self.variables: dict[tuple[int, str], Buffer] = {}

    def allocate(self, name: str, array: np.ndarray, writable: bool = False, misaligned: int = 0) -> Buffer:
        """A buffer with the array's contents, `misaligned` bytes after a 256-byte boundary; kernels may only read it
        unless it is writable."""
        array = np.asarray(array)
        buffer = self._place(name, array.nbytes, array.dtype, array.shape, misaligned, EXISTS | WRITABLE * writable)
        buffer.set(array)
        return buffer

    def output(self, name: str, shape: int | tuple, dtype: object, misaligned: int = 0) -> Buffer:
        """A writable buffer with uninitialised contents (0xFF bytes, NaN as a float). Reading them is an error."""
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        buffer = self._place(name, size, dtype, shape, misaligned, EXISTS | WRITABLE)
        self.space.data[buffer.start : buffer.start + size] = 0xFF
        return buffer

    def _place(self, name: str, size: int, dtype: np.dtype, shape: tuple, misaligned: int, flags: int) -> Buffer:
        start = -(-self.used // 256) * 256 + misaligned
        self.used = start + size + self.GAP
        if self.used > self.space.size:
            self.space.resize(max(2 * self.space.size, self.used))
        self.space.shadow[start : start + size] = flags
        buffer = Buffer(self, name, start, size, dtype, shape)
        self.buffers.append(buffer)
        return buffer

    def nearest(self, address: int) -> str:
        """The buffer nearest to an address, as text for an error message."""
        if not self.buffers:
            return "there are no buffers"
        start = address - GLOBAL_BASE

        def distance(buffer: Buffer) -> int:
            return max(buffer.start - start, start - (buffer.start + buffer.size - 1), 0)

        buffer = min(self.buffers, key=distance)
        place = start - buffer.start
        return f"byte {place} of buffer {buffer.name!r}, which has {buffer.size} bytes"
