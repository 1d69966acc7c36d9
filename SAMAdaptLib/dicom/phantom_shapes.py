"""The organs of the torso phantom as functions of space: what lies at a point, and how dense it is.

Lengths are millimetres in the phantom's own RAS frame, whose origin is the middle of the body. Every shape
is a smooth function that is at most 1 inside; the order of painting settles who owns a point that two
shapes claim. Densities are those of a portal-venous CT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Points = tuple[Array, Array, Array]
"""R, A and S of many points, of shapes that broadcast together."""

Triple = tuple[float, float, float]

Inside = Callable[[Points], NDArray[np.bool_]]

AIR_HU = -1000.0
_HALF_BODY = (165.0, 112.0)
_RIB_COUNT = 8


@dataclass(frozen=True, eq=False)
class Part:
    """One painted structure.

    Attributes:
        name: As in the table of organs where it is one.
        density_hu: Mean density.
        inside: Which points belong to it.
    """

    name: str
    density_hu: float
    inside: Inside


def torso_parts(seed: int) -> list[Part]:
    """Return the structures in the order of painting; the seed varies organs a little in size and place."""
    vary = _Variation(seed)
    return [
        Part("fat", -100, _body(1.0)),
        Part("muscle", 55, _body(0.88)),
        Part("cavity fat", -95, _body(0.74)),
        *_bowel(vary),
        *_chest(vary),
        *_upper_organs(vary),
        *_kidneys(vary),
        *_vessels_and_bones(),
    ]


class _Variation:
    """Small reproducible changes of place and size."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng([seed, 2718])

    def place(self, *centre: float) -> Array:
        return np.asarray(centre) + self._random.uniform(-3, 3, 3)

    def size(self, *radii: float) -> Array:
        return np.asarray(radii) * self._random.uniform(0.96, 1.04, 3)

    def spots(self, count: int, low: Triple, high: Triple) -> Array:
        return self._random.uniform(np.asarray(low), np.asarray(high), (count, 3))


def _ellipsoid_value(points: Points, centre: Array, radii: Array, tilt: float = 0.0) -> Array:
    """Squared distance from the centre in radii; `tilt` leans the long axis to the right per mm upwards."""
    r, a, s = points
    up = s - centre[2]
    right = r - centre[0] - tilt * up
    return (right / radii[0]) ** 2 + ((a - centre[1]) / radii[1]) ** 2 + (up / radii[2]) ** 2


def _ellipsoid(centre: Array, radii: Array, tilt: float = 0.0) -> Inside:
    return lambda points: _ellipsoid_value(points, centre, radii, tilt) <= 1


def _body(scale: float) -> Inside:
    """Flattened oval that narrows a little towards the chest."""

    def inside(points: Points) -> NDArray[np.bool_]:
        r, a, s = points
        narrowing = scale * (1 - 0.0004 * np.abs(s))
        value = (
            np.abs(r / (_HALF_BODY[0] * narrowing)) ** 2.4 + np.abs(a / (_HALF_BODY[1] * narrowing)) ** 2.4
        )
        return np.asarray(value <= 1)

    return inside


def _bowel(vary: _Variation) -> list[Part]:
    """Loops in the lower belly: things of organ density that are no organ."""
    spots = vary.spots(14, (-70, 5, -115), (70, 55, -55))
    radii = vary.spots(14, (12, 10, 10), (20, 15, 18))
    return [Part("bowel", 35, _ellipsoid(spot, radius)) for spot, radius in zip(spots, radii, strict=True)]


def _chest(vary: _Variation) -> list[Part]:
    right = _ellipsoid(vary.place(78, 0, 118), vary.size(56, 70, 62))
    left = _ellipsoid(vary.place(-78, -4, 118), vary.size(52, 70, 70))
    heart = _ellipsoid(vary.place(-22, 28, 118), vary.size(48, 42, 38))
    return [Part("right lung", -850, right), Part("left lung", -850, left), Part("heart", 150, heart)]


def _upper_organs(vary: _Variation) -> list[Part]:
    stomach_centre, stomach_radii = vary.place(-62, 42, 38), vary.size(34, 26, 42)
    stomach = _ellipsoid(stomach_centre, stomach_radii, tilt=-0.3)

    def stomach_air(points: Points) -> NDArray[np.bool_]:
        return stomach(points) & (points[1] > stomach_centre[1] + 0.55 * stomach_radii[1])

    return [
        Part("stomach", 20, stomach),
        Part("stomach air", -900, stomach_air),
        Part("liver", 110, _liver(vary)),
        Part("gallbladder", 10, _ellipsoid(vary.place(48, 46, -22), vary.size(13, 14, 22))),
        Part("spleen", 120, _spleen(vary)),
    ]


def _liver(vary: _Variation) -> Inside:
    """A big right and a flat left lobe that melt into each other, hollowed for the right kidney."""
    lobes = (
        (vary.place(72, 2, 38), vary.size(52, 66, 66)),
        (vary.place(24, 34, 46), vary.size(62, 36, 40)),
    )
    hollow_centre, hollow_radii = vary.place(40, -52, -22), vary.size(46, 46, 58)

    def inside(points: Points) -> NDArray[np.bool_]:
        nearness = sum(np.exp(-3.0 * _ellipsoid_value(points, *lobe)) for lobe in lobes)
        hollow = _ellipsoid_value(points, hollow_centre, hollow_radii)
        return np.asarray((nearness >= np.exp(-3.0)) & (hollow > 1))

    return inside


def _spleen(vary: _Variation) -> Inside:
    """An ellipsoid bent around the stomach."""
    centre, radii = vary.place(-97, -30, 46), vary.size(24, 46, 48)

    def inside(points: Points) -> NDArray[np.bool_]:
        r, a, s = points
        bent = r - 0.006 * (a - centre[1]) ** 2
        return _ellipsoid_value((bent, a, s), centre, radii) <= 1

    return inside


def _kidneys(vary: _Variation) -> list[Part]:
    return [
        Part("right kidney", 180, _kidney(vary.place(58, -48, -34), vary.size(29, 25, 52), -1.0)),
        Part("left kidney", 180, _kidney(vary.place(-58, -48, -20), vary.size(29, 25, 54), 1.0)),
    ]


def _kidney(centre: Array, radii: Array, towards_spine: float) -> Inside:
    """A leaning ellipsoid with a notch (hilum) on the side of the spine."""
    hilum = centre + np.array([towards_spine * radii[0], 6.0, 0.0])
    lean = 0.15 * towards_spine

    def inside(points: Points) -> NDArray[np.bool_]:
        notch = _ellipsoid_value(points, hilum, np.array([15.0, 12.0, 17.0]))
        return np.asarray((_ellipsoid_value(points, centre, radii, lean) <= 1) & (notch > 1))

    return inside


def _vessels_and_bones() -> list[Part]:
    return [
        Part("aorta", 170, _tube(-9, -24, 11.0)),
        Part("vena cava", 140, _tube(17, -20, 11.5)),
        Part("bone", 230, _spine),
        Part("spinal canal", 25, lambda points: _tube_value(points, 0, -80, 9.0) <= 1),
        Part("rib", 350, _ribs),
    ]


def _tube(right: float, anterior: float, radius: float) -> Inside:
    return lambda points: _tube_value(points, right, anterior, radius) <= 1


def _tube_value(points: Points, right: float, anterior: float, radius: float) -> Array:
    """An upright vessel that swings to and fro by 4 mm."""
    r, a, s = points
    swing = 4.0 * np.sin(s / 45.0)
    return np.asarray(((r - right - swing) ** 2 + (a - anterior) ** 2) / radius**2)


def _spine(points: Points) -> NDArray[np.bool_]:
    """Vertebral bodies with thinner waists, an arch behind the canal and a process to the back."""
    r, a, s = points
    waist = 1 - 0.12 * np.cos(2 * np.pi * s / 32.0)
    bodies = (r / (22 * waist)) ** 2 + ((a + 52) / (18 * waist)) ** 2 <= 1
    arch = (r / 17) ** 2 + ((a + 80) / 15) ** 2 <= 1
    process = (np.abs(r) < 4) & (a < -80) & (a > -100) & (np.cos(2 * np.pi * s / 32.0) > -0.3)
    return np.asarray(bodies | arch | process)


def _ribs(points: Points) -> NDArray[np.bool_]:
    """Thin rings on the chest wall, sinking towards the front, open in the middle."""
    r, a, s = points
    across, along = r / 138.0, a / 92.0
    radius = np.sqrt(across**2 + along**2)
    depth = np.abs(radius - 1) * 110.0
    height = s - 24.0 * along
    nearest = np.clip(np.round((height + 20) / 24.0), 0, _RIB_COUNT)
    from_centre = np.abs(height + 20 - 24.0 * nearest)
    return np.asarray((depth / 4.5) ** 2 + (from_centre / 6.0) ** 2 <= 1) & (along < 0.85)
