"""How large glibc's heap grows under a series of allocations: what is alive, and what lies unusable in between.

With rlft.kernels.keep_memory every tensor of a CPU run lives in one heap that never shrinks. torch asks for addresses
that 64 divides, and glibc then looks for a chunk that is longer by the alignment, so the hole that a tensor leaves does
not fit the next tensor of its size. The slivers that are cut off before and behind it, of at most 128 bytes, go to the
small objects of C++ and Python. In a forward pass many of those are autograd's nodes, which live until the backward
pass and keep neighbouring holes apart; in a backward pass they come and go. Measured, a learning step of SmolLM2-135M
needed 1.2 to 1.6 times the bytes alive. This plays malloc's rules (best fit, split, merge; malloc.c, _int_memalign) on
sizes alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort

ALIGNMENT, SMALLEST, HEADER, SLIVER = 64, 32, 16, 128


class Heap:
    """Free chunks in order of size, and where each begins and ends.

    top: how far the heap reaches. crowded: small objects that stay take up slivers.
    """

    def __init__(self, crowded: bool = True) -> None:
        self.top = 0
        self.crowded = crowded
        self._sizes: list[tuple[int, int]] = []  # (size, start)
        self._starts: dict[int, int] = {}  # of free chunks: start -> end
        self._ends: dict[int, int] = {}
        self._used: dict[int, int] = {}

    def take(self, size: int) -> int:
        """An address for so many bytes."""
        need = max(SMALLEST, (size + HEADER + 15) // 16 * 16)
        asked = need + ALIGNMENT + SMALLEST
        place = bisect_left(self._sizes, (asked, 0))
        if place < len(self._sizes):
            length, start = self._sizes[place]
            self._drop(start, start + length)
            end = start + length
        else:
            start = self._tail()
            end = self.top = max(self.top, start + asked)
        begin = (start + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        if start < begin < start + SMALLEST:
            begin += ALIGNMENT
        if begin > start:
            self._put(start, begin)
        if end - begin - need >= SMALLEST:
            self._put(begin + need, end)
            end = begin + need
        self._used[begin] = end
        return begin

    def give(self, address: int) -> None:
        """The bytes at an address are free again."""
        self._put(address, self._used.pop(address))

    def _tail(self) -> int:
        """Where a chunk at the end of the heap can begin: at the free one there, if there is one."""
        start = self._ends.get(self.top)
        if start is None:
            return self.top
        self._drop(start, self.top)
        return start

    def _put(self, start: int, end: int) -> None:
        """A free chunk, merged with its free neighbours."""
        if self.crowded and end - start <= SLIVER:
            return
        before, after = self._ends.get(start), self._starts.get(end)
        if before is not None:
            self._drop(before, start)
            start = before
        if after is not None:
            self._drop(end, after)
            end = after
        self._starts[start], self._ends[end] = end, start
        insort(self._sizes, (end - start, start))

    def _drop(self, start: int, end: int) -> None:
        del self._starts[start], self._ends[end]
        del self._sizes[bisect_left(self._sizes, (end - start, start))]
