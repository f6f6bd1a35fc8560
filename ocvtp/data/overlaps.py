"""Images that are in two sets: the same file, or the same picture encoded, scaled or slightly changed anew.

A picture is told by its pHash (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, as the
package ImageHash computes it): signs of its 64 lowest frequencies. Letters: M images.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.data.decoding import open_image

DISTANCE: Final = 6
"""Bits of 64 in which pHashes of one picture may differ.

JPEG of quality 60 and scaling by 0.5 to 3.5 change at most 6 bits of a scene; of 240,000 pairs of different scenes the
least distance is 8, and half of them differ in 32.
"""
_SIDE, _LOW = 32, 8
_WAVES_FN: Final = np.cos(np.pi * np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE))  # DCT-II


@dataclass(frozen=True)
class Fingerprint:
    """Of an image: its name, the SHA-256 of its file, and the pHash of its picture as 16 hexadecimal digits."""

    name: str
    sha256: str
    phash: str

    @classmethod
    def of(cls, name: str, data: bytes) -> "Fingerprint":
        """Of the bytes of an image file; `BadImage` if it is none."""
        return cls(name, hashlib.sha256(data).hexdigest(), phash(open_image(data, name=name)))

    def to_dict(self) -> dict[str, str]:
        """JSON of this."""
        return asdict(self)


@dataclass(frozen=True)
class Overlap:
    """An image that another set has too, as `other`: what tells, and in how many of 64 bits they differ."""

    image: str
    other: str
    by: Literal["sha256", "phash"]
    distance: int

    def to_dict(self) -> dict[str, Any]:
        """JSON of this."""
        return asdict(self)


class Fingerprints:
    """Those of a set of images, in which others are looked up."""

    def __init__(self, known: Iterable[Fingerprint]) -> None:
        self.known = tuple(known)
        self._files = {one.sha256: one.name for one in reversed(self.known)}
        self._hashes_M: NDArray[np.uint64] = np.array([int(one.phash, 16) for one in self.known], np.uint64)

    def __len__(self) -> int:
        return len(self.known)

    def find(self, one: Fingerprint) -> Overlap | None:
        """The image of the set that is the same file, else the most similar one within `DISTANCE`; else None.

        Of equally similar ones the first.
        """
        if one.sha256 in self._files:
            return Overlap(one.name, self._files[one.sha256], "sha256", 0)
        if not self.known:
            return None
        distances_M = np.bitwise_count(self._hashes_M ^ np.uint64(int(one.phash, 16)))
        nearest = int(distances_M.argmin())
        if distances_M[nearest] > DISTANCE:
            return None
        return Overlap(one.name, self.known[nearest].name, "phash", int(distances_M[nearest]))


def phash(image: Image.Image) -> str:
    """The pHash of a picture of any size, as 16 hexadecimal digits."""
    grey_NN = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    low_FF = _WAVES_FN @ grey_NN @ _WAVES_FN.T
    return np.packbits(low_FF > np.median(low_FF)).tobytes().hex()
