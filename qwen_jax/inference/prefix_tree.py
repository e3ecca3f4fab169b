"""Sequences of tokens that begin alike: the order in which to compute them, so that each prefix is computed once.

In lexicographic order, sequences are the leaves of the tree of their prefixes, depth first: each adds the tokens after
those that it shares with the one before. A part of the tree that fits into one step is computed at once, in that order,
each token attending to those on its path. What does not fit is entered: its common prefix goes into the cache, in steps
of its own, and the parts below it then need not repeat it.

This module knows token ids alone: no model, no devices.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Reads:
    """Where a sequence is read.

    Attributes:
      positions: int64 [n], in rising order: the tokens after which the model is asked for the next one.
      ids: int64 [n], the caller's number of each read.
    """

    positions: np.ndarray
    ids: np.ndarray

    def between(self, first: int, stop: int) -> "Reads":
        """Those at positions from `first` to before `stop`."""
        part = slice(*np.searchsorted(self.positions, (first, stop)))
        return Reads(self.positions[part], self.ids[part])


@dataclasses.dataclass(frozen=True)
class Step:
    """Tokens of one lane that are computed at once.

    Attributes:
      start: how many tokens the lane's cache holds; all of them precede each token of the step.
      tokens: int32 [n].
      depths: int32 [n], position of each token in its sequence, `start` or more.
      ends: int32 [n], token i precedes the tokens i + 1 … ends[i] - 1 of the step, and no other.
      kept: whether the cache holds these tokens, too, from now on; each then follows the one before.
      slots, ids: int64 [reads], the token after which each read is, by its place in the step; number of the read.
    """

    start: int
    tokens: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    kept: bool
    slots: np.ndarray
    ids: np.ndarray


@dataclasses.dataclass
class _Branch:
    """A prefix that the cache holds, and the parts of the tree that are computed after it.

    Attributes:
      leaf, depth: the prefix is the first `depth` tokens of this leaf.
      reads: of the tokens that this prefix adds to those before it.
      units: (first leaf, leaf after the last) of each part of the tree that fits into a step.
    """

    leaf: int
    depth: int
    reads: Reads
    units: list[tuple[int, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Row:
    """Parts of the tree below one branch that are computed in one step."""

    branch: _Branch
    units: tuple[tuple[int, int], ...]
    tokens: int


class PrefixTree:
    """The tree of the prefixes of some sequences.

    Args:
      sequences: int32 arrays of at least one token, all different.
      reads: where each is read.
      most: the largest number of tokens of a step.
      unit: steps are filled up to a multiple of so many tokens: a shorter common prefix may cost less where it repeats.
    """

    def __init__(self, sequences: Sequence[np.ndarray], reads: Sequence[Reads], most: int, unit: int):
        # Big-endian bytes compare as the numbers do.
        order = sorted(range(len(sequences)), key=lambda index: sequences[index].astype(">i4").tobytes())
        self.leaves = [sequences[index] for index in order]
        self.reads = [reads[index] for index in order]
        self.most, self.unit = most, unit
        self.shared = np.asarray([0, *map(_shared, self.leaves, self.leaves[1:])])
        lengths = np.asarray([len(leaf) for leaf in self.leaves])
        self._added = np.concatenate([[0], np.cumsum(lengths - self.shared)])

    def lanes(self, count: int) -> list[Iterator[Step]]:
        """The steps of each of `count` lanes, which share no cache; together they make every read once.

        A lane's cache is as it was after the last step that was `kept`, cut to the `start` of the next one.
        """
        rows = [row for branch in self._branches() for row in self._rows(branch)]
        costs = [row.tokens for row in rows]
        for place, (before, row) in enumerate(zip([None, *rows], rows, strict=False)):
            if before is None or before.branch is not row.branch:
                costs[place] += row.branch.depth - (self._common(before.branch, row.branch) if before else 0)
        # Each lane takes neighbors, so that it need not compute another's prefixes.
        ends = np.cumsum(costs)
        lane_of = np.minimum((ends - np.asarray(costs) / 2) * count // ends[-1], count - 1).astype(int)
        first = {id(row.branch): place for place, row in reversed(list(enumerate(rows)))}
        marked = [(row, first[id(row.branch)] == place) for place, row in enumerate(rows)]
        return [self._steps([marked[place] for place in np.flatnonzero(lane_of == lane)]) for lane in range(count)]

    def _size(self, first: int, stop: int, depth: int) -> int:
        """Number of tokens below `depth` of the leaves from `first` to before `stop`, which share so many."""
        return len(self.leaves[first]) - depth + int(self._added[stop] - self._added[first + 1])

    def _branches(self) -> list[_Branch]:
        """All prefixes that are cached, each after the one that it continues."""
        none = Reads(np.zeros(0, np.int64), np.zeros(0, np.int64))
        branches = [_Branch(0, 0, none)]
        # Leaves, the tokens that they share in the cache, and the branch of these. The last one is the next.
        waiting = [(0, len(self.leaves), 0, branches[0])]
        while waiting:
            first, stop, depth, branch = waiting.pop()
            excess = self._size(first, stop, depth) - self.most
            if excess <= 0:
                branch.units.append((first, stop))
                continue
            common = int(self.shared[first + 1 : stop].min()) if stop - first > 1 else len(self.leaves[first])
            # The first leaf may end here; then the branch is all of it.
            parts = self._parts(first, stop, common)
            ends_here = len(self.leaves[first]) == common
            edge = common - depth
            if self._filled(excess) <= edge:
                # The rest of the prefix and all below it fit into one step.
                parts, common = [(first, stop)], depth + self._filled(excess)
            elif parts and self._filled(edge) >= edge * (len(parts) + ends_here):
                parts = [(first, first + 1)] * ends_here + parts
                waiting += [(*part, depth, branch) for part in reversed(parts)]
                continue
            found = [self.reads[leaf].between(depth, common) for leaf in range(first, stop)]
            reads = Reads(*(np.concatenate([getattr(one, name) for one in found]) for name in ("positions", "ids")))
            branch = _Branch(first, common, reads)
            branches.append(branch)
            waiting += [(*part, common, branch) for part in reversed(parts)]
        return branches

    def _filled(self, count: int) -> int:
        return -(-count // self.unit) * self.unit

    def _parts(self, first: int, stop: int, common: int) -> list[tuple[int, int]]:
        """The leaves that are longer than `common`, by the token that follows it."""
        begins = [first + 1 + int(at) for at in np.flatnonzero(self.shared[first + 1 : stop] == common)]
        if len(self.leaves[first]) > common:
            begins.insert(0, first)
        return list(zip(begins, [*begins[1:], stop], strict=True)) if begins else []

    def _rows(self, branch: _Branch) -> list[_Row]:
        """The parts below a branch, packed into as few steps as can be: the largest first, into the fullest."""
        sizes = {unit: self._size(*unit, branch.depth) for unit in branch.units}
        rooms: list[int] = []
        packed: list[list[tuple[int, int]]] = []
        for unit in sorted(sizes, key=lambda unit: (-sizes[unit], unit)):
            fitting = [place for place, room in enumerate(rooms) if room >= sizes[unit]]
            if fitting:
                place = min(fitting, key=lambda place: (rooms[place], place))
            else:
                place = len(rooms)
                rooms.append(self.most)
                packed.append([])
            rooms[place] -= sizes[unit]
            packed[place].append(unit)
        if not packed and len(branch.reads.ids):
            packed = [[]]  # nothing but the prefix
        return [_Row(branch, tuple(sorted(units)), sum(sizes[unit] for unit in units)) for units in packed]

    def _common(self, one: _Branch, other: _Branch) -> int:
        """Number of tokens that the prefixes of two branches, the first one before the other, share."""
        least = min(one.depth, other.depth)
        if one.leaf == other.leaf:
            return least
        return min(least, int(self.shared[one.leaf + 1 : other.leaf + 1].min()))

    def _steps(self, rows: list[tuple[_Row, bool]]) -> Iterator[Step]:
        """The steps of a lane from its rows, each with whether it is the first of its branch in any lane."""
        held = _Branch(0, 0, Reads(np.zeros(0, np.int64), np.zeros(0, np.int64)))
        for row, first in rows:
            branch = row.branch
            if branch is not held:
                start = self._common(held, branch)
                if first and len(branch.reads.ids):
                    start = min(start, int(branch.reads.positions.min()))
                yield from self._enter(branch, start, first)
                held = branch
            if row.units:
                yield self._row_step(row)

    def _enter(self, branch: _Branch, start: int, first: bool) -> Iterator[Step]:
        while start < branch.depth:
            stop = min(start + self.most, branch.depth)
            here = (branch.reads.positions >= start) & (branch.reads.positions < stop) & first
            yield Step(
                start,
                self.leaves[branch.leaf][start:stop],
                np.arange(start, stop, dtype=np.int32),
                np.full(stop - start, stop - start, np.int32),
                True,
                branch.reads.positions[here] - start,
                branch.reads.ids[here],
            )
            start = stop

    def _row_step(self, row: _Row) -> Step:
        depth = row.branch.depth
        tokens, depths, ends = (np.empty(row.tokens, np.int32) for _ in range(3))
        slots, ids = [], []
        at = 0
        for first, stop in row.units:
            path = np.empty(max(len(leaf) for leaf in self.leaves[first:stop]), np.int64)  # slot of each depth
            length = depth
            for leaf in range(first, stop):
                kept = max(int(self.shared[leaf]), depth) if leaf > first else depth
                ends[path[kept:length]] = at
                length = len(self.leaves[leaf])
                new = slice(at, at + length - kept)
                tokens[new] = self.leaves[leaf][kept:]
                depths[new] = np.arange(kept, length)
                path[kept:length] = np.arange(new.start, new.stop)
                at = new.stop
                reads = self.reads[leaf].between(depth, length)
                slots.append(path[reads.positions])
                ids.append(reads.ids)
            ends[path[depth:length]] = at
        return Step(depth, tokens, depths, ends, False, np.concatenate(slots), np.concatenate(ids))


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the longest common prefix."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length
