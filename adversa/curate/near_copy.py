"""Is this picture (nearly) a copy of a real one, in pixels or in features?

In pixels two stages. A search finds candidates: the low frequencies of a picture's middle, under
the 8 mirror images and quarter turns, against each real picture's, shifted and cropped a few ways.
Each candidate is then aligned (turn, shift, crop) and compared: similarity says how much likelier
the picture is as a copy that was compressed, made noisy, brighter or of more contrast, than as
another picture (`window.evidence`). A correlation does not do: noise of 6 grey levels takes a faint
lesion's correlation with its own copy below that of strong lesions with each other.

What counts as near is measured, not set: it depends on how similar pictures of different lesions
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from adversa.curate import planted, search
from adversa.curate import window as win
from adversa.types import Ints, digest, seed_of

# A copy stays a copy: the largest threshold, below the 1 that a residue under EXACT grey levels is
# given.
LARGEST_THRESHOLD, EXACT = 0.999, 0.5
NOTHING = -1.0  # the similarity of a flat picture, or where there is no other
# (zoom, rows, columns) of the windows that each real picture is found by: within a pixel of shifts
# up to 3 and crops of 90%.
VIEWS = [
    (1.0, float(y), float(x))
    for moves in ((-2, 0, 2), (-3, -1, 1, 3))
    for y in moves
    for x in moves
]
VIEWS += [(0.9, y, x) for y, x in ((-1.2, -1.2), (-1.2, 1.2), (1.2, -1.2), (1.2, 1.2), (0.0, 0.0))]
ENTRIES, CANDIDATES, ALIGNED = (
    40,
    10,
    3,
)  # taken a turn; different real pictures aligned to a pixel; of these finely
QUERIES, PAIRS = 256, 1024  # at once
SAMPLE, SPECIMENS = 4000, 256  # pictures that set the threshold; that show what copying adds
ZOOMS, MOVES = np.linspace(0.85, 1, 13), np.linspace(-4, 4, 65)
_STEPS = np.array(
    [(0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1), (0.05, 0, 0), (-0.05, 0, 0)], np.float32
)


@dataclass(frozen=True)
class Scale:
    """What similarities are measured by, [window.COUNT] each: power of the pictures' coefficients,
    and of what copying adds.
    """

    signal: np.ndarray
    noise: np.ndarray


class NearCopy:
    """An index of real images, 13 KB an image, in the order of their ids.

    images: uint8 [N, H, W, 3], or an iterable of such blocks, so that not all of them need be in
    memory at once. The order of the rows makes no difference. like: the scale of an index whose
    similarities these are to be comparable with; None: measured here.
    """

    def __init__(
        self,
        ids: Sequence[str],
        images: np.ndarray | Iterable[np.ndarray],
        like: Scale | None = None,
    ) -> None:
        wanted = {ids[i] for i in drawn(ids, SPECIMENS)} if like is None else set()
        small, added, at = [], np.zeros((2, win.COUNT)), 0
        for block in [images] if isinstance(images, np.ndarray) else images:
            names = ids[at : at + len(block)]
            assert len(names) == len(block), "one image for each id"
            small.append(win.miniatures(block))
            chosen = [i for i, name in enumerate(names) if name in wanted]
            if chosen:
                added += _added(block[chosen], small[-1][chosen], [names[i] for i in chosen])
            at += len(block)
        assert at == len(ids) == len(set(ids)) > 0, "one image for each id, each id once"
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self.ids, self.small = [ids[i] for i in order], np.concatenate(small)[order]
        if like is None:
            noise = win.smooth(np.maximum(added.max(axis=0) / len(wanted), 1.0))
            like = Scale(self._power() + 1.0, noise)
        self._measure_by(like)
        self._entries = self._seen_through_views()

    @property
    def scale(self) -> Scale:
        return Scale(self.signal, self.noise)

    def save(self, file: BinaryIO) -> None:
        """Write everything that `load` needs to make the same index, uncompressed."""
        arrays = {"small": self.small, "entries": self._entries, **vars(self.scale)}
        np.savez(file, ids=np.array(self.ids), **arrays)

    @classmethod
    def load(cls, file: BinaryIO | Path) -> NearCopy:
        """The index that `save` wrote, to the bit."""
        with np.load(file, allow_pickle=False) as saved:
            scale = Scale(saved["signal"], saved["noise"])
            return cls._of(saved["ids"].tolist(), saved["small"], scale, saved["entries"])

    def extended(self, ids: Sequence[str], images: Iterable[np.ndarray]) -> NearCopy:
        """An index of these images and blocks of more, by the scale of these."""
        both = [*self.ids, *ids]
        small = np.concatenate([self.small, *map(win.miniatures, images)])
        assert len(small) == len(both) == len(set(both)), "one image for each id, each id once"
        order = sorted(range(len(both)), key=both.__getitem__)
        return self._of([both[i] for i in order], small[order], self.scale)

    @classmethod
    def _of(
        cls, ids: list[str], small: np.ndarray, scale: Scale, entries: np.ndarray | None = None
    ) -> NearCopy:
        """An index of sorted ids and their miniatures; entries: made here where not given."""
        index = cls.__new__(cls)
        index.ids, index.small = ids, small
        index._measure_by(scale)
        index._entries = index._seen_through_views() if entries is None else entries
        return index

    def _measure_by(self, scale: Scale) -> None:
        self.signal, self.noise = scale.signal, scale.noise
        self._weight = (1 / np.sqrt(self.signal + self.noise))[win.COARSE].astype(np.float32)

    def _power(self) -> np.ndarray:
        middle = _window(1, 0)
        power = np.zeros(win.COUNT)
        for start in range(0, len(self.ids), PAIRS):
            seen = win.coefficients(win.planes(self.small[start : start + PAIRS]), middle, middle)
            power += (seen.astype(np.float64) ** 2).sum(axis=0)
        return win.smooth(power / len(self.ids))

    def _seen_through_views(self) -> np.ndarray:
        """float32 [VIEWS * N, COARSE]: entry = view * N + row."""
        entries = np.empty((len(VIEWS), len(self.ids), win.COARSE.sum()), np.float32)
        for view, (zoom, y, x) in zip(entries, VIEWS, strict=True):
            for start in range(0, len(self.ids), PAIRS):
                here = slice(start, start + PAIRS)
                seen = win.coefficients(
                    win.planes(self.small[here]), _window(zoom, y), _window(zoom, x)
                )
                view[here] = self._prints(seen)
        return entries.reshape(-1, entries.shape[-1])

    def nearest(self, images: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """(similarity float64 [M] in [-1, 1], id of the most similar real image [M]) of uint8
        images [M, H, W, 3].

        Similarity is evidence / (|evidence| + number of coefficients): above 0, rather a copy than
        another picture; 1 where no difference is left.
        """
        similarity, row = self._search(win.miniatures(images), None, None)
        return similarity, [self.ids[i] for i in row]

    def cross_lesion_neighbours(
        self,
        ids: Sequence[str],
        groups: Sequence[str],
        among: Sequence[str] | None = None,
        most: int = SAMPLE,
    ) -> tuple[list[str], np.ndarray]:
        """(ids, similarity of each to its most similar real image of another group), of up to
        `most` indexed images.

        groups[i] is the lesion of ids[i], for all indexed; among: those that may be drawn (None:
        all). They are drawn by the hash of their ids: the same for any order. None are given where
        there is one lesion only.
        """
        codes = _codes(self.ids, ids, groups)
        if codes.max(initial=0) == 0:
            return [], np.zeros(0)
        may = set(self.ids if among is None else among)
        sample = [i for i in drawn(self.ids, len(self.ids)) if self.ids[i] in may][:most]
        return [self.ids[i] for i in sample], self._search(
            self.small[sample], codes[sample], codes
        )[0]

    def threshold(self, ids: Sequence[str], groups: Sequence[str], quantile: float) -> float:
        """The similarity from which on a picture is a near copy: `quantile` of
        `cross_lesion_neighbours`.
        """
        return threshold(self.cross_lesion_neighbours(ids, groups)[1], quantile)

    def _prints(self, c: np.ndarray) -> np.ndarray:
        prints = c[:, win.COARSE] * self._weight
        found: np.ndarray = prints / np.maximum(np.linalg.norm(prints, axis=1, keepdims=True), 1e-9)
        return found

    def pairs(self, threshold: float, rows: slice = slice(None)) -> list[tuple[str, str, float]]:
        """(id, id, similarity) of indexed pictures that are near copies of each other, sorted, each
        pair once.

        Of many alike not every pair is given, but a chain: each picture with its most similar ones.
        rows: of the pictures, in the order of their ids, whose pairs are looked for; slices that
        make up the whole find what the whole does.
        """
        own = np.arange(len(self.ids))
        asked = own[rows]
        found: dict[tuple[str, str], float] = {}
        for start in range(0, len(asked), QUERIES):
            here = asked[start : start + QUERIES]
            query, real, similarity = self._compared(self.small[here], here, own)
            for q, r, s in zip(here[query], real, similarity, strict=True):
                if s >= threshold:
                    key = (self.ids[min(q, r)], self.ids[max(q, r)])
                    found[key] = max(float(s), found.get(key, NOTHING))
        return [(a, b, s) for (a, b), s in sorted(found.items())]

    def _search(
        self, small: np.ndarray, query_group: np.ndarray | None, group: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Similarity to the most similar real image (of another group, where groups are given), and
        its row.
        """
        best, row = np.full(len(small), NOTHING), np.zeros(len(small), np.int64)
        for start in range(0, len(small), QUERIES):
            here = slice(start, start + QUERIES)
            query, real, similarity = self._compared(
                small[here], None if query_group is None else query_group[here], group
            )
            order = np.lexsort(
                (-real, similarity)
            )  # of equals the smallest id comes last and stays
            best[start + query[order]], row[start + query[order]] = similarity[order], real[order]
        return best, row

    def _compared(
        self, small: np.ndarray, query_group: np.ndarray | None, group: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(query, row of the real image, similarity), each [P]: the pairs that were aligned. Flat
        queries have none.
        """
        n, middle = len(small), _window(1, 0)
        turns = win.turned(win.planes(small)).reshape(8 * n, 3, win.SIDE, win.SIDE)
        seen = win.coefficients(turns, middle, middle)  # [8 n, COUNT], turn by turn
        query, real, turn, place = self._candidates(seen, n, query_group, group)
        flat = np.sqrt((seen[:n] ** 2).sum(axis=1) / win.WINDOW**2 / 3) < win.FLAT
        query, real, turn, place = (a[~flat[query]] for a in (query, real, turn, place))
        pictures = seen.reshape(8, n, -1)[turn, query]
        # A candidate's view may be a pixel off: before a first round of steps its evidence says
        # little.
        place, value, _ = self._align(pictures, real, place, (1,))
        chosen = _foremost(query, value, n)
        query, real, pictures = query[chosen], real[chosen], pictures[chosen]
        _, value, residue = self._align(pictures, real, place[chosen], (1, 0.5, 0.5, 0.25))
        # Matrix products of other shapes differ in the last bits: rounded, a verdict does not hang
        # on them.
        similarity = np.round(value / (np.abs(value) + win.COUNT), 5)
        return query, real, np.where(residue < EXACT, 1.0, similarity)

    def _candidates(
        self, seen: np.ndarray, n: int, query_group: np.ndarray | None, group: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(query [P], row of the real image [P], turn [P], (zoom, rows, columns) [P, 3]) of the
        pairs worth comparing.
        """
        count = len(self.ids)
        wanted = ENTRIES
        if group is not None:  # a lesion's other pictures stand before those of others
            wanted += min(3, int(np.bincount(group).max())) * len(VIEWS)
        wanted = min(wanted, len(self._entries))
        score, entry = search.most_alike(self._prints(seen), self._entries, wanted)
        score, entry = (
            a.reshape(8, n, wanted).transpose(1, 0, 2).reshape(n, -1) for a in (score, entry)
        )
        order = np.argsort(-score, axis=1, kind="stable")
        pairs: list[tuple[int, int, int, int]] = []
        for q in range(n):
            known: set[int] = set()
            for j in order[q]:
                view, real = divmod(int(entry[q, j]), count)
                if real in known or (
                    query_group is not None and group is not None and group[real] == query_group[q]
                ):
                    continue
                known.add(real)
                pairs.append((q, real, int(j) // wanted, view))
                if len(known) == CANDIDATES:
                    break
        found = np.array(pairs, np.int64).reshape(-1, 4)
        return found[:, 0], found[:, 1], found[:, 2], np.array(VIEWS, np.float32)[found[:, 3]]

    def _compare(
        self, pictures: np.ndarray, real: np.ndarray, place: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Evidence and residue of pairs: pictures' coefficients [P, COUNT] against real images seen
        from places [P, 3].
        """
        value, residue = np.empty(len(real)), np.empty(len(real))
        for start in range(0, len(real), PAIRS):
            part = slice(start, start + PAIRS)
            rows, columns = (_windows()[_slot(place[part, 0], place[part, k])] for k in (1, 2))
            other = win.coefficients(win.planes(self.small[real[part]]), rows, columns)
            value[part], residue[part] = win.evidence(
                pictures[part], other, self.signal, self.noise
            )
        return value, residue

    def _align(
        self, pictures: np.ndarray, real: np.ndarray, place: np.ndarray, sizes: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps of shift and zoom from `place`, of each size in turn: where they end, the evidence
        and the residue there.
        """
        value, residue = self._compare(pictures, real, place)
        for size in sizes:
            for step in _STEPS:
                there = place + size * step
                there[:, 0] = np.clip(there[:, 0], ZOOMS[0], ZOOMS[-1])
                # A window does not leave the picture: it has 26 points on 32.
                room = (win.SIDE - 1) / 2 - (win.WINDOW - 1) / 2 * there[:, :1]
                there[:, 1:] = np.clip(there[:, 1:], -room, room)
                v, r = self._compare(pictures, real, there)
                better = v > value
                place = np.where(better[:, None], there, place)
                value, residue = np.where(better, v, value), np.where(better, r, residue)
        return place, value, residue


class NearFeatures:
    """The same question in features: cosine similarity, float [N, D]. Rows may come in any
    order.
    """

    def __init__(self, ids: Sequence[str], features: np.ndarray) -> None:
        assert features.ndim == 2 and len(features) == len(ids) == len(set(ids)) > 0, (
            "one row for each id, each id once"
        )
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self.ids, self.features = [ids[i] for i in order], _rows(features)[order]
        assert np.isfinite(self.features).all(), "features of real images must be finite"

    def nearest(self, features: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """(cosine float64 [M], id of the most similar real image [M]); NaN where a row is not
        finite.
        """
        rows = _rows(features)
        known = np.isfinite(rows).all(axis=1)
        score, row = search.most_alike(np.where(known[:, None], rows, 0), self.features, 1)
        similarity = np.where(known, np.round(score[:, 0].astype(np.float64), 5), np.nan)
        return similarity, [self.ids[i] for i in row[:, 0]]

    def threshold(self, ids: Sequence[str], groups: Sequence[str], quantile: float) -> float:
        """As NearCopy.threshold, of cosines."""
        codes = _codes(self.ids, ids, groups)
        if codes.max(initial=0) == 0:
            return LARGEST_THRESHOLD
        sample = drawn(self.ids, SAMPLE)
        wanted = min(int(np.bincount(codes).max()) + 1, len(self.ids))
        score, row = search.most_alike(self.features[sample], self.features, wanted)
        score = np.where(codes[row] == codes[sample][:, None], NOTHING, score)
        return threshold(score.max(axis=1), quantile)


def threshold(similarities: np.ndarray, quantile: float) -> float:
    """Of similarities of real pictures to their most similar one of another lesion [N]: so a
    picture of one more, different lesion is flagged at about the rate 1 - quantile. At most 0.999:
    an exact copy is always flagged.
    """
    return (
        float(min(np.quantile(similarities, quantile), LARGEST_THRESHOLD))
        if len(similarities)
        else LARGEST_THRESHOLD
    )


def drawn(ids: Sequence[str], count: int) -> list[int]:
    """The rows of up to `count` ids, chosen by their hash: the same pictures in any order of
    rows.
    """
    return sorted(range(len(ids)), key=lambda i: digest("near copy", ids[i]))[:count]


def _added(images: np.ndarray, small: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """[2, COUNT]: squares of what compression and noise add to the images' coefficients, summed
    over images.
    """
    middle = win.window(1, 0)
    before = win.coefficients(win.planes(small), middle, middle)
    total = []
    for kind in (planted.jpeg, planted.noisy):
        copies = np.stack(
            [
                kind(x, np.random.default_rng(seed_of("planted", i)))
                for x, i in zip(images, ids, strict=True)
            ]
        )
        after = win.coefficients(win.planes(win.miniatures(copies)), middle, middle)
        total.append(((after - before) ** 2).sum(axis=0))
    return np.stack(total).astype(np.float64)


@cache
def _windows() -> np.ndarray:
    """float32 [ZOOMS * MOVES, 14, 32]."""
    return np.stack([win.window(z, m) for z in ZOOMS for m in MOVES])


def _window(zoom: float, move: float) -> np.ndarray:
    return _windows()[_slot(np.float64(zoom), np.float64(move))]


def _slot(zoom: np.ndarray | np.float64, move: np.ndarray | np.float64) -> Ints:
    z = np.rint((zoom - ZOOMS[0]) / (ZOOMS[1] - ZOOMS[0])).astype(int)
    found: Ints = z * len(MOVES) + np.rint((move - MOVES[0]) / (MOVES[1] - MOVES[0])).astype(int)
    return found


def _foremost(query: np.ndarray, value: np.ndarray, n: int) -> np.ndarray:
    """Positions of each query's ALIGNED largest values."""
    order = np.lexsort((-value, query))
    start = np.searchsorted(query[order], np.arange(n))
    found: np.ndarray = order[np.arange(len(order)) - start[query[order]] < ALIGNED]
    return found


def _codes(own: Sequence[str], ids: Sequence[str], groups: Sequence[str]) -> np.ndarray:
    group_of = dict(zip(ids, groups, strict=True))
    return np.unique(np.array([group_of[i] for i in own], dtype=object), return_inverse=True)[1]


def _rows(features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, np.float32)
    return np.ascontiguousarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))
