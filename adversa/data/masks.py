"""Where the lesion is: masks as given with the data set, or made from the picture; grown, and
feathered for blending.

A mask is bool [N, H, W], True on the lesion. All of it is deterministic, and a row does not depend
on its neighbours.

How one is made (`found`): hair is closed away, black corners and bars are set aside, skin is the
colour of the lighter part of the border, and Otsu's threshold (1979) parts the pixels by their
distance from that colour in CIE L*a*b*. The largest central piece, closed and filled, is the
lesion. Lengths are in 64ths of the shorter side, so that pictures of any resolution give the same
shape. The constants were chosen by the mean Jaccard index with HAM10000's own masks on 475 of its
10,015 pictures. On 400 others drawn by chance it is 0.83, at 64 and at 128 pixels; a central
ellipse has 0.51. What goes wrong: pink carcinomas without an edge, shadows that are stronger than
the lesion, a neighbour larger than the lesion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy import ndimage
from skimage import color, filters, measure, morphology

from adversa.storage import tables
from adversa.types import UserError

Mask = NDArray[np.bool_]
Array = NDArray[np.float64]

GIVEN, FOUND, ELLIPSE = "given", "found", "ellipse"
ELLIPSE_RADIUS = 0.7  # of the half sides: the central ellipse that overlaps HAM10000's masks best
BLACK = (
    45  # no channel above it: no skin of any type photographs as dark, a dermatoscope's rim does
)
# Weights of L*, a*, b* in the distance from skin: lamps change lightness across a picture more than
# hue. Lighter than skin is mostly a reflection of the lamp, so little of it counts.
WEIGHTS, LIGHTER = np.array([0.7, 1.0, 1.2]), 0.2
# A doctor's outline takes in the lesion's faint edge, Otsu's threshold halves it.
LOOSEN = 0.8
# A colour difference of about 2.3 is just noticeable (Mahy et al. 1994): with less there is nothing
# to outline.
LEAST_CONTRAST = 3.0
LEAST_AREA, MOST_AREA = 0.003, 0.97  # of the picture
# larger pictures are looked at reduced: no truer at 256, and the time grows with the fourth power
WORKING_SIDE = 128


@dataclass(frozen=True)
class _Field:
    """What depends on the picture's size alone: the unit of length in pixels, and r [H, W], 1 at
    the middle of the nearer sides.
    """

    unit: float
    r: Array


@lru_cache(maxsize=4)
def _field(h: int, w: int) -> _Field:
    y, x = np.indices((h, w))
    r = np.hypot((x - (w - 1) / 2) / (w / 2), (y - (h - 1) / 2) / (h / 2))
    return _Field(min(h, w) / 64, r)


def found(images: np.ndarray) -> tuple[Mask, Mask]:
    """Lesion masks made from pictures uint8 [N, H, W, 3]: (bool [N, H, W], bool [N]: nothing
    plausible, a central ellipse instead).

    No mask is empty in pictures of at least 3 x 3 pixels.
    """
    assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3, (
        images.dtype,
        images.shape,
    )
    masks, fell_back = np.zeros(images.shape[:3], bool), np.zeros(len(images), bool)
    h, w = images.shape[1:3]
    for i, image in enumerate(images):
        small = _reduced(image)
        mask = _lesion(small, black_frame(small))
        fell_back[i] = mask is None
        masks[i] = ellipse(h, w, black_frame(image)) if mask is None else _enlarged(mask, h, w)
    return masks, fell_back


def _reduced(image: np.ndarray) -> np.ndarray:
    h, w = image.shape[:2]
    scale = WORKING_SIDE / min(h, w)
    if scale >= 1:
        return image
    return np.asarray(
        Image.fromarray(image).resize((round(w * scale), round(h * scale)), Image.Resampling.BOX)
    )


def _enlarged(mask: Mask, h: int, w: int) -> Mask:
    if mask.shape == (h, w):
        return mask
    return (
        np.asarray(
            Image.fromarray(mask.astype(np.float32)).resize((w, h), Image.Resampling.BILINEAR)
        )
        >= 0.5
    )


def of_rows(
    masks: Sequence[bytes | None], images: np.ndarray, names: Sequence[str] | None = None
) -> tuple[Mask, list[str]]:
    """The masks of examples: (bool [N, H, W], where each came from: GIVEN, FOUND or ELLIPSE).

    masks: a column of PNGs, None where there is none; images: uint8 [N, H, W, 3]; names: of the
    examples, for messages. UserError for a given mask that can't be read, is empty or has another
    size.
    """
    assert len(masks) == len(images) and (names is None or len(names) == len(images)), (
        len(masks),
        len(images),
    )
    out, origin = np.zeros(images.shape[:3], bool), [GIVEN] * len(images)
    missing = [i for i, data in enumerate(masks) if data is None]
    for i, data in enumerate(masks):
        if data is not None:
            out[i] = _given(data, images.shape[1:3], names[i] if names else f"row {i}")
    if missing:
        out[missing], fell_back = found(images[missing])
        for i, is_ellipse in zip(missing, fell_back, strict=True):
            origin[i] = ELLIPSE if is_ellipse else FOUND
    return out, origin


def _given(data: bytes, size: tuple[int, ...], name: str) -> Mask:
    fix = "fix it, or leave it out and one is made from the picture"
    try:
        mask = tables.decode_png(data)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as e:
        raise UserError(
            f"mask of {name}: not a PNG that can be read ({' '.join(str(e).split())}); {fix}"
        ) from None
    if mask.shape != size:
        raise UserError(
            f"mask of {name}: its shape is {list(mask.shape)}, but the picture's is "
            f"{list(size)}; {fix}"
        )
    mask = mask > (0 if mask.dtype == np.bool_ else 127)
    if not mask.any():
        raise UserError(f"mask of {name}: empty, no pixel of it is lesion; {fix}")
    return mask


def feather(mask: Mask, width: float) -> NDArray[np.float32]:
    """Weights float32 [N, H, W] of the painted picture: painted * w + known * (1 - w) is the known
    picture exactly where w is 0.

    0 outside the mask, and inside it the distance to the nearest pixel outside (1 for the
    outermost) over `width` pixels, at most
    1. So the seam is blended inside what is painted, and known pixels stay as they are. The
       picture's own border is no seam: there is nothing beyond it to agree with. A piece of the
       mask too thin for `width` has a ramp as long as it is deep, so that every piece reaches 1.
       Widths up to 1 give a hard edge.
    """
    assert mask.dtype == np.bool_ and mask.ndim == 3 and width >= 0, (mask.dtype, mask.shape, width)
    out = np.zeros(mask.shape, np.float32)
    for weight, m in zip(out, mask, strict=True):
        if m.all():
            weight[:] = 1
        elif m.any():
            depth = ndimage.distance_transform_edt(m)
            pieces, count = ndimage.label(m, np.ones((3, 3)))
            deepest = np.concatenate(
                [[1.0], ndimage.maximum(depth, pieces, np.arange(1, count + 1))]
            )
            weight[:] = np.minimum(depth / np.clip(min(width, np.inf), 1, deepest[pieces]), 1)
    return out


def grow(mask: Mask, px: float) -> Mask:
    """The mask bool [N, H, W] and every pixel within `px` of it (between centres, Euclidean): the
    lesion with a margin.
    """
    assert mask.dtype == np.bool_ and mask.ndim == 3 and px >= 0, (mask.dtype, mask.shape, px)
    return np.stack([_near(m, px) for m in mask]) if len(mask) else mask.copy()


def _near(mask: Mask, px: float) -> Mask:
    return ndimage.distance_transform_edt(~mask) <= px if mask.any() else mask.copy()


def black_frame(image: np.ndarray) -> Mask:
    """Black corners and bars of a picture uint8 [H, W, 3]: pixels with no channel above BLACK that
    hang together with a corner.
    """
    pieces = measure.label(image.max(-1) <= BLACK, connectivity=1)
    return np.isin(pieces, [p for p in np.unique(pieces[[0, 0, -1, -1], [0, -1, 0, -1]]) if p])


def ellipse(h: int, w: int, frame: Mask | None = None) -> Mask:
    """The central ellipse [H, W] that stands in for a lesion, without the black frame where
    anything is left of it then.
    """
    mask = _field(h, w).r <= ELLIPSE_RADIUS
    inner = mask if frame is None else mask & ~frame
    return inner if inner.any() else mask


def _lesion(image: np.ndarray, frame: Mask) -> Mask | None:
    """The lesion [H, W], or None where nothing plausible is found."""
    field = _field(*image.shape[:2])
    ok = ~_near(frame, 2 * field.unit)  # the rim's shadow is no skin either
    distance = _distance_from_skin(image, ok, field)
    if distance is None:
        return None
    central = distance * np.clip(
        1 - 0.5 * np.maximum(field.r - 0.6, 0), 0, 1
    )  # lamps leave the corners dark
    values = central[ok]
    for _ in range(2):  # a small lesion among shadows is what stands out of what stands out
        threshold = filters.threshold_otsu(values)
        mask = _central_pieces((central > LOOSEN * threshold) & ok, field) & ~frame
        if _is_plausible(mask, distance, ok):
            return mask
        values = values[values > threshold]
        if not len(values) or values.min() == values.max():
            break
    return None


def _is_plausible(mask: Mask, distance: Array, ok: Mask) -> bool:
    """Whether a mask [H, W] has a lesion's size, and differs from what is around it."""
    inside, outside = mask & ok, ok & ~mask
    if not LEAST_AREA <= mask.mean() <= MOST_AREA or not inside.any() or not outside.any():
        return False
    return bool(np.median(distance[inside]) - np.median(distance[outside]) >= LEAST_CONTRAST)


def _distance_from_skin(image: np.ndarray, ok: Mask, field: _Field) -> Array | None:
    """Of each pixel in L*a*b*, 0 where not ok, float [H, W]; None where too little of the border
    can be seen.

    Skin is the median of the border's lighter third: a lesion that crosses the border is mostly
    darker.
    """
    hair = morphology.disk(max(1, round(1.5 * field.unit)))
    clean = np.stack(
        [ndimage.grey_closing(image[..., c], footprint=hair, mode="nearest") for c in range(3)], -1
    )
    blurred = _blur(clean / 255.0, ok, 0.6 * field.unit)
    lab = color.rgb2lab(np.clip(blurred, 0, 1))
    ring = ok & (ndimage.distance_transform_edt(np.pad(ok, 1))[1:-1, 1:-1] <= 5 * field.unit)
    if ring.sum() < 16 * field.unit:
        return None
    light = ring & (lab[..., 0] >= np.quantile(lab[..., 0][ring], 2 / 3))
    away = (lab - np.median(lab[light], axis=0)) * WEIGHTS
    away[..., 0] *= np.where(away[..., 0] > 0, LIGHTER, 1)
    distance: Array = np.sqrt((away**2).sum(-1)) * ok
    return distance


def _blur(image: Array, ok: Mask, sigma: float) -> Array:
    """Gaussian mean [H, W, 3] over the pixels that are ok."""
    share = ndimage.gaussian_filter(ok.astype(np.float64), sigma)
    blurred = ndimage.gaussian_filter(image * ok[..., None], (sigma, sigma, 0))
    found: Array = blurred / np.maximum(share, 1e-3)[..., None]
    return found


def _central_pieces(mask: Mask, field: _Field) -> Mask:
    """The piece that has most of the centre, with those half as central; closed, grown to the faint
    edge, and filled.
    """
    mask = ndimage.binary_opening(mask, morphology.disk(max(1, round(1.5 * field.unit))))
    pieces = measure.label(mask, connectivity=1)
    if not pieces.any():
        return mask
    weight = np.bincount(pieces.ravel(), np.exp(-((field.r / 0.6) ** 2)).ravel())
    weight[0] = 0
    mask = (weight >= 0.5 * weight.max())[pieces] & (pieces > 0)
    k = max(1, round(5 * field.unit))
    closed = ndimage.distance_transform_edt(_near(np.pad(mask, k + 1), k)) > k
    filled: Mask = ndimage.binary_fill_holes(
        _near(closed[k + 1 : -k - 1, k + 1 : -k - 1], field.unit)
    )
    return filled
